"""Baselines for a trained model: the losses of n-gram models, which only count, on the same tokens."""

from collections.abc import Sequence

import numpy as np

from clm_owt.data.order import Order, block_ids
from clm_owt.data.token_store import TokenStore

PRIOR_STRENGTH = 200.0


def ngram_baselines(store: TokenStore, seed: int, positions: int, vocab_size: int) -> dict[str, float | int]:
    """The losses of n-gram models on the validation blocks of a complete store: `unigram` and `bigram`, fitted on the
    distinct training blocks that the first `positions` positions of a run with this seed see, `blocks` of them; and
    `unigram_all` and `bigram_all`, fitted on all training blocks, `blocks_all` of them."""
    validation_blocks = store.validation.read(np.arange(len(store.validation)))
    all_blocks = np.arange(len(store.train))
    seen = seen_blocks(seed, store.train.shard_rows, positions)
    fitted = ngram_losses(store.train.read(seen), seen, validation_blocks, vocab_size)
    fitted_all = fitted
    if len(seen) < len(all_blocks):
        fitted_all = ngram_losses(store.train.read(all_blocks), all_blocks, validation_blocks, vocab_size)
    return {
        "unigram": fitted[0],
        "bigram": fitted[1],
        "blocks": len(seen),
        "unigram_all": fitted_all[0],
        "bigram_all": fitted_all[1],
        "blocks_all": len(all_blocks),
    }


def seen_blocks(seed: int, shard_rows: Sequence[int], positions: int) -> np.ndarray:
    """The ids of the distinct training blocks at the first `positions` positions of a run, ascending, int64."""
    order = Order(seed, shard_rows)
    return np.sort(block_ids(*order.blocks_at(0, min(positions, order.blocks))))  # an epoch has each block once


def ngram_losses(
    train_blocks: np.ndarray, train_ids: np.ndarray, validation_blocks: np.ndarray, vocab_size: int
) -> tuple[float, float]:
    """Cross-entropies (unigram, bigram) of `validation_blocks` [m, T] in nats per token, over the T - 1 predicted
    positions of each block, of models counted in `train_blocks` [n, T]:

        unigram  p(b) = (c(b) + 1) / (N + V)                        add-one smoothing
        bigram   p(b|a) = (c(a b) + κ p(b)) / (c(a) + κ)            Dirichlet prior, MacKay and Peto 1995

    with c the counts, N the number of training tokens, V = `vocab_size`, κ = 200. `train_ids` [n], ascending, are the
    places of the blocks in the text: the last token of a block and the first of the next are a pair only where the two
    blocks are neighbours there. In the bigram, c(a) counts a as the first token of a pair.
    """
    tokens = train_blocks.reshape(-1).astype(np.int64)
    unigram = (np.bincount(tokens, minlength=vocab_size) + 1) / (len(tokens) + vocab_size)

    is_pair = np.ones(train_blocks.shape, bool)  # whether the text goes on from a token to the one after it here
    is_pair[:-1, -1] = np.diff(train_ids) == 1
    is_pair = is_pair.reshape(-1)[:-1]
    first, second = tokens[:-1][is_pair], tokens[1:][is_pair]
    pairs, pair_counts = np.unique(first * vocab_size + second, return_counts=True)
    context_counts = np.bincount(first, minlength=vocab_size)

    contexts = validation_blocks[:, :-1].reshape(-1).astype(np.int64)
    targets = validation_blocks[:, 1:].reshape(-1).astype(np.int64)
    wanted = contexts * vocab_size + targets
    found = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    counts = np.where(pairs[found] == wanted, pair_counts[found], 0)
    bigram = (counts + PRIOR_STRENGTH * unigram[targets]) / (context_counts[contexts] + PRIOR_STRENGTH)
    return float(-np.log(unigram[targets]).mean()), float(-np.log(bigram).mean())
