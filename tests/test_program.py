"""How the programs end when their user does not wait for the end, or asks for what cannot be."""

import argparse
import importlib
import os
import signal
import subprocess
import sys

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


# Python runs a module of this name at its start: from then on the import of the recipe's reader takes a minute.
SLOW_IMPORT = """
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "clm_owt.recipe_reader":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
"""


def test_a_ctrl_c_during_the_imports_ends_without_a_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)
    process = subprocess.Popen(
        [*PYTHON, "--recipe", "recipes/quickstart.yaml"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (-signal.SIGINT, "")


def test_the_folder_of_an_output_must_be_there(tmp_path):
    assert output_file(str(tmp_path / "a.png")) == tmp_path / "a.png"
    with pytest.raises(argparse.ArgumentTypeError, match=r"there is no folder '.*missing'; make it, or name another"):
        output_file(str(tmp_path / "missing/a.png"))
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder; expected the name of a file"):
        output_file(str(tmp_path))


SCHEDULE = ["--max_lr", "1", "--warmup_steps", "1", "--total_steps", "10"]
EVALUATION = ["--model", "x", "--text", "a.txt", "--generation"]


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        *(("visualize_lr_schedule", [*SCHEDULE, name, value], f"{name}: '{value}' does not work; expected a number")
          for name, value in (("--max_lr", "nan"), ("--max_lr", "inf"), ("--max_lr", "0"), ("--min_lr_ratio", "5"),
                              ("--min_lr_ratio", "nan"), ("--decay_share", "0"), ("--decay_share", "7"))),
        ("visualize_lr_schedule", [*SCHEDULE, "--total_steps", "0"], "--total_steps: '0' does not work"),
        ("visualize_lr_schedule", [*SCHEDULE, "--output", "x.xyz"], "expected a name that ends in .png or .svg"),
        ("estimate", ["--processes", "0"], "--processes: '0' does not work; expected a whole number at least 1"),
        ("estimate", ["--vocab_size", "-5"], "--vocab_size: '-5' does not work; expected a whole number at least 1"),
        ("study", ["x", "--vocab_size", "-4"], "--vocab_size: '-4' does not work; expected a whole number at least 1"),
        ("study", ["x", "--price", "nan"], "--price: 'nan' does not work; expected a number at least 0"),
        ("study", ["x", "--price=-3"], "--price: '-3' does not work; expected a number at least 0"),
        ("study", ["x", "--new_tokens", "3"], "--new_tokens: '3' does not work; expected a whole number at least 4"),
        ("sample", ["--model", "x", "--seed", "9" * 23], "does not work; expected a whole number in [0, 2**32)"),
        ("sample", ["--model", "x", "--temperature", "inf"], "--temperature: 'inf' does not work"),
        ("sample", ["--model", "x", "--count", "1.5"], "--count: '1.5' does not work"),
        ("evaluate_model", [*EVALUATION, "--seed", "9" * 23], "does not work; expected a whole number in [0, 2**32)"),
        ("evaluate_model", [*EVALUATION, "--temperature", "inf"], "--temperature: 'inf' does not work"),
    ],
)  # fmt: skip
def test_an_option_of_a_script_that_cannot_be_ends_with_a_line_and_2(script, options, message, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(script).main(options)
    assert left.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
