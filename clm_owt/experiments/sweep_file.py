"""From a file in W&B's sweep format to the runs that it means, each with its recipe and its command."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clm_owt.errors import InputError, RecipeError
from clm_owt.formatting import format_value
from clm_owt.recipe import Recipe, show
from clm_owt.recipe_reader import StrictLoader, load_recipe
from clm_owt.reports.record import Row, read_metrics, read_plan, split_rows

METHODS = ("grid", "random", "bayes")
MEASURES = ("step", "ce_loss", "perplexity", "max_prob", "entropy")


@dataclass(frozen=True)
class Sweep:
    """A sweep file: `fixed` options, and `searched` ones, by name."""

    name: str
    method: str
    fixed: dict[str, Any]
    searched: dict[str, dict[str, Any]]
    command: list[str]
    program: str
    run_cap: int | None
    first_pruned_validation: int | None  # None: no run is stopped early

    @property
    def has_seeds(self) -> bool:
        """Whether its configurations are repeated with several seeds."""
        return self.method == "grid" and "seed" in self.searched


@dataclass
class SweptRun:
    """One run of a sweep: the searched options, all that its command is given, what this makes, and how it went."""

    options: dict[str, Any]
    arguments: list[str]
    recipe: Recipe
    status: str = "not started"
    measures: dict[str, float] = field(default_factory=dict)  # of the last validation
    seconds: float = math.nan

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    @property
    def label(self) -> str:
        return describe_options(self.options)

    @property
    def loss(self) -> float:
        """The validation cross-entropy of a finished run; infinite for any other, and where it is not finite."""
        loss = self.measures.get("ce_loss", math.inf) if self.status == "finished" else math.inf
        return loss if math.isfinite(loss) else math.inf

    def validations(self) -> list[Row]:
        """The validation rows that the run has written so far."""
        return split_rows(read_metrics(self.folder / "metrics.jsonl"))[1]

    def read_folder(self) -> None:
        """Fill in how the run stands: its last validation and, where it has ended, its time."""
        for row in self.validations()[-1:]:
            self.measures = {name: row[name] for name in MEASURES if name in row}
        plan = read_plan(self.folder) if (self.folder / "plan.json").is_file() else {}
        if "finished" in plan:
            self.status, self.seconds = "finished", plan["elapsed_seconds"]


def describe_options(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={show(value)}" for name, value in options.items())


def read_sweep(path: Path, run_cap: int | None = None) -> Sweep:
    """Raises InputError with everything in the file that cannot be run here. `run_cap` wins over the file's."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as a sweep: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected W&B's sweep format, with program, method and parameters")
    if run_cap is not None:
        content["run_cap"] = run_cap
    if problems := shape_problems(content) or search_problems(content):
        raise InputError("\n".join(f"{path}: {problem}" for problem in problems))
    parameters = content["parameters"]
    early = content.get("early_terminate")
    return Sweep(
        name=path.stem,
        method=content["method"],
        fixed={name: p["value"] for name, p in parameters.items() if "value" in p and name != "report_to"},
        searched={name: p for name, p in parameters.items() if "value" not in p},
        command=content.get("command") or ["${env}", "${interpreter}", "${program}", "${args}"],
        program=content.get("program") or "run_clm_owt.py",
        run_cap=content.get("run_cap"),
        first_pruned_validation=None if early is None else early.get("min_iter", 1),
    )


def shape_problems(content: dict[str, Any]) -> list[str]:
    """What of a sweep file is not of the form that W&B's format gives it."""

    def is_count(value: Any) -> bool:
        return type(value) is int and value > 0

    def is_words(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(word, str) for word in value)

    def is_early_termination(value: Any) -> bool:
        return isinstance(value, dict) and is_count(value.get("min_iter", 1))

    expected = {
        "run_cap": (is_count, "a whole number of at least 1"),
        "early_terminate": (is_early_termination, "a `type` and a `min_iter` of at least 1"),
        "command": (is_words, "a list of words"),
        "program": (lambda value: isinstance(value, str), "the name of a file"),
    }
    problems = [
        f"{name}: {format_value(content[name])} does not work; expected {text}"
        for name, (is_right, text) in expected.items()
        if content.get(name) is not None and not is_right(content[name])
    ]
    parameters = content.get("parameters")
    if not isinstance(parameters, dict):
        found = format_value(parameters)
        return [
            *problems,
            f"parameters: {found} does not work; expected names, each with `value`, `values`, or `min` and `max`",
        ]
    for name, parameter in parameters.items():
        if not isinstance(parameter, dict):
            value = format_value(parameter)
            problems.append(f"{name}: {value} does not work; expected `value: {value}`, `values`, or `min` and `max`")
        elif "values" in parameter and not (isinstance(parameter["values"], list) and parameter["values"]):
            problems.append(
                f"{name}: values: {format_value(parameter['values'])} does not work; expected a list of values"
            )
    return problems


def search_problems(content: dict[str, Any]) -> list[str]:
    """Why a sweep of the right form makes no runs here."""
    problems = []
    method, parameters = content.get("method"), content["parameters"]
    if method not in METHODS:
        problems.append(f"method: {method!r} does not work; expected one of {', '.join(METHODS)}")
    searched = {name: p for name, p in parameters.items() if "value" not in p}
    if not searched:
        problems.append("parameters: nothing to search; give one of them `values`, or `min` and `max`")
    for name, parameter in searched.items():
        if method == "grid" and "values" not in parameter:
            problems.append(f"{name}: a grid needs `values`")
        elif method != "grid":
            try:
                distribution(name, parameter)
            except InputError as error:
                problems.append(str(error))
    for name in ("output_dir", "run_name"):
        if name in parameters:
            problems.append(f"{name}: every run of a sweep needs its own; leave it out")
    if method in ("random", "bayes") and not content.get("run_cap"):
        problems.append(f"run_cap: missing; how many runs is a {method} search to try?")
    return problems


def distribution(name: str, parameter: dict[str, Any]):
    """The Optuna distribution of a W&B parameter. Raises InputError for one that has none."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if "values" in parameter:
        return CategoricalDistribution(parameter["values"])
    low, high = parameter.get("min"), parameter.get("max")
    if low is None or high is None:
        raise InputError(f"{name}: expected value, values, or min and max")
    integers = isinstance(low, int) and isinstance(high, int)
    kind = parameter.get("distribution", "int_uniform" if integers else "uniform")
    try:
        match kind:
            case "int_uniform":
                return IntDistribution(low, high)
            case "uniform":
                return FloatDistribution(low, high)
            case "log_uniform_values":
                return FloatDistribution(low, high, log=True)
            case "q_uniform":
                return FloatDistribution(low, high, step=parameter.get("q", 1))
    except (TypeError, ValueError, ArithmeticError) as error:  # no numbers, the wrong way round, a logarithm of 0
        raise InputError(f"{name}: {kind} between {low} and {high} does not work ({error})") from error
    raise InputError(
        f"{name}: distribution {kind!r} is unknown here; expected int_uniform, uniform, log_uniform_values, q_uniform"
    )


def with_seeds(sweep: Sweep, count: int, extra: Sequence[str]) -> Sweep:
    """The grid with `count` seeds for each configuration, the same ones for all: that of the first configuration's
    recipe, and those after it. The seeds change slowest, so that a part of the sweep already has whole pairs.

    Raises InputError for a search, and for a sweep that has its seeds already.
    """
    if sweep.method != "grid":
        raise InputError(
            f"--seeds: a {sweep.method} search has no configurations to repeat; take method grid, or leave --seeds out"
        )
    if "seed" in sweep.searched:
        raise InputError(f"--seeds: {sweep.name} has `values` for seed already; keep one of the two")
    if count < 2:
        raise InputError(f"--seeds: {count} does not work; expected at least 2, or no --seeds for one seed each")
    first = plan_run(sweep, next(grid(sweep)), extra).recipe.seed
    seeds = {"values": list(range(first, first + count))}
    return dataclasses.replace(sweep, searched={"seed": seeds} | sweep.searched)


def grid(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every combination of the searched values, the last parameter fastest."""
    for values in itertools.product(*(parameter["values"] for parameter in sweep.searched.values())):
        yield dict(zip(sweep.searched, values, strict=True))


def to_arguments(options: dict[str, Any]) -> list[str]:
    """As W&B's agents pass them: `--penalty_weight=0.01`; several values of one option as words of their own."""
    words: list[str] = []
    for name, value in options.items():
        match value:
            case list():
                words += [f"--{name}", *map(show, value)]
            case dict():
                words += [f"--{name}", *(f"{key}={show(content)}" for key, content in value.items())]
            case _:
                words.append(f"--{name}={show(value)}")
    return words


def plan_run(sweep: Sweep, searched: dict[str, Any], extra: Sequence[str]) -> SweptRun:
    """Raises RecipeError where these values make no recipe."""
    arguments = [*to_arguments(sweep.fixed | searched), *extra]
    return SweptRun(searched, arguments, load_recipe(arguments))


def plan_grid(sweep: Sweep, extra: Sequence[str]) -> list[SweptRun]:
    """All runs of a grid. Raises InputError, before any of them starts, with what is wrong with all of them."""
    given = {word.partition("=")[0].lstrip("-") for word in extra if word.startswith("--")}
    if both := given & sweep.searched.keys():
        name = sorted(both)[0]
        raise InputError(f"--{name}: {sweep.name} tries several values of {name}; leave the option out")
    runs, problems = [], []
    for options in grid(sweep):
        try:
            runs.append(plan_run(sweep, options, extra))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    folders = [run.folder for run in runs]
    shared = {str(folder) for folder in folders if folders.count(folder) > 1}
    if shared:
        raise InputError(
            f"{sweep.name}: several runs would write to {', '.join(sorted(shared))}; leave output_dir out"
        )
    return runs


def run_command(sweep: Sweep, run: SweptRun, gpu: str | None) -> list[str]:
    """The command of a run, W&B's macros filled in. On one GPU of several it is started as a single process."""
    words: list[str] = []
    for word in sweep.command:
        match word:
            case "${env}":
                words.append("/usr/bin/env")
            case "${interpreter}":
                words.append(sys.executable)
            case "${program}":
                words.append(sweep.program)
            case "${args}":
                words += run.arguments
            case "launch" if gpu is not None:
                words += ["launch", "--num_processes", "1", "--main_process_port", "0"]
            case _:
                words.append(word)
    return words
