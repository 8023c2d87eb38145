"""The pictures of a study: effects beside their prediction, what a temperature does not give, calibration, drift."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clm_owt.reports.comparison import CONFIDENCE, Difference
from clm_owt.reports.figures import save_figure
from clm_owt.reports.panels import COLORS, ROUND_STEPS
from clm_owt.reports.study_findings import (
    CALIBRATION,
    PREDICTED,
    UNPENALISED,
    Findings,
    Measure,
    Setting,
    mean_curve,
    pooled_bins,
)

if TYPE_CHECKING:  # matplotlib takes a second to import; it is imported where it draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_WIDTH, PANEL_HEIGHT, FONT_SIZE = 3.0, 2.5, 9
CURVE_POINTS = 61
SHOWN_POSITIONS = 16  # points of a curve over positions, each the mean of those around it
FEWEST_PREDICTIONS = 100  # of a bin that is drawn: its accuracy is good to 0.05
CONTROL_COLOR = "#ff7f0e"
DRIFT_SAMPLING = "temperature_1"  # whose curves are drawn


def draw_all(findings: Findings, folder: Path) -> None:
    """Write the pictures, each in one piece. What nothing was measured for is left out."""
    for name, draw in PICTURES.items():
        path = folder / name
        figure = draw(findings)
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            save_figure(figure, path, dpi=150)


def new_figure(rows: int, columns: int, title: str):
    """A figure and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL_WIDTH * columns, 0.8 + PANEL_HEIGHT * rows), layout="constrained")
    figure.suptitle(title, fontsize=FONT_SIZE + 1, x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_effects(findings: Findings) -> "Figure":
    """Measured and predicted effects over λ: a row for each penalty, a column for each predicted measure."""
    figure, all_axes = new_figure(
        len(findings.types),
        len(PREDICTED),
        f"Effect of the penalty against λ = 0: measured, with {CONFIDENCE:.0%} intervals over {len(findings.seeds)} "
        "paired seeds,\nand predicted to first order from the models at λ = 0 alone",
    )
    for row, (penalty_type, color) in enumerate(zip(findings.types, COLORS, strict=False)):
        for column, measure in enumerate(PREDICTED):
            axes = all_axes[row, column]
            draw_prediction(axes, findings, measure.name, penalty_type)
            draw_measured_effects(axes, findings, measure.name, penalty_type, color)
            label_axes(axes, f"Δ {measure.label}" if row == 0 else "", penalty_type if column == 0 else "")
    add_legend(figure, 3)
    return figure


def draw_prediction(axes: "Axes", findings: Findings, measure: str, penalty_type: str) -> None:
    """The predicted effect over λ, the mean over the seeds."""
    weights = [weight for _, weight in findings.of_type(penalty_type)]
    low, high = min(0.0, *weights), max(0.0, *weights)
    xs, ys = [], []
    for i in range(CURVE_POINTS):
        weight = low + (high - low) * i / (CURVE_POINTS - 1)
        predicted = findings.predictions(measure, (penalty_type, weight)).values()
        if predicted:
            xs.append(weight)
            ys.append(statistics.fmean(predicted))
    axes.plot(xs, ys, "-", color="grey", linewidth=1.2, label="predicted")


def draw_measured_effects(axes: "Axes", findings: Findings, measure: str, penalty_type: str, color: str) -> None:
    effects, departures = findings.effects(measure), findings.departures(measure)
    shown = [setting for setting in findings.of_type(penalty_type) if setting in effects]
    for leaves, face, label in (
        (True, color, "measured, other than predicted beyond chance"),
        (False, "white", "measured"),
    ):
        these = [s for s in shown if (s in departures and departures[s].beyond_chance) == leaves]
        draw_differences(axes, {s: effects[s] for s in these}, color, face, label)


def draw_differences(
    axes: "Axes", differences: dict[Setting, Difference], color: str, face: str, label: str, shift: float = 0.0
) -> None:
    """Differences over λ, with their intervals; that of a single pair has none."""
    x = [weight + shift for _, weight in differences]
    y = [difference.mean for difference in differences.values()]
    halves = [difference.high - difference.mean for difference in differences.values()]
    errors = [half if math.isfinite(half) else 0.0 for half in halves]
    axes.errorbar(
        x, y, errors, fmt="o", color=color, markerfacecolor=face, markersize=4, linewidth=1.1, capsize=2, label=label
    )


def label_axes(axes: "Axes", title: str, beside: str, below: str = "λ") -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.axhline(0.0, color="black", linewidth=0.6)
    axes.set_title(title, fontsize=FONT_SIZE, loc="left")
    axes.set_ylabel(beside, fontsize=FONT_SIZE)
    axes.set_xlabel(below, fontsize=FONT_SIZE)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND_STEPS))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.grid(alpha=0.25)


def draw_beyond_temperature(findings: Findings) -> "Figure | None":
    """What the models have that their temperature-matched controls have not, over λ; a colour for each penalty."""
    if not any(run.control for run in findings.runs):
        return None
    shown = [
        Measure("ce_loss", "cross-entropy (nats)"),
        *CALIBRATION,
        *(
            Measure(f"{sampling}/{name}", f"{label}, {sampling.replace('_', ' ')}")
            for name, label in (("entropy_drift", "entropy drift"), ("seq_rep_4", "seq-rep-4"))
            for sampling in findings.samplings
        ),
    ]
    shown = [measure for measure in shown if measure.name in findings.measures]
    columns = 4
    rows = -(-len(shown) // columns)
    figure, all_axes = new_figure(
        rows,
        columns,
        f"What the penalty does beyond a temperature: model minus its control (λ = 0 at the temperature of equal "
        f"entropy),\nwith {CONFIDENCE:.0%} intervals over {len(findings.seeds)} paired seeds. Filled: beyond chance",
    )
    weights = sorted({weight for _, weight in findings.settings} | {0.0})
    dodge = 0.012 * (weights[-1] - weights[0])
    for axes, measure in zip(all_axes.flat, shown, strict=False):
        differences = findings.beyond_temperature(measure.name)
        for i, (penalty_type, color) in enumerate(zip(findings.types, COLORS, strict=False)):
            of_type = {s: differences[s] for s in findings.of_type(penalty_type) if s in differences}
            shift = dodge * (i - (len(findings.types) - 1) / 2)
            for beyond in (True, False):
                these = {s: d for s, d in of_type.items() if d.beyond_chance == beyond}
                face = color if beyond else "white"
                draw_differences(axes, these, color, face, penalty_type if beyond else "", shift)
        label_axes(axes, f"Δ {measure.label}", "")
    for axes in list(all_axes.flat)[len(shown) :]:
        axes.remove()
    add_legend(figure, 3)
    return figure


def shown_settings(findings: Findings, penalty_type: str) -> list[tuple[Setting, str]]:
    """λ = 0 and the ends of the weights of a penalty, with their colours."""
    measured = [setting for setting in findings.of_type(penalty_type) if findings.measured(setting)]
    ends = [s for s in (measured[:1] + measured[-1:]) if s[1] < 0 or s is measured[-1]]
    chosen = [(s, "#1f77b4" if s[1] < 0 else "#d62728") for s in dict.fromkeys(ends)]
    return [(UNPENALISED, "black"), *chosen]


def draw_by_type(findings: Findings, title: str, x_label: str, y_label: str):
    """A figure with a panel for each penalty, all of one scale, its axes by penalty, and what draws the legend when
    all is drawn."""
    from matplotlib.figure import Figure

    size = (PANEL_WIDTH * max(2, len(findings.types)), 1.3 + PANEL_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=FONT_SIZE + 1, x=0.01, ha="left")
    all_axes = figure.subplots(1, len(findings.types), squeeze=False, sharey=True)[0]
    for axes, penalty_type in zip(all_axes, findings.types, strict=True):
        axes.set_title(penalty_type, fontsize=FONT_SIZE, loc="left")
        axes.set_xlabel(x_label, fontsize=FONT_SIZE)
        axes.tick_params(labelsize=FONT_SIZE - 1)
        axes.grid(alpha=0.25)
    all_axes[0].set_ylabel(y_label, fontsize=FONT_SIZE)
    return figure, dict(zip(findings.types, all_axes, strict=True))


def add_legend(figure: "Figure", columns: int) -> None:
    """Of all axes, each name once, below them."""
    named = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    where = {"loc": "outside lower left", "ncols": columns, "fontsize": FONT_SIZE - 1, "frameon": False}
    figure.legend(named.values(), named.keys(), **where)


def draw_reliability(findings: Findings) -> "Figure":
    """Reliability diagrams, the seeds pooled."""
    title = (
        "Reliability, the seeds pooled: 0 is calibrated; below it the model is surer of its likeliest token than right"
    )
    figure, panels = draw_by_type(findings, title, "mean confidence of the bin", "accuracy - confidence")
    for penalty_type, axes in panels.items():
        axes.axhline(0.0, color="grey", linewidth=0.6)
        shown = shown_settings(findings, penalty_type)
        curves = [(f"λ = {s[1]:g}", color, "o-", findings.measured(s)) for s, color in shown]
        last = shown[-1][0]
        curves.append((f"control of λ = {last[1]:g}", CONTROL_COLOR, "o--", findings.controls(last)))
        for label, color, style, models in curves:
            bins = [bin for bin in pooled_bins(list(models.values())) if bin[0] >= FEWEST_PREDICTIONS]
            x, y = [bin[1] for bin in bins], [accuracy - confidence for _, confidence, accuracy in bins]
            axes.plot(x, y, style, color=color, markersize=3, linewidth=1.1, label=label)
    add_legend(figure, 4)
    return figure


def draw_drift(findings: Findings) -> "Figure":
    """Entropy by position, of generated and of real text."""
    title = (
        "Entropy of the next-token distribution: in text that the model generates at temperature 1, and "
        "(dotted) in real text"
    )
    figure, panels = draw_by_type(findings, title, "token after the prompt", "entropy (nats)")
    for penalty_type, axes in panels.items():
        for setting, color in shown_settings(findings, penalty_type):
            for kind, style in (("generated", "-"), ("real", ":")):
                models = findings.measured(setting).values()
                curve = mean_curve([model.entropy_by_position[DRIFT_SAMPLING][kind] for model in models])
                x, y = by_pieces(curve)
                label = f"λ = {setting[1]:g}" if kind == "generated" else None
                axes.plot(x, y, style, color=color, linewidth=1.3, label=label)
    add_legend(figure, 4)
    return figure


def by_pieces(curve: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most SHOWN_POSITIONS positions, counted from 1, and the means of a curve around them."""
    size = -(-len(curve) // SHOWN_POSITIONS)
    pieces = [curve[i : i + size] for i in range(0, len(curve), size)]
    positions = [i * size + (len(piece) + 1) / 2 for i, piece in enumerate(pieces)]
    return positions, [statistics.fmean(piece) for piece in pieces]


PICTURES = {
    "effects.png": draw_effects,
    "beyond_temperature.png": draw_beyond_temperature,
    "reliability.png": draw_reliability,
    "drift.png": draw_drift,
}
