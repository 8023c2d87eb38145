"""Recorded results: `records/NAME/` holds what is claimed, the figures, the commands, and the runs that they are of.

record.yaml is made from finished runs and never written by hand. `runs/` holds of each of these its recipe.yaml,
plan.json, metrics.jsonl and log.txt, so that it can be read and drawn as any run's folder.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clm_owt.errors import InputError
from clm_owt.files import replacing_folder
from clm_owt.recipe import FIELDS, default_of, show
from clm_owt.recipe_reader import load_recipe
from clm_owt.reports.comparison import check_intervals_can_be_computed, compare
from clm_owt.reports.record import PLACES, Row, RunRecord, read_recipe

# The tables of the board: the loss after so many tokens, that after so many minutes, and what did not help.
TABLES = ("tokens", "minutes", "tried")
BOARD_TOKENS = 1_433_600  # 350 steps of the quickstart
BOARD_MINUTES = 3
BOARD_CORES = 2

WHOLE_METRICS_BYTES = 200_000  # a longer metrics.jsonl is thinned out
KEPT_TRAINING_ROWS = 10  # every so many of them

# Keys that say where a run was, began and was kept; in a record, and when it runs again, they have their defaults.
NOT_RECORDED = {*PLACES, "branch_from", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy"}

REPORT_FILES = (".csv", ".html", ".md", ".png", ".txt", ".yaml")  # by their endings; and study.log

# The shipped configuration that gives these processes and this precision on a CPU.
CPU_CONFIGS = {(1, "no"): "cpu.yaml", (1, "bf16"): "cpu_bf16.yaml", (2, "no"): "cpu_2proc.yaml"}


@dataclass(frozen=True)
class Setting:
    """What runs share that differ by their seed alone: the changes to the base recipe, and the machine's precision."""

    changes: dict[str, Any]
    config: str  # of accelerate
    processes: int

    @property
    def name(self) -> str:
        """The changes that shape the result: settings of one name give the same runs."""
        shaping = {name: value for name, value in self.changes.items() if FIELDS[name].metadata["shapes_result"]}
        words = [f"{name}={show(value)}" for name, value in shaping.items()] or ["the recipe as it is"]
        if self.config != f"accelerate_configs/{CPU_CONFIGS[1, 'no']}":
            words.append(f"with {Path(self.config).name}")
        return ", ".join(words)

    def command(self, recipe: str, threads: int, seeds: Sequence[int]) -> str:
        """The command of its runs as one types it. With several seeds, or another than the recipe's, `--seed` is
        among the options, as SEED where there are several."""
        options = [f"--{name} {quoted(value)}" for name, value in self.changes.items()]
        if list(seeds) != [load_recipe(["--recipe", recipe]).seed]:
            options.append(f"--seed {'SEED' if len(seeds) > 1 else seeds[0]}")
        variables = " ".join(f"{name}={value}" for name, value in launch_variables(self.processes, threads).items())
        launch = f"accelerate launch --config_file {self.config} run_clm_owt.py --recipe {recipe}"
        return " ".join([variables, launch, *options])


def quoted(value: Any) -> str:
    """A setting as one types it, each of several values as a word."""
    return shlex.join(map(str, value)) if isinstance(value, list) and value else shlex.quote(show(value))


def launch_variables(processes: int, threads: int) -> dict[str, str]:
    """The environment of a launch. The number of threads decides in which order a sum is taken."""
    several = {"ACCELERATE_USE_CPU": "true"} if processes > 1 else {}
    return {"OMP_NUM_THREADS": str(threads)} | several


@dataclass(frozen=True)
class NewRecord:
    """What a record is made of.

    runs: folders of finished runs, the reference's first; tuning: those by which the settings were chosen, which are
    shown and do not count; table: of the board, None for a result that is not on it; recipe: the one that the runs
    change; logs: a folder with `<run>.log`; machine: `threads` and `cores`, for runs whose plan.json does not have
    them; config: accelerate's configuration, where the runs were not launched with a shipped one for a CPU; spread_of:
    NAME/RUN, a run of another record: the deviation over seeds of its setting holds for single runs, too;
    report: the folder of a study or sweep, whose report, tables and pictures are kept as `report/`.
    """

    claim: str
    table: str | None
    recipe: str
    runs: Sequence[Path]
    tuning: Sequence[Path] = ()
    logs: Path | None = None
    machine: Mapping[str, int] = dataclasses.field(default_factory=dict)
    config: str | None = None
    spread_of: str | None = None
    report: Path | None = None


def record_folder(records: Path, name: str) -> Path:
    """Raises InputError for a name that is not that of one folder in `records`, such as `..`."""
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise InputError(f"NAME: {name!r} does not work; expected letters, digits, `_`, `-`, and `.` after the first")
    return records / name


def add_record(records: Path, name: str, new: NewRecord, replace: bool = False) -> dict[str, Any]:
    """Write the record `name` to the folder `records`; gives what is in its record.yaml. Raises InputError for runs of
    which it cannot be made, and for a name that is taken, unless it is that of a record and `replace`."""
    folder = record_folder(records, name)
    if folder.exists() and not replace:
        raise InputError(f"{folder} is there already; give another name, or --replace")
    if folder.exists() and not (folder / "record.yaml").is_file():
        raise InputError(f"--replace: {folder} has no record.yaml; give another name, or move it away")
    runs, tuning = ([read_finished(run) for run in folders] for folders in (new.runs, new.tuning))
    content = describe_record(new, records, runs, tuning)
    names = [run.name for run in (*runs, *tuning)]
    if len(set(names)) < len(names):
        raise InputError(f"--runs: several are named {max(names, key=names.count)}; each needs a name of its own")
    for run in (*runs, *tuning) if new.logs else ():
        if not (log := log_of(run, new.logs)).is_file():
            raise InputError(f"--logs: there is no {log}")
    reported = report_files(new.report) if new.report else []
    with replacing_folder(folder) as aside:
        for run in (*runs, *tuning):
            copy_run(run, aside / "runs" / run.name, new.logs)
        for file in reported:
            (aside / "report").mkdir(exist_ok=True)
            shutil.copyfile(file, aside / "report" / file.name)
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
        (aside / "record.yaml").write_text(text, encoding="utf-8")
    return content


def read_record(folder: Path) -> dict[str, Any]:
    """The record.yaml of a record. Raises InputError where there is none, with the names of those that are."""
    path = folder / "record.yaml"
    if not path.is_file():
        there = ", ".join(record.name for record in record_folders(folder.parent)) or "none"
        raise InputError(f"there is no record {folder.name} in {folder.parent}; there are: {there}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if lacking := lacking_in(content, RECORD_SHAPE):
        raise InputError(
            f"{path} is no record, {lacking} is missing or of another kind; expected what `scripts/record.py add` "
            "writes; restore the file, or record the runs again with --replace"
        )
    return content


# What is read of a record.yaml: of a mapping its keys, of a list, which is not empty, what each of its entries is.
RECORD_SHAPE = {
    "claim": str,
    "table": str | None,
    "settings": [
        {
            "name": str,
            "config_file": str,
            "loss": float,
            "standard_deviation": float | None,
            "runs": [{"run": str, "seed": int, "loss": float, "step": int}],
        }
    ],
    "environment": {"machine": {"threads": int}, "token_store": str},
}


def lacking_in(content: Any, shape: Any, name: str = "all of it") -> str | None:
    """The name of the first part that is not of its shape, as `settings[0].runs`; None where all are."""
    if isinstance(shape, dict):
        if not isinstance(content, dict):
            return name
        prefix = "" if name == "all of it" else f"{name}."
        parts = [(content.get(key), inner, f"{prefix}{key}") for key, inner in shape.items()]
    elif isinstance(shape, list):
        if not isinstance(content, list) or not content:
            return name
        parts = [(entry, shape[0], f"{name}[{i}]") for i, entry in enumerate(content)]
    else:
        return None if isinstance(content, shape) else name
    return next(filter(None, (lacking_in(*part) for part in parts)), None)


def record_folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/record.yaml"))


# What is read of runs


def read_finished(folder: Path) -> RunRecord:
    """Raises InputError for a folder without a run, for one that is not finished, and for one that began with the
    weights of another run or model, and that no single command repeats."""
    run = RunRecord.read(folder)
    if "finished" not in run.plan or not run.validation:
        raise InputError(f"{folder}: the run is not finished; the same command that began it continues it")
    for name in ("branch_from", "init_from"):
        if run.recipe.get(name) and not (name == "branch_from" and left_before_the_decay(run)):
            raise InputError(f"{folder}: {name} {run.recipe[name]}: the run has no beginning of its own to repeat")
    if lacking := [name for name in ("micro_batch_search", "environment", "store") if name not in run.plan]:
        raise InputError(f"{folder}: plan.json lacks {lacking[0]}: it is of an older version, or none of this program")
    return run


def left_before_the_decay(branch: RunRecord) -> bool:
    """Whether a branch is, to the bit, the run that its recipe gives without a trunk: it left a trunk of the same
    settings, but for length and decay, while the rate of `wsd` was constant. Raises InputError without the trunk."""
    trunk = read_recipe(Path(branch.recipe["branch_from"]).parent.parent)
    may_differ = ("branch_from", "decay_share", "max_steps", "num_train_epochs")
    shaping = [name for name, field in FIELDS.items() if field.metadata["shapes_result"] and name not in may_differ]
    same = all(trunk.get(name, default_of(name)) == branch.recipe.get(name, default_of(name)) for name in shaping)
    shared = range(branch.recipe["warmup_steps"] + 1, branch.plan["resumed_after"][0] + 1)
    rates = [row["learning_rate"] for row in branch.train if row["step"] in shared]
    return same and branch.recipe["lr_schedule"] == "wsd" and set(rates) == {branch.recipe["learning_rate"]}


def setting_of(run: RunRecord, base: Mapping[str, Any], config: str | None) -> Setting:
    """Raises InputError where no shipped configuration is known for the run's processes and precision."""
    own = {name: run.recipe.get(name, default_of(name)) for name in FIELDS if name not in {*NOT_RECORDED, "seed"}}
    machine = run.plan["micro_batch_search"]["machine"]
    known = CPU_CONFIGS.get((machine["processes"], machine["mixed_precision"]))
    if config is None and (machine["device_type"] != "cpu" or known is None):
        raise InputError(
            f"{run.folder}: {machine['processes']} processes on {machine['device_type']}, mixed_precision "
            f"{machine['mixed_precision']}: name the configuration that it was launched with, --config_file FILE"
        )
    changes = {name: value for name, value in own.items() if value != base[name]}
    return Setting(changes, config or f"accelerate_configs/{known}", machine["processes"])


def environment_of(run: RunRecord, machine: Mapping[str, int]) -> dict[str, Any]:
    """Commit, packages and machine of a run. Raises InputError where cores or threads are not known."""
    found = run.plan["environment"]
    numbers = {name: found.get(name, machine.get(name)) for name in ("cores", "threads")}
    if missing := [f"--{name}" for name, number in numbers.items() if number is None]:
        raise InputError(f"{run.folder}: plan.json does not say on how many it ran; give {' and '.join(missing)}")
    return {
        "git_commit": found["git_commit"],
        "python": found["python"],
        "packages": found["packages"],
        "machine": {"processor": found["device"], **numbers},
        "token_store": run.plan["store"],
    }


def figure(run: RunRecord, table: str | None) -> Row:
    """The validation row that a table's figure is taken from. Raises InputError where the run has none."""
    if table != "minutes":
        tokens = run.validation[-1]["tokens"]
        if table is not None and tokens != BOARD_TOKENS:
            raise InputError(f"{run.folder}: {tokens:,} tokens; the board compares runs of {BOARD_TOKENS:,}")
        return run.validation[-1]
    in_time = [row for row in run.validation if row.get("elapsed_seconds", float("inf")) <= 60 * BOARD_MINUTES]
    if not in_time or not in_time[-1]["step"]:
        raise InputError(
            f"{run.folder}: no validation in its metrics.jsonl is known to have ended within {BOARD_MINUTES} minutes"
        )
    return in_time[-1]


# What is written


def describe_record(
    new: NewRecord, folder: Path, runs: Sequence[RunRecord], tuning: Sequence[RunRecord]
) -> dict[str, Any]:
    """What stands in record.yaml."""
    base = load_recipe(["--recipe", new.recipe]).to_dict()
    environments = {run.name: environment_of(run, new.machine) for run in (*runs, *tuning)}
    shared = shared_environment(environments)
    threads = shared["machine"]["threads"]
    if new.table is not None:
        check_comparable(new.table, shared, folder)
    groups: dict[str, tuple[Setting, list[RunRecord]]] = {}
    for run in runs:
        setting = setting_of(run, base, new.config)
        groups.setdefault(setting.name, (setting, []))[1].append(run)
    settings = []
    for name, (setting, found) in groups.items():
        by_seed = {run.recipe["seed"]: run for run in found}
        if len(by_seed) < len(found):
            raise InputError(f"--runs: several runs of {name} have the same seed; keep one of each")
        rows = {seed: figure(run, new.table) for seed, run in sorted(by_seed.items())}
        losses = {seed: row["ce_loss"] for seed, row in rows.items()}
        settings.append(
            {
                "name": name,
                "command": setting.command(new.recipe, threads, list(losses)),
                "config_file": setting.config,
                "loss": round(statistics.fmean(losses.values()), 6),
                **spread(losses, new.spread_of, folder),
                "runs": [run_entry(by_seed[seed], row) for seed, row in rows.items()],
            }
        )
    content = {"claim": new.claim, "table": new.table, "recipe": new.recipe, "settings": settings}
    if len(settings) > 1:
        content["comparison"] = compare_settings(settings)
    if tuning:
        content["tuning"] = [
            {"setting": setting_of(run, base, new.config).name, **run_entry(run, figure(run, new.table))}
            for run in tuning
        ]
    return content | {"date": date_of(runs), "environment": shared}


def shared_environment(environments: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """That of the first run. Raises InputError where another run's is not the same."""
    (first, shared), *others = environments.items()
    for name, other in others:
        if changes := environment_changes(shared, other):
            raise InputError(f"--runs: {first} and {name} ran on different ground: {', '.join(changes)}")
    return shared


def environment_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two environments, as `torch 2.13.0 -> 2.14.0`."""
    changes = []
    for name, value in before.items():
        now = after.get(name)
        if isinstance(value, Mapping):
            changes += environment_changes(value, now or {})
        elif value != now:
            changes.append(f"{name} {str(value)[:24]} -> {str(now)[:24]}")
    return changes


def check_comparable(table: str, environment: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError where the board's other results are of other data, and for minutes on another number of
    cores."""
    cores = environment["machine"]["cores"]
    if table == "minutes" and cores != BOARD_CORES:
        raise InputError(f"--table minutes: on {BOARD_CORES} cores; these runs had {cores}")
    for record in map(read_record, record_folders(folder)):
        store = record["environment"]["token_store"]
        if record["table"] is not None and store != environment["token_store"]:
            raise InputError(
                f"--table {table}: these runs read the token store {environment['token_store']}, those of the board "
                f"{store}: another text, or another Python or package whose docstrings it is; leave --table out"
            )


def spread(losses: Mapping[int, float], spread_of: str | None, folder: Path) -> dict[str, Any]:
    """The standard deviation over seeds: the runs' own or, of a single run, that of another record's setting."""
    if len(losses) > 1:
        return {"standard_deviation": round(statistics.stdev(losses.values()), 6)}
    if spread_of is None:
        return {"standard_deviation": None}
    name, _, run = spread_of.partition("/")
    for setting in read_record(folder / name)["settings"]:
        if len(setting["runs"]) > 1 and run in [entry["run"] for entry in setting["runs"]]:
            return {"standard_deviation": setting["standard_deviation"], "standard_deviation_of": spread_of}
    raise InputError(
        f"--spread_of: {spread_of} is no run of several seeds; expected NAME/RUN, as in records/NAME/runs/"
    )


def run_entry(run: RunRecord, row: Row) -> dict[str, Any]:
    entry = {"run": run.name, "seed": run.recipe["seed"], "loss": row["ce_loss"], "step": row["step"]}
    return entry | {name: row[name] for name in ("tokens", "elapsed_seconds") if name in row}


def compare_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The difference of each setting to the first one, over the seeds that both have."""
    if any(len(setting["runs"]) > 1 for setting in settings):
        check_intervals_can_be_computed()
    reference = settings[0]["name"]
    losses = {setting["name"]: {run["seed"]: run["loss"] for run in setting["runs"]} for setting in settings}
    differences = {}
    for name, difference in compare(losses, reference).items():
        interval = [round(difference.low, 6), round(difference.high, 6)] if difference.pairs > 1 else None
        differences[name] = {"mean": round(difference.mean, 6), "interval_95": interval, "pairs": difference.pairs,
                             "beyond_chance": difference.beyond_chance}  # fmt: skip
    return {"reference": reference, "differences": differences}


def date_of(runs: Iterable[RunRecord]) -> str:
    """The day on which the last of them ended."""
    ended = max((run.folder / "plan.json").stat().st_mtime for run in runs)
    return time.strftime("%Y-%m-%d", time.gmtime(ended))


def copy_run(run: RunRecord, target: Path, logs: Path | None) -> None:
    """What a record keeps of a run, without the places of the machine that it ran on."""
    target.mkdir(parents=True)
    recipe = run.recipe | {name: default_of(name) for name in NOT_RECORDED if name in run.recipe}
    recipe |= {"run_name": run.name, "output_dir": f"runs/{run.name}"}
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    (target / "recipe.yaml").write_text(text, encoding="utf-8")
    (target / "plan.json").write_text(json.dumps(run.plan, indent=2) + "\n", encoding="utf-8")
    rows = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    if sum(map(len, rows)) > WHOLE_METRICS_BYTES:
        rows = thinned(rows)
    (target / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
    if logs is not None:
        printed = log_of(run, logs).read_text(encoding="utf-8", errors="replace")
        (target / "log.txt").write_text(without_places(printed, run), encoding="utf-8")


def report_files(folder: Path) -> list[Path]:
    """Of a study or sweep, without the output of its runs. Raises InputError where there are none."""
    files = [file for file in folder.glob("*") if file.suffix in REPORT_FILES or file.name == "study.log"]
    if not files:
        raise InputError(f"--report: {folder} holds no report; expected runs/studies/NAME or runs/sweeps/NAME")
    return sorted(files)


def log_of(run: RunRecord, logs: Path) -> Path:
    return logs / f"{run.name}.log"


def thinned(lines: Sequence[str]) -> list[str]:
    """Every validation row, and every KEPT_TRAINING_ROWS-th of the training."""
    kept, trained = [], 0
    for line in lines:
        is_training = json.loads(line)["split"] == "train"
        trained += is_training
        if not is_training or trained % KEPT_TRAINING_ROWS == 0:
            kept.append(line)
    return kept


def without_places(text: str, run: RunRecord) -> str:
    """A log whose paths say nothing of the machine: the run's folder is `runs/<name>`, and other absolute paths keep
    their last part."""
    text = text.replace(os.path.abspath(run.recipe["output_dir"]), f"runs/{run.name}")
    return re.sub(r"(?<![\w:/~.<>*-])/(?:[^\s/'\"]+/)+", "…/", text)
