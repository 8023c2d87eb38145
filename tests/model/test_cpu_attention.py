"""Attention in bf16 on a CPU, against scaled_dot_product_attention."""

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from clm_owt.model import cpu_attention
from clm_owt.model.cpu_attention import attention_forward, causal_attention

SCALE = 0.3


def random_inputs(m: int, H: int, T: int, h: int, dtype: torch.dtype, spread: float = 1.0) -> list[torch.Tensor]:
    """query, key and value as the model makes them, views of one tensor; queries and keys times `spread`."""
    fused = torch.randn(m, T, 3, H, h, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fused[:, :, :2] *= spread
    return [tensor.transpose(1, 2).requires_grad_() for tensor in fused.to(dtype).unbind(2)]


def with_gradients(attention, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    output = attention(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, weights)]


def usual(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE)


def own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return causal_attention(query, key, value, SCALE)


@pytest.mark.parametrize("T", [1, 7, 128, 300])
def test_in_float64_it_is_the_usual_attention(T, monkeypatch):
    monkeypatch.setattr(cpu_attention, "TILE_ELEMENTS", 2 * 128 * 300)  # of six heads two at a time, or all
    inputs = random_inputs(2, 3, T, 4, torch.float64)
    for actual, expected in zip(with_gradients(own, inputs), with_gradients(usual, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_its_gradient_is_that_of_its_value(monkeypatch):
    monkeypatch.setattr(cpu_attention, "_tile_rows", lambda length: 3)
    assert torch.autograd.gradcheck(own, random_inputs(1, 2, 8, 2, torch.float64))


@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_in_bf16_it_is_as_exact_as_the_usual_attention(spread):
    """Scores of up to 20 and more, with the spread of 5: rounded as they are they would be ten times as far off."""
    inputs = random_inputs(1, 4, 520, 16, torch.bfloat16, spread)
    exact = with_gradients(usual, [tensor.detach().double().requires_grad_() for tensor in inputs])
    results = zip(with_gradients(own, inputs), with_gradients(usual, inputs), exact, strict=True)
    for actual, other, expected in results:
        distances = [((tensor - expected).norm() / expected.norm()).item() for tensor in (actual, other)]
        assert actual.dtype == torch.bfloat16
        assert distances[0] < 1.5 * distances[1] + 2**-9, distances


def test_it_is_repeatable():
    inputs = random_inputs(2, 4, 300, 16, torch.bfloat16)
    assert all(map(torch.equal, with_gradients(own, inputs), with_gradients(own, inputs)))


def test_no_tensor_of_length_times_length_is_kept():
    inputs = random_inputs(1, 2, 512, 16, torch.bfloat16)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        own(*inputs)
    assert max(sizes) == inputs[0].numel()


@pytest.mark.parametrize("case", ["float32", "a mask", "one query"])
def test_what_it_is_not_for_is_computed_as_ever(case):
    query, key, value = random_inputs(2, 4, 40, 16, torch.float32 if case == "float32" else torch.bfloat16)
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril(-3).logical_or(torch.eye(40, dtype=torch.bool))
    query = query[:, :, -1:] if case == "one query" else query
    arguments = (None, query, key, value, mask if case == "a mask" else None)
    expected = sdpa_attention_forward(*arguments, scaling=SCALE)[0]
    assert torch.equal(attention_forward(*arguments, scaling=SCALE)[0], expected)


def test_the_layout_is_that_of_the_usual_attention():
    inputs = random_inputs(2, 4, 40, 16, torch.bfloat16)
    actual, expected = (f(None, *inputs, None)[0] for f in (attention_forward, sdpa_attention_forward))
    assert actual.is_contiguous() and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert not torch.equal(actual, expected)  # it was the own one
