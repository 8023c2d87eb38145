"""Faults are injected into real processes; instants in them are read from /proc."""

import shutil
import sys

import pytest
from support.bench import Bench

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def _bench(warm, tmp_path_factory, pytestconfig) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), warm, pytestconfig.getoption("optimizer"))


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
