"""Runs of the main job that are watched and disturbed (see watched_run.py), and what they recorded."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from support.hub_fixtures import english_documents
from support.runs import ON_CPU, environment, on_processes, run, write_json_lines, write_tiny_recipe
from support.warm_start import WarmStart

from clm_owt.reports.record import read_metrics

WATCHED = str(Path(__file__).parent / "watched_run.py")
GLOBAL_BATCH = 16
STEPS = 20
STEP_COLLECTIVES = 2  # beside the sum of the gradients: the agreement, and the sum of the statistics
CHANGES = {
    "validation_documents": 2,
    "effective_batch_size": GLOBAL_BATCH,
    "learning_rate": 1e-3,
    "max_steps": STEPS,
    "eval_steps": 10,
    "save_steps": 100,
    "sample_steps": None,
    "sample_max_new_tokens": None,
}


@pytest.fixture(scope="session")
def warm(tmp_path_factory) -> Iterator[WarmStart]:
    """A process that has imported everything, and starts programs."""
    with WarmStart(tmp_path_factory.mktemp("warm")) as warm:
        yield warm


@pytest.fixture(scope="session")
def batch_recipe(warm, tmp_path_factory) -> Path:
    """A recipe whose token store, shared by all runs of the session, is complete."""
    folder = tmp_path_factory.mktemp("batch")
    data = write_json_lines(folder / "documents.jsonl", english_documents()[:200])
    recipe = write_tiny_recipe(folder, str(data), folder / "cache", "batch", **CHANGES)
    watch_forked_runs(warm, 1, [watched_run(recipe, folder / "first")], folder)
    return recipe


def watched_run(recipe: Path, output: Path, *options: str, **spec: object) -> dict[str, object]:
    """One run of the list that watched_run.py does."""
    return {"argv": ["--recipe", str(recipe), "--output_dir", str(output), *options], **spec}


def write_spec(runs: list[dict[str, object]], home: Path) -> str:
    spec = home / f"spec-{os.urandom(4).hex()}.json"
    spec.write_text(json.dumps(runs))
    return str(spec)


def watch_forked_runs(
    warm: WarmStart, processes: int, runs: list[dict[str, object]], home: Path, status: int = 0
) -> str:
    """Do the runs on so many processes, started without a launcher, each of which ends with `status`; gives all that
    they printed."""
    program, name = "support.watched_run:main", f"watched-{processes}"
    jobs = warm.start_ranks(processes, program, write_spec(runs, home), cwd=home, name=name)
    for job in jobs:
        assert job.wait(600) == status, job.text
    return "".join(job.text for job in jobs)


def watch_launched_runs(
    processes: int, runs: list[dict[str, object]], home: Path, fails: bool = False, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Do the runs by `accelerate launch`, and see that none of its processes is left behind."""
    mark = f"{home}-{os.urandom(4).hex()}"
    env = environment(home, MARK_OF_THIS_TEST=mark, **ON_CPU)
    result = run(on_processes(processes, WATCHED), write_spec(runs, home), cwd=home, env=env, timeout=timeout)
    assert processes_marked(mark) == []
    assert (result.returncode != 0) == fails, result.stderr
    return result


def processes_marked(mark: str) -> list[str]:
    """The command lines of all processes that have `mark` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK_OF_THIS_TEST") == mark:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@dataclass(frozen=True)
class Record:
    """What watched_run.py recorded of one run, and its metrics."""

    folder: Path
    output: Path

    def gradient(self, step: int) -> dict:
        return torch.load(self.folder / f"gradient-{step}.pt")

    @property
    def collectives(self) -> dict[str, dict[str, int]]:
        """Of the last step on the first process: how often each was called, and the bytes gathered of each type."""
        return json.loads((self.folder / "collectives-0.json").read_text())

    def block_hash(self, step: int) -> str:
        """Of the blocks that all processes consumed in a step, in the order of their positions in the batch."""
        blocks = []
        for file in self.folder.glob("blocks-*.jsonl"):
            blocks += json.loads(file.read_text().splitlines()[step - 1])["blocks"]
        assert [position for position, _ in sorted(blocks)] == list(range(GLOBAL_BATCH))
        return hashlib.sha256(str([block for _, block in sorted(blocks)]).encode()).hexdigest()

    def rows(self, split: str) -> list[dict]:
        return [row for row in read_metrics(self.output / "metrics.jsonl") if row["split"] == split]


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def assert_same_losses(other: Record, reference: Record) -> None:
    """Of every row, to the 2e-6 that 20 steps at a rate of 1e-3 leave of float32."""
    for split in ("train", "validation"):
        expected, got = reference.rows(split), other.rows(split)
        assert [row["step"] for row in got] == [row["step"] for row in expected]
        for a, b in zip(got, expected, strict=True):
            assert relative(a["loss"], b["loss"]) < 2e-6, (split, a["step"])


def assert_same_blocks(other: Record, reference: Record) -> None:
    steps = range(1, STEPS + 1)
    assert [other.block_hash(step) for step in steps] == [reference.block_hash(step) for step in steps]


def assert_same_loss_and_gradient(other: Record, reference: Record) -> None:
    """Of every step, taken at the reference's weights, to float32's rounding."""
    for step in range(1, STEPS + 1):
        expected, got = reference.gradient(step), other.gradient(step)
        assert relative(got["loss"], expected["loss"]) < 1e-6
        assert (got["gradient"] - expected["gradient"]).norm() < 1e-6 * expected["gradient"].norm()
