"""What a model's next-token distributions are like: means over the predicted tokens of windows, the temperature that
gives a mean entropy, and what a sharpness penalty is predicted to do to them.

The prediction. A model that is free in every context and is trained on cross-entropy + λ · penalty ends, with q the
distribution of that context at λ = 0, where sum_i q_i log p_i - λ · penalty(p) is largest. By the gradients in
`clm_owt.model.losses` that is at

    penalty                      exactly                                       to first order in λ
    neg_entropy                  q_i = p_i (1 - λ (log p_i + H(p)))            p_i = q_i (1 + λ (log q_i + H(q)))
    non_max_sum, neg_max_prob    q_i = p_i (1 + λ p_m - λ 1[i = m])            p_i = q_i (1 + λ (1[i = m] - q_m))
    top_k_mass                   q_i = p_i (1 + λ S(p) - λ 1[i in K])          p_i = q_i (1 + λ (1[i in K] - S(q)))

so always p_i = q_i (1 + λ (g_i - E_q g)), with g_i = log q_i, 1[i = m] or 1[i in K]. A mean E h changes by
λ Cov_q(g, h), the entropy by -λ Cov_q(g, log q), and cross-entropy costs KL(q‖p) = λ²/2 Var_q(g) + O(λ³). For
neg_entropy this is to first order a temperature of 1/(1 + λ), p ∝ q^(1 + λ); at larger λ it is none.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clm_owt.batch import softmax_rows
from clm_owt.errors import InputError
from clm_owt.recipe import PENALTY_TYPES

if TYPE_CHECKING:
    from clm_owt.evaluation.windows import Window

ENTROPY_TOLERANCE = 1e-4  # nats
TEMPERATURES = (0.01, 100.0)  # the coldest and the hottest that are looked at
MOST_PASSES = 40  # over the windows, in search of a temperature; Newton's method takes about 4


@torch.no_grad()
def logit_chunks(
    model: PreTrainedModel, windows: Sequence["Window"], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [n, V], float32, of the predicted positions of the windows in their order, and the tokens that follow
    there [n], int64, both on the model's device; n is at most what suits its cache. `batch_size` windows are computed
    at a time, and their logits are all that exists of N x V. They are views of one tensor: not to be modified."""
    for i in range(0, len(windows), batch_size):
        batch = windows[i : i + batch_size]
        longest = max(len(ids) for ids, _ in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)  # filled up behind: causal attention hides it
        for row, (ids, _) in enumerate(batch):
            input_ids[row, : len(ids)] = torch.from_numpy(ids)
        input_ids = input_ids.to(model.device)
        logits = model(input_ids, use_cache=False).logits.float()
        rows = softmax_rows(logits.shape[-1], model.device.type)
        for row, (ids, new) in enumerate(batch):
            end = len(ids)
            predicted = logits[row, end - new - 1 : end - 1], input_ids[row, end - new : end]
            yield from zip(*(part.split(rows) for part in predicted), strict=True)


class PredictionStatistics(NamedTuple):
    """Means over predicted tokens. With q a next-token distribution, m its likeliest token, K its `top_k` likeliest
    and S their probability: `ce_loss` is that of the tokens that follow, in nats, `entropy` H that of q, in nats,
    `max_prob` q_m and `top_k_mass` S. The others, of which `predicted_effect` is made, are variances and covariances
    under q of log q_i, 1[i = m] and 1[i in K]: Var_q(log q), q_m (1 - q_m), S (1 - S), q_m (log q_m + H),
    sum_K q_i (log q_i + H) and q_m (1 - S)."""

    ce_loss: float
    entropy: float
    max_prob: float
    top_k_mass: float
    log_prob_variance: float
    max_prob_variance: float
    top_k_mass_variance: float
    log_prob_max_covariance: float
    log_prob_top_k_covariance: float
    max_top_k_covariance: float


def prediction_statistics(
    model: PreTrainedModel, windows: Sequence["Window"], batch_size: int, temperature: float = 1.0, top_k: int = 5
) -> PredictionStatistics:
    """Of the model at `temperature`, which divides its logits; computed in float32 and summed in float64."""
    sums, tokens = torch.zeros(len(PredictionStatistics._fields), dtype=torch.float64), 0
    for logits, targets in logit_chunks(model, windows, batch_size):
        # Summed on the CPU, since MPS has no float64.
        sums += statistics_of_rows(logits / temperature, targets, top_k).cpu().double().sum(1)
        tokens += len(targets)
    return PredictionStatistics(*(sums / tokens).tolist())


def statistics_of_rows(logits: Tensor, targets: Tensor, top_k: int) -> Tensor:
    """`PredictionStatistics` of each row of logits [n, V] and its target [n], int64: [number of fields, n]."""
    log_q = logits.log_softmax(-1)
    entropy, log_prob_variance = entropy_and_variance(log_q)
    log_likeliest = log_q.topk(min(top_k, log_q.shape[1])).values
    likeliest = log_likeliest.exp()
    max_prob, mass = likeliest[:, 0], likeliest.sum(1)
    with_log_prob = likeliest * (log_likeliest + entropy[:, None])
    return torch.stack(
        (
            -log_q.gather(1, targets[:, None]).squeeze(1),
            entropy,
            max_prob,
            mass,
            log_prob_variance,
            max_prob * (1 - max_prob),
            mass * (1 - mass),
            with_log_prob[:, 0],
            with_log_prob.sum(1),
            max_prob * (1 - mass),
        )
    )


def entropy_and_variance(log_q: Tensor) -> tuple[Tensor, Tensor]:
    """H in nats and Var_q(log q) [n] of log-probabilities [n, V]."""
    q = log_q.exp()
    entropy = -(q * log_q).sum(-1)
    return entropy, (log_q + entropy[:, None]).square_().mul_(q).sum(-1)


def temperature_for_entropy(
    model: PreTrainedModel, windows: Sequence["Window"], batch_size: int, entropy: float
) -> float:
    """The temperature at which the model's mean entropy on the windows is `entropy` nats, to `ENTROPY_TOLERANCE`.

    By Newton's method, since dH/d log T = E[Var_q(log q)], kept within what is known to be too cold and too hot.
    Raises InputError where no temperature between those of `TEMPERATURES` gives it.
    """
    problem = f"a mean entropy of {entropy:g} nats: no temperature between {TEMPERATURES[0]:g} and {TEMPERATURES[1]:g}"
    vocabulary = model.config.vocab_size
    if not 0 < entropy < math.log(vocabulary):
        raise InputError(f"{problem} gives it; expected more than 0 and less than log {vocabulary}")
    low, high = (math.log(temperature) for temperature in TEMPERATURES)
    log_temperature, found = 0.0, math.nan
    for _ in range(MOST_PASSES):
        found, slope = mean_entropy_and_slope(model, windows, batch_size, math.exp(log_temperature))
        missing = entropy - found
        if abs(missing) <= ENTROPY_TOLERANCE:
            return math.exp(log_temperature)
        if missing > 0:
            low = log_temperature
        else:
            high = log_temperature
        step = missing / slope if slope > 0 else math.inf
        between = low < log_temperature + step < high
        log_temperature = log_temperature + step if between else (low + high) / 2
    raise InputError(f"{problem} gives it to {ENTROPY_TOLERANCE:g}; the nearest that was found is {found:g}")


def mean_entropy_and_slope(
    model: PreTrainedModel, windows: Sequence["Window"], batch_size: int, temperature: float
) -> tuple[float, float]:
    """Means over the predicted tokens at a temperature: H in nats, and dH/d log T = Var_q(log q)."""
    sums, tokens = torch.zeros(2, dtype=torch.float64), 0
    for logits, targets in logit_chunks(model, windows, batch_size):
        rows = torch.stack(entropy_and_variance((logits / temperature).log_softmax(-1)))
        sums += rows.cpu().double().sum(1)
        tokens += len(targets)
    entropy, slope = (sums / tokens).tolist()
    return entropy, slope


def draw(q: Tensor, uniform: Tensor) -> Tensor:
    """A token [n], int64, from each row of probabilities [n, V], which need not add up to 1, by inverting their
    cumulative sum at numbers `uniform` [n] of [0, 1). A token of probability 0 is never drawn."""
    sums = q.cumsum(-1)
    # Numbers of torch.rand are at most 1 - 2^-24, and float32 rounds no product with that up to the total.
    return torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True).squeeze(1)


class PredictedEffect(NamedTuple):
    """Predicted changes of the fields of `PredictionStatistics` with the same names."""

    entropy: float
    max_prob: float
    top_k_mass: float
    ce_loss: float


def predicted_effect(
    statistics_at_zero: PredictionStatistics, penalty_type: str, penalty_weight: float
) -> PredictedEffect:
    """What a penalty of weight λ changes, to the lowest order in λ, from the statistics of the model at λ = 0:
    max_prob and top_k_mass by λ times a covariance, entropy by -λ times one, and ce_loss by λ²/2 · Var_q(g), which is
    a cost for either sign of λ. The formulas are derived in this module's docstring.

    They suppose that the model is free in each context, and that the text is distributed as q. Where the mean of g
    over the tokens of the text is not its mean under q, a change along g acts on cross-entropy to first order already:
    that of neg_entropy by λ (ce_loss - entropy), a gain for λ > 0 and a model whose entropy exceeds its cross-entropy,
    as that of a short training can. m and K are those of q: where its likeliest tokens are nearly equal, a negative λ
    exchanges them, and max_prob falls less than predicted.

    Raises ValueError for an unknown penalty type.
    """
    s = statistics_at_zero
    # Cov_q(g, .) with log q, 1[i = m] and 1[i in K]; Var_q(g).
    of_max = s.log_prob_max_covariance, s.max_prob_variance, s.max_top_k_covariance, s.max_prob_variance
    covariances = {
        "neg_entropy": (
            s.log_prob_variance,
            s.log_prob_max_covariance,
            s.log_prob_top_k_covariance,
            s.log_prob_variance,
        ),
        "non_max_sum": of_max,
        "neg_max_prob": of_max,
        "top_k_mass": (
            s.log_prob_top_k_covariance,
            s.max_top_k_covariance,
            s.top_k_mass_variance,
            s.top_k_mass_variance,
        ),
    }
    if penalty_type not in covariances:
        raise ValueError(f"penalty_type {penalty_type!r}: expected one of {', '.join(PENALTY_TYPES)}")
    log_prob, max_prob, top_k_mass, variance = covariances[penalty_type]
    return PredictedEffect(
        entropy=-penalty_weight * log_prob,
        max_prob=penalty_weight * max_prob,
        top_k_mass=penalty_weight * top_k_mass,
        ce_loss=penalty_weight**2 / 2 * variance,
    )
