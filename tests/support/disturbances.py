"""A run in a process of its own (see warm_start.py), and what disturbs it there.

A disturbance is called before the run begins, with what is handed to `run_clm_owt.main`, to change it or anything else
in the process. It travels there by pickle: a function of a module or a partial of one, such as
`functools.partial(at_step, 12, kill_myself)`.
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

PROCESS_GROUP_TIMEOUT = 20.0  # seconds


@dataclass
class HandedIn:
    """What `run_clm_owt.main` is given besides its options."""

    trainer_class: type
    processes_class: type
    search: Callable


Disturbance = Callable[[HandedIn], None]


def run_disturbed(argv: Sequence[str], disturbances: Sequence[Disturbance]) -> None:
    """`run_clm_owt.main(argv)` with its disturbances; processes that lose another one do not wait for long."""
    import run_clm_owt
    from clm_owt.training import launch, processes, rendezvous
    from clm_owt.training.micro_batch_search import find_micro_batch
    from clm_owt.training.processes import Processes
    from clm_owt.training.trainer import Trainer

    launch.PATIENCE = processes.PATIENCE = timedelta(seconds=PROCESS_GROUP_TIMEOUT)
    rendezvous.MEETING_SECONDS = PROCESS_GROUP_TIMEOUT
    handed_in = HandedIn(Trainer, Processes, find_micro_batch)
    for disturbance in disturbances:
        disturbance(handed_in)
    run_clm_owt.main(argv, **vars(handed_in))


def kill_myself(signum: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signum)


def at_step(number: int, action: Callable[[], object], handed_in: HandedIn) -> None:
    """`action` is called when step `number` begins, and what was to be saved before it is saved."""

    class Disturbed(handed_in.trainer_class):
        def train_step(self):
            if self.state.step + 1 == number:
                self.checkpoints.wait()
                action()
            return super().train_step()

    handed_in.trainer_class = Disturbed


def before_file_operation(
    number: int, begins: str, ends: str, action: Callable[[], object], handed_in: HandedIn
) -> None:
    """`action` is called before the `number`-th operation on files of checkpoints among those after the first one on a
    path with `begins` in it, and before the first with `ends`. Operations are those that raise an audit event of
    Python: opening, creating a folder, renaming, removing."""
    count = None

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        path = str(arguments[0])
        inside_rmtree = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # these paths are relative
        if count is None:
            count = 0 if begins in path else None
        elif ends in path:
            count = -(10**6)
        elif "checkpoints" in path or inside_rmtree:
            count += 1
            if count == number:
                action()

    sys.addaudithook(watch)


def slow_hashing(seconds: float) -> None:
    """From here on the hash of each file takes so long; a save has four."""
    digest = hashlib.file_digest
    hashlib.file_digest = lambda *arguments: time.sleep(seconds) or digest(*arguments)


def fill(folder: Path) -> None:
    """Fill a disk to its last byte."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def make_room(folder: Path) -> None:
    (folder / "filler").unlink()


def slow_steps(seconds: float, handed_in: HandedIn) -> None:
    """Each step takes so much longer, as those of larger models do: what goes on beside them keeps up."""

    class Slow(handed_in.trainer_class):
        def train_step(self):
            time.sleep(seconds)
            return super().train_step()

    handed_in.trainer_class = Slow


def impatient(handed_in: HandedIn) -> None:
    """Checkpoints that are kept elsewhere follow each other at once, and what fails is soon tried again."""
    from clm_owt import hub, hub_client, upload_queue
    from clm_owt.remote import checkpoints

    hub.SECONDS_BETWEEN_COMMITS = 0.0
    hub_client.TIMEOUT_SECONDS = 1.5
    upload_queue.RETRY_PAUSES = (0.1, 0.3)
    checkpoints.FETCH_PAUSES = (0.1, 0.2, 0.4, 0.8)


def use_hub(url: str, handed_in: HandedIn) -> None:
    """From here on the Hub of this process, which has imported the client of another one, is that at `url`."""
    from huggingface_hub import constants

    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = url, False, True
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    impatient(handed_in)


def fork_builders(handed_in: HandedIn) -> None:
    """A disturbance that disturbs nothing: the builder of the token store is forked as well, where its imports would
    take most of the time."""
    from clm_owt.data import builder

    class Forked:
        """What `Builder` uses of subprocess.Popen."""

        def __init__(self, command, stdin, stdout, stderr, env, start_new_session):
            reading, writing = os.pipe()
            self.returncode = None
            self.pid = os.fork()
            if self.pid == 0:
                if start_new_session:  # by which it yields to the training, and to nobody else
                    os.setsid()
                os.dup2(reading, 0)
                os.dup2(stdout.fileno(), 1)
                os.dup2(stderr.fileno(), 2)
                os.closerange(3, 256)
                signal.set_wakeup_fd(-1)
                sys.stdin, sys.stdout = open(0), open(1, "w", closefd=False)  # noqa: SIM115
                status = 1
                try:
                    status = builder.main()
                except Exception:
                    traceback.print_exc()
                sys.stdout.flush()
                os._exit(status)
            os.close(reading)
            self.stdin = os.fdopen(writing, "wb")

        def poll(self):
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

        def wait(self, timeout=None):
            while self.poll() is None:
                time.sleep(0.01)
            return self.returncode

        def kill(self):
            os.kill(self.pid, signal.SIGKILL)

    class ForkingSubprocess:
        Popen, PIPE, TimeoutExpired = Forked, subprocess.PIPE, subprocess.TimeoutExpired

    builder.subprocess = ForkingSubprocess
