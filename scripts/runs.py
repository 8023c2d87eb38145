"""How runs stand: a table of all runs below one or several folders, also of those that were killed or hang.

    python scripts/runs.py                       # of all runs in runs/
    python scripts/runs.py runs/owt_512 --json   # of one, as JSON

With --requeue it says whether the run of a command line is worth another place in a queue: it is not finished, and
would not fail in the same way again. scripts/launch.slurm asks so. Exit status 0: it is, 1 or 2: not, with a line.

    python scripts/runs.py --requeue 3 --recipe recipes/owt_512.yaml
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from clm_owt.program import run_script
from clm_owt.recipe_reader import read_command_line
from clm_owt.reports.overview import find_runs, standing_of, table
from clm_owt.run_state import FINISHED, STOPPED, RunState


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of a run, or of runs [runs]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--requeue",
        nargs=argparse.REMAINDER,
        metavar=("N", "OPTION"),
        help="of run_clm_owt.py: whether its run is worth another job, after a failure N times more at most",
    )
    options = parser.parse_args(argv)
    if options.requeue is not None:
        try:
            most_failures = int(options.requeue[0])
        except (IndexError, ValueError):
            parser.error("--requeue: expected a number, and then the options of run_clm_owt.py")
        return requeue(most_failures, options.requeue[1:])
    standings = [standing_of(run) for folder in options.folders or [Path("runs")] for run in find_runs(folder)]
    if options.json:
        print(json.dumps([standing.to_dict() for standing in standings], indent=2))
    else:
        print(table(standings) if standings else "There are no runs yet")
    return 0


def requeue(failures_left: int, command_line: Sequence[str]) -> int:
    """Whether the run of the command line is to go on in another job, as an exit status, after a line. Raises
    InputError where its folder holds another run."""
    recipe, _ = read_command_line(list(command_line))
    folder = Path(recipe.output_dir)
    if (folder / "plan.json").exists():
        from clm_owt.training.run_folder import plan_of_same_run  # with torch, which takes seconds

        plan_of_same_run(recipe, folder)
    state = RunState.read(folder)
    where = f"{recipe.output_dir}: {state.state}, after step {state.step}" if state else recipe.output_dir
    if state is not None and (state.state == FINISHED or state.is_hopeless):
        print(f"{where}; not queued again: {state.error or 'there is nothing left to do'}")
        return 1
    if failures_left <= 0 and not (state is not None and state.state == STOPPED):
        print(f"{where}; not queued again: it has failed as often as allowed")
        return 1
    print(f"{where}; it goes on in another job")
    return 0


if __name__ == "__main__":
    run_script(main)
