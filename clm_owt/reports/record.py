"""A run as its folder tells it: metrics.jsonl, samples.md, recipe.yaml, plan.json. Imports no torch."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clm_owt.errors import InputError

Row = dict[str, Any]

# Fields of a row that tell of time and machine: two runs of one recipe agree in all others.
TIMING_FIELDS = ("tokens_per_second", "mfu", "step_seconds", "data_seconds", "elapsed_seconds")


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a torn last line, from a kill during its writing, is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


def read_samples(path: Path) -> dict[int, str]:
    """The rounds of a samples.md, as Markdown, by step."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rounds = re.split(r"^## Step (\d+)\n", text, flags=re.MULTILINE)[1:]
    return {int(step): content.strip() for step, content in zip(rounds[::2], rounds[1::2], strict=True)}


def last_steps(folder: Path) -> dict[str, int]:
    """The last step that a run's files tell of: of train and validation rows, and of samples; -1 for none."""
    last = {"train": -1, "validation": -1, "samples": max(read_samples(folder / "samples.md"), default=-1)}
    for row in read_metrics(folder / "metrics.jsonl"):
        last[row["split"]] = max(last[row["split"]], row["step"])
    return last


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds about its course."""

    name: str
    recipe: dict[str, Any]
    plan: dict[str, Any]
    train: list[Row]
    validation: list[Row]
    samples: dict[int, str]

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Raises InputError where the folder holds no run."""
        try:
            recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
            plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} is no run's folder: {error}") from error
        rows = read_metrics(folder / "metrics.jsonl")
        train, validation = ([row for row in rows if row["split"] == split] for split in ("train", "validation"))
        return cls(recipe["run_name"], recipe, plan, train, validation, read_samples(folder / "samples.md"))

    @property
    def marks(self) -> list[tuple[int, str]]:
        """Steps after which something changed that the curves may show, and what."""
        marks = [(step, "resumed") for step in self.plan.get("resumed_after", [])]
        for before, after in zip(self.train, self.train[1:], strict=False):
            if after["micro_batch"] != before["micro_batch"]:
                marks.append((before["step"], f"micro-batch {before['micro_batch']} → {after['micro_batch']}"))
        return sorted(marks)
