"""Recipes and data sets that cannot work, made by rule: each is refused in a line or two, and leaves no file."""

import random

import pytest
import yaml
from support.bench import RUN, campaign
from support.disturbances import fork_builders
from support.malformed import data_sets, recipes
from support.warm_start import Job

from clm_owt.optimizers import OPTIMIZERS

pytestmark = pytest.mark.xdist_group("faults")


def assert_refused(job: Job, home) -> None:
    assert job.wait() == 2, job.text
    assert "Traceback" not in job.text and job.text.startswith("error: "), job.text
    left = [path for path in home.rglob("*") if path not in (job.output, job.errors) and "hf" not in path.parts]
    assert [path for path in left if path.is_file()] == []


RECIPES, DATA_SETS = 120, 23  # with each optimizer: it plays no part, so the cases are dealt out among them


@pytest.fixture(scope="module")
def seeded(pytestconfig, optimizer) -> random.Random:
    """The same numbers for each optimizer."""
    return random.Random(f"{pytestconfig.getoption('seed')} malformed")


@pytest.fixture(scope="module")
def bad_recipes(_bench, seeded, optimizer) -> list[tuple]:
    good = yaml.safe_load(_bench.recipe.read_text())
    return dealt(list(recipes(good, seeded, RECIPES * len(OPTIMIZERS))), optimizer)


@pytest.fixture(scope="module")
def bad_data_sets(seeded, optimizer) -> list[tuple]:
    return dealt(list(data_sets(seeded, DATA_SETS * len(OPTIMIZERS))), optimizer)


def dealt(cases: list[tuple], optimizer: str) -> list[tuple]:
    return cases[list(OPTIMIZERS).index(optimizer) :: len(OPTIMIZERS)]


@pytest.mark.parametrize("number", campaign(range(RECIPES), short=8))
def test_a_malformed_recipe_is_refused(bench, bad_recipes, home, tmp_path, record_fault, number):
    """Malformed recipes, generated"""
    what, content = bad_recipes[number]
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    assert_refused(bench.warm.start(RUN, ["--recipe", str(file)], (), cwd=home), home)
    record_fault(what)


@pytest.mark.parametrize("number", campaign(range(DATA_SETS), short=4))
def test_a_malformed_data_set_is_refused(bench, bad_data_sets, home, tmp_path, record_fault, number):
    """Malformed data sets, generated"""
    what, options, write = bad_data_sets[number]
    data = tmp_path / "data"
    data.mkdir()
    write(data)
    options = [option.format(data=data) for option in options]
    job = bench.start(home, fork_builders, options=[*options, "--data_cache_dir", str(home / "cache")])
    assert_refused(job, home)
    record_fault(what)
