"""scripts/visualize_lr_schedule.py: what it prints, and that it draws a picture only where it is asked to."""

import pytest
import visualize_lr_schedule
from support.runs import ROOT

from clm_owt.errors import InputError

NUMBERS = ["--warmup_steps", "2000", "--total_steps", "1760", "--max_lr", "0.003"]


def test_a_schedule_is_printed_and_no_picture_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    visualize_lr_schedule.main(NUMBERS)
    assert "the warm-up of 2,000 steps never ends" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("others", "label"), [([], "step"), (["owt_32", "owt_512"], "share of the run")])
def test_the_picture_has_the_numbers_in_its_legend_and_room_above_the_highest_rate(others, label):
    recipes = ["--recipe", *(str(ROOT / f"recipes/{name}.yaml") for name in others)] if others else []
    schedules, _ = visualize_lr_schedule.read_arguments([*recipes, *NUMBERS])
    figure = visualize_lr_schedule.draw(schedules)
    (axes,) = figure.axes
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[-1] == "0.003, 2,000 of 1,760 steps: 0.00264 after 1,760 steps" and len(names) == len(others) + 1
    assert axes.get_xlabel() == label
    assert axes.get_ylim()[1] > 1.05 * max(line.get_ydata(orig=False).max() for line in axes.lines)


def test_what_is_missing_is_named():
    with pytest.raises(InputError, match="--total_steps: missing"):
        visualize_lr_schedule.main(["--max_lr", "1e-3", "--warmup_steps", "5"])


def test_a_decay_of_less_than_a_step_takes_one():
    few = [
        "--warmup_steps",
        "1",
        "--total_steps",
        "10",
        "--max_lr",
        "1",
        "--lr_schedule",
        "wsd",
        "--decay_share",
        "1e-3",
    ]
    (curve,), _ = visualize_lr_schedule.read_arguments(few)
    assert [curve.rate(step) for step in (1, 9, 10)] == [1, 1, 0.1]
