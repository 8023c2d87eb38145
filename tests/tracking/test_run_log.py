import io
import json
import sys
import time
from types import SimpleNamespace

import pytest

from clm_owt.reports.record import read_metrics, read_samples
from clm_owt.state import TrainState
from clm_owt.tracking import run_log
from clm_owt.tracking.run_log import RunLog, cut_back_metrics, cut_back_samples


def rows(*pairs):
    return [{"step": step, "split": split} for step, split in pairs]


def test_rows_after_the_resumed_step_and_a_torn_last_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = rows((0, "validation"), (1, "train"), (2, "train"), (2, "validation"))
    lost = rows((3, "train"), (4, "train"), (4, "validation"))
    path.write_text("".join(json.dumps(row) + "\n" for row in kept + lost) + '{"step": 5, "spl')
    cut_back_metrics(path, TrainState(step=2, validated_step=2))
    assert read_metrics(path) == kept


def test_a_validation_that_was_not_finished_is_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    all_rows = rows((0, "validation"), (2, "train"), (2, "validation"))
    path.write_text("".join(json.dumps(row) + "\n" for row in all_rows))
    cut_back_metrics(path, TrainState(step=2, validated_step=0))
    assert read_metrics(path) == all_rows[:2]


def test_tasks_after_those_that_were_saved_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    all_rows = rows((3, "train"), (3, "validation"), (3, "tasks"))
    path.write_text("".join(json.dumps(row) + "\n" for row in all_rows))
    for tasks_step, kept in ((3, 3), (0, 2)):
        cut_back_metrics(path, TrainState(step=3, validated_step=3, tasks_step=tasks_step))
        assert read_metrics(path) == all_rows[:kept]


def test_samples_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "samples.md"
    path.write_text("## Step 2\n\n**A** b\n\n## Step 4\n\n**A** c\n")
    cut_back_samples(path, TrainState(step=3, sampled_step=2))
    assert path.read_text() == "## Step 2\n\n**A** b\n\n"


def test_what_a_model_wrote_stays_as_it_is_when_a_run_goes_on(tmp_path):
    """Carriage returns and form feeds too, which some count as ends of lines."""
    path = tmp_path / "samples.md"
    content = b"## Step 2\n\n**A** b\rc\r\nd\x0ce\n\n"
    path.write_bytes(content)
    cut_back_samples(path, TrainState(step=3, sampled_step=2))
    assert path.read_bytes() == content


def test_a_heading_in_a_sample_is_no_round(tmp_path):
    path = tmp_path / "samples.md"
    with RunLog(SimpleNamespace(output_dir=str(tmp_path), report_to=()), total_steps=20, is_main=True) as log:
        log.start(TrainState(), {})
        log.samples(2, ["Recipe:\n## Step one"], ["\n## Step 9\n## Step \r## Step 8\n"])
        whole = path.read_bytes()
        log.samples(4, ["A"], [" b"])
    assert list(read_samples(path)) == [2, 4]
    cut_back_samples(path, TrainState(step=3, sampled_step=2))
    assert path.read_bytes() == whole
    assert whole.startswith(b"## Step 2\n\n**Recipe:\n\\## Step one**\n\\## Step 9\n")


@pytest.mark.parametrize("line", ["## Step one**", "## Step 2024 of the plan", "## Step "])
def test_a_heading_in_a_sample_of_an_earlier_version_stays(tmp_path, line):
    path = tmp_path / "samples.md"
    kept = f"## Step 2\n\n**A** b\n{line}\nc\n\n"
    path.write_text(kept + "## Step 4\n\n**A** c\n\n## St")
    cut_back_samples(path, TrainState(step=3, sampled_step=2))
    assert path.read_text() == kept


def test_a_run_that_continues_without_its_metrics_says_where_they_begin(tmp_path, capsys):
    with RunLog(SimpleNamespace(output_dir=str(tmp_path), report_to=()), total_steps=20, is_main=True) as log:
        log.start(TrainState(step=8), {})
    said = f"{tmp_path / 'metrics.jsonl'} is missing: it begins after step 8, and lacks the rows before\n"
    assert capsys.readouterr().out.startswith(said)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("on_terminal", [False, True])
def test_progress_shows_loss_learning_rate_gradient_norm_throughput_memory_and_time_left(
    tmp_path, capsys, monkeypatch, on_terminal
):
    row = {"step": 5, "loss": 3.25, "learning_rate": 6e-4, "grad_norm": 0.75, "tokens_per_second": 12345.6}
    monkeypatch.setattr(run_log, "memory_used", lambda: "process 1.52 GB")
    if on_terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
    recipe = SimpleNamespace(output_dir=str(tmp_path), report_to=())
    log = RunLog(recipe, total_steps=20, is_main=True)
    log.start(TrainState(), {})
    monkeypatch.setattr(log, "_started", time.monotonic() - 10)  # 5 of 20 steps in 10 s
    log.train_row(row | {"tokens": 640})
    if on_terminal:
        log._progress.start_t -= 10
        log.advance(5)
        log._progress.refresh()
        shown = sys.stderr.getvalue().rsplit("\r", 1)[-1]
        assert "| 5/20 [00:10<00:30, " in shown
        assert ", loss 3.2500, lr 0.0006, gradient norm 0.75, 12,346 tokens/s, process 1.52 GB]" in shown
    else:
        shown = capsys.readouterr().out
        expected = (
            "step 5/20  loss 3.2500  lr 0.0006  gradient norm 0.75  12,346 tokens/s  process 1.52 GB  0:30 left\n"
        )
        assert shown == expected
    log.close()


def test_processes_that_are_not_the_main_one_write_and_print_nothing(tmp_path, capsys):
    with RunLog(SimpleNamespace(output_dir=str(tmp_path), report_to=()), total_steps=20, is_main=False) as log:
        log.start(TrainState(), {})
        log.train_row({"step": 1})
        log.validation_row({"step": 1})
        log.samples(1, ["A"], [" b"])
        log.say("line")
        log.advance(1)
        assert log.unwritten() == []
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_row_keeps_its_keys_in_their_order_after_step_and_split(tmp_path):
    row = {"step": 3, "loss": 2.5, "ce_loss": 2.0, "tokens": 64}
    with RunLog(SimpleNamespace(output_dir=str(tmp_path), report_to=()), total_steps=20, is_main=True) as log:
        log.start(TrainState(), {})
        log.validation_row(row)
    expected = '{"step": 3, "split": "validation", "loss": 2.5, "ce_loss": 2.0, "tokens": 64}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == expected
