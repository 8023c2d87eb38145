"""Faults on real processes; what they are stands in faults.py, which also runs alone."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="instants are told by /proc")

FAULTS = str(Path(__file__).with_name("faults.py"))


def inject(*options: str) -> None:
    result = subprocess.run([sys.executable, FAULTS, *options], stdout=subprocess.PIPE, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout


def test_nothing_is_lost_by_a_few_faults_of_each_kind():
    inject("--short")


@pytest.mark.faults
def test_nothing_is_lost_by_many_faults_of_each_kind():
    inject()
