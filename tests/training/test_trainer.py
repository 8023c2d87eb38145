"""The gradient of a step, whatever its cut; and how often a step waits for the device."""

import dataclasses
import itertools
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from clm_owt.batch import cut
from clm_owt.model.gpt2 import build_model
from clm_owt.optimizers import OPTIMIZERS
from clm_owt.recipe import PENALTY_TYPES
from clm_owt.recipe_reader import load_recipe
from clm_owt.state import TrainState
from clm_owt.training.gradient_sum import GradientSum
from clm_owt.training.optim import OutlierGuard, build_schedule
from clm_owt.training.processes import Processes
from clm_owt.training.trainer import Trainer


class OneOfSeveral(Processes):
    """One of several processes that run one after the other."""

    def __init__(self, count: int, rank: int):
        self.count, self.rank, self.sharded, self._cpu_group = count, rank, False, None


class StepTrainer(Trainer):
    """What a trainer needs for the gradient of one step."""

    def __init__(self, recipe, model, blocks, processes: Processes, micro_batch: int):
        self.recipe, self.model, self.processes = recipe, model, processes
        array = blocks.numpy()
        self.blocks = SimpleNamespace(read=lambda start, stop: array[start:stop], wait_for=lambda stop: None)
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
        self.stop = SimpleNamespace(check=lambda: None, signum=None)
        self.state, self.gradient_sum = TrainState(micro_batch=micro_batch), GradientSum()


def gradient(model, recipe, blocks, processes: int, micro_batch: int) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a step by the trainer's own code, processes one after the other."""
    model.zero_grad()
    loss = 0.0
    for rank in range(processes):
        trainer = StepTrainer(recipe, model, blocks, OneOfSeveral(processes, rank), micro_batch)
        loss += trainer.accumulate_gradients()[0].item()
    return loss, torch.cat([p.grad.reshape(-1) for p in model.parameters()])


@pytest.fixture(scope="module")
def step():
    """A small model, the recipe of a step of 16 blocks, and its blocks [16, 32]."""
    argv = "--dataset_name python-docs --train_tokenizer_vocab_size 300 --block_size 32 --n_layer 2 --n_head 2 "
    argv += "--n_embd 32 --effective_batch_size 16 --learning_rate 1 --warmup_steps 0 --max_steps 1"
    recipe = load_recipe(argv.split())
    blocks = torch.randint(300, (16, 32), generator=torch.Generator().manual_seed(0))
    return build_model(recipe, 300, 0), recipe, blocks


@pytest.mark.parametrize("penalty", PENALTY_TYPES)
def test_the_gradient_of_any_cut_is_that_of_one_full_batch(step, penalty):
    model, recipe, blocks = step
    model.penalty_type, model.penalty_weight = penalty, 0.01
    output = model(input_ids=blocks, labels=blocks)
    model.zero_grad()
    output.loss.backward()
    full = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    for processes, micro_batch in itertools.product([1, 2, 3, 5], [16, 7, 5, 3, 1]):
        loss, got = gradient(model, recipe, blocks, processes, micro_batch)
        assert loss == pytest.approx(output.loss.item(), rel=1e-6)
        assert (got - full).norm() < 1e-6 * full.norm()


def test_weighting_by_micro_batches_instead_of_tokens_would_be_seen(step):
    """The mean over micro-batches of their means is off by far more than the tolerance above, where they differ."""
    model, recipe, blocks = step
    _, expected = gradient(model, recipe, blocks, 1, 16)
    pieces = cut(16, 1, 0, 5)
    model.zero_grad()
    for piece in pieces:
        part = blocks[piece.start : piece.stop]
        (model(input_ids=part, labels=part).loss / len(pieces)).backward()
    by_count = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert (by_count - expected).norm() > 1e-2 * expected.norm()


def test_a_micro_batch_of_weight_0_has_no_loss_and_no_gradient(step):
    model, _, blocks = step
    piece = cut(16, 3, 0, 5, equal_counts=True)[-1]
    assert piece.weight == 0
    model.zero_grad()
    part = blocks[piece.start : piece.stop]
    output = model(input_ids=part, labels=piece.labels(part), num_items_in_batch=16 * 31)
    output.loss.backward()
    assert [value.item() for value in output] == [0] * 5
    assert all(not p.grad.any() for p in model.parameters())


# By these the host waits for a device: to know a value, or a shape that depends on values, or to copy one there.
WAITING_CALLS = {"tolist", "cpu", "numpy", "__array__", "tensor"}
WAITING_OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2"}
ON_A_CPU_ALONE = ("losses.py", "backward")  # looks whether a factor is 1


class Waits(TorchDispatchMode):
    """Where in the package a host would wait for its device, as (file, function)."""

    def __init__(self):
        super().__init__()
        self.places: list[tuple[str, str]] = []
        self.calls = WaitingCalls(self.see)

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if func._opname in WAITING_OPERATIONS:
            self.see()
        return func(*args, **(kwargs or {}))

    def see(self) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/clm_owt/" in frame.filename]
        self.places.append((Path(frames[-1].filename).name, frames[-1].name))


class WaitingCalls(TorchFunctionMode):
    """Calls that no operation of the CPU's shows."""

    def __init__(self, see: Callable[[], None]):
        super().__init__()
        self.see = see

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        if getattr(func, "__name__", None) in WAITING_CALLS:
            self.see()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_scale", [None, 2.0**16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_waits_for_the_device_once(step, optimizer, loss_scale):
    _, recipe, blocks = step
    recipe = dataclasses.replace(recipe, optimizer=optimizer, skip_outliers=True)
    trainer = StepTrainer(recipe, build_model(recipe, 300, 0), blocks, OneOfSeveral(1, 0), micro_batch=5)
    trainer.optimizer = OPTIMIZERS[optimizer].build(trainer.model, recipe, None)
    trainer.schedule = build_schedule(trainer.optimizer, recipe.schedule(10))
    trainer.guard, trainer.state.loss_scale = OutlierGuard([], []), loss_scale
    trainer.train_step()
    with Waits() as waits, waits.calls:
        assert trainer.train_step().skipped is None
    assert waits.places.count(ON_A_CPU_ALONE) == 4  # a micro-batch each: these are seen
    assert [place for place in waits.places if place != ON_A_CPU_ALONE] == [("trainer.py", "train_step")]
