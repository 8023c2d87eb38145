"""The processes of a run: what they do together, and what they must agree on."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, Self, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from clm_owt.console import print_lines
from clm_owt.errors import InputError, RunFailed
from clm_owt.stopping import Stopped, StopRequest
from clm_owt.training import rendezvous
from clm_owt.training.device_memory import is_out_of_memory, release_cached_memory
from clm_owt.training.gradient_sum import GradientSum

T = TypeVar("T")

# So long one process waits for another. NCCL's own ten minutes would be short for a server that the main process asks
# for six, or for data that another machine still reads.
PATIENCE = timedelta(minutes=30)


class DoesNotFit(Exception):
    """A process ran out of memory, and all of them have agreed on it: the micro-batch is too large."""


@dataclass(frozen=True)
class Verdict:
    """What the processes agree on: did any run out of memory, was any told to stop, and by which signal."""

    out_of_memory: bool
    signum: int | None


class Processes:
    """What the processes of a run do together. All of it is trivial for one process.

    Agreements go over a CPU group, so that they wait for no work queued on an accelerator. In a `with` statement the
    process groups are taken down at its end: a worker thread of gloo that outlives the interpreter aborts the process,
    and with it the exit status. Not so after an unexpected error, where another process may never answer.
    """

    def __init__(self, accelerator: Accelerator):
        self.rank = accelerator.process_index
        self.count = accelerator.num_processes
        self.device = accelerator.device
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.mixed_precision = accelerator.mixed_precision
        self.is_main = accelerator.is_main_process  # which writes and prints
        self.is_first_of_machine = accelerator.is_local_main_process  # which does what is done once a machine
        self._cpu_group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None
        rendezvous.watch.connected()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        rendezvous.watch.stop()
        expected = kind is None or issubclass(kind, (SystemExit, InputError, RunFailed))
        if expected and dist.is_initialized():
            dist.destroy_process_group()

    def attempt(self, work: Callable[[], T], stop: StopRequest, discard: Callable[[], object] = lambda: None) -> T:
        """What `work()` gives, once all processes have agreed that it succeeded on each of them. Collective.

        `work` itself must not wait for others: a process that runs out of memory in it, or is told to stop, leaves it
        alone, and discards what it left before it says so. Then the others discard theirs, and all raise DoesNotFit or
        Stopped together. Any other error is raised at once, where it happens.
        """
        result, failed, out_of_memory = None, False, False
        try:
            result = work()
        except Stopped:
            failed = True  # the others learn of it in the agreement
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = out_of_memory = True
        # The error is gone by now, and with its traceback the tensors that it held.
        if failed:
            discard()
            release_cached_memory()  # before the others go on: on a CPU it is theirs too
        verdict = self.agree(out_of_memory, stop.signum)
        if not verdict.out_of_memory and verdict.signum is None:
            return result
        del result
        discard()
        release_cached_memory()
        if verdict.signum is not None:
            raise Stopped(verdict.signum)
        raise DoesNotFit

    def agree(self, out_of_memory: bool = False, signum: int | None = None) -> Verdict:
        if self._cpu_group is None:
            return Verdict(out_of_memory, signum)
        flags = torch.tensor([int(out_of_memory), signum or 0])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._cpu_group)
        return Verdict(bool(flags[0]), int(flags[1]) or None)

    def agree_to_stop(self, stop: StopRequest) -> None:
        """Raise Stopped on all processes if any of them was told to stop."""
        signum = self.agree(signum=stop.signum).signum
        if signum is not None:
            raise Stopped(signum)

    def shard(self, model: torch.nn.Module) -> None:
        """Under FSDP2 share out the parameters, a group for each transformer block and one for the rest, in place.

        By torch's own `fully_shard`, with what Accelerate's plugin cannot say: gradients are summed and not averaged,
        since the loss is divided by the tokens of the whole batch; computation goes by autocast, as on every machine;
        and the root is sharded again after its forward, so that parameters are always shards between steps.
        (`Accelerator.prepare` would make a group of the tied embedding that is gathered when the module `wte` is
        called; the fused loss takes its weight without calling it.)

        Under bf16 the blocks are gathered as bf16, half the bytes, since their products would round them to it; their
        LayerNorms then have rounded weights too. What comes in, the residual stream, stays float32. So does the root:
        the stream begins with its embeddings, and the gradient of the tied one is not to be rounded before it is
        summed.
        """
        if not self.sharded:
            return
        mesh = init_device_mesh(self.device.type, (self.count,))
        rounded = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*model.transformer.h, model):
            exact = module is model or self.mixed_precision != "bf16"
            policy = MixedPrecisionPolicy() if exact else rounded
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def gradient_sum(self, model: torch.nn.Module) -> GradientSum:
        """What adds up the gradients of `model` over all processes, once a step. Nothing to do for one process; under
        FSDP2 the last backward does it."""
        if self._cpu_group is None or self.sharded:
            return GradientSum()
        parameters = [p for p in model.parameters() if p.requires_grad]
        return GradientSum(parameters, start=functools.partial(dist.all_reduce, async_op=True))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all processes, on its device."""
        if self._cpu_group is not None:
            dist.all_reduce(values)
        return values

    def gather_tensors(self, tensor: torch.Tensor) -> torch.Tensor:
        """[processes, ...]: the `tensor` of every process, of one shape, by rank, on its device."""
        gathered = tensor.new_empty(self.count * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered.view(self.count, *tensor.shape)

    def sum_on_cpu(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of `values`, which lie on the CPU."""
        if self._cpu_group is not None:
            dist.all_reduce(values, group=self._cpu_group)
        return values

    def on_main(self, function: Callable[..., T], *arguments: object) -> T:
        """What `function(*arguments)` gives on the main process, on every process; an InputError or RunFailed there
        ends them all, and the main process prints it. It may take minutes, as a server that is asked again does:
        PATIENCE at most."""
        result: T | InputError | RunFailed | None = None
        if self.is_main:
            try:
                result = function(*arguments)
            except (InputError, RunFailed) as error:
                result = error
        if self._cpu_group is not None:
            results = [result]
            dist.broadcast_object_list(results, src=0, group=self._cpu_group)
            result = results[0]
        if isinstance(result, (InputError, RunFailed)):
            raise result if self.is_main else SystemExit(2 if isinstance(result, InputError) else 1)
        return result

    def by_main(self, work: Callable[[Callable[[], None]], T], stop: StopRequest) -> T | None:
        """What `work(check)` gives on the main process; None on the others, which wait for it however long it takes.
        Collective.

        `work` calls `check` often. At most once a second the processes agree there whether any was told to stop; if
        so, all raise Stopped together. A main process that is not heard of for PATIENCE is given up.
        """

        def agree(working: bool) -> bool:
            """Whether the main process still works."""
            answers = self.gather((working, stop.signum))
            signum = next((signum for _, signum in answers if signum is not None), None)
            if signum is not None:
                raise Stopped(signum)
            return answers[0][0]

        if not self.is_main:
            while agree(working=True):
                pass
            return None
        agreed = time.monotonic()

        def check() -> None:
            nonlocal agreed
            if time.monotonic() - agreed > 1.0:
                agree(working=True)
                agreed = time.monotonic()

        result = work(check)
        agree(working=False)
        return result

    def refuse(self, message: str) -> NoReturn:
        """Leave with an InputError, which only the main process prints. All processes call it."""
        raise (InputError(message) if self.is_main else SystemExit(2)) from None

    def say(self, *lines: str) -> None:
        """Print lines, on the main process only."""
        if self.is_main and lines:
            print_lines(*lines)

    def gather(self, value: object) -> list[object]:
        """The `value` of every process, by rank, on every process."""
        if self._cpu_group is None:
            return [value]
        values: list[object] = [None] * self.count
        dist.all_gather_object(values, value, group=self._cpu_group)
        return values


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """A tensor that may lie in shards on the processes, as FSDP2's parameters and gradients do. Collective, then."""
    return value.full_tensor() if isinstance(value, DTensor) else value
