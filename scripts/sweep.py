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
import shlex
import signal
import sys
from pathlib import Path

from clm_owt.errors import InputError
from clm_owt.experiments.execution import Places, interruption
from clm_owt.experiments.local_sweep import LocalSweep
from clm_owt.experiments.sweep_file import plan_grid, read_sweep, run_command, with_seeds
from clm_owt.experiments.sweep_report import report
from clm_owt.program import count, run_script
from clm_owt.reports.comparison import check_intervals_can_be_computed


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
    parser.add_argument("--run_cap", type=count, help="runs of a random or Bayesian search; wins over the file")
    options, extra = parser.parse_known_args(argv)
    sweep = read_sweep(options.sweep, options.run_cap)
    if options.seeds is not None:
        sweep = with_seeds(sweep, options.seeds, extra)
    if sweep.has_seeds:
        check_intervals_can_be_computed()
    places = Places(options.gpus)
    if options.dry_run:
        if sweep.method != "grid":
            raise InputError(
                f"{options.sweep}: the runs of a {sweep.method} search are not known before; --dry_run needs a grid"
            )
        for run in plan_grid(sweep, extra):
            print(shlex.join(run_command(sweep, run, places.names[0])))
        return 0
    folder = Path("runs/sweeps") / sweep.name
    folder.mkdir(parents=True, exist_ok=True)
    with interruption() as interrupted:
        local = LocalSweep(sweep, extra, places, folder, interrupted)
        if sweep.method == "grid":
            local.carry_out_all(plan_grid(sweep, extra))
        else:
            local.run_search()
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
