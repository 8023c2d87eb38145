"""What fails without an error is named within 200 steps, and what goes well is not."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from support.runs import timeless_metrics

from clm_owt.recipe import Recipe
from clm_owt.state import TrainState
from clm_owt.training.silent_failure import SilentFailure, find_symptom, unigram_loss

RECIPE = Recipe(dataset_name="json", effective_batch_size=3, learning_rate=6e-4, warmup_steps=2000)

# The first 200 steps of runs of recipes/quickstart_adamw.yaml that ended well, with AdamW and Muon over six seeds, and
# with other rates, batches and penalties: every tenth loss and gradient norm, and the loss at the start.
HEALTHY = json.loads((Path(__file__).parent / "healthy_curves.json").read_text())
QUICKSTART_UNIGRAM = 6.69


def watch(losses, grad_norms=None, unigram: float = 7.6, state: TrainState | None = None) -> list[str]:
    """All that is said of a run with these losses, a step each."""
    state = state or TrainState()
    guard = SilentFailure(RECIPE, state.first_losses, state.first_grad_norms, state.symptoms)
    said = []
    for loss, norm in zip(losses, grad_norms or [1.0] * len(losses), strict=True):
        state.step += 1
        said.append(guard.watch(state.step, loss, norm, lambda: unigram))
    return [text for text in said if text]


def noisy(losses, size: float) -> list[float]:
    draw = random.Random(0)
    return [loss + draw.gauss(0, size) for loss in losses]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_run_that_went_well_is_not_spoken_of(name):
    """Each value stands for ten steps, whose mean is therefore noisier than the run's own."""
    curve = HEALTHY[name]
    losses, norms = ([value for value in curve[field] for _ in range(10)] for field in ("losses", "grad_norms"))
    losses[0] = curve["first"]
    assert watch(losses, norms, QUICKSTART_UNIGRAM) == []


def test_a_loss_that_falls_rises_and_hovers_is_named():
    """As in https://github.com/karpathy/nanoGPT/issues/303: up from step 20 on, and within 0.5 of 7.81 since."""
    falling = [10.95 - 0.19 * step for step in range(20)]
    losses = noisy(falling + [7.15 + min(0.06 * step, 0.66) for step in range(85)], 0.1)
    [said] = watch(losses)
    assert said.startswith("step 70: the training loss fell to 7.") and "rose, and stays at 7.7" in said
    assert "learning_rate 0.0006 too high" in said and "mixed_precision: no" in said


def test_a_loss_at_the_level_of_token_frequencies_is_named():
    """As in https://github.com/karpathy/nanoGPT/issues/411: with 3 sequences a step it stayed at 7.5."""
    losses = noisy([max(10.95 - 0.1 * step, 7.5) for step in range(200)], 0.3)
    [said] = watch(losses)
    assert int(said.split(":")[0].removeprefix("step ")) <= 120
    assert "has hovered at 7." in said and "a unigram model of the same tokens is at 7.60" in said
    assert "learns how frequent tokens are, and hardly more" in said
    assert "effective_batch_size 3 (for GPT-2 small the square-root rule gives 0.00018)" in said


def test_a_gradient_that_vanishes_is_named():
    losses = [max(10.95 - 0.1 * step, 6.0) for step in range(100)]
    [said] = watch(losses, [1.0] * 40 + [1e-4] * 60)
    assert said.startswith("step 60: the gradient norm has collapsed to 0.0001, from 1 in the first 20 steps")


def test_slow_learning_is_not_spoken_of():
    """Under a warm-up that has hardly begun, below the level of token frequencies, and after the first 200 steps."""
    assert watch([10.95 - 0.001 * step for step in range(200)]) == []
    assert watch(noisy([max(10.95 - 0.1 * step, 6.5) for step in range(200)], 0.1)) == []
    assert watch([10.95 - 0.02 * step for step in range(200)] + [7.5] * 200) == []


def test_each_kind_is_said_once_also_by_a_run_that_continues():
    losses = noisy([max(10.95 - 0.1 * step, 7.5) for step in range(200)], 0.1)
    state = TrainState()
    assert len(watch(losses[:120], state=state)) == 1
    restored = TrainState(**json.loads(json.dumps(asdict(state))))
    assert watch(losses[120:], state=restored) == []
    whole, cut = TrainState(), TrainState()
    said = watch(losses, state=whole)
    assert watch(losses[:50], state=cut) + watch(losses[50:], state=cut) == said and cut == whole


def test_a_step_that_is_not_finite_is_left_out():
    losses = [max(10.95 - 0.1 * step, 7.5) for step in range(200)]
    losses[90] = math.nan
    state = TrainState()
    assert len(watch(losses, state=state)) == 1
    assert len(state.first_losses) == 199


def test_the_unigram_is_asked_only_where_it_decides():
    def unasked() -> float:
        raise AssertionError

    assert find_symptom([10.95 - 0.02 * step for step in range(200)], [1.0] * 200, unasked) is None


def test_the_unigram_s_loss_is_the_entropy_of_the_counts():
    assert unigram_loss(np.array([[0, 0], [5, 1]])) == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize(
    ("seen", "options"),
    [
        ("rose, and stays at", "--learning_rate 1 --warmup_steps 60 --max_steps 80"),
        ("learns how frequent tokens are", "--learning_rate 0.3 --effective_batch_size 3 --max_steps 200"),
    ],
)
def test_a_real_run_that_learns_nothing_says_so_in_the_terminal_and_its_row(
    seen, options, warm, tiny_recipe, tmp_path
):
    """The two cases of nanoGPT's issues, small: a rate too high for its warm-up, and for a batch of 3."""
    argv = ["--recipe", str(tiny_recipe), "--eval_steps", "1000", "--sample_steps", "none", "--logging_steps", "1000"]
    job = warm.start("run_clm_owt:main", [*argv, *options.split()], cwd=tmp_path)
    assert job.wait() == 0, job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("warning: ")]
    [row] = [row for row in timeless_metrics(next((tmp_path / "runs").iterdir())) if "warning" in row]
    assert line == f"warning: {row['warning']}" and seen in line
    assert row["warning"].startswith(f"step {row['step']}: ") and row["step"] <= 200
