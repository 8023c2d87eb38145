"""Printing that cannot end a run, and that says what is waited for."""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO


def print_lines(*lines: str, file: TextIO | None = None) -> None:
    """Print lines. That nobody reads them any more, or that the disk of the log is full, is no reason to end a run."""
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", file=file, flush=True)


def close_output() -> None:
    """Give up what could not be printed, so that it does not change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def reporting_times() -> Iterator[float]:
    """Seconds after which a wait is reported: 2, 10, 30, and then every minute."""
    return itertools.chain((2.0, 10.0, 30.0), itertools.count(60.0, 60.0))


@contextlib.contextmanager
def waiting(what: str, say: Callable[[str], None] = print_lines) -> Iterator[None]:
    """Say what the block does, and for how long, if it takes longer than two seconds; on the main process alone."""
    over, began = threading.Event(), time.monotonic()

    def report() -> None:
        for seconds in reporting_times():
            if over.wait(max(0.0, began + seconds - time.monotonic())):
                return
            say(f"{what}: {seconds:.0f} s so far")

    if os.environ.get("RANK", "0") == "0":
        threading.Thread(target=report, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        over.set()
