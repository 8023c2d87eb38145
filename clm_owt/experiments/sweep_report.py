"""What a sweep found: a table of its runs, one of its configurations over their seeds, the best recipe, a picture."""

import csv
import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clm_owt.experiments.sweep_file import MEASURES, Sweep, SweptRun, describe_options
from clm_owt.files import write_text
from clm_owt.formatting import text_table
from clm_owt.recipe import show
from clm_owt.reports.comparison import CONFIDENCE, Difference, compare
from clm_owt.reports.record import RunRecord, read_recipe
from clm_owt.reports.sweep_picture import save_sweep_picture

COMPARISON_COLUMNS = ("seeds", "ce_loss", "deviation", "difference", "low", "high", "verdict")


@dataclass
class Configuration:
    """The runs of a sweep that differ by their seed alone. `difference`: of the losses to those of the reference with
    the same seeds; None for the reference itself, and where no seed is there of both."""

    options: dict[str, Any]
    runs: list[SweptRun]
    is_reference: bool = False
    difference: Difference | None = None

    @property
    def losses(self) -> dict[int, float]:
        """By seed; those that finished with a finite loss."""
        return {run.recipe.seed: run.loss for run in self.runs if math.isfinite(run.loss)}

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts by the mean loss, and first by how many seeds have one: the mean of the easier seeds is no better."""
        losses = self.losses.values()
        return -len(losses), statistics.fmean(losses) if losses else math.inf

    @property
    def verdict(self) -> str:
        """What its difference tells, and which seeds it lacks."""
        if self.is_reference:
            said = "reference"
        elif self.difference is None:
            said = "no seed in common with the reference"
        elif self.difference.beyond_chance:
            said = "higher" if self.difference.mean > 0 else "lower"
        else:
            said = "cannot be told from chance"
        lacking = [
            f"{run.recipe.seed} ({'not finite' if run.status == 'finished' else run.status})"
            for run in self.runs
            if run.recipe.seed not in self.losses
        ]
        return said + (f"; without seed {', '.join(lacking)}" if lacking else "")


def configurations(runs: Sequence[SweptRun]) -> list[Configuration]:
    """The runs of a grid by their options other than the seed, each configuration compared with the first one, which
    has the first value of each parameter. Raises ModuleNotFoundError without scipy, if there are several seeds."""
    found: dict[str, Configuration] = {}
    for run in runs:
        options = {name: value for name, value in run.options.items() if name != "seed"}
        found.setdefault(describe_options(options), Configuration(options, [])).runs.append(run)
    reference = next(iter(found))
    found[reference].is_reference = True
    for name, difference in compare({name: c.losses for name, c in found.items()}, reference).items():
        found[name].difference = difference
    return list(found.values())


def comparison_row(names: Sequence[str], configuration: Configuration) -> list[str]:
    """The values of the parameters `names`, and COMPARISON_COLUMNS."""
    losses, difference = configuration.losses.values(), configuration.difference
    interval = difference is not None and difference.pairs > 1
    numbers = [
        f"{statistics.fmean(losses):.4f}" if losses else "",
        f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "",
        f"{difference.mean:+.4f}" if difference else "",
        f"{difference.low:+.4f}" if interval else "",
        f"{difference.high:+.4f}" if interval else "",
    ]
    options = [show(configuration.options[name]) for name in names]
    return [*options, str(len(losses)), *numbers, configuration.verdict]


def run_row(names: Sequence[str], run: SweptRun) -> list[str]:
    """The values of the parameters `names`, MEASURES, minutes and status of a run."""
    values = [run.measures.get(name, "") for name in MEASURES]
    measures = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in values]
    minutes = "" if math.isnan(run.seconds) else f"{run.seconds / 60:.1f}"
    return [*(show(run.options[name]) for name in names), *measures, minutes, run.status]


def report(sweep: Sweep, runs: Sequence[SweptRun], folder: Path) -> None:
    """Print the tables, the best first; write them as text, CSV and picture, and the best recipe."""
    header = [*sweep.searched, *MEASURES, "minutes", "status"]
    rows = [run_row(list(sweep.searched), run) for run in sorted(runs, key=lambda r: (r.status != "finished", r.loss))]
    texts = [text_table(header, rows)]
    write_csv(folder / "table.csv", [header, *rows])
    found = configurations(runs) if sweep.has_seeds else [Configuration(run.options, [run]) for run in runs]
    found = sorted(found, key=lambda configuration: configuration.rank)
    if sweep.has_seeds:
        names = [name for name in sweep.searched if name != "seed"]
        header, rows = [*names, *COMPARISON_COLUMNS], [comparison_row(names, configuration) for configuration in found]
        texts += [describe_comparison(found), text_table(header, rows)]
        write_csv(folder / "comparison.csv", [header, *rows])
    else:
        texts.append("One seed each: a difference of one seed cannot be told from chance (--seeds 5 repeats a grid).")
    print("", "\n\n".join(texts), sep="\n")
    write_text(folder / "table.txt", "\n\n".join(texts) + "\n")
    if found and found[0].losses:
        write_best(sweep, found[0], folder / "best.yaml")
        draw(sweep, runs, folder / "table.png")
        chosen = describe_options(found[0].options) or "the one configuration"
        print(f"\nBest: {chosen}; its recipe in {folder / 'best.yaml'}, the table in {folder}/table.{{txt,csv,png}}")


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def describe_comparison(found: Sequence[Configuration]) -> str:
    """What stands in the table of configurations."""
    reference = next(configuration for configuration in found if configuration.is_reference)
    if len(found) == 1:
        return "Validation cross-entropy over the seeds, and its standard deviation:"
    return textwrap.fill(
        "Validation cross-entropy over the seeds, with its standard deviation, and its difference to the reference "
        f"{describe_options(reference.options)} (the first value of each parameter, chosen before any run) over equal "
        f"seeds, with the interval low to high; all intervals hold together with {CONFIDENCE:.0%} (Student, Sidak):",
        width=110,
        break_on_hyphens=False,
    )


def write_best(sweep: Sweep, best: Configuration, path: Path) -> None:
    """The recipe of the configuration, which runs anew: without its name and, where it was run with several, seed."""
    losses = best.losses
    run = next(run for run in best.runs if run.recipe.seed in losses)
    dropped = {"run_name", "output_dir"} | (run.options.keys() - best.options.keys())
    settings = {name: value for name, value in read_recipe(run.folder).items() if name not in dropped}
    chosen = ", ".join(f"{name}: {show(value)}" for name, value in best.options.items())
    of_seeds = f", mean of {len(losses)} seeds" if len(losses) > 1 else ""
    write_text(
        path,
        f"# The best of the sweep {sweep.name}: {chosen}; validation cross-entropy "
        f"{statistics.fmean(losses.values()):.4f}{of_seeds}\n"
        + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    )


def draw(sweep: Sweep, runs: Sequence[SweptRun], path: Path) -> None:
    finished = [run for run in runs if math.isfinite(run.loss)]
    lowest = min(run.loss for run in finished)
    title = f"{sweep.name}: validation at the end of {len(finished)} runs, lowest {lowest:.4f}"
    if len(finished) < len(runs):
        title += f"; {len(runs) - len(finished)} did not finish"
    save_sweep_picture(title, [(run.options, RunRecord.read(run.folder)) for run in finished], path)
