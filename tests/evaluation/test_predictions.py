import math

import numpy as np
import pytest
import torch
from support.bigram import SHARES, Bigram, pairs, probabilities, random_bigram, random_windows
from transformers import GPT2Config, GPT2LMHeadModel

from clm_owt.errors import InputError
from clm_owt.evaluation.predictions import (
    ENTROPY_TOLERANCE,
    PredictionStatistics,
    draw,
    logit_chunks,
    predicted_effect,
    prediction_statistics,
    temperature_for_entropy,
)
from clm_owt.model.losses import reference_linear_loss
from clm_owt.recipe import PENALTY_TYPES

PERFECT = Bigram(np.log(SHARES / SHARES.sum(1, keepdims=True)))  # predicts the text of `pairs()` as it is
TOP_K = 2


def covariance(q: list[float], first: list[float], second: list[float]) -> float:
    means = [sum(p * value for p, value in zip(q, values, strict=True)) for values in (first, second)]
    return sum(p * (a - means[0]) * (b - means[1]) for p, a, b in zip(q, first, second, strict=True))


def brute_force_statistics(rows: list[tuple[list[float], int]], top_k: int) -> PredictionStatistics:
    """Each field by its definition, with loops."""
    fields = []
    for q, target in rows:
        order = sorted(range(len(q)), key=lambda token: -q[token])
        log_prob = [math.log(p) for p in q]
        is_max = [float(token == order[0]) for token in range(len(q))]
        in_top_k = [float(token in order[:top_k]) for token in range(len(q))]
        scores = (log_prob, is_max, in_top_k)
        fields.append(
            (
                -math.log(q[target]),
                -sum(p * math.log(p) for p in q),
                max(q),
                sum(q[token] for token in order[:top_k]),
                *(covariance(q, score, score) for score in scores),
                covariance(q, log_prob, is_max),
                covariance(q, log_prob, in_top_k),
                covariance(q, is_max, in_top_k),
            )
        )
    return PredictionStatistics(*(math.fsum(values) / len(rows) for values in zip(*fields, strict=True)))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 3), (0.7, 1), (1.6, 20)])
def test_statistics_are_what_loops_over_their_definitions_give(temperature, top_k):
    model, windows = random_bigram(7), random_windows(7)
    found = prediction_statistics(model, windows, batch_size=2, temperature=temperature, top_k=top_k)
    expected = brute_force_statistics(probabilities(model, windows, temperature), top_k)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_logits_come_in_the_order_of_the_windows_as_float32_and_in_chunks_that_suit_the_cache():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=2**17, n_positions=12, n_embd=4, n_layer=1, n_head=1)
    model, windows = GPT2LMHeadModel(config).eval().bfloat16(), random_windows(2**17)
    chunks = list(logit_chunks(model, windows, batch_size=2))
    assert all(logits.dtype == torch.float32 and targets.dtype == torch.int64 for logits, targets in chunks)
    assert [len(targets) for _, targets in chunks] == [8, 2, 8, 3, 1, 3]  # 4 MB are 8 rows
    with torch.no_grad():
        alone = [model(torch.from_numpy(ids)[None]).logits[0, -new - 1 : -1].float() for ids, new in windows]
    torch.testing.assert_close(torch.cat([logits for logits, _ in chunks]), torch.cat(alone), rtol=0.02, atol=0.01)
    assert torch.cat([targets for _, targets in chunks]).tolist() == [i for ids, new in windows for i in ids[-new:]]


@pytest.mark.parametrize("temperature", [0.05, 0.3, 0.95, 1.0, 2.5, 40.0])
def test_the_temperature_that_gives_a_mean_entropy_is_found(temperature):
    model, windows = random_bigram(7), random_windows(7)
    rows = probabilities(model, windows, temperature)
    entropy = brute_force_statistics([(np.clip(q, 1e-300, 1).tolist(), 0) for q, _ in rows], 1).entropy
    found = temperature_for_entropy(model, windows, 2, entropy)
    assert abs(prediction_statistics(model, windows, 2, found).entropy - entropy) <= ENTROPY_TOLERANCE
    assert found == pytest.approx(temperature, rel=0.01 if 0.2 < temperature < 3 else 0.2)


@pytest.mark.parametrize("temperature", [0.02, 1.0, 30.0])
def test_the_temperature_is_found_beyond_a_plateau_of_the_entropy(temperature):
    model, windows = Bigram(torch.tensor([[0.0, -0.02, -50.0, -50.0]] * 4)), [(np.array([0, 1]), 1)]
    entropy = prediction_statistics(model, windows, 1, temperature).entropy
    assert temperature_for_entropy(model, windows, 1, entropy) == pytest.approx(temperature, rel=1e-3)


def test_newtons_method_needs_few_passes():
    class Counting(Bigram):
        passes = 0

        def __call__(self, *arguments, **options):
            self.passes += 1
            return super().__call__(*arguments, **options)

    model, windows = Counting(random_bigram(7).logits), random_windows(7)
    entropy = prediction_statistics(model, windows, 8, temperature=0.8).entropy
    model.passes = 0
    temperature_for_entropy(model, windows, 8, entropy)
    assert model.passes <= 5


@pytest.mark.parametrize(
    ("logits", "entropy", "message"),
    [
        (torch.randn(4, 4), -0.1, "-0.1 nats: no temperature .* expected more than 0 and less than log 4"),
        (torch.randn(4, 4), math.log(4), "1.38629 nats: no temperature .* expected more than 0 and less than log 4"),
        (torch.randn(4, 4), math.nan, "nan nats: no temperature"),
        (torch.zeros(4, 4), 0.5, "0.5 nats: no temperature .* the nearest that was found is 1.38629"),
        (torch.tensor([[1.0, 1.0, 0.0]] * 3), 0.5, "0.5 nats: .* the nearest that was found is 0.693147"),
    ],
)
def test_an_entropy_that_no_temperature_gives_is_an_error_that_says_so(logits, entropy, message):
    with pytest.raises(InputError, match=message):
        temperature_for_entropy(Bigram(logits), [(np.array([0, 1, 2]), 2)], 1, entropy)


def trained_to_the_end(penalty_type: str, penalty_weight: float) -> Bigram:
    """A bigram model at the minimum of the training's own loss on the text of `pairs()`."""
    text = torch.tensor(np.array([ids for ids, _ in pairs()]))
    tokens = torch.eye(len(SHARES), dtype=torch.float64)[text[:, 0]]
    weight = PERFECT.logits.T.contiguous().requires_grad_()
    settings = {"penalty_type": penalty_type, "penalty_weight": penalty_weight, "penalty_top_k": TOP_K}
    options = {"max_iter": 500, "tolerance_grad": 1e-13, "tolerance_change": 1e-18, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weight], **options)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = reference_linear_loss(tokens, weight, text[:, 1], num_items=len(text), **settings).loss
        value.backward()
        return value

    optimizer.step(loss)
    assert weight.grad.abs().max() < 1e-8
    return Bigram(weight.detach().T)


def changes(before: PredictionStatistics, after: PredictionStatistics) -> list[float]:
    return [getattr(after, name) - getattr(before, name) for name in ("entropy", "max_prob", "top_k_mass", "ce_loss")]


@pytest.mark.parametrize("penalty_weight", [0.01, -0.01])
@pytest.mark.parametrize("penalty_type", PENALTY_TYPES)
def test_a_penalty_changes_a_model_that_is_free_in_each_context_as_predicted(penalty_type, penalty_weight):
    at_zero = prediction_statistics(PERFECT, pairs(), 400, top_k=TOP_K)
    penalised = trained_to_the_end(penalty_type, penalty_weight)
    measured = changes(at_zero, prediction_statistics(penalised, pairs(), 400, top_k=TOP_K))
    assert predicted_effect(at_zero, penalty_type, penalty_weight) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("weight", [0.01, -0.01])
def test_a_small_neg_entropy_penalty_is_a_temperature(weight):
    at_zero = prediction_statistics(PERFECT, pairs(), 400, top_k=TOP_K)
    tempered = prediction_statistics(PERFECT, pairs(), 400, temperature=1 / (1 + weight), top_k=TOP_K)
    assert predicted_effect(at_zero, "neg_entropy", weight) == pytest.approx(changes(at_zero, tempered), rel=0.02)


def test_the_exact_optima_are_those_of_the_modules_formulas():
    q = PERFECT.logits.exp()
    for penalty_type in PENALTY_TYPES:
        weight = 0.3
        p = trained_to_the_end(penalty_type, weight).logits.softmax(-1)
        best = p.topk(TOP_K if penalty_type == "top_k_mass" else 1, -1)
        chosen = torch.zeros_like(p).scatter(1, best.indices, 1)
        entropy = -(p * p.log()).sum(1, keepdim=True)
        factor = 1 + weight * (best.values.sum(1, keepdim=True) - chosen)
        if penalty_type == "neg_entropy":
            factor = 1 - weight * (p.log() + entropy)
        torch.testing.assert_close(p * factor, q, rtol=1e-5, atol=1e-7)


def test_where_the_text_is_not_as_predicted_a_temperature_changes_cross_entropy_to_first_order():
    model, weight = Bigram(0.8 * PERFECT.logits), 1e-3
    at_zero, sharper = (prediction_statistics(model, pairs(), 400, temperature=1 / (1 + w)) for w in (0, weight))
    assert at_zero.entropy > at_zero.ce_loss
    expected = weight * (at_zero.ce_loss - at_zero.entropy)
    assert sharper.ce_loss - at_zero.ce_loss == pytest.approx(expected, rel=0.02)


def test_an_unknown_penalty_has_no_predicted_effect():
    with pytest.raises(ValueError, match="penalty_type 'sharp': expected one of non_max_sum"):
        predicted_effect(PredictionStatistics(*[0.0] * 10), "sharp", 0.1)


def test_tokens_are_drawn_where_the_cumulative_sum_passes_the_number():
    q = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24])
    assert draw(q.expand(6, -1), numbers).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw(0.3 * q.expand(6, -1), numbers).tolist() == [1, 1, 3, 3, 4, 4]  # sums to 0.3
    grown = torch.tensor([[0.4, 0.6 + 2e-7, 0.0]])
    assert draw(grown, torch.tensor([1 - 2**-24])).tolist() == [1]
