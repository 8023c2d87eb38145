"""training_curves.png, scripts/plot_run.py and its page, and what is seen of them in a browser."""

import asyncio
import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import plot_run
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from support.browser import Page, open_page
from support.runs import ROOT, environment

from clm_owt.errors import InputError
from clm_owt.reports import curves
from clm_owt.reports.curves import Curves, draw, save_picture
from clm_owt.reports.page import write_page
from clm_owt.reports.panels import MILESTONES_NAME, diagrams
from clm_owt.reports.record import RunRecord, read_metrics

PLAN = {
    "tokens_per_step": 524288,
    "total_steps": 20_000,
    "total_tokens": 20_000 * 524288,
    "parameters": 124439808,
    "vocab_size": 50257,
}


def write_run(folder: Path, penalty_weight: float = 0.0, milestones: dict[int, float] | None = None, **plan) -> Path:
    """The files of a run of 20,000 steps, 10.5 billion tokens, with a smooth loss."""
    folder.mkdir()
    recipe = {
        "run_name": "its name",
        "output_dir": str(folder),
        "dataset_name": "Skylion007/openwebtext",
        "penalty_weight": penalty_weight,
        "milestones": milestones,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "plan.json").write_text(json.dumps(PLAN | plan))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(0, 20_001, 100):
            loss = 3 + 7.8 * math.exp(-step / 900)
            row = {"step": step, "loss": loss, "ce_loss": loss, "penalty": 0.5, "max_prob": 0.4}
            row |= {"perplexity": math.exp(loss), "tokens": step * PLAN["tokens_per_step"]}
            train = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1e5}
            train["micro_batch"] = 16 if step < 9000 else 12
            if step:
                file.write(json.dumps(row | train | {"split": "train"}) + "\n")
            if step % 500 == 0:
                file.write(json.dumps(row | {"split": "validation"}) + "\n")
    (folder / "samples.md").write_text(
        f"## Step 0\n\n**Once** <b>{folder.name}</b>\n\n## Step 500\n\n**Once** upon {folder.name}\n\n"
    )
    return folder


def test_a_run_is_read_planned_and_drawn_without_torch():
    modules = "clm_owt.planning.plan, clm_owt.reports.curves, clm_owt.reports.page, clm_owt.reports.model_card"
    code = f"import {modules}, sys; assert not {{'torch', 'accelerate', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def rewrite_rows(folder: Path, change: Callable[[dict], dict]) -> Path:
    """Change the rows of a run's metrics."""
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(change(row)) + "\n" for row in read_metrics(path)))
    return folder


def texts(figure) -> str:
    """All that a figure says."""
    return "\n".join(artist.get_text() for artist in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_the_curves_show_marks_and_references_where_they_belong(tmp_path):
    shown = texts(draw([RunRecord.read(write_run(tmp_path / "a", resumed_after=[4000]))]))
    for text in ("resumed", "micro-batch 16 → 12", "3.12 GPT-2 124 M", "validation", "gradient norm", "learning rate"):
        assert text in shown
    assert "sharpness penalty" not in shown
    other = draw([RunRecord.read(write_run(tmp_path / "b", 0.01, vocab_size=400))])
    assert "sharpness penalty" in texts(other) and "GPT-2 124 M" not in texts(other)


def test_milestones_that_were_reached_are_shown_where_they_belong(tmp_path):
    reached = RunRecord.read(write_run(tmp_path / "a", milestones={5 * 10**9: 3.193, 20 * 10**9: 3.024}))
    figure = draw([reached])
    assert MILESTONES_NAME in texts(figure)
    (stars,) = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert stars.get_xydata().tolist() == [[5e9 / 524288, 3.193]]
    page = write_page([reached])
    assert f"★ {MILESTONES_NAME}" in page and '"symbol":"star"' in page and '"customdata":["5 B"]' in page
    assert "step 10,000, validation loss 3.0001; published at 5 B tokens: 3.193, this run is 0.193 below it" in page
    without = RunRecord.read(write_run(tmp_path / "b", milestones={20 * 10**9: 3.024}))
    assert MILESTONES_NAME not in texts(draw([without])) + write_page([without])


def test_milestones_of_several_runs_are_shown_once_and_within_the_axis(tmp_path):
    runs = [RunRecord.read(write_run(tmp_path / name, milestones={5 * 10**9: 1.5})) for name in "abc"]
    diagram = diagrams([*runs, RunRecord.read(write_run(tmp_path / "d"))])[0]
    assert [(milestone.tokens, milestone.loss) for milestone in diagram.milestones] == [(5 * 10**9, 1.5)]
    assert diagram.low < 1.5


def test_several_runs_are_named_in_the_legend(tmp_path):
    runs = [RunRecord.read(write_run(tmp_path / name)) for name in ("first", "second")]
    (legend,) = draw(runs).legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["first", "second"]


def test_the_last_value_of_each_curve_is_written_inside_the_frame_of_its_panel(tmp_path):
    def dear(row):  # the widest numbers, and a spike that is marked near the right end
        return row | {
            "tokens_per_second": 123456.7,
            "learning_rate": 1.234e-4,
            "grad_norm": 1e8 if row["step"] == 20_000 else 12.3,
        }

    one = rewrite_rows(write_run(tmp_path / "one"), dear)
    runs = [RunRecord.read(folder) for folder in (one, *(write_run(tmp_path / f"{i}") for i in range(7)))]
    for shown, ending in ((runs[:1], ["3.000", "3.000"]), (runs, ["3.000"] * 8)):
        figure = draw(shown)
        FigureCanvasAgg(figure).draw()
        panels = figure.axes[:4]
        assert [text.get_text() for text in panels[0].texts] == ending
        assert "123,457" in [text.get_text() for text in panels[3].texts]
        assert "1e+08" in [text.get_text() for text in panels[2].texts]
        for axes in panels:
            boxes = [text.get_window_extent() for text in axes.texts]
            frame = axes.get_window_extent()
            assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_all_panels_begin_and_end_at_the_same_step(tmp_path):
    figure = draw([RunRecord.read(write_run(tmp_path / "a", 0.01))])
    assert len({axes.get_xlim() for axes in figure.axes}) == 1 and len(figure.axes) == 6


def test_a_run_without_a_row_is_drawn(tmp_path):
    folder = write_run(tmp_path / "a", 0.01)
    (folder / "metrics.jsonl").unlink()
    FigureCanvasAgg(draw([RunRecord.read(folder)])).draw()
    assert "not finished: step 0 of 20,000" in write_page([RunRecord.read(folder)])


def test_pictures_are_written_in_the_format_of_their_name(tmp_path):
    run = RunRecord.read(write_run(tmp_path / "a"))
    save_picture([run], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    save_picture([run], tmp_path / "a.svg")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.png", "a.svg"]


def test_the_picture_beside_the_training_is_of_the_last_request(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save_picture", lambda runs, path: drawn.append(len(runs[0].validation)))
    folder = write_run(tmp_path / "a")
    drawing = Curves(folder, print)
    for _ in range(5):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 1, "split": "validation"}) + "\n")
        drawing.redraw()
    drawing.finish()
    assert drawn[-1] == 41 + 5


def test_a_picture_that_cannot_be_drawn_costs_one_line(tmp_path):
    said = []
    drawing = Curves(tmp_path / "nothing", said.append)
    drawing.redraw()
    drawing.finish()
    assert len(said) == 1 and said[0].startswith("training_curves.png could not be drawn")


@pytest.fixture
def page(tmp_path) -> Path:
    two = write_run(tmp_path / "two <run>", 0.02, resumed_after=[4000, 12_000], finished=True, elapsed_seconds=7384.2)
    one = write_run(tmp_path / "one", resumed_after=[700])
    plot_run.main([str(one), str(two), "--output", str(tmp_path / "page.html")])
    return tmp_path / "page.html"


def outside_of_plotly(page: Path) -> str:
    """The page without the code of the library, which comes first."""
    text = page.read_text()
    return text[text.index("</script>") :]


def test_the_page_holds_everything_and_loads_nothing(page):
    outside = outside_of_plotly(page)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", outside)
    for expected in ("penalty_weight=0", "penalty_weight=0.02", "<td>0</td><td>0.02</td>", "124,439,808 parameters"):
        assert expected in outside
    assert "<b>Once</b> &lt;b&gt;one&lt;/b&gt;" in outside  # samples are shown as text
    head = page.read_text()[:500]
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in head


def test_the_page_says_how_each_run_went_and_which_did_not_finish(page):
    outside = outside_of_plotly(page)
    first, second = re.findall(r'<tr><td class="name"><i.*?</tr>', outside)
    assert '<span class="failed">not finished: step 20,000 of 20,000</span>' in first and ">-<" not in second
    assert '<td class="name">finished</td>' in second
    for cell in ("20,000", "10.49 B", "3.0000", "20.09", "2:03:04", "100,000"):
        assert f'<td class="number">{cell}</td>' in second
    assert "3.12 GPT-2 124 M" in outside
    assert outside.count("<table>") == outside.count('<div class="scroll"><table>') > 3


def test_the_page_of_a_run_names_its_marks_once_and_nothing_else(tmp_path):
    run = RunRecord.read(write_run(tmp_path / "a", resumed_after=[4000, 12_000]))
    text = write_page([run])
    outside = text[text.index("</script>") :]
    assert "resumed (after step 4,000, 12,000)" in outside and "micro-batch 16 → 12 (after step 8,900)" in outside
    notes = re.findall(r'"text":"(.*?)"', outside)
    assert [note for note in notes if note != "step"] == ["3.000", "3.000", "0.001", "0.5", "100,000"]
    assert outside.count('"showarrow":') == 5  # Plotly writes "new text" into a note without one


def test_without_a_name_the_drawing_lies_with_the_runs(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    runs.mkdir()
    one, two = write_run(runs / "one"), write_run(runs / "two", 0.02)
    monkeypatch.chdir(tmp_path)
    plot_run.main([str(one)])
    plot_run.main(["runs/one", "runs/two"])
    assert capsys.readouterr().out == f"Drawn: {one}/curves.html\nDrawn: runs/curves.html\n"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and (two.parent / "curves.html").exists()


def test_errors_of_plot_run_are_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    for arguments, message in (
        ([tmp_path], "is no run's folder"),
        ([run, "--output", "a.pdf"], ".png, .svg or .html"),
    ):
        with pytest.raises(InputError, match=message):
            plot_run.main([*map(str, arguments)])
    with pytest.raises(SystemExit, match="2"):
        plot_run.main([str(run), "--output", str(tmp_path / "missing/a.png")])
    assert "there is no folder" in capsys.readouterr().err.splitlines()[-1]


# Of every column of the canvas in which the curve is drawn (the one thing there that has a colour): x, and the mean y.
DRAWN_CURVE = """
(() => {
  const canvas = document.querySelector('[data-metric="%s"] canvas');
  if (!canvas) return null;
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const columns = [];
  for (let x = 0; x < width; x++) {
    const drawn = [];
    for (let y = 0; y < height; y++) {
      const [red, green, blue, alpha] = pixels.subarray(4 * (y * width + x));
      if (alpha > 128 && Math.max(red, green, blue) - Math.min(red, green, blue) > 30) drawn.push(y);
    }
    if (drawn.length) columns.push([x, drawn.reduce((a, b) => a + b) / drawn.length]);
  }
  return columns.length > 100 && columns;
})()
"""


def in_browser(address: str, home: Path, look: Callable[[Page], Awaitable[None]]) -> None:
    async def open_and_look() -> None:
        async with open_page(address, home) as page:
            await look(page)

    asyncio.run(open_and_look())


# A point of the first curve near its end, where it is on the screen.
ON_FIRST_CURVE = """
(() => {
  const line = document.querySelector("path.js-line");
  const { x, y } = line.getPointAtLength(line.getTotalLength() - 50).matrixTransform(line.getScreenCTM());
  return { x, y };
})()
"""


@pytest.mark.browser
def test_the_page_shows_curves_and_samples_in_a_browser_without_a_network(page):
    async def look(browser: Page) -> None:
        lines = "[...document.querySelectorAll('path.js-line')]"
        await browser.wait_for(f"{lines}.length >= 18")  # two runs in six panels, validation in three of them
        # The losses, over most of a panel: all rows, their mean, validation. Plotly draws constants with two points.
        large = f"{lines}.map(line => line.getBBox()).filter(box => box.width > 400 && box.height > 100)"
        assert await browser.evaluate(f"{large}.length") == 6
        shown = await browser.evaluate("document.body.innerText")
        for text in ("cross-entropy (nats per token)", "penalty_weight=0.02", "upon two <run>", "124,439,808"):
            assert text in shown
        notes = "[...document.querySelectorAll('.annotation-text')].map(note => note.textContent)"
        assert set(await browser.evaluate(notes)) == {"3.000", "0.001", "0.5", "100,000", "0.4"}
        point = await browser.evaluate(ON_FIRST_CURVE)
        await browser.move_mouse(point["x"], point["y"])
        hovered = "[...document.querySelectorAll('.hovertext')].map(label => label.textContent).join()"
        assert "B tokens: 3" in await browser.wait_for(hovered)
        drawn = await browser.evaluate(f"{lines}.length")
        await browser.evaluate("document.querySelector('.legend input').click()")  # hides a run in all panels
        await browser.wait_for(f"{lines}.length === {drawn // 2}")
        await browser.evaluate("document.querySelector('.legend input').click()")
        # On a telephone nothing is wider than the screen, and panels stand below each other.
        size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        await browser.call("Emulation.setDeviceMetricsOverride", **size)
        panels = "[...document.querySelectorAll('.panels section')].map(panel => panel.getBoundingClientRect())"
        await browser.wait_for(f"new Set({panels}.map(box => box.left)).size === 1")
        await browser.wait_for("[...document.querySelectorAll('svg.main-svg')].every(svg => svg.clientWidth <= 420)")
        assert await browser.evaluate("document.documentElement.scrollWidth") == 420
        assert browser.requests == [page.as_uri()]
        assert browser.failures == []

    in_browser(page.as_uri(), page.parent, look)


LOG_ROWS = """
import json, sys
from types import SimpleNamespace
from accelerate import PartialState
from clm_owt.state import TrainState
from clm_owt.tracking.trackers import Trackers
PartialState()
recipe = SimpleNamespace(output_dir=".", report_to=("trackio",), run_name="watched", wandb_project="clm_owt")
trackers = Trackers(recipe, print)
trackers.start(TrainState(), {"learning_rate": 1e-3}, {})
for step, (loss, grad_norm) in enumerate(json.loads(sys.argv[1]), start=1):
    trackers.row("train", {"step": step, "loss": loss, "grad_norm": grad_norm, "tokens": 100 * step})
trackers.finish()
"""


@contextlib.contextmanager
def trackio_dashboard(home: Path, env: dict[str, str]) -> Iterator[str]:
    """Its address."""
    command = [str(Path(sys.executable).parent / "trackio"), "show", "--project", "clm_owt"]
    env = env | {"BROWSER": "true", "PYTHONUNBUFFERED": "1"}  # it would open one by itself
    output = home / "dashboard.txt"
    with output.open("w") as file:
        process = subprocess.Popen(command, env=env, cwd=home, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+[\w/?=]*", output.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)


@pytest.mark.browser
def test_trackios_dashboard_shows_the_curves_of_a_run(tmp_path):
    env = environment(tmp_path, PYTHONPATH=str(ROOT), TRACKIO_DIR=str(tmp_path / "trackio"))
    values = {
        "train/loss": [4 + 6 * math.exp(-step / 8) for step in range(1, 31)],
        "train/grad_norm": [1 + 0.3 * math.sin(step / 4) for step in range(1, 31)],
    }
    rows = json.dumps(list(zip(*values.values(), strict=True)))
    subprocess.run([sys.executable, "-c", LOG_ROWS, rows], env=env, cwd=tmp_path, check=True, timeout=120)

    async def look(browser: Page) -> None:
        for metric, expected in values.items():
            x, y = np.array(await browser.wait_for(DRAWN_CURVE % metric)).T
            steps = 1 + 29 * (x - x[0]) / (x[-1] - x[0])
            expected = np.interp(steps, range(1, 31), expected)
            scale, offset = np.polyfit(expected, y, 1)  # the dashboard chooses its axes
            assert scale < -5  # pixels for one unit, upwards
            assert np.abs(scale * expected + offset - y).max() < 4, metric
        plot = "document.querySelector('[data-metric=\"train/loss\"]')"
        box = await browser.evaluate(f"{plot}.querySelector('canvas').getBoundingClientRect().toJSON()")
        await browser.move_mouse(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tip = await browser.wait_for("document.querySelector('#vg-tooltip-element.visible')?.innerText")
        found = re.search(r"step\W+(\d+)\W+loss\W+([\d.]+)", tip)
        assert found and "watched-" in tip, tip
        assert float(found[2]) == pytest.approx(values["train/loss"][int(found[1]) - 1], rel=1e-3)

    with trackio_dashboard(tmp_path, env) as address:
        in_browser(f"{address}&smoothing=0", tmp_path, look)
