import numpy as np
import pytest
import torch
from support.bigram import SHARES, Bigram, pairs, probabilities, random_bigram, random_windows

from clm_owt.evaluation.calibration import bin_of, calibration
from clm_owt.evaluation.generation import write_on

CALIBRATED = Bigram(np.log(SHARES / SHARES.sum(1, keepdims=True)))  # as the text of `pairs()` is


def brute_force(rows: list[tuple[list[float], int]], bins: int) -> tuple[float, float, list[tuple]]:
    """Top-label and class-wise ECE and the bins of the reliability diagram by their definitions, with loops."""

    def mean_gaps(scores: list[tuple[float, bool]]) -> tuple[float, list[tuple]]:
        gap, found = 0.0, []
        for b in range(bins):
            inside = [(p, hit) for p, hit in scores if b / bins < p <= (b + 1) / bins]
            if inside:
                confidence, accuracy = (sum(column) / len(inside) for column in zip(*inside, strict=True))
                gap += len(inside) / len(scores) * abs(accuracy - confidence)
                found.append((len(inside), confidence, accuracy))
            else:
                found.append((0, None, None))
        return gap, found

    top_label, diagram = mean_gaps([(max(q), q.index(max(q)) == target) for q, target in rows])
    vocabulary = range(len(rows[0][0]))
    classwise = [mean_gaps([(q[token], target == token) for q, target in rows])[0] for token in vocabulary]
    return top_label, sum(classwise) / len(classwise), diagram


@pytest.mark.parametrize(("bins", "temperature"), [(15, 1.0), (4, 0.6), (1, 1.0)])
def test_errors_and_bins_are_what_loops_over_their_definitions_give(bins, temperature):
    model, windows = random_bigram(9), [window for seed in range(8) for window in random_windows(9, seed)]
    found = calibration(model, windows, batch_size=3, temperature=temperature, bins=bins)
    top_label, classwise, diagram = brute_force(probabilities(model, windows, temperature), bins)
    assert found.top_label_ece == pytest.approx(top_label, rel=1e-5)
    assert found.classwise_ece == pytest.approx(classwise, rel=1e-5)
    assert [bin.count for bin in found.bins] == [count for count, _, _ in diagram]
    for mine, (_, confidence, accuracy) in zip(found.bins, diagram, strict=True):
        assert (mine.confidence, mine.accuracy) == (pytest.approx(confidence, rel=1e-5), pytest.approx(accuracy))


def test_a_calibrated_model_has_no_error_and_its_diagram_is_the_diagonal():
    found = calibration(CALIBRATED, pairs(), batch_size=100)
    assert found.top_label_ece == pytest.approx(0, abs=1e-6) and found.classwise_ece == pytest.approx(0, abs=1e-6)
    assert all(bin.accuracy == pytest.approx(bin.confidence, abs=1e-6) for bin in found.bins if bin.count)


def test_one_bin_gives_the_difference_of_mean_confidence_and_accuracy_in_closed_form():
    temperature = 0.5  # squares the probabilities
    found = calibration(CALIBRATED, pairs(), batch_size=100, temperature=temperature, bins=1)
    squares = SHARES**2 / (SHARES**2).sum(1, keepdims=True)
    overconfidence = squares.max(1).mean() - (SHARES / SHARES.sum(1, keepdims=True)).max(1).mean()
    assert found.top_label_ece == pytest.approx(overconfidence, rel=1e-5)
    marginals = np.abs(squares.mean(0) - (SHARES / SHARES.sum(1, keepdims=True)).mean(0))
    assert found.classwise_ece == pytest.approx(marginals.mean(), rel=1e-5)


def test_a_probability_on_the_edge_of_two_bins_is_in_the_lower_one():
    probabilities = torch.tensor([0.0, 0.25, 0.2501, 0.75, 0.7501, 1.0])
    assert bin_of(probabilities, 4).tolist() == [0, 0, 1, 2, 3, 3]


def test_a_bin_without_predictions_has_no_confidence():
    found = calibration(CALIBRATED, pairs(), batch_size=100)
    assert found.bins[0] == (0, None, None) and sum(bin.count for bin in found.bins) == SHARES.sum()


def test_the_errors_by_chance_are_those_of_tokens_drawn_from_the_predictions():
    model, prompts = random_bigram(40), torch.arange(40)[:, None]
    found = []
    for seed in range(6):
        uniform = torch.rand(40, 50, generator=torch.Generator().manual_seed(seed))
        texts, _ = write_on(model, prompts, uniform, temperature=1.0, top_p=1.0, model_temperature=1.0)
        windows = [(ids, 50) for ids in torch.cat((prompts, texts), 1).numpy()]
        found.append(calibration(model, windows, batch_size=10)[:4])
    top_label, classwise, top_label_by_chance, classwise_by_chance = np.mean(found, 0)
    assert classwise_by_chance == pytest.approx(classwise, rel=0.08)  # three standard errors
    assert top_label_by_chance == pytest.approx(top_label, rel=0.4)
    sharper = calibration(model, windows, batch_size=10, temperature=0.5)
    assert sharper.top_label_ece > 3 * sharper.top_label_ece_by_chance
    assert sharper.classwise_ece > 1.5 * sharper.classwise_ece_by_chance


def test_the_batch_size_changes_nothing():
    model, windows = random_bigram(9), random_windows(9)
    assert calibration(model, windows, batch_size=1) == calibration(model, windows, batch_size=5)
