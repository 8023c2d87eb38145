"""Printing that cannot end a run."""

import contextlib
import os
import sys
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
