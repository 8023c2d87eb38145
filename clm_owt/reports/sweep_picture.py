"""What a sweep found, as a picture: the last validation of its runs over the parameters that it searched."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm_owt.recipe import show
from clm_owt.reports.comparison import CONFIDENCE, half_interval
from clm_owt.reports.figures import save_figure
from clm_owt.reports.panels import COLORS, ROUND_STEPS, log_ticks, short
from clm_owt.reports.record import RunRecord

if TYPE_CHECKING:  # matplotlib takes a second to import; it is imported where it draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = {
    "ce_loss": "cross-entropy (nats)",
    "max_prob": "mean largest probability",
    "entropy": "entropy (nats)",
}

LOG_SPAN = 20  # a parameter whose values differ by this factor has a logarithmic axis
LEAST_SPAN = 0.02  # of a value, on an axis without error bars
FAR = 8  # a point so many times as far from the lowest as the median is lies beyond the axis, and is marked at its end
FEWEST_DIFFERENCES = 8  # of training rows, to tell from them how much chance does
PANEL_WIDTH, PANEL_HEIGHT, FONT_SIZE = 2.5, 2.4, 9


@dataclass(frozen=True)
class Point:
    """Runs with the same values of the parameters, but for their seeds: the mean of each measure, and its error."""

    options: dict[str, Any]
    means: dict[str, float]
    errors: dict[str, float | None]
    runs: int


def make_points(runs: Sequence[tuple[dict[str, Any], RunRecord]]) -> list[Point]:
    """A point for each choice of the parameters other than the seed. Its errors are half the interval of the mean
    over its seeds (Student's t) or, of one seed, the sampling error of the validation set."""
    alone = all(options.keys() == {"seed"} for options, _ in runs)
    groups: dict[str, list[tuple[dict[str, Any], RunRecord]]] = {}
    for options, run in runs:
        chosen = {name: value for name, value in options.items() if alone or name != "seed"}
        groups.setdefault(str(chosen), []).append((chosen, run))
    points = []
    for group in groups.values():
        found = [run for _, run in group]
        values = {name: [run.validation[-1][name] for run in found] for name in MEASURES}
        means = {name: statistics.fmean(of_runs) for name, of_runs in values.items()}
        errors = {
            name: half_interval(of_runs) if len(found) > 1 else sampling_error(found[0], name)
            for name, of_runs in values.items()
        }
        points.append(Point(group[0][0], means, errors, len(found)))
    return points


def sampling_error(run: RunRecord, field: str) -> float | None:
    """How much a measure of the run's validation differs by chance from one validation set of its size to another: as
    the training batches do, by their number of blocks. None where too few rows tell.

    The scatter of the later half of the training rows is that of neighbours, half their mean square difference (von
    Neumann et al. 1941), which a slow change of the measure does not enter.
    """
    blocks = run.plan.get("validation_blocks")
    values = [row[field] for row in run.train if field in row and math.isfinite(row[field])]
    values = values[len(values) // 2 :]
    differences = [(b - a) ** 2 for a, b in itertools.pairwise(values)]
    if not blocks or len(differences) < FEWEST_DIFFERENCES:
        return None
    return math.sqrt(statistics.fmean(differences) / 2 * run.recipe["effective_batch_size"] / blocks)


def draw_sweep(title: str, runs: Sequence[tuple[dict[str, Any], RunRecord]]) -> "Figure":
    """Each measure over a parameter, with error bars. A grid of several parameters has a line and a colour for each
    choice of the others; where there are no lines to draw, each parameter has a row of panels."""
    from matplotlib.figure import Figure

    points = make_points(runs)
    names = list(points[0].options)
    lines = split_into_lines(points, names)
    rows = [lines] if lines else [(name, {"": points}) for name in names]
    height = 0.75 + PANEL_HEIGHT * len(rows)
    figure = Figure(figsize=(PANEL_WIDTH * len(MEASURES), height), layout="constrained")
    all_axes = figure.subplots(len(rows), len(MEASURES), squeeze=False)
    for (name, by_label), row in zip(rows, all_axes, strict=True):
        for axes, measure in zip(row, MEASURES, strict=True):
            draw_measure(axes, measure, name, by_label, connected=lines is not None)
    figure.suptitle(f"{title}\n{describe_errors(points)}", fontsize=FONT_SIZE, x=0.01, ha="left")
    if lines and len(lines[1]) > 1:
        handles, labels = all_axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3, fontsize=FONT_SIZE - 1, frameon=False)
    return figure


def split_into_lines(points: Sequence[Point], names: Sequence[str]) -> tuple[str, dict[str, list[Point]]] | None:
    """The parameter with the most values, numbers before words, and for each choice of the others the points along it;
    None where that makes no lines, or more than there are colours."""

    def rank(name: str) -> tuple[bool, int]:
        return is_numeric(points, name), len({show(point.options[name]) for point in points})

    along = max(names, key=rank)
    lines: dict[str, list[Point]] = {}
    for point in points:
        label = ", ".join(f"{name}={short(point.options[name])}" for name in names if name != along)
        lines.setdefault(label, []).append(point)
    return (along, lines) if len(names) == 1 or len(lines) <= min(len(COLORS), len(points) // 2) else None


def describe_errors(points: Sequence[Point]) -> str:
    fewest, most = (of(point.runs for point in points) for of in (min, max))
    if most > 1:
        seeds = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
        return (
            f"means of {seeds}; bars: their {CONFIDENCE:.0%} intervals, each alone (pairs tell more: comparison.csv)"
        )
    if any(error is not None for point in points for error in point.errors.values()):
        return "one seed; bars: ± sampling error of the validation set, as training batches scatter"
    return "one seed; how much chance does is not known"


def draw_measure(axes: "Axes", measure: str, name: str, lines: dict[str, list[Point]], connected: bool) -> None:
    """One measure over the parameter `name`, with a line or a set of points for each label."""
    points = [point for line in lines.values() for point in line]
    values = [point.options[name] for point in points]
    numeric = is_numeric(points, name)
    places = {show(value): value if numeric else i for i, value in enumerate(dict.fromkeys(values))}
    means = [point.means[measure] for point in points]
    ceiling = axis_end(means) if measure == "ce_loss" else math.inf  # the others are bounded
    for color, (label, line) in zip(COLORS, lines.items(), strict=False):
        line = sorted(line, key=lambda point: places[show(point.options[name])])
        near = [point for point in line if point.means[measure] <= ceiling]
        x = [places[show(point.options[name])] for point in near]
        y = [point.means[measure] for point in near]
        errors = [point.errors[measure] or 0.0 for point in near]
        style = "o-" if numeric and connected else "o"
        axes.errorbar(x, y, errors, fmt=style, color=color, label=label, markersize=4, linewidth=1.2, capsize=2)
        for point in line:
            if point not in near:
                mark_far(axes, places[show(point.options[name])], point.means[measure], color)
    scale_axes(axes, name, values if numeric else None, places, [mean for mean in means if mean <= ceiling])
    axes.set_title(MEASURES[measure], fontsize=FONT_SIZE, loc="left")
    axes.set_xlabel(name, fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.grid(alpha=0.25)


def is_numeric(points: Sequence[Point], name: str) -> bool:
    return all(type(point.options[name]) in (int, float) for point in points)


def axis_end(means: Sequence[float]) -> float:
    """The largest value that an axis has room for: one run that diverged does not flatten the others."""
    lowest, median = min(means), statistics.median_low(means)
    return lowest + FAR * max(median - lowest, LEAST_SPAN * abs(lowest))


def mark_far(axes: "Axes", x: float, value: float, color: str) -> None:
    """A triangle at the upper end of the axis, and the value that lies beyond it."""
    axes.plot(x, 0.95, "^", color=color, transform=axes.get_xaxis_transform())
    where = {"xy": (x, 0.95), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(f"{value:.3g}", **where, xytext=(0, -6), ha="center", va="top", color=color, fontsize=FONT_SIZE - 1)


def scale_axes(
    axes: "Axes", name: str, values: Sequence[float] | None, places: dict[str, int], means: Sequence[float]
) -> None:
    """A logarithmic axis for rates and for what spans as much; no nearer to the means than chance can be seen."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.margins(x=0.1, y=0.2)
    low, high = axes.get_ylim()
    room = LEAST_SPAN * max(map(abs, means)) - (high - low)
    if room > 0:
        axes.set_ylim(low - room / 2, high + room / 2)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND_STEPS))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if values is None:
        axes.set_xticks(list(places.values()), list(places))
    elif is_logarithmic(name, values):
        axes.set_xscale("log")
        tried = sorted(set(values))
        axes.xaxis.set_major_locator(FixedLocator(tried if len(tried) <= 5 else log_ticks(tried[0], tried[-1])))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=ROUND_STEPS))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def is_logarithmic(name: str, values: Sequence[float]) -> bool:
    low, high = min(values), max(values)
    return low > 0 and high > low and (name.endswith("learning_rate") or high >= LOG_SPAN * low)


def save_sweep_picture(title: str, runs: Sequence[tuple[dict[str, Any], RunRecord]], path: Path) -> None:
    """Draw to a PNG file, which is replaced in one step."""
    save_figure(draw_sweep(title, runs), path)
