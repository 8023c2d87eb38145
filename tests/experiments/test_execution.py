import pytest

from clm_owt.experiments.execution import error_in

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
