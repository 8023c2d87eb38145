"""The batch contract: how a global batch is cut into micro-batches, exactly, whatever the machine.

A recipe's G blocks per optimizer step are shared out over W processes, and each process takes its share in
micro-batches of m: the last one is smaller where m does not divide; nothing is padded, dropped or repeated.
"""

import platform
import time
from dataclasses import asdict, dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size

from clm_owt.batch import candidate_sizes
from clm_owt.model.gpt2 import GPT2ForPretraining
from clm_owt.recipe import Recipe
from clm_owt.stopping import Stopped, StopRequest
from clm_owt.training.device_memory import (
    available_memory,
    ceiling,
    is_out_of_memory,
    limited,
    peak_memory,
    release_cached_memory,
    reset_peak_memory,
    share_one_heap,
    start_threads,
    total_memory,
)
from clm_owt.training.processes import Processes

MEMORY_SETTINGS = (
    "auto_batch_size",
    "max_batch_size",
    "target_memory_utilization",
    "gradient_checkpointing",
    "torch_compile",
)

WHAT_HELPS = "lower block_size, set gradient_checkpointing: true, or take a smaller model (n_layer, n_embd)"


class DoesNotFit(Exception):
    """A process ran out of memory, and all of them have agreed on it: the micro-batch is too large."""


@dataclass(frozen=True)
class MicroBatchSearch:
    """How the micro-batch of a run was found; kept in `plan.json`."""

    micro_batch: int
    machine: dict[str, object]  # the machine that it holds for
    tries: list[int] = field(default_factory=list)  # sizes probed, of which the last fits; empty: not searched for
    peak_memory: int | None = None  # bytes at the probe's peak, on the process with the highest
    budget: int | None = None  # bytes that the probe might use, on the process with the fewest
    seconds: float = 0.0
    from_plan: bool = False  # found by an earlier session of this run, on the same machine

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def describe(self) -> str:
        if self.from_plan:
            return f"Micro-batch {self.micro_batch}, as found when the run began on this machine"
        if not self.tries:
            return f"Micro-batch {self.micro_batch}, not searched for"
        tried = f"tried {', '.join(map(str, self.tries))}, " if len(self.tries) > 1 else ""
        peak = f"{in_units(self.peak_memory)} at the peak" if self.peak_memory is not None else "peak not known"
        return f"Micro-batch {self.micro_batch} fits: {tried}{peak}, {self.seconds:.1f} s"


def find_micro_batch(
    model: GPT2ForPretraining,
    recipe: Recipe,
    accelerator: Accelerator,
    processes: Processes,
    stop: StopRequest,
    known: dict[str, object] | None = None,
    probing: bool = True,
) -> MicroBatchSearch:
    """The largest useful micro-batch, up to `max_batch_size`, whose training step fits into
    `target_memory_utilization` of the memory there is, on all processes. Collective, and the probes are not: the model
    is not sharded yet. It is left without gradients and otherwise as it was, and so are the random states.

    `known` is what an earlier session of the run found, which is taken over on the same machine. Without `probing` the
    largest size is taken unseen. Raises InputError where not even one block fits, Stopped when told to stop, and any
    error that is not about memory.
    """
    began = time.monotonic()
    machine = describe_machine(recipe, accelerator, processes)
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
    budget = int(available_memory(device) * recipe.target_memory_utilization)
    most = ceiling(device, budget)  # once for all tries: a CPU's allocator keeps some of what a try has freed
    budgets = processes.gather(budget)  # nobody allocates before all have looked
    tries: list[int] = []

    def next_size() -> int:
        for size in sizes:
            return size
        processes.refuse(
            f"max_batch_size: not even one block of {recipe.block_size} tokens at a time fits into memory: tried "
            f"{', '.join(map(str, tries))} on {machine['device']},\n  with {in_units(min(budgets))} to use "
            f"({recipe.target_memory_utilization:.0%}, target_memory_utilization, of what is free);\n  {WHAT_HELPS}"
        )

    @find_executable_batch_size(starting_batch_size=next_size(), reduce_batch_size_fn=next_size)
    def search(micro_batch: int) -> int:
        tries.append(micro_batch)
        out_of_memory = False
        try:
            probe(model, micro_batch, recipe, accelerator, most, processes.count if processes.sharded else 1)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        # The error is gone by now, and with its traceback the tensors that it held.
        release_cached_memory()
        verdict = processes.agree(out_of_memory, stop.signum)
        if verdict.signum is not None:
            raise Stopped(verdict.signum)
        if verdict.out_of_memory:
            raise RuntimeError(
                f"a micro-batch of {micro_batch} is out of memory."
            )  # find_executable_batch_size's word
        return micro_batch

    reset_peak_memory(device)
    micro_batch = search()
    peaks = [peak for peak in processes.gather(peak_memory(device)) if peak is not None]
    seconds = round(time.monotonic() - began, 2)
    return MicroBatchSearch(micro_batch, machine, tries, max(peaks, default=None), min(budgets), seconds)


def probe(
    model: GPT2ForPretraining, micro_batch: int, recipe: Recipe, accelerator: Accelerator, most: int, shards: int
) -> None:
    """Hold what a training step holds at its fullest, under the limit of `most` bytes: gradients of the micro-batches
    before, AdamW's two moments (a `shards`-th of them where FSDP2 will share them out; parameters and gradients are
    whole, so that what fits here fits sharded), and one forward and backward at full length."""
    device = accelerator.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    blocks = torch.arange(micro_batch * recipe.block_size, device=device).view(micro_batch, recipe.block_size)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), limited(device, most):
            moments = [torch.zeros(2 * -(-p.numel() // shards), dtype=p.dtype, device=device) for p in parameters]
            for p in parameters:
                p.grad = torch.zeros_like(p)
            input_ids = blocks % model.config.vocab_size
            with accelerator.autocast():
                loss = model(input_ids=input_ids, labels=input_ids).loss
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            del moments
    finally:
        model.zero_grad(set_to_none=True)


def describe_machine(recipe: Recipe, accelerator: Accelerator, processes: Processes) -> dict[str, object]:
    """All that the largest micro-batch depends on beside what makes the run this run."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "memory": total_memory(device),
        "processes": processes.count,
        "distributed_type": str(accelerator.distributed_type.value),
        "mixed_precision": accelerator.mixed_precision,
    } | {name: getattr(recipe, name) for name in MEMORY_SETTINGS}


def in_units(number: int) -> str:
    """Bytes as people read them."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 2**10:,.1f} KiB"
