"""The baselines: what models that only count reach on the tokens that a run sees."""

import numpy as np
import pytest

from clm_owt.data.ngrams import ngram_baselines, ngram_losses, seen_blocks

TRAIN = np.array([[0, 1, 0, 1], [0, 2, 0, 1]])
VALIDATION = np.array([[0, 1, 2]])


class StoreOf:
    """What the baselines use of a token store, with these blocks in it."""

    class Split:
        def __init__(self, blocks: np.ndarray):
            self.blocks, self.shard_rows = blocks, [len(blocks)]

        def __len__(self) -> int:
            return len(self.blocks)

        def read(self, rows: np.ndarray) -> np.ndarray:
            return self.blocks[rows]

    def __init__(self, train: np.ndarray, validation: np.ndarray):
        self.train, self.validation = self.Split(train), self.Split(validation)


def losses_by_hand(unigram: list[float], bigram_01: float, bigram_12: float) -> tuple[float, float]:
    """Of the targets of VALIDATION: 1 after 0, and 2 after 1."""
    return -np.log([unigram[1], unigram[2]]).mean(), -np.log([bigram_01, bigram_12]).mean()


def test_losses_are_those_computed_by_hand():
    unigram = [(4 + 1) / (8 + 3), (3 + 1) / (8 + 3), (1 + 1) / (8 + 3)]
    bigram_01 = (3 + 200 * unigram[1]) / (4 + 200)  # 0 is followed by 1, 1, 2, 1
    bigram_12 = (0 + 200 * unigram[2]) / (2 + 200)  # 1 by 0 and 0; the last 1 by nothing
    expected = losses_by_hand(unigram, bigram_01, bigram_12)
    assert ngram_losses(TRAIN, np.array([0, 1]), VALIDATION, 3) == pytest.approx(expected, rel=1e-12)


def test_no_pair_is_counted_across_blocks_that_are_not_neighbours_in_the_text():
    unigram = [(4 + 1) / (8 + 3), (3 + 1) / (8 + 3), (1 + 1) / (8 + 3)]
    bigram_01 = (3 + 200 * unigram[1]) / (4 + 200)
    bigram_12 = (0 + 200 * unigram[2]) / (1 + 200)  # the 1 at the end of the first block is followed by nothing
    expected = losses_by_hand(unigram, bigram_01, bigram_12)
    assert ngram_losses(TRAIN, np.array([0, 5]), VALIDATION, 3) == pytest.approx(expected, rel=1e-12)


def test_baselines_are_fitted_on_the_blocks_that_the_run_sees_and_on_all():
    draw = np.random.default_rng(0)
    train, validation = draw.integers(0, 7, (40, 16)), draw.integers(0, 7, (3, 16))
    positions = 13
    rows = np.random.RandomState([5, 0, 0]).permutation(40)[:positions]  # of epoch 0 and shard 0 with seed 5
    assert seen_blocks(5, [40], positions).tolist() == sorted(rows)
    seen = np.sort(rows)
    baselines = ngram_baselines(StoreOf(train, validation), 5, positions, 7)
    assert (baselines["unigram"], baselines["bigram"]) == ngram_losses(train[seen], seen, validation, 7)
    assert (baselines["unigram_all"], baselines["bigram_all"]) == ngram_losses(train, np.arange(40), validation, 7)
    assert (baselines["blocks"], baselines["blocks_all"]) == (13, 40)

    unseen = np.setdiff1d(np.arange(40), rows)
    train[unseen] = 6
    changed = ngram_baselines(StoreOf(train, validation), 5, positions, 7)
    assert (changed["unigram"], changed["bigram"]) == (baselines["unigram"], baselines["bigram"])
    assert changed["unigram_all"] != baselines["unigram_all"] and changed["bigram_all"] != baselines["bigram_all"]


@pytest.mark.parametrize("positions", [40, 41, 100])
def test_a_run_that_sees_every_block_has_one_pair_of_baselines(positions):
    train = np.random.default_rng(0).integers(0, 7, (40, 16))
    baselines = ngram_baselines(StoreOf(train, train[:2]), 5, positions, 7)
    assert baselines["blocks"] == baselines["blocks_all"] == 40
    assert baselines["unigram"] == baselines["unigram_all"] and baselines["bigram"] == baselines["bigram_all"]
