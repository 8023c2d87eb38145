"""The sum of the gradients of all processes: in a few flat buckets, while the last backward of a step still runs."""

from collections.abc import Callable, Sequence

import torch
from torch.distributed import Work
from torch.futures import Future
from torch.nn import Parameter

from clm_owt.batch import GRADIENT_BUCKET_BYTES, gradient_buckets


class GradientSum:
    """Adds up the gradients of `parameters` over all processes, once a step, bucket by bucket.

    A backward finishes parameters from the last to the first, and so the buckets go: the gradients of a bucket are
    laid end to end (which takes the memory of one bucket besides; a large parameter is one by itself and is not
    copied), become views of the whole, and their sum is started while the backward goes on. The tied embedding, whose
    gradient is complete only at the very end, is the last.

    `start(flat)` begins to add up a float tensor over all processes, in place, and gives what to wait for. Each
    process starts each bucket once between `begin` and `finish`, in the same order, whatever happens to it: one that
    fails takes part with zeros (`abandon`). Without parameters nothing is done, as for one process.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter] = (),
        start: Callable[[torch.Tensor], Work | Future] | None = None,
        bucket_bytes: int = GRADIENT_BUCKET_BYTES,
    ):
        self._start = start
        order = list(reversed(parameters))
        sizes = [p.numel() * p.element_size() for p in order]
        self._buckets = [order[bucket.start : bucket.stop] for bucket in gradient_buckets(sizes, bucket_bytes)]
        self._bucket_of = {p: index for index, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] = []  # gradients that a bucket still waits for; none: no bucket may start yet
        self._started = len(self._buckets)
        self._works: list[Work | Future] = []
        for p in order:
            p.register_post_accumulate_grad_hook(self._see)

    def begin(self) -> None:
        """A step begins: from now on its sum is owed to the other processes."""
        self._missing, self._started = [], 0

    def expect_last_backward(self) -> None:
        """The backward to come is the last of the step: each gradient that it leaves is this process's whole part."""
        self._missing = [len(bucket) for bucket in self._buckets]

    def _see(self, parameter: Parameter) -> None:
        if not self._missing:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while self._started < len(self._buckets) and self._missing[self._started] == 0:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._started]
        for p in bucket:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if len(bucket) == 1:
            flat = bucket[0].grad
        else:
            flat = torch.cat([p.grad.reshape(-1) for p in bucket])
            for p, view in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = view.view_as(p)
        self._started += 1
        self._works.append(self._start(flat))

    def finish(self) -> None:
        """Until the sums are there; on an accelerator, until its queue of work waits for them."""
        while self._started < len(self._buckets):
            self._start_next()
        self._wait()

    def abandon(self) -> None:
        """Drop the gradients, and give the other processes what they may wait for: zeros, where nothing was started.
        The step is lost then, on every process. Needs the memory of two buckets, at most."""
        self._drop()
        while self._started < len(self._buckets):
            self._start_next()
            self._wait()
            self._drop()
        self._wait()

    def _wait(self) -> None:
        self._missing = []
        for work in self._works:
            work.wait()
        self._works.clear()

    def _drop(self) -> None:
        for p in self._bucket_of:
            p.grad = None
