"""The search for the largest micro-batch that fits, on all processes at once."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size

from clm_owt.batch import GRADIENT_BUCKET_BYTES, candidate_sizes
from clm_owt.console import waiting
from clm_owt.formatting import format_bytes
from clm_owt.model.gpt2 import GPT2ForPretraining
from clm_owt.optimizers import OPTIMIZERS, kind_of
from clm_owt.planning.devices import Hardware
from clm_owt.recipe import Recipe
from clm_owt.stopping import StopRequest
from clm_owt.training.device_memory import (
    available_memory,
    ceiling,
    limited,
    peak_memory,
    release_cached_memory,
    reset_peak_memory,
    share_one_heap,
    start_threads,
)
from clm_owt.training.processes import DoesNotFit, Processes

MEMORY_SETTINGS = (
    "auto_batch_size",
    "max_batch_size",
    "target_memory_utilization",
    "gradient_checkpointing",
    "torch_compile",
)
WHAT_HELPS = "lower block_size, set gradient_checkpointing: true, or take a smaller model (n_layer, n_embd)"


@dataclass(frozen=True)
class MicroBatchSearch:
    """How the micro-batch of a run was found; kept in `plan.json`.

    machine: the hardware and the settings that it holds for; tries: the sizes probed, of which the last fits (none:
    not searched for); peak_memory: bytes at the probe's peak, on the process with the highest; budget: bytes that the
    probe might use, on the process with the fewest; from_plan: found by an earlier session of the run.
    """

    micro_batch: int
    machine: dict[str, object]
    tries: list[int] = field(default_factory=list)
    peak_memory: int | None = None
    budget: int | None = None
    seconds: float = 0.0
    from_plan: bool = False

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        """The line that is printed of it."""
        if self.from_plan:
            return f"Micro-batch {self.micro_batch}, as found when the run began on this machine"
        if not self.tries:
            return f"Micro-batch {self.micro_batch}, not searched for"
        tried = f"tried {', '.join(map(str, self.tries))}, " if len(self.tries) > 1 else ""
        of = {"cpu": "of the whole process", "cuda": "of tensors on the GPU"}.get(
            self.machine["device_type"], "in use"
        )
        peak = (
            f"{format_bytes(self.peak_memory)} {of} at the peak" if self.peak_memory is not None else "peak not known"
        )
        return f"Micro-batch {self.micro_batch} fits: {tried}{peak}, {self.seconds:.1f} s"


@waiting("trying which micro-batch fits into memory")
def find_micro_batch(
    model: GPT2ForPretraining,
    recipe: Recipe,
    accelerator: Accelerator,
    processes: Processes,
    stop: StopRequest,
    hardware: Hardware,
    *,
    known: dict[str, object] | None = None,
    probing: bool = True,
    available: Callable[[torch.device], int] = available_memory,
) -> MicroBatchSearch:
    """The largest useful micro-batch, up to `max_batch_size`, whose training step fits into
    `target_memory_utilization` of the memory there is, on all processes. Collective, and the probes are not: the model
    is not sharded yet. It is left without gradients and otherwise as it was, and so are the random states.

    `known` is what an earlier session of the run found, which is taken over on the same machine. Without `probing` the
    largest size is taken untried. `available` gives the bytes that this process may still come to hold. Raises
    InputError where not even one block fits, Stopped when told to stop, and any error that is not about memory.
    """
    began = time.monotonic()
    machine = asdict(hardware) | {name: getattr(recipe, name) for name in MEMORY_SETTINGS}
    if known and known["machine"] == machine:
        return MicroBatchSearch(**known | {"from_plan": True})
    if not recipe.auto_batch_size:
        return MicroBatchSearch(recipe.max_batch_size, machine)
    sizes = candidate_sizes(recipe.effective_batch_size, processes.count, recipe.max_batch_size)
    if not probing:
        return MicroBatchSearch(next(sizes), machine)

    device = accelerator.device
    start_threads()
    share_one_heap()
    budget = int(available(device) * recipe.target_memory_utilization)
    most = ceiling(device, budget)  # once for all tries: a CPU's allocator keeps some of what a try has freed
    budgets = processes.gather(budget)  # nobody allocates before all have looked
    tries: list[int] = []

    def next_size() -> int:
        for size in sizes:
            return size
        processes.refuse(
            f"max_batch_size: not even one block of {recipe.block_size} tokens at a time fits into memory: tried "
            f"{', '.join(map(str, tries))} on {hardware},\n  with {format_bytes(min(budgets))} to use "
            f"({recipe.target_memory_utilization:.0%}, target_memory_utilization, of what is free);\n  {WHAT_HELPS}"
        )

    @find_executable_batch_size(starting_batch_size=next_size(), reduce_batch_size_fn=next_size)
    def search(micro_batch: int) -> int:
        tries.append(micro_batch)
        try:
            processes.attempt(lambda: probe(model, micro_batch, recipe, accelerator, hardware, most), stop)
        except DoesNotFit:
            # In the words that find_executable_batch_size recognises.
            raise RuntimeError(f"a micro-batch of {micro_batch} is out of memory.") from None
        return micro_batch

    reset_peak_memory(device)
    micro_batch = search()
    peaks = [peak for peak in processes.gather(peak_memory(device)) if peak is not None]
    release_cached_memory()
    seconds = round(time.monotonic() - began, 2)
    return MicroBatchSearch(micro_batch, machine, tries, max(peaks, default=None), min(budgets), seconds)


def probe(
    model: GPT2ForPretraining,
    micro_batch: int,
    recipe: Recipe,
    accelerator: Accelerator,
    hardware: Hardware,
    most: int,
) -> None:
    """Hold what a training step holds at its fullest, under the limit of `most` bytes: gradients of the micro-batches
    before and a bucket of them, the optimizer's state (where FSDP2 will share it out a process's part; parameters and
    gradients are complete, so that what fits here fits sharded), and one forward and backward at full length."""
    device = accelerator.device
    shards = hardware.processes if hardware.sharded else 1
    state_bytes = OPTIMIZERS[recipe.optimizer].state_bytes
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state_sizes = [state_bytes[kind_of(name, p.dim())] * -(-p.numel() // shards) for name, p in parameters.items()]
    if hardware.processes > 1 and not hardware.sharded:
        state_sizes.append(min(GRADIENT_BUCKET_BYTES, sum(4 * p.numel() for p in parameters.values())))
    blocks = torch.arange(micro_batch * recipe.block_size, device=device).view(micro_batch, recipe.block_size)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), limited(device, most):
            state = [torch.zeros(size, dtype=torch.uint8, device=device) for size in state_sizes]
            for p in parameters.values():
                p.grad = torch.zeros_like(p)
            input_ids = blocks % model.config.vocab_size
            with accelerator.autocast():
                loss = model(input_ids=input_ids, labels=input_ids).loss
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            del state
    finally:
        model.zero_grad(set_to_none=True)
