"""The machine a run finds itself on: its processes, its device, and what they must agree on."""

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import datasets
import psutil
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, set_seed

from clm_owt.data.builder import Builder
from clm_owt.recipe import InputError, Recipe

T = TypeVar("T")


def quiet_libraries() -> None:
    """Keep back what libraries say that a user of a recipe can do nothing about: progress bars of downloads, hints on
    arguments that this program chose."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step")


def create_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of this process, refused where the machine's configuration cannot keep a recipe's promises."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise InputError(
            "accelerate config: DeepSpeed is not supported: its engine takes the optimizer step inside backward, so "
            "neither the check for finite numbers nor a repeated step could hold; use FSDP2"
        )
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        raise InputError(
            f"accelerate config: dynamo_backend {dynamo} stands beside the recipe's torch_compile, which decides; "
            "set dynamo_backend: no"
        )
    accelerator = Accelerator(log_with=list(recipe.report_to) or None, project_dir=recipe.output_dir)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"accelerate config: {launched} processes were launched but each came up alone; on CPU use "
            "distributed_type: MULTI_GPU with use_cpu: true and set ACCELERATE_USE_CPU=true in the environment"
        )
    if accelerator.mixed_precision == "fp16":
        raise InputError(
            "accelerate config: mixed_precision fp16 needs a loss scale, which this loop has not; use bf16, or no"
        )
    set_seed(recipe.seed)
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    return accelerator


class Stopped(SystemExit):
    """The run was told to stop by a signal; leaves with status 128 + its number."""

    def __init__(self, signum: int):
        self.name = signal.Signals(signum).name
        super().__init__(128 + signum)


class StopRequest:
    """Notices SIGTERM, SIGINT and SIGUSR1, and the disappearance of the launcher, which counts as SIGTERM.

    `accelerate launch` with one process forwards no signal, so the worker would run on alone. A second signal ends
    the process at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self._received: int | None = None
        self._launcher = os.getppid() if launched_by_accelerate() else None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        previous = {signum: signal.signal(signum, self._on_signal) for signum in self.SIGNALS}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._received is not None:
            os._exit(128 + signum)
        self._received = signum

    @property
    def signum(self) -> int | None:
        if self._received is None and self._launcher is not None and os.getppid() != self._launcher:
            self._received = signal.SIGTERM
        return self._received

    def check(self) -> None:
        """Raise Stopped if the run was told to stop."""
        if self.signum is not None:
            raise Stopped(self.signum)


class WaitingCheck:
    """Called over and over while the run waits for data, with what it waits for: lets a stop and the builder's death
    end the waiting, and says once every few seconds what is waited for."""

    def __init__(self, stop: StopRequest, builder: Builder, say: Callable[..., None], say_every: float = 10.0):
        self._stop, self._builder, self._say, self._every = stop, builder, say, say_every
        self._said_at = time.monotonic()

    def __call__(self, waiting_for: str = "") -> None:
        self._stop.check()
        self._builder.check(waiting_for)
        if waiting_for and time.monotonic() - self._said_at > self._every:
            self._said_at = time.monotonic()
            self._say(f"waiting for {waiting_for}")


def launched_by_accelerate() -> bool:
    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return False
    return any("accelerate" in os.path.basename(word) or "torch.distributed.run" in word for word in command[:4])


@dataclass(frozen=True)
class Verdict:
    """What the processes agree on: did any run out of memory, was any told to stop, and by which signal."""

    out_of_memory: bool
    signum: int | None


class Processes:
    """What the processes of a run do together. All of it is trivial for one process.

    Agreements go over a CPU group, so that they wait for no work queued on an accelerator.
    """

    def __init__(self, accelerator: Accelerator):
        self.rank = accelerator.process_index
        self.count = accelerator.num_processes
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self._cpu_group = dist.new_group(backend="gloo") if self.count > 1 else None

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

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place: the one synchronisation of a step."""
        if self.count > 1:
            works = [dist.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
            for work in works:
                work.wait()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all processes, on its device."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def sum_on_cpu(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of `values`, which lie on the CPU."""
        if self._cpu_group is not None:
            dist.all_reduce(values, group=self._cpu_group)
        return values

    def on_main(self, function: Callable[..., T], *arguments: object) -> T:
        """What `function(*arguments)` gives on the main process, on every process; an InputError there is one here."""
        result: T | InputError | None = None
        if self.rank == 0:
            try:
                result = function(*arguments)
            except InputError as error:
                result = error
        if self.count > 1:
            result = broadcast_object_list([result])[0]
        if isinstance(result, InputError):
            raise result
        return result

    def say(self, *lines: str) -> None:
        """Print lines, on the main process only."""
        if self.rank == 0:
            print(*lines, sep="\n", flush=True)

    def gather(self, value: object) -> list[object]:
        """The `value` of every process, by rank, on every process."""
        if self._cpu_group is None:
            return [value]
        values: list[object] = [None] * self.count
        dist.all_gather_object(values, value, group=self._cpu_group)
        return values
