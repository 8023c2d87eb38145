"""Run a W&B sweep file on this machine, without a server or an account.

python scripts/sweep.py recipes/sweeps/lambda_quickstart.yaml
python scripts/sweep.py recipes/sweeps/lambda_quickstart.yaml --seeds 5    each configuration with five seeds
python scripts/sweep.py recipes/sweeps/lambda_owt.yaml --gpus 0,1,2,3      one run on each GPU, side by side
python scripts/sweep.py recipes/sweeps/lambda_owt.yaml --dry_run           the commands, one a line
python scripts/sweep.py recipes/sweeps/lr_owt.yaml --max_steps 1000        further options go to every run

A grid is run in order; `random` and `bayes` sample `run_cap` runs through Optuna. Each run has its own folder, as if
started by hand: started again, the sweep keeps finished runs and continues unfinished ones. With `early_terminate` in
the file, a sampled run whose validation loss is behind the median of the others at the same step is stopped (W&B's
agents use Hyperband). The table at the end is sorted by validation cross-entropy, which means the same whatever the
penalty is. `report_to` in the file is for W&B's agents and left out here.

With several seeds (--seeds, or `seed` with `values` in the file) a second table, comparison.csv, tells for each
configuration the mean over its seeds and the difference to the reference with its 95 % interval. The reference is the
first value of each parameter in the file: chosen before any run, since the best of many looks better than it is.
Differences are of equal seeds; one that failed leaves out its pair.
"""

import argparse
import math
import queue
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clm_owt.errors import InputError
from clm_owt.experiments.execution import error_in, execute, interruption
from clm_owt.experiments.sweep_file import (
    Sweep,
    SweptRun,
    distribution,
    plan_grid,
    plan_run,
    read_sweep,
    run_command,
    with_seeds,
)
from clm_owt.experiments.sweep_report import report
from clm_owt.formatting import format_clock, format_duration
from clm_owt.program import run_script
from clm_owt.reports.comparison import check_intervals_can_be_computed


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
            variables = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
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


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("sweep", type=Path, help="a file in W&B's sweep format")
    parser.add_argument("--seeds", type=int, metavar="N", help="run each configuration of a grid with so many seeds")
    parser.add_argument("--gpus", default="", help="GPUs to use, one run on each: 0,1,2,3")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, one a line, and stop")
    parser.add_argument("--run_cap", type=int, help="runs of a random or Bayesian search; wins over the file")
    options, extra = parser.parse_known_args(argv)
    sweep = read_sweep(options.sweep, options.run_cap)
    if options.seeds is not None:
        sweep = with_seeds(sweep, options.seeds, extra)
    if sweep.has_seeds:
        check_intervals_can_be_computed()
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
