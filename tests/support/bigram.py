"""A model whose predictions are known: the next token depends on the last one alone, with given logits."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config

from clm_owt.evaluation.windows import Window

# Shares of 64 of the tokens that follow each of the tokens 0, 1, ...: the likeliest of each is alone.
SHARES = np.array(
    [
        [24, 16, 10, 6, 5, 3],
        [4, 28, 8, 12, 10, 2],
        [1, 2, 3, 5, 13, 40],
        [11, 9, 15, 10, 12, 7],
        [30, 1, 1, 20, 8, 4],
        [2, 6, 18, 6, 31, 1],
    ]
)


class Bigram:
    """What the evaluation asks of a GPT2LMHeadModel, with the logits [V, V] that follow each token."""

    device = torch.device("cpu")

    def __init__(self, logits: Tensor | np.ndarray, context: int = 64):
        self.logits = torch.as_tensor(logits)
        self.config = GPT2Config(
            vocab_size=len(self.logits), n_positions=context, bos_token_id=None, eos_token_id=None
        )

    def __call__(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


def pairs(shares: np.ndarray = SHARES) -> list[Window]:
    """A text in which each token is followed by the others in exactly these shares: windows of two tokens."""
    return [
        (np.array([token, following]), 1)
        for token, counts in enumerate(shares)
        for following, count in enumerate(counts)
        for _ in range(count)
    ]


def random_bigram(vocab_size: int, seed: int = 0) -> Bigram:
    return Bigram(2 * np.random.RandomState(seed).randn(vocab_size, vocab_size))


def random_windows(vocab_size: int, seed: int = 0) -> list[Window]:
    """Of different lengths, some of whose first tokens are context only."""
    random = np.random.RandomState(seed)
    return [(random.randint(0, vocab_size, length), new) for length, new in ((9, 8), (5, 2), (12, 11), (2, 1), (7, 3))]


def probabilities(model: Bigram, windows: list[Window], temperature: float = 1.0) -> list[tuple[list[float], int]]:
    """The distribution at each predicted position, from float64 logits, and the token that follows."""
    found = []
    for ids, new in windows:
        for place in range(len(ids) - new, len(ids)):
            exponentials = np.exp(model.logits[ids[place - 1]].double().numpy() / temperature)
            found.append(((exponentials / exponentials.sum()).tolist(), int(ids[place])))
    return found
