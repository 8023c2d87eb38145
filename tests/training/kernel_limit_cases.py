# ruff: noqa: F811 (pytest fixtures are imported by name)
"""The search for a micro-batch under limits of the kernel; test_micro_batch_search.py runs it in its own process."""

import gc

import torch
from test_micro_batch_search import MIB, linux, memory, model, search  # noqa: F401 (fixtures)

from clm_owt.batch import candidate_sizes


@linux
def test_under_a_limit_of_the_kernel_it_steps_down_to_a_size_that_fits(search, model):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    found = search(available=memory(16 * MIB))
    assert found.tries == list(candidate_sizes(16, 1, 32))[: len(found.tries)]
    assert 1 < len(found.tries) < 7
    assert found.tries[-1] == found.micro_batch < 16
    # The probes leave no trace, and the limit is lifted.
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.ones(400 * MIB, dtype=torch.uint8).sum() == 400 * MIB
    assert search(available=memory(16 * MIB)).micro_batch < 16


@linux
def test_more_memory_never_gives_a_smaller_micro_batch(search):
    found = [search(available=memory(size * MIB)).micro_batch for size in (8, 16, 32, 64)]
    assert found == sorted(found)
    assert found[0] < found[-1]


@linux
def test_nothing_of_a_failed_try_is_held_in_the_next(search, model):
    held = []  # numbers in all tensors when a try begins its forward, its own two of token ids apart

    def count(model, arguments, inputs) -> None:
        everything = sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor))
        held.append(everything - 2 * inputs["input_ids"].numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    search(available=memory(16 * MIB))
    hook.remove()
    assert len(held) > 1
    assert max(held) - held[0] < 1000
