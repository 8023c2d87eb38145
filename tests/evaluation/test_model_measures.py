import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from clm_owt.evaluation.model_measures import RememberedLogits, measure_control, measure_model
from clm_owt.evaluation.predictions import prediction_statistics

SETTINGS = {"prompts": 4, "prompt_tokens": 6, "new_tokens": 8, "bins": 5, "top_k": 3, "samplings": {"all": 1.0}}


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 16, "n_positions": 16, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **shape)).eval()


@pytest.fixture(scope="module")
def windows() -> list[tuple[np.ndarray, int]]:
    return [(ids, 15) for ids in np.random.default_rng(0).integers(0, 50, (20, 16))]


class Counting:
    """How often a model was asked."""

    def __init__(self, model):
        self.model, self.config, self.device, self.calls = model, model.config, model.device, 0

    def __call__(self, *arguments, **more):
        self.calls += 1
        return self.model(*arguments, **more)


def test_remembered_logits_are_the_models_and_computed_once_within_the_limit(model, windows):
    counting = Counting(model)
    remembered = RememberedLogits(counting, limit=2 * 8 * 16 * 50 * 4)  # two of three batches
    for temperature in (1.0, 0.5, 1.0):
        expected = prediction_statistics(model, windows, 8, temperature)
        assert prediction_statistics(remembered, windows, 8, temperature) == expected
    assert counting.calls == 3 + 1 + 1


@torch.no_grad()
def test_a_control_has_the_entropy_that_is_asked_for(model, windows):
    measured = measure_model(RememberedLogits(model), windows, SETTINGS)
    entropy = measured["values"]["entropy"] - 0.2
    control = measure_control(RememberedLogits(model), windows, SETTINGS, entropy)
    assert control["values"]["entropy"] == pytest.approx(entropy, abs=1e-4) and control["temperature"] < 1
    assert control["values"]["all/entropy_drift"] != measured["values"]["all/entropy_drift"]
    assert len(control["entropy_by_position"]["all"]["generated"]) == 8 and len(control["bins"]) == 5


def test_where_no_temperature_gives_the_entropy_the_control_says_so(model, windows):
    assert measure_control(RememberedLogits(model), windows, SETTINGS, 10.0).keys() == {"error"}
