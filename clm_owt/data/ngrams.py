"""What counting alone reaches: losses of n-gram models of the same tokens, to hold a trained model's loss against."""

import numpy as np

PRIOR_STRENGTH = 200.0


def ngram_losses(train_blocks: np.ndarray, validation_blocks: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """Cross-entropies (unigram, bigram) of `validation_blocks` [m, T] in nats per token, over the T - 1 predicted
    positions of each block, of models counted in `train_blocks` [n, T] (blocks in the order of the text):

        unigram  p(b) = (c(b) + 1) / (N + V)                        add-one smoothing
        bigram   p(b|a) = (c(a b) + κ p(b)) / (c(a) + κ)            Dirichlet prior, MacKay and Peto 1995

    with c the counts, N the number of training tokens, V = `vocab_size`, κ = 200.
    """
    tokens = train_blocks.reshape(-1).astype(np.int64)
    counts = np.bincount(tokens, minlength=vocab_size)
    unigram = (counts + 1) / (len(tokens) + vocab_size)

    pairs, pair_counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    context_counts = np.bincount(tokens[:-1], minlength=vocab_size)

    contexts = validation_blocks[:, :-1].reshape(-1).astype(np.int64)
    targets = validation_blocks[:, 1:].reshape(-1).astype(np.int64)
    wanted = contexts * vocab_size + targets
    found = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[found] == wanted, pair_counts[found], 0)
    bigram = (seen + PRIOR_STRENGTH * unigram[targets]) / (context_counts[contexts] + PRIOR_STRENGTH)
    return float(-np.log(unigram[targets]).mean()), float(-np.log(bigram).mean())
