"""Draw one run, or several over each other: as one HTML page with curves, samples and recipes, or as PNG or SVG.

python scripts/plot_run.py runs/quickstart                                 to runs/quickstart/curves.html
python scripts/plot_run.py runs/owt_512 runs/owt_512,penalty_weight=0.01   to runs/curves.html
python scripts/plot_run.py runs/quickstart --output quickstart.png
"""

import argparse
from pathlib import Path

from clm_owt.errors import InputError
from clm_owt.files import write_text
from clm_owt.program import output_file, run_script
from clm_owt.reports.curves import save_picture
from clm_owt.reports.panels import by_difference
from clm_owt.reports.record import RunRecord


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--output", type=output_file, help="a file .html, .png or .svg; default: curves.html, as above"
    )
    options = parser.parse_args(argv)
    first = options.runs[0]
    output = options.output or (first if len(options.runs) == 1 else first.parent) / "curves.html"
    plot(options.runs, output)
    print(f"Drawn: {output}")


def plot(folders: list[Path], output: Path) -> None:
    """Draw the runs in `folders` to `output`. Raises InputError for another format, and for a folder without a run."""
    if output.suffix not in (".png", ".svg", ".html"):
        raise InputError(f"--output: {output} does not work; expected a name that ends in .png, .svg or .html")
    runs = [RunRecord.read(folder) for folder in folders]
    if len(runs) > 1:
        runs = by_difference(runs)
    if output.suffix != ".html":
        return save_picture(runs, output)
    try:
        from clm_owt.reports.page import write_page

        page = write_page(runs)
    except ModuleNotFoundError as error:
        raise InputError(f"--output: HTML needs {error.name}; pip install 'clm_owt[plot]', or draw a .png") from error
    write_text(output, page)


if __name__ == "__main__":
    run_script(main)
