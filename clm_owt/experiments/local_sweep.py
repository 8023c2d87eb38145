"""The runs of a sweep on this machine, one on each place at a time; what was begun before is kept and continued."""

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from clm_owt.errors import InputError
from clm_owt.experiments.execution import Places, execute, print_error, size_of
from clm_owt.experiments.sweep_file import Sweep, SweptRun, distribution, plan_run, run_command, to_arguments
from clm_owt.formatting import format_clock, format_duration


class LocalSweep:
    """A sweep's runs on this machine, one at a time on each of `places`."""

    def __init__(self, sweep: Sweep, extra: list[str], places: Places, folder: Path, interrupted: threading.Event):
        self.sweep, self.extra, self.folder, self.interrupted = sweep, extra, folder, interrupted
        self.places = places
        self.runs: list[SweptRun] = []
        self.total = 0  # of the whole sweep
        self.ended = 0
        self.seconds: list[float] = []  # that runs took here, the launcher's included

    def carry_out(self, run: SweptRun, is_hopeless: Callable[[], bool] = lambda: False) -> None:
        """Run or continue `run` on the next free place, unless it has finished before."""
        with self.places.take() as (gpu, variables):
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
            written_before, began = size_of(log), time.monotonic()
            status = execute(run_command(self.sweep, run, gpu), log, variables, self.interrupted, is_hopeless)
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
                print_error(log, written_before)

    def time_left(self) -> str:
        """How long the runs that are left will take, if each takes as long as those that have finished."""
        known = self.seconds or [run.seconds for run in self.runs if run.status == "finished"]
        left = math.ceil((self.total - self.ended) / len(self.places))
        return f"; about {format_duration(left * statistics.fmean(known))} left" if known and left else ""

    def carry_out_all(self, runs: Sequence[SweptRun]) -> None:
        """The runs that are known beforehand, as those of a grid, in this order."""
        self.runs, self.total = list(runs), len(runs)
        self.places.for_each(self.carry_out, self.runs)

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
        self.places.for_each(lambda trial: self.carry_out_trial(study, trial), tries)

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
    check_same_search(sweep, study, folder)
    # A continued search must not draw again what it has drawn.
    sampler = {"random": optuna.samplers.RandomSampler, "bayes": optuna.samplers.TPESampler}[sweep.method]
    study.sampler = sampler(seed=42 + len(study.trials))
    return study


def check_same_search(sweep: Sweep, study, folder: Path) -> None:
    """Raises InputError where the trials of a continued search were of other settings: they cannot be compared."""
    from optuna.distributions import check_distribution_compatibility

    fixed = to_arguments(sweep.fixed)
    begun_with = study.user_attrs.get("fixed", fixed)
    different = [f"it was begun with {' '.join(begun_with)}"] if begun_with != fixed else []
    for name, before in [pair for trial in study.trials for pair in trial.distributions.items()]:
        try:
            check_distribution_compatibility(before, distribution(name, sweep.searched[name]))
        except (KeyError, ValueError):
            different.append(f"{name} was searched in {before}")
    if different:
        raise InputError(
            f"{folder}: another search of this name: {different[0]}; rename the sweep file, or remove the folder"
        )
    study.set_user_attr("fixed", fixed)


def describe_loss(run: SweptRun) -> str:
    return f", validation {run.measures['ce_loss']:.4f}" if run.measures else ""
