"""The batch contract: how a global batch is cut into micro-batches, exactly, whatever the machine. Pure arithmetic.

A recipe's G blocks per optimizer step are shared out over W processes, and each process takes its share in
micro-batches of m: the last one is smaller where m does not divide; nothing is padded, dropped or repeated.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this arithmetic needs no torch
    from torch import Tensor

# The label of a position that does not count, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100

# Gradients are added up over processes in pieces of at most so many bytes: enough for the full rate of a network,
# little of what a GPU holds, and for GPT-2 small 7 pieces.
GRADIENT_BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MicroBatch:
    """Positions [start, stop) of a global batch, counted from the batch's first block. At weight 0 they are another
    micro-batch's, and run through the model only because all processes must run equally often."""

    start: int
    stop: int
    weight: int = 1

    @property
    def size(self) -> int:
        return self.stop - self.start

    def labels(self, input_ids: "Tensor") -> "Tensor":
        """The labels of its blocks: at weight 0 none counts, so that loss and gradient are exactly zero."""
        return input_ids if self.weight else input_ids.new_full(input_ids.shape, IGNORE_INDEX)


def share(global_batch: int, processes: int, rank: int) -> MicroBatch:
    """The contiguous part of a global batch that process `rank` takes; sizes differ by at most one."""
    return MicroBatch(global_batch * rank // processes, global_batch * (rank + 1) // processes)


def cut(
    global_batch: int, processes: int, rank: int, micro_batch: int, equal_counts: bool = False
) -> list[MicroBatch]:
    """The micro-batches of process `rank`, at most `micro_batch` blocks each.

    `equal_counts`: as many on every process, as FSDP2 needs it, whose forward and backward are collective; where one
    is missing, a block of the batch is repeated at weight 0.
    """
    part = share(global_batch, processes, rank)
    starts = range(part.start, part.stop, micro_batch)
    pieces = [MicroBatch(start, min(start + micro_batch, part.stop)) for start in starts]
    if equal_counts:
        most = -(-largest_share(global_batch, processes) // micro_batch)
        first = min(part.start, global_batch - 1)
        pieces += [MicroBatch(first, first + 1, weight=0)] * (most - len(pieces))
    return pieces


def largest_share(global_batch: int, processes: int) -> int:
    """Blocks of the process that has most."""
    return -(-global_batch // processes)


def candidate_sizes(global_batch: int, processes: int, max_batch_size: int) -> Iterator[int]:
    """Micro-batch sizes from the largest down, each the smallest that cuts a share into that many micro-batches: for
    512 on one process 512, 256, 171, 128, 103, 86, ... Sizes between them would need as many passes and more memory.
    """
    blocks = largest_share(global_batch, processes)
    size = min(blocks, max_batch_size)
    while size >= 1:
        pieces = -(-blocks // size)
        size = -(-blocks // pieces)
        yield size
        size -= 1


def describe_cut(global_batch: int, processes: int, micro_batch: int) -> str:
    """The batch arithmetic in words: `32 = 2 processes × 2 micro-batches of 8`."""
    cuts = [[piece.size for piece in cut(global_batch, processes, rank, micro_batch)] for rank in range(processes)]
    if all(sizes == cuts[0] for sizes in cuts):
        per_process = " + ".join(in_words(cuts[0]))
        if " + " in per_process and processes > 1:
            per_process = f"({per_process})"
        return f"{global_batch} = {count(processes, 'process', 'processes')} × {per_process}"
    return f"{global_batch} = " + " + ".join(f"({' + '.join(in_words(sizes))})" for sizes in cuts)


def in_words(sizes: list[int]) -> list[str]:
    """[8, 8, 4] as ['2 micro-batches of 8', '1 micro-batch of 4']."""
    return [f"{count(sizes.count(size), 'micro-batch', 'micro-batches')} of {size}" for size in dict.fromkeys(sizes)]


def count(number: int, one: str, many: str) -> str:
    """A number and its noun."""
    return f"{number} {one if number == 1 else many}"


def next_smaller(global_batch: int, processes: int, micro_batch: int) -> int | None:
    """The micro-batch to step down to from one that did not fit; None below 1."""
    return next(candidate_sizes(global_batch, processes, micro_batch - 1), None)


def gradient_buckets(sizes: Sequence[int], bucket_bytes: int = GRADIENT_BUCKET_BYTES) -> list[range]:
    """Gradients of so many bytes as consecutive buckets, each given by its places in `sizes`. One that is larger than
    a bucket, as that of the embedding, is one by itself, so that it need not be copied into one."""
    buckets: list[range] = []
    held = bucket_bytes  # by the last bucket
    for place, size in enumerate(sizes):
        if held + size <= bucket_bytes:
            buckets[-1] = range(buckets[-1].start, place + 1)
            held += size
        else:
            buckets.append(range(place, place + 1))
            held = size
    return buckets


def loss_chunk_rows(
    vocab_size: int, device_type: str, device_memory: int, compute_bytes: int, logits_bytes: int, compiled: bool
) -> int:
    """Rows of logits that the loss holds at a time. Each chunk reads the head's weight twice and its gradient once,
    and writes that: the more rows, the less this weighs, and the more memory the chunk takes. A function of the
    machine and no timing of it, so that a run is repeatable.

    On CUDA what fits into 1/32 of `device_memory` bytes: compiled in bf16 with logits of float32, 8,800 rows of
    GPT-2's vocabulary in 80 GB, where the traffic is some 3 % of the products (derived, not measured).
    """
    row = loss_chunk_bytes(1, vocab_size, device_type, compute_bytes, logits_bytes, compiled)
    return max(1, device_memory // 32 // row) if device_type == "cuda" else 1024


def loss_chunk_bytes(
    rows: int, vocab_size: int, device_type: str, compute_bytes: int, logits_bytes: int, compiled: bool
) -> int:
    """Bytes of so many rows of logits at their peak: themselves, and their gradient in the type of the products. Not
    compiled, the gradient takes the logits' place where both are of one type (always on a CPU), and two values of
    float32 a logit are work space for as many rows as pass through the softmax together."""
    if compiled:
        return (logits_bytes + compute_bytes) * rows * padded_columns(vocab_size)
    work = min(rows, softmax_rows(vocab_size, device_type))
    logit = compute_bytes if compute_bytes == logits_bytes or device_type == "cpu" else logits_bytes + compute_bytes
    return (logit * rows + 8 * work) * vocab_size


def softmax_traffic(penalty_type: str, penalty_top_k: int, compute_bytes: int, logits_bytes: int = 4) -> int:
    """Bytes that the compiled softmax of the loss moves for each logit, as counted in its code by tests/kernels: reads
    for each of the likeliest that are set apart, for the sums and for the gradient, and the gradient that is written.
    A cache may serve the later reads, which is not counted."""
    return logits_bytes * ((penalty_top_k if penalty_type == "top_k_mass" else 1) + 2) + compute_bytes


def padded_columns(vocab_size: int) -> int:
    """Columns of the logits where a kernel of vectors and matrix units read them: 50,304 for GPT-2's 50,257."""
    return -(-vocab_size // 64) * 64


def softmax_rows(vocab_size: int, device_type: str) -> int:
    """Rows of a chunk that pass through the softmax together. On a CPU 4 MB of them, which stay in its cache with
    their exponentials: for 1,023 rows of 50,257 on one core 0.24 s, against 0.27 in 0.5 MB and 0.34 in 64 MB."""
    return max(1, 2**20 // vocab_size) if device_type == "cpu" else sys.maxsize
