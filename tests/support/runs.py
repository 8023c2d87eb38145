"""Programs as their users start them, in processes of their own: commands, environments, recipes, what a run left."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from clm_owt.reports.record import TIMING_FIELDS, read_metrics

ROOT = Path(__file__).parents[2]
MAIN = str(ROOT / "run_clm_owt.py")
PYTHON = [sys.executable, MAIN]


def launcher(config: str = "cpu.yaml", *options: str, program: str = MAIN) -> list[str]:
    """`accelerate launch` with one of the shipped configurations."""
    accelerate = str(Path(sys.executable).parent / "accelerate")
    return [accelerate, "launch", "--config_file", str(ROOT / "accelerate_configs" / config), *options, program]


def on_processes(count: int, program: str = MAIN) -> list[str]:
    """`accelerate launch` of `count` processes on the CPU; where there are several, in an environment with ON_CPU."""
    if count == 1:
        return launcher(program=program)
    return launcher("cpu_2proc.yaml", "--num_processes", str(count), program=program)


ON_CPU = {"ACCELERATE_USE_CPU": "true"}


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a user who has nothing yet: no cache, no token, no network."""
    own = ("HF_", "HUGGING", "TRANSFORMERS_", "DISABLE_TELEMETRY", "ACCELERATE_", "WANDB_", "XDG_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    one_thread = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return kept | one_thread | {"HOME": str(home), "HF_HOME": str(home / "hf"), "COLUMNS": "200"} | more


def run(
    command: Sequence[str],
    *options: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in the environment of a user who has nothing yet if none is given."""
    return subprocess.run(
        [*command, *options],
        cwd=cwd,
        env=environment(cwd) if env is None else env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class Background:
    """A command that runs while the test goes on; what it prints goes to a file."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log = process, log

    @property
    def text(self) -> str:
        """All that it has printed, output and errors together."""
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], object], seconds: float = 240) -> None:
        """Until `condition` holds; fails if the command ends before, or it takes longer."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended before that:\n{self.text}"
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self.text}"
            time.sleep(0.01)

    def wait_for(self, text: str, seconds: float = 240) -> None:
        """Until it has printed `text`."""
        self.wait_until(lambda: text in self.text, seconds)

    def stop(self, signum: int = signal.SIGTERM, seconds: float = 120) -> int:
        """Send a signal; gives the exit status."""
        self.process.send_signal(signum)
        return self.process.wait(seconds)


@contextlib.contextmanager
def started(
    command: Sequence[str], *options: str, cwd: Path, env: Mapping[str, str] | None = None, log: str = "log"
) -> Iterator[Background]:
    """The command in the background, with its output in the file `log` of `cwd`; killed at the end of the block if it
    still runs."""
    with (cwd / log).open("w") as file:
        process = subprocess.Popen(
            [*command, *options],
            cwd=cwd,
            env=environment(cwd) if env is None else env,
            stdout=file,
            stderr=file,
        )
    try:
        yield Background(process, cwd / log)
    finally:
        process.kill()
        process.wait()


def timeless_rows(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Rows of metrics without what depends on time: equal for equal runs, bit for bit."""
    return [{name: value for name, value in row.items() if name not in TIMING_FIELDS} for row in rows]


def timeless_metrics(folder: Path) -> list[dict[str, object]]:
    """The rows of a run's metrics.jsonl without what depends on time."""
    return timeless_rows(read_metrics(folder / "metrics.jsonl"))


def write_json_lines(path: Path, documents: Sequence[str]) -> Path:
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return path


# A run that takes a second, beside its imports.
TINY = {
    "dataset_name": "json",
    "validation_documents": 20,
    "train_tokenizer_vocab_size": 400,
    "block_size": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "effective_batch_size": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "max_steps": 12,
    "logging_steps": 1,
    "eval_steps": 5,
    "save_steps": 4,
    "sample_steps": 6,
    "sample_max_new_tokens": 8,
}


def write_tiny_recipe(folder: Path, data_files: str, cache: Path, name: str = "tiny", **changes: object) -> Path:
    """The file of a tiny recipe, with some keys changed (None: left out)."""
    content = TINY | {"data_files": data_files, "data_cache_dir": str(cache)} | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path
