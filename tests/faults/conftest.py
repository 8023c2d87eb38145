"""Faults are injected into real processes; instants in them are read from /proc."""

import shutil
import sys

import pytest
from support.bench import Bench

from clm_owt.optimizers import OPTIMIZERS

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]


# The one of every day has the state of AdamW as well, for all but the matrices.
EVERY_DAY = "muon"


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[pytest.mark.faults] if name != EVERY_DAY else []) for name in OPTIMIZERS],
)
def optimizer(request) -> str:
    """Of the disturbed runs."""
    return request.param


@pytest.fixture(scope="session")
def _bench(warm, tmp_path_factory, optimizer) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), warm, optimizer)


@pytest.fixture
def bench(_bench) -> Bench:
    """The bench of the session; after a test none of its runs goes on."""
    yield _bench
    _bench.warm.kill_all()


@pytest.fixture
def home(tmp_path):
    """A folder for one run, which is gone after a test that passed."""
    yield tmp_path / "home"
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
