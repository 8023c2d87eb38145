"""Locks on token stores: one builder at a time for each, on all machines that share the folder, and who uses them."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from clm_owt.console import print_lines
from clm_owt.errors import InputError
from clm_owt.file_lock import Holder, file_lock


@contextlib.contextmanager
def store_lock(file: Path) -> Iterator[None]:
    """Hold the lock `file` for the length of the block; waits for it, and prints who holds it meanwhile.

    Raises `InputError` where the file cannot be written, or the file system has no locks.
    """
    with file_lock(file, "data_cache_dir", acquire):
        yield


def acquire(lock: TextIO, file: Path) -> None:
    """Wait until the open `file` is locked by this process, and print who holds it meanwhile."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if holder := Holder.read(file):
                print_lines(f"{holder} has been building this token store {holder.since_when}")
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise InputError(
            f"data_cache_dir: no file can be locked in {file.parent} ({error.strerror}); give a folder on a file "
            "system with locks"
        ) from error


def shared_lock(file: Path) -> BinaryIO | None:
    """`file`, open and locked against `exclusive_lock` until it is closed or this process ends, however it does. None
    where there is no such file, where somebody removes it just now, or where the file system has no locks."""
    try:
        opened = open(file, "rb")  # noqa: SIM115 (the caller keeps it open)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(opened.fileno()), file.stat()):
            return opened
    except OSError:
        pass
    opened.close()
    return None


@contextlib.contextmanager
def exclusive_lock(file: Path) -> Iterator[bool]:
    """Whether `file` is locked for the length of the block, no other process having a lock on it. What does not exist
    counts as locked."""
    if not file.exists():
        yield True
        return
    with open(file, "r+b" if os.access(file, os.W_OK) else "rb") as opened:  # NFS locks only what can be written
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
