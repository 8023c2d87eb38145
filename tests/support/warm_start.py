"""Runs of the main job as real processes that are forked from one which has imported everything.

Each is a process of its own, with the whole of `run_clm_owt.main` from the recipe to the exported model, and can be
killed as any other; only the seconds of its imports are spared. The forking process uses no threads and no torch.
"""

import atexit
import dataclasses
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
for _name in [name for name in os.environ if name.startswith(("HF_", "ACCELERATE_", "WANDB_", "XDG_"))]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"

import importlib  # noqa: E402

import torch.distributed.distributed_c10d as c10d  # noqa: E402
from transformers import GPT2LMHeadModel, conversion_mapping  # noqa: F401, E402

import run_clm_owt  # noqa: E402
from clm_owt import modeling  # noqa: F401, E402

# What a run imports on its way, or computes once for a process.
for _name in (
    "batching",
    "device_memory",
    "fp8",
    "hub",
    "perplexity",
    "plan",
    "run_folder",
    "tracking",
    "data.builder",
):
    importlib.import_module(f"clm_owt.{_name}")
for _name in ("matplotlib.backends.backend_agg", "matplotlib.figure", "gigatoken"):
    importlib.import_module(_name)
conversion_mapping.get_checkpoint_conversion_mapping("gpt2")
gc.collect()
gc.freeze()  # a collection in a fork would walk through, and copy, all of this

PROCESS_GROUP_TIMEOUT = 20.0  # seconds


@dataclasses.dataclass
class Job:
    """A started process."""

    pid: int
    output: Path
    errors: Path
    status: int | None = None

    def poll(self) -> int | None:
        """Its exit status (-n after signal n), None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, timeout: float = 300.0) -> int | None:
        """Its exit status, None if it still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.status

    def send(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    @property
    def text(self) -> str:
        """All that it printed."""
        return self.output.read_text(errors="replace") + self.errors.read_text(errors="replace")


def start(
    argv: Sequence[str],
    cwd: Path,
    before: Callable[[], None] = lambda: None,
    env: Mapping[str, str] | None = None,
    name: str = "job",
) -> Job:
    """Start `run_clm_owt.main(argv)` in `cwd`. `before` runs in the new process first: what disturbs it."""
    cwd.mkdir(parents=True, exist_ok=True)
    job = Job(0, cwd / f"{name}.out", cwd / f"{name}.err")
    assert threading.active_count() == 1
    sys.stdout.flush()
    job.pid = os.fork()
    if job.pid:
        return job
    for descriptor, path in ((1, job.output), (2, job.errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.setpgid(0, 0)
    os.chdir(cwd)
    os.environ.update({"HOME": str(cwd), "HF_HOME": str(cwd / "hf")} | dict(env or {}))
    status = 1
    try:
        try:
            before()
            run_clm_owt.main(argv)
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            traceback.print_exc()
        # What an interpreter does at its end.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(status)


def start_several(argv: Sequence[str], cwd: Path, count: int = 2, before=lambda: None, name: str = "job") -> list[Job]:
    """Start the ranks of one run without a launcher, with a short timeout of their process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def set_timeout():
        c10d.default_pg_timeout = timedelta(seconds=PROCESS_GROUP_TIMEOUT)
        before()

    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = [
        shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} for rank in range(count)
    ]
    return [start(argv, cwd, set_timeout, env, f"{name}-{env['RANK']}") for env in ranks]


def fork_builders() -> None:
    """For `before`: the builder of the token store is forked too, where its imports would be most of the time."""
    import subprocess

    from clm_owt.data import builder

    class Forked:
        """What `Builder` uses of subprocess.Popen."""

        def __init__(self, command, stdin, stdout, stderr, env, start_new_session):
            reading, writing = os.pipe()
            self.returncode = None
            self.pid = os.fork()
            if self.pid == 0:
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
