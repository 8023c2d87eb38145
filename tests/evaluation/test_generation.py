import itertools
import math
import re

import numpy as np
import pytest
import torch
from support.bigram import random_bigram
from transformers import GPT2Config, GPT2LMHeadModel, TopPLogitsWarper

from clm_owt.errors import InputError
from clm_owt.evaluation.generation import Generation, generation, nucleus, prompts_from, repetition, write_on

SETTINGS = {"temperature": 1.0, "top_p": 1.0, "model_temperature": 1.0}


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    """A tiny GPT-2 whose predictions depend on all tokens before, and are far from uniform."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=30,
        n_positions=24,
        n_embd=16,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=False,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def random_tokens(*shape: int, vocab_size: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def distribution(logits: torch.Tensor, temperature: float) -> list[float]:
    exponentials = [math.exp(logit / temperature) for logit in logits.double().tolist()]
    return [value / sum(exponentials) for value in exponentials]


def inside_nucleus(q: list[float], top_p: float) -> list[float]:
    kept, total = [0.0] * len(q), 0.0
    for token in sorted(range(len(q)), key=lambda token: -q[token]):
        kept[token] = q[token]
        total += q[token]
        if total >= top_p:
            break
    return [p / total for p in kept]


def entropy_of(q: list[float]) -> float:
    return -sum(p * math.log(p) for p in q if p > 0)


@torch.no_grad()
def brute_force(
    model: GPT2LMHeadModel, prompts: torch.Tensor, uniform: torch.Tensor, settings: dict[str, float]
) -> tuple[list[list[int]], list[list[float]]]:
    """Texts and entropies token by token, without a cache: the whole text through the model for each."""
    texts, entropies = [], []
    for prompt, numbers in zip(prompts.tolist(), uniform.tolist(), strict=True):
        text, found = list(prompt), []
        for number in numbers:
            logits = model(torch.tensor([text])).logits[0, -1] / settings["model_temperature"]
            found.append(entropy_of(distribution(logits, 1.0)))
            q = inside_nucleus(distribution(logits, settings["temperature"]), settings["top_p"])
            text.append(next(i for i, total in enumerate(itertools.accumulate(q)) if total > number))
        texts.append(text[len(prompt) :])
        entropies.append(found)
    return texts, entropies


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        {"temperature": 0.7, "top_p": 0.8, "model_temperature": 1.3},
        {"temperature": 1.0, "top_p": 1.0, "model_temperature": 0.6},
    ],
)
def test_text_and_entropies_are_those_of_one_forward_pass_for_each_token(gpt2, settings):
    prompts, uniform = random_tokens(5, 3), torch.rand(5, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        texts, entropies = write_on(gpt2, prompts, uniform, **settings)
    expected_texts, expected_entropies = brute_force(gpt2, prompts, uniform, settings)
    assert texts.tolist() == expected_texts
    np.testing.assert_allclose(entropies, expected_entropies, rtol=1e-5, atol=1e-6)


def test_entropies_on_real_text_are_those_of_the_same_positions(gpt2):
    prompts, continuations = random_tokens(5, 3), random_tokens(5, 12, seed=1)
    found = generation(
        gpt2, prompts, continuations, new_tokens=10, model_temperature=1.3, top_p=0.5, seed=0, batch_size=2
    )
    with torch.no_grad():
        logits = gpt2(torch.cat((prompts, continuations), 1)).logits
    expected = [
        np.mean([entropy_of(distribution(row[2 + position], 1.3)) for row in logits]) for position in range(10)
    ]
    assert found.real_entropy_by_position == pytest.approx(expected, rel=1e-5)
    assert found.entropy_by_position[0] == pytest.approx(found.real_entropy_by_position[0], rel=1e-5)
    drift = np.mean(found.entropy_by_position) - np.mean(found.real_entropy_by_position)
    assert found.entropy_drift == pytest.approx(drift)


def test_a_text_that_the_model_would_have_written_has_no_drift(gpt2):
    prompts = random_tokens(4, 3)
    with torch.no_grad():
        likeliest, _ = write_on(gpt2, prompts, torch.rand(4, 12), **SETTINGS | {"top_p": 1e-6})
    found = generation(gpt2, prompts, likeliest, new_tokens=12, top_p=1e-6, seed=0, batch_size=4)
    assert found.entropy_by_position == pytest.approx(found.real_entropy_by_position, rel=1e-4)
    assert found.entropy_drift == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("model_temperature", [1.0, 0.5])
def test_the_mean_entropy_at_each_position_of_a_bigram_model_is_as_its_chain_says(model_temperature):
    model, count = random_bigram(6), 4000
    transitions = np.array([distribution(row, model_temperature) for row in model.logits])
    entropies = np.array([entropy_of(row) for row in transitions.tolist()])
    prompts = torch.full((count, 1), 2)
    found = generation(
        model,
        prompts,
        prompts.expand(-1, 5),
        new_tokens=5,
        model_temperature=model_temperature,
        seed=0,
        batch_size=count,
    )
    state = np.eye(6)[2]
    for measured in found.entropy_by_position:
        error = math.sqrt((state @ entropies**2 - (state @ entropies) ** 2) / count)
        assert measured == pytest.approx(state @ entropies, abs=4 * error + 1e-5)
        state = state @ transitions
    assert found.real_entropy_by_position == pytest.approx([entropies[2]] * 5, rel=1e-5)


def test_a_seed_gives_one_text_whatever_the_batch_size():
    model, prompts, real = random_bigram(30), random_tokens(7, 3), random_tokens(7, 20)

    def generated(seed: int, batch_size: int) -> Generation:
        return generation(model, prompts, real, new_tokens=20, top_p=0.9, seed=seed, batch_size=batch_size)

    assert generated(1, 7) == generated(1, 2) != generated(2, 2)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    expected = TopPLogitsWarper(top_p)(None, logits).softmax(-1)
    found = nucleus(logits.softmax(-1), top_p)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected)


def test_repetition_is_counted_in_each_text_and_diversity_over_all():
    texts = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5, 1]])
    found = repetition(texts)
    # 4-grams of the first: 1234 2341 3412 4123 1234 2341 3412; of the second: 5555 six times and 5551
    assert found.seq_rep_4 == pytest.approx(((1 - 4 / 7) + (1 - 2 / 7)) / 2)
    assert found.distinct_1 == 5 / 20
    assert found.distinct_2 == (4 + 2) / 18
    assert found.distinct_3 == (4 + 2) / 16
    assert found.distinct_4 == (4 + 2) / 14
    assert repetition(torch.arange(20).view(2, 10)) == (0, 1, 1, 1, 1)


def test_random_texts_repeat_as_loops_count():
    texts = random_tokens(6, 30, vocab_size=3)
    rows, distinct, repeated = texts.tolist(), [], []
    for n in (1, 2, 3, 4):
        seen, ngrams = [], 0
        for row in rows:
            own = []
            for i in range(len(row) - n + 1):
                ngram = row[i : i + n]
                own += [ngram] if ngram not in own else []
                seen += [ngram] if ngram not in seen else []
                ngrams += 1
            if n == 4:
                repeated.append(1 - len(own) / (len(row) - 3))
        distinct.append(len(seen) / ngrams)
    assert repetition(texts) == pytest.approx((np.mean(repeated), *distinct))


def test_the_repetition_of_a_generation_is_that_of_its_texts():
    model, prompts = random_bigram(30), random_tokens(7, 3)
    found = generation(model, prompts, random_tokens(7, 20), new_tokens=20, seed=5, batch_size=3)
    uniform = torch.rand(7, 20, generator=torch.Generator().manual_seed(5))
    texts, _ = write_on(model, prompts, uniform, **SETTINGS)
    assert found[:5] == repetition(texts)


def test_prompts_are_spread_evenly_over_whole_pieces_of_the_windows():
    windows = [(np.arange(0, 10), 9), (np.arange(10, 13), 2), (np.arange(20, 32), 11)]
    assert prompts_from(windows, 5, 4).tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [20, 21, 22, 23],
        [24, 25, 26, 27],
        [28, 29, 30, 31],
    ]
    assert prompts_from(windows, 2, 4)[:, 0].tolist() == [0, 20]
    assert prompts_from(windows, 1, 12).dtype == torch.int64


def test_more_prompts_than_the_text_has_are_refused():
    with pytest.raises(InputError, match=re.escape("4 prompts with their continuations, 5 tokens together: the text")):
        prompts_from([(np.arange(12), 11)], 4, 5)


@pytest.mark.parametrize(
    ("new_tokens", "error", "message"),
    [
        (22, InputError, "3 tokens of a prompt and 22 new ones: expected at most the model's context of 24"),
        (3, InputError, "3 new tokens: expected at least 4"),
        (21, ValueError, r"continuations \[5, 20\]: expected \[5, at least 21\]"),
    ],
)
def test_a_generation_that_cannot_be_measured_is_refused(gpt2, new_tokens, error, message):
    length = 20 if error is ValueError else new_tokens
    with pytest.raises(error, match=message):
        generation(gpt2, random_tokens(5, 3), random_tokens(5, length), new_tokens=new_tokens, seed=0, batch_size=1)
