"""float16 with a dynamic loss scale: real runs of the main job on a CPU, whose autocast knows it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from support.runs import timeless_metrics
from support.watched_fixtures import (
    STEP_COLLECTIVES,
    Record,
    assert_same_blocks,
    relative,
    watch_forked_runs,
    watched_run,
)

from clm_owt.errors import RunFailed
from clm_owt.model.gpt2 import build_model
from clm_owt.model.losses import LossStatistics
from clm_owt.recipe_reader import load_recipe
from clm_owt.state import TrainState
from clm_owt.training.optim import FIRST_LOSS_SCALE, STEPS_BEFORE_GROWTH, next_loss_scale
from clm_owt.training.trainer import StepResult, Trainer

pytestmark = pytest.mark.xdist_group("float16")
OPTIONS = ("--penalty_weight=0.01", "--auto_batch_size=false", "--save_steps=5", "--eval_steps=20")
OVERFLOW = 7  # the step whose gradient overflows, on the last process
KILLED = 13  # the step in which all processes are killed; the last checkpoint is of step 10


@pytest.fixture(scope="module")
def records(warm, batch_recipe, tmp_path_factory) -> dict[str, Record]:
    """16 blocks on one process, on two, on two that are killed and continued, and on two that share the parameters."""
    home = tmp_path_factory.mktemp("float16")
    found = {
        name: Record(home / "records" / name, home / "runs" / name) for name in ("one", "two", "killed", "sharded")
    }

    def make(name: str, micro_batch: int, processes: int, *errors: dict, **spec: object) -> dict:
        errors = [*errors, {"rank": processes - 1, "at": f"loss scale of {OVERFLOW}", "kind": "overflow"}]
        options = (*OPTIONS, f"--max_batch_size={micro_batch}")
        record = str(found[name].folder)
        run = watched_run(batch_recipe, found[name].output, *options, errors=errors, record=record, **spec)
        return run | {"mixed_precision": "fp16"}

    kills = [{"rank": rank, "at": KILLED, "kind": "kill"} for rank in range(2)]
    watch_forked_runs(warm, 1, [make("one", 16, 1)], home)
    watch_forked_runs(warm, 2, [make("killed", 3, 2, *kills)], home, status=-9)
    two = [make("two", 3, 2), make("killed", 3, 2), make("sharded", 3, 2, sharded=True)]
    assert watch_forked_runs(warm, 2, two, home).count("Continuing after step 10") == 1
    return found


@pytest.mark.parametrize("name", ["one", "two", "sharded"])
def test_a_step_that_overflows_is_left_out_by_all_processes_and_halves_the_scale(records, name):
    rows = records[name].rows("train")
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {OVERFLOW: "overflow"}
    scales = {row["step"]: row["loss_scale"] for row in rows}
    assert scales == {step: FIRST_LOSS_SCALE / (1 if step <= OVERFLOW else 2) for step in range(1, 21)}
    (row,) = [row for row in rows if row["step"] == OVERFLOW]
    assert math.isfinite(row["loss"]) and not math.isfinite(row["grad_norm"])
    assert len(row["block_ids"]) == 16
    assert all(row["grad_norm"] < 10 for row in rows if row["step"] != OVERFLOW)  # without the scale


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_the_losses_under_float16_are_those_of_any_cut(records, name):
    """To what products of 11 bits leave of them, and of 20 steps."""
    for a, b in zip(records[name].rows("train"), records["one"].rows("train"), strict=True):
        assert relative(a["loss"], b["loss"]) < 1e-4
    assert_same_blocks(records[name], records["one"])


def test_a_step_sums_its_gradients_in_buckets_beside_which_there_are_two_collectives(records):
    """One bucket here; test_gradient_sum.py counts those of GPT-2 small. The others are the agreement and the sum of
    the statistics."""
    assert records["one"].collectives["calls"] == {}
    assert records["two"].collectives["calls"] == {"allreduce_": 1 + STEP_COLLECTIVES}


def test_a_killed_run_continues_with_its_scale_bit_for_bit(records):
    killed, two = records["killed"].output, records["two"].output
    assert timeless_metrics(killed) == timeless_metrics(two)
    weights = "model/model.safetensors"
    assert (killed / weights).read_bytes() == (two / weights).read_bytes()
    state = json.loads((killed / "checkpoints/step-00000020/state.json").read_text())
    assert (state["loss_scale"], state["steps_at_loss_scale"]) == (FIRST_LOSS_SCALE / 2, 20 - OVERFLOW)


def test_the_scale_keeps_gradients_that_float16_alone_would_lose():
    """Of a loss divided by the tokens of a usual step, 2^19, against those in float32."""
    argv = "--dataset_name python-docs --train_tokenizer_vocab_size 300 --block_size 32 --n_layer 2 --n_head 2 "
    argv += "--n_embd 32 --effective_batch_size 16 --learning_rate 1 --warmup_steps 0 --max_steps 1"
    model = build_model(load_recipe(argv.split()), 300, 0)
    blocks = torch.randint(300, (16, 32), generator=torch.Generator().manual_seed(0))

    def gradient(scale: float, float16: bool) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=float16):
            loss = model(input_ids=blocks, labels=blocks, num_items_in_batch=2**19).loss
        loss.backward(torch.full_like(loss, scale))
        return torch.cat([p.grad.reshape(-1) for p in model.transformer.h.parameters()]) / scale

    exact = gradient(1.0, float16=False)
    errors = [(gradient(scale, float16=True) - exact).norm() / exact.norm() for scale in (1.0, FIRST_LOSS_SCALE)]
    assert errors[0] > 0.05
    assert errors[1] < 2e-3


def test_at_the_least_scale_an_overflow_is_one_of_the_steps_that_end_a_run():
    trainer = object.__new__(Trainer)
    trainer.state, trainer.guard, trainer.tokens_per_step = TrainState(loss_scale=2.0, not_finite_in_a_row=1), None, 0
    trainer.recipe = SimpleNamespace(effective_batch_size=0, learning_rate=1e-3)
    seen = []
    with pytest.raises(RunFailed):
        while len(seen) < 10:
            seen.append(trainer.why_to_skip(5.0, math.inf))
            result = StepResult(LossStatistics(*[5.0] * 5), math.inf, 1e-3, trainer.state.loss_scale, seen[-1])
            trainer.advance(result)
            trainer.check_skipped(result)
    assert seen == ["overflow", "not finite", "not finite"]  # and the one before
    assert trainer.why_to_skip(math.nan, math.nan) == "not finite"


def test_the_scale_moves_as_that_of_torchs_own_scaler():
    scale, tracker = torch.tensor([FIRST_LOSS_SCALE]), torch.zeros(1, dtype=torch.int32)
    expected = torch.amp.GradScaler("cpu")
    assert (expected._init_scale, expected._growth_interval) == (FIRST_LOSS_SCALE, STEPS_BEFORE_GROWTH)
    own, steps = FIRST_LOSS_SCALE, 0
    for step in range(3 * STEPS_BEFORE_GROWTH):
        overflowed = step in (3, 4, 2500)
        torch._amp_update_scale_(scale, tracker, torch.tensor([float(overflowed)]), 2.0, 0.5, STEPS_BEFORE_GROWTH)
        own, steps = next_loss_scale(own, steps, overflowed)
        assert (own, steps) == (scale.item(), tracker.item())


def test_the_scale_does_not_fall_below_one():
    assert next_loss_scale(1.0, 5, overflowed=True) == (1.0, 0)
