"""A launcher that starts the processes of a run again, after one of them was lost."""

import json
from pathlib import Path

import pytest
from support.restarted_runs import assert_same_run, restarting_launcher, started_in

KILLED_RUN = str(Path(__file__).parents[1] / "support/killed_run.py")

pytestmark = pytest.mark.xdist_group("restarts")


def run_of(home: Path, backend: str, rank: int, step: int, recipe: Path) -> Path:
    """The folder of a run, finished, of whose two processes that one was killed in that step."""
    command = restarting_launcher(1, backend, program=KILLED_RUN)
    with started_in(home, command, str(rank), str(step), "--recipe", str(recipe)) as job:
        assert job.process.wait(180) == 0, job.text
        assert f"Continuing after step {(step - 1) // 4 * 4}," in job.text
    return home / "runs/tiny"


def test_after_the_loss_of_a_process_the_run_goes_on_to_the_same_weights_with_static_and_c10d(tiny_recipe, tmp_path):
    """Neither had an undisturbed run to compare with; but what a restart lost would be another loss in each."""
    static = run_of(tmp_path / "static", "static", 1, 6, tiny_recipe)
    c10d = run_of(tmp_path / "c10d", "c10d", 0, 10, tiny_recipe)
    assert json.loads((static / "plan.json").read_text())["resumed_after"] == [4]
    assert json.loads((c10d / "plan.json").read_text())["resumed_after"] == [8]
    assert_same_run(static, c10d)
