"""Real runs of the main job, in processes of their own, for the tests."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from clm_owt.reports.record import TIMING_FIELDS, read_metrics

ROOT = Path(__file__).parents[2]
MAIN = str(ROOT / "run_clm_owt.py")
PYTHON = [sys.executable, MAIN]


def launcher(config: str = "cpu.yaml", *options: str) -> list[str]:
    """`accelerate launch` with one of the shipped configurations."""
    accelerate = str(Path(sys.executable).parent / "accelerate")
    return [accelerate, "launch", "--config_file", str(ROOT / "accelerate_configs" / config), *options, MAIN]


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a user who has nothing yet: no cache, no token, no network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "ACCELERATE_", "WANDB_", "XDG_"))}
    kept.pop("PYTHONPATH", None)
    one_thread = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return kept | one_thread | {"HOME": str(home), "HF_HOME": str(home / "hf"), "COLUMNS": "200"} | more


def run(
    command: Sequence[str],
    *options: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *options],
        cwd=cwd,
        env=environment(cwd) if env is None else env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def timeless_metrics(folder: Path) -> list[dict[str, object]]:
    """The rows of a run's metrics.jsonl without what tells of time: equal for equal runs, bit for bit."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING_FIELDS} for row in rows]


def write_json_lines(path: Path, documents: Sequence[str]) -> Path:
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return path


TINY = """\
dataset_name: json
data_files: {data_files}
validation_documents: 20
train_tokenizer_vocab_size: 400
data_cache_dir: {cache}
block_size: 32
n_layer: 2
n_head: 2
n_embd: 32
effective_batch_size: 8
learning_rate: 3e-3
warmup_steps: 2
max_steps: 12
logging_steps: 1
eval_steps: 5
save_steps: 4
sample_steps: 6
sample_max_new_tokens: 8
"""


def write_tiny_recipe(folder: Path, data_files: str, cache: Path) -> Path:
    """A recipe of a run that takes a second, beside its imports."""
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(data_files=json.dumps(data_files), cache=json.dumps(str(cache))), encoding="utf-8")
    return path
