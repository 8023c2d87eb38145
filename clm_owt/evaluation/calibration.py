"""Whether a model's probabilities are those with which the next token comes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clm_owt.evaluation.predictions import draw, logit_chunks

if TYPE_CHECKING:
    from clm_owt.evaluation.windows import Window

LABEL_SEED = 1234  # of the labels that a calibrated model would have met


class ReliabilityBin(NamedTuple):
    """The predictions whose largest probability lies in one bin: how many, the mean of that probability, and the share
    of them whose likeliest token came. The last two are None where there is no prediction."""

    count: int
    confidence: float | None
    accuracy: float | None


class Calibration(NamedTuple):
    """Expected calibration errors, over bins of equal width, the b-th of n being ((b - 1)/n, b/n].

    `top_label_ece`: of the likeliest token, sum_b n_b/N |accuracy_b - confidence_b| (Guo et al., "On calibration of
    modern neural networks", 2017). `bins` holds what it is made of, for the reliability diagram.
    `classwise_ece`: the same of every token's probability, mean over the V tokens of the vocabulary of
    sum_b n_b/N |share of the token_b - mean probability_b| (Kull et al., "Beyond temperature scaling", 2019; Nixon et
    al., "Measuring calibration in deep learning", 2019, call it static). Since most tokens are rare it is of the order
    of 1/V; V times it is the sum over the vocabulary, at most 2.

    Both are above 0 by chance alone, the second by a lot, since it is a sum of absolute values. The fields
    `..._by_chance` say how much: what the same predictions get with tokens drawn from them, that is, if they were
    perfectly calibrated (Bröcker and Smith, "Increasing the reliability of reliability diagrams", 2007).
    """

    top_label_ece: float
    classwise_ece: float
    top_label_ece_by_chance: float
    classwise_ece_by_chance: float
    bins: list[ReliabilityBin]


def calibration(
    model: PreTrainedModel, windows: Sequence["Window"], batch_size: int, temperature: float = 1.0, bins: int = 15
) -> Calibration:
    """Of the model at `temperature`, which divides its logits, on the predicted tokens of the windows.

    Probabilities are float32, their sums float64. Of size N x V nothing is kept, of V x bins three sums: 18 MB for
    GPT-2's vocabulary.
    """
    generator = torch.Generator().manual_seed(LABEL_SEED)
    sums = None
    for logits, targets in logit_chunks(model, windows, batch_size):
        q = (logits / temperature).softmax(-1)
        drawn = draw(q, torch.rand(len(q), generator=generator).to(q.device))
        sums = sums or Sums(q.shape[1], bins)
        sums.add(q, targets, drawn)
    return sums.calibration()


def bin_of(probability: Tensor, bins: int) -> Tensor:
    """The bin, int64, of each probability, counted from 0: b where b/bins < probability <= (b + 1)/bins."""
    return (probability * bins).ceil().long().sub(1).clamp(0, bins - 1)


class Sums:
    """What a calibration is computed from, on the CPU, in float64. `came` and `drawn` stand for the tokens that came
    and for those that were drawn from the predictions."""

    def __init__(self, vocab_size: int, bins: int):
        self._bins = bins
        self._probability = torch.zeros(vocab_size, bins, dtype=torch.float64)  # of each token by its bin
        self._tokens = torch.zeros(2, vocab_size, bins, dtype=torch.float64)  # came and drawn
        self._count = torch.zeros(bins, dtype=torch.float64)
        self._confidence = torch.zeros(bins, dtype=torch.float64)
        self._correct = torch.zeros(2, bins, dtype=torch.float64)

    def add(self, q: Tensor, came: Tensor, drawn: Tensor) -> None:
        """Predictions [n, V] and their tokens [n], int64, twice."""
        bins = self._bins
        # All but a few probabilities of a row are in the lowest bin: only the others are looked at one by one.
        rows, tokens = (q * bins > 1).nonzero(as_tuple=True)
        high = q[rows, tokens].cpu()
        tokens = tokens.cpu()
        self._probability[:, 0] += q.sum(0).cpu()
        self._probability[:, 0].index_add_(0, tokens, high.double(), alpha=-1)
        self._probability.view(-1).index_add_(0, tokens * bins + bin_of(high, bins), high.double())
        confidence, likeliest = q.max(1)
        of_likeliest = bin_of(confidence, bins).cpu()
        self._count += of_likeliest.bincount(minlength=bins)
        self._confidence.index_add_(0, of_likeliest, confidence.cpu().double())
        for which, labels in enumerate((came, drawn)):
            own_bin = bin_of(q.gather(1, labels[:, None]).squeeze(1), bins)
            places = (labels * bins + own_bin).cpu()
            self._tokens[which].view(-1).index_add_(0, places, torch.ones(len(places), dtype=torch.float64))
            self._correct[which] += of_likeliest[(labels == likeliest).cpu()].bincount(minlength=bins)

    def calibration(self) -> Calibration:
        predictions = self._count.sum()
        top_label = (self._correct - self._confidence).abs().sum(1) / predictions
        classwise = (self._tokens - self._probability).abs().sum(2).mean(1) / predictions
        top_label_ece, top_label_ece_by_chance = top_label.tolist()
        classwise_ece, classwise_ece_by_chance = classwise.tolist()
        sums = zip(self._count.tolist(), self._confidence.tolist(), self._correct[0].tolist(), strict=True)
        bins = [ReliabilityBin(int(n), c / n if n else None, a / n if n else None) for n, c, a in sums]
        return Calibration(top_label_ece, classwise_ece, top_label_ece_by_chance, classwise_ece_by_chance, bins)
