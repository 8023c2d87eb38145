"""The curves of one run or several as a picture, and `training_curves.png`, redrawn beside the training."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clm_owt.files import replacing
from clm_owt.formatting import format_count
from clm_owt.reports.record import Row, RunRecord

if TYPE_CHECKING:  # matplotlib takes a second to import; it is imported where it draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")

OPENWEBTEXT = "skylion007/openwebtext"

# Validation losses on it of GPT-2 small (124 M), as published: at the end of a training, and by tokens seen.
REFERENCE_LINES = ((3.12, "GPT-2 124 M of OpenAI, zero-shot (nanoGPT)"), (2.85, "nanoGPT, about 295 B tokens"))
REFERENCE_POINTS = ((5e9, 3.193), (20e9, 3.024), (50e9, 2.885))
REFERENCE_POINTS_NAME = "AdamW 6e-4, batch 480 (MARS)"

SMOOTHED_POINTS = 100  # a curve of more points than this is drawn with its running mean


@dataclass(frozen=True)
class Panel:
    """One diagram: a field of the rows over the step, of the validation rows too where it is `validated`."""

    field: str
    label: str
    log_scale: bool = False
    validated: bool = False
    penalty_only: bool = False  # is drawn where a run has a sharpness penalty


PANELS = (
    Panel("ce_loss", "cross-entropy (nats per token)", log_scale=True, validated=True),
    Panel("learning_rate", "learning rate"),
    Panel("grad_norm", "gradient norm before clipping", log_scale=True),
    Panel("tokens_per_second", "training tokens per second"),
    Panel("penalty", "sharpness penalty", validated=True, penalty_only=True),
    Panel("max_prob", "mean largest probability", validated=True, penalty_only=True),
)


def panels_of(runs: Sequence[RunRecord]) -> list[Panel]:
    """The panels that these runs have something to show in."""
    penalized = any(run.recipe["penalty_weight"] for run in runs)
    return [panel for panel in PANELS if penalized or not panel.penalty_only]


def series(rows: Sequence[Row], field: str) -> tuple[list[int], list[float]]:
    """Steps and values of a field, where it has a finite one."""
    points = [(row["step"], row[field]) for row in rows if row.get(field) is not None and math.isfinite(row[field])]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of up to `window` values that end at each."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def is_gpt2_on_openwebtext(run: RunRecord) -> bool:
    """Whether the run's validation losses are of the same tokens as the published ones, and can be compared."""
    return run.recipe["dataset_name"].lower() == OPENWEBTEXT and run.plan["vocab_size"] == 50257


def draw(runs: Sequence[RunRecord]) -> "Figure":
    """All panels, with a colour for each run; where all have the same batch, the first panel has an axis of tokens."""
    from matplotlib.figure import Figure

    panels = panels_of(runs)
    lines = math.ceil(len(panels) / 2)
    height = 4 * lines
    figure = Figure(figsize=(13, height))
    # Fixed margins in inches: to compute them takes matplotlib as long as to draw.
    figure.subplots_adjust(
        left=0.065, right=0.985, bottom=0.55 / height, top=1 - 0.95 / height, wspace=0.17, hspace=0.28
    )
    figure.suptitle(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", y=1 - 0.12 / height, va="top")
    all_axes = [figure.add_subplot(lines, 2, i + 1) for i in range(len(panels))]
    for axes, panel in zip(all_axes, panels, strict=True):
        draw_panel(axes, runs, panel)
    # For all panels. A loss goes down; to search for a free place takes matplotlib long.
    all_axes[0].legend(fontsize=8, loc="upper right")
    tokens_per_step = {run.plan["tokens_per_step"] for run in runs}
    if len(tokens_per_step) == 1:
        add_token_axis(all_axes[0], tokens_per_step.pop())
    return figure


def draw_panel(axes: "Axes", runs: Sequence[RunRecord], panel: Panel) -> None:
    """A field of all runs, with published losses and, of a run alone, its marks."""
    from matplotlib.ticker import EngFormatter, NullLocator, StrMethodFormatter

    alone = len(runs) == 1
    for color, run in zip(COLORS * len(runs), runs, strict=False):
        steps, values = series(run.train, panel.field)
        label = "training" if alone else run.name
        if panel.field == "learning_rate" or len(values) <= SMOOTHED_POINTS:
            axes.plot(steps, values, color=color, linewidth=1.3, label=label)
        else:
            window = max(5, len(values) // 200)
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
            label += f", mean of {window} rows" if alone else ""
            axes.plot(steps, running_mean(values, window), color=color, linewidth=1.3, label=label)
        if panel.validated:
            style = {"color": "black" if alone else color, "marker": "o", "markersize": 3, "linestyle": "--"}
            label = "validation" if alone else None
            axes.plot(*series(run.validation, panel.field), linewidth=1, label=label, **style)
    if panel.field == "ce_loss":
        draw_references(axes, runs)
    if panel.log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(log_ticks(*axes.get_ylim()))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    if panel.field == "learning_rate":
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
    if panel.field == "tokens_per_second":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if alone:
        draw_marks(axes, runs[0])
    axes.set_xlabel("step" if alone or not panel.validated else "step (dots: validation)")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel(panel.label)
    axes.grid(alpha=0.25)


def log_ticks(low: float, high: float) -> "Locator":
    """Round numbers for a logarithmic axis: some even on one of less than a decade, few on one of many."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    ratio = high / low
    if ratio < 3:
        return MaxNLocator(nbins=6, steps=(1, 2, 5, 10))
    if ratio < 10:
        return LogLocator(subs=(1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9))
    return LogLocator(subs=(1, 2, 5) if ratio < 1000 else (1,))


def add_token_axis(axes: "Axes", tokens_per_step: int) -> None:
    """A second axis at the top: the tokens seen at each step."""
    from matplotlib.ticker import FuncFormatter

    top = axes.secondary_xaxis("top", functions=(lambda s: s * tokens_per_step, lambda t: t / tokens_per_step))
    top.set_xlabel("tokens")
    top.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: format_count(tokens)))


def draw_references(axes: "Axes", runs: Sequence[RunRecord]) -> None:
    """The published losses, where they can be compared with those of the runs."""
    if not all(is_gpt2_on_openwebtext(run) for run in runs):
        return
    for (loss, name), style in zip(REFERENCE_LINES, ("-.", ":"), strict=True):
        axes.axhline(loss, color="grey", linestyle=style, linewidth=1, label=f"{loss} {name}")
    per_step, last = runs[0].plan["tokens_per_step"], max(run.plan["total_tokens"] for run in runs)
    points = [(tokens / per_step, loss) for tokens, loss in REFERENCE_POINTS if tokens <= last]
    if points:
        axes.plot(*zip(*points, strict=True), "*", color="grey", label=REFERENCE_POINTS_NAME)


def draw_marks(axes: "Axes", run: RunRecord) -> None:
    """Vertical lines at resumptions and changes of the micro-batch, each kind named once; dotted so that both are seen
    where they are one."""
    named = set()
    for step, what in run.marks:
        color, offset = ("tab:orange", 0) if what == "resumed" else ("tab:purple", 3)
        style = {"color": color, "linestyle": (offset, (2, 4)), "linewidth": 1}
        axes.axvline(step, label=None if what in named else what, **style)
        named.add(what)


def save_picture(runs: Sequence[RunRecord], path: Path) -> None:
    """Draw to a PNG or SVG file, by its name, which is replaced in one step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(runs)
    FigureCanvasAgg(figure)
    with replacing(path) as aside:
        figure.savefig(aside, dpi=100, format=path.suffix.removeprefix("."))


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
