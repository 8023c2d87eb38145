"""run_state.json: what a run says of itself, how its sessions end, and when another try of the launcher is none."""

import json
import os
import re
import signal
import socket
import time
from dataclasses import asdict

import psutil
import pytest

from clm_owt import run_state
from clm_owt.errors import InputError, RunFailed
from clm_owt.run_state import NAME, RunReport, RunState, Session, launcher_name, leave_if_ended_for_good
from clm_owt.stopping import Stopped, StopRequest

pytestmark = pytest.mark.usefixtures("handlers_as_before")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    return tmp_path


def session(
    folder, error: BaseException | None = None, step: int = 7, is_main: bool = True, of: Session | None = None
) -> RunState:
    """A session that takes one step, and ends with that error; gives what it leaves."""
    try:
        with RunReport(folder, is_main, StopRequest(), of or Session()) as report:
            report.begin(step - 1, 20)
            report.at_step(step, 2.5)
            if error is not None:
                raise error
            report.finish()
    except BaseException as raised:
        assert raised is error
    return RunState.read(folder)


def test_a_session_that_comes_to_its_end_is_finished(folder):
    state = session(folder)
    assert (state.state, state.step, state.total_steps, state.loss, state.exit_status) == ("finished", 7, 20, 2.5, 0)
    assert state.pid == os.getpid() and time.time() - state.step_at < 10
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", NAME]


@pytest.mark.parametrize(
    ("error", "state", "line", "status", "final"),
    [
        (Stopped(signal.SIGTERM), "stopped", "stopped by SIGTERM", 143, False),
        (Stopped(signal.SIGUSR1), "stopped", "stopped by SIGUSR1", 138, True),
        (InputError("text_column: 'body' is missing"), "failed", "text_column: 'body' is missing", 2, True),
        (RunFailed("not finite for 3 steps", final=True), "failed", "RunFailed: not finite for 3 steps", 1, True),
        (RunFailed("disk full"), "failed", "RunFailed: disk full", 1, False),
        (ValueError("of an index"), "failed", "ValueError: of an index", 1, False),
    ],
)
def test_how_a_session_ended_and_whether_another_try_would_end_likewise(folder, error, state, line, status, final):
    found = session(folder, error)
    assert (found.state, found.error, found.exit_status, found.final) == (state, line, status, final)


def test_the_same_failure_at_the_same_step_twice_is_final_and_another_one_is_not(folder):
    assert not session(folder, ValueError("a"), step=3).final
    assert not session(folder, ValueError("a"), step=4).final
    assert not session(folder, ValueError("b"), step=4).final
    again = session(folder, ValueError("b"), step=4)
    assert again.final and again.error == "ValueError: b (at the same step as in the session before)"
    assert not session(folder, Stopped(signal.SIGTERM), step=4).final


def test_the_process_that_failed_first_says_why(folder):
    """Another one loses its connection to it, or is told to stop; nor does it go on to report steps."""
    of = Session()
    with RunReport(folder, True, StopRequest(), of) as main:
        main.begin(0, 20)
        assert session(folder, ValueError("of rank 1"), is_main=False, of=of).error == "ValueError: of rank 1"
        main._written = (0.0, "")  # as if five seconds had passed
        main.at_step(8, 1.0)
    with pytest.raises(Stopped), main:
        raise Stopped(signal.SIGTERM)
    assert RunState.read(folder).error == "ValueError: of rank 1"


def test_a_process_that_is_not_the_main_one_writes_of_failures_alone(folder):
    assert session(folder, Stopped(signal.SIGTERM), is_main=False) is None
    assert session(folder, SystemExit(2), is_main=False) is None


def test_a_lost_connection_is_a_stop_where_the_launcher_stops_the_others(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop = StopRequest()
    with pytest.raises(Stopped), stop.listening(), RunReport(folder, True, stop, Session()), stop.between_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")
    assert RunState.read(folder).error == "stopped by SIGTERM"


def test_steps_are_written_every_few_seconds_and_another_state_at_once(folder, monkeypatch):
    with RunReport(folder, True, StopRequest(), Session()) as report:
        report.begin(0, 20)
        for step in range(1, 6):
            report.at_step(step, 1.0)
        assert RunState.read(folder).step == 0
        monkeypatch.setattr(run_state, "WRITING_SECONDS", 0.0)
        report.at_step(6, float("nan"))
        state = RunState.read(folder)
        assert state.step == 6 and state.loss is None and state.step_seconds < 1
        json.loads((folder / NAME).read_text(), parse_constant=pytest.fail)
        monkeypatch.undo()
        with report.saving():
            assert RunState.read(folder).state == "saving"
        report.waiting_for_data()
        assert RunState.read(folder).state == "waiting for data"
        report.at_step(7, 1.0)
        assert RunState.read(folder).state == "running"


def test_a_folder_without_a_run_and_one_that_cannot_be_written_to_are_left_alone(tmp_path):
    assert session(tmp_path, InputError("x")) is None
    assert list(tmp_path.iterdir()) == []
    assert session(tmp_path / "gone", ValueError("x")) is None
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / NAME).mkdir()  # in the place of the file
    assert session(tmp_path) is None
    RunReport(None, True, StopRequest(), Session()).waiting_for_data()


WHOLE = asdict(RunState("running", "", 0))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"state": "running"}', "[" * 100_000]
    + [
        json.dumps(WHOLE | changes)
        for changes in (
            {"state": "x"}, {"state": []}, {"step": "x"}, {"step": -1}, {"total_steps": 1.5}, {"loss": "x"},
            {"loss": float("nan")}, {"written_at": "x"}, {"written_at": 1e300}, {"error": 5}, {"pid": "x"},
            {"pid": 10**30}, {"exit_status": 256}, {"final": 1}, {"launchers": "x"},
        )
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_nothing_and_why(folder, content):
    (folder / NAME).write_text(content)
    assert RunState.read(folder) is None
    with pytest.raises(InputError, match=re.escape(str(folder / NAME))):
        RunState.read_or_refuse(folder)


@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_a_session_writes_its_own_state_whatever_clock_the_one_before_had(folder, hours):
    """As after a clock was set, or on another machine whose clock is ahead."""
    before = session(folder, ValueError("a"), step=3)
    (folder / NAME).write_text(json.dumps(asdict(before) | {"written_at": time.time() + hours * 3600}))
    with RunReport(folder, True, StopRequest(), Session()) as report:
        report.begin(3, 20)
        assert RunState.read(folder).state == "running"
        report.finish()
    assert RunState.read(folder).state == "finished"


def test_a_restart_leaves_at_once_where_the_same_launcher_has_seen_the_run_end_for_good(folder, capsys):
    of = Session(launchers=["a:7:12.50", "b:9:3.25"])  # of two machines
    ended = session(folder, RunFailed("not finite", final=True), of=of)
    for launcher in of.launchers:
        with pytest.raises(SystemExit) as left:
            leave_if_ended_for_good(folder, launcher)
        assert left.value.code == 1
        assert capsys.readouterr().err == "Not started again: RunFailed: not finite, after step 7\n"
    later = asdict(ended) | {"written_at": time.time() + 3600}
    older = {name: value for name, value in later.items() if name not in ("session", "launchers")}
    for content in (later, older):
        (folder / NAME).write_text(json.dumps(content))
        leave_if_ended_for_good(folder, "a:7:99.00")  # the command given anew
        leave_if_ended_for_good(folder, None)  # without a launcher
    session(folder, Stopped(signal.SIGTERM), of=of)
    leave_if_ended_for_good(folder, "a:7:12.50")


def test_under_a_launcher_a_run_that_cannot_begin_leaves_its_failure_and_nothing_else(tmp_path):
    of = Session(launchers=["a:7:12.50"])
    assert session(tmp_path, ValueError("a lost connection"), of=of) is None
    assert session(tmp_path, InputError("text_column: 'text' is missing"), of=of).is_hopeless
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    with pytest.raises(SystemExit, match="2"):
        leave_if_ended_for_good(tmp_path, "a:7:12.50")


def test_a_launcher_has_one_name_whatever_the_clock_says(monkeypatch):
    monkeypatch.setattr(run_state, "launcher", psutil.Process)
    name = launcher_name()
    assert name.split(":")[:2] == [socket.gethostname(), str(os.getpid())]
    now = psutil.boot_time()
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: now + 3600.0)
    assert launcher_name() == name
    monkeypatch.setattr(run_state, "launcher", lambda: None)
    assert launcher_name() is None
    gathered = [("s0", "a:7:12.50"), ("s1", "a:7:12.50"), ("s2", "b:9:3.25")]
    assert Session.of_all_processes(lambda value: gathered) == Session("s0", ["a:7:12.50", "b:9:3.25"])
