import csv
import re

import pytest

from clm_owt.reports.comparison import Difference
from clm_owt.reports.study_findings import UNPENALISED, Findings, ModelMeasures, StudiedRun, pooled_bins
from clm_owt.reports.study_report import StudyText, number, show, write_report

T2 = 4.302652729911275  # Student's t of 2 degrees of freedom, 97.5 %
NAMES = ("entropy", "max_prob", "top_k_mass", "ce_loss", "top_label_ece", "temperature_1/seq_rep_4")


def model(temperature: float = 1.0, **values: float) -> ModelMeasures:
    bins = [(0, None, None), (10, 0.4, 0.5), (30, 0.9, 0.8)]
    curves = {"temperature_1": {"generated": [2.0] * 40, "real": [1.0] * 40}}
    return ModelMeasures(dict.fromkeys(NAMES, 1.0) | values, bins, curves, temperature)


def predict(values, penalty_type: str, weight: float) -> dict[str, float]:
    """As if every entropy fell by the weight times itself."""
    return {"entropy": -weight * values["entropy"], "ce_loss": weight**2}


def three_seeds(*effects: float) -> list[StudiedRun]:
    """At λ = 0 the entropies 2, 3 and 4; at λ = 0.5 these and `effects`, and controls that lie 0.1, 0.2, 0.3 lower."""
    runs = []
    for seed, (entropy, effect) in enumerate(zip((2.0, 3.0, 4.0), effects, strict=True), 1):
        own = entropy + effect
        control = model(0.8, entropy=own, ce_loss=1 - 0.1 * seed)
        runs.append(StudiedRun("neg_entropy", 0.0, seed, model(entropy=entropy)))
        runs.append(StudiedRun("neg_entropy", 0.5, seed, model(entropy=own), control))
    return runs


SETTING = ("neg_entropy", 0.5)


def test_an_effect_is_the_mean_over_equal_seeds_with_its_interval():
    effect = Findings(three_seeds(-1.0, -1.5, -2.0), predict).effects("entropy")[SETTING]
    assert effect.mean == pytest.approx(-1.5) and effect.pairs == 3
    assert effect.high - effect.mean == pytest.approx(T2 * 0.5 / 3**0.5)


def test_an_effect_is_tested_against_the_prediction_of_the_models_without_a_penalty():
    as_predicted = Findings(three_seeds(-1.01, -1.49, -2.0), predict)
    assert as_predicted.predictions("entropy", SETTING) == {1: -1.0, 2: -1.5, 3: -2.0}
    departure = as_predicted.departures("entropy")[SETTING]
    assert departure.mean == pytest.approx(0.0) and not departure.beyond_chance
    other = Findings(three_seeds(-0.5, -1.0, -1.51), predict).departures("entropy")[SETTING]
    assert other.mean == pytest.approx(0.4967, abs=1e-4) and other.beyond_chance
    assert as_predicted.predictions("max_prob", SETTING) == {} and as_predicted.departures("max_prob") == {}


def test_what_is_beyond_a_temperature_is_the_model_minus_its_control():
    findings = Findings(three_seeds(-1.0, -1.5, -2.0), predict)
    beyond = findings.beyond_temperature("ce_loss")[SETTING]
    assert beyond.mean == pytest.approx(0.2)
    assert beyond.high - beyond.mean == pytest.approx(T2 * 0.1 / 3**0.5)
    assert findings.beyond_temperature("entropy")[SETTING].mean == 0
    assert findings.temperature(SETTING) == pytest.approx(0.8)


def test_the_intervals_of_several_settings_are_wider():
    runs = three_seeds(-1.0, -1.5, -2.0)
    more = [StudiedRun("top_k_mass", w, s, model(), model()) for w in (0.1, 0.2) for s in (1, 2, 3)]
    alone, among = Findings(runs, predict), Findings(runs + more, predict)
    for differences in ("effects", "departures", "beyond_temperature"):
        narrow, wide = (getattr(found, differences)("ce_loss")[SETTING] for found in (alone, among))
        assert narrow.mean == wide.mean and narrow.high <= wide.high
    narrow, wide = (found.beyond_temperature("ce_loss")[SETTING] for found in (alone, among))
    # 0.95^(1/3) of Student's t with 2 degrees of freedom.
    assert (wide.high - wide.mean) / (narrow.high - narrow.mean) == pytest.approx(7.5817 / T2, rel=1e-3)


def test_small_weights_are_pooled_as_the_slope_of_each_seed():
    runs = []
    for seed, slope in enumerate((0.8, 1.0, 1.5), 1):
        runs.append(StudiedRun("neg_entropy", 0.0, seed, model(entropy=2.0)))
        for weight, more in ((-0.1, 0.0), (0.05, 0.1), (0.1, -0.05), (0.5, 9.0)):  # the last is not small
            own = model(entropy=2.0 - 2.0 * weight * slope + more)
            control = model(entropy=own.values["entropy"], ce_loss=1.0 - weight * slope)
            runs.append(StudiedRun("neg_entropy", weight, seed, own, control))
    found = Findings(runs, predict)
    # Of y = -2 a λ + (0, 0.1, -0.05) on x = -2 λ = (0.2, -0.1, -0.2): a + (-0.1 * 0.1 + 0.2 * 0.05) / 0.09 = a.
    response = found.responses("entropy")["neg_entropy"]
    assert response.mean == pytest.approx(1.1) and response.pairs == 3
    assert response.high - response.mean == pytest.approx(T2 * 0.13**0.5 / 3**0.5)
    assert found.slopes_beyond_temperature("ce_loss")["neg_entropy"].mean == pytest.approx(1.1)
    assert found.responses("max_prob") == {}


def test_a_run_that_failed_leaves_its_pair_out():
    runs = three_seeds(-1.0, -1.5, -2.0)
    runs[1] = StudiedRun("neg_entropy", 0.5, 1, None, None, "the run failed (1)")
    runs[4] = StudiedRun("neg_entropy", 0.0, 3, None, None, "the run failed (1)")
    found = Findings(runs, predict)
    assert found.effects("entropy")[SETTING] == Difference(-1.5, float("-inf"), float("inf"), 1)
    assert found.departures("entropy")[SETTING].pairs == 1
    assert found.beyond_temperature("entropy")[SETTING].pairs == 2
    assert list(found.measured(UNPENALISED)) == [1, 2]


def test_bins_of_several_models_are_pooled_by_their_counts():
    few, many = model(), model()
    many.bins[1] = (30, 0.2, 0.1)
    assert pooled_bins([few, many])[0] == (40, pytest.approx(0.25), pytest.approx(0.2))


@pytest.mark.parametrize(
    ("difference", "shown"),
    [
        (Difference(0.0123456, 0.0103456, 0.0143456, 3), "+0.0123 ± 0.0020"),
        (Difference(0.0000123, -0.0000877, 0.0001123, 3), "+0.00001 ± 0.00010, cannot be told from chance"),
        (Difference(-1.5, float("-inf"), float("inf"), 1), "-1.5000, of one seed: cannot be told from chance"),
        (None, "-"),
    ],
)
def test_a_difference_is_shown_with_its_interval_and_whether_it_could_be_chance(difference, shown):
    assert show(difference) == shown


def test_a_number_has_the_digits_of_its_interval():
    assert number(0.000012345, 0.0000021) == "+0.0000123" and number(12.3, 5.0) == "+12.3000"


def test_the_report_says_what_was_found_and_its_page_loads_nothing(tmp_path):
    runs = [*three_seeds(-0.5, -1.0, -1.51), StudiedRun("neg_entropy", 0.7, 1, None, None, "the run failed (1)")]
    said = write_report(StudyText("The study of <x>", "python x", ["About `x`"]), Findings(runs, predict), tmp_path)
    assert said[0] == "`neg_entropy`, entropy (nats): changed at no λ beyond chance; other than predicted at every λ"
    assert said[1] == "`neg_entropy`, max-probability: changed at no λ beyond chance"
    assert said[-1] == "`neg_entropy`, beyond a temperature: nothing; every difference cannot be told from chance"
    report = (tmp_path / "report.md").read_text()
    assert "- Left out: neg_entropy, λ = 0.7, seed 1: the run failed (1)" in report
    row = ["entropy (nats)", "0.5", "-1.0033 ± 1.2545, cannot be told from chance", "-1.5000", "+0.4967 ± 0.0143"]
    assert row in [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    page = (tmp_path / "report.html").read_text()
    assert "The study of &lt;x&gt;" in page and page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    with (tmp_path / "effects.csv").open() as file:
        rows = {(row["measure"], row["penalty_weight"]): row for row in csv.DictReader(file)}
    effect = rows["entropy", "0.5"]
    assert (effect["pairs"], effect["beyond_chance"], effect["departure_beyond_chance"]) == ("3", "no", "yes")
    assert rows["entropy", "0.7"]["mean"] == ""
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "beyond_temperature.png", "drift.png", "effects.png", "reliability.png"
    ]  # fmt: skip
