import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml
from support.runs import ROOT, run

from clm_owt.errors import InputError
from clm_owt.experiments.study import MeasuringSettings, plan_measurements, plan_study
from clm_owt.experiments.sweep_file import read_sweep

STUDIES = sorted((ROOT / "recipes/studies").glob("*.yaml"))
SETTINGS = MeasuringSettings(prompts=4, prompt_tokens=8, new_tokens=8, bins=15, top_k=5)


def write_study(folder: Path, **parameters: object) -> Path:
    """A study of the quickstart; a parameter of several values is searched, one that is None left out."""
    values = {
        "recipe": str(ROOT / "recipes/quickstart.yaml"),
        "seed": [1, 2, 3],
        "penalty_type": ["non_max_sum", "neg_entropy"],
        "penalty_weight": [0, 0.1],
    }
    given = {name: value for name, value in (values | parameters).items() if value is not None}
    content = {
        "program": "run_clm_owt.py",
        "method": "grid",
        "parameters": {
            name: {"values": value} if isinstance(value, list) else {"value": value} for name, value in given.items()
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "study.yaml"


def labels(path: Path) -> list[str]:
    return [run.label for run in plan_study(read_sweep(path), [])[0]]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_shipped_studies_train_each_run_once(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs, notes = plan_study(read_sweep(path), [])
    seeds = {run.recipe.seed for run in runs}
    assert len(runs) == (3 * 8 + 1) * len(seeds) and len(seeds) >= 3 and notes == []
    weights = {run.recipe.penalty_weight for run in runs}
    assert min(weights) == -0.2 and max(weights) == 1 and 0 in weights


def test_a_run_at_no_weight_stands_for_every_penalty(tmp_path):
    assert labels(write_study(tmp_path, seed=[1, 2])) == [
        "seed=1, penalty_type=non_max_sum, penalty_weight=0",
        "seed=1, penalty_type=non_max_sum, penalty_weight=0.1",
        "seed=1, penalty_type=neg_entropy, penalty_weight=0.1",
        "seed=2, penalty_type=non_max_sum, penalty_weight=0",
        "seed=2, penalty_type=non_max_sum, penalty_weight=0.1",
        "seed=2, penalty_type=neg_entropy, penalty_weight=0.1",
    ]


def test_of_two_penalties_with_the_same_gradient_one_is_run(tmp_path):
    path = write_study(tmp_path, penalty_type=["neg_max_prob", "non_max_sum"])
    runs, notes = plan_study(read_sweep(path), [])
    assert {run.recipe.penalty_type for run in runs} == {"neg_max_prob"} and len(runs) == 6
    assert notes == ["non_max_sum has the same gradient as neg_max_prob: it is not run twice"]


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"seed": None}, "study: seed: no values; expected at least two `values`, better five"),
        ({"seed": [[7]]}, "study: seed: 7; expected at least two `values`, better five"),
        ({"seed": [7]}, "study: seed: 7; expected at least two `values`, better five"),
        ({"penalty_weight": [0.1, 0.2]}, "study: penalty_weight: 0.1, 0.2; expected `values` with 0 among them"),
        ({"penalty_weight": [0]}, "study: penalty_weight: expected a value beside 0"),
        ({"penalty_type": ["sharp"]}, "command line: penalty_type: 'sharp' does not work; expected one of"),
        ({"learning_rate": [1e-3, 2e-3]}, "study: learning_rate: a study varies penalty_type, penalty_weight, seed"),
    ],
)
def test_a_file_that_makes_no_study_is_refused_in_a_line(tmp_path, parameters, problem):
    with pytest.raises(InputError) as refused:
        plan_study(read_sweep(write_study(tmp_path, **parameters)), [])
    assert str(refused.value).startswith(problem) and "\n" not in str(refused.value)


# What is measured


def finish(path: Path, run, content: bytes = b"weights", store: str = "a") -> None:
    folder = path.parent / run.folder
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model/model.safetensors").write_bytes(content + run.label.encode())
    (folder / "plan.json").write_text(json.dumps({"store": store, "finished": True, "elapsed_seconds": 1.0}))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three finished runs of seed 1, and those of seed 2 but for λ = 0."""
    monkeypatch.chdir(tmp_path)
    path = write_study(tmp_path, seed=[1, 2])
    found, _ = plan_study(read_sweep(path), [])
    for planned in found:
        finish(path, planned)
    return [planned for planned in found if planned.recipe.seed == 1 or planned.recipe.penalty_weight]


def keep(measurement) -> None:
    Path(measurement.output).write_text(json.dumps({"key": measurement.key, "values": {}}))


def test_a_control_is_the_model_of_the_same_seed_without_a_penalty(runs):
    zero, penalised, _, without, _ = plan_measurements(runs, SETTINGS, Path("measures"))
    assert zero.control is None and without.control is None
    assert penalised.control.model == zero.model.model and penalised.control.as_sharp_as == penalised.model.output
    assert penalised.control.key["model"] == zero.model.key["model"] != penalised.model.key["model"]


def test_what_was_measured_holds_until_a_model_or_a_setting_changes(runs, tmp_path):
    zero, penalised, other, *_ = plan_measurements(runs, SETTINGS, Path("measures"))
    everything = [zero.model, penalised.model, penalised.control, other.model, other.control]
    assert [m.kept() for m in everything] == [None] * 5
    for measurement in everything:
        keep(measurement)

    def kept(settings=SETTINGS) -> list[bool]:
        again = plan_measurements(runs, settings, Path("measures"))[:3]
        return [m.kept() is not None for found in again for m in (found.model, found.control) if m]

    assert kept() == [True] * 5
    assert kept(dataclasses.replace(SETTINGS, new_tokens=9)) == [False] * 5
    finish(tmp_path / "study.yaml", runs[1], b"others")  # a penalised run: it and what is as sharp as it
    assert kept() == [True, False, False, True, True]
    finish(tmp_path / "study.yaml", runs[0], b"others")  # λ = 0: it and all controls
    assert kept() == [False, False, False, True, False]
    Path(zero.model.output).write_text('{"key"')  # of a file system that lost the end
    assert zero.model.kept() is None


def test_runs_of_different_data_are_not_compared(runs, tmp_path):
    finish(tmp_path / "study.yaml", runs[2], store="b")
    with pytest.raises(InputError, match="read different token stores"):
        plan_measurements(runs, SETTINGS, Path("measures"))


def test_a_finished_run_without_a_model_is_named(runs):
    (runs[1].folder / "model/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"penalty_weight=0.1,seed=1: finished, and has no model; remove the folder"):
        plan_measurements(runs, SETTINGS, Path("measures"))


# The plan


def test_the_plan_tells_runs_tokens_time_and_cost_without_data_or_network():
    options = ["--plan_only", "--device", "h100", "rtx-3060", "--price", "2", "--gpus", "0,1,2"]
    result = run([sys.executable, "scripts/study.py"], "recipes/studies/lambda_owt.yaml", *options, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "Plan of the study lambda_owt: 75 runs of 34,480 steps of 524,288 tokens, 3 seeds; 2,586,000 steps and "
        "1.356 T tokens in all"
    )
    assert lines[3].split() == ["λ", "=", "0", "3", "34,480", "18.08", "B"]
    h100 = next(line for line in lines if line.startswith("H100"))
    cells = [cell.strip() for cell in h100.split("  ") if cell]
    hours, cost = ([float(end.replace(",", "")) for end in cell.split(" - ")] for cell in cells[-2:])
    assert cost == pytest.approx([2 * hour for hour in hours], abs=2)
    assert hours[1] / hours[0] == pytest.approx(1.7, rel=1e-2)
    # 289,000 tokens/s were derived for the first version of the code, with more traffic in its loss.
    assert 289_000 < 1.356e12 / 3600 / hours[0] < 500_000


def test_an_unknown_device_is_refused_before_the_study_is_read():
    result = run([sys.executable, "scripts/study.py"], "none.yaml", "--plan_only", "--device", "h1", cwd=ROOT)
    assert result.returncode == 2 and result.stderr.startswith("error: --device: h1 not known; expected any of ")
