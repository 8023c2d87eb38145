import io
import json
import sys
import time
from types import SimpleNamespace

import pytest

from clm_owt.formatting import clock
from clm_owt.reports.record import read_metrics
from clm_owt.state import TrainState
from clm_owt.tracking import run_log as tracking
from clm_owt.tracking.run_log import (
    Throughput,
    Tracker,
    cut_back_metrics,
    cut_back_samples,
    flops_per_token,
    peak_flops,
)


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


def test_samples_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "samples.md"
    path.write_text("## Step 2\n\n**A** b\n\n## Step 4\n\n**A** c\n")
    cut_back_samples(path, TrainState(step=3, sampled_step=2))
    assert path.read_text() == "## Step 2\n\n**A** b\n\n"


def test_throughput_leaves_out_the_wait_for_data_and_begins_anew_at_each_reading():
    throughput = Throughput(flops_per_token=10.0, peak_flops=1000.0)
    throughput.add(100, step_seconds=1.0, data_seconds=5.0)
    throughput.add(100, step_seconds=3.0, data_seconds=0.0)
    assert throughput.read() == {"tokens_per_second": 50.0, "step_seconds": 2.0, "data_seconds": 5.0, "mfu": 0.5}
    throughput.add(100, step_seconds=1.0, data_seconds=0.0)
    assert throughput.read()["tokens_per_second"] == 100.0


def test_mfu_is_not_told_of_a_device_whose_peak_is_not_known():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Abacus 9000") is None
    throughput = Throughput(10.0, None)
    throughput.add(100, 1.0, 0.0)
    assert "mfu" not in throughput.read()


def test_flops_of_gpt2_small():
    assert flops_per_token(124_439_808, 12, 768, 1024) == 6 * 124_439_808 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3723, "1:02:03"), (float("nan"), "?")])
def test_durations_are_told_as_people_read_them(seconds, text):
    assert clock(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("on_terminal", [False, True])
def test_progress_tells_loss_learning_rate_gradient_norm_throughput_memory_and_time_left(
    tmp_path, capsys, monkeypatch, on_terminal
):
    row = {"step": 5, "loss": 3.25, "learning_rate": 6e-4, "grad_norm": 0.75, "tokens_per_second": 12345.6}
    monkeypatch.setattr(tracking, "memory_used", lambda: 1.52e9)
    if on_terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
    recipe = SimpleNamespace(output_dir=str(tmp_path), report_to=())
    tracker = Tracker(recipe, SimpleNamespace(is_main_process=True), total_steps=20)
    tracker.start(TrainState(), {})
    monkeypatch.setattr(tracker, "_started", time.monotonic() - 10)  # 5 of 20 steps in 10 s
    tracker.train_row(row | {"tokens": 640})
    if on_terminal:
        tracker._progress.start_t -= 10
        tracker.advance(5)
        tracker._progress.refresh()
        shown = sys.stderr.getvalue().rsplit("\r", 1)[-1]
        assert "| 5/20 [00:10<00:30, " in shown
        assert ", loss 3.2500, lr 0.0006, gradient norm 0.75, 12,346 tokens/s, 1.5 GB]" in shown
    else:
        shown = capsys.readouterr().out
        expected = "step 5/20  loss 3.2500  lr 0.0006  gradient norm 0.75  12,346 tokens/s  1.5 GB  0:30 left\n"
        assert shown == expected
    tracker.close()
