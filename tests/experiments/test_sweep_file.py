import re

import pytest
import yaml
from optuna.distributions import CategoricalDistribution
from support.runs import ROOT

from clm_owt.errors import InputError
from clm_owt.experiments.local_sweep import open_study
from clm_owt.experiments.sweep_file import plan_grid, read_sweep, to_arguments, with_seeds


def search(**parameters) -> dict:
    return {"method": "random", "run_cap": 1, "parameters": parameters or {"seed": {"min": 1, "max": 3}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gird"}, "method: 'gird' does not work; expected one of grid, random, bayes"),
        ({"parameters": {"recipe": {"value": "base.yaml"}}}, "parameters: nothing to search"),
        ({"parameters": {"seed": {"min": 1, "max": 3}}}, "seed: a grid needs `values`"),
        ({"parameters": {"seed": {"values": [1]}, "output_dir": {"value": "x"}}}, "output_dir: every run of a sweep"),
        ({"method": "bayes"}, "run_cap: missing; how many runs is a bayes search to try?"),
        (
            {"method": "bayes", "run_cap": 1, "parameters": {"seed": {"distribution": "beta", "min": 1, "max": 2}}},
            "seed: distribution 'beta' is unknown here",
        ),
        ({"method": "bayes", "run_cap": 1, "parameters": {"seed": {"min": 1}}}, "seed: expected value, values"),
        (search(seed={"min": 3, "max": 1}), "seed: int_uniform between 3 and 1 does not work"),
        (search(seed={"min": "a", "max": 1}), "seed: uniform between a and 1 does not work"),
        (
            search(learning_rate={"min": 0.0, "max": 1.0, "distribution": "log_uniform_values"}),
            "learning_rate: log_uniform_values between 0.0 and 1.0 does not work",
        ),
        (
            search(learning_rate={"min": 0.0, "max": 1.0, "distribution": "q_uniform", "q": 0}),
            "learning_rate: q_uniform between 0.0 and 1.0 does not work",
        ),
        (search() | {"run_cap": -3}, "run_cap: -3 does not work; expected a whole number of at least 1"),
        (
            search() | {"early_terminate": True},
            "early_terminate: True does not work; expected a `type` and a `min_iter`",
        ),
        (search() | {"early_terminate": {"min_iter": 0}}, "early_terminate: {'min_iter': 0} does not work"),
        ({"parameters": ["seed"]}, "parameters: ['seed'] does not work; expected names"),
        ({"parameters": {"seed": 7}}, "seed: 7 does not work; expected `value: 7`, `values`, or `min` and `max`"),
        ({"parameters": {"seed": {"values": 7}}}, "seed: values: 7 does not work; expected a list of values"),
        ({"parameters": {"seed": {"values": []}}}, "seed: values: [] does not work; expected a list of values"),
        ({"command": "python"}, "command: 'python' does not work; expected a list of words"),
    ],
)
def test_a_sweep_that_cannot_be_run_says_why(tmp_path, changes, message):
    content = {"method": "grid", "parameters": {"seed": {"values": [1, 2]}}} | changes
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=re.escape(message)):
        read_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"method: !!int x", b"[" * 5000])
def test_a_file_that_cannot_be_read_as_a_sweep_is_named(tmp_path, content):
    (tmp_path / "sweep.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"sweep\.yaml: cannot be read as a sweep: "):
        read_sweep(tmp_path / "sweep.yaml")


def test_several_values_of_an_option_are_words_of_their_own():
    options = {"sample_prompts": ["Once upon", "The end"], "milestones": {"a": 1.5}, "penalty_weight": -0.1}
    assert to_arguments(options) == [
        *("--sample_prompts", "Once upon", "The end"),
        *("--milestones", "a=1.5"),
        "--penalty_weight=-0.1",
    ]


def test_a_search_that_was_changed_does_not_go_on_among_other_trials(tmp_path):
    def begun(content: dict):
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
        return open_study(read_sweep(tmp_path / "sweep.yaml"), tmp_path)

    before = search(seed={"values": [1, 2]}, block_size={"value": 64})
    study = begun(before)
    study.ask({"seed": CategoricalDistribution([1, 2])})
    begun(before | {"run_cap": 9})
    with pytest.raises(InputError, match=r"another search of this name: seed was searched in Categorical.*rename"):
        begun(search(seed={"values": [1, 2, 3]}, block_size={"value": 64}))
    with pytest.raises(InputError, match=r"another search of this name: it was begun with --block_size=64; rename"):
        begun(search(seed={"values": [1, 2]}, block_size={"value": 32}))


def seeded(file: str, count: int, *extra: str):
    return with_seeds(read_sweep(ROOT / "recipes/sweeps" / file), count, extra)


def test_seeds_are_the_recipe_s_and_those_after_it_the_same_for_all_configurations(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = plan_grid(seeded("lambda_quickstart.yaml", 3), [])
    assert [(run.recipe.seed, run.recipe.penalty_weight) for run in runs] == [
        (seed, weight) for seed in (42, 43, 44) for weight in (0, 0.005, 0.01, 0.02, 0.05)
    ]
    names = [run.recipe.run_name for run in runs]
    assert names[:2] == ["quickstart", "quickstart,penalty_weight=0.005"]  # as without seeds: kept where finished
    assert names[5:7] == ["quickstart,seed=43", "quickstart,penalty_weight=0.005,seed=43"]


@pytest.mark.parametrize(
    ("content", "count", "message"),
    [
        ({"method": "random", "run_cap": 2}, 5, "--seeds: a random search has no configurations to repeat"),
        ({"parameters": {"seed": {"values": [1, 2]}}}, 5, "--seeds: sweep has `values` for seed already"),
        ({}, 1, "--seeds: 1 does not work; expected at least 2"),
    ],
)
def test_seeds_that_a_sweep_cannot_have_are_refused_in_a_line(tmp_path, content, count, message):
    content = {"method": "grid", "parameters": {"penalty_weight": {"values": [0, 1]}}} | content
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message) as caught:
        with_seeds(read_sweep(tmp_path / "sweep.yaml"), count, [])
    assert "\n" not in str(caught.value)


def test_an_option_that_the_sweep_varies_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    for option in (["--seed", "7"], ["--seed=7"]):
        with pytest.raises(InputError, match="--seed: lambda_quickstart tries several values of seed"):
            plan_grid(seeded("lambda_quickstart.yaml", 2, *option), option)
