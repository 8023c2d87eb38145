"""Runs as one self-contained HTML page: interactive curves (Plotly, its code inside), samples, plan, recipes."""

import html
import json
import re
from collections.abc import Sequence

from clm_owt.formatting import format_count
from clm_owt.recipe import show
from clm_owt.reports.curves import COLORS, REFERENCE_LINES, is_gpt2_on_openwebtext, panels_of, running_mean, series
from clm_owt.reports.record import RunRecord

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1280px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 }
th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top }
th { background: #f4f4f4 } td.number { text-align: right; font-variant-numeric: tabular-nums }
.samples td { white-space: pre-wrap; max-width: 34rem; overflow-wrap: anywhere }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px }
"""

# What the summary table shows of a plan.
PLAN_KEYS = (
    "parameters",
    "total_steps",
    "total_tokens",
    "epochs",
    "batch_arithmetic",
    "warmup_share",
    "train_flops",
    "processes",
    "device",
)


def write_page(runs: Sequence[RunRecord]) -> str:
    """The page as HTML, which loads nothing when it is opened. Raises ModuleNotFoundError without Plotly."""
    import plotly

    sections = [
        "<h2>Curves</h2>",
        "<p>Dashed, with dots: validation. A click on a name hides it; dragging zooms, a double click goes back.</p>",
        curves(runs),
        "<h2>Results</h2>",
        results(runs),
        "<h2>Recipe</h2>",
        recipe_differences(runs),
        "<h2>Plan</h2>",
        plans(runs),
        "<h2>Samples</h2>",
        samples(runs),
    ]
    title = html.escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    script = plotly.offline.get_plotlyjs()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style><script>{script}</script></head>\n'
        f"<body><h1>{title}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def curves(runs: Sequence[RunRecord]) -> str:
    """All panels in one figure; the legend switches a run on and off in all of them."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    panels = panels_of(runs)
    lines = -(-len(panels) // 2)
    figure = make_subplots(lines, 2, subplot_titles=[panel.label for panel in panels], vertical_spacing=0.3 / lines)
    for i, panel in enumerate(panels):
        where = {"row": i // 2 + 1, "col": i % 2 + 1}
        for color, run in zip(COLORS * len(runs), runs, strict=False):
            per_step = run.plan["tokens_per_step"]
            for rows, split, line in ((run.train, "training", "solid"), (run.validation, "validation", "dash")):
                if rows is run.validation and not panel.validated:
                    continue
                steps, values = series(rows, panel.field)
                if rows is run.train and len(values) > 2000:  # a browser draws more than that slowly
                    every = len(values) // 2000 + 1
                    means = running_mean(values, every)
                    steps, values = steps[every - 1 :: every], means[every - 1 :: every]
                trace = Scatter(
                    x=steps,
                    y=values,
                    customdata=[format_count(float(f"{step * per_step:.4g}")) for step in steps],
                    hovertemplate="step %{x:,}, %{customdata} tokens: %{y:.5g}<extra>"
                    + f"{run.name}, {split}</extra>",
                    name=run.name,
                    legendgroup=run.name,
                    showlegend=i == 0 and rows is run.train,
                    mode="lines" if rows is run.train else "lines+markers",
                    line={"color": color, "dash": line, "width": 1.5},
                    marker={"size": 5},
                )
                figure.add_trace(trace, **where)
            if len(runs) == 1:
                for step in dict(run.marks):
                    names = "<br>".join(what for at, what in run.marks if at == step) if i == 0 else None
                    figure.add_vline(step, line={"dash": "dot", "width": 1}, annotation_text=names, **where)
        if panel.field == "ce_loss" and all(map(is_gpt2_on_openwebtext, runs)):
            last = max(run.plan["total_steps"] for run in runs)
            for loss, name in REFERENCE_LINES:
                line = {"dash": "dot", "color": "grey", "width": 1.5}
                figure.add_trace(Scatter(x=[0, last], y=[loss, loss], name=name, mode="lines", line=line), **where)
        scale = {"type": "log", "tickformat": "~g"} if panel.log_scale else {"rangemode": "tozero"}
        figure.update_yaxes(**scale, **where)
        figure.update_xaxes(title="step", tickformat=",", matches="x", **where)  # zoomed together
    figure.update_layout(
        height=380 * lines,
        margin={"t": 75, "l": 50, "r": 20},
        template="plotly_white",
        legend={"orientation": "h", "y": 1, "yref": "container", "yanchor": "top"},
    )
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})


def results(runs: Sequence[RunRecord]) -> str:
    """The last and the best validation of each run, as a table."""
    lines = []
    for color, run in zip(COLORS * len(runs), runs, strict=False):
        name = f'<span class="swatch" style="background:{color}"></span>{html.escape(run.name)}'
        if run.validation:
            last = run.validation[-1]
            best = min(run.validation, key=lambda row: row["loss"])
            numbers = [
                f"{last['step']:,}",
                f"{last['tokens']:,}",
                f"{last['loss']:.4f}",
                f"{last['perplexity']:,.2f}",
                f"{best['loss']:.4f} (step {best['step']:,})",
            ]
        else:
            numbers = ["-"] * 5
        lines.append([name, *numbers])
    return table(
        ["run", "step", "tokens", "validation loss", "perplexity", "best validation loss"], lines, numbers=True
    )


def recipe_differences(runs: Sequence[RunRecord]) -> str:
    """The keys in which the recipes differ as a table, and below it, folded, all others."""
    keys = list(dict.fromkeys(key for run in runs for key in run.recipe))
    values = {key: [cell(run.recipe.get(key)) for run in runs] for key in keys}
    different = [key for key in keys if len(set(values[key])) > 1]
    header = ["key", *(html.escape(run.name) for run in runs)]
    same = table(["key", "value"], [[key, values[key][0]] for key in keys if key not in different])
    text = table(header, [[key, *values[key]] for key in different]) if different else ""
    return text + f"<details><summary>{'The same in all' if different else 'All settings'}</summary>{same}</details>"


def plans(runs: Sequence[RunRecord]) -> str:
    """PLAN_KEYS of each run as a table, and below it, folded, all of their plans."""
    facts = [run.plan | run.plan.get("environment", {}) for run in runs]
    lines = [[key, *(cell(fact.get(key)) for fact in facts)] for key in PLAN_KEYS]
    full = "".join(
        f"<details><summary>all of {html.escape(run.name)}</summary><pre>"
        f"{html.escape(json.dumps(run.plan, indent=2, ensure_ascii=False))}</pre></details>"
        for run in runs
    )
    return table(["", *(html.escape(run.name) for run in runs)], lines) + full


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
    """A value of a recipe or plan as HTML."""
    if isinstance(value, float):
        return f"{value:g}"
    return html.escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else show(value))


def table(header: Sequence[str], lines: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """A table in HTML. The cells are HTML; with `numbers`, those of all columns but the first are aligned as such."""
    head = "".join(f"<th>{name}</th>" for name in header)
    kind = ' class="number"' if numbers else ""
    body = "".join(
        f"<tr><td>{line[0]}</td>" + "".join(f"<td{kind}>{value}</td>" for value in line[1:]) + "</tr>"
        for line in lines
    )
    return f"<table><tr>{head}</tr>{body}</table>"
