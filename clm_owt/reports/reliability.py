"""The reliability diagram: how often the likeliest token comes, over the probability that the model gives it."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clm_owt.reports.figures import save_figure
from clm_owt.reports.panels import COLORS

if TYPE_CHECKING:  # matplotlib takes a second to import; it is imported where it draws
    from matplotlib.figure import Figure

# Of each bin of confidence: how many predictions, their mean confidence and accuracy, None where there is none.
Bins = Sequence[tuple[int, float | None, float | None]]

WIDTH, HEIGHT, LEGEND_LINE, FONT_SIZE = 4.5, 5.0, 0.2, 9  # inches; points


def draw_reliability(models: Mapping[str, Bins]) -> "Figure":
    """Accuracy over confidence with a line for each model, beside the diagonal of perfect calibration, and below it
    how the predictions are spread over the bins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT + LEGEND_LINE * len(models)), layout="constrained")
    diagram, spread = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    diagram.plot((0, 1), (0, 1), color="0.6", linewidth=1, linestyle="--")
    for (name, bins), color in zip(models.items(), itertools.cycle(COLORS), strict=False):
        total = sum(count for count, _, _ in bins)
        filled = [(confidence, accuracy) for count, confidence, accuracy in bins if count]
        diagram.plot(*zip(*filled, strict=True), "o-", color=color, label=name, markersize=3, linewidth=1.2)
        edges = [edge / len(bins) for edge in range(len(bins) + 1)]
        spread.stairs([count / total for count, _, _ in bins], edges, color=color)
    diagram.set(xlim=(0, 1), ylim=(0, 1))
    diagram.set_ylabel("share that came (accuracy)", fontsize=FONT_SIZE)
    spread.set_ylabel("predictions", fontsize=FONT_SIZE)
    spread.set_xlabel("probability of the likeliest token (confidence)", fontsize=FONT_SIZE)
    for axes in (diagram, spread):
        axes.tick_params(labelsize=FONT_SIZE - 1)
        axes.grid(alpha=0.25)
    figure.legend(loc="outside upper left", fontsize=FONT_SIZE - 1, frameon=False)
    return figure


def save_reliability(models: Mapping[str, Bins], path: Path) -> None:
    """Draw to a PNG file, which is replaced in one step."""
    save_figure(draw_reliability(models), path)
