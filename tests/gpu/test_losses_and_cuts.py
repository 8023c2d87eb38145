"""Loss and gradient on this machine against float64: at GPT-2 small's size on a GPU, at a tiny one on a CPU.

A bound in bf16 (or fp16) cannot be a number of digits, since rounding grows through the layers. So the yardstick is
the same model in plain PyTorch in the same precision: what is fused and compiled may be no further from float64 than
1.5 times what that is; a statistic, in which roundings cancel by chance, may also be off by one rounding. In float32,
without TF32, the bounds are 1e-5 for statistics and 1e-4 for gradients.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
from support.gpu_table import Machine

from clm_owt.model.gpt2 import GPT2ForPretraining, build_model, compile_blocks
from clm_owt.model.losses import LossStatistics, reference_linear_loss
from clm_owt.recipe import PENALTY_TYPES, Recipe
from clm_owt.training.device_memory import release_cached_memory

PENALTY = ("neg_entropy", 0.1)
BLOCKS = 4
FARTHER = 1.5  # times as far from float64 as plain PyTorch
STATISTICS_BOUND, GRADIENT_BOUND = 1e-5, 1e-4  # in float32, relative

SMALL = Recipe(dataset_name="x", effective_batch_size=BLOCKS, learning_rate=1e-3, warmup_steps=0)
TINY = dataclasses.replace(SMALL, n_layer=2, n_head=2, n_embd=64, block_size=64)


def plain_loss(*inputs, round_logits, **settings):
    """The reference, which rounds nothing that its products do not."""
    return reference_linear_loss(*inputs, **settings)


@dataclasses.dataclass
class Sums:
    """Statistics and gradients of BLOCKS blocks, by name of the parameter."""

    statistics: dict[str, float]
    gradients: dict[str, torch.Tensor]

    def distance(self, exact: "Sums") -> tuple[float, float]:
        """Relative: the largest of the statistics, and of the whole gradient in norm."""
        statistics = max(
            abs(value - exact.statistics[name]) / abs(exact.statistics[name])
            for name, value in self.statistics.items()
        )
        pairs = [(self.gradients[name].double(), exact.gradients[name].double()) for name in exact.gradients]
        difference = sum((a - b).square().sum() for a, b in pairs).sqrt()
        return statistics, (difference / sum(b.square().sum() for _, b in pairs).sqrt()).item()


class Bench:
    """The model, its blocks, and their exact sums."""

    def __init__(self, machine: Machine):
        self.machine = machine
        recipe, vocab_size = (TINY, 211) if machine.dry_run else (SMALL, 50_257)
        self.model = build_model(recipe, vocab_size, eos_token_id=0)
        self.model.penalty_type, self.model.penalty_weight = PENALTY
        with torch.no_grad():
            self.model.transformer.wte.weight.mul_(4)  # predictions of some sharpness, as later in training
        self.model.to(machine.device)
        shape = (BLOCKS, recipe.block_size)
        self.blocks = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1)).to(machine.device)
        exact = copy.deepcopy(self.model).double()
        exact.linear_loss = plain_loss
        self.exact = self.sums(exact, "no", 1)

    def ours(self) -> GPT2ForPretraining:
        """As a run on this machine has it."""
        torch._dynamo.reset()
        model = copy.deepcopy(self.model)
        compile_blocks(model, "auto", self.machine.device)
        return model

    @functools.cached_property
    def plain_distance(self) -> tuple[float, float]:
        """Of plain PyTorch in the machine's precision from float64; of the statistics at least one rounding."""
        model = copy.deepcopy(self.model)
        model.linear_loss = plain_loss
        statistics, gradient = self.sums(model, self.machine.precision, 2).distance(self.exact)
        return max(statistics, torch.finfo(self.machine.dtype).eps / 2), gradient

    def sums(self, model: GPT2ForPretraining, precision: str, micro_batch: int) -> Sums:
        """In micro-batches of that size, the last smaller. In fp16, which has no small numbers, the loss is scaled."""
        scale = 2.0**12 if precision == "fp16" else 1.0
        dtype = self.machine.dtype if precision != "no" else None
        predicted = self.blocks[:, 1:].numel()
        totals = 0
        for piece in self.blocks.split(micro_batch):
            with torch.autocast(self.machine.device.type, dtype, enabled=dtype is not None):
                output = model(input_ids=piece, labels=piece, num_items_in_batch=predicted)
            (output.loss * scale).backward()
            totals = totals + torch.stack([value.detach().double() for value in output])
        gradients = {name: p.grad / scale for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return Sums(dict(zip(LossStatistics._fields, totals.tolist(), strict=True)), gradients)


@pytest.fixture(scope="module")
def bench(machine) -> Iterator[Bench]:
    yield Bench(machine)
    release_cached_memory()  # what comes next are processes of their own


@pytest.fixture
def without_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_loss_and_gradient_in_float32(bench, without_tf32, finding):
    """Loss, statistics and gradient in float32 without TF32, against float64."""
    statistics, gradient = bench.sums(bench.ours(), "no", 2).distance(bench.exact)
    finding(f"statistics {statistics:.1e}", f"{STATISTICS_BOUND:g} relative")
    finding(f"gradient {gradient:.1e}", f"{GRADIENT_BOUND:g} of its norm")
    assert statistics < STATISTICS_BOUND and gradient < GRADIENT_BOUND


def test_loss_and_gradient_in_the_machines_precision(bench, machine, finding):
    """Loss, statistics and gradient in the machine's precision, against float64."""
    statistics, gradient = bench.sums(bench.ours(), machine.precision, 2).distance(bench.exact)
    bounds = [FARTHER * distance for distance in bench.plain_distance]
    finding(f"statistics {statistics:.1e}", f"{bounds[0]:.1e}, {FARTHER:g} × plain PyTorch")
    finding(f"gradient {gradient:.1e}", f"{bounds[1]:.1e}, likewise")
    assert statistics <= bounds[0] and gradient <= bounds[1]


def test_the_cut_does_not_change_the_step(bench, machine, finding):
    """The same blocks cut into other micro-batches, in the machine's precision.

    The gradient of a matrix is rounded in each micro-batch, and a product may add up in another order at another size.
    That is a part of what separates this precision from float64; so two cuts may be no further apart than that.
    """
    model = bench.ours()
    halves, uneven = (bench.sums(model, machine.precision, size) for size in (2, 3))
    statistics, gradient = uneven.distance(halves)
    bounds = bench.plain_distance
    finding(f"statistics {statistics:.1e}", f"{bounds[0]:.1e}, of plain PyTorch from float64")
    finding(f"gradient {gradient:.1e}", f"{bounds[1]:.1e}, likewise")
    assert statistics <= bounds[0] and gradient <= bounds[1]


def test_the_loss_of_every_penalty(bench, machine, without_tf32, finding):
    """Head and loss with every penalty, in several chunks, in float32 against float64."""
    ours = functools.partial(bench.ours().linear_loss, chunk_rows=256)
    weight = bench.model.transformer.wte.weight.detach()
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(600, weight.shape[1], generator=generator).to(machine.device)
    targets = torch.randint(len(weight), (600,), generator=generator).to(machine.device)
    targets[::50] = -100
    for penalty in PENALTY_TYPES:
        results = []
        for loss, dtype in ((ours, torch.float32), (reference_linear_loss, torch.float64)):
            inputs = [tensor.to(dtype).requires_grad_() for tensor in (hidden.clone(), weight.clone())]
            output = loss(*inputs, targets, num_items=588, penalty_type=penalty, penalty_weight=0.1)
            output.loss.backward()
            values = dict(zip(LossStatistics._fields, torch.stack([*output]).tolist(), strict=True))
            results.append(Sums(values, {"hidden": inputs[0].grad, "weight": inputs[1].grad}))
        statistics, gradient = results[0].distance(results[1])
        finding(
            f"{penalty}: statistics {statistics:.1e}, gradient {gradient:.1e}",
            f"{STATISTICS_BOUND:g}, {GRADIENT_BOUND:g}",
        )
        assert statistics < STATISTICS_BOUND and gradient < GRADIENT_BOUND
