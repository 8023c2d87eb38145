"""How a run stands, for whoever looks at it from outside: run_state.json in its folder.

It is what a later look goes by where the run itself cannot answer any more: the table of all runs (scripts/runs.py), a
launcher that starts the processes again after a failure, a queue that asks whether the job is worth another place.
"""

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self

from clm_owt.console import print_lines
from clm_owt.errors import InputError, RunFailed, one_line
from clm_owt.files import PARTIAL, replacing
from clm_owt.stopping import Stopped, StopRequest

NAME = "run_state.json"
WRITING_SECONDS = 5.0  # between two renewals, while the state stays the same

RUNNING, WAITING, SAVING = "running", "waiting for data", "saving"
STOPPED, FAILED, FINISHED = "stopped", "failed", "finished"


@dataclass(frozen=True)
class RunState:
    """The content of run_state.json. Times are in seconds since 1970."""

    state: str  # one of the six above
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
            content = json.loads((folder / NAME).read_text(encoding="utf-8"))
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):
            return None


def leave_if_ended_for_good(folder: Path, launcher_began: float | None) -> None:
    """Leave as the last session of the run did, with a line that says why, where the launcher of this process had
    started that one too and another try would end likewise. So the restarts that are left pass in seconds."""
    last = RunState.read(folder)
    if launcher_began is None or last is None or not last.final or last.written_at < launcher_began:
        return
    if os.environ.get("RANK", "0") == "0":
        print_lines(f"Not started again: {last.error}, after step {last.step}", file=sys.stderr)
    sys.exit(last.exit_status)


class RunReport:
    """Writes run_state.json, the state on the main process and a failure on the process that fails. In a `with`
    statement, at whose end it says how the session ended.

    Nothing is written without a folder, nor to one that holds no run yet, so that bad input leaves nothing behind.
    What cannot be written is left: a full disk is reported where something is lost by it.
    """

    def __init__(self, folder: Path | None, is_main: bool, stop: StopRequest):
        self._folder = folder
        self._is_main = is_main
        self._stop = stop
        self._last = RunState.read(folder) if folder else None  # of the session before
        self._began = time.time()
        self._first_step: tuple[int, float] | None = None  # of this session, and when it was taken
        self._now = RunState(RUNNING, socket.gethostname(), os.getpid())
        if self._last:  # a session that ends before it begins is where that one was
            self._now = replace(
                self._now, step=self._last.step, total_steps=self._last.total_steps, loss=self._last.loss
            )
        self._written: tuple[float, str] = (0.0, "")  # when, and which state

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
        now = time.time()
        first, first_at = self._first_step = self._first_step or (step, now)
        pace = (now - first_at) / (step - first) if step > first else None
        loss_or_none = loss if math.isfinite(loss) else None
        self._now = replace(self._now, state=RUNNING, step=step, step_at=now, step_seconds=pace, loss=loss_or_none)
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
        return current is not None and current.ended and current.written_at > self._began

    def _write_if_due(self) -> None:
        at, state = self._written
        if not self._is_main or (state == self._now.state and time.time() - at < WRITING_SECONDS):
            return
        if not self._has_ended():
            self._write()

    def _write(self) -> None:
        self._now = replace(self._now, written_at=time.time())
        self._written = self._now.written_at, self._now.state
        if self._folder is None or not (self._folder / "recipe.yaml").exists():
            return
        file, suffix = self._folder / NAME, f".{os.getpid()}{PARTIAL}"
        with contextlib.suppress(OSError), replacing(file, suffix, flush=False) as aside:
            aside.write_text(json.dumps(asdict(self._now), indent=2) + "\n", encoding="utf-8")
