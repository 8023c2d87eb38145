import time

import pytest

from clm_owt import console
from clm_owt.console import waiting


@pytest.fixture
def quick_times(monkeypatch):
    monkeypatch.setattr(console, "reporting_times", lambda: iter([0.05, 0.1, 9.0]))


def test_a_wait_that_takes_long_is_named_with_its_seconds(quick_times):
    said = []
    with waiting("reading the corpus", said.append):
        time.sleep(0.2)
    assert said == ["reading the corpus: 0 s so far"] * 2


def test_a_short_wait_is_silent_and_one_that_is_over_too(quick_times):
    said = []
    with waiting("reading the corpus", said.append):
        pass
    time.sleep(0.2)
    assert said == []


def test_the_main_process_alone_says_so(quick_times, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    said = []
    with waiting("reading the corpus", said.append):
        time.sleep(0.2)
    assert said == []


def test_it_is_said_after_two_seconds_and_then_ever_more_rarely():
    times = console.reporting_times()
    assert [next(times) for _ in range(6)] == [2.0, 10.0, 30.0, 60.0, 120.0, 180.0]
