import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from clm_owt.batch import candidate_sizes, cut, describe_cut, next_smaller
from clm_owt.model.gpt2 import build_model
from clm_owt.recipe import PENALTY_TYPES
from clm_owt.recipe_reader import load_recipe
from clm_owt.training.device_memory import is_out_of_memory
from clm_owt.training.processes import Processes
from clm_owt.training.trainer import accumulate_gradients


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


class ManyProcesses(Processes):
    """One of several processes that run one after the other."""

    def __init__(self, count: int, rank: int):
        self.count, self.rank, self.sharded, self._cpu_group = count, rank, False, None


def gradient(model, recipe, blocks, processes: int, micro_batch: int) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a step by the loop's own code, processes one after the other."""
    model.zero_grad()
    loss = 0.0
    for rank in range(processes):
        run = SimpleNamespace(
            recipe=recipe,
            model=model,
            blocks=SimpleNamespace(read=lambda start, stop: blocks[start:stop].numpy(), wait_for=lambda stop: None),
            accelerator=SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext),
            processes=ManyProcesses(processes, rank),
            stop=SimpleNamespace(check=lambda: None, signum=None),
        )
        loss += accumulate_gradients(run, SimpleNamespace(position=0, micro_batch=micro_batch))[0].item()
    return loss, torch.cat([p.grad.reshape(-1) for p in model.parameters()])


@pytest.fixture(scope="module")
def step():
    """A small model, the recipe of a step of 16 blocks, and its blocks [16, 32]."""
    argv = "--dataset_name python-docs --train_tokenizer_vocab_size 300 --block_size 32 --n_layer 2 --n_head 2 "
    argv += "--n_embd 32 --effective_batch_size 16 --learning_rate 1 --warmup_steps 0 --max_steps 1"
    recipe = load_recipe(argv.split())
    blocks = torch.randint(300, (16, 32), generator=torch.Generator().manual_seed(0))
    return build_model(recipe, 300, 0), recipe, blocks


@pytest.mark.parametrize("penalty", PENALTY_TYPES)
def test_the_gradient_of_any_cut_is_that_of_one_full_batch(step, penalty):
    model, recipe, blocks = step
    model.penalty_type, model.penalty_weight = penalty, 0.01
    output = model(input_ids=blocks, labels=blocks)
    model.zero_grad()
    output.loss.backward()
    full = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    for processes, micro_batch in itertools.product([1, 2, 3, 5], [16, 7, 5, 3, 1]):
        loss, got = gradient(model, recipe, blocks, processes, micro_batch)
        assert loss == pytest.approx(output.loss.item(), rel=1e-6)
        assert (got - full).norm() < 1e-6 * full.norm()


def test_weighting_by_micro_batches_instead_of_tokens_would_be_seen(step):
    """The mean over micro-batches of their means is off by far more than the tolerance above, where they differ."""
    model, recipe, blocks = step
    _, expected = gradient(model, recipe, blocks, 1, 16)
    pieces = cut(16, 1, 0, 5)
    model.zero_grad()
    for piece in pieces:
        part = blocks[piece.start : piece.stop]
        (model(input_ids=part, labels=part).loss / len(pieces)).backward()
    by_count = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert (by_count - expected).norm() > 1e-2 * expected.norm()


def test_a_micro_batch_of_weight_0_has_no_loss_and_no_gradient(step):
    model, _, blocks = step
    piece = cut(16, 3, 0, 5, equal_counts=True)[-1]
    assert piece.weight == 0
    model.zero_grad()
    part = blocks[piece.start : piece.stop]
    output = model(input_ids=part, labels=piece.labels(part), num_items_in_batch=16 * 31)
    output.loss.backward()
    assert [v.item() for v in (output.loss, output.ce_loss, output.penalty, output.max_prob, output.entropy)] == [
        0
    ] * 5
    assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (OSError(12, "Memory mapping file failed: Cannot allocate memory"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_that_are_about_memory_are_told_from_those_that_are_not(error, expected):
    assert is_out_of_memory(error) is expected
