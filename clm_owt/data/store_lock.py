"""Locks on token stores: one builder at a time for each, on all machines that share the folder, and who uses them."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from clm_owt.console import print_lines
from clm_owt.errors import InputError


@contextlib.contextmanager
def store_lock(file: Path) -> Iterator[None]:
    """Hold the lock `file` for the length of the block; waits for it, and prints who holds it meanwhile.

    The kernel releases the lock when its holder dies. The file goes with the lock, and with it the folders that were
    made for it and hold nothing else. Raises `InputError` where the file system has no locks.
    """
    folder = file.parent
    created = [folder, *(path for path in folder.parents if not path.exists())]
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(file, "a+")  # noqa: SIM115 (closed below)
        except FileNotFoundError:  # another builder has just removed the folder with its lock
            continue
        acquire(lock, file)
        if file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat()):
            break
        lock.close()  # the holder before has removed this file: another one is the lock now
    try:
        lock.truncate(0)
        lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
        lock.flush()
        yield
    finally:
        file.unlink()
        lock.close()
        for path in created:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def acquire(lock: TextIO, file: Path) -> None:
    """Wait until the open `file` is locked by this process, and print who holds it meanwhile."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(ValueError, KeyError):  # its holder is just writing it
                held = json.loads(file.read_text())
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["since"]))
                print_lines(
                    f"process {held['pid']} on {held['host']} has been building this token store since {since}"
                )
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
