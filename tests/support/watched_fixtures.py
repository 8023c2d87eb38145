"""Runs of the main job that are watched and disturbed (see watched_run.py), and what they recorded."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from support.runs import environment, launcher, run, write_json_lines

from clm_owt.reports.record import read_metrics

WATCHED = str(Path(__file__).parent / "watched_run.py")
GLOBAL_BATCH = 16
STEPS = 20

RECIPE = """\
dataset_name: json
data_files: {data_files}
validation_documents: 2
train_tokenizer_vocab_size: 400
data_cache_dir: {cache}
block_size: 32
n_layer: 2
n_head: 2
n_embd: 32
effective_batch_size: 16
learning_rate: 1e-3
warmup_steps: 2
max_steps: 20
logging_steps: 1
eval_steps: 10
save_steps: 100
"""


@pytest.fixture(scope="session")
def batch_recipe(tmp_path_factory) -> Path:
    """A recipe whose token store, shared by all runs of the session, is complete."""
    from support.hub_fixtures import english_documents

    folder = tmp_path_factory.mktemp("batch")
    data = write_json_lines(folder / "documents.jsonl", english_documents()[:200])
    recipe = folder / "batch.yaml"
    text = RECIPE.format(data_files=json.dumps(str(data)), cache=json.dumps(str(folder / "cache")))
    recipe.write_text(text, encoding="utf-8")
    result = run([sys.executable, WATCHED], spec(folder / "first.json", [job(recipe, folder / "first")]), cwd=folder)
    assert result.returncode == 0, result.stderr
    return recipe


def job(recipe: Path, output: Path, *options: str, **more: object) -> dict[str, object]:
    return {"argv": ["--recipe", str(recipe), "--output_dir", str(output), *options], **more}


def spec(path: Path, jobs: list[dict[str, object]]) -> str:
    path.write_text(json.dumps(jobs))
    return str(path)


def watched(processes: int, spec_file: str, home: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Do the runs of a spec with `accelerate launch`, and see that none of its processes is left behind."""
    command = launcher("cpu.yaml") if processes == 1 else launcher("cpu_2proc.yaml", "--num_processes", str(processes))
    mark = f"{home}-{os.urandom(4).hex()}"
    env = environment(home, MARK_OF_THIS_TEST=mark, ACCELERATE_USE_CPU="true")
    result = run([*command[:-1], WATCHED, spec_file], cwd=home, env=env, timeout=timeout)
    assert processes_marked(mark) == []
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
