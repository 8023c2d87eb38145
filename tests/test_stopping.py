import errno
import os
import signal
import threading
import time

import pytest
from safetensors import SafetensorError

from clm_owt import stopping
from clm_owt.console import print_lines
from clm_owt.errors import disk_is_full
from clm_owt.stopping import Deadline, Stopped, StopRequest

pytestmark = pytest.mark.usefixtures("handlers_as_before")


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def exit_status_of(action) -> int:
    """The exit status of a process of its own that does `action`."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_before_the_steps_ends_at_once_and_says_how_to_continue(capsys, signum, status):
    with pytest.raises(Stopped) as stopped, StopRequest().listening():
        send(signum)
        time.sleep(5)
    assert stopped.value.code == status
    name = signal.Signals(signum).name
    assert capsys.readouterr().out == f"Stopped by {name} before the first step; the same command continues\n"


def test_between_steps_a_signal_waits_to_be_asked_for(capsys):
    with pytest.raises(Stopped), StopRequest().listening() as stop, stop.between_steps():
        stop.check()
        send(signal.SIGTERM)
        reached = True
        assert stop.signum == signal.SIGTERM
        stop.reached = "after step 7, saved"
        stop.check()
    assert reached
    assert "after step 7, saved" in capsys.readouterr().out


def test_a_signal_during_the_exit_does_not_change_its_status():
    def leave():
        try:
            with StopRequest().listening():
                send(signal.SIGINT)
                time.sleep(5)
        except Stopped as stopped:
            send(signal.SIGTERM)
            os._exit(stopped.code)

    assert exit_status_of(leave) == 130


def test_a_signal_that_nobody_asked_for_any_more_counts_after_the_last_step():
    with pytest.raises(Stopped), StopRequest().listening() as stop, stop.between_steps():
        send(signal.SIGTERM)


def test_the_echo_of_a_signal_is_no_second_one():
    with pytest.raises(Stopped), StopRequest().listening() as stop, stop.between_steps():
        send(signal.SIGINT)
        send(signal.SIGINT)  # from the terminal, and again from the launcher
        time.sleep(0.1)


def test_a_second_signal_ends_a_process_that_hangs(monkeypatch):
    monkeypatch.setattr(stopping, "ECHO_SECONDS", 0.2)

    def hang():
        with StopRequest().listening() as stop, stop.between_steps():
            send(signal.SIGTERM)
            time.sleep(0.3)
            send(signal.SIGUSR1)
            time.sleep(30)

    began = time.monotonic()
    assert exit_status_of(hang) == 138
    assert time.monotonic() - began < 10


def test_the_disappearance_of_the_launcher_counts_as_a_sigterm():
    with pytest.raises(Stopped) as stopped:
        stop = StopRequest()
        stop._launcher = 1 if os.getppid() != 1 else 2  # another process than the parent now
        with stop.listening(), stop.between_steps():
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                stop.check()
                time.sleep(0.01)
    assert stopped.value.code == 143


def test_a_launcher_that_is_gone_after_a_signal_is_no_second_signal():
    """A Ctrl-C ends `accelerate launch` at once, and the save takes longer than the echo of a signal."""

    def save():
        stop = StopRequest()
        stop._launcher = 1 if os.getppid() != 1 else 2  # another process than the parent now
        with stop.listening(), stop.between_steps():
            send(signal.SIGINT)
            time.sleep(stopping.ECHO_SECONDS + 2.0)  # the watcher looks for the launcher once a second
            os._exit(0)  # the save is on disk

    assert exit_status_of(save) == 0


def test_the_handlers_are_as_before_afterwards():
    before = [signal.getsignal(signum) for signum in StopRequest.SIGNALS]
    with StopRequest().listening():
        pass
    assert [signal.getsignal(signum) for signum in StopRequest.SIGNALS] == before


def test_lines_that_nobody_can_read_end_nothing(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        print_lines("a", "b")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("28"), False),
    ],
)
def test_a_full_disk_is_recognised_whoever_reports_it(error, full):
    assert disk_is_full(error) == full


def test_a_connection_lost_to_a_process_that_was_stopped_is_a_stop_as_well(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    send_later = threading.Timer(0.3, send, [signal.SIGTERM])
    with pytest.raises(Stopped), StopRequest().listening():
        send_later.start()
        raise RuntimeError("Connection closed by peer")
    assert "Stopped by SIGTERM before the first step" in capsys.readouterr().out


def test_a_connection_lost_after_the_signal_is_a_stop_as_well(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Stopped), StopRequest().listening() as stop, stop.between_steps():
        send(signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")


def test_a_lost_connection_that_no_launcher_explains_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(stopping, "LAUNCHER_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="closed by peer"), StopRequest().listening():
        raise RuntimeError("Connection closed by peer")


def test_the_end_of_its_time_stops_a_run_between_steps_with_the_status_that_asks_for_another_job(capsys):
    with (
        pytest.raises(Stopped) as stopped,
        StopRequest(Deadline(time.time() + 0.2, "stop_after 30m")).listening() as stop,
        stop.between_steps(),
    ):
        for _ in range(500):
            stop.check()
            time.sleep(0.01)
    assert stopped.value.code == 138
    assert capsys.readouterr().out == "Stopped by stop_after 30m before the first step; the same command continues\n"


def test_a_signal_of_a_scheduler_ahead_of_that_time_has_its_own_name(capsys):
    with pytest.raises(Stopped), StopRequest(Deadline(time.time() + 60, "stop_after 30m")).listening():
        send(signal.SIGUSR1)
        time.sleep(1)
    assert "Stopped by SIGUSR1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stop_after", "job_seconds", "stops_after", "reason"),
    [
        ("45s", None, 45, "stop_after 45s"),
        ("23h30m", 24 * 3600, 23.5 * 3600, "stop_after 23h30m"),
        ("23h58m", 24 * 3600, 24 * 3600 - 300, "the end of the Slurm job"),
        (None, 600, 540, "the end of the Slurm job"),
        (None, -600, None, None),
        (None, None, None, None),
    ],
)
def test_a_run_ends_with_its_own_time_or_ahead_of_its_job(monkeypatch, stop_after, job_seconds, stops_after, reason):
    began = time.time()
    monkeypatch.setattr(stopping, "launcher_began", lambda: began)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "" if job_seconds is None else str(round(began + job_seconds)))
    deadline = Deadline.of(stop_after)
    if stops_after is None:
        assert deadline is None
    else:
        assert deadline.at - began == pytest.approx(stops_after, abs=1) and deadline.reason == reason
