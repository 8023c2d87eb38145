import pytest
import yaml
from support.runs import ROOT

from clm_owt.errors import InputError
from clm_owt.experiments.sweep_file import plan_grid, read_sweep, with_seeds


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
    ],
)
def test_a_sweep_that_cannot_be_run_says_why(tmp_path, changes, message):
    content = {"method": "grid", "parameters": {"seed": {"values": [1, 2]}}} | changes
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message.replace("?", r"\?").replace("(", r"\(")):
        read_sweep(tmp_path / "sweep.yaml")


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
