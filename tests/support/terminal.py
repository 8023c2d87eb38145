"""A terminal with a shell in it, into which a test types as a user would."""

import contextlib
import os
import pty
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import psutil


class Terminal:
    """An interactive bash on a pseudo-terminal. What runs in it is the terminal's foreground group: a Ctrl-C reaches
    all of it at once, and a terminal that is closed hangs up on it. In a `with` statement, at whose end it is closed
    and nothing that was started in it is left."""

    MARK = "STARTED_IN_THE_TERMINAL"

    def __init__(self, cwd: Path, env: Mapping[str, str]):
        self.mark = f"{cwd}-{time.monotonic_ns()}"
        self.text = ""
        pid, self._master = pty.fork()
        if pid == 0:
            os.chdir(cwd)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which tests that run under nohup would hand down as ignored
            shell = {"PS1": "$ ", "TERM": "dumb", self.MARK: self.mark, "HISTFILE": "/dev/null"}
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], dict(env) | shell)
        self.shell = psutil.Process(pid)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed
            while True:  # never within a read: that would keep a terminal open that is being closed
                if select.select([self._master], [], [], 0.05)[0]:
                    self.text += os.read(self._master, 1 << 16).decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.programs():
            process.kill()
        with contextlib.suppress(psutil.Error):
            self.shell.kill()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.shell.pid, 0)
        self.close()

    def type(self, line: str) -> None:
        os.write(self._master, f"{line}\n".encode())

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def close(self) -> None:
        """As when the window is closed, or the connection lost."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def programs(self) -> list[psutil.Process]:
        """What was started in it and still runs, in a group or session of its own or not."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.pid != self.shell.pid and process.environ().get(self.MARK) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def terminate_group(self) -> None:
        """SIGTERM to the foreground group."""
        os.killpg(os.tcgetpgrp(self._master), signal.SIGTERM)

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self.text}"
            time.sleep(0.005)
