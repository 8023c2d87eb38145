"""Causal attention in bf16 on a CPU.

The kernel that `scaled_dot_product_attention` has for CPUs makes little use of their bf16 instructions: forward and
backward of GPT-2 small take 80 ms a layer and block of 1024 tokens on one core of a Zen 5, and 46 ms here, as batched
matrix products, which oneDNN computes at the rate of large ones, and PyTorch's softmax. Rows are taken in tiles, and a
tile multiplies the keys up to its last row alone, so that most of what causality masks is never computed. As in
FlashAttention the backward repeats the probabilities, so that nothing of size T x T is kept.

In float32 this gains nothing: that stays with `scaled_dot_product_attention`, and so does every other device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# The name by which a config asks for `attention_forward`.
ATTENTION = "sdpa_or_bf16_on_cpu"

# Scores computed at a time: 6 MB in bf16, of which the cache of two cores holds what the next operation reads.
TILE_ELEMENTS = 12 * 256 * 1024


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' `sdpa_attention_forward`, with `causal_attention` where that is faster and gives the same.

    query, key and value [m, H, T, h]; gives [m, T, H, h], and no weights.
    """
    blocks_without_padding = attention_mask is None and query.shape == key.shape and dropout == 0
    if query.is_cpu and query.dtype == torch.bfloat16 and blocks_without_padding and not torch.compiler.is_compiling():
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, scale).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * query @ key^T + causal mask) @ value of floating [m, H, T, h], in their type: scores and
    probabilities are rounded to it, and sums are float32 inside of each operation."""
    with torch.autocast("cpu", enabled=False):
        return _CausalAttention.apply(query, key, value, scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale):
        q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
        mask = _causal_mask(q)
        output, maxima = torch.empty_like(q), q.new_empty(*q.shape[:2], 1)
        for heads in _head_groups(q):
            for rows, keys in _row_tiles(q):
                # In one piece: of other tensors oneDNN makes a copy for each product, a transposed one slowly.
                q_tile = q[heads, rows].contiguous()
                k_tile, v_tile = (tensor[heads, keys].contiguous() for tensor in (k, v))
                scores = torch.baddbmm(mask[-q_tile.shape[1] :, -keys.stop :], q_tile, k_tile.mT, alpha=scale)
                maxima[heads, rows] = scores.amax(-1, keepdim=True)
                p = _probabilities(q_tile, k_tile, maxima[heads, rows], mask, scale)
                torch.bmm(p, v_tile, out=output[heads, rows])
        ctx.save_for_backward(query, key, value, maxima)
        ctx.scale = scale
        return output.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        *inputs, maxima = ctx.saved_tensors
        q, k, v, grad = (tensor.flatten(0, 1) for tensor in (*inputs, grad_output))
        mask = _causal_mask(q)
        grad_q, grad_k, grad_v = (torch.empty_like(q) for _ in range(3))
        sums_dtype = torch.promote_types(q.dtype, torch.float32)
        for heads in _head_groups(q):
            sum_k, sum_v = (torch.zeros_like(tensor[heads], dtype=sums_dtype) for tensor in (k, v))
            for rows, keys in _row_tiles(q):
                q_tile, grad_tile = (tensor[heads, rows].contiguous() for tensor in (q, grad))
                k_tile, v_tile = (tensor[heads, keys].contiguous() for tensor in (k, v))
                p = _probabilities(q_tile, k_tile, maxima[heads, rows], mask, ctx.scale)
                grad_p = torch.bmm(grad_tile, v_tile.mT)
                sum_v[:, keys] += torch.bmm(p.mT, grad_tile)
                grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
                sum_k[:, keys] += torch.bmm(grad_s.mT, q_tile)
                out = grad_q[heads, rows]
                torch.baddbmm(out, grad_s, k_tile, beta=0, alpha=ctx.scale, out=out)
            grad_k[heads], grad_v[heads] = sum_k.mul_(ctx.scale), sum_v
        return *(tensor.view(grad_output.shape) for tensor in (grad_q, grad_k, grad_v)), None


def _probabilities(q: Tensor, k: Tensor, maxima: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[heads, rows, keys] of the rows that end with the last of the keys. What is rounded are scores minus the largest
    of their row, which a product subtracts before it rounds: the likelier a key, the smaller its error."""
    rows = q.shape[1]
    scores = torch.baddbmm(-maxima, q, k.mT, alpha=scale)
    scores[:, :, -rows:] += mask[-rows:, -rows:]
    return scores.softmax(-1)


def _tile_rows(length: int) -> int:
    """Rows of a tile: short ones skip more of what is masked, long ones are better products."""
    return min(max(length // 4, 128), 256)


def _head_groups(q: Tensor) -> Iterator[slice]:
    """Slices of the heads of all blocks whose tiles have about TILE_ELEMENTS scores."""
    heads, length, _ = q.shape
    count = max(TILE_ELEMENTS // (min(_tile_rows(length), length) * length), 1)
    return (slice(start, min(start + count, heads)) for start in range(0, heads, count))


def _row_tiles(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the rows, and of the keys that these may look at."""
    length = q.shape[1]
    for start in range(0, length, _tile_rows(length)):
        stop = min(start + _tile_rows(length), length)
        yield slice(start, stop), slice(0, stop)


def _causal_mask(q: Tensor) -> Tensor:
    """What is added to the scores of the last tile, [rows of a tile, T]: -inf right of its diagonal, which ends in the
    last column. Its last rows and columns are the mask of any other tile."""
    length = q.shape[1]
    rows = min(_tile_rows(length), length)
    return torch.full((rows, length), -torch.inf, dtype=q.dtype, device=q.device).triu_(length - rows + 1)
