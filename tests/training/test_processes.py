"""The agreement on an attempt, for one process; test_batch_contract.py and tests/faults/ have it for several."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from clm_owt.stopping import Stopped
from clm_owt.training.processes import DoesNotFit, Processes


class Alone(Processes):
    """One process, without an Accelerator."""

    def __init__(self):
        self.rank, self.count, self.sharded, self._cpu_group = 0, 1, False, None


def stop(signum: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(signum=signum)


def raising(error: BaseException):
    def work():
        raise error

    return work


def test_an_attempt_that_succeeds_gives_its_result_and_discards_nothing():
    discarded = []
    assert Alone().attempt(lambda: 7, stop(), discard=lambda: discarded.append(1)) == 7
    assert discarded == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_an_attempt_that_runs_out_of_memory_discards_what_it_left_and_does_not_fit(error):
    discarded = []
    with pytest.raises(DoesNotFit):
        Alone().attempt(raising(error), stop(), discard=lambda: discarded.append(1))
    assert discarded


def test_an_attempt_that_succeeds_after_a_request_to_stop_is_discarded():
    discarded = []
    with pytest.raises(Stopped) as stopped:
        Alone().attempt(lambda: 7, stop(signal.SIGTERM), discard=lambda: discarded.append(1))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert discarded


def test_an_attempt_that_is_stopped_in_its_midst_raises_for_all():
    with pytest.raises(Stopped):
        Alone().attempt(raising(Stopped(signal.SIGINT)), stop(signal.SIGINT))


def test_any_other_error_of_an_attempt_is_raised_as_it_is():
    error = ValueError("not about memory")
    with pytest.raises(ValueError, match="not about memory") as raised:
        Alone().attempt(raising(error), stop())
    assert raised.value is error


def test_what_a_failed_attempt_held_is_freed_before_the_next():
    """The error's traceback holds the frame of the work, and with it its tensors."""
    import weakref

    held = []

    def work():
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        raise MemoryError

    with pytest.raises(DoesNotFit) as raised:
        Alone().attempt(work, stop())
    assert raised.value.__context__ is None
    assert held[0]() is None


class Together(Processes):
    """One of several processes, which are threads here."""

    def __init__(self, rank: int, barrier: threading.Barrier, answers: list[object]):
        self.rank, self.is_main, self.count = rank, rank == 0, barrier.parties
        self._barrier, self._answers = barrier, answers

    def gather(self, value: object) -> list[object]:
        self._answers[self.rank] = value
        self._barrier.wait(10)
        answers = list(self._answers)
        self._barrier.wait(10)
        return answers


def by_main_of_two(work, requests: list[SimpleNamespace]) -> list[object]:
    """What `by_main` gives on each of two processes, or what it raises there."""
    barrier, answers = threading.Barrier(2), [None, None]

    def call(rank: int) -> object:
        try:
            return Together(rank, barrier, answers).by_main(work, requests[rank])
        except BaseException as error:
            return error

    with ThreadPoolExecutor(2) as executor:
        return list(executor.map(call, range(2)))


def test_the_main_process_computes_and_the_others_wait_for_it():
    computed = []
    assert by_main_of_two(lambda check: computed.append(1) or 7, [stop(), stop()]) == [7, None]
    assert computed == [1]


@pytest.mark.parametrize("told", [0, 1])
def test_a_process_that_is_told_to_stop_while_the_main_one_computes_stops_them_all(told):
    requests = [stop(), stop()]

    def work(check):
        requests[told].signum = signal.SIGTERM
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            check()
            time.sleep(0.01)

    ends = by_main_of_two(work, requests)
    assert [type(end) for end in ends] == [Stopped, Stopped]
    assert [end.code for end in ends] == [128 + signal.SIGTERM] * 2
