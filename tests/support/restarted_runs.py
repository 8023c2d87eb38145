"""Runs whose launcher starts their processes again: `accelerate launch --max_restarts`, on a CPU."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from support.runs import MAIN, ON_CPU, Background, environment, launcher, started, timeless_metrics


def restarting_launcher(
    restarts: int, backend: str = "static", processes: int = 2, *options: str, port: int = 0, program: str = MAIN
) -> list[str]:
    """Its command; without a port at one that is free. On one machine Accelerate leaves c10d's store at torch's
    default port, where two launchers would meet."""
    own = ["--max_restarts", str(restarts), "--rdzv_backend", backend, "--main_process_port", str(port), *options]
    command = launcher("cpu_2proc.yaml", "--num_processes", str(processes), *own, program=program)
    return ["env", "PET_RDZV_ENDPOINT=localhost:0", *command] if backend == "c10d" and not port else command


@contextlib.contextmanager
def started_in(home: Path, command: list[str], *options: str) -> Iterator[Background]:
    """The command in the background, in a folder of its own; at the end of the block none of its processes is left."""
    home.mkdir(parents=True, exist_ok=True)
    log = f"log-{len(list(home.glob('log-*')))}"
    with started(command, *options, cwd=home, env=environment(home, **ON_CPU), log=log) as job:
        try:
            yield job
        finally:
            for process in workers(job):
                with contextlib.suppress(psutil.Error):
                    process.kill()


def workers(job: Background) -> list[psutil.Process]:
    """The processes that the launcher has started, by age; none once it has ended."""
    try:
        return psutil.Process(job.process.pid).children()
    except psutil.Error:
        return []


def printed_steps(job: Background, since: int) -> int:
    """How many steps are printed after the first `since` characters."""
    return len(re.findall(r"^step \d+/", job.text[since:], re.MULTILINE))


def wait_for_steps(job: Background, since: int, steps: int, seconds: float) -> None:
    """Until so many steps are printed after the first `since` characters, or the run has ended."""
    began = time.monotonic()
    while printed_steps(job, since) < steps and job.process.poll() is None:
        assert time.monotonic() < began + seconds, f"not {steps} steps within {seconds} s:\n{job.text}"
        time.sleep(0.02)


def assert_same_run(found: Path, wanted: Path) -> None:
    """Two finished runs have the same weights, optimizer state, random states and metrics, bit for bit."""
    assert timeless_metrics(found) == timeless_metrics(wanted)
    last = sorted((wanted / "checkpoints").iterdir())[-1].name
    for name in ("model.safetensors", "optimizer.safetensors", "random_states.json"):
        assert (found / "checkpoints" / last / name).read_bytes() == (
            wanted / "checkpoints" / last / name
        ).read_bytes()
    assert (found / "model/model.safetensors").read_bytes() == (wanted / "model/model.safetensors").read_bytes()
    assert json.loads((found / "run_state.json").read_text())["state"] == "finished"
