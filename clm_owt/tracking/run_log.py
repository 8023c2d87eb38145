"""What a run tells: metrics.jsonl always, the trackers of `report_to`, the progress line, throughput and MFU.

Only the main process writes or prints; on the others a `Tracker` does nothing.
"""

import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import psutil
import torch
from accelerate import Accelerator
from tqdm import tqdm

from clm_owt.console import print_lines
from clm_owt.formatting import clock
from clm_owt.planning.devices import find_device
from clm_owt.planning.plan import Plan, flops_per_token
from clm_owt.recipe import Recipe
from clm_owt.reports.curves import Curves
from clm_owt.reports.record import last_steps
from clm_owt.state import TrainState
from clm_owt.tracking.trackers import Trackers


def peak_flops(device_name: str) -> float | None:
    """Of the devices that are known, in FLOP/s."""
    device = find_device(device_name)
    return device and device.peak_flops


class Throughput:
    """Tokens per second of the training steps since the last reading; evaluation, sampling, saving and waiting for
    data are left out."""

    def __init__(self, flops_per_token: float, peak_flops: float | None):
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops  # of all processes' devices together
        self._steps = self._tokens = 0
        self._step_seconds = self._data_seconds = 0.0

    @classmethod
    def of(cls, plan: Plan, recipe: Recipe, accelerator: Accelerator) -> Self:
        peak = peak_flops(torch.cuda.get_device_name()) if accelerator.device.type == "cuda" else None
        flops = flops_per_token(plan.parameters, recipe.n_layer, recipe.n_embd, recipe.block_size)
        return cls(flops, peak and peak * plan.processes)

    def add(self, tokens: int, step_seconds: float, data_seconds: float) -> None:
        """One step: its seconds without, and those of, waiting for data."""
        self._steps += 1
        self._tokens += tokens
        self._step_seconds += step_seconds
        self._data_seconds += data_seconds

    def read(self) -> dict[str, float]:
        """The timing fields of a row, per step where it says seconds; starts a new window."""
        rate = self._tokens / self._step_seconds
        fields = {
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(self._step_seconds / self._steps, 5),
            "data_seconds": round(self._data_seconds, 5),
        }
        if self._peak_flops:
            fields["mfu"] = round(rate * self._flops_per_token / self._peak_flops, 4)
        self._steps = self._tokens = 0
        self._step_seconds = self._data_seconds = 0.0
        return fields


class AppendOnlyFile:
    """A text file that grows by whole pieces. What the disk has no room for waits in memory, and is tried again with
    the next piece and at the end."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self.path = path
        self._say = say
        self._waiting = b""

    def write(self, piece: str) -> None:
        told = bool(self._waiting)
        self._waiting += piece.encode()
        error = self.flush()
        if error and not told:
            self._say(f"{self.path} cannot be written ({error.strerror}): its new lines wait in memory")

    def flush(self) -> OSError | None:
        """Append all that waits, or nothing; gives the error that was in the way."""
        if not self._waiting:
            return None
        try:
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    left = memoryview(self._waiting)
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            return error
        self._waiting = b""
        return None


class Tracker:
    """The main process's voice: rows to metrics.jsonl and the trackers, lines and progress to the terminal."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, total_steps: int):
        self._total_steps = total_steps
        self.folder = Path(recipe.output_dir)
        self._is_main = accelerator.is_main_process
        self._metrics: AppendOnlyFile | None = None
        self._samples: AppendOnlyFile | None = None
        self._progress: tqdm | None = None
        self._trackers = Trackers(recipe, self.say)
        self._curves = Curves(self.folder, self.say)
        self._best_loss = math.inf
        self._first_step = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, state: TrainState, config: dict[str, object]) -> None:
        """Open the files, cut back to `state`, and the trackers."""
        if not self._is_main:
            return
        self._first_step = state.step
        if state.best_validation_loss is not None:
            self._best_loss = state.best_validation_loss
        if sys.stderr.isatty():
            self._progress = tqdm(total=self._total_steps, initial=state.step, unit="step", dynamic_ncols=True)
        metrics, samples = self.folder / "metrics.jsonl", self.folder / "samples.md"
        self._trackers.start(state, config, last_steps(self.folder))
        cut_back_metrics(metrics, state)
        cut_back_samples(samples, state)
        self._metrics, self._samples = AppendOnlyFile(metrics, self.say), AppendOnlyFile(samples, self.say)
        self._started = time.monotonic()

    def say(self, *lines: str) -> None:
        """Print lines above the progress line."""
        if self._is_main:
            for line in lines:
                tqdm.write(line) if self._progress else print_lines(line)

    def train_row(self, row: dict[str, object]) -> None:
        """A row of the training split; shows it in the progress line (a printed line where there is no terminal)."""
        if not self._is_main:
            return
        self._write("train", row)
        rate = f"{row['tokens_per_second']:,.0f} tokens/s"
        parts = [
            f"loss {row['loss']:.4f}",
            f"lr {row['learning_rate']:.3g}",
            f"gradient norm {row['grad_norm']:.3g}",
            rate,
            f"{memory_used() / 1e9:.1f} GB",
        ]
        if self._progress:
            self._progress.set_postfix_str(", ".join(parts))
        else:
            left = clock(self._seconds_left(row["step"]))
            self.say(f"step {row['step']}/{self._total_steps}  " + "  ".join(parts) + f"  {left} left")

    def advance(self, step: int) -> None:
        if self._progress:
            self._progress.update(step - self._progress.n)

    def validation_row(self, row: dict[str, object]) -> None:
        if self._is_main:
            self._write("validation", row)
            self._best_loss = min(self._best_loss, row["loss"])
            self._trackers.summarize(self._best_loss)
            self._curves.redraw()

    def samples(self, step: int, prompts: Sequence[str], continuations: Sequence[str]) -> None:
        if not self._is_main:
            return
        pairs = list(zip(prompts, continuations, strict=True))
        self._samples.write("".join([f"## Step {step}\n\n", *(f"**{prompt}**{text}\n\n" for prompt, text in pairs)]))
        for prompt, text in pairs:
            self.say(textwrap.shorten(f"  sample: {prompt}{text}", width=160, placeholder=" ..."))
        self._trackers.samples(step, prompts, continuations)

    def _seconds_left(self, step: int) -> float:
        done = step - self._first_step
        return (time.monotonic() - self._started) / done * (self._total_steps - step) if done else math.nan

    def _write(self, split: str, row: dict[str, object]) -> None:
        step = row["step"]
        self._metrics.write(json.dumps({"step": step, "split": split, **row}) + "\n")
        self._trackers.row(split, row)

    def unwritten(self) -> list[str]:
        """What of the run's files cannot be written, on another try, and why."""
        problems = []
        for journal in filter(None, (self._metrics, self._samples)):
            error = journal.flush()
            if error:
                problems.append(f"{journal.path} lacks its last lines ({error.strerror})")
        return problems

    def close(self) -> None:
        """Close the files and the trackers, the curves drawn to the end. May be called twice."""
        self._curves.finish()
        for problem in self.unwritten():
            self.say(problem)
        if self._progress:
            self._progress.close()
        self._trackers.finish()


def memory_used() -> int:
    """Bytes in use: at most, by tensors, since the start on a GPU; by this process now elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def cut_back_metrics(path: Path, state: TrainState) -> None:
    """Drop the rows that lie after `state`, so that a resumed run never writes a step twice."""

    def is_past(row: dict[str, object]) -> bool:
        return row["step"] <= (state.step if row["split"] == "train" else state.validated_step)

    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    while lines and not (lines[-1].endswith("\n") and is_past(json.loads(lines[-1]))):
        lines.pop()
    replace_lines(path, lines)


def cut_back_samples(path: Path, state: TrainState) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("## Step ") and int(line.split()[2]) > state.sampled_step:
            break
        kept.append(line)
    replace_lines(path, kept)


def replace_lines(path: Path, lines: Iterable[str]) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text("".join(lines), encoding="utf-8")
    aside.replace(path)
