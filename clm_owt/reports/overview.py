"""How the runs below a folder stand, from what they leave in their folders: also those that were killed, or hang."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from clm_owt.errors import InputError
from clm_owt.file_lock import Holder, is_held
from clm_owt.formatting import format_clock, format_duration, text_table
from clm_owt.reports.record import read_metrics, read_plan, split_rows
from clm_owt.run_state import FINISHED, NAME, RUNNING, STOPPED, RunState

LOCK = ".lock"
STARTING, DEAD, HANGS, UNREADABLE = "starting", "dead", "hangs?", "unreadable"

# A run on another machine renews the time of its lock every five seconds. Clocks of machines differ by less than this.
SILENT_SECONDS = 120.0
# A step may take so many times as long as the mean one, and validation besides, before the run seems to hang.
LONGEST_STEP = 20.0
LONGEST_PAUSE = 900.0  # seconds

HEADER = ("run", "state", "step", "of", "loss", "left", "last sign of life", "")


@dataclass(frozen=True)
class Standing:
    """How one run stands. Its state is one of run_state.json, or `starting`, `dead` (its process is gone, or gives no
    sign of life), `hangs?` (it lives, and has taken no step for long), `unreadable`."""

    run: str
    state: str
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    seconds_left: float | None = None
    last_sign_at: float | None = None  # seconds since 1970
    remark: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def row(self, now: float) -> tuple[str, ...]:
        """For a table with HEADER."""
        sign = self.last_sign_at
        return (
            self.run,
            self.state,
            "-" if self.step is None else f"{self.step:,}",
            "-" if self.total_steps is None else f"{self.total_steps:,}",
            "-" if self.loss is None else f"{self.loss:.4f}",
            "-" if self.seconds_left is None else format_clock(self.seconds_left),
            "-" if sign is None else f"{format_duration(max(0.0, now - sign))} ago",
            self.remark,
        )


def table(standings: Sequence[Standing]) -> str:
    now = time.time()
    return text_table(HEADER, [standing.row(now) for standing in standings])


def find_runs(folder: Path) -> Iterator[Path]:
    """The folders of runs at or below `folder`, by name, and those that may not be read. Raises InputError where there
    is no such folder."""
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder {str(folder)!r}; name a run's folder, or one that holds runs")
    may_be_read = os.access(folder, os.R_OK | os.X_OK)
    if not may_be_read or any(os.path.exists(folder / name) for name in ("recipe.yaml", LOCK, NAME)):
        yield folder
    else:
        for child in sorted(path for path in folder.iterdir() if os.path.isdir(path)):
            if not folder.resolve().is_relative_to(child.resolve()):  # a link that leads back
                yield from find_runs(child)


def standing_of(folder: Path) -> Standing:
    """How the run in `folder` stands; `unreadable` where its files do not say."""
    try:
        state = RunState.read_or_refuse(folder)
        return standing_without_state(folder) if state is None else standing_by_state(folder, state)
    except (InputError, OSError) as error:
        return Standing(str(folder), UNREADABLE, remark=str(error).split("\n")[0])


def standing_by_state(folder: Path, state: RunState) -> Standing:
    standing = Standing(
        run=str(folder),
        state=state.state,
        step=state.step,
        total_steps=state.total_steps,
        loss=state.loss,
        last_sign_at=state.written_at,
        remark=(state.error or "").split("\n")[0],
    )
    if state.ended:
        return standing
    who = f"process {state.pid} on {state.host}"
    if not lives(folder, state.host, state.pid):
        return replace_state(standing, DEAD, f"{who} is gone; the same command continues")
    left = None if state.step_seconds is None else state.step_seconds * max(0, state.total_steps - state.step)
    quiet = time.time() - max(state.written_at, state.step_at or 0.0)
    if state.state == RUNNING and quiet > LONGEST_PAUSE + LONGEST_STEP * (state.step_seconds or 0.0):
        return replace_state(standing, HANGS, f"{who} lives, and has taken no step since")
    return Standing(**asdict(standing) | {"seconds_left": left, "remark": who})


def replace_state(standing: Standing, state: str, remark: str) -> Standing:
    return Standing(**asdict(standing) | {"state": state, "remark": remark})


def standing_without_state(folder: Path) -> Standing:
    """Of a run that has just begun, or whose version wrote no run_state.json. Raises InputError where its other files
    say nothing of it."""
    holder = Holder.read(folder / LOCK)
    alive = holder is not None and lives(folder, holder.host, holder.pid)
    try:
        plan = read_plan(folder)
    except InputError as error:
        state = STARTING if alive else DEAD
        return Standing(str(folder), state, remark=str(holder) if alive else str(error))
    metrics = folder / "metrics.jsonl"
    trained, *_ = split_rows(read_metrics(metrics))
    told = {"total_steps": plan["total_steps"]} | (trained[-1] if trained else {})
    last = RunState.checked(asdict(RunState(RUNNING, "", 0)) | told)
    return Standing(
        run=str(folder),
        state=FINISHED if "finished" in plan else RUNNING if alive else STOPPED,
        step=last.step,
        total_steps=last.total_steps,
        loss=last.loss,
        last_sign_at=metrics.stat().st_mtime if metrics.exists() else None,
        remark=str(holder) if alive else f"there is no {NAME}: of an older version",
    )


def lives(folder: Path, host: str, pid: int) -> bool:
    """Whether the process that has written to a run's folder is there: on this machine it runs and holds the lock, on
    another one the lock's time moves."""
    lock = folder / LOCK
    if host == socket.gethostname():
        return psutil.pid_exists(pid) and is_held(lock)
    try:
        return time.time() - os.stat(lock).st_mtime < SILENT_SECONDS
    except OSError:
        return False
