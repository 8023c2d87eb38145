import itertools

import pytest

from clm_owt.batch import candidate_sizes, cut, describe_cut, next_smaller


@pytest.mark.parametrize("global_batch", [1, 2, 7, 16, 32, 100, 512])
def test_every_block_of_a_global_batch_is_taken_exactly_once(global_batch):
    for processes, micro_batch in itertools.product([1, 2, 3, 5, 8], [1, 2, 3, 5, 8, 24, 600]):
        if processes > global_batch:
            continue
        cuts = [cut(global_batch, processes, rank, micro_batch) for rank in range(processes)]
        positions = [p for pieces in cuts for piece in pieces for p in range(piece.start, piece.stop)]
        assert positions == list(range(global_batch))
        assert all(1 <= piece.size <= micro_batch for pieces in cuts for piece in pieces)
        shares = [sum(piece.size for piece in pieces) for pieces in cuts]
        assert max(shares) - min(shares) <= 1


def test_the_guide_s_batch_over_three_processes():
    sizes = [[piece.size for piece in cut(512, 3, rank, 24)] for rank in range(3)]
    assert sizes == [[24] * 7 + [2], [24] * 7 + [3], [24] * 7 + [3]]


def test_candidates_cut_a_share_into_the_fewest_most_even_pieces():
    assert list(candidate_sizes(512, 1, 512))[:8] == [512, 256, 171, 128, 103, 86, 74, 64]
    assert list(candidate_sizes(512, 1, 32))[:3] == [32, 31, 29]
    assert list(candidate_sizes(512, 3, 600))[:3] == [171, 86, 57]
    assert list(candidate_sizes(1, 1, 32)) == [1]


@pytest.mark.parametrize(("global_batch", "processes"), [(512, 1), (512, 3), (16, 2), (7, 1)])
def test_candidates_go_down_to_one_and_none_wastes_a_pass(global_batch, processes):
    sizes = list(candidate_sizes(global_batch, processes, 1000))
    share = -(-global_batch // processes)
    assert sizes == sorted(set(sizes), reverse=True)
    assert (sizes[0], sizes[-1]) == (share, 1)
    # No size between two candidates would need fewer passes than the smaller of them.
    for larger, smaller in itertools.pairwise(sizes):
        assert all(-(-share // size) == -(-share // smaller) for size in range(smaller, larger))


@pytest.mark.parametrize(
    ("global_batch", "processes", "micro_batch", "words"),
    [
        (32, 2, 8, "32 = 2 processes × 2 micro-batches of 8"),
        (16, 1, 16, "16 = 1 process × 1 micro-batch of 16"),
        (16, 1, 5, "16 = 1 process × 3 micro-batches of 5 + 1 micro-batch of 1"),
        (16, 2, 3, "16 = 2 processes × (2 micro-batches of 3 + 1 micro-batch of 2)"),
        (4, 3, 8, "4 = (1 micro-batch of 1) + (1 micro-batch of 1) + (1 micro-batch of 2)"),
    ],
)
def test_the_batch_arithmetic_in_words(global_batch, processes, micro_batch, words):
    assert describe_cut(global_batch, processes, micro_batch) == words


def test_stepping_down_ends_below_one():
    assert next_smaller(512, 1, 512) == 256
    assert next_smaller(512, 3, 171) == 86
    assert next_smaller(512, 1, 2) == 1
    assert next_smaller(512, 1, 1) is None


@pytest.mark.parametrize("global_batch", [1, 2, 16, 100, 512])
def test_equal_counts_repeat_blocks_at_weight_0_and_change_nothing_else(global_batch):
    for processes, micro_batch in itertools.product([1, 2, 3, 8], [1, 2, 5, 24, 600]):
        cuts = [cut(global_batch, processes, rank, micro_batch, equal_counts=True) for rank in range(processes)]
        assert len({len(pieces) for pieces in cuts}) == 1
        for rank, pieces in enumerate(cuts):
            assert [p for p in pieces if p.weight] == cut(global_batch, processes, rank, micro_batch)
            assert all(0 <= p.start < p.stop <= global_batch for p in pieces)
            assert all(p.size == 1 for p in pieces if not p.weight)
