"""The log of a run: metrics.jsonl, samples.md, lines and progress on the terminal, the trackers of `report_to`."""

import contextlib
import json
import math
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil
import torch
from tqdm import tqdm

from clm_owt.console import print_lines
from clm_owt.files import write_text
from clm_owt.formatting import format_bytes, format_clock
from clm_owt.recipe import Recipe
from clm_owt.reports.curves import Curves
from clm_owt.reports.record import ROUND, last_steps, read_plan, samples_round, samples_text
from clm_owt.state import TrainState
from clm_owt.tracking.append_only_file import AppendOnlyFile
from clm_owt.tracking.trackers import Trackers


class RunLog:
    """Writes and prints what a run reports, on the main process; on the others its methods do nothing.

    A context manager, which closes it at the end. `start` comes before any row. `total_steps` is the run's length.
    """

    def __init__(self, recipe: Recipe, total_steps: int, is_main: bool):
        self._total_steps = total_steps
        self._folder = Path(recipe.output_dir)
        self._is_main = is_main
        self._metrics: AppendOnlyFile | None = None
        self._samples: AppendOnlyFile | None = None
        self._progress: tqdm | None = None
        self._trackers = Trackers(recipe, self.say)
        self._curves = Curves(self._folder, self.say)
        self._best_loss = math.inf
        self._first_step = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, state: TrainState, config: dict[str, object]) -> None:
        """Open the files, cut back to `state`, and the trackers, which show `config`: the settings of the run."""
        if not self._is_main:
            return
        self._first_step = state.step
        if state.best_validation_loss is not None:
            self._best_loss = state.best_validation_loss
        if sys.stderr.isatty():
            self._progress = tqdm(total=self._total_steps, initial=state.step, unit="step", dynamic_ncols=True)
        metrics, samples = self._folder / "metrics.jsonl", self._folder / "samples.md"
        if state.step and not metrics.exists():
            self.say(f"{metrics} is missing: it begins after step {state.step:,}, and lacks the rows before")
        self._trackers.start(state, config, last_steps(self._folder))
        cut_back_metrics(metrics, state)
        cut_back_samples(samples, state)
        self._metrics, self._samples = AppendOnlyFile(metrics, self.say), AppendOnlyFile(samples, self.say)
        if state.step:  # a kill may have cut off the last drawing
            self._curves.redraw()
        self._started = time.monotonic()

    def say(self, *lines: str) -> None:
        """Print lines above the progress line."""
        if self._is_main:
            for line in lines:
                with contextlib.suppress(OSError):  # a terminal that is closed
                    tqdm.write(line) if self._progress else print_lines(line)

    def train_row(self, row: dict[str, object]) -> None:
        """Add a row of the training split, and show it in the progress line, or in a printed line where the output is
        no terminal."""
        if not self._is_main:
            return
        self._add_row("train", row)
        parts = [
            f"loss {row['loss']:.4f}",
            f"lr {row['learning_rate']:.3g}",
            f"gradient norm {row['grad_norm']:.3g}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
            memory_used(),
        ]
        if self._progress:
            self._progress.set_postfix_str(", ".join(parts))
        else:
            left = format_clock(self._seconds_left(row["step"]))
            self.say(f"step {row['step']}/{self._total_steps}  " + "  ".join(parts) + f"  {left} left")

    def advance(self, step: int) -> None:
        """Move the progress line to `step`, without a row."""
        if self._progress:
            self._progress.update(step - self._progress.n)

    def validation_row(self, row: dict[str, object]) -> None:
        """Add a row of the validation split; redraws the curves and renews the trackers' summaries."""
        if self._is_main:
            self._add_row("validation", row)
            self._best_loss = min(self._best_loss, row["loss"])
            self._trackers.summary({"best_validation_loss": self._best_loss})
            self._curves.redraw()

    def tasks_row(self, row: dict[str, object]) -> None:
        """Add a row of the zero-shot tasks: `<task>/<metric>` beside its step and tokens."""
        if self._is_main:
            self._add_row("tasks", row)

    def samples(self, step: int, prompts: Sequence[str], continuations: Sequence[str]) -> None:
        """Add the continuations of the prompts after `step` to samples.md and the trackers, and print their heads."""
        if not self._is_main:
            return
        pairs = list(zip(prompts, continuations, strict=True))
        self._samples.write(samples_round(step, pairs))
        for prompt, text in pairs:
            self.say(textwrap.shorten(f"  sample: {prompt}{text}", width=160, placeholder=" ..."))
        self._trackers.samples(step, prompts, continuations)

    def finish_curves(self) -> None:
        """Draw the curves for the last time. Where losses to compare with are in plan.json by now, they come in."""
        if self._is_main and "baselines" in read_plan(self._folder):
            self._curves.redraw()
        self._curves.finish()

    def unwritten(self) -> list[str]:
        """Try again to write what could not be written to the run's files; the problems that are left, as text."""
        problems = []
        for file in filter(None, (self._metrics, self._samples)):
            error = file.flush()
            if error:
                problems.append(f"{file.path} lacks its last lines ({error.strerror})")
        return problems

    def close(self) -> None:
        """Close the files and the trackers, once what was to be drawn is drawn. May be called twice."""
        self._curves.finish()
        for problem in self.unwritten():
            self.say(problem)
        if self._progress:
            self._progress.close()
        self._trackers.finish()

    def _seconds_left(self, step: int) -> float:
        done = step - self._first_step
        return (time.monotonic() - self._started) / done * (self._total_steps - step) if done else math.nan

    def _add_row(self, split: str, row: dict[str, object]) -> None:
        self._metrics.write(json.dumps({"step": row["step"], "split": split, **row}) + "\n")
        self._trackers.row(split, row)


def memory_used() -> str:
    """Memory in use, and what it counts: on a GPU the most that tensors took since the start, else this process."""
    if torch.cuda.is_available():
        return f"GPU tensors at most {format_bytes(torch.cuda.max_memory_allocated())}"
    return f"process {format_bytes(psutil.Process().memory_info().rss)}"


def cut_back_metrics(path: Path, state: TrainState) -> None:
    """Drop the rows of metrics.jsonl that lie after `state`, so that a resumed run never writes a step twice."""
    kept = {"train": state.step, "validation": state.validated_step, "tasks": state.tasks_step}

    def is_kept(line: str) -> bool:
        if not line.endswith("\n"):
            return False
        row = json.loads(line)
        return row["step"] <= kept[row["split"]]

    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    while lines and not is_kept(lines[-1]):
        lines.pop()
    write_text(path, "".join(lines))


def cut_back_samples(path: Path, state: TrainState) -> None:
    """Drop the rounds of samples.md that lie after `state`."""
    if not path.exists():
        return
    text = samples_text(path)
    text = text[: text.rfind("\n") + 1]  # without a line that a kill cut off
    later = (heading.start() for heading in ROUND.finditer(text) if int(heading[1]) > state.sampled_step)
    write_text(path, text[: next(later, None)])
