"""The batch contract: how a global batch is cut into micro-batches, exactly, whatever the machine.

A recipe's G blocks per optimizer step are shared out over W processes, and each process takes its share in
micro-batches of m: the last one is smaller where m does not divide; nothing is padded, dropped or repeated.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from clm_owt.recipe import InputError, Recipe

# Out-of-memory errors that Accelerate's should_reduce_batch_size does not know.
MORE_MEMORY_ERRORS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "MPS backend out of memory")


@dataclass(frozen=True)
class MicroBatch:
    """Positions [start, stop) of a global batch, counted from the batch's first block."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def share(global_batch: int, processes: int, rank: int) -> MicroBatch:
    """The contiguous part of a global batch that process `rank` takes; sizes differ by at most one."""
    return MicroBatch(global_batch * rank // processes, global_batch * (rank + 1) // processes)


def cut(global_batch: int, processes: int, rank: int, micro_batch: int) -> list[MicroBatch]:
    """The micro-batches of process `rank`, at most `micro_batch` blocks each."""
    part = share(global_batch, processes, rank)
    starts = range(part.start, part.stop, micro_batch)
    return [MicroBatch(start, min(start + micro_batch, part.stop)) for start in starts]


def candidate_sizes(global_batch: int, processes: int, max_batch_size: int) -> Iterator[int]:
    """Micro-batch sizes from the largest down, each the smallest that cuts a share into that many micro-batches: for
    512 on one process 512, 256, 171, 128, 103, 86, ... Sizes between them would need as many passes and more memory.
    """
    largest_share = -(-global_batch // processes)
    size = min(largest_share, max_batch_size)
    while size >= 1:
        pieces = -(-largest_share // size)
        size = -(-largest_share // pieces)
        yield size
        size -= 1


def describe_cut(global_batch: int, processes: int, micro_batch: int) -> str:
    """The batch arithmetic in words: `32 = 2 processes × 2 micro-batches of 8`."""
    cuts = [[piece.size for piece in cut(global_batch, processes, rank, micro_batch)] for rank in range(processes)]
    if all(sizes == cuts[0] for sizes in cuts):
        per_process = " + ".join(runs(cuts[0]))
        if " + " in per_process and processes > 1:
            per_process = f"({per_process})"
        return f"{global_batch} = {count(processes, 'process', 'processes')} × {per_process}"
    return f"{global_batch} = " + " + ".join(f"({' + '.join(runs(sizes))})" for sizes in cuts)


def runs(sizes: list[int]) -> list[str]:
    """[8, 8, 4] as ['2 micro-batches of 8', '1 micro-batch of 4']."""
    return [f"{count(sizes.count(size), 'micro-batch', 'micro-batches')} of {size}" for size in dict.fromkeys(sizes)]


def count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, Exception) and should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MORE_MEMORY_ERRORS)


def find_micro_batch(recipe: Recipe, processes: int) -> int:
    """The micro-batch of the run: the largest useful size up to `max_batch_size`."""
    if not recipe.auto_batch_size:
        return recipe.max_batch_size
    return next(candidate_sizes(recipe.effective_batch_size, processes, recipe.max_batch_size))


def next_smaller(global_batch: int, processes: int, micro_batch: int) -> int:
    """The micro-batch to step down to from one that did not fit. Raises InputError below 1."""
    smaller = next(candidate_sizes(global_batch, processes, micro_batch - 1), None)
    if smaller is None:
        raise InputError(
            "max_batch_size: not even one block at a time fits into memory; lower block_size, set "
            "gradient_checkpointing: true, or take a smaller model (n_layer, n_embd)"
        )
    return smaller


def release_cached_memory() -> None:
    """Give freed memory back to the device, once nothing refers to the tensors of the failed try."""
    gc.collect()
    clear_device_cache()
