"""How a run ends before its end: told to stop by a signal, left by its launcher, or failed for a known reason."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import psutil

from clm_owt.console import print_lines
from clm_owt.formatting import read_duration

# Signals that come within so many seconds are one: a Ctrl-C reaches a process from the terminal and, forwarded, from
# its launcher; a scheduler signals the batch script and its steps.
ECHO_SECONDS = 1.0

# A launcher that sees one of its processes leave tells the others to stop within so many seconds.
LAUNCHER_SECONDS = 3.0

LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run")


# So long before the end of a Slurm job a run stops by itself, or a tenth of the job where that is less: to save.
SLURM_LEAD_SECONDS = 300.0


class Stopped(SystemExit):
    """The run was told to stop by a signal; leaves with status 128 + its number."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(128 + signum)

    @property
    def asks_for_requeue(self) -> bool:
        """Whether its time is over: it is to go on in another job, and not in another try of its launcher."""
        return self.signum == signal.SIGUSR1


class StopRequest:
    """Notices SIGTERM, SIGINT, SIGUSR1 and, unless it is ignored as under nohup, SIGHUP of a terminal that is closed;
    and the disappearance of the launcher, which counts as SIGTERM, and the end of the time that a run is given, which
    counts as SIGUSR1, where no signal came before it.

    Ends the run at once, by raising Stopped wherever it is, while there is nothing to save; inside `between_steps`
    a request only waits to be asked for. `accelerate launch` with one process forwards no signal, so the worker would
    run on alone. A second signal ends the process at once, even where it hangs in a collective. With several processes
    it passes on what it gets, however long that takes on a busy machine: one signal after the first is no second one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, deadline: "Deadline | None" = None) -> None:
        # For the last line: how far the run is and what is saved of it, and what to do.
        self.reached = "before the first step"
        self.way_on = "the same command continues"
        self._received: int | None = None
        self._deadline = deadline
        self._patience_ends: float | None = None  # for the signal of a launcher that has lost a process
        self._at_once = True
        self._launcher = os.getppid() if launched() else None
        self._passed_on = self._launcher is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1

    @contextlib.contextmanager
    def listening(self) -> Iterator[Self]:
        """Listen, and where that ends the run say how to continue."""
        previous = {signum: signal.getsignal(signum) for signum in self.SIGNALS}
        if previous[signal.SIGHUP] == signal.SIG_IGN:
            del previous[signal.SIGHUP]
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(receiver,), name="signals", daemon=True).start()
        try:
            for signum in previous:
                signal.signal(signum, self._on_signal)
            with self._wait_for_the_launcher():
                yield self
        except Stopped as stopped:
            if os.environ.get("RANK", "0") == "0":
                print_lines(f"Stopped by {self.name_of(stopped)} {self.reached}; {self.way_on}")
            # Only the exit is left, and no further signal, as a launcher sends, is to change its status.
            previous = dict.fromkeys(self.SIGNALS, signal.SIG_IGN)
            raise
        finally:
            signal.set_wakeup_fd(previous_fd)
            for signum, handler in previous.items():
                signal.signal(signum, handler)
            sender.close()

    @contextlib.contextmanager
    def _wait_for_the_launcher(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            cause = self.cause_of(error)
            if cause is not error:
                raise cause from None
            raise

    def cause_of(self, error: RuntimeError) -> RuntimeError | Stopped:
        """The others of a process that left (killed, or told to stop before the first step) lose their connection to
        it. That is no error of theirs: they are about to be told to stop as well, which is waited for, once."""
        if self._patience_ends is None:
            self._patience_ends = time.monotonic() + LAUNCHER_SECONDS
        while int(os.environ.get("WORLD_SIZE", "1")) > 1 and time.monotonic() < self._patience_ends:
            try:
                self.check()
                time.sleep(0.05)
            except Stopped as stopped:
                return stopped
        return error

    def name_of(self, stopped: Stopped) -> str:
        """What the run was stopped by: a signal, or the end of its time."""
        deadline = self._deadline
        if stopped.asks_for_requeue and deadline is not None and time.time() > deadline.at - ECHO_SECONDS:
            return deadline.reason
        return signal.Signals(stopped.signum).name

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """From here on the run itself asks, by `check` or `signum`, where it can stop."""
        self._at_once = False
        try:
            yield
        finally:
            self._at_once = True
        self.check()

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._received is None:
            self._received = signum
            if self._at_once:
                raise Stopped(signum)

    def _watch(self, receiver: socket.socket) -> None:
        """A thread of its own sees every signal, also while the main thread is in a call that does not return."""
        first = None
        receiver.settimeout(1.0)
        with receiver:
            while True:
                try:
                    number = receiver.recv(1)
                except TimeoutError:
                    if first is None and self._deadline is not None and time.time() > self._deadline.at:
                        os.kill(os.getpid(), signal.SIGUSR1)
                    if self._launcher is not None and os.getppid() != self._launcher:
                        self._launcher = None
                        # After a signal, a Ctrl-C for instance, it left for the same reason: that is no second one.
                        if first is None:
                            os.kill(os.getpid(), signal.SIGTERM)
                    continue
                if not number:
                    return
                if number[0] not in self.SIGNALS:
                    continue
                if first is None:
                    first = time.monotonic()
                elif time.monotonic() - first > ECHO_SECONDS and not self._passed_on:
                    os._exit(128 + number[0])
                else:
                    self._passed_on = False

    @property
    def signum(self) -> int | None:
        return self._received

    def check(self) -> None:
        """Raise Stopped if the run was told to stop."""
        if self.signum is not None:
            raise Stopped(self.signum)


@dataclass(frozen=True)
class Deadline:
    """When a run is to stop by itself, in seconds since 1970, and why."""

    at: float
    reason: str

    @classmethod
    def of(cls, stop_after: str | None) -> "Deadline | None":
        """The first of two: `stop_after` the start of the launcher, or of this process where there is none, and the
        end of the Slurm job, ahead of it."""
        began = launcher_began() or psutil.Process().create_time()
        deadlines = []
        if stop_after is not None:
            deadlines.append(cls(began + read_duration(stop_after), f"stop_after {stop_after}"))
        job_ends = os.environ.get("SLURM_JOB_END_TIME", "")
        if job_ends.isdigit() and int(job_ends) > began:
            lead = min(SLURM_LEAD_SECONDS, (int(job_ends) - began) / 10)
            deadlines.append(cls(int(job_ends) - lead, "the end of the Slurm job"))
        return min(deadlines, key=lambda deadline: deadline.at, default=None)

    def __str__(self) -> str:
        return f"stops at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.at))}, for {self.reason}"


def launched() -> bool:
    return launcher() is not None


def launcher() -> psutil.Process | None:
    """The `accelerate launch`, or another launcher, that has started this process."""
    try:
        parent = psutil.Process(os.getppid())
        command = parent.cmdline()
    except psutil.Error:
        return None
    words = [os.path.basename(word) for word in command[:4]]
    return parent if any(name in word for word in words for name in LAUNCHERS) else None


def launcher_began() -> float | None:
    """When it was started, in seconds since 1970."""
    parent = launcher()
    return parent.create_time() if parent else None
