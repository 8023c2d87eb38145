"""Text from a model that has learned nothing: the draws alone tell its texts apart."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from clm_owt.model.sampling import sample


@pytest.fixture(scope="module")
def ignorant(gpt2_tokenizer_folder):
    from transformers import AutoTokenizer

    config = GPT2Config(vocab_size=50_257, n_positions=64, n_embd=4, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model, AutoTokenizer.from_pretrained(gpt2_tokenizer_folder)


def draw(ignorant, *prompts: str, seed: int = 7) -> list[str]:
    return sample(*ignorant, prompts, max_new_tokens=8, temperature=1.0, top_p=1.0, seed=seed)


def test_different_prompts_do_not_go_on_alike_from_one_seed(ignorant):
    texts = draw(ignorant, "Once", "Twice", "Never")
    assert len(set(texts)) == 3


def test_a_continuation_depends_on_its_prompt_and_seed_alone(ignorant):
    (alone,) = draw(ignorant, "Twice")
    assert draw(ignorant, "Once", "Twice")[1] == alone
    assert draw(ignorant, "Twice", seed=8) != [alone]


def test_sampling_asks_for_no_deterministic_algorithms_and_leaves_the_run_s_choice(ignorant):
    """Of the nucleus's cumulative sum CUDA has no deterministic form."""
    within = []
    torch.use_deterministic_algorithms(True)
    try:
        sample(
            *ignorant, ["Once"], max_new_tokens=2, temperature=1.0, top_p=0.9, seed=7,
            check=lambda: within.append(torch.are_deterministic_algorithms_enabled()),
        )  # fmt: skip
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert within == [False, False]
