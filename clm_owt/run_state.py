"""How a run stands, for whoever looks at it from outside: run_state.json in its folder.

It is what a later look goes by where the run itself cannot answer any more: the table of all runs (scripts/runs.py), a
launcher that starts the processes again after a failure, a queue that asks whether the job is worth another place.
"""

import contextlib
import json
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import psutil

from clm_owt.console import print_lines
from clm_owt.errors import InputError, RunFailed, one_line
from clm_owt.files import PARTIAL, replacing
from clm_owt.stopping import Stopped, StopRequest, launcher

NAME = "run_state.json"
WRITING_SECONDS = 5.0  # between two renewals, while the state stays the same

RUNNING, WAITING, SAVING = "running", "waiting for data", "saving"
STOPPED, FAILED, FINISHED = "stopped", "failed", "finished"
STATES = (RUNNING, WAITING, SAVING, STOPPED, FAILED, FINISHED)
LARGEST = 2**62  # of what a file may say in numbers


@dataclass(frozen=True)
class RunState:
    """The content of run_state.json. Times are in seconds since 1970."""

    state: str  # one of STATES
    host: str
    pid: int
    written_at: float = 0.0
    step: int = 0  # the last that was taken
    total_steps: int = 0
    loss: float | None = None  # of that step; None where it is not finite
    step_at: float | None = None  # when it was taken; None: none in this session
    step_seconds: float | None = None  # mean time from step to step in this session
    error: str | None = None  # what it failed with, or was stopped by
    exit_status: int | None = None
    final: bool = False  # started again by the same launcher, it would end likewise
    session: str = ""  # which start of the processes wrote it, as in Session; a file of an older version names none
    launchers: list[str] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.state in (STOPPED, FAILED, FINISHED)

    @property
    def is_hopeless(self) -> bool:
        """Whether it failed, and would fail again."""
        return self.state == FAILED and self.final

    @classmethod
    def read(cls, folder: Path) -> "RunState | None":
        """Of the run in `folder`; None where there is no such file, or none that can be read."""
        try:
            return cls.read_or_refuse(folder)
        except InputError:
            return None

    @classmethod
    def read_or_refuse(cls, folder: Path) -> "RunState | None":
        """Of the run in `folder`; None where there is no such file. Raises InputError where it cannot be read."""
        try:
            content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{folder / NAME}: {one_line(error)}") from error
        if not isinstance(content, dict):
            raise InputError(f"{folder / NAME}: expected names and values")
        try:
            return cls.checked(content)
        except InputError as error:
            raise InputError(f"{folder / NAME}: {error}") from error

    @classmethod
    def checked(cls, content: Mapping[str, Any]) -> "RunState":
        """Of values by name, what else they hold left out. Raises InputError for one that is missing, or is none."""
        known = {"session": "", "launchers": [], **content}
        for name, (is_right, expected) in VALUES.items():
            if name not in known:
                raise InputError(f"{name} is missing")
            if not is_right(known[name]):
                raise InputError(f"{name} is {str(known[name])[:40]!r}; expected {expected}")
        return cls(**{name: known[name] for name in VALUES})


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def is_count(value: object) -> bool:
    return is_number(value) and isinstance(value, int) and value >= 0


def or_none(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_right(value)


def is_text(value: object) -> bool:
    return isinstance(value, str)


# What the file may say under each name: whether a value is right, and what is expected of it.
VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    "state": (lambda value: is_text(value) and value in STATES, f"one of {', '.join(STATES)}"),
    "host": (is_text, "a name"),
    "pid": (lambda value: is_count(value) and value < 2**31, "the number of a process"),
    "written_at": (is_number, "a time"),
    "step": (is_count, "a number of steps"),
    "total_steps": (is_count, "a number of steps"),
    "loss": (or_none(is_number), "a number"),
    "step_at": (or_none(is_number), "a time"),
    "step_seconds": (or_none(is_number), "a number of seconds"),
    "error": (or_none(is_text), "a text"),
    "exit_status": (or_none(lambda value: is_count(value) and value < 256), "an exit status"),
    "final": (lambda value: isinstance(value, bool), "true or false"),
    "session": (is_text, "a text"),
    "launchers": (lambda value: isinstance(value, list) and all(map(is_text, value)), "a list of texts"),
}


def launcher_name() -> str | None:
    """What tells the launcher of this process from all others, on all machines: its host, its number, and when it was
    started, in seconds since that machine was: a clock that is set changes none of them."""
    process = launcher()
    if process is None:
        return None
    try:
        return f"{socket.gethostname()}:{process.pid}:{process.create_time() - psutil.boot_time():.2f}"
    except psutil.Error:  # it has just ended
        return None


@dataclass(frozen=True)
class Session:
    """One start of all processes of a run, the same on each of them. Times of two sessions are never compared: the
    clocks of their machines may differ, or one may have been set."""

    name: str = field(default_factory=lambda: secrets.token_hex(8))
    launchers: list[str] = field(default_factory=list)  # of all machines; none for processes without one

    @classmethod
    def of_all_processes(cls, gather: Callable[[object], list[Any]]) -> Self:
        """Collective: `gather(value)` gives the values of all processes, in the order of their ranks."""
        names, launchers = zip(*gather((secrets.token_hex(8), launcher_name())), strict=True)
        return cls(names[0], sorted(set(launchers) - {None}))


def leave_if_ended_for_good(folder: Path, launched_by: str | None) -> None:
    """Leave as the last session of the run did, with a line that says why, where the launcher of this process had
    started that one too and another try would end likewise. So the restarts that are left pass in seconds."""
    last = RunState.read(folder)
    if last is None or not last.final or launched_by not in last.launchers:
        return
    if os.environ.get("RANK", "0") == "0":
        print_lines(f"Not started again: {last.error}, after step {last.step}", file=sys.stderr)
    sys.exit(last.exit_status or 1)


class RunReport:
    """Writes run_state.json, the state on the main process and a failure on the process that fails. In a `with`
    statement, at whose end it says how the session ended.

    Nothing is written without a folder, nor to one that holds no run yet, so that bad input leaves nothing behind; but
    under a launcher a failure that would come again is, for the restarts and the queue that would repeat it.
    What cannot be written is left: a full disk is reported where something is lost by it.
    """

    def __init__(self, folder: Path | None, is_main: bool, stop: StopRequest, session: Session):
        self._folder = folder
        self._is_main = is_main
        self._stop = stop
        self._last = RunState.read(folder) if folder else None  # of the session before
        self._first_step: tuple[int, float] | None = None  # of this session, and when it was taken (monotonic)
        self._now = RunState(
            RUNNING, socket.gethostname(), os.getpid(), session=session.name, launchers=session.launchers
        )
        if self._last:  # a session that ends before it begins is where that one was
            self._now = replace(
                self._now, step=self._last.step, total_steps=self._last.total_steps, loss=self._last.loss
            )
        self._written: tuple[float, str] = (0.0, "")  # when (monotonic), and which state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if isinstance(error, RuntimeError):  # such as a lost connection to a process that was killed
            error = self._stop.cause_of(error)
        if isinstance(error, Stopped):
            # It asks for another place in the queue, and not for another try of the launcher.
            if self._is_main:
                name = self._stop.name_of(error)
                self._end(STOPPED, f"stopped by {name}", 128 + error.signum, final=error.asks_for_requeue)
        elif isinstance(error, InputError):
            self._end(FAILED, str(error), 2, final=True)
        elif isinstance(error, Exception):
            self._end(FAILED, one_line(error), 1, final=isinstance(error, RunFailed) and error.final)

    def begin(self, step: int, total_steps: int) -> None:
        """The run goes on after `step`."""
        self._now = replace(self._now, state=RUNNING, step=step, total_steps=total_steps)
        self._write_if_due()

    def at_step(self, step: int, loss: float) -> None:
        """`step` was taken, with that training loss."""
        now = time.monotonic()
        first, first_at = self._first_step = self._first_step or (step, now)
        pace = (now - first_at) / (step - first) if step > first else None
        loss_or_none = loss if math.isfinite(loss) else None
        self._now = replace(
            self._now, state=RUNNING, step=step, step_at=time.time(), step_seconds=pace, loss=loss_or_none
        )
        self._write_if_due()

    def waiting_for_data(self) -> None:
        self._now = replace(self._now, state=WAITING)
        self._write_if_due()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        before, self._now = self._now, replace(self._now, state=SAVING)
        self._write_if_due()
        yield
        self._now = replace(self._now, state=before.state)

    def finish(self) -> None:
        self._end(FINISHED, None, 0, final=False)

    def _end(self, state: str, error: str | None, status: int, final: bool) -> None:
        if self._has_ended():  # the first error of a session is its cause
            return
        last = self._last
        again = last is not None and (last.state, last.error, last.step) == (state, error, self._now.step)
        if state == FAILED and again and not final:
            error, final = f"{error} (at the same step as in the session before)", True
        self._now = replace(self._now, state=state, error=error, exit_status=status, final=final)
        self._write()

    def _has_ended(self) -> bool:
        """Whether another process has written the end of this session."""
        current = RunState.read(self._folder) if self._folder else None
        return current is not None and current.ended and current.session == self._now.session

    def _write_if_due(self) -> None:
        at, state = self._written
        if not self._is_main or (state == self._now.state and time.monotonic() - at < WRITING_SECONDS):
            return
        if not self._has_ended():
            self._write()

    def _write(self) -> None:
        self._now = replace(self._now, written_at=time.time())
        self._written = time.monotonic(), self._now.state
        if self._folder is None:
            return
        repeated = self._now.is_hopeless and self._now.launchers
        if not (repeated or (self._folder / "recipe.yaml").exists()):
            return
        file, suffix = self._folder / NAME, f".{os.getpid()}{PARTIAL}"
        with contextlib.suppress(OSError), replacing(file, suffix, flush=False) as aside:
            aside.write_text(json.dumps(asdict(self._now), indent=2) + "\n", encoding="utf-8")
