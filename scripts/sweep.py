"""Run a W&B sweep file on this machine, without a server or an account.

python scripts/sweep.py recipes/sweeps/lambda_quickstart.yaml
python scripts/sweep.py recipes/sweeps/lambda_owt.yaml --gpus 0,1,2,3      one run on each GPU, side by side
python scripts/sweep.py recipes/sweeps/lambda_owt.yaml --dry_run           the commands, one a line
python scripts/sweep.py recipes/sweeps/lr_owt.yaml --max_steps 1000        further options go to every run

A grid is run in order; `random` and `bayes` sample `run_cap` runs through Optuna. Each run has its own folder, as if
started by hand: started again, the sweep keeps finished runs and continues unfinished ones. With `early_terminate` in
the file, a sampled run whose validation loss is behind the median of the others at the same step is stopped (W&B's
agents use Hyperband). The table at the end is sorted by validation cross-entropy, which means the same whatever the
penalty is; its picture has error bars: give `seed` several values, and they are of the seeds. `report_to` in the file
is for W&B's agents and left out here.
"""

import argparse
import contextlib
import csv
import itertools
import math
import os
import queue
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clm_owt.errors import InputError, RecipeError
from clm_owt.files import write_text
from clm_owt.formatting import format_clock, format_duration, text_table
from clm_owt.program import run_script
from clm_owt.recipe import Recipe, show
from clm_owt.recipe_reader import StrictLoader, load_recipe
from clm_owt.reports.record import Row, RunRecord, read_metrics, read_plan, read_recipe, split_rows
from clm_owt.reports.sweep_picture import save_sweep_picture

METHODS = ("grid", "random", "bayes")
POLL_SECONDS = 1.0
ERROR_LINES = 3  # of a failed run's log
# A training that was told to stop saves itself first; GPT-2's larger sizes take a minute on a slow disk.
SECONDS_FOR_A_SAVE = 600.0
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
        return ", ".join(f"{name}={show(value)}" for name, value in self.options.items())

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


def read_sweep(path: Path, run_cap: int | None = None) -> Sweep:
    """Raises InputError with everything in the file that cannot be run here."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as a sweep: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected W&B's sweep format, with program, method and parameters")
    problems = []
    method = content.get("method")
    if method not in METHODS:
        problems.append(f"{path}: method: {method!r} does not work; expected one of {', '.join(METHODS)}")
    parameters = content.get("parameters") or {}
    fixed = {name: p["value"] for name, p in parameters.items() if "value" in p and name != "report_to"}
    searched = {name: p for name, p in parameters.items() if "value" not in p}
    if not searched:
        problems.append(f"{path}: parameters: nothing to search; give one of them `values`, or `min` and `max`")
    for name, parameter in searched.items():
        if method == "grid" and "values" not in parameter:
            problems.append(f"{path}: {name}: a grid needs `values`")
        elif method != "grid":
            try:
                distribution(name, parameter)
            except InputError as error:
                problems.append(f"{path}: {error}")
    for name in ("output_dir", "run_name"):
        if name in parameters:
            problems.append(f"{path}: {name}: every run of a sweep needs its own; leave it out")
    run_cap = run_cap or content.get("run_cap")
    if method in ("random", "bayes") and not run_cap:
        problems.append(f"{path}: run_cap: missing; how many runs is a {method} search to try?")
    if problems:
        raise InputError("\n".join(problems))
    early = content.get("early_terminate")
    return Sweep(
        name=path.stem,
        method=method,
        fixed=fixed,
        searched=searched,
        command=content.get("command") or ["${env}", "${interpreter}", "${program}", "${args}"],
        program=content.get("program", "run_clm_owt.py"),
        run_cap=run_cap,
        first_pruned_validation=None if early is None else early.get("min_iter", 1),
    )


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
    match kind:
        case "int_uniform":
            return IntDistribution(low, high)
        case "uniform":
            return FloatDistribution(low, high)
        case "log_uniform_values":
            return FloatDistribution(low, high, log=True)
        case "q_uniform":
            return FloatDistribution(low, high, step=parameter.get("q", 1))
    raise InputError(
        f"{name}: distribution {kind!r} is unknown here; expected int_uniform, uniform, log_uniform_values, q_uniform"
    )


def grid(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every combination of the searched values, the last parameter fastest."""
    for values in itertools.product(*(parameter["values"] for parameter in sweep.searched.values())):
        yield dict(zip(sweep.searched, values, strict=True))


def to_arguments(options: dict[str, Any]) -> list[str]:
    """As W&B's agents pass them: `--penalty_weight=0.01`."""
    return [f"--{name}={show(value)}" for name, value in options.items()]


def plan_run(sweep: Sweep, searched: dict[str, Any], extra: list[str]) -> SweptRun:
    """Raises RecipeError where these values make no recipe."""
    arguments = [*to_arguments(sweep.fixed | searched), *extra]
    return SweptRun(searched, arguments, load_recipe(arguments))


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


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and a closed terminal set, instead of ending the sweep at once."""
    interrupted = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {s: signal.signal(s, lambda *_: interrupted.set()) for s in signals}
    try:
        yield interrupted
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def execute(
    command: list[str],
    log: Path,
    gpu: str | None,
    interrupted: threading.Event,
    is_hopeless: Callable[[], bool] = lambda: False,
) -> int | None:
    """Run a command, its output to `log`; gives its exit status, or None where it was ended because `is_hopeless`.

    The command has a process group of its own, so that the training ends with its launcher. An interrupted one saves
    itself, which is waited for also where its launcher has left before, and is continued the next time.
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        ended = False
        while process.poll() is None:
            if not ended and (interrupted.is_set() or is_hopeless()):
                ended = True
                os.killpg(process.pid, signal.SIGTERM)  # a training saves itself first
            time.sleep(POLL_SECONDS / 10)
        wait_for_group(process.pid)
    return None if ended and not interrupted.is_set() else process.returncode


def error_in(text: str) -> str:
    """What of the output of a failed run tells why: the program's own `error:` lines or, without any, the last line of
    a traceback that is not the launcher's, or the last line of all."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in text.splitlines() if line.strip()]
    own = list(dict.fromkeys(line for line in lines if line.startswith("error: ")))
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    of_program = [line for line in raised if not re.match(r"subprocess\.CalledProcessError|torch\.distributed", line)]
    return "\n".join(own[:ERROR_LINES] or of_program[-1:] or lines[-1:])


def wait_for_group(group: int) -> None:
    """Until no process of a process group is left, for SECONDS_FOR_A_SAVE at most."""
    deadline = time.monotonic() + SECONDS_FOR_A_SAVE
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(POLL_SECONDS / 10)
        print(f"process group {group} is still there after {SECONDS_FOR_A_SAVE:.0f} s, and left alone", flush=True)


class LocalSweep:
    """A sweep's runs on this machine. `gpus`: one run at a time on each; [None]: one at a time on all there is."""

    def __init__(
        self, sweep: Sweep, extra: list[str], gpus: list[str | None], folder: Path, interrupted: threading.Event
    ):
        self.sweep, self.extra, self.folder, self.interrupted = sweep, extra, folder, interrupted
        self.places = gpus
        self.free: queue.Queue[str | None] = queue.Queue()
        for gpu in gpus:
            self.free.put(gpu)
        self.runs: list[SweptRun] = []
        self.total = 0  # of the whole sweep
        self.ended = 0
        self.seconds: list[float] = []  # that runs took here, the launcher's included

    def carry_out(self, run: SweptRun, is_hopeless: Callable[[], bool] = lambda: False) -> None:
        """Run or continue `run` on the next free place, unless it has finished before."""
        gpu = self.free.get()
        try:
            if self.interrupted.is_set():
                return
            name = f"[{self.runs.index(run) + 1}/{self.total}] {run.label}"
            run.read_folder()
            if run.status == "finished":
                self.ended += 1
                print(f"{name}: finished before, kept{describe_loss(run)}", flush=True)
                return
            log = self.folder / f"{run.recipe.run_name}.log"
            print(f"{name}: running, output in {log}{self.time_left()}", flush=True)
            written_before, began = log.stat().st_size if log.exists() else 0, time.monotonic()
            status = execute(run_command(self.sweep, run, gpu), log, gpu, self.interrupted, is_hopeless)
            seconds = time.monotonic() - began
            run.read_folder()
            if status is None:
                run.status = "stopped early"
            elif status != 0 or run.status != "finished":
                run.status = "interrupted" if self.interrupted.is_set() else f"failed ({status})"
            self.ended += 1
            if run.status == "finished":
                self.seconds.append(seconds)
            print(f"{name}: {run.status}{describe_loss(run)}, {format_clock(seconds)}{self.time_left()}", flush=True)
            if run.status.startswith("failed"):
                error = error_in(log.read_bytes()[written_before:].decode(errors="replace"))
                print(*(f"    {line}" for line in error.splitlines()), sep="\n", flush=True)
        finally:
            self.free.put(gpu)

    def time_left(self) -> str:
        """How long the runs that are left will take, if each takes as long as those that have finished."""
        known = self.seconds or [run.seconds for run in self.runs if run.status == "finished"]
        left = math.ceil((self.total - self.ended) / len(self.places))
        return f"; about {format_duration(left * statistics.fmean(known))} left" if known and left else ""

    def run_grid(self) -> None:
        """Every combination of the searched values."""
        self.runs = plan_grid(self.sweep, self.extra)
        self.total = len(self.runs)
        with ThreadPoolExecutor(len(self.places)) as pool:
            list(pool.map(self.carry_out, self.runs))

    def run_search(self) -> None:
        """Random or Bayesian search; the study's database in the sweep's folder remembers what was tried."""
        study = open_study(self.sweep, self.folder)
        self.lock = threading.Lock()
        waiting = [trial for trial in study.trials if not trial.state.is_finished()]
        for trial in study.trials:
            if trial.state.is_finished():
                run = plan_run(self.sweep, trial.params, self.extra)
                run.status = trial.user_attrs["status"]
                run.read_folder()
                self.runs.append(run)
        self.total, self.ended = max(self.sweep.run_cap, len(study.trials)), len(self.runs)
        tries = waiting + [None] * (self.sweep.run_cap - len(study.trials))
        with ThreadPoolExecutor(len(self.places)) as pool:
            list(pool.map(lambda trial: self.carry_out_trial(study, trial), tries))

    def carry_out_trial(self, study, begun) -> None:
        """One trial of a study: `begun` before and not finished, or None for a new one."""
        import optuna

        if self.interrupted.is_set():
            return
        with self.lock:
            if begun is None:
                space = {name: distribution(name, parameter) for name, parameter in self.sweep.searched.items()}
                trial = study.ask(space)
            else:
                trial = optuna.trial.Trial(study, begun._trial_id)
            run = plan_run(self.sweep, trial.params, self.extra)
            self.runs.append(run)
        reported = set(begun.intermediate_values) if begun is not None else set()

        def report_validations() -> None:
            for row in run.validations():
                if row["step"] not in reported:
                    reported.add(row["step"])
                    trial.report(row["ce_loss"], row["step"])

        def is_behind_the_others() -> bool:
            report_validations()
            return self.sweep.first_pruned_validation is not None and bool(reported) and trial.should_prune()

        self.carry_out(run, is_behind_the_others)
        report_validations()
        if run.status in ("interrupted", "not started"):
            return
        trial.set_user_attr("status", run.status)
        match run.status:
            case "finished":
                study.tell(trial, run.measures["ce_loss"])
            case "stopped early":
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            case _:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)


def plan_grid(sweep: Sweep, extra: list[str]) -> list[SweptRun]:
    """All runs of a grid. Raises InputError, before any of them starts, with what is wrong with all of them."""
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


def open_study(sweep: Sweep, folder: Path):
    """The sweep's Optuna study, begun or continued."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.NopPruner()
    if sweep.first_pruned_validation is not None:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=sweep.first_pruned_validation)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'optuna.db'}",
        study_name=sweep.name,
        pruner=pruner,
        direction="minimize",
        load_if_exists=True,
    )
    # A continued search must not draw again what it has drawn.
    sampler = {"random": optuna.samplers.RandomSampler, "bayes": optuna.samplers.TPESampler}[sweep.method]
    study.sampler = sampler(seed=42 + len(study.trials))
    return study


def describe_loss(run: SweptRun) -> str:
    return f", validation {run.measures['ce_loss']:.4f}" if run.measures else ""


def by_loss(run: SweptRun) -> tuple[bool, float]:
    """Sorts finished runs by their loss, those without one last among them, and behind them all others."""
    loss = run.measures.get("ce_loss", math.inf)
    return run.status != "finished", loss if math.isfinite(loss) else math.inf


def table_row(sweep: Sweep, run: SweptRun) -> list[str]:
    """The searched values, MEASURES, minutes and status of a run."""
    options = [show(run.options[name]) for name in sweep.searched]
    values = [run.measures.get(name, "") for name in MEASURES]
    measures = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in values]
    minutes = "" if math.isnan(run.seconds) else f"{run.seconds / 60:.1f}"
    return [*options, *measures, minutes, run.status]


def report(sweep: Sweep, runs: list[SweptRun], folder: Path) -> None:
    """Print the table, the best run first; write it as text, CSV and picture, and the best run's recipe."""
    header = [*sweep.searched, *MEASURES, "minutes", "status"]
    rows = [table_row(sweep, run) for run in sorted(runs, key=by_loss)]
    table = text_table(header, rows)
    print("", table, sep="\n")
    write_text(folder / "table.txt", table + "\n")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    finished = [run for run in runs if by_loss(run) < (False, math.inf)]
    if not finished:
        return
    best = min(finished, key=by_loss)
    settings = read_recipe(best.folder)
    settings = {name: value for name, value in settings.items() if name not in ("run_name", "output_dir")}
    chosen = ", ".join(f"{name}: {show(value)}" for name, value in best.options.items())
    write_text(
        folder / "best.yaml",
        f"# The best of the sweep {sweep.name}: {chosen}; validation cross-entropy {best.measures['ce_loss']:.4f}\n"
        + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    )
    title = f"{sweep.name}: validation at the end of {len(finished)} runs, lowest {best.measures['ce_loss']:.4f}"
    if len(finished) < len(runs):
        title += f"; {len(runs) - len(finished)} did not finish"
    points = [(run.options, RunRecord.read(run.folder)) for run in finished]
    save_sweep_picture(title, points, folder / "table.png")
    print(f"\nBest: {chosen}; its recipe in {folder / 'best.yaml'}, the table in {folder}/table.{{txt,csv,png}}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("sweep", type=Path, help="a file in W&B's sweep format")
    parser.add_argument("--gpus", default="", help="GPUs to use, one run on each: 0,1,2,3")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, one a line, and stop")
    parser.add_argument("--run_cap", type=int, help="runs of a random or Bayesian search; wins over the file")
    options, extra = parser.parse_known_args(argv)
    sweep = read_sweep(options.sweep, options.run_cap)
    gpus = options.gpus.split(",") if options.gpus else [None]
    if options.dry_run:
        if sweep.method != "grid":
            raise InputError(
                f"{options.sweep}: the runs of a {sweep.method} search are not known before; --dry_run needs a grid"
            )
        for run in plan_grid(sweep, extra):
            print(shlex.join(run_command(sweep, run, gpus[0])))
        return 0
    folder = Path("runs/sweeps") / sweep.name
    folder.mkdir(parents=True, exist_ok=True)
    with interruption() as interrupted:
        local = LocalSweep(sweep, extra, gpus, folder, interrupted)
        local.run_grid() if sweep.method == "grid" else local.run_search()
    report(sweep, local.runs, folder)
    if interrupted.is_set():
        print("Interrupted; the same command continues.")
        return 128 + signal.SIGINT
    failed = [run for run in local.runs if run.status.startswith("failed")]
    for run in failed:
        print(f"failed: {run.label}: see {folder / run.recipe.run_name}.log", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
