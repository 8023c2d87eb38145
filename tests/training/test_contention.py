import time

import pytest

from clm_owt.training import contention
from clm_owt.training.contention import Contention


@pytest.fixture
def waited(monkeypatch):
    """Seconds on the clock, and of them those that threads have waited for a core."""
    now = {"clock": 0.0, "waited": 0.0}
    monkeypatch.setattr(contention.time, "monotonic", lambda: now["clock"])
    monkeypatch.setattr(contention, "run_delay", lambda: now["waited"])
    monkeypatch.setattr(contention.torch, "get_num_threads", lambda: 2)
    return now


def test_a_machine_of_its_own_says_nothing(waited):
    measured = Contention()
    for _ in range(100):
        waited["clock"] += 1.0
        waited["waited"] += 0.3
        assert measured.warning() is None


def test_a_busy_machine_is_said_once_with_what_to_set(waited):
    measured, said = Contention(), []
    for _ in range(100):
        waited["clock"] += 1.0
        waited["waited"] += 1.5
        said.append(measured.warning())
    assert said.index(next(filter(None, said))) == 9  # after ten seconds
    assert list(filter(None, said)) == [
        "other programs use these cores: the threads of this run waited 1.5 s in each second for one; end those "
        "programs, or start with OMP_NUM_THREADS=1, since 2 threads wait for each other"
    ]


def test_where_nobody_counts_nothing_is_said(waited, monkeypatch):
    monkeypatch.setattr(contention, "run_delay", lambda: None)
    measured = Contention()
    waited["clock"] = 100.0
    assert measured.warning() is None


def test_linux_counts_the_waits_of_all_threads():
    before = contention.run_delay()
    time.sleep(0.01)
    assert before is not None and before <= contention.run_delay()
