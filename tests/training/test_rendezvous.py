"""How processes find each other: under a name that is new, whatever those before them have left in the store."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from clm_owt.stopping import Stopped, StopRequest
from clm_owt.training import rendezvous
from clm_owt.training.rendezvous import ROUND, Watch, agree_on_round, meet


@pytest.fixture(autouse=True)
def short_meetings(monkeypatch):
    """So that processes which do not find each other end the test."""
    monkeypatch.setattr(rendezvous, "MEETING_SECONDS", 10.0)


def rounds_of(store, ranks) -> list:
    """What processes of these ranks, which start in that order, agree on."""
    count = max(ranks) + 1
    with ThreadPoolExecutor(count) as executor:
        return [future.result(20) for future in [executor.submit(agree_on_round, store, r, count) for r in ranks]]


def test_all_processes_get_one_name_which_is_another_one_after_a_restart():
    store, names = HashStore(), set()
    for ranks in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        results = rounds_of(store, ranks)
        assert results[0] == results[1] == results[2]
        names.add(results[0][0])
    assert len(names) == 3


def test_a_process_that_takes_the_place_of_one_that_was_killed_while_it_waited_is_met():
    store = HashStore()
    store.set("token/1", "of a process that is gone")
    main = threading.Thread(target=lambda: met.append(agree_on_round(store, 0, 2)))
    met: list = []
    main.start()
    while not store.check([ROUND]):  # the main process has called a round of it
        pass
    name, members = agree_on_round(store, 1, 2)
    main.join(20)
    assert met == [(name, members)]
    assert "of a process that is gone" not in members


def test_the_call_of_a_main_process_that_is_gone_is_not_answered():
    store = HashStore()
    store.set(ROUND, json.dumps(["old", ["gone", "gone"]]))
    store.set("old/begins", "")
    assert rounds_of(store, [1, 0])[0][0] != "old"


def test_a_process_that_never_comes_ends_the_wait_with_a_line(monkeypatch):
    monkeypatch.setattr(rendezvous, "MEETING_SECONDS", 0.3)
    for rank in (0, 1):
        with pytest.raises(TimeoutError, match=r"waited 0 s for the other processes .* to be 1; .* launcher gone\?"):
            agree_on_round(HashStore(), rank, 2)


def test_a_process_whose_main_one_was_told_to_stop_waits_for_that_signal(monkeypatch, handlers_as_before):
    def lost(url, timeout):
        raise RuntimeError("Connection was likely closed")

    monkeypatch.setattr(rendezvous, "rendezvous", lost)
    monkeypatch.setattr(rendezvous, "leave", lambda why: pytest.fail(why))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped), StopRequest().listening():
        next(meet("round://", timedelta(seconds=5)))


@pytest.mark.parametrize("again", [0, 1])
def test_processes_of_a_round_leave_where_one_of_them_was_started_again(monkeypatch, again):
    monkeypatch.setattr(rendezvous, "WATCHING_SECONDS", 0.05)
    store = HashStore()
    name, members = rounds_of(store, [0, 1])[0]
    left: list[str] = []
    rank = 1 - again  # of another machine, whose launcher knows nothing of it
    watch = Watch(left.append)
    watch.start(store, name, members if rank == 0 else None)
    with ThreadPoolExecutor(1) as executor:
        started_again = executor.submit(agree_on_round, store, again, 2)
        watch._thread.join(10)
        assert left == ["a process of the run was started again"]
        assert agree_on_round(store, rank, 2) == started_again.result(20)


@pytest.mark.parametrize("connected", [True, False])
def test_a_process_that_is_not_connected_in_time_leaves(monkeypatch, connected):
    store = HashStore()
    name, members = rounds_of(store, [0, 1])[0]
    monkeypatch.setattr(rendezvous, "WATCHING_SECONDS", 0.05)
    monkeypatch.setattr(rendezvous, "MEETING_SECONDS", 0.2)
    left: list[str] = []
    watch = Watch(left.append)
    watch.start(store, name, members)
    if connected:
        watch.connected()
    watch._thread.join(1)
    watch.stop()
    assert left == ([] if connected else ["waited 0 s to be connected to the other processes of the run"])


def test_a_watch_that_is_stopped_or_loses_the_store_for_a_moment_ends_nothing(monkeypatch):
    monkeypatch.setattr(rendezvous, "WATCHING_SECONDS", 0.05)

    class Unreachable(HashStore):
        def get(self, key):
            raise RuntimeError("Connection reset by peer")

    watch = Watch(lambda why: pytest.fail(why))
    watch.start(Unreachable(), "name", None)
    threading.Event().wait(0.3)
    watch.stop()
    assert not watch._thread.is_alive()
