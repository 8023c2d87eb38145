"""Trainings as commands of their own, which are told to stop when this program is, and waited for."""

import contextlib
import fcntl
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from clm_owt.errors import InputError

T = TypeVar("T")

POLL_SECONDS = 0.1
ERROR_LINES = 3  # of a failed run's log
# A training that was told to stop saves itself first; GPT-2's larger sizes take a minute on a slow disk.
SECONDS_FOR_A_SAVE = 600.0


class Places:
    """Where commands run side by side, one at a time on each: GPUs by their names, as in "0,1"; of none, all there is
    is one place, whose name is None. Raises InputError for what names no GPU, or one of them twice."""

    def __init__(self, gpus: str = ""):
        names = [name.strip() for name in gpus.split(",")] if gpus else []
        if not all(re.fullmatch(r"\d+|(GPU|MIG)-\S+", name) for name in names) or len(set(names)) < len(names):
            raise InputError(f"--gpus: {gpus!r} does not work; expected numbers or UUIDs, each once, as in 0,1,2,3")
        self.names: list[str | None] = [*names] or [None]
        self._free: queue.Queue[str | None] = queue.Queue()
        for name in self.names:
            self._free.put(name)

    def __len__(self) -> int:
        return len(self.names)

    @contextlib.contextmanager
    def take(self) -> Iterator[tuple[str | None, dict[str, str]]]:
        """The next free one: its name, and the environment variables of a command there."""
        name = self._free.get()
        try:
            yield name, {} if name is None else {"CUDA_VISIBLE_DEVICES": name}
        finally:
            self._free.put(name)

    def for_each(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """`work` of every item, as many at a time as there are places; it takes one."""
        with ThreadPoolExecutor(len(self)) as pool:
            list(pool.map(work, items))


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and a closed terminal set, instead of ending this program at once."""
    interrupted = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {s: signal.signal(s, lambda *_: interrupted.set()) for s in signals}
    try:
        yield interrupted
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def execute(
    command: Sequence[str],
    log: Path,
    variables: Mapping[str, str],
    interrupted: threading.Event,
    is_hopeless: Callable[[], bool] = lambda: False,
) -> int | None:
    """Run a command with these environment variables beside this program's, its output to the end of `log`; gives its
    exit status, or None where it was ended because `is_hopeless`.

    The command has a process group of its own, so that the training ends with its launcher. An interrupted one saves
    itself, which is waited for also where its launcher has left before, and is continued the next time. One that a
    killed program left running is waited for before the command starts again.
    """
    own_programs_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": own_programs_first} | variables
    with log.open("ab") as output:
        wait_for_earlier(output, log, interrupted)
        if interrupted.is_set():
            return 128 + signal.SIGTERM
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        ended = False
        while process.poll() is None:
            if not ended and (interrupted.is_set() or is_hopeless()):
                ended = True
                os.killpg(process.pid, signal.SIGTERM)  # a training saves itself first
            time.sleep(POLL_SECONDS)
        wait_for_group(process.pid)
    return None if ended and not interrupted.is_set() else process.returncode


def wait_for_earlier(output: BinaryIO, log: Path, interrupted: threading.Event) -> None:
    """Until no earlier command writes to `log`, or this program is interrupted. The lock on the open file belongs to
    all processes that inherited it: it lasts until the last of them has ended, though who started them was killed."""
    said = False
    while not interrupted.is_set():
        try:
            return fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                print(
                    f"{log}: the command that writes to it still runs, begun before; waiting for its end", flush=True
                )
            said = True
            time.sleep(POLL_SECONDS)
        except OSError:  # a file system without locks
            return None


def wait_for_group(group: int) -> None:
    """Until no process of a process group is left, for SECONDS_FOR_A_SAVE at most."""
    deadline = time.monotonic() + SECONDS_FOR_A_SAVE
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(POLL_SECONDS)
        print(f"process group {group} is still there after {SECONDS_FOR_A_SAVE:.0f} s, and left alone", flush=True)


def size_of(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def print_error(log: Path, since: int) -> None:
    """Print why a command failed, from what it wrote to its log after the first `since` bytes."""
    error = error_in(log.read_bytes()[since:].decode(errors="replace"))
    print(*(f"    {line}" for line in error.splitlines()), sep="\n", flush=True)


def error_in(text: str) -> str:
    """What of the output of a failed run tells why: the program's own `error:` lines or, without any, the last line of
    a traceback that is not the launcher's, or the last line of all."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in text.splitlines() if line.strip()]
    own = list(dict.fromkeys(line for line in lines if line.startswith("error: ")))
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    of_program = [line for line in raised if not re.match(r"subprocess\.CalledProcessError|torch\.distributed", line)]
    return "\n".join(own[:ERROR_LINES] or of_program[-1:] or lines[-1:])
