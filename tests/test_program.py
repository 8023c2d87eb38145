"""How the programs end when their user does not wait for the end, or asks for what cannot be."""

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import PYTHON, ROOT

from clm_owt.program import output_file


def script(body: str) -> list[str]:
    """The command of a script whose main does `body`."""
    lines = [f"    {line}" for line in body.splitlines()]
    code = "\n".join(["from clm_owt.program import run_script", "def main(argv):", *lines, "run_script(main)"])
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("print('done')", 0, "done\n"),
        ("return 3", 3, ""),
        ("from clm_owt.errors import InputError; raise InputError('--x: no')", 2, "error: --x: no\n"),
        ("raise KeyboardInterrupt", 130, "Interrupted\n"),
        ("open('/nowhere/file')", 1, "error: [Errno 2] No such file or directory: '/nowhere/file'\n"),
    ],
)
def test_a_script_leaves_with_a_status_and_at_most_a_line(body, status, said):
    result = subprocess.run(script(body), capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout + result.stderr) == (status, said)


def test_an_output_that_nobody_reads_any_more_is_no_error():
    """As in `python scripts/sample.py ... | head`."""
    process = subprocess.Popen(
        script("for i in range(10**6):\n    print(i)"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert (process.wait(30), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_a_ctrl_c_during_the_imports_ends_without_a_traceback():
    process = subprocess.Popen([*PYTHON, "--recipe", "recipes/quickstart.yaml"], cwd=ROOT, stderr=subprocess.PIPE)
    while catches(process.pid, signal.SIGTERM) or not (started := catches(process.pid, signal.SIGINT)):
        assert process.poll() is None
    while started and catches(process.pid, signal.SIGINT):  # as Python does from its start
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) in ((-signal.SIGINT, b""), (130, b""))


def catches(pid: int, signum: int) -> bool:
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(mask, 16) >> (signum - 1) & 1)


def test_the_folder_of_an_output_must_be_there(tmp_path):
    assert output_file(str(tmp_path / "a.png")) == tmp_path / "a.png"
    with pytest.raises(argparse.ArgumentTypeError, match=r"there is no folder '.*missing'; make it, or name another"):
        output_file(str(tmp_path / "missing/a.png"))
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder; expected the name of a file"):
        output_file(str(tmp_path))
