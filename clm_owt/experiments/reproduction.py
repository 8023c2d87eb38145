"""Running recorded runs again, and telling whether the result is the same."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clm_owt.errors import InputError
from clm_owt.experiments.execution import error_in, execute
from clm_owt.experiments.recorded_result import environment_changes, environment_of, launch_variables
from clm_owt.reports.record import TIMING_FIELDS, Row, RunRecord, read_metrics, read_plan

DEVIATIONS_OF_CHANCE = 3  # so many standard deviations over seeds are the same result
# Fields that may differ in equal runs: of time, and what the machine's memory decides.
OF_THE_MACHINE = {*TIMING_FIELDS, "micro_batch"}


@dataclass(frozen=True)
class RecordedRun:
    """A run of a record: its folder there, the accelerate configuration, and its setting's deviation over seeds."""

    folder: Path
    config: str
    step: int  # of its figure
    standard_deviation: float | None
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name


def runs_of(folder: Path, record: Mapping[str, Any], names: Sequence[str]) -> list[RecordedRun]:
    """The runs of these names, all for `all`, the first for no name. Raises InputError for unknown ones."""
    runs = [
        RecordedRun(
            folder / "runs" / run["run"],
            setting["config_file"],
            run["step"],
            setting["standard_deviation"],
            record["environment"],
        )
        for setting in record["settings"]
        for run in setting["runs"]
    ]
    if list(names) == ["all"]:
        return runs
    known = {run.name: run for run in runs}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--runs: {folder.name} has no run {unknown[0]}; it has {', '.join(known)}, or all")
    return [known[name] for name in names] or runs[:1]


def run_again(run: RecordedRun, output: Path, interrupted: threading.Event) -> str | None:
    """Run it in the folder `output`, or continue it there; gives an error, in a line or some, if it did not finish.
    What it prints goes to `output` with `.log` added."""
    processes = read_plan(run.folder)["processes"]
    command = ["accelerate", "launch", "--config_file", run.config, "run_clm_owt.py"]
    command += ["--recipe", str(run.folder / "recipe.yaml"), "--output_dir", str(output)]
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.with_name(f"{output.name}.log")
    variables = launch_variables(processes, run.environment["machine"]["threads"])
    status = execute(command, log, variables, interrupted)
    if status == 0:
        return None
    return f"exit status {status}, see {log}\n{error_in(log.read_text(encoding='utf-8', errors='replace'))}"


@dataclass(frozen=True)
class Outcome:
    """Whether a run gave the recorded result again, and how that is told."""

    same: bool
    text: str


def compare_with_recorded(run: RecordedRun, output: Path) -> Outcome:
    """Compare the finished run in `output` with the recorded one. Raises InputError where either cannot be read."""
    recorded, again = read_metrics(run.folder / "metrics.jsonl"), read_metrics(output / "metrics.jsonl")
    if not recorded:
        raise InputError(f"{run.folder / 'metrics.jsonl'} is missing or holds no rows; restore it from the repository")
    first = first_difference(recorded, again)
    if first is None:
        return Outcome(True, f"the same bits: all values but times of {len(recorded)} rows, training and validation")
    losses = [validation_loss(rows, run.step) for rows in (recorded, again)]
    if None in losses:
        return Outcome(False, f"differs: {first}")
    difference = losses[1] - losses[0]
    told = f"validation loss {losses[1]:.4f}, recorded {losses[0]:.4f}: {difference:+.4f}"
    deviation = run.standard_deviation
    if not deviation:
        same, verdict = False, "differs; of one seed, so that no standard deviation over seeds is known"
    else:
        times = abs(difference) / deviation
        same = times <= DEVIATIONS_OF_CHANCE
        verdict = f"{'within' if same else 'differs by'} {times:.2g} standard deviations over seeds ({deviation:.4f})"
    now = environment_of(RunRecord.read(output), run.environment["machine"])
    changes = environment_changes(run.environment, now) or ["nothing that is recorded of the machine and the packages"]
    return Outcome(same, f"{verdict}: {told}\n  first in {first}\n  other than then: {', '.join(changes)}")


def first_difference(recorded: Sequence[Row], again: Sequence[Row]) -> str | None:
    """Where the rows of a run first differ from the recorded ones, in a field that both should have; None where they
    do not. Rows that the record leaves out, and fields that are newer than it, are not compared."""
    by_place = {(row["split"], row["step"]): row for row in again}
    for row in recorded:
        place = f"step {row['step']} ({row['split']})"
        other = by_place.get((row["split"], row["step"]))
        if other is None:
            return f"{place}: there is no such row"
        for name, value in row.items():
            if name not in OF_THE_MACHINE and repr(other.get(name)) != repr(value):
                return f"{place}: {name} {other.get(name)}, recorded {value}"
    return None


def validation_loss(rows: Sequence[Row], step: int) -> float | None:
    return next((row["ce_loss"] for row in rows if (row["split"], row["step"]) == ("validation", step)), None)
