"""Results with the runs that they are of: record them, run them again, and write the board of all.

python scripts/record.py add NAME --claim "Muon reaches a lower loss" --runs runs/a runs/b --logs runs/sweeps/x
python scripts/record.py reproduce NAME                 the first run of a record again
python scripts/record.py reproduce NAME --runs all      every one
python scripts/record.py board                          records/README.md

`add` makes `records/NAME/` from the folders of finished runs: what they share and how they differ is read there, runs
that differ by their seed alone are one setting, and each setting is compared with that of the first run. `reproduce`
ends with status 0 if every run gave the recorded bits, or a loss within 3 standard deviations over seeds; with 1 if
one did not; with 2 for what cannot work.
"""

import argparse
import signal
from pathlib import Path

from clm_owt.errors import InputError
from clm_owt.experiments.board import difference, loss, seeds, write_board
from clm_owt.experiments.execution import interruption
from clm_owt.experiments.recorded_result import TABLES, NewRecord, add_record, read_record, record_folder
from clm_owt.experiments.reproduction import compare_with_recorded, run_again, runs_of
from clm_owt.program import run_script
from clm_owt.reports.record import read_plan


def add(options: argparse.Namespace) -> int:
    machine = {name: getattr(options, name) for name in ("cores", "threads") if getattr(options, name) is not None}
    new = NewRecord(
        claim=options.claim,
        table=options.table,
        recipe=options.recipe,
        runs=options.runs,
        tuning=options.tuning,
        logs=options.logs,
        machine=machine,
        config=options.config_file,
        spread_of=options.spread_of,
        report=options.report,
    )
    record = add_record(options.folder, options.name, new, options.replace)
    for setting in record["settings"]:
        print("  ".join(filter(None, (loss(setting), seeds(setting), setting["name"], difference(record, setting)))))
    print(f"Recorded: {options.folder / options.name}; the board: {write_board(options.folder)}")
    return 0


def reproduce(options: argparse.Namespace) -> int:
    folder = record_folder(options.folder, options.name)
    runs = runs_of(folder, read_record(folder), options.runs)
    if not Path("run_clm_owt.py").is_file():
        raise InputError("reproduce: start it in the repository's folder, where run_clm_owt.py is")
    all_same = True
    with interruption() as interrupted:
        for run in runs:
            output = options.output / options.name / run.name
            if (output / "plan.json").is_file() and "finished" in read_plan(output):
                print(f"{run.name}: was run again before; remove {output} to run it anew", flush=True)
            else:
                print(f"{run.name}: running, output in {output}.log", flush=True)
                error = run_again(run, output, interrupted)
                if interrupted.is_set():
                    print("Interrupted; the same command continues.")
                    return 128 + signal.SIGINT
                if error is not None:
                    all_same = False
                    print(f"{run.name}: failed: {error}", flush=True)
                    continue
            outcome = compare_with_recorded(run, output)
            all_same = all_same and outcome.same
            print(f"{run.name}: {outcome.text}", flush=True)
    return 0 if all_same else 1


def board(options: argparse.Namespace) -> int:
    print(f"Written: {write_board(options.folder)}")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    adding = commands.add_parser("add", help="record finished runs")
    adding.add_argument("name", metavar="NAME", help="of the record, and of its folder")
    adding.add_argument("--claim", required=True, help="what the runs show, in one sentence")
    adding.add_argument("--runs", type=Path, nargs="+", required=True, help="folders, the reference's first")
    adding.add_argument(
        "--tuning", type=Path, nargs="+", default=[], metavar="RUN", help="runs that chose the settings; not counted"
    )
    adding.add_argument("--table", choices=TABLES, help="the board's table (default: not on the board)")
    adding.add_argument("--logs", type=Path, metavar="FOLDER", help="where the runs' output lies, as <run>.log")
    adding.add_argument(
        "--recipe", default="recipes/quickstart_adamw.yaml", help="the recipe that they change (default: %(default)s)"
    )
    adding.add_argument("--config_file", help="accelerate's, for runs that were not launched with a shipped cpu one")
    adding.add_argument("--cores", type=int, help="of the machine, where plan.json does not say it")
    adding.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the runs, where plan.json does not say it")
    adding.add_argument(
        "--spread_of", metavar="NAME/RUN", help="a recorded run whose deviation over seeds holds here, too"
    )
    adding.add_argument("--report", type=Path, metavar="FOLDER", help="of a study or sweep, whose report is kept too")
    adding.add_argument("--replace", action="store_true", help="write over the record of that name")
    adding.set_defaults(run=add)
    reproducing = commands.add_parser("reproduce", help="run recorded runs again")
    reproducing.add_argument("name", metavar="NAME", help="of the record")
    reproducing.add_argument("--runs", nargs="+", default=[], help="names of runs, or all (default: the first)")
    reproducing.add_argument(
        "--output", type=Path, default=Path("runs/reproduced"), help="folder for the runs (default: %(default)s)"
    )
    reproducing.set_defaults(run=reproduce)
    writing = commands.add_parser("board", help="write the board of all records")
    writing.set_defaults(run=board)
    for command in (adding, reproducing, writing):
        command.add_argument("--folder", type=Path, default=Path("records"), help="default: %(default)s")
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    run_script(main)
