"""One run at a time in a folder: who holds it, how it is released, and where flock does not reach."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from dataclasses import asdict

import pytest

from clm_owt.errors import InputError
from clm_owt.file_lock import Holder
from clm_owt.training.run_lock import NAME, run_lock

QUICK = {"leaving": 0.3, "beat": 0.05, "watch": 0.5}


def in_a_child(folder) -> int:
    """The id of a process that holds the folder until it is ended."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        with run_lock(folder, **QUICK):
            os.write(writing, b".")
            signal.alarm(20)  # should the test be cut short
            signal.pause()
    assert os.read(reading, 1) == b"."
    return pid


def test_a_second_process_is_told_which_one_holds_the_folder(tmp_path):
    pid = in_a_child(tmp_path)
    try:
        with pytest.raises(InputError) as refused, run_lock(tmp_path, **QUICK):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    said = f"output_dir: process {pid} on {socket.gethostname()} has been running in {tmp_path} since "
    assert str(refused.value).startswith(said + time.strftime("%Y-%m-%d"))
    assert "; wait for its end or stop it, or give another output_dir" in str(refused.value)


def test_a_kill_releases_the_folder_at_once_and_what_was_made_for_it_goes(tmp_path, capsys):
    folder = tmp_path / "runs" / "killed"
    pid = in_a_child(folder)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    began = time.monotonic()
    with run_lock(folder):
        assert json.loads((folder / NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 1
    assert capsys.readouterr().out == ""
    assert not folder.exists()


def test_a_folder_that_holds_something_else_stays_as_does_one_that_was_there(tmp_path):
    with run_lock(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with run_lock(tmp_path / "empty"):
        pass
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_holder_that_is_just_leaving_is_waited_for(tmp_path):
    leave = threading.Event()

    def hold():
        with run_lock(tmp_path):
            held.set()
            leave.wait()

    held, holding = threading.Event(), threading.Thread(target=hold)
    holding.start()
    held.wait()
    threading.Timer(0.3, leave.set).start()
    with run_lock(tmp_path):
        assert leave.is_set()
    holding.join()
    assert not (tmp_path / NAME).exists()


def does_nothing(*_) -> None:
    """flock of a network file system that is local to a machine."""


def is_not_there(*_) -> None:
    """flock of one without a lock service."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize(
    ("flock", "host"), [(does_nothing, "node-2"), (is_not_there, "node-2"), (is_not_there, "node-1")]
)
def test_where_flock_does_not_reach_a_living_holder_is_seen_by_the_time_of_its_file(
    tmp_path, monkeypatch, capsys, flock, host
):
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(socket, "gethostname", lambda: "node-1")
    with run_lock(tmp_path, **QUICK):
        monkeypatch.setattr(socket, "gethostname", lambda: host)
        with (
            pytest.raises(InputError, match=rf"process {os.getpid()} on node-1 has been running"),
            run_lock(tmp_path, **QUICK),
        ):
            pass
        assert Holder.read(tmp_path / NAME).host == "node-1"
    assert "names process" in capsys.readouterr().out
    assert not (tmp_path / NAME).exists()


def test_the_folder_of_a_holder_on_another_machine_that_is_gone_is_taken_over(tmp_path, capsys):
    (tmp_path / NAME).write_text(json.dumps(asdict(Holder("node-1", 7, 0.0))))
    with run_lock(tmp_path, **QUICK):
        assert Holder.read(tmp_path / NAME).pid == os.getpid()
    assert capsys.readouterr().out.splitlines() == [
        f"Waiting up to 0 s: {tmp_path / NAME} names process 7 on node-1, which may still be running ...",
        "process 7 on node-1 is gone; going on",
    ]


def test_a_process_whose_folder_was_taken_over_ends_without_a_trace(tmp_path, capfd):
    """As one that was suspended for longer than the others wait."""
    pid = in_a_child(tmp_path)
    other = json.dumps(asdict(Holder("node-2", 8, 0.0)))
    (tmp_path / NAME).write_text(other)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert "error: output_dir: process 8 on node-2 has been running in" in capfd.readouterr().err
    assert (tmp_path / NAME).read_text() == other


def test_the_lock_of_another_process_is_not_removed(tmp_path):
    with run_lock(tmp_path):
        (tmp_path / NAME).write_text(json.dumps(asdict(Holder("node-2", 8, 0.0))))
    assert Holder.read(tmp_path / NAME).host == "node-2"


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_to_is_an_error_of_its_key(tmp_path, place):
    (tmp_path / "file").touch()
    folder = tmp_path / place
    reason = "No such file or directory" if place.startswith("/") else f"{tmp_path / 'file'} is a file"
    with pytest.raises(InputError) as refused, run_lock(folder):
        pass
    assert str(refused.value) == f"output_dir: {folder} cannot be written to ({reason}); give a folder that can"
