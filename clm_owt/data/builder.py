"""The process that writes the token store while training runs: `python -m clm_owt.data.builder`.

It takes no part in the training's process group, leaves signals to the training process, and ends with it: its
standard input is a pipe that closes when the parent is gone, however that ended. Its exit status and its output, which
goes to files without a name, carry errors back, so that bad input leaves nothing behind.
"""

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from clm_owt.console import reporting_times
from clm_owt.data.building import build
from clm_owt.data.sources import Source
from clm_owt.data.token_store import TokenStore
from clm_owt.errors import InputError, RunFailed, disk_is_full
from clm_owt.recipe import Recipe
from clm_owt.stopping import StopRequest

# Set by accelerate and torchrun for their processes; the builder is none of them.
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "ACCELERATE_",
    "OMP_",
)
TRACEBACK_LINES = 20  # of the builder's, in an error of the training process
LONG_WAIT = 1.0  # seconds
INPUT_CANNOT_WORK, DISK_FULL = 2, 28  # exit statuses
ERROR_MARK = b"\0"  # precedes, in the output, the message of the error that the builder ends with


class Builder:
    """The builder process, as the training process that started it sees it. Usable in a `with` statement, whose end
    stops it."""

    def __init__(
        self,
        process: subprocess.Popen | None = None,
        output: BinaryIO | None = None,
        errors: BinaryIO | None = None,
    ):
        self.process = process
        self.output = output
        self.errors = errors
        self.bytes_read = 0  # of the output

    @classmethod
    def none(cls) -> "Builder":
        """No process: `check` and `stop` do nothing, `new_lines` is empty."""
        return cls()

    @classmethod
    def start(cls, recipe: Recipe, source: Source, here: bool = True) -> "Builder":
        """Start the builder, unless another process of this machine does (`here` false) or the store is complete."""
        if not here or TokenStore(recipe, source).is_complete_on_disk():
            return cls.none()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
        package_root = str(Path(__file__).parents[2])  # where `accelerate launch path/to/run_clm_owt.py` finds it too
        environment["USE_TORCH"] = "0"  # else `datasets` imports it to count epochs, which takes a second
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
        output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (`check` reads them)
        process = subprocess.Popen(
            [sys.executable, "-m", "clm_owt.data.builder"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal is for the training process alone
        )
        process.stdin.write(pickle.dumps((recipe, source)))
        process.stdin.flush()
        return cls(process, output, errors)

    def check(self, waiting_for: str = "") -> None:
        """Raise what the builder ended with, if it failed: `InputError` for input that cannot work, `RunFailed` for a
        full disk, else `RuntimeError`. Never blocks; `waiting_for` is ignored, so that this can be handed to the waits
        of `TokenStore`."""
        status = self.process.poll() if self.process else None
        if not status:
            return
        if status == INPUT_CANNOT_WORK:
            raise InputError(self.error_message())
        if status == DISK_FULL:
            raise RunFailed(
                f"{self.error_message()}; make room, and the same command continues, or give another data_cache_dir"
            )
        if status < 0:
            reason = f"was ended by {signal.Signals(-status).name}"
            reason += " (is memory short?)" if status == -signal.SIGKILL else ""
        else:
            reason = f"failed with status {status}"
        trace = "\n".join(read_all(self.errors).splitlines()[-TRACEBACK_LINES:])
        raise RuntimeError(f"the builder of the token store {reason}; the same command continues it\n{trace}".strip())

    def new_lines(self) -> list[str]:
        """The complete lines that the builder has printed since the last call."""
        if self.process is None:
            return []
        printed = os.pread(self.output.fileno(), 1 << 16, self.bytes_read).partition(ERROR_MARK)[0]
        lines = printed[: printed.rfind(b"\n") + 1]
        self.bytes_read += len(lines)
        return lines.decode("utf-8", errors="replace").splitlines()

    def error_message(self) -> str:
        return read_all(self.output).rpartition(ERROR_MARK.decode())[2].strip()

    def stop(self) -> None:
        """End the builder, if it still runs. The store can be continued from its last shard."""
        if self.process is None:
            return
        self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def read_all(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


class WaitingCheck:
    """What a run does over and over while it waits for data: leave the wait after a signal or where the builder has
    failed, print what the builder prints, and at `reporting_times` what is waited for.

    Handed to the waits of `TokenStore` and to `TrainingBlocks`, which call it with what they wait for. `on_wait` is
    called over and over while a wait is long.
    """

    def __init__(
        self,
        stop: StopRequest,
        builder: Builder,
        say: Callable[..., None],
        on_wait: Callable[[], None] = lambda: None,
    ):
        self._stop, self._builder, self._say, self._on_wait = stop, builder, say, on_wait
        self._waiting_for, self._called_at = "", 0.0

    def __call__(self, waiting_for: str = "") -> None:
        self._stop.check()
        self.print_new_lines()
        self._builder.check(waiting_for)
        now = time.monotonic()
        if waiting_for != self._waiting_for or now - self._called_at > 1.0:  # another wait
            self._waiting_for, self._began, self._times = waiting_for, now, reporting_times()
            self._next = next(self._times)
        self._called_at = now
        if waiting_for and now - self._began >= LONG_WAIT:
            self._on_wait()
        if waiting_for and now - self._began >= self._next:
            self._say(f"waiting for {waiting_for}: {self._next:.0f} s so far")
            self._next = next(self._times)

    def print_new_lines(self) -> None:
        """Print what the builder has printed since the last call."""
        self._say(*self._builder.new_lines())


def main() -> int:
    """The builder process: reads recipe and source from its standard input, builds, and gives its exit status."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a scheduler sends them to every process of a job
        signal.signal(signum, signal.SIG_IGN)
    recipe, source = pickle.load(sys.stdin.buffer)
    end_with_parent()
    warnings.simplefilter("ignore")
    try:
        build(recipe, source, yield_to_training)
    except InputError as error:
        print_error(str(error))
        return INPUT_CANNOT_WORK
    except OSError as error:
        if not disk_is_full(error):
            raise
        print_error(f"data_cache_dir: {recipe.data_cache_dir}: {error.strerror} for the token store")
        return DISK_FULL
    return 0


def print_error(message: str) -> None:
    print(ERROR_MARK.decode(), message, sep="", flush=True)


def end_with_parent() -> None:
    """End this process at once when its standard input closes or its parent changes: both mean the parent is gone."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            readable, _, _ = select.select([sys.stdin.buffer], [], [], 1.0)
            if readable and not os.read(sys.stdin.fileno(), 1):
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def yield_to_training(split: str) -> None:
    """Take the lowest priority once there is a shard to train on. Where cores are few, the threads of a training step
    would else wait for one that the encoder keeps from running. On Linux each thread has a priority of its own, and so
    has the session."""
    if split == "train":
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")
        threads = Path("/proc/self/task")
        for thread in [int(task.name) for task in threads.iterdir()] if threads.exists() else [0]:
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, thread, 19)


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # an abandoned Parquet iterator's threads would hold or spoil an ordinary exit
