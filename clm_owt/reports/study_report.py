"""A study's report: one content, as Markdown with pictures beside it, and as a self-contained HTML page; its tables as
CSV."""

import base64
import csv
import html
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clm_owt.files import write_text
from clm_owt.formatting import markdown_table
from clm_owt.reports.comparison import CONFIDENCE, Difference
from clm_owt.reports.page import STYLE, table
from clm_owt.reports.study_findings import (
    CALIBRATION,
    GENERATION,
    PREDICTED,
    SMALL_WEIGHT,
    UNPENALISED,
    Findings,
    Measure,
    Setting,
    values_of,
)
from clm_owt.reports.study_picture import draw_all

CHANCE = "cannot be told from chance"
LEAST_DIGITS, MOST_DIGITS = 4, 8  # behind the point

PAGE_STYLE = STYLE + "img { max-width: 100%; height: auto } td { min-width: 4rem } p, li { max-width: 60rem }"


@dataclass(frozen=True)
class Section:
    """A part of the report: paragraphs, findings one a line, a picture's file name, tables of (caption, header, rows).
    Code stands between backticks."""

    title: str
    paragraphs: Sequence[str] = ()
    items: Sequence[str] = ()
    picture: str | None = None
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()


@dataclass(frozen=True)
class StudyText:
    """What a report says beside its findings: the study's name, its command, and lines about its runs."""

    name: str
    command: str
    about: Sequence[str] = field(default_factory=list)


def write_report(text: StudyText, findings: Findings, folder: Path) -> list[str]:
    """Write report.md, report.html, the CSV files and the pictures to `folder`; gives the findings in words."""
    draw_all(findings, folder)
    for name, rows in csv_files(findings).items():
        write_text(folder / name, csv_text(rows))
    said = describe_findings(findings)
    sections = [s for s in sections_of(text, findings, said) if s.picture is None or (folder / s.picture).is_file()]
    write_text(folder / "report.md", to_markdown(text, sections))
    write_text(folder / "report.html", to_html(text, sections, folder))
    return said


# Numbers in words


def number(value: float, half: float = math.inf, sign: str = "+") -> str:
    """A value with as many digits as two of the half of its interval take, at least LEAST_DIGITS."""
    finest = half if 0 < half < math.inf else abs(value)
    digits = LEAST_DIGITS if finest == 0 else max(LEAST_DIGITS, 1 - math.floor(math.log10(finest)))
    return f"{value:{sign}.{min(digits, MOST_DIGITS)}f}"


def show(difference: Difference | None) -> str:
    """A difference with its interval, and whether it could be chance."""
    if difference is None:
        return "-"
    half = difference.high - difference.mean
    if not math.isfinite(half):
        return f"{number(difference.mean)}, of one seed: {CHANCE}"
    shown = f"{number(difference.mean, half)} ± {number(half, half, '')}"
    return shown if difference.beyond_chance else f"{shown}, {CHANCE}"


def weights(settings: Iterable[Setting]) -> str:
    return ", ".join(f"{weight:g}" for _, weight in settings)


def in_words(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


# What was found, in sentences


def describe_findings(findings: Findings) -> list[str]:
    """A line for each measure: where a penalty changes it beyond chance, where theory fails, what a temperature does
    not give."""
    said = []
    for penalty_type in findings.types:
        own = findings.of_type(penalty_type)
        for measure in PREDICTED:
            effects, departures = findings.effects(measure.name), findings.departures(measure.name)
            known = [setting for setting in own if setting in effects]
            if not known:
                continue
            line = f"`{penalty_type}`, {measure.label}: {at_weights(known, effects, 'changed')}"
            if any(setting in departures for setting in known):
                line += f"; other than predicted {at_weights(known, departures, '').strip()}"
            said.append(line)
        beyond = []
        for measure in compared(findings):
            differences = findings.beyond_temperature(measure.name)
            told = [setting for setting in own if setting in differences and differences[setting].beyond_chance]
            if told:
                signs = "/".join(dict.fromkeys("+" if differences[s].mean > 0 else "-" for s in told))
                beyond.append(f"{measure.label} ({signs}, λ = {weights(told)})")
        if any(findings.controls(setting) for setting in own):
            what = in_words(beyond) if beyond else f"nothing; every difference {CHANCE}"
            said.append(f"`{penalty_type}`, beyond a temperature: {what}")
    return said


def at_weights(known: Sequence[Setting], differences: Mapping[Setting, Difference], what: str) -> str:
    told = [setting for setting in known if setting in differences and differences[setting].beyond_chance]
    if not told:
        return f"{what} at no λ beyond chance"
    return f"{what} at " + ("every λ" if len(told) == len(known) else f"λ = {weights(told)}")


def compared(findings: Findings) -> list[Measure]:
    """What a model is compared with its control in: all but the entropy, which is the same."""
    measures = [measure for measure in PREDICTED if measure.name != "entropy"] + list(CALIBRATION)
    return [measure for measure in (*measures, *generated(findings)) if measure.name in findings.measures]


def generated(findings: Findings) -> list[Measure]:
    return [
        Measure(f"{sampling}/{measure.name}", f"{measure.label}, {sampling.replace('_', ' ')}")
        for sampling in findings.samplings
        for measure in GENERATION
    ]


# The sections


def sections_of(text: StudyText, findings: Findings, said: Sequence[str]) -> list[Section]:
    return [
        Section("What was done", text.about, remarks(findings)),
        Section("How to read it", READING),
        Section("What was found", (), said),
        prediction_section(findings),
        pooled_section(findings),
        beyond_temperature_section(findings),
        calibration_section(findings),
        generation_section(findings),
        Section(
            "The models",
            ["Means over the seeds; a control has the temperature beside its λ."],
            tables=[models_table(findings)],
        ),
    ]


READING = (
    "Loss = cross-entropy + λ · penalty. A λ above 0 rewards sharp predictions, one below 0 flat ones, as the "
    "confidence penalty and label smoothing do. `non_max_sum` (1 - p_m) and `neg_max_prob` (-p_m) have the same "
    "gradient: one of them is run.",
    "Every difference is the mean over pairs of runs with the same seed, ± half its interval (Student's t). The "
    f"intervals are so wide that all of one measure hold together with {CONFIDENCE:.0%} (Šidák's correction). Where "
    f"an interval contains 0, the table says that the difference {CHANCE}.",
    "The prediction is to first order in λ, for a model at its optimum in every context: λ times a covariance under "
    "the next-token distributions of the models at λ = 0; of cross-entropy, λ²/2 times a variance. The measured "
    "effect minus the predicted one is tested in the same way.",
    "The control of a model is the one of the same seed at λ = 0, its logits divided by the temperature at which its "
    "mean entropy on the validation set is the model's. What differs between the two, the penalty has done beyond a "
    "temperature.",
)


def remarks(findings: Findings) -> list[str]:
    """What was left out, and why."""
    return [
        f"Left out: {run.penalty_type}, λ = {run.penalty_weight:g}, seed {run.seed}: {run.remark}"
        for run in findings.runs
        if run.remark
    ]


def prediction_section(findings: Findings) -> Section:
    tables = []
    for penalty_type in findings.types:
        rows = []
        for measure in PREDICTED:
            effects, departures = findings.effects(measure.name), findings.departures(measure.name)
            for setting in findings.of_type(penalty_type):
                predicted = list(findings.predictions(measure.name, setting).values())
                rows.append(
                    [
                        measure.label,
                        f"{setting[1]:g}",
                        show(effects.get(setting)),
                        number(statistics.fmean(predicted)) if predicted else "-",
                        show(departures.get(setting)),
                    ]
                )
        header = ["measure", "λ", "measured effect", "predicted", "measured - predicted"]
        tables.append((f"`{penalty_type}`", header, rows))
    return Section("Prediction beside measurement", picture="effects.png", tables=tables)


def pooled_section(findings: Findings) -> Section:
    """Of the small weights together."""
    of_effects, of_controls = [], []
    for measure in PREDICTED:
        if measure.name != "ce_loss":  # its prediction is of second order
            found = findings.responses(measure.name)
            of_effects.append([measure.label, *(show(found.get(name)) for name in findings.types)])
    for measure in compared(findings):
        found = findings.slopes_beyond_temperature(measure.name)
        of_controls.append([measure.label, *(show(found.get(name)) for name in findings.types)])
    header = ["", *(f"`{name}`" for name in findings.types)]
    return Section(
        f"The small weights together, |λ| ≤ {SMALL_WEIGHT:g}",
        [
            "For each seed the slope of a line through 0 over these weights, and its mean over the seeds: one weight "
            "alone tells little with few seeds. Intervals hold together over the penalties."
        ],
        tables=[
            ("Measured effect over predicted effect, which is 1 where theory holds", header, of_effects),
            ("Beyond a temperature: model minus control, per unit of λ", header, of_controls),
        ],
    )


def beyond_temperature_section(findings: Findings) -> Section:
    return Section(
        "Beyond a temperature: the model minus its control",
        picture="beyond_temperature.png",
        tables=[difference_table(findings, penalty_type, compared(findings)) for penalty_type in findings.types],
    )


def difference_table(findings: Findings, penalty_type: str, measures: Sequence[Measure]):
    """A row for each measure, a column for each λ."""
    settings = findings.of_type(penalty_type)
    temperatures = [findings.temperature(setting) for setting in settings]
    rows = [["temperature of the control", *(f"{t:.4f}" if t else "-" for t in temperatures)]]
    for measure in measures:
        found = findings.beyond_temperature(measure.name)
        rows.append([measure.label, *(show(found.get(setting)) for setting in settings)])
    return f"`{penalty_type}`", ["λ", *(f"{weight:g}" for _, weight in settings)], rows


def effects_table(findings: Findings, penalty_type: str, measures: Sequence[Measure]):
    settings = findings.of_type(penalty_type)
    rows = []
    for measure in measures:
        found = findings.effects(measure.name)
        rows.append([measure.label, *(show(found.get(setting)) for setting in settings)])
    return f"`{penalty_type}`", ["λ", *(f"{weight:g}" for _, weight in settings)], rows


def calibration_section(findings: Findings) -> Section:
    return Section(
        "Calibration: effects against λ = 0",
        [
            "Expected calibration error of the likeliest token, and class-wise over the vocabulary. A calibrated "
            "model has some by chance; how much stands in the table of the models."
        ],
        picture="reliability.png",
        tables=[effects_table(findings, penalty_type, CALIBRATION) for penalty_type in findings.types],
    )


def generation_section(findings: Findings) -> Section:
    return Section(
        "Generation: effects against λ = 0",
        [
            "The drift is the entropy of the next-token distribution in text that the model generates, minus that in "
            "the text that really follows the prompts; entropies are the model's, before a nucleus cuts them."
        ],
        picture="drift.png",
        tables=[effects_table(findings, penalty_type, generated(findings)) for penalty_type in findings.types],
    )


def models_table(findings: Findings):
    """Means over the seeds of each setting, and of its controls."""
    names = findings.measures
    rows = []
    for setting in (UNPENALISED, *findings.settings):
        name = f"{setting[0]}, λ = {setting[1]:g}" if setting[0] else "λ = 0"
        for models, label in (
            (findings.measured(setting), name),
            (findings.controls(setting), f"control, T = {findings.temperature(setting) or 0:.4f}"),
        ):
            if models:
                means = [list(values_of(models, measure).values()) for measure in names]
                cells = [number(statistics.fmean(of), sign="") if of else "-" for of in means]
                rows.append([label, str(len(models)), *cells])
    return "", ["", "seeds", *names], rows


# Files


def csv_files(findings: Findings) -> dict[str, list[list[str]]]:
    """Rows by file: all that was measured, run by run; effects beside predictions; what is beyond a temperature; and
    of both, the slopes over the small weights."""
    names = findings.measures
    runs = [["penalty_type", "penalty_weight", "seed", "model", "temperature", *names]]
    for run in findings.runs:
        for kind, model in (("itself", run.measures), ("control", run.control)):
            if model is not None:
                values = [exact(model.values.get(name)) for name in names]
                what = [run.penalty_type, f"{run.penalty_weight:g}", str(run.seed), kind]
                runs.append([*what, exact(model.temperature), *values])
    columns = ["pairs", "mean", "low", "high", "beyond_chance"]
    effects = [["measure", "penalty_type", "penalty_weight", *columns, "predicted",
                *(f"departure_{column}" for column in columns)]]  # fmt: skip
    beyond = [["measure", "penalty_type", "penalty_weight", "temperature", *columns]]
    for name in names:
        found, departures, differences = (
            findings.effects(name),
            findings.departures(name),
            findings.beyond_temperature(name),
        )
        for setting in findings.settings:
            what = [name, setting[0], f"{setting[1]:g}"]
            predicted = list(findings.predictions(name, setting).values())
            mean = statistics.fmean(predicted) if predicted else None
            effects.append([*what, *cells(found.get(setting)), exact(mean), *cells(departures.get(setting))])
            beyond.append([*what, exact(findings.temperature(setting)), *cells(differences.get(setting))])
    small = [["measure", "penalty_type", "slope_of", *columns]]
    for name in names:
        for what, slopes in (
            # That of cross-entropy is of second order, and no line.
            ("effect by prediction", {} if name == "ce_loss" else findings.responses(name)),
            ("beyond temperature by weight", findings.slopes_beyond_temperature(name)),
        ):
            small += [[name, penalty_type, what, *cells(slope)] for penalty_type, slope in slopes.items()]
    return {
        "models.csv": runs,
        "effects.csv": effects,
        "beyond_temperature.csv": beyond,
        "small_weights.csv": small,
    }


def cells(difference: Difference | None) -> list[str]:
    if difference is None:
        return [""] * 5
    ends = [exact(end) if math.isfinite(end) else "" for end in (difference.low, difference.high)]
    beyond = "yes" if difference.beyond_chance else "no"
    return [str(difference.pairs), exact(difference.mean), *ends, beyond]


def exact(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


def csv_text(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def to_markdown(text: StudyText, sections: Sequence[Section]) -> str:
    parts = [f"# {text.name}", f"```bash\n{text.command}\n```"]
    for section in sections:
        parts += [f"## {section.title}", *section.paragraphs]
        if section.items:
            parts.append("\n".join(f"- {item}" for item in section.items))
        if section.picture:
            parts.append(f"![{section.title}]({section.picture})")
        for caption, header, rows in section.tables:
            parts += [caption] * bool(caption) + [markdown_table(header, rows)]
    return "\n\n".join(parts) + "\n"


def to_html(text: StudyText, sections: Sequence[Section], folder: Path) -> str:
    """The page, which loads nothing when it is opened: the pictures are inside."""
    parts = [f"<h1>{html.escape(text.name)}</h1>", f"<pre>{html.escape(text.command)}</pre>"]
    for section in sections:
        parts.append(f"<h2>{in_html(section.title)}</h2>")
        parts += [f"<p>{in_html(paragraph)}</p>" for paragraph in section.paragraphs]
        if section.items:
            parts.append(f"<ul>{''.join(f'<li>{in_html(item)}</li>' for item in section.items)}</ul>")
        if section.picture:
            data = base64.b64encode((folder / section.picture).read_bytes()).decode()
            parts.append(f'<img alt="{in_html(section.title)}" src="data:image/png;base64,{data}">')
        for caption, header, rows in section.tables:
            parts += [f"<h3>{in_html(caption)}</h3>"] * bool(caption)
            parts.append(table([in_html(name) for name in header], [[in_html(cell) for cell in row] for row in rows]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(text.name)}</title>'
        f'<link rel="icon" href="data:,"><style>{PAGE_STYLE}</style></head>\n<body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def in_html(text: str) -> str:
    """Text with code between backticks, and the verdict of chance in grey."""
    escaped = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text))
    return escaped.replace(f", {CHANCE}", f"<small>{CHANCE}</small>") if escaped.endswith(CHANCE) else escaped
