"""A run that leaves another one at a checkpoint, with a schedule and a length of its own."""

import json

import pytest
from support.runs import timeless_metrics
from support.watched_fixtures import watch_forked_runs, watched_run

from clm_owt.errors import InputError
from clm_owt.recipe_reader import load_recipe
from clm_owt.training.run_folder import find_existing_run

WSD = "--lr_schedule=wsd"
OPTIONS = ("--save_steps=5", "--sample_steps=5", "--sample_max_new_tokens=4", "--save_total_limit=9")


@pytest.fixture(scope="module")
def runs(warm, batch_recipe, tmp_path_factory):
    """A trunk of 20 steps, a branch of it after 10 that ends at 14, and the run of 14 steps; then a finished run that
    goes on."""
    home = tmp_path_factory.mktemp("branches")
    lengths = {"trunk": 20, "branch": 14, "straight": 14, "longer": 24}
    found = {name: home / name for name in lengths}
    start = {"branch": ("trunk", 10), "longer": ("straight", 14)}
    for name, folder in found.items():
        options = [*OPTIONS, f"--max_steps={lengths[name]}"]
        options += ["--lr_schedule=linear", "--learning_rate=5e-4"] if name == "longer" else [WSD]
        if name in start:
            other, step = start[name]
            options.append(f"--branch_from={found[other]}/checkpoints/step-{step:08d}")
        text = watch_forked_runs(warm, 1, [watched_run(batch_recipe, folder, *options)], home)
        assert ("Branching off after step" in text) == (name in start)
    return found


def test_a_branch_of_a_wsd_trunk_is_the_run_of_that_length(runs):
    """Bit for bit: rows, samples, weights, the optimizer's state."""
    assert timeless_metrics(runs["branch"]) == timeless_metrics(runs["straight"])
    for file in ("model/model.safetensors", "samples.md", "checkpoints/step-00000014/optimizer.safetensors"):
        assert (runs["branch"] / file).read_bytes() == (runs["straight"] / file).read_bytes()
    assert json.loads((runs["branch"] / "plan.json").read_text())["resumed_after"] == [10]


def test_the_trunk_stays_as_it_is(runs):
    assert [row["step"] for row in timeless_metrics(runs["trunk"]) if row["split"] == "train"] == list(range(1, 21))
    names = sorted(path.name for path in (runs["trunk"] / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (5, 10, 15, 20)]


def test_a_finished_run_goes_on_with_another_schedule(runs):
    rows = [row for row in timeless_metrics(runs["longer"]) if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[:14] == [row for row in timeless_metrics(runs["straight"]) if row["split"] == "train"]
    assert rows[14]["learning_rate"] == pytest.approx(5e-4 * (0.1 + 0.9 * (24 - 14) / (24 - 2)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--seed=7",), r"branch_from: trunk differs in seed: 42 -> 7; a branch may differ in rates, length, "),
        (("--optimizer=muon", "--n_layer=3"), r"differs in n_layer: 2 -> 3, optimizer: adamw -> muon; "),
        (("--effective_batch_size=8",), r"effective_batch_size: 16 -> 8"),
    ],
)
def test_what_a_checkpoint_holds_cannot_be_otherwise(options, reason, runs, batch_recipe, tmp_path):
    argv = ["--recipe", str(batch_recipe), WSD, "--output_dir", str(tmp_path / "run"), *options]
    argv.append(f"--branch_from={runs['trunk']}/checkpoints/step-00000010")
    with pytest.raises(InputError, match=reason):
        find_existing_run(load_recipe(argv))


def test_a_branch_that_would_be_over_is_refused(warm, runs, batch_recipe, tmp_path):
    point = runs["trunk"] / "checkpoints/step-00000010"
    run = watched_run(batch_recipe, tmp_path / "run", WSD, "--max_steps=10", f"--branch_from={point}")
    text = watch_forked_runs(warm, 1, [run], tmp_path, status=2)
    assert f"branch_from: {point} is after step 10, and the run would end after step 10" in text
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_no_branch_point(runs, batch_recipe, tmp_path):
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    argv = ["--recipe", str(batch_recipe), f"--branch_from={tmp_path}/checkpoints/step-00000010"]
    with pytest.raises(InputError, match=r"branch_from: .*complete.json is missing or unreadable; give a complete"):
        find_existing_run(load_recipe(argv))
