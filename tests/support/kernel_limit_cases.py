# ruff: noqa: F811 (pytest fixtures are imported by name)
"""The search for a micro-batch under limits of the kernel; run by test_memory_search.py in a process of its own."""

import gc

import torch
from test_memory_search import MIB, linux, memory, model, search  # noqa: F401 (fixtures)

from clm_owt.training import micro_batch_search as batching


@linux
def test_under_a_limit_of_the_kernel_it_steps_down_to_a_size_that_fits(search, memory, model):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    memory(16 * MIB)
    found = search()
    assert found.tries == list(batching.candidate_sizes(16, 1, 32))[: len(found.tries)]
    assert 1 < len(found.tries) < 7
    assert found.tries[-1] == found.micro_batch < 16
    # The probes leave no trace, and the limit is lifted.
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.ones(400 * MIB, dtype=torch.uint8).sum() == 400 * MIB
    assert search().micro_batch < 16


@linux
def test_more_memory_never_gives_a_smaller_micro_batch(search, memory):
    found = []
    for size in (8, 16, 32, 64):
        memory(size * MIB)
        found.append(search().micro_batch)
    assert found == sorted(found)
    assert found[0] < found[-1]


@linux
def test_nothing_of_a_failed_try_is_held_in_the_next(search, memory, monkeypatch):
    memory(16 * MIB)
    probe, alive = batching.probe, []

    def watched_probe(*arguments):
        alive.append(sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor)))
        probe(*arguments)

    monkeypatch.setattr(batching, "probe", watched_probe)
    search()
    assert len(alive) > 1
    assert max(alive) - alive[0] < 1000
