"""A study of the sharpness penalty: which runs it needs, and what is to be measured of them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clm_owt.errors import InputError
from clm_owt.experiments.sweep_file import Sweep, SweptRun, plan_grid
from clm_owt.recipe import Recipe, show
from clm_owt.reports.record import read_plan

STUDIED = ("penalty_type", "penalty_weight", "seed")
SAME_GRADIENT = ("non_max_sum", "neg_max_prob")  # 1 - p_m and -p_m
# How texts are sampled, at temperature 1: the share of the probability that the likeliest tokens of a nucleus have.
SAMPLINGS = {"temperature_1": 1.0, "nucleus_0.9": 0.9}
MEASURES_FORMAT = 1  # raise it where what is measured changes: all is then measured anew


@dataclass(frozen=True)
class MeasuringSettings:
    """How models are measured. Generation: so many prompts of so many tokens, cut from the validation set, and tokens
    that go on from each; bins: of the calibration; top_k: of the mass of the likeliest; samplings: top_p by name."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    bins: int
    top_k: int
    samplings: dict[str, float] = field(default_factory=lambda: SAMPLINGS)


def plan_study(sweep: Sweep, extra: Sequence[str]) -> tuple[list[SweptRun], list[str]]:
    """The runs of a study in the order of its file, each training once, and what was left out because another one is
    the same. Raises InputError, with all reasons, for a file that makes no study."""
    if problems := study_problems(sweep):
        raise InputError("\n".join(f"{sweep.name}: {problem}" for problem in problems))
    runs: dict[tuple, SweptRun] = {}
    notes = []
    for run in plan_grid(sweep, extra):
        first = runs.setdefault(same_training(run.recipe), run)
        types = {recipe.penalty_type for recipe in (first.recipe, run.recipe)}
        if run.recipe.penalty_weight and len(types) == 2:
            notes.append(
                f"{run.recipe.penalty_type} has the same gradient as {first.recipe.penalty_type}: it is not run twice"
            )
    if not any(run.recipe.penalty_weight for run in runs.values()):
        raise InputError(f"{sweep.name}: penalty_weight: expected a value beside 0")
    if len({run.recipe.seed for run in runs.values()}) == 2:
        notes.append("two seeds: the intervals are so wide that little can be told from chance; three tell more")
    return list(runs.values()), list(dict.fromkeys(notes))


def study_problems(sweep: Sweep) -> list[str]:
    """Why a sweep is no study."""
    if sweep.method != "grid":
        return [f"method: {sweep.method!r} does not work; a study is a grid"]
    problems = [
        f"{name}: a study varies {', '.join(STUDIED)} alone; give it one `value`"
        for name in sweep.searched
        if name not in STUDIED
    ]
    weights = sweep.searched.get("penalty_weight", {}).get("values", [])
    if 0 not in weights:
        problems.append(
            f"penalty_weight: {', '.join(map(show, weights)) or 'no values'}; expected `values` with 0 among them, to "
            "which the others are compared"
        )
    seeds = sweep.searched.get("seed", {}).get("values", [])
    if len(set(map(show, seeds))) < 2:
        problems.append(
            f"seed: {', '.join(map(show, seeds)) or 'no values'}; expected at least two `values`, better five: an "
            "interval is over pairs of runs with the same seed"
        )
    return problems


def same_training(recipe: Recipe) -> tuple:
    """The same for recipes of one study that give the same weights: without a weight the penalty does nothing, and two
    penalties have one gradient."""
    gradient = SAME_GRADIENT[0] if recipe.penalty_type in SAME_GRADIENT else recipe.penalty_type
    return recipe.seed, recipe.penalty_weight, gradient if recipe.penalty_weight else None


# What is measured


@dataclass(frozen=True)
class Measurement:
    """A model that is to be measured: at the temperature at which it is `as_sharp_as` the model of another file of
    measures, or as it is. `key`: of the model's file, and all that the measures depend on; what was measured is kept
    in the file `output` with it, and holds as long as it is the same."""

    name: str
    model: str
    recipe: str
    output: str
    as_sharp_as: str | None
    key: dict[str, Any]

    def kept(self) -> dict[str, Any] | None:
        """What was measured; None where it was not yet, or of another model or otherwise."""
        try:
            content = json.loads(Path(self.output).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return content if content.get("key") == self.key else None


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run and what is to be measured of it: its model, and where it has a penalty its control, the model of
    the same seed at λ = 0 (None where that is not there)."""

    run: SweptRun
    model: Measurement
    control: Measurement | None


def plan_measurements(runs: Sequence[SweptRun], settings: MeasuringSettings, folder: Path) -> list[MeasuredRun]:
    """What is to be measured of finished runs. Raises InputError where they read different data, so that nothing could
    be compared, or where a model is missing."""
    stores = {run.recipe.run_name: read_plan(run.folder).get("store") for run in runs}
    if len(set(stores.values())) > 1:
        one, *others = dict(zip(stores.values(), stores, strict=True)).values()
        raise InputError(f"{others[0]} and {one} read different token stores: their losses cannot be compared")
    digests = {run.recipe.run_name: model_digest(run) for run in runs}
    unpenalised = {run.recipe.seed: run for run in runs if not run.recipe.penalty_weight}
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for run in runs:
        name = run.recipe.run_name
        recipe, output = str(run.folder / "recipe.yaml"), folder / f"{name}.json"
        shared = {"format": MEASURES_FORMAT, "validation": stores[name], **asdict(settings)}
        model = Measurement(name, model_folder(run), recipe, str(output), None, {"model": digests[name], **shared})
        control, reference = None, unpenalised.get(run.recipe.seed)
        if run.recipe.penalty_weight and reference is not None:
            key = {"model": digests[reference.recipe.run_name], "as_sharp_as": digests[name], **shared}
            control = Measurement(
                f"{name}, its control",
                model_folder(reference),
                recipe,
                str(folder / f"{name},control.json"),
                str(output),
                key,
            )
        found.append(MeasuredRun(run, model, control))
    return found


def model_folder(run: SweptRun) -> str:
    return str(run.folder / "model")


def model_digest(run: SweptRun) -> str:
    """Of a run's weights, sharded or not. Raises InputError where there are none."""
    digest, files = hashlib.sha256(), sorted(Path(model_folder(run)).glob("*.safetensors"))
    if not files:
        raise InputError(f"{run.folder}: finished, and has no model; remove the folder, and the run is made again")
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
