"""The process that writes the token store while training runs: `python -m clm_owt.data.builder`.

It takes no part in the training's process group, leaves signals to the training process, and ends with it: its
standard input is a pipe that closes when the parent is gone, however that ended. Errors come back through its exit
status and output, which are files without a name, so that bad input leaves nothing behind.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from clm_owt.console import print_lines
from clm_owt.data.documents import count_files, read_documents
from clm_owt.data.encoding import (
    TRAINING_BYTES,
    TokenizerFolder,
    fetch_tokenizer,
    publish,
    tokenizer_folder,
    train_tokenizer,
)
from clm_owt.data.packing import StoreWriter, write_store
from clm_owt.data.parts import EncodingProcesses, Parts, Watch, read_or_encode
from clm_owt.data.retries import patiently
from clm_owt.data.sources import Source, remember_refs
from clm_owt.data.token_store import FORMAT_VERSION, TokenStore, store_folder
from clm_owt.errors import InputError, RunFailed
from clm_owt.recipe import Recipe

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
UNEXPECTED_SHARE = 0.001  # of the expected count of blocks
SHOWN_LINES = 20
DISK_FULL = 28  # exit status
LAST_WORDS = b"\0"  # stands before the message that the builder dies with


class Builder:
    """The builder process, as the training process that started it sees it. Usable in a `with` statement."""

    def __init__(self, process: subprocess.Popen | None = None, output=None, errors=None):
        self.process = process
        self.output = output
        self.errors = errors
        self.heard = 0  # bytes of the output

    @classmethod
    def none(cls) -> "Builder":
        """For ranks that start no builder: `check` and `stop` do nothing."""
        return cls()

    @classmethod
    def start(cls, recipe: Recipe, source: Source) -> "Builder":
        """Start the builder, unless the store is complete already."""
        if TokenStore(recipe, source).is_whole():
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
        """Raises what the builder died of, if it did: `InputError` for input that cannot work, else `RuntimeError`.
        Never blocks; `waiting_for` is there so that this can be handed to the waits of `TokenStore`."""
        status = self.process.poll() if self.process else None
        if not status:
            return
        if status == 2:
            raise InputError(self.last_words())
        if status == DISK_FULL:
            raise RunFailed(
                f"{self.last_words()}; make room, and the same command continues, or give another data_cache_dir"
            )
        if status < 0:
            reason = f"was ended by {signal.Signals(-status).name}"
            reason += " (is memory short?)" if status == -signal.SIGKILL else ""
        else:
            reason = f"failed with status {status}"
        trace = "\n".join(read_back(self.errors).splitlines()[-SHOWN_LINES:])
        raise RuntimeError(f"the builder of the token store {reason}; the same command continues it\n{trace}".strip())

    def news(self) -> list[str]:
        """What it has said since the last call, in whole lines."""
        if self.process is None:
            return []
        said = os.pread(self.output.fileno(), 1 << 16, self.heard).partition(LAST_WORDS)[0]
        lines = said[: said.rfind(b"\n") + 1]
        self.heard += len(lines)
        return lines.decode("utf-8", errors="replace").splitlines()

    def last_words(self) -> str:
        return read_back(self.output).rpartition(LAST_WORDS.decode())[2].strip()

    def stop(self) -> None:
        """End the builder, if it still runs; the store stays whole and can be continued."""
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


def read_back(file) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def build(
    recipe: Recipe,
    source: Source,
    on_shard: Callable[[str], None] = lambda split: None,
    num_workers: int = 1,
    watch: Watch | None = None,
) -> None:
    """Write what is missing of the recipe's tokenizer and store; `on_shard(split)` is called after each shard, `watch`
    as documents are encoded. Returns when the store is complete; while another process builds the same store, waits
    for it, and takes over should that one die."""
    cache = Path(recipe.data_cache_dir).expanduser()
    with only_builder(cache, recipe, source), provided_tokenizer(recipe, source) as (tokenizer, publish_tokenizer):

        def before_first_shard() -> None:
            publish_tokenizer()
            remember_refs(source, cache)

        folder = store_folder(recipe, source, tokenizer)
        if folder.is_dir():  # begun before, whatever has become of its tokenizer
            before_first_shard()
        parts = Parts(folder)

        def shard_written(split: str) -> None:
            parts.drop_before(writer.mark().position.file)
            on_shard(split)

        writer = StoreWriter(folder, describe_store(recipe, source, tokenizer), before_first_shard, shard_written)
        if not writer.manifest["complete"]:
            if num_workers > 1:
                before_first_shard()  # other processes read the tokenizer
                with EncodingProcesses(num_workers, parts, source, tokenizer, watch) as processes:
                    write_store(writer, processes.read)
            else:
                write_store(writer, functools.partial(read_or_encode, parts, source, tokenizer, watch=watch))
            say_unexpected_count(recipe, writer)
        parts.drop()


def encode_parts(
    recipe: Recipe, source: Source, files: range, num_workers: int = 1, watch: Watch | None = None
) -> Parts:
    """Encode `files` of the source into part files, from which `build` then packs the store; those that are there
    stay as they are."""
    cache = Path(recipe.data_cache_dir).expanduser()
    with only_builder(cache, recipe, source), provided_tokenizer(recipe, source) as (tokenizer, publish_tokenizer):
        publish_tokenizer()
        remember_refs(source, cache)
    tokenizer = TokenizerFolder(tokenizer_folder(recipe, source))
    parts = Parts(store_folder(recipe, source, tokenizer))
    if parts.missing(files):
        with EncodingProcesses(num_workers, parts, source, tokenizer, watch) as processes:
            for _ in processes.encode(files):
                pass
    return parts


def missing_parts(recipe: Recipe, source: Source) -> list[int]:
    """The files of the source that are neither in the store yet nor in part files."""
    files, folder = range(count_files(source)), tokenizer_folder(recipe, source)
    if not (folder / "tokenizer.json").is_file():
        return list(files)
    tokenizer = TokenizerFolder(folder)
    folder = store_folder(recipe, source, tokenizer)
    begun = StoreWriter(folder, describe_store(recipe, source, tokenizer)).mark().position.file
    return Parts(folder).missing(files[begun:])


@contextlib.contextmanager
def provided_tokenizer(recipe: Recipe, source: Source) -> Iterator[tuple[TokenizerFolder, Callable[[], None]]]:
    """The recipe's tokenizer, made if there is none, and a function that puts a new one where others find it: bad
    input is to leave nothing behind."""
    folder = tokenizer_folder(recipe, source)
    if (folder / "tokenizer.json").is_file():
        yield TokenizerFolder(folder), lambda: None
        return
    with tempfile.TemporaryDirectory() as aside:
        yield TokenizerFolder(make_tokenizer(recipe, source, Path(aside))), lambda: publish(Path(aside), folder)


def say_unexpected_count(recipe: Recipe, writer: StoreWriter) -> None:
    expected, counted = recipe.expected_train_blocks, sum(shard["rows"] for shard in writer.shards("train"))
    if expected and abs(counted - expected) > UNEXPECTED_SHARE * expected:
        print_lines(
            f"expected_train_blocks: the data hold {counted:,} training blocks, {counted / expected - 1:+.2%} of the "
            f"{expected:,} expected; a run that has begun keeps its steps, for a new one correct the recipe"
        )


def describe_store(recipe: Recipe, source: Source, tokenizer: TokenizerFolder) -> dict:
    """The head of a manifest: what the store was made of."""
    return {
        "format": FORMAT_VERSION,
        "source": json.loads(source.to_json()),
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "eos_token": tokenizer.eos_token,
            "eos_token_id": tokenizer.eos_token_id,
            "vocab_size": tokenizer.vocab_size,
        },
        "block_size": recipe.block_size,
        "validation_documents": recipe.validation_documents,
        "dtype": tokenizer.dtype.name,
    }


def make_tokenizer(recipe: Recipe, source: Source, folder: Path) -> Path:
    if recipe.tokenizer_name is not None:
        patiently(lambda: fetch_tokenizer(recipe.tokenizer_name, folder))
    else:
        texts = training_texts(source, recipe.validation_documents)
        train_tokenizer(texts, recipe.train_tokenizer_vocab_size, folder)
    return folder


def training_texts(source: Source, validation_documents: int, max_bytes: int = TRAINING_BYTES) -> Iterator[str]:
    """The documents after the validation ones, until they are `max_bytes` long."""
    documents = size = 0
    for _, texts in read_documents(source):
        for text in filter(None, texts.to_pylist()):
            documents += 1
            if documents > validation_documents:
                yield text
                size += len(text.encode())
                if size >= max_bytes:
                    return


@contextlib.contextmanager
def only_builder(cache: Path, recipe: Recipe, source: Source) -> Iterator[None]:
    """One builder at a time for one store: a lock that the kernel releases when its holder dies.
    The lock's file goes with the lock, and with it the folders that were made for it and hold nothing else."""
    folder = cache / "locks"
    created = [folder, *(path for path in folder.parents if not path.exists())]
    tokenizer = str(tokenizer_folder(recipe, source))
    same_store = json.dumps([source.identity(), tokenizer, recipe.block_size, recipe.validation_documents])
    file = folder / (hashlib.sha256(same_store.encode()).hexdigest()[:16] + ".lock")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(file, "a+")  # noqa: SIM115 (closed below)
        except FileNotFoundError:  # the folder went with another builder's lock
            continue
        take_lock(lock, file)
        if file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat()):
            break
        lock.close()  # its holder removed the file: another one is the lock now
    try:
        lock.truncate(0)
        lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
        lock.flush()
        yield
    finally:
        file.unlink()
        lock.close()
        for path in created:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def take_lock(lock: TextIO, file: Path) -> None:
    """Wait for the lock, and say who holds it. That of a process or machine that died is free."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(ValueError, KeyError):  # its holder is just writing it
                held = json.loads(file.read_text())
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["since"]))
                print_lines(
                    f"process {held['pid']} on {held['host']} has been building this token store since {since}"
                )
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise InputError(
            f"data_cache_dir: no file can be locked in {file.parent} ({error.strerror}); give a folder on a file "
            "system with locks"
        ) from error


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
    """Once there is a shard to train on, training comes first where cores are few: else the threads of its steps wait
    for one that the encoder has put off. On Linux each thread has a priority of its own, and so has the session."""
    if split == "train":
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")
        threads = Path("/proc/self/task")
        for thread in [int(task.name) for task in threads.iterdir()] if threads.exists() else [0]:
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, thread, 19)


def main() -> int:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a scheduler sends them to every process of a job
        signal.signal(signum, signal.SIG_IGN)
    recipe, source = pickle.load(sys.stdin.buffer)
    end_with_parent()
    warnings.simplefilter("ignore")
    try:
        build(recipe, source, yield_to_training)
    except InputError as error:
        print(LAST_WORDS.decode(), error, sep="", flush=True)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"{LAST_WORDS.decode()}data_cache_dir: {recipe.data_cache_dir}: {error.strerror} for the token store",
            flush=True,
        )
        return DISK_FULL
    return 0


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except Exception:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # an abandoned Parquet iterator's threads would hold or spoil an ordinary exit
