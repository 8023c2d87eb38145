"""How the processes of a run find each other, and find each other anew when a launcher has started them again.

The store in which torch's processes leave their addresses belongs to the launcher and outlives them: what a process
that was killed has left there would be taken for its successor's. Nor do all launchers of a run count its restarts
alike (with `--rdzv_backend c10d` only the one that lost a process does). So the processes first agree on a name that
was never used before, and all that torch writes goes below it.
"""

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NoReturn

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from clm_owt.console import print_lines, waiting
from clm_owt.stopping import LAUNCHER_SECONDS

SCHEME = "round"
MEETING_SECONDS = 600.0  # after which a process gives up on one that does not come, as torch's own launcher does
POLLING_SECONDS = 0.1
WATCHING_SECONDS = 2.0  # between two looks at whether the round is over
LOST_SECONDS = 120.0  # without an answer from the store: whoever held it is gone

# The name of the round that is being met for or is under way, and the tokens of its processes, by rank.
ROUND = "round"


def meet(url: str, timeout: timedelta, **_: object) -> Iterator[tuple[Store, int, int]]:
    """As torch's `env://`, with a store that holds nothing yet. For `init_process_group(init_method="round://")`,
    which sets the store's own `timeout`."""
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=MEETING_SECONDS)))
        ours = PrefixStore("clm_owt", store)
        with waiting(f"waiting for all {world_size} processes of the run"):
            name, members = agree_on_round(ours, rank, world_size)
    except TimeoutError as error:
        leave(str(error))
    except RuntimeError as error:  # torch's, where the holder of the store is gone
        time.sleep(LAUNCHER_SECONDS)  # it may have been told to stop, and then this process is, too
        leave(str(error).split("\n")[0])
    watch.start(ours.clone(), name, members if rank == 0 else None)
    yield PrefixStore(name, store), rank, world_size


def agree_on_round(store: Store, rank: int, world_size: int) -> tuple[str, list[str]]:
    """A name that all processes of this round get, and none before them got; and the tokens of the processes, by rank.

    Each process leaves a token under its rank. The main process calls a round of the tokens that it finds, and another
    one whenever a token has changed: until then it was that of a process which is gone. A process answers to a round
    that has its own token, and once all have answered the round begins. Raises TimeoutError where that takes longer
    than MEETING_SECONDS.
    """
    token, deadline = uuid.uuid4().hex, time.monotonic() + MEETING_SECONDS
    tokens = [f"token/{other}" for other in range(world_size)]
    store.set(tokens[rank], token)
    name, members = "", []
    while time.monotonic() < deadline:
        if rank == 0 and store.check(tokens) and (found := read_all(store, tokens)) != members:
            name, members = uuid.uuid4().hex, found
            store.set(ROUND, json.dumps([name, members]))
        elif rank != 0 and store.check([ROUND]):
            called, found = json.loads(store.get(ROUND))
            if called != name and token in found:
                name, members = called, found
                store.set(f"{name}/{rank}", "here")
        if rank == 0 and members and store.check([f"{name}/{other}" for other in range(1, world_size)]):
            store.set(f"{name}/begins", "")
        if members and store.check([f"{name}/begins"]):
            return name, members
        time.sleep(POLLING_SECONDS)
    raise TimeoutError(
        f"waited {MEETING_SECONDS:.0f} s for the other processes of the run, of which there are to be "
        f"{world_size - 1}; is a machine or its launcher gone?"
    )


def read_all(store: Store, keys: list[str]) -> list[str]:
    return [value.decode() for value in store.multi_get(keys)]


class Watch:
    """Ends this process when the round that it is in is over: another launcher has started a process of it again,
    which this one may never learn of otherwise, as in a collective of NCCL that waits for a process which is gone.
    Also where this one is not `connected` within MEETING_SECONDS: gloo was seen to wait for more than three times as
    long as it was told to, for a process that was lost meanwhile."""

    def __init__(self, leave: Callable[[str], object]) -> None:
        self._leave = leave
        self._ended, self._connected = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, store: Store, name: str, members: list[str] | None) -> None:
        """Watch over the round `name`; with its `members`, for whether they are still the same."""
        self._ended.clear()
        self._connected.clear()
        self._thread = threading.Thread(target=self._run, args=(store, name, members), name="round", daemon=True)
        self._thread.start()

    def connected(self) -> None:
        """This process is connected to all others."""
        self._connected.set()

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2 * WATCHING_SECONDS)

    def _run(self, store: Store, name: str, members: list[str] | None) -> None:
        began = answered = time.monotonic()
        store.set_timeout(timedelta(seconds=WATCHING_SECONDS))
        while not self._ended.wait(WATCHING_SECONDS):
            if time.monotonic() - began > MEETING_SECONDS and not self._connected.is_set():
                return self._leave(f"waited {MEETING_SECONDS:.0f} s to be connected to the other processes of the run")
            try:
                if members and read_all(store, [f"token/{rank}" for rank in range(len(members))]) != members:
                    store.set(ROUND, json.dumps(["", []]))
                current = json.loads(store.get(ROUND))[0]
            except RuntimeError:
                if time.monotonic() - answered > LOST_SECONDS:
                    self._leave("the launcher of the first machine does not answer any more")
                continue
            answered = time.monotonic()
            if current != name:
                return self._leave("a process of the run was started again")


def leave(why: str) -> NoReturn:
    """End this process at once, for its launcher to start it again. What is saved is whole at any instant."""
    print_lines(f"error: process {os.environ.get('RANK', '0')}: {why}; leaving, to be started again", file=sys.stderr)
    os._exit(1)


watch = Watch(leave)
register_rendezvous_handler(SCHEME, meet)
