"""Programs as real processes that are forked from one which has imported everything a run imports.

Each is a process of its own, does the whole of `run_clm_owt.main` from the recipe to the exported model, and can be
killed as any other; only the seconds of its imports are spared. The forking process is started by WarmStart. It uses
no threads and no torch, and answers two requests, one after the other: start this program, and how did that one end.
"""

import atexit
import importlib
import os
import pickle
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]


class WarmStart:
    """Starts programs; in a `with` statement, at whose end none of them is left."""

    def __init__(self, folder: Path):
        from support.runs import ROOT, environment  # which the forking process need not import

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folders = (folder for folder in TESTS.iterdir() if list(folder.glob("test_*.py")))
        path = os.pathsep.join(map(str, (ROOT, TESTS, *folders)))
        self._socket = ours
        self._jobs: list[Job] = []
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd=folder,
                env=environment(folder, PYTHONPATH=path, MKL_NUM_THREADS="1"),
                pass_fds=[theirs.fileno()],
            )

    def __enter__(self) -> "WarmStart":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_all()
        self._socket.close()
        self._server.wait(60)

    def start(
        self,
        program: str,
        *arguments: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        name: str = "job",
    ) -> "Job":
        """Start a function, `module:name`, in `cwd`, which becomes its home as well. The arguments are pickled."""
        cwd.mkdir(parents=True, exist_ok=True)
        job = Job(self, 0, cwd / f"{name}.out", cwd / f"{name}.err")
        env = {"HOME": str(cwd), "HF_HOME": str(cwd / "hf")} | dict(env or {})
        job.pid = self.ask("start", program, arguments, cwd, env, job.output, job.errors)
        self._jobs.append(job)
        return job

    def start_ranks(self, count: int, program: str, *arguments: object, cwd: Path, name: str = "job") -> list["Job"]:
        """Start a function as the ranks of one run on a CPU, without a launcher; of one rank, as that run alone."""
        if count == 1:
            return [self.start(program, *arguments, cwd=cwd, name=name)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [self.start(program, *arguments, cwd=cwd, env=env, name=f"{name}-{env['RANK']}") for env in ranks]

    def kill_all(self) -> None:
        """End what still runs, as after a test that failed."""
        for job in self._jobs:
            job.kill()
        self._jobs.clear()

    def ask(self, *request: object) -> object:
        self._socket.send(pickle.dumps(request))
        answer = self._socket.recv(1 << 16)
        assert answer, "the forking process has died"
        return pickle.loads(answer)


@dataclass
class Job:
    """A started process."""

    warm: WarmStart
    pid: int
    output: Path
    errors: Path
    status: int | None = None
    cpu_seconds: float = 0.0  # once it has ended: of it and the processes that it waited for

    def poll(self) -> int | None:
        """Its exit status (-n after signal n), None while it runs."""
        if self.status is None:
            self.status, self.cpu_seconds = self.warm.ask("status", self.pid)
        return self.status

    def wait(self, timeout: float = 300.0) -> int | None:
        """Its exit status, None if it still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.status

    def wait_for_cpu(self, seconds: float) -> None:
        """Until it has used so much CPU time, or is gone."""
        ticks = os.sysconf("SC_CLK_TCK")
        while self.poll() is None:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
            if (int(fields[11]) + int(fields[12])) / ticks >= seconds:
                return
            time.sleep(0.002)

    def wait_for_handlers(self) -> None:
        """Until it listens to signals, which Python itself does not, or is gone."""
        while self.poll() is None:
            caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{self.pid}/status").read_text())[1], 16)
            if caught >> (signal.SIGUSR1 - 1) & 1:
                return
            time.sleep(0.002)

    def wait_for_text(self, text: str) -> None:
        """Until it has printed `text`."""
        deadline = time.monotonic() + 240
        while text not in self.text:
            assert self.poll() is None and time.monotonic() < deadline, f"it did not come to '{text}':\n{self.text}"
            time.sleep(0.01)

    def send(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    @property
    def text(self) -> str:
        """All that it has printed."""
        files = (self.output, self.errors)
        return "".join(file.read_text(errors="replace") for file in files if file.exists())


# What follows runs in the forking process and in its forks.


def serve(connection: socket.socket) -> None:
    import_everything()
    while request := connection.recv(1 << 20):
        what, *arguments = pickle.loads(request)
        answer = fork(connection, *arguments) if what == "start" else status_of(*arguments)
        connection.send(pickle.dumps(answer))


def import_everything() -> None:
    """What a run imports on its way, or computes once for a process."""
    import gc

    import clm_owt

    for module in pkgutil.walk_packages(clm_owt.__path__, "clm_owt."):
        if not module.name.startswith("clm_owt.evaluation"):  # which a run has no part of
            importlib.import_module(module.name)
    for name in ("run_clm_owt", "matplotlib.backends.backend_agg", "matplotlib.figure", "gigatoken"):
        importlib.import_module(name)
    from transformers import GPT2LMHeadModel, conversion_mapping  # noqa: F401

    conversion_mapping.get_checkpoint_conversion_mapping("gpt2")
    gc.collect()
    gc.freeze()  # a collection in a fork would walk through, and copy, all of this
    assert threading.active_count() == 1


def status_of(pid: int) -> tuple[int | None, float]:
    """Exit status and seconds of CPU time of a program, (None, 0) while it runs."""
    ended, status, usage = os.wait4(pid, os.WNOHANG)
    return (os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime) if ended else (None, 0.0)


def fork(
    connection: socket.socket,
    program: str,
    arguments: tuple,
    cwd: Path,
    env: dict[str, str],
    output: Path,
    errors: Path,
) -> int:
    """Start a program; gives its process id."""
    function = pkgutil.resolve_name(program)
    pid = os.fork()
    if pid:
        return pid
    for descriptor, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    connection.close()
    os.setpgid(0, 0)
    os.chdir(cwd)
    os.environ.update(env)
    os.environ.pop("PYTHONPATH")
    status = 1
    try:
        try:
            function(*arguments)
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


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
