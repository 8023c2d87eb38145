"""Linear head, cross-entropy and sharpness penalty in one pass that never holds the logits of a whole batch.

For logits z = W h with p = softmax(z), m = argmax z, H = -sum p log p, K the k largest and S = sum_K p:

    penalty        value            gradient by z
    non_max_sum    1 - p_m          p_m (p - e_m)
    neg_max_prob   -p_m             p_m (p - e_m)
    neg_entropy    H (minimised)    -p (log p + H)
    top_k_mass     1 - S            S p - p 1_K

and p - e_y for cross-entropy of target y. The gradient of a chunk of logits is known as soon as the chunk is, so the
forward multiplies it at once into the gradients of hidden states and weight: three matrix products per chunk, nothing
of size N x V, and a backward that has nothing left to do.

What happens between the products is written twice. `_InPlaceSoftmax` overwrites the logits, block by block, which
suits a CPU's cache. `softmax_and_gradient` is a function without side effects, of which torch.compile makes one
kernel; the tests compare the two.

What exists serves less: the loss of torch 2.13's `F.linear_cross_entropy` is wrong for bf16 inputs (9.1 where it is
10.9), and on a CPU it was no faster than all logits at once; Liger's kernel has neither penalty nor statistics.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clm_owt.batch import IGNORE_INDEX, loss_chunk_rows, padded_columns, softmax_rows
from clm_owt.recipe import PENALTY_TYPES


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a double cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


class LossStatistics(NamedTuple):
    """The statistics of a loss, from its kernel to the rows of metrics.jsonl.

    Where the loss is computed they are 0-d tensors on the device, float32 (float64 for float64 inputs): sums over the
    positions that are not ignored, divided by `num_items`, so that those of micro-batches and processes add up. `loss`
    is ce_loss + penalty_weight * penalty, the only one with a gradient; `max_prob` the probability of the likeliest
    token; `entropy` is in nats. In a row they are the floats that these sums come to: means over all tokens.

    To add one: its formula in `_statistics` and `reference_linear_loss`, in this order, and its name here.
    """

    loss: Tensor | float
    ce_loss: Tensor | float
    penalty: Tensor | float
    max_prob: Tensor | float
    entropy: Tensor | float


# Graphs that torch.compile may keep of one function. A step needs two of a block, one for each size of micro-batch,
# validation two, and each size that was tried or stepped down from leaves one more. At the limit it raises.
MOST_VARIANTS = 200
# The compiled softmax finds each of the k likeliest of top_k_mass in a pass of its own: 66 bytes a logit for 14 of
# them, and 74, as many as a dozen passes take, for 16. For some k (9 and 14 on an A100, 10 on an H100) the compiler
# puts 8 bytes of each thread aside, so as to stay at 48 or 64 registers; for 5 none.
MOST_COMPILED_TOP_K = 14
# Rows of a product of 16-bit types on a CPU come in multiples of this, and columns are padded: the three products of
# the head take 590 ms with 1,024 x 50,304 logits on one core of a Zen 5, and 745 with 1,023 x 50,257.
ROW_TILE = 16
# The order of magnitude for which the compiled softmax is laid out: 8,800 rows of GPT-2's vocabulary in 80 GB.
TYPICAL_ROWS = 8192


# A graph break under torch.compile: the time is in the matrix products, which are library calls either way.
@torch.compiler.disable
def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    num_items: int | Tensor,
    penalty_type: str = "non_max_sum",
    penalty_weight: float = 0.0,
    penalty_top_k: int = 5,
    round_logits: bool = False,
    chunk_rows: int | None = None,
    block_rows: int | None = None,
    softmax: "Softmax | None" = None,
) -> LossStatistics:
    """Cross-entropy plus `penalty_weight` times the sharpness penalty of softmax(hidden @ weight.T).

    hidden [N, D] and weight [V, D] floating, targets [N] int64, -100 where a position does not count. Under autocast
    the matrix products are in its dtype; softmax, sums and the accumulation of the weight's gradient stay in float32.
    So do the logits, unless `round_logits` (a CPU's product rounds them always).
    `num_items`, an int or a 0-d tensor, is what sums are divided by: with the number of targets of the whole step,
    micro-batches and processes simply add up. `chunk_rows` is how many rows of logits exist at a time (default: what
    suits the device). `softmax` is what is done to them, a `compiled_softmax()`; by default a dozen passes in place,
    over `block_rows` of them together. Where no gradient is wanted (no_grad, or nothing requires one) only the first
    of the three products is done. Raises ValueError for an unknown penalty type or a k below 1.
    """
    penalty = _penalty(penalty_type, penalty_weight, penalty_top_k)
    device_type = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    # An int stays a Python number: a tensor of it would have to be copied to the device, which waits for the copy.
    scale = 1 / (num_items.to(_statistics_dtype(dtype)) if isinstance(num_items, Tensor) else num_items)
    vocab_size = len(weight)
    if softmax is None and _multiplies_in_tiles(dtype, hidden.device):
        missing = -len(hidden) % ROW_TILE
        hidden, targets = F.pad(hidden, (0, 0, 0, missing)), F.pad(targets, (0, missing), value=IGNORE_INDEX)
    logits_dtype = dtype if round_logits else _statistics_dtype(dtype)
    chunk_rows = chunk_rows or loss_chunk_rows(
        vocab_size,
        device_type,
        _device_memory(hidden.device),
        compute_bytes=dtype.itemsize,
        logits_bytes=logits_dtype.itemsize,
        compiled=softmax is not None,
    )
    chunk_rows = min(chunk_rows, len(hidden))
    softmax = softmax or _InPlaceSoftmax(chunk_rows, vocab_size, block_rows or softmax_rows(vocab_size, device_type))
    arguments = (hidden, weight, targets, scale, penalty, chunk_rows, dtype, logits_dtype, softmax)
    with torch.autocast(device_type, enabled=False) if autocast else contextlib.nullcontext():
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return LossStatistics(*_FusedLinearLoss.apply(*arguments))
        return _loss_and_gradients(*arguments, want_hidden=False, want_weight=False)[0]


def reference_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    num_items: int | Tensor,
    penalty_type: str = "non_max_sum",
    penalty_weight: float = 0.0,
    penalty_top_k: int = 5,
) -> LossStatistics:
    """What `fused_linear_loss` computes, written down plainly: all logits at once, gradients by autograd."""
    penalty = _penalty(penalty_type, penalty_weight, penalty_top_k)
    logits = F.linear(hidden, weight)
    logits = logits.to(_statistics_dtype(logits.dtype))
    valid = targets != IGNORE_INDEX
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    max_prob = p.gather(1, logits.max(-1, keepdim=True).indices).squeeze(1)
    entropy = -(p * log_p).sum(-1)
    sharpness = {
        "non_max_sum": lambda: 1 - max_prob,
        "neg_max_prob": lambda: -max_prob,
        "neg_entropy": lambda: entropy,
        "top_k_mass": lambda: 1 - p.gather(1, logits.topk(min(penalty.top_k, logits.shape[1])).indices).sum(-1),
    }[penalty.type]()
    ce_loss = -log_p.gather(1, torch.where(valid, targets, 0)[:, None]).squeeze(1)
    ce_loss, sharpness, *others = (
        torch.where(valid, rows, 0).sum() / num_items for rows in (ce_loss, sharpness, max_prob, entropy)
    )
    loss = ce_loss + penalty.weight * sharpness
    return LossStatistics(loss, *(value.detach() for value in (ce_loss, sharpness, *others)))


class _Penalty(NamedTuple):
    type: str
    weight: float
    top_k: int


def _penalty(penalty_type: str, weight: float, top_k: int) -> _Penalty:
    if penalty_type not in PENALTY_TYPES:
        raise ValueError(f"penalty_type {penalty_type!r}: expected one of {', '.join(PENALTY_TYPES)}")
    if top_k < 1:
        raise ValueError(f"penalty_top_k {top_k}: expected at least 1")
    return _Penalty(penalty_type, weight, top_k)


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, *rest):
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        statistics, grad_hidden, grad_weight = _loss_and_gradients(
            hidden, weight, *rest, want_hidden=want_hidden, want_weight=want_weight
        )
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(*statistics[1:])
        return tuple(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        # The saved gradients are those for a grad_loss of 1, and must not be modified. To look whether it is 1 costs
        # nothing on a CPU, where the product with V x D would take 1 % of a step. Elsewhere looking would wait for the
        # device, and the product is some 0.1 ms.
        unchanged = grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
        grads = [g if g is None or unchanged else (g * grad_loss).to(g.dtype) for g in ctx.saved_tensors]
        return *grads, *[None] * 7


def _loss_and_gradients(
    hidden, weight, targets, scale, penalty, chunk_rows, dtype, logits_dtype, softmax, *, want_hidden, want_weight
):
    """The statistics, and the gradients of the loss by hidden and weight where wanted, else None."""
    device, exact = hidden.device, _statistics_dtype(dtype)
    N, D = hidden.shape
    vocab_size = len(weight)
    # Chunks of about one size: a short last one would read and write the whole weight for little.
    chunk_rows = -(-N // -(-N // chunk_rows))
    inputs = hidden.to(dtype)
    in_place = isinstance(softmax, _InPlaceSoftmax)
    if in_place and not _keeps_accumulator(device):
        logits_dtype = dtype  # as the product rounds them; float32 is needed for one block at a time
    if in_place and not _multiplies_in_tiles(dtype, device):
        # Rows start on boundaries that matrix units like: with a stride of 50,257 floats the first product runs at 0.7
        # of the speed it has with 50,272 (128 against 176 GFLOP/s on a 2-core Zen 4).
        columns, stride, kernel = vocab_size, -(-vocab_size // 16) * 16, weight.to(dtype)
    else:
        # A kernel loads and stores vectors only where every row has a multiple of them, and matrix units want it of
        # all sides of a product. The weight is padded in the copy that its cast makes anyway.
        columns = stride = padded_columns(vocab_size)
        kernel = torch.empty(columns, D, dtype=dtype, device=device)
        kernel[:vocab_size].copy_(weight)
        kernel[vocab_size:].zero_()
    logits_buffer = torch.empty(chunk_rows, stride, dtype=logits_dtype, device=device)[:, :columns]

    valid = targets != IGNORE_INDEX
    targets = torch.where(valid, targets, 0).unsqueeze(1)
    # float16 holds no 1/500,000: its products take the gradient unscaled, and the scale comes after them.
    scale_after = dtype == torch.float16
    row_scale = valid.to(exact).unsqueeze(1) * (1.0 if scale_after else scale)

    rows = torch.empty(len(LossStatistics._fields) - 1, N, dtype=exact, device=device)  # all but the loss
    grad_hidden = torch.empty(N, D, dtype=exact, device=device) if want_hidden else None
    grad_weight = torch.empty(columns, D, dtype=exact, device=device) if want_weight else None

    for start in range(0, N, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, N))
        logits = logits_buffer[: chunk.stop - chunk.start]
        _matmul(inputs[chunk], kernel.t(), out=logits)
        statistics, gradient = softmax(
            logits,
            targets[chunk],
            row_scale[chunk],
            penalty=penalty,
            vocab_size=vocab_size,
            gradient_dtype=dtype if want_hidden or want_weight else None,
        )
        rows[:, chunk] = statistics.t()
        if want_hidden:
            _matmul(gradient, kernel, out=grad_hidden[chunk])
        if want_weight:
            # beta = 0 writes without reading: no zero-filled buffer.
            _matmul(gradient.t(), inputs[chunk], out=grad_weight, beta=int(start > 0))
        del gradient  # before the next chunk's is made

    if want_weight:
        grad_weight = grad_weight[:vocab_size]
    if scale_after:
        grad_hidden, grad_weight = (g if g is None else g.mul_(scale) for g in (grad_hidden, grad_weight))
    ce_loss, sharpness, *others = torch.where(valid, rows, 0).sum(1) * scale
    return (
        LossStatistics(ce_loss + penalty.weight * sharpness, ce_loss, sharpness, *others),
        grad_hidden if grad_hidden is None else grad_hidden.to(hidden.dtype),
        grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
    )


# What is done to a chunk of logits: (logits [r, C], target [r, 1] int64, scale [r, 1], *, penalty, vocab_size <= C,
# gradient_dtype or None) -> the statistics without the loss [r, 4], and the gradient times scale [r, C]. Columns from
# vocab_size on are in no softmax, and have a gradient of zero. Both forms are written so that nothing cancels when a
# softmax saturates: with s = z - z_m the sum over all but the k largest is taken by itself, and 1 - p_m, 1 - S and the
# gradient at m are built from it and not as differences from 1.
Softmax = Callable[..., tuple[Tensor, Tensor | None]]


def _likeliest(penalty: _Penalty, vocab_size: int) -> int:
    """How many of the likeliest tokens are set apart: k of top_k_mass, else the likeliest alone."""
    return min(penalty.top_k, vocab_size) if penalty.type == "top_k_mass" else 1


def _statistics(penalty: _Penalty, target_s, total, rest, outside, mean_s) -> Tensor:
    """[r, 4] of values [r, 1]: s of the target, the sum of exp(s) over all, over all but m, and outside of K, as a
    share of it; and the mean of s."""
    log_total, max_prob = rest.log1p(), 1 / total
    entropy = log_total - mean_s
    sharpness = {"non_max_sum": outside, "neg_max_prob": -max_prob, "neg_entropy": entropy, "top_k_mass": outside}
    return torch.cat((log_total - target_s, sharpness[penalty.type], max_prob, entropy), 1)


def softmax_and_gradient(z, target, scale, *, penalty, vocab_size, gradient_dtype):
    """A `Softmax` as a function without side effects. Compiled for CUDA it is one kernel, which reads a logit k + 2
    times and writes its gradient once: `batch.softmax_traffic`. (`tests/kernels` holds it to that.)"""
    z = z.to(_statistics_dtype(z.dtype))  # in registers
    ids = torch.arange(z.shape[1], dtype=torch.int32, device=z.device)
    inside = ids < vocab_size
    others, top_z, top = inside, [], []
    for _ in range(_likeliest(penalty, vocab_size)):
        value, index = torch.where(others, z, -torch.inf).max(-1, keepdim=True)
        top_z.append(value)
        top.append(index.int())
        # What comes after it by size, and by id among equals: as a condition on the last alone, where the conjunction
        # of k would be kept in memory.
        others = inside & ((z < value) | ((z == value) & (ids > top[-1])))
    s = z - top_z[0]
    exp_s = s.exp()
    e = torch.where(others, exp_s, 0)
    outside = e.sum(-1, keepdim=True)
    weighted = (e * s).sum(-1, keepdim=True)
    top_s = [value - top_z[0] for value in top_z[1:]]
    rest = outside + sum(value.exp() for value in top_s)
    total = 1 + rest
    outside = outside / total
    mean_s = (weighted + sum(value.exp() * value for value in top_s)) / total
    statistics = _statistics(penalty, z.gather(1, target) - top_z[0], total, rest, outside, mean_s)
    if gradient_dtype is None:
        return statistics, None

    p = exp_s * (1 / total)
    hit = ids == target.int()
    gradient = torch.where(hit, torch.where(ids == top[0], -rest / total, p - 1), p)
    if penalty.weight:
        # Of p: -(log p + H) = mean_s - s; else S outside of K, S - 1 inside.
        sharpening = mean_s - s if penalty.type == "neg_entropy" else torch.where(others, 1 - outside, -outside)
        gradient = gradient + penalty.weight * p * sharpening
    return statistics, torch.where(inside, scale * gradient, 0).to(gradient_dtype)


def compiled_softmax(backend: str | Callable = "inductor") -> Softmax:
    """`softmax_and_gradient` compiled: one kernel for any number of rows, and another where no gradient is wanted.
    Raises where it cannot be one graph; it never falls back to running uncompiled."""
    compiled = torch.compile(
        softmax_and_gradient, fullgraph=True, dynamic=False, backend=backend, recompile_limit=MOST_VARIANTS
    )

    def softmax(z, target, scale, **settings):
        for tensor in (z, target, scale):
            # The rows of a chunk differ by micro-batch. As an unknown number, of a fixed order of magnitude, they give
            # the same kernel whichever chunk happens to be the first.
            torch._dynamo.decorators.mark_unbacked(tensor, 0, hint_override=TYPICAL_ROWS, shape_id="rows")
        return compiled(z, target, scale, **settings)

    return softmax


class _InPlaceSoftmax:
    """A `Softmax` that overwrites the logits with their gradient, `block_rows` of them at a time, and keeps its work
    space from chunk to chunk, up to `chunk_rows` of them. Logits of bf16 or float16 are float32 there alone. Columns
    from vocab_size on stay as they are: products with the zeros of a padded weight."""

    def __init__(self, chunk_rows: int, vocab_size: int, block_rows: int):
        self.chunk_rows, self.vocab_size, self.block_rows = chunk_rows, vocab_size, min(chunk_rows, block_rows)
        self.exp_buffer = self.exact_buffer = self.rounded_buffer = None

    def __call__(self, logits, target, scale, *, penalty, vocab_size, gradient_dtype):
        exact = _statistics_dtype(logits.dtype)
        if self.exp_buffer is None:
            self.exp_buffer = logits.new_empty(self.block_rows, vocab_size, dtype=exact)
            self.exact_buffer = None if logits.dtype == exact else torch.empty_like(self.exp_buffer)
        statistics = []
        for first in range(0, len(logits), self.block_rows):
            block = slice(first, min(first + self.block_rows, len(logits)))
            rows = logits[block, :vocab_size]
            z = rows if self.exact_buffer is None else self.exact_buffer[: len(rows)].copy_(rows)
            statistics.append(
                _softmax_in_place(
                    z, self.exp_buffer[: len(rows)], target[block], scale[block], penalty, gradient_dtype is not None
                )
            )
            if z is not rows and gradient_dtype is not None:
                rows.copy_(z)
        gradient = logits
        if gradient_dtype not in (None, logits.dtype):
            if self.rounded_buffer is None:
                self.rounded_buffer = torch.empty(
                    self.chunk_rows, logits.stride(0), dtype=gradient_dtype, device=logits.device
                )[:, :vocab_size]
            gradient = self.rounded_buffer[: len(logits)].copy_(logits)
        return torch.cat(statistics), gradient


def _softmax_in_place(z, e, target, scale, penalty, want_gradient):
    """The statistics [r, 4] of logits z [r, V], which become, where wanted, the gradient times scale [r, 1]. e [r, V]
    is work space, target [r, 1]."""
    k = _likeliest(penalty, z.shape[1])
    top_z, top = z.max(-1, keepdim=True) if k == 1 else z.topk(k)
    top_z, best = top_z - top_z[:, :1], top_z[:, :1]
    target_s = z.gather(1, target) - best
    s = z.sub_(best)
    torch.exp(s, out=e)
    e.scatter_(1, top, 0.0)
    top_e = top_z.exp()
    outside = e.sum(-1, keepdim=True)
    rest = outside + top_e[:, 1:].sum(-1, keepdim=True)
    total = 1 + rest
    outside = outside / total
    mean_s = (torch.linalg.vecdot(e, s).unsqueeze(1) + (top_e * top_z).sum(-1, keepdim=True)) / total
    statistics = _statistics(penalty, target_s, total, rest, outside, mean_s)

    if want_gradient:
        weight = penalty.weight
        top_p = top_e / total
        if penalty.type == "neg_entropy":  # -p (log p + H) = -p (s - mean_s)
            if weight:
                s.mul_(-weight).add_(1 + weight * mean_s).mul_(e).mul_(scale / total)
            else:
                torch.mul(e, scale / total, out=z)
            top_penalty = top_p * mean_s
        else:  # S p outside of K, (S - 1) p inside
            torch.mul(e, scale * (1 + weight * (1 - outside)) / total, out=z)
            top_penalty = -top_p * outside
        hit = target == top[:, :1]
        top_gradient = torch.cat((torch.where(hit, -rest / total, top_p[:, :1]), top_p[:, 1:]), 1)
        z.scatter_(1, top, scale * (top_gradient + weight * top_penalty))
        z.scatter_add_(1, target, torch.where(hit, 0, -scale))
    return statistics


def _matmul(a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> None:
    """out = beta * out + a @ b, out in float32 also where a and b are not."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out) if beta else torch.mm(a, b, out=out)
    elif _keeps_accumulator(a.device):
        if beta:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        product = torch.mm(a, b)
        out.add_(product) if beta else out.copy_(product)


def _keeps_accumulator(device: torch.device) -> bool:
    """Whether products of bf16 or float16 can keep the float32 of their accumulator (not run by the project yet)."""
    return device.type == "cuda" and torch.version.cuda is not None


def _multiplies_in_tiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products are done by units of a CPU that take 16-bit numbers in tiles, and want sides in multiples."""
    return device.type == "cpu" and dtype.itemsize == 2


def _device_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
