"""The table of runs: those that go on, have ended, were killed, hang, or are of an older version."""

import errno
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import runs
from support.runs import ROOT

from clm_owt.errors import InputError
from clm_owt.reports.overview import LONGEST_PAUSE, SILENT_SECONDS, find_runs, standing_of
from clm_owt.run_state import NAME, RunState
from clm_owt.training.run_lock import run_lock


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "runs" / "owt"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    return folder


@pytest.fixture
def holder(folder):
    """The id of a process that holds the run's folder, until it is killed."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        with run_lock(folder):
            os.write(writing, b".")
            signal.alarm(60)  # should the test be cut short
            signal.pause()
    assert os.read(reading, 1) == b"."
    yield pid
    kill(pid)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def write_state(folder, **changes) -> None:
    now = time.time()
    state = RunState(
        "running", socket.gethostname(), os.getpid(), written_at=now, step=40, total_steps=100, loss=3.5,
        step_at=now, step_seconds=2.0,
    )  # fmt: skip
    (folder / NAME).write_text(json.dumps(asdict(state) | changes))


def test_a_run_that_goes_on_says_how_long_it_takes_yet(folder, holder):
    write_state(folder, pid=holder)
    standing = standing_of(folder)
    assert (standing.state, standing.step, standing.total_steps, standing.loss) == ("running", 40, 100, 3.5)
    assert standing.seconds_left == 120.0
    for state in ("saving", "waiting for data"):
        write_state(folder, pid=holder, state=state)
        assert standing_of(folder).state == state


def test_a_run_that_was_killed_is_dead(folder, holder):
    write_state(folder, pid=holder)
    kill(holder)
    standing = standing_of(folder)
    assert standing.state == "dead" and standing.seconds_left is None
    assert standing.remark == f"process {holder} on {socket.gethostname()} is gone; the same command continues"


def test_a_run_whose_process_number_is_that_of_another_process_is_dead(folder):
    write_state(folder, pid=os.getpid())
    assert standing_of(folder).state == "dead"


def test_a_run_that_has_taken_no_step_for_long_seems_to_hang(folder, holder):
    before = time.time() - LONGEST_PAUSE - 100.0
    write_state(folder, pid=holder, written_at=before, step_at=before)
    assert standing_of(folder).state == "hangs?"
    write_state(folder, pid=holder, written_at=before, step_at=before, step_seconds=60.0)  # with such steps it may not
    assert standing_of(folder).state == "running"


def test_a_run_on_another_machine_is_known_by_the_time_of_its_lock(folder):
    write_state(folder, host="node-7")
    assert standing_of(folder).state == "dead"
    (folder / ".lock").touch()
    assert standing_of(folder).state == "running"
    os.utime(folder / ".lock", (0, time.time() - SILENT_SECONDS - 10))
    assert standing_of(folder).state == "dead"


def test_a_run_that_has_ended_says_how(folder):
    write_state(folder, state="failed", error="ValueError: x\nand more", exit_status=1)
    standing = standing_of(folder)
    assert (standing.state, standing.remark, standing.seconds_left) == ("failed", "ValueError: x", None)


def test_a_run_of_an_older_version_is_told_by_its_other_files(folder, holder):
    assert (standing_of(folder).state, standing_of(folder).step) == ("starting", None)
    (folder / "plan.json").write_text(json.dumps({"total_steps": 100}))
    (folder / "metrics.jsonl").write_text('{"step": 30, "split": "train", "loss": 4.5}\n{"step": 40, "spl')
    standing = standing_of(folder)
    assert (standing.state, standing.step, standing.total_steps, standing.loss) == ("running", 30, 100, 4.5)
    assert time.time() - standing.last_sign_at < 60
    kill(holder)
    assert standing_of(folder).state == "stopped"
    (folder / "plan.json").write_text(json.dumps({"total_steps": 100, "finished": True}))
    assert standing_of(folder).state == "finished"


def test_all_runs_below_a_folder_are_found_and_one_that_is_no_run_is_passed_over(folder, tmp_path, capsys):
    (folder.parent / "sweep" / "a").mkdir(parents=True)
    (folder.parent / "sweep" / "a" / "recipe.yaml").touch()
    (folder.parent / "empty").mkdir()
    (folder.parent / "empty" / "back").symlink_to(folder.parent)
    write_state(folder, state="finished")
    assert list(find_runs(folder.parent)) == [folder, folder.parent / "sweep" / "a"]
    assert runs.main([str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "of", "loss", "left", "last", "sign", "of", "life"]
    assert lines[1].split()[1:6] == ["finished", "40", "100", "3.5000", "-"] and lines[1].endswith("s ago")
    assert lines[2].split()[1] == "dead"
    assert runs.main(["--json", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "finished"
    with pytest.raises(InputError, match="there is no folder"):
        runs.main([str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({NAME: "{"}, "run_state.json: JSONDecodeError"),
        ({NAME: None}, "run_state.json: IsADirectoryError"),
        ({"plan.json": "{}"}, "plan.json has no 'total_steps'"),
        ({"metrics.jsonl": "{]\n"}, "metrics.jsonl"),
        ({"metrics.jsonl": '{"step": 3}\n'}, "metrics.jsonl"),
        ({"metrics.jsonl": '{"step": "x", "split": "train", "loss": 4.5}\n'}, "metrics.jsonl"),
    ],
)
def test_a_damaged_run_is_a_row_that_says_so_among_the_others(folder, capsys, files, reason):
    for name, content in ({"plan.json": '{"total_steps": 9}'} | files).items():
        (folder / name).mkdir() if content is None else (folder / name).write_text(content)
    other = folder.parent / "whole"
    other.mkdir()
    write_state(other, state="failed", error="text_column: 'text' is missing")  # before it had a recipe.yaml
    assert runs.main([str(folder.parent)]) == 0
    _, damaged, whole = capsys.readouterr().out.splitlines()
    assert damaged.split()[1] == "unreadable" and reason in damaged
    assert whole.split()[1] == "failed" and "text_column" in whole


def test_a_folder_that_may_not_be_read_is_a_row_as_well(folder, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (folder / "recipe.yaml").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)  # who runs the tests may read everything
    monkeypatch.setattr(pathlib.Path, "read_text", refuse)
    assert list(find_runs(folder.parent)) == [folder]
    assert standing_of(folder).state == "unreadable" and "Permission denied" in standing_of(folder).remark


def test_a_job_whose_folder_holds_another_run_is_not_queued_again(folder, tiny_recipe):
    (folder / "recipe.yaml").write_text("learning_rate: 0.5\n")
    (folder / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="holds another run"):
        runs.main(["--requeue", "5", "--recipe", str(tiny_recipe), "--output_dir", str(folder)])


@pytest.mark.parametrize(
    ("changes", "failures_left", "status", "line"),
    [
        ({"state": "stopped", "error": "stopped by stop_after 1h", "final": True}, 0, 0, "goes on in another job"),
        ({"state": "failed", "error": "ValueError: x"}, 1, 0, "goes on in another job"),
        ({"state": "failed", "error": "ValueError: x"}, 0, 1, "it has failed as often as allowed"),
        ({"state": "failed", "error": "RunFailed: x", "final": True}, 5, 1, "not queued again: RunFailed: x"),
        ({"state": "finished"}, 5, 1, "there is nothing left to do"),
        ({}, 5, 0, "goes on in another job"),  # it was killed
        (None, 1, 0, "goes on in another job"),  # before it began
    ],
)
def test_a_job_is_queued_again_where_its_run_can_get_on(
    folder, tiny_recipe, capsys, changes, failures_left, status, line
):
    if changes is not None:
        write_state(folder, **changes)
    options = ["--recipe", str(tiny_recipe), "--output_dir", str(folder)]
    assert runs.main(["--requeue", str(failures_left), *options]) == status
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("number", ["--5", "²", "few"])
def test_a_number_of_failures_that_is_none_is_refused_in_a_line(number, capsys):
    with pytest.raises(SystemExit) as leaving:
        runs.main(["--requeue", number, "--recipe", "x.yaml"])
    assert leaving.value.code == 2 and "--requeue: expected a number" in capsys.readouterr().err


def test_the_table_needs_no_torch():
    code = "import sys, runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts").returncode == 0
