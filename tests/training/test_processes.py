"""The agreement on an attempt, for one process; test_batch_contract.py and tests/faults/ have it for several."""

import signal
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
