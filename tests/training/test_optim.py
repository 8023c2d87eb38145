import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from clm_owt.recipe_reader import load_recipe
from clm_owt.schedule import Schedule
from clm_owt.training.optim import OutlierGuard, build_adamw, build_schedule

RECIPE = load_recipe(
    "--dataset_name python-docs --train_tokenizer_vocab_size 512 --effective_batch_size 8 --learning_rate 3e-3 "
    "--warmup_steps 2 --max_steps 10".split()
)
SCHEDULES = [(0, 10, 0.1), (1, 7, 0.0), (3, 40, 0.25), (20, 100, 1.0), (2000, 34_480, 0.1), (99, 100, 0.1)]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)


def rates(build, steps: int) -> list[float]:
    adamw = optimizer()
    schedule = build(adamw)
    values = []
    for _ in range(steps):
        values.append(adamw.param_groups[0]["lr"])
        adamw.step()
        schedule.step()
    return values


@pytest.mark.parametrize(("warmup", "total", "floor"), SCHEDULES)
def test_the_schedule_equals_transformers_cosine_with_a_floor_at_every_step(warmup, total, floor):
    ours = rates(lambda adamw: build_schedule(adamw, Schedule(warmup, total, floor)), total + 1)
    theirs = rates(
        lambda adamw: get_cosine_with_min_lr_schedule_with_warmup(adamw, warmup, total, min_lr_rate=floor), total + 1
    )
    assert ours == pytest.approx(theirs, rel=0, abs=1e-12)


@pytest.mark.parametrize(("warmup", "total"), [(warmup, total) for warmup, total, _ in SCHEDULES])
def test_with_a_floor_of_zero_it_is_transformers_cosine(warmup, total):
    ours = rates(lambda adamw: build_schedule(adamw, Schedule(warmup, total, 0.0)), total + 1)
    theirs = rates(lambda adamw: get_cosine_schedule_with_warmup(adamw, warmup, total), total + 1)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-12)


@pytest.mark.parametrize(("warmup", "total"), [(warmup, total) for warmup, total, _ in SCHEDULES])
def test_linear_with_a_floor_of_zero_is_transformers_linear(warmup, total):
    ours = rates(lambda adamw: build_schedule(adamw, Schedule(warmup, total, 0.0, "linear")), total + 1)
    theirs = rates(lambda adamw: get_linear_schedule_with_warmup(adamw, warmup, total), total + 1)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
@pytest.mark.parametrize(
    ("warmup", "total", "floor"), [(0, 10, 0.1), (3, 40, 0.0), (20, 200, 0.25), (2000, 34_480, 0.1)]
)
def test_after_its_warmup_wsd_is_transformers_wsd_at_every_step(warmup, total, floor, share):
    def theirs(adamw):
        decay = round(share * total)
        return get_wsd_schedule(
            adamw, warmup, decay, num_training_steps=total, min_lr_ratio=floor, decay_type="linear"
        )

    ours = rates(lambda adamw: build_schedule(adamw, Schedule(warmup, total, floor, "wsd", share)), total + 1)
    # Theirs begins its warm-up at the floor.
    assert ours[warmup:] == pytest.approx(rates(theirs, total + 1)[warmup:], rel=0, abs=1e-12)
    assert ours[:warmup] == pytest.approx([3e-3 * step / warmup for step in range(warmup)], rel=0, abs=1e-12)


def test_up_to_its_decay_wsd_does_not_depend_on_the_length():
    short, long = Schedule(5, 100, 0.0, "wsd", 0.2), Schedule(5, 1000, 0.0, "wsd", 0.4)
    assert short.decay_start == 80
    assert [short.factor(step) for step in range(81)] == [long.factor(step) for step in range(81)]
    assert short.factor(81) == pytest.approx(0.95)


def test_the_first_step_is_taken_at_rate_zero_and_the_peak_follows_the_warmup():
    values = rates(lambda adamw: build_schedule(adamw, Schedule(3, 10, 0.1)), 14)
    assert values[0] == 0.0
    assert values[3] == 3e-3
    assert values[10:] == pytest.approx([3e-4] * 4, rel=1e-15)  # the floor, and it does not rise again
    assert max(values) == 3e-3


@pytest.mark.parametrize("completed", [1, 2, 3, 7, 12])
def test_a_schedule_begun_in_the_middle_continues_as_the_whole_one(completed, recwarn):
    whole = rates(lambda adamw: build_schedule(adamw, Schedule(3, 10, 0.1)), 15)
    rest = rates(lambda adamw: build_schedule(adamw, Schedule(3, 10, 0.1), completed), 15 - completed)
    assert rest == whole[completed:]
    assert not recwarn


def test_only_matrices_and_embeddings_decay():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    decayed, plain = build_adamw(model, RECIPE).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 4), (3, 4)]
    assert [tuple(p.shape) for p in plain["params"]] == [(4,), (4,), (3,)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == (0.9, 0.95)
    assert decayed["fused"]


def test_frozen_parameters_are_not_optimised():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in build_adamw(model, RECIPE).param_groups] == [1, 0]


def test_outliers_are_told_only_by_a_full_window():
    losses, norms = [], []
    guard = OutlierGuard(losses, norms)
    for i in range(OutlierGuard.WINDOW - 1):
        assert not guard.is_outlier(3.0 + 0.01 * (i % 7), 1.0)
    assert not guard.is_outlier(50.0, 1.0)  # the one that fills the window
    losses[-1] = 3.0
    assert not guard.is_outlier(3.02, 1.0)
    assert guard.is_outlier(50.0, 1.0)
    assert not guard.is_outlier(3.0, 1.0)
    assert guard.is_outlier(3.0, 9.0)
    assert len(losses) == len(norms) == OutlierGuard.WINDOW
