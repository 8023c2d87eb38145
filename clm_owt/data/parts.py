"""Documents as tokens, file by file of the source: encoded as they are read, or ahead of the store into part files.

The store is packed from these alone, so that it is the same byte for byte whether one process encodes, several do, or
several machines: a part file holds what encoding one file of the source gives, and is removed once it is in the store.
Files are counted in the order of the stream, as `documents.count_files` does.
"""

import collections
import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute

from clm_owt.data.corpus import Position
from clm_owt.data.documents import count_files, read_documents
from clm_owt.data.encoding import Encoder
from clm_owt.data.sources import Source
from clm_owt.data.store_lock import shared_lock
from clm_owt.data.tokenizer_files import TokenizerFolder
from clm_owt.errors import InputError, RunFailed, one_line
from clm_owt.files import replacing

T = TypeVar("T")

ENCODED_BYTES = 4_000_000  # of text in one call of the encoder; bounds memory where documents are long

# Called for each piece that has been encoded, with the documents, tokens and bytes of text in it.
OnEncoded = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Encoded:
    """Some documents in their order, as the token store holds them.

    position: the last place before them at which reading can be resumed; tokens: uint16 or uint32 [n], the ids of
    each document and its end-of-text id; lengths: int64 [documents], the tokens of each document that is not empty;
    empty: how many documents without text were left out.
    """

    position: Position
    tokens: np.ndarray
    lengths: np.ndarray
    empty: int


def encode_documents(
    source: Source, encoder: Encoder, start: Position, end_file: int, on_encoded: OnEncoded | None = None
) -> Iterator[Encoded]:
    """The documents of `source` from `start` to the end of the file before `end_file`; one or several pieces for each
    batch. Raises `InputError` as reading and encoding do."""
    tokenizer = encoder.tokenizer
    for position, texts in prefetch(read_documents(source, start, end_file=end_file)):
        for group in groups_of_documents(texts):
            filled = group.filter(pa.compute.not_equal(pa.compute.binary_length(group), 0))
            ids, lengths = encoder.encode(filled)
            tokens = with_end_of_text(ids, lengths, tokenizer.eos_token_id, tokenizer.dtype)
            text_bytes = pa.compute.sum(pa.compute.binary_length(filled)).as_py() or 0
            if on_encoded is not None:
                on_encoded(len(filled), len(tokens), text_bytes)
            yield Encoded(position, tokens, lengths + 1, len(group) - len(filled))


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """The same items, each read in a thread while the one before is in use: 1.5 times as fast on two cores."""
    reader = ThreadPoolExecutor(1)
    try:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item
    finally:
        reader.shutdown(wait=False)  # the thread may be waiting for a server


def groups_of_documents(texts: pa.LargeStringArray) -> list[pa.LargeStringArray]:
    """`texts` in slices of at most ENCODED_BYTES bytes; a longer document is a slice by itself."""
    ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset + 1 : texts.offset + len(texts) + 1]
    groups, start, bytes_before = [], 0, ends[0] - len(texts[0].as_buffer()) if len(texts) else 0
    while start < len(texts):
        stop = max(int(np.searchsorted(ends, bytes_before + ENCODED_BYTES, side="right")), start + 1)
        groups.append(texts.slice(start, stop - start))
        start, bytes_before = stop, ends[stop - 1]
    return groups


def with_end_of_text(ids: np.ndarray, lengths: np.ndarray, eos_token_id: int, dtype: np.dtype) -> np.ndarray:
    """The ids of several documents end to end, each followed by the end-of-text id: `dtype` [len(ids) + documents]."""
    tokens = np.full(len(ids) + len(lengths), eos_token_id, dtype)
    is_text = np.ones(len(tokens), bool)
    is_text[np.cumsum(lengths + 1) - 1] = False
    tokens[is_text] = ids
    return tokens


PARTS_SUFFIX = ".parts"
IN_USE = "in_use"  # a file that processes hold a lock on while they write parts beside it


class Parts:
    """The part files beside a store: `00012.arrow` is what encoding file 12 of the source gave, a row a document."""

    def __init__(self, store: Path):
        self.folder = store.with_name(store.name + PARTS_SUFFIX)

    def file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.arrow"

    def missing(self, files: range) -> list[int]:
        return [index for index in files if not self.file(index).is_file()]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The block writes parts here: nobody removes them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / IN_USE).touch()
        with shared_lock(self.folder / IN_USE) or contextlib.nullcontext():
            yield

    def write(self, index: int, encoded: Iterator[Encoded]) -> None:
        """Write part `index`, which has its name only when it is complete. Raises OSError where the disk is full."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            replacing(self.file(index), suffix=f".{os.getpid()}.partial") as aside,
            open(aside, "wb") as sink,
        ):
            stream = None
            for piece in encoded:
                ends = np.append(0, np.cumsum(piece.lengths)).astype(np.int32)
                documents = pa.ListArray.from_arrays(pa.array(ends), pa.array(piece.tokens))
                batch = pa.record_batch({"input_ids": documents})
                stream = stream or pa.ipc.new_stream(sink, batch.schema)
                stream.write_batch(batch, custom_metadata={"piece": head_to_json(piece)})
            if stream is not None:
                stream.close()

    def read(self, index: int, start: Position) -> Iterator[Encoded]:
        """What `write` was given, from `start` on. Raises InputError for a part that is damaged."""
        file = self.file(index)
        if not file.stat().st_size:  # a file of the source without rows
            return
        try:
            with pa.memory_map(str(file)) as content, pa.ipc.open_stream(content) as stream:
                while True:
                    try:
                        batch, metadata = stream.read_next_batch_with_custom_metadata()
                    except StopIteration:
                        return
                    piece = piece_from(batch, metadata["piece"])
                    if piece.position.row >= start.row:
                        yield piece
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read ({one_line(error)}); delete it and start again") from error

    def drop_before(self, file: int) -> None:
        """Remove the parts of the files before `file`, which are in the store."""
        for part in self.folder.glob("*.arrow"):
            if int(part.stem) < file:
                part.unlink()

    def drop(self) -> None:
        """Remove all parts and their folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def head_to_json(piece: Encoded) -> str:
    return json.dumps({"position": asdict(piece.position), "empty": piece.empty})


def piece_from(batch: pa.RecordBatch, head: bytes) -> Encoded:
    head, documents = json.loads(head), batch.column(0)
    tokens, lengths = documents.flatten().to_numpy(), documents.value_lengths().to_numpy().astype(np.int64)
    return Encoded(Position(**head["position"]), tokens, lengths, head["empty"])


def read_or_encode(
    parts: Parts, source: Source, tokenizer: TokenizerFolder, start: Position, on_encoded: OnEncoded | None = None
) -> Iterator[Encoded]:
    """All of `source` from `start` on: read from the parts that there are, encoded here where there is none."""
    encoder = None
    file, files = start.file, count_files(source)
    while file < files:
        position = start if file == start.file else Position(file)
        if parts.file(file).is_file():
            yield from parts.read(file, position)
            file += 1
            continue
        end_file = file + 1
        while end_file < files and not parts.file(end_file).is_file():
            end_file += 1
        encoder = encoder or Encoder(tokenizer)
        yield from encode_documents(source, encoder, position, end_file, on_encoded)
        file = end_file


class EncodingProcesses:
    """Several processes, each of which encodes one file of the source at a time into its part file.

    What they share has no lock: one that is killed while it holds a lock would stop the others for good.
    """

    def __init__(
        self, count: int, parts: Parts, source: Source, tokenizer: TokenizerFolder, on_encoded: OnEncoded | None
    ):
        self.count, self.parts, self.source, self.on_encoded = count, parts, source, on_encoded
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
        self.counts = context.RawArray("q", 3 * count_files(source))  # for each file what OnEncoded is called with
        self.reported = np.zeros(3, np.int64)
        self.over = threading.Event()
        threads = max(1, (os.cpu_count() or 1) // count)
        arguments = (os.getpid(), threads, source, tokenizer.folder, parts, self.counts)
        self.pool = ProcessPoolExecutor(count, context, initializer=begin_worker, initargs=arguments)

    def __enter__(self) -> "EncodingProcesses":
        self.reporter = threading.Thread(target=self.report, daemon=True)
        self.reporter.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None:  # the files in work are begun anew later; a process may be waiting for a server
            for process in multiprocessing.active_children():
                process.terminate()
        self.pool.shutdown(cancel_futures=True)
        self.over.set()
        self.reporter.join()

    def report(self) -> None:
        """Call `on_encoded`, once a second and at the end, with what the processes have encoded since."""
        while self.on_encoded is not None:
            over = self.over.wait(1.0)
            counts = np.array(self.counts).reshape(-1, 3).sum(0)
            self.on_encoded(*map(int, counts - self.reported))
            self.reported = counts
            if over:
                return

    def encode(self, files: range) -> Iterator[int]:
        """Have the parts of `files` written; gives each file in its order once its part is there. At most `count`
        parts beyond the one that is waited for are begun, since all of them would take as much disk as the store.
        Raises InputError as reading does, RunFailed where a process died."""
        in_work: collections.deque[tuple[int, Future | None]] = collections.deque()
        to_do = iter(files)
        try:
            while True:
                while len(in_work) <= self.count and (file := next(to_do, None)) is not None:
                    there = self.parts.file(file).is_file()
                    in_work.append((file, None if there else self.pool.submit(write_part, file)))
                if not in_work:
                    return
                file, future = in_work.popleft()
                if future is not None:
                    future.result()
                yield file
        except BrokenProcessPool as error:
            raise RunFailed(
                f"num_workers: one of the {self.count} encoding processes died (is memory short?); the same command "
                "continues, with fewer of them if that was it"
            ) from error

    def read(self, start: Position) -> Iterator[Encoded]:
        """All of the source from `start` on, encoded by these processes."""
        for file in self.encode(range(start.file, count_files(self.source))):
            yield from self.parts.read(file, start if file == start.file else Position(file))


def begin_worker(parent: int, threads: int, *arguments) -> None:
    """What a process of the pool does first: limit itself to its share of the cores, and see to it that it ends with
    its parent. A Ctrl-C is left to the parent, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of gigatoken and tokenizers
    pa.set_cpu_count(threads)
    global worker_arguments
    worker_arguments = (threads, *arguments)

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()


@functools.cache  # a new encoder would be slow again for its first 30 MB of text
def worker_encoder(tokenizer: Path, threads: int) -> Encoder:
    return Encoder(TokenizerFolder(tokenizer), parallel=threads > 1)


def write_part(file: int) -> None:
    threads, source, tokenizer, parts, counts = worker_arguments

    def on_encoded(*encoded: int) -> None:
        for index, count in enumerate(encoded, start=3 * file):
            counts[index] += count

    encoder = worker_encoder(tokenizer, threads)
    parts.write(file, encode_documents(source, encoder, Position(file), file + 1, on_encoded))
