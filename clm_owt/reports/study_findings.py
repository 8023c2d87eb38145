"""What a study of the sharpness penalty found: effects over paired seeds, beside prediction and temperature."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from clm_owt.reports.comparison import Difference, compare, paired_difference

Setting = tuple[str, float]  # penalty type and weight
UNPENALISED: Setting = ("", 0.0)  # λ = 0, whatever the penalty
# The effects that are predicted, by measure, from the measures of a model at λ = 0, a penalty and its weight.
Predict = Callable[[Mapping[str, float], str, float], Mapping[str, float]]
# The largest |λ| at which effects are taken to be proportional to λ, and are pooled.
SMALL_WEIGHT = 0.1


@dataclass(frozen=True)
class Measure:
    """One that a study compares: its name in the files, and as it is shown."""

    name: str
    label: str


PREDICTED = (
    Measure("entropy", "entropy (nats)"),
    Measure("max_prob", "max-probability"),
    Measure("top_k_mass", "top-k mass"),
    Measure("ce_loss", "cross-entropy (nats)"),
)
CALIBRATION = (Measure("top_label_ece", "ECE, top label"), Measure("classwise_ece", "ECE, class-wise"))
GENERATION = (
    Measure("entropy_drift", "entropy drift (nats)"),
    Measure("seq_rep_4", "seq-rep-4"),
    *(Measure(f"distinct_{n}", f"distinct-{n}") for n in (1, 2, 3, 4)),
)


@dataclass(frozen=True)
class ModelMeasures:
    """What was measured of a model at a temperature. bins: (count, mean confidence, accuracy) of the calibration, the
    means None where there is none; entropy_by_position: nats, by sampling, of the text that it `generated` and of the
    `real` one."""

    values: dict[str, float]
    bins: list[tuple[int, float | None, float | None]]
    entropy_by_position: dict[str, dict[str, list[float]]]
    temperature: float

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelMeasures":
        return cls(
            content["values"],
            [tuple(bin) for bin in content["bins"]],
            content["entropy_by_position"],
            content["temperature"],
        )


@dataclass(frozen=True)
class StudiedRun:
    """A run of the study; `measures` and `control`, the model of the same seed at λ = 0 and the temperature that makes
    it as sharp, are None where there are none, and `remark` says why."""

    penalty_type: str
    penalty_weight: float
    seed: int
    measures: ModelMeasures | None
    control: ModelMeasures | None = None
    remark: str = ""

    @property
    def setting(self) -> Setting:
        return (self.penalty_type, self.penalty_weight) if self.penalty_weight else UNPENALISED


@dataclass
class Findings:
    """Of the runs of a study. All differences are over paired seeds; those of one measure hold together with 95 %."""

    runs: Sequence[StudiedRun]
    predict: Predict
    seeds: list[int] = field(init=False)

    def __post_init__(self):
        self.seeds = sorted({run.seed for run in self.runs})

    @cached_property
    def settings(self) -> list[Setting]:
        """Those with a penalty, by type in the order of the runs, and by weight."""
        types = list(dict.fromkeys(run.penalty_type for run in self.runs if run.penalty_weight))
        found = {run.setting for run in self.runs if run.penalty_weight}
        return sorted(found, key=lambda setting: (types.index(setting[0]), setting[1]))

    @property
    def types(self) -> list[str]:
        return list(dict.fromkeys(penalty_type for penalty_type, _ in self.settings))

    def of_type(self, penalty_type: str) -> list[Setting]:
        return [setting for setting in self.settings if setting[0] == penalty_type]

    def measured(self, setting: Setting) -> dict[int, ModelMeasures]:
        """By seed."""
        return {run.seed: run.measures for run in self.runs if run.setting == setting and run.measures}

    def controls(self, setting: Setting) -> dict[int, ModelMeasures]:
        """By seed."""
        return {run.seed: run.control for run in self.runs if run.setting == setting and run.control}

    @cached_property
    def measures(self) -> list[str]:
        """The names of all that was measured."""
        return list(next((run.measures.values for run in self.runs if run.measures), {}))

    @property
    def samplings(self) -> list[str]:
        """The names of the ways in which texts were generated."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.measures if "/" in name))

    def effects(self, measure: str) -> dict[Setting, Difference]:
        """Of each setting to λ = 0."""
        reference = values_of(self.measured(UNPENALISED), measure)
        values = {setting: values_of(self.measured(setting), measure) for setting in self.settings}
        paired = {setting: of_seeds for setting, of_seeds in values.items() if of_seeds.keys() & reference.keys()}
        return compare({UNPENALISED: reference, **paired}, UNPENALISED)

    def predictions(self, measure: str, setting: Setting) -> dict[int, float]:
        """The effects predicted to first order by seed, from the models at λ = 0 alone; empty where the theory does
        not give this measure's."""
        found = {}
        for seed, model in self.measured(UNPENALISED).items():
            effect = self.predict(model.values, *setting).get(measure)
            if effect is not None:
                found[seed] = effect
        return found

    def departures(self, measure: str) -> dict[Setting, Difference]:
        """Of the measured effects from the predicted ones."""
        reference, pairs = values_of(self.measured(UNPENALISED), measure), {}
        for setting in self.settings:
            predicted, found = self.predictions(measure, setting), values_of(self.measured(setting), measure)
            seeds = sorted(predicted.keys() & found.keys() & reference.keys())
            if seeds:
                effects = [found[seed] - reference[seed] for seed in seeds]
                pairs[setting] = effects, [predicted[seed] for seed in seeds]
        return {setting: paired_difference(*pair, comparisons=len(pairs)) for setting, pair in pairs.items()}

    def beyond_temperature(self, measure: str) -> dict[Setting, Difference]:
        """Of each setting to its controls: what of its effect a temperature does not give."""
        pairs = {}
        for setting in self.settings:
            found = values_of(self.measured(setting), measure)
            controls = values_of(self.controls(setting), measure)
            seeds = sorted(found.keys() & controls.keys())
            if seeds:
                pairs[setting] = [found[seed] for seed in seeds], [controls[seed] for seed in seeds]
        return {setting: paired_difference(*pair, comparisons=len(pairs)) for setting, pair in pairs.items()}

    def responses(self, measure: str) -> dict[str, Difference]:
        """By penalty type: how many times the predicted effect the measured one is, pooled over the weights up to
        SMALL_WEIGHT, each of which alone tells little. For each seed the slope of the line through 0; its mean over
        the seeds. 1 is as predicted, 0 no effect."""
        reference, found = values_of(self.measured(UNPENALISED), measure), {}
        for setting in self.small_settings:
            predicted = self.predictions(measure, setting)
            for seed, value in values_of(self.measured(setting), measure).items():
                if seed in predicted and seed in reference:
                    point = predicted[seed], value - reference[seed]
                    found.setdefault(setting[0], {}).setdefault(seed, []).append(point)
        return slopes(found)

    def slopes_beyond_temperature(self, measure: str) -> dict[str, Difference]:
        """By penalty type: what a λ changes beyond a temperature, per unit of λ, pooled likewise."""
        found = {}
        for setting in self.small_settings:
            controls = values_of(self.controls(setting), measure)
            for seed, value in values_of(self.measured(setting), measure).items():
                if seed in controls:
                    point = setting[1], value - controls[seed]
                    found.setdefault(setting[0], {}).setdefault(seed, []).append(point)
        return slopes(found)

    @property
    def small_settings(self) -> list[Setting]:
        return [setting for setting in self.settings if abs(setting[1]) <= SMALL_WEIGHT]

    def temperature(self, setting: Setting) -> float | None:
        """That of its controls, the mean over the seeds."""
        found = [control.temperature for control in self.controls(setting).values()]
        return statistics.fmean(found) if found else None


def slopes(points: Mapping[str, Mapping[int, Sequence[tuple[float, float]]]]) -> dict[str, Difference]:
    """Of points (x, y) by type and seed: the least-squares slope of y = a x for each seed, and its mean over the seeds
    with its interval; those of all types hold together."""
    found = {}
    for penalty_type, by_seed in points.items():
        lines = [own for own in by_seed.values() if any(x for x, _ in own)]
        of_seeds = [sum(x * y for x, y in own) / sum(x * x for x, _ in own) for own in lines]
        if of_seeds:
            found[penalty_type] = paired_difference(of_seeds, [0.0] * len(of_seeds), comparisons=len(points))
    return found


def values_of(models: Mapping[int, ModelMeasures], measure: str) -> dict[int, float]:
    """A measure by seed, where it is finite."""
    values = {seed: model.values[measure] for seed, model in models.items() if measure in model.values}
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def pooled_bins(models: Sequence[ModelMeasures]) -> list[tuple[float, float, float]]:
    """The bins of several models as one: counts added up, means weighted with them; empty ones left out."""
    pooled = []
    for same in zip(*(model.bins for model in models), strict=True):
        count = sum(bin[0] for bin in same)
        if count:
            means = (sum(bin[0] * bin[i] for bin in same if bin[0]) / count for i in (1, 2))
            pooled.append((count, *means))
    return pooled


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]
