"""A file that one process at a time holds, and that says which."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from clm_owt.errors import InputError, disk_is_full


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, `since` in seconds since 1970."""

    host: str
    pid: int
    since: float

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(socket.gethostname(), os.getpid(), time.time())

    @classmethod
    def read(cls, file: Path) -> "Holder | None":
        """Whom the lock names; None where it is gone, or its holder is just writing it."""
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def since_when(self) -> str:
        return time.strftime("since %Y-%m-%d %H:%M:%S", time.localtime(self.since))


@contextlib.contextmanager
def file_lock(file: Path, key: str, acquire: Callable[[TextIO, Path], None]) -> Iterator[Holder]:
    """Hold the lock `file` for the length of the block, which gets what it says of this process.

    `acquire(opened, file)` locks the opened file with flock, so that the kernel releases it when its holder dies, and
    raises where that cannot be. The file goes with the lock, and with it the folders that were made for it and hold
    nothing else. Raises InputError, naming the recipe's `key`, where the file cannot be written.
    """
    lock, made = open_lock(file, key, acquire)
    holder = Holder.this_process()
    try:
        lock.truncate(0)
        lock.write(json.dumps(asdict(holder)))
        lock.flush()
        yield holder
    finally:
        with contextlib.suppress(OSError):  # its disk may be gone
            if Holder.read(file) in (holder, None):  # and not of another, that took it over
                file.unlink()
        lock.close()
        for folder in made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def open_lock(file: Path, key: str, acquire: Callable[[TextIO, Path], None]) -> tuple[TextIO, list[Path]]:
    """The lock, open and acquired, and the folders that are to go with it, the innermost first."""
    folder, made = file.parent, set()
    while True:
        made |= {path for path in (folder, *folder.parents) if not os.path.exists(path)}
        if os.path.exists(file):  # of a process that was killed, or is just leaving
            made.add(folder)
        with naming_key(key, folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = open(file, "a+")  # noqa: SIM115 (the caller closes it)
            except FileNotFoundError:  # the holder before has just removed the folder with its lock
                continue
        try:
            acquire(lock, file)
        except BaseException:
            lock.close()
            raise
        if os.path.exists(file) and os.path.samestat(os.fstat(lock.fileno()), file.stat()):
            return lock, sorted(made, reverse=True)
        lock.close()  # the holder before has removed this file: another one is the lock now


def is_held(file: Path) -> bool:
    """Whether a process of this machine holds the lock `file`; true as well where its file system cannot tell. A
    process that takes it at this very instant may find it held for as long."""
    try:
        lock = open(file)  # noqa: SIM115 (closed below)
    except OSError:
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextlib.contextmanager
def naming_key(key: str, folder: Path) -> Iterator[None]:
    """Turns the OSError of writing to `folder` into an InputError; one of a full disk stays what it is."""
    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            raise
        raise cannot_write(key, folder, error.strerror) from error


def check_writable(key: str, folder: Path) -> None:
    """Raises InputError if `folder` cannot be made or written to, without trying."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise cannot_write(key, folder, f"no permission to write to {nearest}")
    if not nearest.is_dir():
        raise cannot_write(key, folder, "")


def cannot_write(key: str, folder: Path, reason: str) -> InputError:
    file = next((path for path in (folder, *folder.parents) if os.path.isfile(path)), None)
    reason = f"{file} is a file" if file else reason
    return InputError(f"{key}: {folder} cannot be written to ({reason}); give a folder that can")
