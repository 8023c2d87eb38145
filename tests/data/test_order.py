import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clm_owt.data.order import Order

SHARDS = [8192, 8192, 8192, 1000]
BLOCKS = sum(SHARDS)


def ids(order, start, stop):
    shards, rows = order.blocks_at(start, stop)
    return shards * 8192 + rows


@pytest.mark.parametrize("epoch", [0, 1, 2, 7])
def test_every_epoch_is_a_permutation_of_all_blocks(epoch):
    order = Order(42, SHARDS)
    of_epoch = ids(order, epoch * BLOCKS, (epoch + 1) * BLOCKS)
    all_blocks = np.concatenate([shard * 8192 + np.arange(rows) for shard, rows in enumerate(SHARDS)])
    assert np.array_equal(np.sort(of_epoch), all_blocks)


def test_epochs_and_seeds_differ():
    order = Order(42, SHARDS)
    first, second = ids(order, 0, BLOCKS), ids(order, BLOCKS, 2 * BLOCKS)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, ids(Order(43, SHARDS), 0, BLOCKS))


def test_epoch_0_takes_shards_as_they_come():
    shards, _ = Order(42, SHARDS).blocks_at(0, BLOCKS)
    assert np.array_equal(shards, np.repeat(np.arange(4), SHARDS))


def test_later_epochs_draw_the_order_of_the_shards():
    order = Order(42, [8192] * 20)
    first_shards = [order.blocks_at(epoch * order.blocks, epoch * order.blocks + 1)[0][0] for epoch in range(1, 9)]
    assert len(set(first_shards)) > 3


def test_order_is_numpys_frozen_random_state():
    """The stream of `RandomState` is promised never to change, so these numbers may be written down."""
    shards, rows = Order(42, SHARDS).blocks_at(0, 3)
    assert shards.tolist() == [0, 0, 0]
    assert rows.tolist() == np.random.RandomState([42, 0, 0]).permutation(8192)[:3].tolist() == [6640, 208, 8185]
    epoch_1 = np.random.RandomState([42, 1]).permutation(4)
    assert Order(42, SHARDS).blocks_at(BLOCKS, BLOCKS + 1)[0][0] == epoch_1[0]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    start=st.integers(0, 500),
    cuts=st.lists(st.integers(0, 90), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_split_of_the_positions_gives_the_same_blocks(rows, start, cuts, seed):
    bounds = np.cumsum([start, *cuts])
    whole = np.stack(Order(seed, rows).blocks_at(start, int(bounds[-1])))
    order = Order(seed, rows)
    parts = [np.stack(order.blocks_at(int(a), int(b))) for a, b in itertools.pairwise(bounds)]
    assert np.array_equal(whole, np.concatenate([np.empty((2, 0), np.int64), *parts], axis=1))


def test_positions_inside_the_shards_there_are_keep_their_block_when_more_arrive():
    assert np.array_equal(ids(Order(42, SHARDS[:2]), 100, 16384), ids(Order(42, SHARDS), 100, 16384))


def test_seeking_far_costs_what_seeking_near_does():
    """No position is gone through: the ten-millionth epoch is as near as the first."""
    order = Order(42, SHARDS)
    far = 10_000_000 * BLOCKS
    assert len(ids(order, far, far + 512)) == 512
