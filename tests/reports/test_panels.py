"""What the curves show: axes, labels, levels to compare with, names."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest

from clm_owt.reports.panels import (
    LABEL_HEIGHT,
    PANELS,
    Note,
    by_difference,
    diagrams,
    fill,
    format_last,
    log_ticks,
    reference_losses,
    running_mean,
    series,
    spread,
    status,
)
from clm_owt.reports.record import RunRecord

LOSS, RATE, NORM, SPEED, PENALTY, _ = PANELS


def make_run(
    name: str = "a", losses: tuple[float, ...] = (), plan: dict[str, object] | None = None, **recipe: object
) -> RunRecord:
    """A run of 200 steps from 8.3 down to 4.5, or one with these losses."""
    losses = losses or tuple(4.5 + 3.8 * math.exp(-step / 40) for step in range(200))
    train = [
        {"step": step, "ce_loss": loss, "grad_norm": loss / 10, "learning_rate": 1e-3, "tokens_per_second": 8000.0,
         "penalty": -0.3, "max_prob": 0.3, "micro_batch": 8}
        for step, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    validation = [{"step": len(losses), "loss": losses[-1], "ce_loss": losses[-1], "penalty": -0.3, "max_prob": 0.3}]
    recipe = {"dataset_name": "text", "penalty_weight": 0.0, "run_name": name, "output_dir": name} | recipe
    plan = {"vocab_size": 4096, "total_steps": 200, "store": "one"} | (plan or {})
    return RunRecord(Path("runs") / name, name, recipe, plan, train, validation, {})


@pytest.mark.parametrize("low", [0.3, 1, 2.85, 4.3, 9.7])
@pytest.mark.parametrize("ratio", [1.05, 1.3, 2, 4, 11, 100, 1e4])
def test_a_logarithmic_axis_has_ticks_enough_to_read_it_and_few_enough_to_print_them(low, ratio):
    ticks = log_ticks(low, low * ratio)
    assert 4 <= len(ticks) <= 14 and low <= ticks[0] and ticks[-1] <= low * ratio
    gaps = [math.log(b / a) / math.log(ratio) for a, b in itertools.pairwise(ticks)]
    assert all(0.07 <= gap <= 0.4 for gap in gaps)


def test_a_loss_that_falls_from_8_to_4_and_a_half_can_be_read_between_4_and_5():
    diagram = fill(LOSS, [make_run()])
    assert any(4 < tick < 5 for tick in log_ticks(diagram.low, diagram.high))


def test_a_spike_in_one_run_is_marked_and_does_not_flatten_the_others():
    losses = [row["ce_loss"] for row in make_run().train]
    spiky = make_run("b", (*losses[:150], 1e8, *losses[151:]))
    for panel, value in ((LOSS, 1e8), (NORM, 1e7)):
        plain, both = fill(panel, [make_run()]), fill(panel, [make_run(), spiky])
        assert both.high == pytest.approx(plain.high, rel=1e-9) and both.low == plain.low
        assert [(beyond.step, beyond.value) for beyond in both.beyond] == [(151, value)]
        curve = both.curves[-2 if panel.validated else -1]
        assert curve.run is spiky and max(curve.mean[150:]) < curve.mean[140]  # it bends no mean
    speed = dataclasses.replace(
        spiky, train=[row | {"tokens_per_second": 1e8} for row in spiky.train[:1]] + spiky.train
    )
    assert fill(SPEED, [speed]).high < 10_000


def test_a_run_that_diverged_is_marked_and_does_not_flatten_the_others():
    lost = make_run("lost", (8.3,) + (1e8,) * 99 + (math.nan,) * 100)
    diagram = fill(LOSS, [make_run(), lost])
    assert diagram.high < 10
    assert [(beyond.step, beyond.text) for beyond in diagram.beyond] == [(101, "not finite")]
    assert len(diagram.end_labels()) == 1  # its last value is none to read
    assert len(fill(NORM, [make_run(), lost]).beyond) == 1


def test_rates_that_differ_much_are_all_shown_unless_one_is_absurd():
    runs = [make_run(), make_run("b")]
    for other, shown in ((0.09, True), (1e30, False)):
        runs[1] = dataclasses.replace(runs[1], train=[row | {"learning_rate": other} for row in runs[1].train])
        diagram = fill(RATE, runs)
        assert (diagram.high > other, diagram.beyond == []) == (shown, shown)


def test_a_gradient_norm_of_zero_is_at_the_bottom_of_its_logarithmic_axis():
    run = make_run()
    run.train[-1]["grad_norm"] = run.train[-2]["grad_norm"] = 0.0
    run.train[:] = run.train[-50:]
    diagram = fill(NORM, [run])
    assert diagram.low > 0.4 and [note.text for note in diagram.end_labels()] == ["0"]


def test_a_penalty_below_zero_is_shown():
    diagram = next(d for d in diagrams([make_run(penalty_weight=0.1)]) if d.panel is PENALTY)
    assert diagram.low < -0.3 and diagram.high == 0


def heights(*notes: tuple[int, float]) -> list[float]:
    return [note.height for note in spread([Note("black", step, height, "") for step, height in notes])]


def test_labels_at_the_same_height_are_moved_apart_and_stay_inside():
    gap = LABEL_HEIGHT
    assert heights((1, 0.5)) == [0.5]
    assert heights((1, 0.5), (1, 0.9), (1, 0.5)) == pytest.approx([0.5 - gap / 2, 0.5 + gap / 2, 0.9])
    assert heights((1, 0.0), (1, 0.99), (1, 1.0)) == pytest.approx([gap / 2, 1 - 1.5 * gap, 1 - 0.5 * gap])


def test_only_labels_of_curves_that_end_near_each_other_move():
    ends = [make_run("a"), make_run("b"), make_run("short", tuple(row["ce_loss"] for row in make_run().train[:100]))]
    diagram = fill(LOSS, ends)
    notes = {note.step: note.height for note in diagram.end_labels() if note.step == 100}
    assert notes == {100: diagram.height(ends[2].validation[-1]["ce_loss"])}
    low, high = (note.height for note in diagram.end_labels() if note.step == 200)
    assert high - low == pytest.approx(LABEL_HEIGHT)


def test_spikes_near_each_other_are_named_below_each_other():
    losses = [row["ce_loss"] for row in make_run().train]
    runs = [make_run(str(at), (*losses[:at], 10.0**at, *losses[at + 1 :])) for at in (100, 103, 180)]
    notes = [(note.text, round((1 - note.height) / LABEL_HEIGHT, 6)) for note in fill(LOSS, runs).spike_labels()]
    assert notes == [("1e+100", 0.5), ("1e+103", 1.5), ("1e+180", 0.5)]


@pytest.mark.parametrize(
    ("value", "text"), [(4e-4, "0.0004"), (1.234e-4, "1.2e-4"), (0.123, "0.123"), (4e29, "4e+29")]
)
def test_last_values_of_rates_are_short(value, text):
    assert format_last(RATE, value) == text


def test_losses_of_ngram_models_are_levels_where_the_runs_have_the_same_data():
    known = make_run(plan={"baselines": {"unigram": 6.7, "bigram": 4.5, "blocks": 10}})
    assert reference_losses([make_run("b")]) == []
    assert reference_losses([make_run("b"), known]) == [(6.7, "unigram model"), (4.5, "bigram model")]
    assert fill(LOSS, [known]).low < 4.5
    assert reference_losses([make_run("b", plan={"store": "other"}), known]) == []


def names(*runs: RunRecord) -> list[str]:
    return [run.name for run in by_difference(runs)]


def test_runs_are_named_by_what_differs_in_their_results():
    one, other = make_run("a", penalty_weight=0.0), make_run("b", penalty_weight=0.01, logging_steps=2)
    assert names(one, other) == ["penalty_weight=0", "penalty_weight=0.01"]
    # An older recipe lacks a key; its default is what it meant.
    assert names(one, make_run("b", optimizer="adamw", seed=43)) == ["seed=42", "seed=43"]
    assert names(one, make_run("b", gradient_checkpointing=True)) == [
        "gradient_checkpointing=false",
        "gradient_checkpointing=true",
    ]


def test_runs_that_settings_do_not_tell_apart_are_named_by_their_folders():
    assert names(make_run("a"), make_run("b")) == ["a", "b"]
    many = {"n_layer": 2, "n_head": 2, "n_embd": 32, "seed": 1}
    assert names(make_run("a"), make_run("b", **many)) == ["a", "b"]
    twins = [make_run("a"), dataclasses.replace(make_run("a"), folder=Path("elsewhere/a"))]
    assert names(*twins) == ["runs/a", "elsewhere/a"]


def test_a_run_that_did_not_finish_says_how_far_it_came():
    assert status(make_run(plan={"finished": True})) == "finished"
    assert status(make_run(losses=(8.0,) * 40)) == "not finished: step 40 of 200"
    assert status(make_run(losses=(8.0, math.nan))) == "failed: loss not finite at step 2 of 200"


def test_values_that_are_not_finite_are_left_out():
    rows = [
        {"step": 1, "x": 1.0},
        {"step": 2, "x": math.inf},
        {"step": 3},
        {"step": 4, "x": None},
        {"step": 5, "x": 2},
    ]
    assert series(rows, "x") == ([1, 5], [1.0, 2])


def test_the_running_mean_begins_with_what_there_is():
    assert running_mean([1, 3, 5, 7], 2) == [1, 2, 4, 6]
