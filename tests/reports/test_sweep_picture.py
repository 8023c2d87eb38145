"""The picture of a sweep: its axes, lines, error bars, and what they are of."""

import itertools
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer

from clm_owt.reports.record import RunRecord
from clm_owt.reports.sweep_picture import draw_sweep, is_logarithmic, make_points, sampling_error


def make_run(loss: float, scatter: float = 0.0, rows: int = 40) -> RunRecord:
    """A run whose training rows are in turn `scatter` above and below a line that falls slowly."""
    measures = {"max_prob": 0.2, "entropy": 4.0}
    values = [loss + (-1) ** i * scatter - 1e-6 * i for i in range(rows)]
    train = [{"step": i, "ce_loss": value} | measures for i, value in enumerate(values)]
    plan = {"validation_blocks": 64}
    return RunRecord(Path("a"), "a", {"effective_batch_size": 16}, plan, train, [measures | {"ce_loss": loss}], {})


def swept(**values: list) -> list[tuple[dict, RunRecord]]:
    """A run for each choice, whose loss tells them apart."""
    choices = [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]
    return [(options, make_run(4 + i / 10)) for i, options in enumerate(choices)]


def bars(axes) -> list[ErrorbarContainer]:
    return [container for container in axes.containers if isinstance(container, ErrorbarContainer)]


def test_the_sampling_error_is_that_of_the_training_batches_scaled_to_the_validation_set():
    # Neighbours differ by 0.2: half their mean square difference is 0.02; a batch has a fourth of the blocks.
    assert sampling_error(make_run(4.0, scatter=0.1), "ce_loss") == pytest.approx((0.02 / 4) ** 0.5, rel=1e-4)
    assert sampling_error(make_run(4.0, scatter=0.1, rows=10), "ce_loss") is None  # too few to tell


def test_runs_that_differ_by_their_seed_alone_are_one_point_with_the_interval_of_their_mean():
    runs = swept(penalty_weight=[0.0, 0.1], seed=[1, 2, 3])
    points = make_points(runs)
    assert [(point.options, point.runs) for point in points] == [({"penalty_weight": w}, 3) for w in (0.0, 0.1)]
    assert [point.means["ce_loss"] for point in points] == pytest.approx([4.1, 4.4])
    # Losses 4.0, 4.1, 4.2: deviation 0.1, and Student's t of 2 degrees of freedom is 4.3027.
    assert points[0].errors["ce_loss"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    figure = draw_sweep("sweep", runs)
    assert "means of 3 seeds; bars: their 95% intervals" in figure._suptitle.get_text()
    assert "means of 2 to 3 seeds" in draw_sweep("sweep", runs[:-1])._suptitle.get_text()
    [_, _, [segments]] = bars(figure.axes[0])[0].lines
    low, high = segments.get_segments()[0][:, 1]
    assert (low + high) / 2 == pytest.approx(4.1) and high - low == pytest.approx(2 * points[0].errors["ce_loss"])
    assert len(make_points(swept(seed=[1, 2, 3]))) == 3  # a sweep over seeds alone shows them


def test_an_axis_of_rates_is_logarithmic_and_its_ticks_are_the_rates_that_were_tried():
    rates = [6e-4, 1.2e-3, 1.8e-3, 3e-3]
    axes = draw_sweep("sweep", swept(learning_rate=rates)).axes[0]
    assert axes.get_xscale() == "log" and list(axes.get_xticks()) == rates
    assert draw_sweep("sweep", swept(penalty_weight=[0.0, 0.005, 0.05])).axes[0].get_xscale() == "linear"
    assert is_logarithmic("weight_decay", [0.01, 0.3]) and not is_logarithmic("weight_decay", [0.1, 0.3])


def test_a_second_parameter_is_told_by_the_colour_of_its_line():
    figure = draw_sweep("sweep", swept(optimizer=["adamw", "muon"], learning_rate=[1e-3, 2e-3, 4e-3]))
    assert len(figure.axes) == 3
    lines = {container.get_label(): container.lines[0] for container in bars(figure.axes[0])}
    assert list(lines) == ["optimizer=adamw", "optimizer=muon"]
    assert list(lines["optimizer=muon"].get_ydata()) == pytest.approx([4.3, 4.4, 4.5])
    assert len({line.get_color() for line in lines.values()}) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(lines)


def test_a_search_without_lines_has_a_row_for_each_parameter():
    runs = swept(weight_decay=[0.1, 0.2, 0.3], dropout=[0.0, 0.1, 0.2])[::4]  # each value once
    figure = draw_sweep("sweep", runs)
    assert len(figure.axes) == 6 and [len(bars(axes)[0].lines[0].get_xdata()) for axes in figure.axes] == [3] * 6


def test_words_are_values_too():
    figure = draw_sweep("sweep", swept(penalty_type=["non_max_sum", "neg_entropy"]))
    FigureCanvasAgg(figure).draw()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["non_max_sum", "neg_entropy"]


def test_no_axis_shows_less_than_chance_does():
    noisy = [({"penalty_weight": w}, make_run(4 + w / 1000, scatter=0.1)) for w in (0.0, 0.1, 0.2)]
    low, high = draw_sweep("sweep", noisy).axes[0].get_ylim()
    assert high - low > 2 * sampling_error(noisy[0][1], "ce_loss")
    short = [({"penalty_weight": w}, make_run(4 + w / 1000, rows=3)) for w in (0.0, 0.1, 0.2)]
    figure = draw_sweep("sweep", short)
    low, high = figure.axes[0].get_ylim()
    assert high - low == pytest.approx(0.02 * 4, rel=1e-3) and "not known" in figure._suptitle.get_text()


def test_a_run_that_diverged_is_marked_and_does_not_flatten_the_others():
    losses = {1e-3: 4.2, 2e-3: 4.0, 4e-3: 4.1, 8e-3: 4.3, 1e-1: 1e8}
    axes = draw_sweep("sweep", [({"learning_rate": rate}, make_run(loss)) for rate, loss in losses.items()]).axes[0]
    assert axes.get_ylim()[1] < 5 and [text.get_text() for text in axes.texts] == ["1e+08"]
    assert list(bars(axes)[0].lines[0].get_xdata()) == [1e-3, 2e-3, 4e-3, 8e-3]


def test_a_measure_that_is_bounded_is_shown_wherever_it_is():
    runs = [({"penalty_weight": w}, make_run(4.0)) for w in (0.0, 0.05, 0.2, 0.5)]
    for (_, run), max_prob in zip(runs, (0.06, 0.062, 0.07, 0.2), strict=True):
        run.validation[-1]["max_prob"] = max_prob
    axes = draw_sweep("sweep", runs).axes[1]
    assert len(axes.texts) == 0 and len(bars(axes)[0].lines[0].get_xdata()) == 4


def test_numbers_are_along_the_axis_and_words_are_colours():
    figure = draw_sweep("sweep", swept(penalty_type=["a", "b", "c"], learning_rate=[1e-3, 2e-3]))
    assert figure.axes[0].get_xlabel() == "learning_rate" and len(bars(figure.axes[0])) == 3
