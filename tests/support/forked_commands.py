"""`python` and `accelerate` for the commands of a shell, without the seconds that their imports take.

`ForkedCommands` starts one process that has imported torch, transformers, datasets and matplotlib, and a folder with
programs `python` and `accelerate` to be put before the PATH. A Python file that these are given runs in a fork of that
process, with the arguments, folder, environment and open files of the caller, whose status is the fork's; what
`accelerate launch` starts goes the same way. Everything else (`python -m`, workers of multiprocessing) is left to the
real interpreter. What is read when a library is imported (`HF_ENDPOINT`, `HF_HOME`, `OMP_NUM_THREADS`) is that of the
first process.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Self

IMPORTS = (
    "accelerate.commands.accelerate_cli",
    "datasets",
    "gigatoken",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "matplotlib.pyplot",
    "torch.distributed.run",
    "torch.profiler",
    "transformers.models.gpt2.modeling_gpt2",
)

# What the programs `python` and `accelerate` are: -S -s -E spare the interpreter its own start.
CALLER = """\
#!{python} -SsE
import json, os, socket, struct, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
words = [word for word in arguments if word != "-u"]
if name == "python" and not (words and words[0].endswith(".py")):
    os.execv({python!r}, [{python!r}, *arguments])
request = {{"program": name, "argv": words, "cwd": os.getcwd(), "env": dict(os.environ), "programs": {path!r}}}
text = json.dumps(request).encode()
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    socket.send_fds(connection, [struct.pack("I", len(text))], [0, 1, 2])
    connection.sendall(text)
    answer = connection.recv(1)
sys.exit(answer[0] if answer else 137)
"""


class ForkedCommands:
    """The process and the folder of programs, in a `with` statement; `path` goes before the PATH."""

    def __init__(self, folder: Path, env: Mapping[str, str]):
        self.folder, self.path = folder, folder / "bin"
        self.env = dict(env)
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True)
        address = str(self.folder / "socket")
        for name in ("python", "accelerate"):
            file = self.path / name
            file.write_text(CALLER.format(python=sys.executable, address=address, path=str(self.path)))
            file.chmod(0o755)
        command = [sys.executable, __file__, address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=self.env, start_new_session=True, **pipes)
        assert self.process.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()  # closes its input


def serve(address: str) -> None:
    """Fork for each caller, until the input ends, as it does with the process that started this one."""
    import_everything()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks, which answer by themselves
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        print("ready", flush=True)
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            with connection:
                size, files, *_ = socket.recv_fds(connection, 4, 3)
                text = b""
                while len(text) < int.from_bytes(size, sys.byteorder):
                    text += connection.recv(1 << 16)
                if os.fork() == 0:
                    listening.close()
                    run(json.loads(text), files, connection)
            for file in files:
                os.close(file)
    os.killpg(0, signal.SIGKILL)  # and what still runs of its forks


def run(request: dict, files: list[int], connection: socket.socket) -> None:
    """In the fork: be the program that was called, and answer with its status. Never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid, leave = os.getpid(), os._exit

    def answer_and_leave(status: int) -> None:
        if os.getpid() == pid:  # and not a fork of this one
            connection.sendall(bytes([status & 255]))
        leave(status)

    os._exit = answer_and_leave  # prepare_data.py ends by it
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.executable = str(Path(request["programs"]) / "python")
    sys.argv = request["argv"]
    status = 1
    try:
        try:
            run_program(request["program"], request["argv"])
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            if isinstance(leaving.code, str):
                print(leaving.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        # What an interpreter does at its end.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def run_program(program: str, argv: list[str]) -> None:
    if program == "accelerate":
        from accelerate.commands import accelerate_cli

        sys.argv = ["accelerate", *argv]
        return accelerate_cli.main()
    script = Path(argv[0]).resolve()
    sys.path.insert(0, str(script.parent))
    if script.name == "benchmark.py":
        import benchmark

        benchmark.PRODUCT_SIZE, benchmark.GPT2_VOCABULARY = 64, 400  # the real ones take minutes
        return benchmark.main(argv[1:])
    runpy.run_path(argv[0], run_name="__main__")


def import_everything() -> None:
    """What the commands import on their way; no thread may be started by it, since threads do not survive a fork."""
    own = pkgutil.walk_packages(importlib.import_module("clm_owt").__path__, "clm_owt.")
    for name in (*IMPORTS, *(module.name for module in own)):
        importlib.import_module(name)
    conversion_mapping = importlib.import_module("transformers.conversion_mapping")
    conversion_mapping.get_checkpoint_conversion_mapping("gpt2")  # computed once for a process
    importlib.import_module("clm_owt.hub").SECONDS_BETWEEN_COMMITS = 0.0
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()  # a collection in a fork would walk through, and copy, all of this


if __name__ == "__main__":
    serve(sys.argv[1])
