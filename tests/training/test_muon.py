"""Muon against torch's own, and against itself on other layouts."""

import dataclasses
import itertools

import pytest
import torch

from clm_owt.model.fp8 import conv1d_to_linear, transpose_linear_weights
from clm_owt.model.gpt2 import build_model
from clm_owt.recipe_reader import load_recipe
from clm_owt.training import muon
from clm_owt.training.optim import build_adamw, build_muon

RECIPE = load_recipe(
    "--dataset_name python-docs --train_tokenizer_vocab_size 300 --block_size 16 --n_layer 2 --n_head 2 --n_embd 32 "
    "--effective_batch_size 8 --learning_rate 3e-3 --warmup_steps 2 --max_steps 10 --optimizer muon "
    "--embedding_learning_rate 1e-3".split()
)


def gpt2():
    return build_model(RECIPE, 300, 0)


def give_gradients(model, seed: int) -> None:
    """The same for the same seed, whatever the layout of the model."""
    generator = torch.Generator().manual_seed(seed)
    names = {name: p.shape for name, p in gpt2().named_parameters()}
    gradients = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    gradients = transpose_linear_weights(model, gradients)
    for name, p in model.named_parameters():
        p.grad = gradients[name]


def after_steps(model, optimizer, steps: int = 3) -> dict[str, torch.Tensor]:
    for seed in range(steps):
        give_gradients(model, seed)
        optimizer.step()
    return transpose_linear_weights(model, {name: p.detach().clone() for name, p in model.named_parameters()})


def matrices(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What Muon takes of a parameter in GPT-2's layout: Q, K and V apart."""
    return tensor.chunk(3, dim=1) if "c_attn" in name else (tensor,)


@pytest.mark.parametrize(("products", "tolerance"), [(torch.float32, 0.02), (torch.bfloat16, 1e-3)])
def test_each_matrix_moves_as_with_torch_muon_whose_products_are_in_bf16(products, tolerance):
    model = gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    optimizer = build_muon(model, RECIPE)
    optimizer.product_type = products
    ours = after_steps(model, optimizer)

    theirs = {name: [torch.nn.Parameter(m.clone()) for m in matrices(name, p)] for name, p in before.items()}
    optimizer = torch.optim.Muon(itertools.chain(*theirs.values()), lr=3e-3, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        give_gradients(model, seed)
        for name, parts in theirs.items():
            for part, gradient in zip(parts, matrices(name, model.get_parameter(name).grad), strict=True):
                part.grad = gradient.contiguous()
        optimizer.step()
    for name, parts in theirs.items():
        for part, ours_part, start in zip(
            parts, matrices(name, ours[name]), matrices(name, before[name]), strict=True
        ):
            expected = part.detach() - start
            assert (ours_part - start - expected).norm() < tolerance * expected.norm(), name


def test_products_are_in_bf16_on_a_cpu_where_those_of_the_run_are():
    cpu = torch.device("cpu")
    assert muon.product_type(cpu, "bf16") == torch.bfloat16
    assert muon.product_type(cpu, "no") == build_muon(gpt2(), RECIPE).product_type == torch.float32


def test_every_other_parameter_moves_as_with_adamw_at_its_own_rate():
    ours, theirs = gpt2(), gpt2()
    adamw = build_adamw(theirs, dataclasses.replace(RECIPE, learning_rate=1e-3))
    moved, expected = after_steps(ours, build_muon(ours, RECIPE)), after_steps(theirs, adamw)
    others = [name for name in moved if moved[name].dim() < 2 or name.endswith(("wte.weight", "wpe.weight"))]
    assert len(others) == 2 + 2 * 8 + 2
    assert all(torch.equal(moved[name], expected[name]) for name in others)


def test_the_layout_in_memory_does_not_matter():
    """FP8's layers hold the transposed matrices."""
    usual, turned = gpt2(), gpt2()
    conv1d_to_linear(turned)
    moved, expected = after_steps(turned, build_muon(turned, RECIPE)), after_steps(usual, build_muon(usual, RECIPE))
    for name, value in expected.items():
        assert (moved[name] - value).norm() <= 1e-6 * value.norm(), name


def test_chunks_change_nothing(monkeypatch):
    whole = gpt2()
    expected = after_steps(whole, build_muon(whole, RECIPE))
    monkeypatch.setattr(muon, "CHUNK_ELEMENTS", 1)
    apart = gpt2()
    for name, value in after_steps(apart, build_muon(apart, RECIPE)).items():
        assert (value - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.mark.parametrize("shape", [(24, 24), (16, 64)])
def test_the_singular_values_come_out_about_one_and_the_vectors_stay(shape):
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ muon.orthogonalize(matrix) @ v.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-12
    assert values.min() > 0.3 and values.max() < 1.3


def test_an_update_has_the_size_of_adamws():
    """0.2 in the root mean square, for each shape; the rate is 1 here, and there is no decay."""
    recipe = dataclasses.replace(RECIPE, learning_rate=1.0, weight_decay=0.0)
    model = gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = after_steps(model, build_muon(model, recipe), steps=1)
    for name, start in before.items():
        if ".h." in name and start.dim() == 2:
            assert (after[name] - start).square().mean().sqrt() == pytest.approx(0.2, rel=0.2), name


def test_a_schedule_sets_the_rates_of_both_and_frozen_parameters_stay():
    model = gpt2()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    optimizer = build_muon(model, RECIPE)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 1e-3, 1e-3]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in after_steps(model, optimizer).items())
    assert model.transformer.h[0].mlp.c_fc.weight not in optimizer.state
