"""All that a study measures of a model: its predictions, their calibration, and the text that it generates."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from clm_owt.errors import InputError
from clm_owt.evaluation.calibration import calibration
from clm_owt.evaluation.generation import generation, prompts_from
from clm_owt.evaluation.predictions import prediction_statistics, temperature_for_entropy
from clm_owt.evaluation.windows import Window

BATCH_SIZE = 8  # windows at a time
REMEMBERED_BYTES = 2 * 2**30  # the quickstart's validation set takes 0.8 GB, GPT-2's on OpenWebText 220
SEED = 1  # of the generated texts, the same for all models


class RememberedLogits:
    """A model that gives logits of the same inputs without computing them again, for statistics at one temperature and
    another. Those that do not fit into `limit` bytes are computed each time."""

    def __init__(self, model: PreTrainedModel, limit: int = REMEMBERED_BYTES):
        self.model, self.config, self.device = model, model.config, model.device
        self._known: dict[bytes, Tensor] = {}
        self._left = limit

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        inputs = input_ids.cpu().numpy().tobytes()
        logits = self._known.get(inputs)
        if logits is None:
            logits = self.model(input_ids, use_cache=use_cache).logits
            if logits.nbytes <= self._left:
                self._known[inputs] = logits
                self._left -= logits.nbytes
        return SimpleNamespace(logits=logits)


def measure_model(
    model: RememberedLogits, windows: Sequence[Window], settings: Mapping[str, Any], temperature: float = 1.0
) -> dict[str, Any]:
    """The measures of a model at a temperature, as they are kept: `values` by name, those of generation as
    `<sampling>/<name>`; `bins` of the calibration; entropies by position, of each sampling. `settings` as in
    clm_owt.experiments.study.MeasuringSettings."""
    statistics = prediction_statistics(model, windows, BATCH_SIZE, temperature, settings["top_k"])
    found = calibration(model, windows, BATCH_SIZE, temperature, settings["bins"])
    values = statistics._asdict() | {name: value for name, value in found._asdict().items() if name != "bins"}
    prompt_tokens, new_tokens = settings["prompt_tokens"], settings["new_tokens"]
    texts = prompts_from(windows, settings["prompts"], prompt_tokens + new_tokens)
    by_position = {}
    for sampling, top_p in settings["samplings"].items():
        generated = generation(
            model.model,
            texts[:, :prompt_tokens],
            texts[:, prompt_tokens:],
            new_tokens=new_tokens,
            top_p=top_p,
            model_temperature=temperature,
            seed=SEED,
            batch_size=settings["prompts"],
        )
        numbers = {name: value for name, value in generated._asdict().items() if isinstance(value, float)}
        values |= {f"{sampling}/{name}": value for name, value in numbers.items()}
        by_position[sampling] = {
            "generated": generated.entropy_by_position,
            "real": generated.real_entropy_by_position,
        }
    return {
        "temperature": temperature,
        "values": values,
        "bins": [list(bin) for bin in found.bins],
        "entropy_by_position": by_position,
    }


def measure_control(
    model: RememberedLogits, windows: Sequence[Window], settings: Mapping[str, Any], entropy: float
) -> dict[str, Any]:
    """The measures of a model at the temperature that gives it this mean entropy (nats a token). Where there is none,
    `error` says so in their place."""
    try:
        temperature = temperature_for_entropy(model, windows, BATCH_SIZE, entropy)
    except InputError as error:
        return {"error": str(error)}
    return measure_model(model, windows, settings, temperature)
