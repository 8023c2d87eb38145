"""Runs as one self-contained HTML page: interactive curves (Plotly, its code inside), results, recipes, samples."""

import html
import json
import math
import re
import statistics
from collections.abc import Sequence

from clm_owt.formatting import format_clock, format_count
from clm_owt.recipe import FIELDS
from clm_owt.reports.milestones import CAVEAT, comparisons
from clm_owt.reports.panels import (
    COLORS,
    MARK_COLORS,
    MILESTONES_NAME,
    Curve,
    Diagram,
    diagrams,
    differing_keys,
    log_ticks,
    reached_milestones,
    reference_losses,
    setting,
    short,
    status,
)
from clm_owt.reports.record import PLACES, RunRecord

STYLE = """
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1400px; padding: 0 1rem; color: #222 }
h1 { overflow-wrap: anywhere }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); gap: 1rem }
.panels h3 { margin: 0; font-size: 1rem } .panels section { min-width: 0 }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .5rem 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: .5rem 0 } pre { overflow-x: auto }
table { border-collapse: collapse }
th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top }
th { background: #f4f4f4 } td.number { text-align: right; font-variant-numeric: tabular-nums }
td.number, td.name { white-space: nowrap }
small { color: #666; display: block } .failed { color: #b00020; font-weight: 600 }
.samples td { white-space: pre-wrap; min-width: 14rem; max-width: 34rem; overflow-wrap: anywhere }
.samples td:first-child { min-width: 0 }
.swatch { display: inline-block; width: 1.4em; height: 0; margin: 0 .4em .25em 0; border-top: 3px solid }
"""

# The legend switches a run in all panels; zooming the steps of one panel zooms them all.
SCRIPT = """
const plots = [...document.querySelectorAll(".plotly-graph-div")];
document.querySelectorAll(".legend input").forEach(box => box.addEventListener("change", () => plots.forEach(plot => {
  const traces = plot.data.flatMap((trace, i) => trace.legendgroup === box.value ? [i] : []);
  if (traces.length) Plotly.restyle(plot, {visible: box.checked}, traces);
})));
const byTouch = matchMedia("(pointer: coarse)").matches;  // a finger that drags wants to scroll the page
if (byTouch) plots.forEach(plot => Plotly.relayout(plot, {dragmode: false}));
let following = false;
plots.forEach(plot => plot.on("plotly_relayout", change => {
  const changes = axis => Object.keys(change).some(key => key.startsWith(axis + ".range"));
  if (changes("yaxis")) Plotly.relayout(plot, {"yaxis.tickmode": "auto"});
  if (following || !changes("xaxis")) return;
  following = true;
  const range = [...plot.layout.xaxis.range];
  Promise.all(plots.filter(other => other !== plot).map(other => Plotly.relayout(other, {"xaxis.range": range})))
    .finally(() => { following = false; });
}));
"""

PLOTTED_POINTS = 2000  # a browser draws more than that slowly


def write_page(runs: Sequence[RunRecord]) -> str:
    """The page as HTML, which loads nothing when it is opened. Raises ModuleNotFoundError without Plotly."""
    import plotly

    alone = len(runs) == 1
    sections = [
        "<h2>Results</h2>",
        results(runs),
        "<h2>Curves</h2>",
        legend(runs),
        f'<div class="panels">{"".join(map(panel, diagrams(runs)))}</div>',
        "<p>Dashed, with dots: validation. Dragging zooms, a double click goes back.</p>",
        "<h2>Recipe</h2>" if alone else "<h2>What differs in the recipes</h2>",
        recipes(runs),
        "<h2>Plan</h2>",
        plans(runs),
        "<h2>Samples</h2>",
        samples(runs),
    ]
    title = html.escape(runs[0].name if alone else f"{len(runs)} runs")
    script = plotly.offline.get_plotlyjs()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style><script>{script}</script></head>\n'
        f"<body><h1>{title}</h1>\n" + "\n".join(sections) + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def legend(runs: Sequence[RunRecord]) -> str:
    """The names of all that the panels show; those of several runs with a box that switches them on and off."""
    entries = []
    for color, run in zip(COLORS * len(runs), runs, strict=False):
        name = html.escape("training" if len(runs) == 1 else run.name)
        box = f'<input type="checkbox" checked value="{html.escape(str(run.folder))}"> ' if len(runs) > 1 else ""
        entries.append(f"<label>{box}{swatch(color)}{name}</label>")
    if len(runs) == 1:
        entries.append(f"<span>{swatch('black', 'dashed')}validation</span>")
        for what in dict.fromkeys(what for _, what in runs[0].marks):
            steps = ", ".join(f"{step:,}" for step, other in runs[0].marks if other == what)
            kind = what.split()[0]
            mark = swatch(MARK_COLORS[kind], "dotted" if kind == "resumed" else "dashed")
            entries.append(f"<span>{mark}{what} (after step {steps})</span>")
    entries += [
        f"<span>{swatch('grey', style)}{loss:.4g} {html.escape(name)}</span>"
        for (loss, name), style in zip(reference_losses(runs), ("dotted", "dashed"), strict=False)
    ]
    if reached_milestones(runs):
        entries.append(f"<span>★ {html.escape(MILESTONES_NAME)}</span>")
    return f'<div class="legend">{"".join(entries)}</div>'


def swatch(color: str, style: str = "solid") -> str:
    return f'<i class="swatch" style="border-top-color:{color};border-top-style:{style}"></i>'


def panel(diagram: Diagram) -> str:
    """One panel as a figure with its title."""
    from plotly.graph_objects import Figure

    figure = Figure()
    runs = list({id(curve.run): curve.run for curve in diagram.curves}.values())
    for curve in diagram.curves:
        add_curve(figure, curve, alone=len(runs) == 1)
    for (loss, _), dash in zip(diagram.lines, ("dot", "dash"), strict=False):
        line = {"color": "grey", "dash": dash, "width": 1.5}
        figure.add_shape(type="line", xref="x domain", x0=0, x1=1, y0=loss, y1=loss, line=line)
    add_milestones(figure, diagram)
    for step, what in runs[0].marks if len(runs) == 1 else ():
        kind = what.split()[0]
        line = {"color": MARK_COLORS[kind], "dash": "dot" if kind == "resumed" else "dash", "width": 1.5}
        figure.add_shape(type="line", yref="y domain", x0=step, x1=step, y0=0, y1=1, line=line)
    place = {"showarrow": False, "yref": "y domain", "yanchor": "middle", "bgcolor": "rgba(255,255,255,0.7)"}
    for note in diagram.end_labels():
        where = {"x": note.step, "y": note.height, "xanchor": "left", "xshift": 3}
        figure.add_annotation(text=note.text, font_color=note.color, **where, **place)
    for note in diagram.spike_labels():
        early = note.step < 0.7 * diagram.end
        text = f"▲ {note.text}" if early else f"{note.text} ▲"
        where = {
            "x": note.step,
            "y": note.height,
            "xanchor": "left" if early else "right",
            "xshift": -7 if early else 7,
        }
        figure.add_annotation(text=text, font_color=note.color, **where, **place)
    ends = (math.log10(diagram.low), math.log10(diagram.high)) if diagram.panel.log_scale else None
    scale = {"type": "log", "tickformat": "~g", "tickvals": log_ticks(diagram.low, diagram.high)} if ends else {}
    frame = {"showline": True, "mirror": True, "linecolor": "#888", "zeroline": False, "nticks": 7}
    figure.update_yaxes(range=ends or (diagram.low, diagram.high), **scale, **frame)
    figure.update_xaxes(title="step", tickformat=",", range=diagram.steps, **frame)
    margin = {"t": 10, "l": 50, "r": 8, "b": 45}
    figure.update_layout(height=330, margin=margin, template="plotly_white", showlegend=False)
    config = {"displayModeBar": False, "responsive": True, "doubleClick": "reset"}
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config=config, default_width="100%")
    return f"<section><h3>{html.escape(diagram.panel.label)}</h3>{drawn}</section>"


def add_curve(figure, curve: Curve, alone: bool) -> None:
    """A curve of a panel; one of many points thin, and its mean over it."""
    from plotly.graph_objects import Scatter

    split = "validation" if curve.validation else "training"
    style = {"color": "black" if alone and curve.validation else curve.color, "width": 1.5}
    every = -(-len(curve.steps) // PLOTTED_POINTS)
    steps = curve.steps[::-1][::every][::-1]  # the last is always among them
    per_step = curve.run.plan["tokens_per_step"]
    shared = {"x": steps, "legendgroup": str(curve.run.folder)}
    if curve.mean:
        thin = {"color": curve.color, "width": 0.7}
        values = curve.values[::-1][::every][::-1]
        figure.add_trace(Scatter(y=values, mode="lines", line=thin, opacity=0.3, hoverinfo="skip", **shared))
        split += f", mean of {curve.window} rows"
    figure.add_trace(
        Scatter(
            y=curve.shown[::-1][::every][::-1],
            customdata=[format_count(float(f"{step * per_step:.4g}")) for step in steps],
            hovertemplate="step %{x:,}, %{customdata} tokens: %{y:.5g}<extra>"
            + f"{html.escape(curve.run.name)}, {split}</extra>",
            mode="lines+markers" if curve.validation or len(steps) == 1 else "lines",
            line=style | {"dash": "dash" if curve.validation else "solid"},
            marker={"size": 5},
            **shared,
        )
    )


def add_milestones(figure, diagram: Diagram) -> None:
    """The losses that others published, each where a run has trained on as many tokens."""
    from plotly.graph_objects import Scatter

    if not diagram.milestones:
        return
    figure.add_trace(
        Scatter(
            x=[milestone.step for milestone in diagram.milestones],
            y=[milestone.loss for milestone in diagram.milestones],
            customdata=[format_count(milestone.tokens) for milestone in diagram.milestones],
            hovertemplate="published at %{customdata} tokens: %{y:.5g}<extra></extra>",
            mode="markers",
            marker={"symbol": "star", "size": 10, "color": "grey"},
        )
    )


def results(runs: Sequence[RunRecord]) -> str:
    """How far each run is, its last and best validation, its time and speed; and what to compare the losses with."""
    lines = [
        [f"{swatch(color)}{html.escape(run.name)}", *result(run)]
        for color, run in zip(COLORS * len(runs), runs, strict=False)
    ]
    header = ["run", "status", "step", "tokens", "validation loss (nats per token)", "perplexity",
              "best validation loss", "duration (h:min:s)", "tokens per second (median)"]  # fmt: skip
    text = table(header, lines, numbers=2)
    if baselines := reference_losses(runs):
        known = "; ".join(f"{loss:.4g} {html.escape(name)}" for loss, name in baselines)
        text += f"<p>To compare with, on the same validation text: {known}.</p>"
    reached = [
        f"<li>{html.escape(run.name)}, step {row['step']:,}, validation loss {row['loss']:.4f}; {words}</li>"
        for run in runs
        for row, words in comparisons(run.recipe.get("milestones"), run.validation)
    ]
    if reached:
        text += f"<p>Beside published losses ({CAVEAT}):</p><ul>{''.join(reached)}</ul>"
    return text


def result(run: RunRecord) -> list[str]:
    """A run's cells in the table of results, a dash for what is not known."""
    how = status(run)
    cells = [how if how == "finished" else f'<span class="failed">{how}</span>', *["-"] * 5]
    if run.validation:
        last = run.validation[-1]
        best = min(run.validation, key=lambda row: row["loss"] if math.isfinite(row["loss"]) else math.inf)
        cells[1:] = [
            f"{last['step']:,}",
            format_count(float(f"{last['tokens']:.4g}")),
            f"{last['loss']:.4f}",
            f"{last['perplexity']:,.2f}",
            f"{best['loss']:.4f} (step {best['step']:,})",
        ]
    seconds = run.plan.get("elapsed_seconds")
    speeds = [row["tokens_per_second"] for row in run.train if row.get("tokens_per_second")]
    cells.append(format_clock(seconds) if seconds else "-")
    cells.append(f"{statistics.median(speeds):,.0f}" if speeds else "-")
    return cells


def recipes(runs: Sequence[RunRecord]) -> str:
    """The settings in which the recipes differ as a table, and below it, folded, all others."""
    different = differing_keys(runs)
    same = [key for key in FIELDS if key not in PLACES and key not in different]
    lines = [[named(key), *(cell(setting(run, key)) for run in runs)] for key in different]
    text = table(["setting", *(html.escape(run.name) for run in runs)], lines) if different else ""
    folded = table(["setting", "value"], [[named(key), cell(setting(runs[0], key))] for key in same])
    summary = "The same in all" if len(runs) > 1 else "All settings"
    return f"{text}<details><summary>{summary}</summary>{folded}</details>"


def named(key: str) -> str:
    """A recipe's key, and what it means."""
    meaning = FIELDS[key].metadata["help"] if key in FIELDS else ""
    return f"<code>{html.escape(key)}</code><small>{html.escape(meaning)}</small>"


def plans(runs: Sequence[RunRecord]) -> str:
    """What the plans say in words, as a table, and below it, folded, all of them as they are."""
    facts = [plan_facts(run) for run in runs]
    lines = [[name, *(html.escape(fact[name]) for fact in facts)] for name in facts[0]]
    full = "".join(
        f"<details><summary>plan.json of {html.escape(run.name)}</summary><pre>"
        f"{html.escape(json.dumps(run.plan, indent=2, ensure_ascii=False))}</pre></details>"
        for run in runs
    )
    return table(["", *(html.escape(run.name) for run in runs)], lines) + full


def plan_facts(run: RunRecord) -> dict[str, str]:
    """What a run's plan says, by what it is about; a dash for what is not known."""
    plan = run.plan

    def known(key: str, text: str) -> str:
        return text.format(plan[key]) if plan.get(key) is not None else "-"

    tokens = plan["total_tokens"]
    peak, end = known("learning_rate_peak", "{:.3g}"), known("learning_rate_floor", "{:.3g}")
    return {
        "model": known("parameters", "{:,} parameters") + known("vocab_size", ", vocabulary of {:,}"),
        "length": f"{plan['total_steps']:,} steps, {tokens:,} tokens" + known("epochs", ", {:.3g} epochs"),
        "global batch": f"{plan['tokens_per_step']:,} tokens: " + known("batch_arithmetic", "{}"),
        "learning rate": f"{peak} at its peak, {end} at the end",
        "warm-up": known("warmup_steps", "{:,} steps") + known("warmup_share", ", {:.1%} of the run"),
        "validation": known("validation_documents", "{:,} documents") + known("validation_blocks", ", {:,} blocks"),
        "arithmetic": known("train_flops", "{:.3g} floating-point operations"),
        "device": known("processes", "{} × ") + str(plan.get("environment", {}).get("device", "-")),
    }


def samples(runs: Sequence[RunRecord]) -> str:
    """The samples of the runs side by side as a table, the newest step first."""
    steps = sorted({step for run in runs for step in run.samples}, reverse=True)
    if not steps:
        return "<p>There are none.</p>"

    def show_round(text: str) -> str:
        return re.sub(r"^\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text), flags=re.MULTILINE)

    lines = [[f"{step:,}", *(show_round(run.samples.get(step, "")) for run in runs)] for step in steps]
    return f'<div class="samples">{table(["step", *(html.escape(run.name) for run in runs)], lines)}</div>'


def cell(value: object) -> str:
    """A value of a recipe as HTML."""
    return html.escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else short(value))


def table(header: Sequence[str], lines: Sequence[Sequence[str]], numbers: int | None = None) -> str:
    """A table in HTML, which scrolls by itself where it is wider than the page. The cells are HTML; those of the
    columns from `numbers` on are aligned as numbers, and those before are not wrapped."""
    head = "".join(f"<th>{name}</th>" for name in header)

    def kind(column: int) -> str:
        return "" if numbers is None else ' class="number"' if column >= numbers else ' class="name"'

    body = "".join(
        f"<tr>{''.join(f'<td{kind(i)}>{value}</td>' for i, value in enumerate(line))}</tr>" for line in lines
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
