"""Runs and sweeps that are stopped as people stop them: in a terminal, under a launcher, with slow saves."""

import re
import shlex
import time
from pathlib import Path

import pytest
import yaml
from support.bench import Bench, assert_continued, campaign
from support.runs import ON_CPU, PYTHON, ROOT, environment, on_processes
from support.terminal import Terminal

pytestmark = pytest.mark.xdist_group("faults")

# A save has four files, of which each takes so long; a step takes long enough to be stopped in the midst of the run.
SLOW = """
import hashlib, json, time

digest, dumps = hashlib.file_digest, json.dumps

def slow_dumps(value, **more):
    if isinstance(value, dict) and value.get("split") == "train":
        time.sleep(0.04)
    return dumps(value, **more)

hashlib.file_digest = lambda *arguments: time.sleep(0.8) or digest(*arguments)
json.dumps = slow_dumps
"""
WAYS = {
    "Ctrl-C": Terminal.press_ctrl_c,
    "terminal closed": Terminal.close,
    "SIGTERM to the group": Terminal.terminate_group,
}
EVERY = [(processes, program, way) for way in WAYS for program in ("training", "sweep") for processes in (1, 2)]
EVERY_DAY = [
    (1, "training", "Ctrl-C"),
    (2, "training", "Ctrl-C"),
    (1, "sweep", "Ctrl-C"),
    (1, "training", "terminal closed"),
]
CASES = EVERY_DAY + EVERY + EVERY_DAY


def command(program: str, processes: int, bench: Bench, home: Path) -> str:
    """The training under `accelerate launch`, or a sweep of this one run."""
    launch = on_processes(processes)
    options = bench.argv("--save_steps", "1000")  # the one save is that of the stop
    if program == "training":
        return shlex.join([*launch, *options])
    words = ["${program}" if word == launch[-1] else word for word in launch]
    sweep = {
        "program": launch[-1],
        "method": "grid",
        "parameters": {"recipe": {"value": str(bench.recipe)}, "penalty_weight": {"values": [0.0]}},
        "command": [*words, "${args}"],
    }
    (home / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return shlex.join([PYTHON[0], str(ROOT / "scripts/sweep.py"), "sweep.yaml", *options[2:]])


def steps_of(metrics: Path) -> list[int]:
    """The steps that a run has logged so far."""
    text = metrics.read_text() if metrics.exists() else ""
    return [int(step) for step in re.findall(r'^{"step": (\d+), "split": "train"', text, re.MULTILINE)]


@pytest.mark.parametrize("case", campaign(CASES, short=len(EVERY_DAY)))
def test_a_run_stopped_in_a_terminal_saves_its_last_step(bench, tmp_path, draw, record_fault, case):
    """A stop in a terminal, under a launcher or in a sweep, of 1 and of 2 processes, whose save takes 3 s"""
    processes, program, way = case
    for attempt in range(9):
        home, step = tmp_path / str(attempt), draw.randint(4, 40)
        home.mkdir()
        (home / "sitecustomize.py").write_text(SLOW)
        metrics, log = bench.run_of(home) / "metrics.jsonl", home / "runs/sweeps/sweep/small.log"
        with Terminal(home, environment(home, PYTHONPATH=str(home), **ON_CPU)) as terminal:
            terminal.type(command(program, processes, bench, home))
            terminal.wait_until(lambda metrics=metrics, step=step: step in steps_of(metrics))
            began = time.monotonic()
            WAYS[way](terminal)
            if program == "sweep" and way != "terminal closed":  # it stays until its run is saved
                terminal.wait_until(lambda terminal=terminal: "Interrupted; the same command" in terminal.text)
                assert not [p for p in terminal.programs() if "run_clm_owt.py" in " ".join(p.cmdline())]
            terminal.wait_until(lambda terminal=terminal: not terminal.programs())
            took, text = time.monotonic() - began, terminal.text
        if not (bench.run_of(home) / "model").exists():  # else it had ended before
            break
    else:
        pytest.fail(f"nine times it ended before it was stopped:\n{text}")
    last = max(steps_of(metrics))
    assert [path.name for path in bench.checkpoints_of(home).iterdir()] == [f"step-{last:08d}"], text
    said = f"after step {last}, saved"
    if program == "sweep":
        assert f"Stopped by SIGTERM {said}; the same command continues" in log.read_text(), log.read_text()
    elif way != "terminal closed":
        assert f"{said}; the same command continues" in text, text
    assert_continued(said, bench.finish(home, processes))
    record_fault(f"{way}, {program} of {processes}: {said} ({took:.1f} s)")
