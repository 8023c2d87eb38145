"""Which block is the k-th of the run: a pure function of seed and position.

Epoch 0 takes shards as they come, later epochs in an order drawn from (seed, epoch); inside a shard the blocks come
in a permutation drawn from (seed, epoch, shard). NumPy's `RandomState` is promised never to change its stream.
Epochs follow each other without a break.
"""

import functools
import time
from collections.abc import Sequence

import numpy as np

from clm_owt.data.token_store import BLOCKS_PER_SHARD, Check, TokenStore


class Order:
    """The order of the training blocks of a store with `shard_rows` blocks in its shards.

    While shards are still being added, the order of the first `blocks` positions, those of the shards there are, is
    final already; later positions need the complete list. Seeking costs the same everywhere.
    """

    def __init__(self, seed: int, shard_rows: Sequence[int]):
        self.seed = seed
        self.shard_rows = np.asarray(shard_rows, np.int64)
        self.blocks = int(self.shard_rows.sum())
        self.epoch_layout = functools.lru_cache(maxsize=2)(self.draw_epoch)

    def draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of `epoch`, and how many blocks of the epoch come before each of them."""
        count = len(self.shard_rows)
        shards = np.random.RandomState([self.seed, epoch]).permutation(count) if epoch else np.arange(count)
        rows = self.shard_rows[shards]
        return shards, np.cumsum(rows) - rows

    def blocks_at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards and rows inside them, int64 [stop - start] each, of the run's positions `start` to `stop`."""
        shards_out, rows_out = np.empty((2, stop - start), np.int64)
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.blocks)
            shards, blocks_before = self.epoch_layout(epoch)
            place = int(np.searchsorted(blocks_before, offset, side="right")) - 1
            shard, first = int(shards[place]), offset - int(blocks_before[place])
            count = min(stop - position, int(self.shard_rows[shard]) - first)
            here = slice(position - start, position - start + count)
            shards_out[here] = shard
            rows_out[here] = permutation(self.seed, epoch, shard, int(self.shard_rows[shard]))[first : first + count]
            position += count
        return shards_out, rows_out


@functools.lru_cache(maxsize=16)
def permutation(seed: int, epoch: int, shard: int, rows: int) -> np.ndarray:
    """The order of the `rows` blocks of a shard in an epoch, int64 [rows]."""
    return np.random.RandomState([seed, epoch, shard]).permutation(rows)


class TrainingBlocks:
    """The training blocks of a store, by position in the run. Waits for shards that are not there yet.

    seconds_waited: the time spent waiting since the beginning; check: what the waits of `TokenStore` call.
    """

    def __init__(self, store: TokenStore, seed: int, check: Check = lambda waiting_for: None):
        self.store = store
        self.seed = seed
        self.check = check
        self.seconds_waited = 0.0
        self.order = Order(seed, [])

    def wait_for(self, stop: int) -> None:
        """Until the shards of the positions before `stop` are there. Every process of a run waits for all blocks of a
        step, also those of others, so that none waits inside a collective for another that waits for a file."""
        if stop > self.order.blocks and not self.has_all_shards():
            began = time.monotonic()
            self.store.wait_for_rows(stop, self.check)
            self.seconds_waited += time.monotonic() - began
            # A shard that is not full is the last one, so that the shards before it keep their size in the order.
            self.order = Order(self.seed, self.store.train.shard_rows)

    def blocks_at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards and rows of positions `start` to `stop`, once their shards are there."""
        self.wait_for(stop)
        return self.order.blocks_at(start, stop)

    def has_all_shards(self) -> bool:
        return bool(self.order.blocks) and self.order.blocks == self.store.train_blocks

    def read(self, start: int, stop: int) -> np.ndarray:
        """The blocks at positions `start` to `stop` of the run, int64 [stop - start, block_size]."""
        return self.store.train.read(block_ids(*self.blocks_at(start, stop)))

    def ids(self, start: int, stop: int) -> np.ndarray:
        """The ids of those blocks, int64 [stop - start]: a block has the same id in every epoch, on every machine."""
        return block_ids(*self.blocks_at(start, stop))


def block_ids(shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The places of blocks in the training split, counted in the order of the text from 0."""
    return shards * BLOCKS_PER_SHARD + rows
