"""What a run tells: metrics.jsonl always, the trackers of `report_to`, the progress line, throughput and MFU.

Only the main process writes or prints; on the others a `Tracker` does nothing.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
from accelerate import Accelerator
from tqdm import tqdm

from clm_owt.checkpoint import TrainState
from clm_owt.plan import Plan
from clm_owt.recipe import Recipe

# Fields of a row that tell of time and machine: two runs of one recipe agree in all others.
TIMING_FIELDS = ("tokens_per_second", "mfu", "step_seconds", "data_seconds", "elapsed_seconds")

# Dense bf16 peaks in FLOP/s by a part of the device's name, as their makers publish them.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def flops_per_token(parameters: int, n_layer: int, n_embd: int, block_size: int) -> float:
    """Of forward and backward: 6·N + 12·L·D·T (PaLM, appendix B: the products with weights, and attention)."""
    return 6 * parameters + 12 * n_layer * n_embd * block_size


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


class Tracker:
    """The main process's voice: rows to metrics.jsonl and the trackers, lines and progress to the terminal."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, total_steps: int):
        self._recipe = recipe
        self._accelerator = accelerator
        self._total_steps = total_steps
        self.folder = Path(recipe.output_dir)
        self._is_main = accelerator.is_main_process
        self._metrics = None
        self._progress: tqdm | None = None
        self._report_to = bool(recipe.report_to)
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
        cut_back_metrics(self.folder / "metrics.jsonl", state)
        cut_back_samples(self.folder / "samples.md", state)
        self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        if sys.stderr.isatty():
            self._progress = tqdm(total=self._total_steps, initial=state.step, unit="step", dynamic_ncols=True)
        self._started = time.monotonic()
        if self._report_to:
            self._start_trackers(state, config)

    def _start_trackers(self, state: TrainState, config: dict[str, object]) -> None:
        options = {}
        if "wandb" in self._recipe.report_to:
            run_id = state.tracker_ids.setdefault("wandb", os.urandom(4).hex())
            options["wandb"] = {"name": self._recipe.run_name, "id": run_id, "resume": "allow"}
        # TensorBoard takes numbers and texts only.
        flat = {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in config.items()}
        self._accelerator.init_trackers(self._recipe.wandb_project, config=flat, init_kwargs=options)

    def say(self, *lines: str) -> None:
        """Print lines above the progress line."""
        if self._is_main:
            for line in lines:
                tqdm.write(line) if self._progress else print(line, flush=True)

    def train_row(self, row: dict[str, object]) -> None:
        """A row of the training split; shows it in the progress line (a printed line where there is no terminal)."""
        if not self._is_main:
            return
        self._write("train", row)
        rate = f"{row['tokens_per_second']:,.0f} tokens/s"
        parts = [f"loss {row['loss']:.4f}", f"lr {row['learning_rate']:.3g}", rate]
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

    def samples(self, step: int, prompts: Sequence[str], continuations: Sequence[str]) -> None:
        if not self._is_main:
            return
        with (self.folder / "samples.md").open("a", encoding="utf-8") as file:
            file.write(f"## Step {step}\n\n")
            for prompt, text in zip(prompts, continuations, strict=True):
                file.write(f"**{prompt}**{text}\n\n")

    def _seconds_left(self, step: int) -> float:
        done = step - self._first_step
        return (time.monotonic() - self._started) / done * (self._total_steps - step) if done else math.nan

    def _write(self, split: str, row: dict[str, object]) -> None:
        step = row["step"]
        self._metrics.write(json.dumps({"step": step, "split": split, **row}) + "\n")
        self._metrics.flush()
        if self._report_to:
            values = {f"{split}/{name}": value for name, value in row.items() if name != "step" and value is not None}
            self._accelerator.log(values, step=step)

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()
        if self._progress:
            self._progress.close()
        if self._report_to:
            self._accelerator.end_training()


def read_metrics(path: Path) -> list[dict[str, object]]:
    """The rows of a metrics.jsonl; a torn last line, from a kill during its writing, is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


def cut_back_metrics(path: Path, state: TrainState) -> None:
    """Drop the rows that lie after `state`, so that a resumed run never writes a step twice."""

    def is_past(row: dict[str, object]) -> bool:
        return row["step"] <= (state.step if row["split"] == "train" else state.validated_step)

    replace_lines(path, [json.dumps(row) + "\n" for row in read_metrics(path) if is_past(row)])


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


def clock(seconds: float) -> str:
    """Seconds as people read them: 1:02:03, or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
