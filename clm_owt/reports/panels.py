"""What the curves of runs show, whatever draws them: panels, their curves, axes and labels, the names of the runs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from clm_owt.recipe import FIELDS, default_of, show
from clm_owt.reports.record import PLACES, Row, RunRecord

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
MARK_COLORS = {"resumed": "#ff7f0e", "micro-batch": "#9467bd"}

OPENWEBTEXT = "skylion007/openwebtext"

# Validation losses on it of GPT-2 small (124 M), as published, at the end of a training.
PUBLISHED_LOSSES = ((3.12, "GPT-2 124 M of OpenAI, zero-shot (nanoGPT)"), (2.85, "nanoGPT, about 295 B tokens"))
MILESTONES_NAME = "published at these tokens (milestones)"

SMOOTHED_POINTS = 100  # a curve of more points than this is drawn with its running mean
LABELLED_CURVES = 12  # more numbers than this do not fit beside a panel
LABEL_HEIGHT, LABEL_WIDTH = 0.075, 0.18  # of a panel
ENOUGH_TICKS = 8  # on a logarithmic axis
ROUND_STEPS = (1, 2, 2.5, 5, 10)  # between the ticks of a linear one
NAMED_DIFFERENCES = 3  # runs that differ in more settings than this are named by their folders

# Where an axis ends: a value beyond so many times its run's median, or the median run's, is marked at the frame.
SPIKE = {True: 30, False: 4}  # on a logarithmic axis, and on a linear one
OTHER_RUN = 100
WORSE_THAN_GUESSING = 1.25  # times ln(vocabulary), which is the cross-entropy of a uniform distribution


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


@dataclass(frozen=True)
class Curve:
    """A field of a run over its steps: every finite value, and where there are many, their running mean too."""

    run: RunRecord
    color: str
    validation: bool
    steps: list[int]
    values: list[float]
    mean: list[float] | None
    window: int  # rows that a mean is of

    @property
    def shown(self) -> list[float]:
        """What the eye follows: the mean where there is one."""
        return self.mean or self.values


@dataclass(frozen=True)
class Beyond:
    """The highest of a run's values that lie beyond its panel's axis, or its first that is not finite."""

    run: RunRecord
    color: str
    step: int
    value: float

    @property
    def text(self) -> str:
        return f"{self.value:.2g}" if math.isfinite(self.value) else "not finite"


@dataclass(frozen=True)
class Note:
    """A text in a panel: at a step, and at a height from 0 (the bottom of the panel) to 1."""

    color: str
    step: int
    height: float
    text: str


@dataclass(frozen=True, order=True)
class Milestone:
    """A loss that others published, at the step at which a run has trained on as many tokens."""

    step: float
    loss: float
    tokens: int


@dataclass(frozen=True)
class Diagram:
    """A panel filled: `low` and `high` are the ends of its axis, `end` the last step of all runs, `lines` levels
    to compare with and their names."""

    panel: Panel
    curves: list[Curve]
    beyond: list[Beyond]
    lines: list[tuple[float, str]]
    milestones: list[Milestone]
    end: int
    low: float
    high: float

    @property
    def steps(self) -> tuple[float, float]:
        """The ends of the axis of steps, the same in all panels, with room for the last values."""
        return -0.02 * self.end, 1.22 * self.end

    def height(self, value: float) -> float:
        """Where a value is on the axis, or the end that it lies beyond: 0 is the bottom, 1 the top."""
        low, high = self.low, self.high
        value = max(low, min(value, high))
        if self.panel.log_scale:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def end_labels(self) -> list[Note]:
        """The last value of each curve, to be written right of it, none over another. A run of several has one, of
        its validation where it has any; one that ends beyond the axis has its label there."""
        alone = len({id(curve.run) for curve in self.curves}) == 1
        last = {(id(curve.run), alone and curve.validation): curve for curve in self.curves}  # validation comes later
        ends = {id(beyond.run): beyond.step for beyond in self.beyond}
        inside = [curve for curve in last.values() if curve.steps[-1] > ends.get(id(curve.run), -1)]
        curves = sorted(inside, key=lambda curve: curve.shown[-1])[:LABELLED_CURVES]
        notes = [
            Note(
                "black" if alone and curve.validation else curve.color,
                curve.steps[-1],
                self.height(curve.shown[-1]),
                format_last(self.panel, curve.shown[-1]),
            )
            for curve in curves
        ]
        return [note for column in columns(notes, LABEL_WIDTH * self.end) for note in spread(column)]

    def spike_labels(self) -> list[Note]:
        """The values beyond the axis, below its upper end, none over another."""
        notes = [Note(beyond.color, beyond.step, 1 - LABEL_HEIGHT / 2, beyond.text) for beyond in self.beyond]
        return [
            replace(note, height=note.height - i * LABEL_HEIGHT)
            for column in columns(notes, 2 * LABEL_WIDTH * self.end)
            for i, note in enumerate(column)
        ]


def columns(notes: Sequence[Note], width: float) -> list[list[Note]]:
    """The notes, those in one group that are less than `width` steps from their neighbours."""
    groups: list[list[Note]] = []
    for note in sorted(notes, key=lambda note: note.step):
        if groups and note.step - groups[-1][-1].step < width:
            groups[-1].append(note)
        else:
            groups.append([note])
    return groups


def spread(notes: Sequence[Note]) -> list[Note]:
    """The notes of a column moved apart to a label's height, by least squares, and into the panel."""
    notes = sorted(notes, key=lambda note: note.height)
    # Without the gaps the heights only must not fall: neighbours that would are pooled at their mean.
    pools: list[tuple[float, int]] = []
    for i, note in enumerate(notes):
        pools.append((note.height - i * LABEL_HEIGHT, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    lowest, highest = LABEL_HEIGHT / 2, 1 - LABEL_HEIGHT / 2 - (len(notes) - 1) * LABEL_HEIGHT
    bases = [max(lowest, min(base, highest)) for base, count in pools for _ in range(count)]
    return [
        replace(note, height=base + i * LABEL_HEIGHT) for i, (note, base) in enumerate(zip(notes, bases, strict=True))
    ]


def diagrams(runs: Sequence[RunRecord]) -> list[Diagram]:
    """All that the curves of these runs show, in one diagram for each panel that they have something for."""
    penalized = any(run.recipe["penalty_weight"] for run in runs)
    return [fill(panel, runs) for panel in PANELS if penalized or not panel.penalty_only]


def fill(panel: Panel, runs: Sequence[RunRecord]) -> Diagram:
    """The diagram of one panel."""
    ceilings = axis_ends(panel, runs)
    curves, beyond = [], []
    for color, run, ceiling in zip(COLORS * len(runs), runs, ceilings, strict=False):
        splits = [(run.train, False), *([(run.validation, True)] if panel.validated else [])]
        outside = [row for rows, _ in splits for row in rows if is_beyond(row, panel, ceiling)]
        if outside:
            row = max(outside, key=lambda row: row[panel.field] if math.isfinite(row[panel.field]) else math.inf)
            beyond.append(Beyond(run, color, row["step"], row[panel.field]))
        for rows, validation in splits:
            curve = make_curve(run, color, validation, panel, rows, ceiling)
            if curve.steps:
                curves.append(curve)
    values = [value for curve in curves for value in curve.values]
    lines = reference_losses(runs) if panel.field == "ce_loss" else []
    milestones = reached_milestones(runs) if panel.field == "ce_loss" else []
    levels = [loss for loss, _ in lines] + [milestone.loss for milestone in milestones]
    end = max(1, last_step(runs))
    return Diagram(panel, curves, beyond, lines, milestones, end, *axis(panel, values, levels))


def make_curve(
    run: RunRecord, color: str, validation: bool, panel: Panel, rows: Sequence[Row], ceiling: float
) -> Curve:
    """The curve of some rows of a run. Those beyond the ceiling are left out: they are marked, and bend no mean."""
    steps, values = series([row for row in rows if not is_beyond(row, panel, ceiling)], panel.field)
    window = max(5, len(values) // 200)
    smoothed = len(values) > SMOOTHED_POINTS and not validation and panel.field != "learning_rate"
    return Curve(run, color, validation, steps, values, running_mean(values, window) if smoothed else None, window)


def is_beyond(row: Row, panel: Panel, ceiling: float) -> bool:
    value = row.get(panel.field)
    return value is not None and not value <= ceiling  # not a number is no less


def axis_ends(panel: Panel, runs: Sequence[RunRecord]) -> list[float]:
    """The largest value of each run that its panel's axis has room for. A loss above that of guessing, a spike in one
    run, a run that has diverged: none of them flattens what the others show."""
    if panel.field == "ce_loss":
        return [WORSE_THAN_GUESSING * math.log(max(run.plan["vocab_size"] for run in runs))] * len(runs)
    medians = [statistics.median(series(run.train, panel.field)[1] or [math.inf]) for run in runs]
    of_runs = statistics.median_low(medians)
    if of_runs <= 0:
        return [math.inf] * len(runs)
    if panel.field == "learning_rate":  # has no spikes
        return [OTHER_RUN * of_runs] * len(runs)
    return [min(SPIKE[panel.log_scale] * max(median, of_runs), OTHER_RUN * of_runs) for median in medians]


def axis(panel: Panel, values: Sequence[float], lines: Sequence[float]) -> tuple[float, float]:
    """Both ends of a panel's axis, with some room around the values. A linear axis has 0 in it."""
    if not panel.log_scale:
        low, high = min([0.0, *values]), max([0.0, *values])
        room = 0.08 * (high - low) or 1.0
        return low - (room if low < 0 else 0), high + (room if high > 0 or low == 0 else 0)
    values = [value for value in (*values, *lines) if value > 0] or [1.0]
    room = max(1.04, (max(values) / min(values)) ** 0.06)
    return min(values) / room, max(values) * room


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, the roundest first, each of them that has room beside those before it."""
    room = 0.07 * math.log(high / low)
    ticks: list[float] = []
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for step in (10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        if len(ticks) >= ENOUGH_TICKS:
            break
        for decade in decades:
            for i in range(1, round(10 / step) + 1):
                tick = float(f"{i * step * 10.0**decade:.6g}")
                if low <= tick <= high and all(abs(math.log(tick / other)) >= room for other in ticks):
                    ticks.append(tick)
    return sorted(ticks)


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


def last_step(runs: Sequence[RunRecord]) -> int:
    """The last step of any row."""
    return max((rows[-1]["step"] for run in runs for rows in (run.train, run.validation) if rows), default=0)


def is_gpt2_on_openwebtext(run: RunRecord) -> bool:
    """Whether the run's validation losses are of the same tokens as the published ones, and can be compared."""
    return run.recipe["dataset_name"].lower() == OPENWEBTEXT and run.plan["vocab_size"] == 50257


def reference_losses(runs: Sequence[RunRecord]) -> list[tuple[float, str]]:
    """Losses that can be compared with those of all these runs, and whose they are: published ones on OpenWebText, and
    those of n-gram models on the same validation blocks, where a finished run has counted them."""
    lines = list(PUBLISHED_LOSSES) if all(map(is_gpt2_on_openwebtext, runs)) else []
    baselines = next((run.plan["baselines"] for run in runs if run.plan.get("baselines")), None)
    if baselines and len({run.plan.get("store") for run in runs}) == 1:
        lines += [(baselines[name], f"{name} model") for name in ("unigram", "bigram")]
    return lines


def reached_milestones(runs: Sequence[RunRecord]) -> list[Milestone]:
    """The milestones of all runs' recipes up to the last step of any: those of two recipes with one batch coincide."""
    found = {
        Milestone(tokens / run.plan["tokens_per_step"], loss, tokens)
        for run in runs
        for tokens, loss in (run.recipe.get("milestones") or {}).items()  # older recipes have no such key
    }
    return sorted(milestone for milestone in found if milestone.step <= last_step(runs))


def by_difference(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs with names that tell them apart: the settings in which they differ, those that shape the result if
    there are any, or their folders where these are too many or do not tell."""
    keys = differing_keys(runs)
    keys = [key for key in keys if key in FIELDS and FIELDS[key].metadata["shapes_result"]] or keys
    names = [", ".join(f"{key}={short(setting(run, key))}" for key in keys) for run in runs]
    for candidates in (names, [run.name for run in runs], [str(run.folder) for run in runs]):
        if len(set(candidates)) == len(runs) and not (candidates is names and len(keys) > NAMED_DIFFERENCES):
            return [replace(run, name=name) for run, name in zip(runs, candidates, strict=True)]
    return [replace(run, name=f"{run.folder} ({i})") for i, run in enumerate(runs, start=1)]


def differing_keys(runs: Sequence[RunRecord]) -> list[str]:
    """The keys in which the recipes differ, but for those that only say where a run is."""
    keys = dict.fromkeys(key for run in runs for key in (*FIELDS, *run.recipe) if key not in PLACES)
    return [key for key in keys if len({show(setting(run, key)) for run in runs}) > 1]


def short(value: object) -> str:
    """A setting as it is read, a number in at most six digits."""
    return f"{value:g}" if isinstance(value, float) else show(value)


def setting(run: RunRecord, key: str) -> object:
    """What a run's recipe says, or implied before it had that key."""
    return run.recipe[key] if key in run.recipe else default_of(key) if key in FIELDS else None


def status(run: RunRecord) -> str:
    """How far a run is, in words: `finished`, or what is to be seen of one that is not."""
    steps = max((rows[-1]["step"] for rows in (run.train, run.validation) if rows), default=0)
    losses = [row["ce_loss"] for row in run.train]
    if losses and not math.isfinite(losses[-1]):
        return f"failed: loss not finite at step {steps:,} of {run.plan['total_steps']:,}"
    if run.plan.get("finished"):
        return "finished"
    return f"not finished: step {steps:,} of {run.plan['total_steps']:,}"


def format_last(panel: Panel, value: float) -> str:
    """The last value of a curve, as it is written beside it."""
    if panel.field == "ce_loss":
        return f"{value:.3f}"
    if panel.field == "tokens_per_second":
        return f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:.3g} M"
    text = f"{value:.3g}"
    return text if len(text) <= len("-0.123") else f"{value:.1e}".replace("e-0", "e-")
