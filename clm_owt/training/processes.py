"""The machine a run finds itself on: its processes, its device, and what they must agree on."""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Self, TypeVar

import datasets
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, set_seed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from clm_owt.console import print_lines
from clm_owt.data.builder import Builder
from clm_owt.errors import InputError, RunFailed
from clm_owt.recipe import Recipe
from clm_owt.stopping import Stopped, StopRequest

T = TypeVar("T")

UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config (tensor or context parallelism)",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing (the recipe's gradient_checkpointing decides)",
}


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
    refuse_unkept_settings()
    accelerator = Accelerator()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"accelerate config: {launched} processes were launched but each came up alone; on CPU use "
            "distributed_type: MULTI_GPU with use_cpu: true and set ACCELERATE_USE_CPU=true in the environment"
        )
    if asks_for("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        raise InputError(
            "accelerate config: FSDP comes up as version 1, or on a CPU as a copy of the model in each process; set "
            "fsdp_version: 2 (accelerate_configs/fsdp2.yaml), or on a CPU take accelerate_configs/cpu_2proc.yaml"
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


def refuse_unkept_settings() -> None:
    """Raises InputError for settings of an Accelerate config that this loop would go against or pass over in silence.
    `accelerate launch` hands them down in the environment."""
    problems = []
    if asks_for("ACCELERATE_USE_DEEPSPEED"):
        problems.append(
            "DeepSpeed is not supported: its engine takes the optimizer step inside backward, so neither the check "
            "for finite numbers nor a repeated step could hold; use FSDP2 (accelerate_configs/fsdp2.yaml)"
        )
    for variable, name in UNSUPPORTED.items():
        if asks_for(variable):
            problems.append(f"{name} is not supported; take a file of accelerate_configs/")
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        problems.append(
            f"dynamo_backend {dynamo} stands beside the recipe's torch_compile, which decides; set dynamo_backend: no"
        )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        problems.append(
            f"gradient_accumulation_steps {accumulation} stands beside the recipe's effective_batch_size, from which "
            "the number of micro-batches follows; remove it"
        )
    if problems:
        raise InputError("\n".join(f"accelerate config: {problem}" for problem in problems))


def asks_for(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


class WaitingCheck:
    """Called over and over while the run waits for data, with what it waits for: lets a stop and the builder's death
    end the waiting, passes on what the builder says, and says once every few seconds what is waited for."""

    def __init__(self, stop: StopRequest, builder: Builder, say: Callable[..., None], say_every: float = 10.0):
        self._stop, self._builder, self._say, self._every = stop, builder, say, say_every
        self._said_at = time.monotonic()

    def __call__(self, waiting_for: str = "") -> None:
        self._stop.check()
        self.pass_on_news()
        self._builder.check(waiting_for)
        if waiting_for and time.monotonic() - self._said_at > self._every:
            self._said_at = time.monotonic()
            self._say(f"waiting for {waiting_for}")

    def pass_on_news(self) -> None:
        self._say(*self._builder.news())


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
        self._cpu_group = dist.new_group(backend="gloo") if self.count > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        expected = kind is None or issubclass(kind, (SystemExit, InputError, RunFailed))
        if expected and dist.is_initialized():
            dist.destroy_process_group()

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
        """
        if not self.sharded:
            return
        mesh = init_device_mesh(self.device.type, (self.count,))
        for module in (*model.transformer.h, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place: the one synchronisation of a step, which nothing in forward
        or backward does. (Under FSDP2 the last backward has done it.)"""
        if self.count > 1 and not self.sharded:
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
        """What `function(*arguments)` gives on the main process, on every process; an InputError there ends them all,
        and the main process tells it."""
        result: T | InputError | None = None
        if self.rank == 0:
            try:
                result = function(*arguments)
            except InputError as error:
                result = error
        if self.count > 1:
            result = broadcast_object_list([result])[0]
        if isinstance(result, InputError):
            raise result if self.rank == 0 else SystemExit(2)
        return result

    def refuse(self, message: str) -> NoReturn:
        """Leave with an InputError, which only the main process tells. All processes call it."""
        raise (InputError(message) if self.rank == 0 else SystemExit(2)) from None

    def say(self, *lines: str) -> None:
        """Print lines, on the main process only."""
        if self.rank == 0 and lines:
            print_lines(*lines)

    def gather(self, value: object) -> list[object]:
        """The `value` of every process, by rank, on every process."""
        if self._cpu_group is None:
            return [value]
        values: list[object] = [None] * self.count
        dist.all_gather_object(values, value, group=self._cpu_group)
        return values
