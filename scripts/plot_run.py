"""Draw one run, or several over each other: as PNG or SVG, or as one HTML page with curves, samples and recipes.

python scripts/plot_run.py runs/quickstart
python scripts/plot_run.py runs/owt_512 runs/owt_512,penalty_weight=0.01 --output penalty.html
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from clm_owt.errors import InputError, exit_with
from clm_owt.files import write_text
from clm_owt.reports.curves import save_picture
from clm_owt.reports.record import RunRecord


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--output", type=Path, default=Path("curves.html"), help=".png, .svg or .html (curves.html)")
    options = parser.parse_args(argv)
    try:
        plot(options.runs, options.output)
    except InputError as error:
        exit_with(error)
    print(f"Drawn: {options.output}")


def plot(folders: list[Path], output: Path) -> None:
    """Draw the runs in `folders` to `output`. Raises InputError for another format, and for a folder without a run."""
    if output.suffix not in (".png", ".svg", ".html"):
        raise InputError(f"--output: {output} does not work; expected a name that ends in .png, .svg or .html")
    runs = [RunRecord.read(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(folder)) for run, folder in zip(runs, folders, strict=True)]
    if output.suffix != ".html":
        return save_picture(runs, output)
    try:
        from clm_owt.reports.page import write_page

        page = write_page(runs)
    except ModuleNotFoundError as error:
        raise InputError(f"--output: HTML needs {error.name}; pip install 'clm_owt[plot]', or draw a .png") from error
    write_text(output, page)


if __name__ == "__main__":
    main(sys.argv[1:])
