"""How a run ends before its end: told to stop by a signal, left by its launcher, or failed for a known reason."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Self

import psutil

from clm_owt.console import print_lines

# Signals that come within so many seconds are one: a Ctrl-C reaches a process from the terminal and, forwarded, from
# its launcher; a scheduler signals the batch script and its steps.
ECHO_SECONDS = 1.0

# A launcher that sees one of its processes leave tells the others to stop within so many seconds.
LAUNCHER_SECONDS = 3.0

LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run")


class Stopped(SystemExit):
    """The run was told to stop by a signal; leaves with status 128 + its number."""

    def __init__(self, signum: int):
        self.name = signal.Signals(signum).name
        super().__init__(128 + signum)


class StopRequest:
    """Notices SIGTERM, SIGINT, SIGUSR1 and, unless it is ignored as under nohup, SIGHUP of a terminal that is closed;
    and the disappearance of the launcher, which counts as SIGTERM where no signal came before it.

    Ends the run at once, by raising Stopped wherever it is, while there is nothing to save; inside `between_steps`
    a request only waits to be asked for. `accelerate launch` with one process forwards no signal, so the worker would
    run on alone. A second signal ends the process at once, even where it hangs in a collective. With several processes
    it passes on what it gets, however long that takes on a busy machine: one signal after the first is no second one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        # For the last line: how far the run is and what is saved of it, and what to do.
        self.reached = "before the first step"
        self.way_on = "the same command continues"
        self._received: int | None = None
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
                print_lines(f"Stopped by {stopped.name} {self.reached}; {self.way_on}")
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
        """The others of a process that left (killed, or told to stop before the first step) lose their connection to
        it. That is no error of theirs: they are about to be told to stop as well."""
        try:
            yield
        except RuntimeError:
            deadline = time.monotonic() + LAUNCHER_SECONDS
            while int(os.environ.get("WORLD_SIZE", "1")) > 1 and time.monotonic() < deadline:
                self.check()
                time.sleep(0.05)
            raise

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


def launched() -> bool:
    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return False
    return any(launcher in os.path.basename(word) for word in command[:4] for launcher in LAUNCHERS)
