import fcntl
import signal
import subprocess
import threading

import pytest

from clm_owt.errors import InputError
from clm_owt.experiments.execution import Places, error_in, execute

LAUNCHERS = """\
Traceback (most recent call last):
  File "accelerate", line 8, in <module>
subprocess.CalledProcessError: Command '['python', 'run_clm_owt.py']' returned non-zero exit status 1.
"""


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (
            "step 1\nerror: learning_rate: too low\nerror: seed: -1\n" + LAUNCHERS,
            "error: learning_rate: too low\nerror: seed: -1",
        ),
        (
            "step 1\nTraceback (most recent call last):\n  File\n[rank0]: KeyError: 'text'\n" + LAUNCHERS,
            "KeyError: 'text'",
        ),
        ("step 1\n" + LAUNCHERS, LAUNCHERS.splitlines()[-1]),
        ("step 1\nstep 2\n\n", "step 2"),
        ("", ""),
    ],
)
def test_the_error_of_a_failed_run_is_found_in_its_output(output, error):
    assert error_in(output) == error


def test_a_command_waits_for_the_one_that_a_killed_program_left_running(tmp_path, capsys):
    log, interrupted = tmp_path / "run.log", threading.Event()
    with log.open("ab") as output:  # as if by `execute`, whose program is gone now
        fcntl.flock(output, fcntl.LOCK_EX)
        subprocess.Popen(["sh", "-c", "sleep 0.5; echo first"], stdout=output, start_new_session=True)
    assert execute(["echo", "second"], log, {}, interrupted) == 0
    assert log.read_text() == "first\nsecond\n"
    assert capsys.readouterr().out.count("the command that writes to it still runs, begun before; waiting") == 1


def test_an_interrupted_program_does_not_wait_for_it(tmp_path):
    log, interrupted = tmp_path / "run.log", threading.Event()
    with log.open("ab") as output:
        fcntl.flock(output, fcntl.LOCK_EX)
        threading.Timer(0.2, interrupted.set).start()
        assert execute(["echo", "second"], log, {}, interrupted) == 128 + signal.SIGTERM
    assert log.read_text() == ""


@pytest.mark.parametrize(
    ("gpus", "names"),
    [
        ("", [None]),
        ("0,1", ["0", "1"]),
        (" 2, GPU-8f1c", ["2", "GPU-8f1c"]),
        *((g, None) for g in ("0,", ",", "0,0", "0 1")),
    ],
)
def test_each_place_is_a_gpu_of_its_own(gpus, names):
    if names is not None:
        assert Places(gpus).names == names
    else:
        with pytest.raises(InputError, match=f"--gpus: '{gpus}' does not work"):
            Places(gpus)
