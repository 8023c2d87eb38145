"""The sum of gradients over processes: few collectives, begun during the backward, complete whatever fails."""

import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from support.watched_fixtures import STEP_COLLECTIVES
from torch.distributed import ProcessGroup
from torch.futures import Future
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config

from clm_owt.batch import gradient_buckets
from clm_owt.model.gpt2 import GPT2ForPretraining
from clm_owt.stopping import Stopped
from clm_owt.training.gradient_sum import GradientSum
from clm_owt.training.processes import DoesNotFit, Processes

SMALL_BUCKET = 20_000  # bytes: makes eight buckets of the model below
OPTIONS = {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def test_buckets_are_consecutive_and_a_large_gradient_is_one_by_itself():
    assert gradient_buckets([3, 3, 4, 1, 30, 2, 2], bucket_bytes=10) == [
        range(0, 3), range(3, 4), range(4, 5), range(5, 7)]  # fmt: skip
    assert gradient_buckets([], bucket_bytes=10) == []


def test_gpt2_small_sums_its_148_gradients_in_few_collectives_that_begin_during_the_backward():
    """On tensors without data, at their full size."""
    with torch.device("meta"):
        model = GPT2ForPretraining(GPT2Config(n_positions=1024))
        blocks = torch.zeros(1, 16, dtype=torch.int64)
    started = []

    def start(flat: torch.Tensor) -> Future:
        started.append((flat.numel(), model.transformer.h[0].ln_1.weight.grad is None))
        done: Future = Future()
        done.set_result(flat)
        return done

    parameters = list(model.parameters())
    summing = GradientSum(parameters, start)
    summing.begin()
    summing.expect_last_backward()
    model(input_ids=blocks, labels=blocks, num_items_in_batch=15).loss.backward()
    in_backward = len(started)
    summing.finish()
    assert len(parameters) == 148
    assert sum(numel for numel, _ in started) == sum(p.numel() for p in parameters)
    assert len(started) + STEP_COLLECTIVES <= 10
    assert in_backward == len(started)
    assert [early for _, early in started] == [True] * (len(started) - 2) + [False] * 2
    assert started[-1][0] == model.transformer.wte.weight.numel()  # tied: complete at the very end, and not copied


@pytest.mark.parametrize("processes", [2, 3])
def test_the_sum_is_that_of_single_gradients_and_complete_whatever_fails(warm, tmp_path, processes):
    jobs = warm.start_ranks(processes, "test_gradient_sum:sum_on_this_rank", cwd=tmp_path)
    assert [job.wait(120) for job in jobs] == [0] * processes, "".join(job.text for job in jobs)


class Collectives(TorchDispatchMode):
    """The collectives that are called: their names, and those of the groups that they go over."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.groups: set[str] = set()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func._opname)
            self.groups.add(ProcessGroup.unbox(args[1]).group_name)
        return func(*args, **(kwargs or {}))


def sum_on_this_rank() -> None:
    """What each process of the test above does: steps that fail in each way, and one that does not."""
    processes = Processes(Accelerator(cpu=True))
    torch.manual_seed(0)
    model = GPT2ForPretraining(GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2, **OPTIONS))
    parameters = list(model.parameters())
    blocks = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(processes.rank))
    summing = GradientSum(parameters, lambda flat: dist.all_reduce(flat, async_op=True), SMALL_BUCKET)
    failure: list[BaseException] = []

    def fail_in_the_midst(parameter) -> None:
        if failure:
            raise failure.pop()

    model.transformer.h[0].mlp.c_fc.weight.register_post_accumulate_grad_hook(fail_in_the_midst)

    def backward() -> None:
        model(input_ids=blocks, labels=blocks, num_items_in_batch=1000).loss.backward()

    def attempt(fails: BaseException | None = None, signum: int | None = None) -> None:
        def work() -> None:
            backward()  # of an earlier micro-batch
            if isinstance(fails, MemoryError):
                raise fails
            failure.extend([fails] if fails else [])
            summing.expect_last_backward()
            backward()

        summing.begin()
        stop = SimpleNamespace(signum=signum)
        processes.attempt(work, stop, discard=summing.abandon)

    # Before the last backward, in its midst, and while another is told to stop.
    last = processes.count - 1
    for first_fails, last_fails in ((None, MemoryError()), (None, torch.OutOfMemoryError("out of memory"))):
        with pytest.raises(DoesNotFit):
            attempt({0: first_fails, last: last_fails}.get(processes.rank))
        assert all(p.grad is None for p in parameters)
    with pytest.raises(Stopped):
        if processes.rank == 0:
            attempt(Stopped(signal.SIGTERM), signum=signal.SIGTERM)
        else:
            attempt(torch.OutOfMemoryError("out of memory") if processes.rank == last else None)

    with Collectives() as collectives:
        attempt()
        summing.finish()
    assert collectives.names == ["allreduce_"] * 9, collectives.names  # and the agreement
    summed = [p.grad.clone() for p in parameters]

    # One by one, as without buckets.
    summing.abandon()
    backward()
    backward()
    single = [p.grad.clone() for p in parameters]
    sizes = [g.abs() for g in single]
    for tensor in (*single, *sizes):
        dist.all_reduce(tensor)
    for got, expected, size in zip(summed, single, sizes, strict=True):
        if processes.count == 2:
            assert torch.equal(got, expected)
        else:  # gloo adds up in an order of the processes that depends on the place in the bucket
            assert ((got - expected).abs() <= 2 * last * 2**-24 * size).all()

    # What may take minutes on the main process goes over the CPU's group, whose patience is long.
    with Collectives() as collectives:
        assert processes.on_main(lambda: f"of {processes.rank}") == "of 0"
    assert collectives.names == ["broadcast_"] * 2
    assert collectives.groups == {processes._cpu_group.group_name} != {dist.group.WORLD.group_name}
    processes.__exit__(None)
