"""The trackers hold what metrics.jsonl holds, nothing twice, over two processes, a kill and a resumption."""

import json
import os
import pkgutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from support.runs import ROOT, environment, launcher, run

from clm_owt import recipe
from clm_owt.recipe import DEFAULT_PROMPTS
from clm_owt.reports.record import TIMING_FIELDS, read_metrics, read_samples
from clm_owt.state import TrainState
from clm_owt.tracking.trackers import TRACKERS, Tracker, Trackers
from clm_owt.training.checkpoint import checkpoints

pytestmark = pytest.mark.xdist_group("trackers")  # its runs are shared

# What people put on their dashboards; `train/mfu` comes with it on a device whose peak is known.
NAMES = {"validation/loss", "validation/perplexity", "train/tokens_per_second"} | {
    f"train/{name}"
    for name in ("loss", "ce_loss", "penalty", "max_prob", "entropy", "perplexity", "learning_rate", "grad_norm")
}


@pytest.fixture(scope="module")
def killed_and_resumed(tiny_recipe, tmp_path_factory):
    """A run of two processes that was killed after its first checkpoint and then finished, and what both sessions
    printed. W&B had a key and no network in the first one, and no key in the second."""
    home = tmp_path_factory.mktemp("watched")
    command = [*launcher("cpu_2proc.yaml"), "--recipe", str(tiny_recipe), "--report_to", *recipe.TRACKERS]
    command += ["--max_steps", "40", "--run_name", "watched"]
    env = environment(home, ACCELERATE_USE_CPU="true")
    folder = home / "runs/watched"
    unreachable = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    with (
        (home / "first.txt").open("w") as output,
        subprocess.Popen(command, cwd=home, env=env | unreachable, start_new_session=True, stdout=output) as process,
    ):
        deadline = time.monotonic() + 200
        while not checkpoints(folder / "checkpoints"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    killed_at = max(row["step"] for row in read_metrics(folder / "metrics.jsonl"))
    assert killed_at < 40
    result = run(command, cwd=home, env=env)
    assert result.returncode == 0, result.stderr
    assert "Continuing after step" in result.stdout
    outputs = ((home / "first.txt").read_text(), result.stdout)
    return SimpleNamespace(home=home, folder=folder, outputs=outputs, killed_at=killed_at)


def expected_points(folder: Path) -> dict[tuple[str, int], float]:
    """Name and step -> value, as the trackers should have them."""
    points = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("step", "split", "tokens", *TIMING_FIELDS) and value is not None:
                points[f"{row['split']}/{name}", row["step"]] = value
    return points


def assert_nothing_twice_and_nothing_else(found: list[tuple[str, int, float]], killed) -> None:
    """`found` may lack points that were on their way when the run was killed, but nothing after."""
    keys = [(name, step) for name, step, _ in found]
    assert len(keys) == len(set(keys)), sorted(key for key in keys if keys.count(key) > 1)[:5]
    expected = expected_points(killed.folder)
    values = {(name, step): value for name, step, value in found}
    assert values.keys() <= expected.keys()
    assert all(value == pytest.approx(expected[key], rel=1e-6) for key, value in values.items())
    missing = expected.keys() - values.keys()
    assert all(step <= killed.killed_at for _, step in missing), sorted(missing, key=lambda key: key[1])[-3:]


def is_metric(name: str) -> bool:
    return name.startswith(("train/", "validation/")) and name.split("/")[1] not in TIMING_FIELDS


def read_wandb(folder: Path, kind: str) -> list[dict]:
    """The records of a kind in the offline files of all sessions, in their order."""
    records = []
    for session in sorted(folder.glob("wandb/offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(session)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        records += [line[kind] for line in lines if line["type"] == kind]
    return records


def test_wandb_holds_the_metrics_of_one_run(killed_and_resumed):
    folder = killed_and_resumed.folder
    items = [record["item"] for record in read_wandb(folder, "history")]
    found = [(name, item["_step"], value) for item in items for name, value in item.items() if is_metric(name)]
    assert_nothing_twice_and_nothing_else(found, killed_and_resumed)
    assert all(
        item["step"] == item["_step"] and item["tokens"] == 256 * item["step"] for item in items if "step" in item
    )
    assert {name for item in items for name in item} >= NAMES
    runs = read_wandb(folder, "run")
    assert len(runs) == 2 and len({run["run_id"] for run in runs}) == 1  # one for each session; two processes, one run
    config = read_wandb(folder, "config")[0]["update"]
    assert config["learning_rate"] == 3e-3 and config["total_steps"] == 40
    tables = [item["samples.nrows"] for item in items if "samples.nrows" in item]
    assert tables and set(tables) == {3}
    summaries = [update for record in read_wandb(folder, "summary") if (update := record.get("update"))]
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"]
    best = [update["best_validation_loss"] for update in summaries if "best_validation_loss" in update]
    assert best[-1] == min(row["loss"] for row in rows)


def test_wandb_is_offline_without_a_network_or_a_key_and_says_how_to_sync_later(killed_and_resumed):
    reasons = ("127.0.0.1 cannot be reached: [Errno 111] Connection refused", "no API key; `wandb login`")
    for output, reason in zip(killed_and_resumed.outputs, reasons, strict=True):
        sync = "wandb sync runs/watched/wandb/offline-run-*"
        assert [line for line in output.splitlines() if "W&B" in line] == [
            f"W&B is offline ({reason}); to sync it later: {sync}"
        ]


def test_tensorboard_holds_the_metrics_of_one_run(killed_and_resumed):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    points = [
        (value.tag, event.step, make_ndarray(value.tensor))
        for file in (killed_and_resumed.folder / "tensorboard").glob("events.out.tfevents.*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    found = [(tag, step, float(value)) for tag, step, value in points if is_metric(tag)]
    assert_nothing_twice_and_nothing_else(found, killed_and_resumed)
    assert {tag for tag, _, _ in points} >= NAMES
    samples = {step: value.item().decode() for tag, step, value in points if tag.startswith("samples")}
    rounds = read_samples(killed_and_resumed.folder / "samples.md")
    assert samples and all(text == rounds[step] for step, text in samples.items())


def test_trackio_holds_the_metrics_of_one_run(killed_and_resumed):
    with sqlite3.connect(killed_and_resumed.home / "hf/trackio/clm_owt.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert not [line for output in killed_and_resumed.outputs for line in output.splitlines() if line[:2] == "* "]
    found = [
        (name, step, value)
        for _, step, metrics in rows
        for name, value in json.loads(metrics).items()
        if is_metric(name)
    ]
    assert_nothing_twice_and_nothing_else(found, killed_and_resumed)
    logged = [json.loads(metrics) for _, _, metrics in rows]
    assert {name for metrics in logged for name in metrics} >= NAMES
    tables = [metrics["samples"]["_value"] for metrics in logged if "samples" in metrics]
    assert tables and all([line["prompt"] for line in table] == list(DEFAULT_PROMPTS) for table in tables)


class Kept(Tracker):
    """Keeps the rows of a session."""

    rows: ClassVar[list[tuple[int, dict]]] = []

    def start(self, run_id, config, begun):
        self.rows.clear()

    def row(self, step, values):
        self.rows.append((step, values))

    def finish(self):
        pass


class FailsAtRow(Kept):
    def row(self, step, values):
        raise OSError("disk full")


class FailsAtStart(Kept):
    def start(self, run_id, config, begun):
        raise PermissionError("no")


class FailsAtFinish(Kept):
    def row(self, step, values):
        pass

    def finish(self):
        raise TimeoutError("Timed out.\nReally.")

    def how_to_recover(self):
        return "to send it: send"


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Hands rows of these steps to trackers of these classes, from `state` on; gives what was said."""

    def run_session(*classes: type[Tracker], steps=(1, 2), state=None, written=-1) -> list[str]:
        said = []
        for tracker in classes:
            monkeypatch.setitem(TRACKERS, tracker.__name__, f"{__name__}:{tracker.__name__}")
        recipe = SimpleNamespace(output_dir=str(tmp_path), report_to=[tracker.__name__ for tracker in classes])
        trackers = Trackers(recipe, said.append)
        trackers.start(state or TrainState(), {}, {"train": written, "validation": -1, "samples": -1})
        for step in steps:
            trackers.row("train", {"step": step, "loss": 2.0, "epoch": None, "tokens": 5 * step})
        trackers.summary({"best_validation_loss": 2.0})
        trackers.finish()
        return said

    return run_session


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (FailsAtRow, "OSError: disk full"),
        (FailsAtStart, "PermissionError: no"),
        (FailsAtFinish, "TimeoutError: Timed out. Really."),
    ],
)
def test_a_tracker_that_fails_is_dropped_with_one_line_and_the_others_go_on(session, failing, reason):
    (line,) = session(failing, Kept)
    line_of_all = f"{failing.__name__} failed ({reason}): the run goes on without it; metrics.jsonl has everything"
    assert line == line_of_all + ("; to send it: send" if failing is FailsAtFinish else "")
    assert Kept.rows == [(1, {"train/loss": 2.0, "tokens": 5}), (2, {"train/loss": 2.0, "tokens": 10})]


def test_a_tracker_whose_package_is_broken_costs_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "broken", "no_such_package:Tracker")
    said = []
    trackers = Trackers(SimpleNamespace(output_dir=str(tmp_path), report_to=("broken",)), said.append)
    trackers.start(TrainState(), {}, {})
    trackers.row("train", {"step": 1, "loss": 2.0, "tokens": 5})
    trackers.finish()
    assert said == [
        "broken failed (ModuleNotFoundError: No module named 'no_such_package'): the run goes on without it; "
        "metrics.jsonl has everything"
    ]


def test_the_registry_holds_a_class_for_each_name_that_a_recipe_may_give():
    assert tuple(TRACKERS) == recipe.TRACKERS
    for name, place in TRACKERS.items():
        assert issubclass(pkgutil.resolve_name(place), Tracker), name


def test_a_package_is_imported_only_for_a_run_that_reports_to_it():
    code = (
        "import sys, clm_owt.tracking.trackers\n"
        "assert not {'wandb', 'tensorboard', 'trackio', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_wandb_that_failed_says_how_to_sync_what_it_has(tmp_path, monkeypatch):
    from clm_owt.tracking.wandb_tracker import WandbTracker

    monkeypatch.delenv("WANDB_DIR", raising=False)
    tracker = WandbTracker(SimpleNamespace(output_dir=str(tmp_path)), print)
    assert tracker.how_to_recover() == f"to sync what it has: wandb sync {tmp_path}/wandb/*run-*"


def test_wandb_takes_the_id_that_a_sweeps_agent_gives(monkeypatch):
    from clm_owt.tracking.wandb_tracker import WandbTracker

    tracker = WandbTracker(SimpleNamespace(output_dir="x"), print)
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert tracker.new_run_id() == "abc"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert tracker.new_run_id() != tracker.new_run_id()


def test_tensorboard_that_cannot_write_costs_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file stands where the folder should be")
    said = []
    trackers = Trackers(SimpleNamespace(output_dir=str(tmp_path), report_to=("tensorboard",)), said.append)
    trackers.start(TrainState(), {}, {"train": -1, "validation": -1, "samples": -1})
    assert len(said) == 1 and said[0].startswith("tensorboard failed (")
    trackers.row("train", {"step": 1, "loss": 2.0, "tokens": 5})
    trackers.finish()


def test_rows_that_an_earlier_session_handed_over_are_not_handed_over_again(session):
    steps = []
    for first, state, written in (
        (range(1, 11), TrainState(), -1),
        (range(5, 7), TrainState(step=4), 10),  # killed at 6 again, before it came to something new
        (range(5, 15), TrainState(step=4), 6),
    ):
        assert session(Kept, steps=first, state=state, written=written) == []
        steps += [step for step, _ in Kept.rows]
    assert steps == list(range(1, 15))


def test_a_run_keeps_its_id_whether_a_checkpoint_or_the_folder_knows_it(tmp_path):
    def start(folder: Path, state: TrainState) -> dict[str, str]:
        folder.mkdir(exist_ok=True)
        trackers = Trackers(SimpleNamespace(output_dir=str(folder), report_to=("tensorboard",)), print)
        trackers.start(state, {}, {})
        trackers.finish()
        return state.tracker_ids

    ids = start(tmp_path / "first", TrainState())
    assert start(tmp_path / "first", TrainState()) == ids  # killed before its first checkpoint
    assert start(tmp_path / "second", TrainState(tracker_ids=dict(ids))) == ids  # only its checkpoints were moved
    assert start(tmp_path / "other", TrainState()) != ids


def test_a_package_that_is_missing_is_an_error_before_anything_else(tiny_recipe, tmp_path):
    code = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "trackio" else found(name, *a)
from run_clm_owt import main
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "--recipe", str(tiny_recipe), "--report_to", "trackio"]
    result = run(command, cwd=tmp_path, env=environment(tmp_path, PYTHONPATH=str(ROOT)))
    assert result.returncode == 2
    assert "report_to: trackio is not installed; pip install trackio" in result.stderr
