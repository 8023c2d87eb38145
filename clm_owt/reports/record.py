"""Reading a run's folder: recipe.yaml, plan.json, metrics.jsonl, samples.md. Imports no torch."""

import json
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from clm_owt.errors import InputError
from clm_owt.recipe import FIELDS, default_of

Row = dict[str, Any]

SPLITS = ("train", "validation", "tasks")  # of the rows of metrics.jsonl

# The heading of a round in samples.md, and what is not to be taken for one.
ROUND = re.compile(r"^## Step (\d{1,12})\n", re.MULTILINE | re.ASCII)
LIKE_ROUND = re.compile(r"^## Step ", re.MULTILINE)

# The fields of a row that are about time and machine: two runs of one recipe agree in all others.
TIMING_FIELDS = ("tokens_per_second", "mfu", "step_seconds", "data_seconds", "elapsed_seconds")

# Settings that belong to the machine or the place of a run, and say nothing of the model.
PLACES = {
    "data_cache_dir",
    "output_dir",
    "run_name",
    "resume_from_checkpoint",
    "stop_after",
    "report_to",
    "wandb_project",
    "checkpoint_mirror",
}


def read_recipe(folder: Path) -> dict[str, Any]:
    """The settings in a run's recipe.yaml, with the defaults of those that an older version did not have. Raises
    InputError where there is no such file, or none that can be read."""
    content = _read_mapping(folder / "recipe.yaml", yaml.safe_load)
    for name, field_of_recipe in FIELDS.items():
        if field_of_recipe.default is not MISSING:
            content.setdefault(name, default_of(name))
    return content


def read_plan(folder: Path) -> dict[str, Any]:
    """A run's plan.json. Raises InputError where there is no such file, or none that can be read."""
    return _read_mapping(folder / "plan.json", json.loads)


class FileContent(dict[str, Any]):
    """What a file holds. Asked for a name that is not in it, it raises an InputError that names the file."""

    def __init__(self, path: Path, content: dict[str, Any]):
        super().__init__(content)
        self._path = path

    def __missing__(self, name: str) -> typing.NoReturn:
        raise InputError(f"{self._path} has no {name!r}: it is damaged, or of another version; restore it from a copy")


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> FileContent:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path.parent} is no run's folder: it has no {path.name}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} cannot be read: expected names and values")
    return FileContent(path, content)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a torn last line, from a kill during its writing, is left out. Raises InputError
    for a line that is no row."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_parse_row(path, i, line) for i, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def _parse_row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
        if isinstance(row["step"], int) and row["split"] in SPLITS:
            return row
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    found = line.decode("utf-8", errors="replace").strip()[:60]
    raise InputError(
        f"{path}, line {number}: expected a row in JSON with step and split ({', '.join(SPLITS)}), found {found!r}; "
        "mend or remove the line, or move the file away: the run goes on without its earlier rows"
    )


def split_rows(rows: Iterable[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """The training rows, the validation rows, and those of zero-shot tasks."""
    by_split: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        by_split[row["split"]].append(row)
    return tuple(by_split.values())


def task_metrics(row: Row) -> list[tuple[str, float]]:
    """The metrics of a row of zero-shot tasks, each with its name `<task>/<metric>`."""
    return [(name, value) for name, value in row.items() if "/" in name]


def samples_text(path: Path) -> str:
    """A samples.md as it is: a continuation may hold a carriage return, which reading as text would change. Raises
    InputError for what is no text."""
    try:
        return path.read_bytes().decode("utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} cannot be read: {error}; restore it from a copy, or move it away: the run goes on without its "
            "earlier samples"
        ) from error


def samples_round(step: int, samples: Iterable[tuple[str, str]]) -> str:
    """A round of a samples.md: pairs of a prompt and its continuation. A line of theirs that looks like the heading of
    a round gets a backslash before it, as Markdown has it."""
    text = "".join(f"**{prompt}**{continuation}\n\n" for prompt, continuation in samples)
    return f"## Step {step}\n\n" + LIKE_ROUND.sub(r"\\\g<0>", text)


def read_samples(path: Path) -> dict[int, str]:
    """The rounds of a samples.md, as Markdown, by step."""
    rounds = ROUND.split(samples_text(path))[1:]
    return {int(step): content.strip() for step, content in zip(rounds[::2], rounds[1::2], strict=True)}


def last_steps(folder: Path) -> dict[str, int]:
    """The last step in a run's files, of the rows of each split and of `samples`; -1 where there is none."""
    last = dict.fromkeys(SPLITS, -1) | {"samples": max(read_samples(folder / "samples.md"), default=-1)}
    for row in read_metrics(folder / "metrics.jsonl"):
        last[row["split"]] = max(last[row["split"]], row["step"])
    return last


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds about its course: its rows by split, its samples by step. Named as the folder is."""

    folder: Path
    name: str
    recipe: dict[str, Any]
    plan: dict[str, Any]
    train: list[Row]
    validation: list[Row]
    samples: dict[int, str]
    tasks: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Raises InputError where the folder holds no run."""
        recipe, plan = read_recipe(folder), read_plan(folder)
        train, validation, tasks = split_rows(read_metrics(folder / "metrics.jsonl"))
        samples = read_samples(folder / "samples.md")
        return cls(folder, folder.resolve().name, recipe, plan, train, validation, samples, tasks)

    def until(self, step: int) -> "RunRecord":
        """The record as it was after `step`."""
        rows = {split: [row for row in getattr(self, split) if row["step"] <= step] for split in SPLITS}
        samples = {number: text for number, text in self.samples.items() if number <= step}
        return replace(self, **rows, samples=samples)

    @property
    def marks(self) -> list[tuple[int, str]]:
        """Steps after which something changed that the curves may show, and what."""
        marks = [(step, "resumed") for step in self.plan.get("resumed_after", [])]
        for before, after in zip(self.train, self.train[1:], strict=False):
            if after["micro_batch"] != before["micro_batch"]:
                marks.append((before["step"], f"micro-batch {before['micro_batch']} → {after['micro_batch']}"))
        return sorted(marks)
