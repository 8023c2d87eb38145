"""One run at a time in a run's folder, on all machines that share it.

The lock is flock's on `.lock`, which the kernel releases at any kill. On some network file systems flock holds for one
machine only, or does nothing. So the holder also renews the time of the file, and who finds there the name of another
machine first watches whether that time moves. Times of two machines are never compared.
"""

import contextlib
import fcntl
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from clm_owt.console import print_lines, waiting
from clm_owt.errors import InputError
from clm_owt.file_lock import Holder, file_lock

NAME = ".lock"
LEAVING_SECONDS = 5.0  # a holder may take so long to leave, as one that a launcher or a queue starts again
BEAT_SECONDS = 5.0  # between two renewals of the file's time
WATCH_SECONDS = 30.0  # without a renewal: the holder is gone


@contextlib.contextmanager
def run_lock(
    folder: Path, leaving: float = LEAVING_SECONDS, beat: float = BEAT_SECONDS, watch: float = WATCH_SECONDS
) -> Iterator[None]:
    """Hold the run's folder for the length of the block, made if there is none; one that is still empty then goes
    again. The three times are in seconds.

    Raises InputError where another process holds it, or it cannot be written.
    """
    file = folder / NAME
    ended = threading.Event()
    with file_lock(file, "output_dir", functools.partial(acquire, leaving=leaving, watch=watch)) as holder:
        beating = threading.Thread(target=renew, args=(file, holder, beat, ended), name="run lock", daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()


def acquire(lock: TextIO, file: Path, leaving: float, watch: float) -> None:
    """Lock the open `file`; raises InputError if another process holds it."""
    reaches_this_machine = True
    try:
        lock_within(leaving, lock, file)
    except BlockingIOError:
        raise held_by_another(file) from None
    except OSError:  # a file system without locks
        reaches_this_machine = False
    holder = Holder.read(file)
    if holder is not None and (holder.host != socket.gethostname() or not reaches_this_machine):
        print_lines(f"Waiting up to {watch:.0f} s: {file} names {holder}, which may still be running ...")
        if is_renewed_within(watch, file):
            raise held_by_another(file)
        print_lines(f"{holder} is gone; going on")


def lock_within(seconds: float, lock: TextIO, file: Path) -> None:
    """flock the open `file`. Raises BlockingIOError if another process holds it for longer than that."""
    deadline = time.monotonic() + seconds
    with waiting(f"waiting for {holder_of(file)} to leave {file.parent}"):
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def is_renewed_within(seconds: float, file: Path) -> bool:
    """Whether the time of `file` moves. It is opened anew each time, which makes NFS ask the server."""

    def changed_at() -> int | None:
        with contextlib.suppress(OSError), open(file) as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
        return None

    first, deadline = changed_at(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.5, seconds / 10))
        if (now := changed_at()) != first:
            return now is not None  # it was removed: its holder has just left
    return False


def renew(file: Path, holder: Holder, every: float, ended: threading.Event) -> None:
    """Renew the time of `file` until `ended`. Ends this process at once where the file names another one: it took over
    a folder whose holder seemed gone, as that of a process that was suspended does."""
    while not ended.wait(every):
        if Holder.read(file) not in (holder, None):
            print_lines(f"error: {held_by_another(file)}", file=sys.stderr)
            os._exit(2)
        with contextlib.suppress(OSError):
            os.utime(file)


def holder_of(file: Path) -> str:
    return str(Holder.read(file) or "another process")


def held_by_another(file: Path) -> InputError:
    holder = Holder.read(file)
    since = f" {holder.since_when}" if holder else ""
    return InputError(
        f"output_dir: {holder_of(file)} has been running in {file.parent}{since}; wait for its end or stop it, or "
        f"give another output_dir. (If that machine is gone, remove {file}.)"
    )
