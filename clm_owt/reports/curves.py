"""The curves of one run or several as a picture, and `training_curves.png`, redrawn beside the training."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from clm_owt.formatting import format_count
from clm_owt.reports.figures import save_figure
from clm_owt.reports.panels import (
    MARK_COLORS,
    MILESTONES_NAME,
    ROUND_STEPS,
    Diagram,
    Note,
    diagrams,
    log_ticks,
)
from clm_owt.reports.record import RunRecord

if TYPE_CHECKING:  # matplotlib takes a second to import; it is imported where it draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, PANEL_HEIGHT = 7.5, 2.5  # inches; small, so that its letters are large wherever it is shown
LEGEND_LINE = 0.2
FONT_SIZE = 9


LINE_STYLES = (":", "-.")  # of levels to compare with


def draw(runs: Sequence[RunRecord]) -> "Figure":
    """All panels, with a colour for each run; where all have the same batch, the first panel has an axis of tokens."""
    from matplotlib.figure import Figure

    filled = diagrams(runs)
    lines = math.ceil(len(filled) / 2)
    figure = Figure(figsize=(WIDTH, 1))
    all_axes = [figure.add_subplot(lines, 2, i + 1) for i in range(len(filled))]
    for axes, diagram in zip(all_axes, filled, strict=True):
        draw_diagram(axes, diagram, runs)
    legend_height = add_legend(figure, all_axes[0])
    tokens_per_step = {run.plan["tokens_per_step"] for run in runs}
    if len(tokens_per_step) == 1:
        per_step = tokens_per_step.pop()
        add_token_axis(all_axes[0], per_step, per_step * filled[0].end)
    # Fixed margins in inches: to compute them takes matplotlib as long as to draw.
    top = 0.9 + legend_height
    height = top + PANEL_HEIGHT * lines
    figure.set_figheight(height)
    figure.subplots_adjust(
        left=0.085, right=0.985, bottom=0.45 / height, top=1 - top / height, wspace=0.22, hspace=0.33
    )
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    figure.suptitle(title, x=0.02, y=1 - 0.1 / height, ha="left", va="top", fontsize=FONT_SIZE + 2)
    figure.legends[0].set_bbox_to_anchor((0.01, 1 - 0.3 / height))
    return figure


def draw_diagram(axes: "Axes", diagram: Diagram, runs: Sequence[RunRecord]) -> None:
    """One panel: its curves with their last values, levels to compare with, and of a run alone its marks."""
    from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

    panel, alone = diagram.panel, len(runs) == 1
    if panel.log_scale:
        axes.set_yscale("log")
    axes.set(xlim=diagram.steps, ylim=(diagram.low, diagram.high))
    draw_curves(axes, diagram, alone)
    draw_references(axes, diagram)
    if alone:
        draw_marks(axes, runs[0])
    for note in diagram.end_labels():
        write_note(axes, note, note.text, 1)
    for note in diagram.spike_labels():
        axes.plot(note.step, note.height, marker="^", color=note.color, transform=axes.get_xaxis_transform())
        write_note(axes, note, note.text, 1 if note.step < 0.7 * diagram.end else -1)
    if panel.log_scale:
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(diagram.low, diagram.high)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND_STEPS))
    formats = {"learning_rate": StrMethodFormatter("{x:.2g}"), "tokens_per_second": EngFormatter(sep="")}
    axes.yaxis.set_major_formatter(formats.get(panel.field, StrMethodFormatter("{x:g}")))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND_STEPS, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_title(panel.label, fontsize=FONT_SIZE, loc="left", pad=4)
    axes.set_xlabel("step", fontsize=FONT_SIZE, labelpad=1)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.grid(alpha=0.25)


def draw_curves(axes: "Axes", diagram: Diagram, alone: bool) -> None:
    """The curves of a panel; those of many points thin, and their mean over it."""
    for curve in diagram.curves:
        style = {
            "color": curve.color,
            "linewidth": 1.3,
            "marker": "o" if len(curve.steps) == 1 else None,
            "markersize": 3,
        }
        label = "training" if alone else curve.run.name
        if curve.validation:
            style |= {"marker": "o", "linestyle": "--", "linewidth": 1}
            style |= {"color": "black"} if alone else {}
            label = "validation" if alone else None
        elif curve.mean:
            axes.plot(curve.steps, curve.values, color=curve.color, linewidth=0.6, alpha=0.3)
            label += f", mean of {curve.window} rows" if alone else ""
        axes.plot(curve.steps, curve.shown, label=label, **style)


def draw_references(axes: "Axes", diagram: Diagram) -> None:
    """Losses to compare with."""
    for (loss, name), style in zip(diagram.lines, LINE_STYLES, strict=False):
        axes.axhline(loss, color="grey", linestyle=style, linewidth=1, label=f"{loss:.4g} {name}")
    if diagram.milestones:
        points = [(milestone.step, milestone.loss) for milestone in diagram.milestones]
        axes.plot(*zip(*points, strict=True), "*", color="grey", label=MILESTONES_NAME)


def draw_marks(axes: "Axes", run: RunRecord) -> None:
    """Vertical lines at resumptions and changes of the micro-batch, each kind named once; dotted so that both are seen
    where they are one."""
    named = set()
    for step, what in run.marks:
        kind = what.split()[0]
        style = {"color": MARK_COLORS[kind], "linestyle": (0 if kind == "resumed" else 3, (2, 4)), "linewidth": 1}
        axes.axvline(step, label=None if what in named else what, **style)
        named.add(what)


def write_note(axes: "Axes", note: Note, text: str, side: int) -> None:
    """Write beside a point of the panel: right of it for a `side` of 1, left for -1."""
    axes.annotate(
        text,
        (note.step, note.height),
        xycoords=("data", "axes fraction"),
        xytext=(5 * side, 0),
        textcoords="offset points",
        ha="left" if side == 1 else "right",
        va="center_baseline",
        color=note.color,
        fontsize=FONT_SIZE - 1,
        bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
    )


def add_legend(figure: "Figure", axes: "Axes") -> float:
    """The names of all that the first panel shows, above the panels; gives its height in inches."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = max(1, min(len(labels), int(WIDTH * 72 / (0.55 * FONT_SIZE * longest + 45))))
    figure.legend(handles, labels, loc="upper left", ncols=columns, fontsize=FONT_SIZE - 1, frameon=False)
    return LEGEND_LINE * math.ceil(len(labels) / columns)


def add_token_axis(axes: "Axes", tokens_per_step: int, last: int) -> None:
    """A second axis at the top: the tokens seen at each step, up to the `last`."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    top = axes.secondary_xaxis("top", functions=(lambda s: s * tokens_per_step, lambda t: t / tokens_per_step))
    top.tick_params(labelsize=FONT_SIZE - 1, pad=1)
    top.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=ROUND_STEPS))
    top.xaxis.set_major_formatter(
        FuncFormatter(lambda tokens, _: f"{format_count(tokens)} tokens" if 0 < tokens <= last else "")
    )


def save_picture(runs: Sequence[RunRecord], path: Path) -> None:
    """Draw to a PNG or SVG file, by its name, which is replaced in one step."""
    save_figure(draw(runs), path)


class Curves:
    """Draws `training_curves.png` of the run in the folder `run`, in a thread of its own, so that the training does
    not wait; what is asked for during a drawing is drawn after it, once. An error costs a line, printed with `say`."""

    def __init__(self, run: Path, say: Callable[..., None]):
        self._run = run
        self._say = say
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="curves")
        self._next: Future[None] | None = None

    def redraw(self) -> None:
        """Begin to draw what the run's files hold by now."""
        # Here, and not in the thread: Trackio looks for it among the loaded modules, and fails on one half loaded.
        import matplotlib.figure  # noqa: F401

        if self._next is None or self._next.running() or self._next.done():
            self._next = self._executor.submit(self._draw)

    def finish(self) -> None:
        """Wait for the last drawing. May be called twice."""
        self._executor.shutdown()

    def _draw(self) -> None:
        try:
            save_picture([RunRecord.read(self._run)], self._run / "training_curves.png")
        except Exception as error:
            self._say(f"training_curves.png could not be drawn: {type(error).__name__}: {error}")
