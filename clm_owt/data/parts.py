"""Documents as tokens, file by file of the source: encoded as they are read, or ahead of the store into part files.

The store is packed from these alone, so that it is the same byte for byte whether one process encodes, several do, or
several machines: a part file holds what encoding one file of the source gives, and goes once it is in the store.
"""

import collections
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

from clm_owt.data.documents import Position, count_files, read_documents
from clm_owt.data.encoding import Encoder, TokenizerFolder
from clm_owt.data.sources import Source
from clm_owt.errors import InputError, RunFailed, one_line

T = TypeVar("T")

ENCODED_BYTES = 4_000_000  # of text in one call of the encoder; bounds memory where documents are long


@dataclass(frozen=True)
class Encoded:
    """Some documents in their order, as the token store holds them.

    position: the last place before them from which the source can be resumed; tokens: uint16 or uint32 [n], the ids of
    each document and its end-of-text id; lengths: int64 [documents], the tokens of each document that is not empty;
    empty: documents without text, left out.
    """

    position: Position
    tokens: np.ndarray
    lengths: np.ndarray
    empty: int


# Called for each piece that has been encoded, with the documents, tokens and bytes of text in it.
Watch = Callable[[int, int, int], None]


def encode_documents(
    source: Source, tokenizer: TokenizerFolder, start: Position, end_file: int, watch: Watch | None = None
) -> Iterator[Encoded]:
    """The documents of `source` from `start` on, up to but without file `end_file`; one or several pieces a batch."""
    encoder = Encoder(tokenizer, os.environ.get("CLM_OWT_ENCODER", "gigatoken"))
    for position, texts in one_ahead(read_documents(source, start, end_file=end_file)):
        for group in groups_of_documents(texts):
            filled = group.filter(pa.compute.not_equal(pa.compute.binary_length(group), 0))
            ids, lengths = encoder.encode(filled)
            tokens = with_end_of_text(ids, lengths, tokenizer.eos_token_id, tokenizer.dtype)
            text_bytes = pa.compute.sum(pa.compute.binary_length(filled)).as_py() or 0
            if watch is not None:
                watch(len(filled), len(tokens), text_bytes)
            yield Encoded(position, tokens, lengths + 1, len(group) - len(filled))


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each of them read while the one before is in work: half as much again a second on two cores."""
    reader = ThreadPoolExecutor(1)
    try:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item
    finally:
        reader.shutdown(wait=False)  # it may wait for a server


def groups_of_documents(texts: pa.LargeStringArray) -> list[pa.LargeStringArray]:
    """`texts` in slices of at most ENCODED_BYTES; a longer document alone."""
    ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset + 1 : texts.offset + len(texts) + 1]
    groups, start, bytes_before = [], 0, ends[0] - len(texts[0].as_buffer()) if len(texts) else 0
    while start < len(texts):
        stop = max(int(np.searchsorted(ends, bytes_before + ENCODED_BYTES, side="right")), start + 1)
        groups.append(texts.slice(start, stop - start))
        start, bytes_before = stop, ends[stop - 1]
    return groups


def with_end_of_text(ids: np.ndarray, lengths: np.ndarray, eos_token_id: int, dtype: np.dtype) -> np.ndarray:
    """ids of several documents end to end, each followed by the end-of-text id."""
    tokens = np.full(len(ids) + len(lengths), eos_token_id, dtype)
    is_text = np.ones(len(tokens), bool)
    is_text[np.cumsum(lengths + 1) - 1] = False
    tokens[is_text] = ids
    return tokens


class Parts:
    """The part files beside a store: `00012.arrow` is what encoding file 12 of the source gave, a row a document."""

    def __init__(self, store: Path):
        self.folder = store.with_name(store.name + ".parts")

    def file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.arrow"

    def missing(self, files: range) -> list[int]:
        return [index for index in files if not self.file(index).is_file()]

    def write(self, index: int, encoded: Iterator[Encoded]) -> None:
        """Part `index`, there under its name only when whole. Raises OSError where the disk is full."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.file(index).with_suffix(f".{os.getpid()}.partial")
        try:
            with open(aside, "wb") as sink:
                stream = None
                for piece in encoded:
                    ends = np.append(0, np.cumsum(piece.lengths)).astype(np.int32)
                    documents = pa.ListArray.from_arrays(pa.array(ends), pa.array(piece.tokens))
                    batch = pa.record_batch({"input_ids": documents})
                    stream = stream or pa.ipc.new_stream(sink, batch.schema)
                    stream.write_batch(batch, custom_metadata={"piece": head_to_json(piece)})
                if stream is not None:
                    stream.close()
                sink.flush()
                os.fsync(sink.fileno())
            os.replace(aside, self.file(index))
        finally:
            aside.unlink(missing_ok=True)

    def read(self, index: int, start: Position) -> Iterator[Encoded]:
        """What `write` was given, from `start` on. Raises InputError for a part that is not whole."""
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
                    piece = piece_of(batch, metadata["piece"])
                    if piece.position.row >= start.row:
                        yield piece
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read ({one_line(error)}); delete it and start again") from error

    def drop_before(self, file: int) -> None:
        """Remove the parts that the store does not need any more."""
        for part in self.folder.glob("*.arrow"):
            if int(part.stem) < file:
                part.unlink()

    def drop(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def head_to_json(piece: Encoded) -> str:
    return json.dumps({"position": asdict(piece.position), "empty": piece.empty})


def piece_of(batch: pa.RecordBatch, head: bytes) -> Encoded:
    head, documents = json.loads(head), batch.column(0)
    tokens, lengths = documents.flatten().to_numpy(), documents.value_lengths().to_numpy().astype(np.int64)
    return Encoded(Position(**head["position"]), tokens, lengths, head["empty"])


def read_or_encode(
    parts: Parts, source: Source, tokenizer: TokenizerFolder, start: Position, watch: Watch | None = None
) -> Iterator[Encoded]:
    """All of `source` from `start` on: from the parts where they are, encoded here where they are not."""
    file = start.file
    while file < count_files(source):
        position = start if file == start.file else Position(file)
        if parts.file(file).is_file():
            yield from parts.read(file, position)
            file += 1
            continue
        end_file = file + 1
        while end_file < count_files(source) and not parts.file(end_file).is_file():
            end_file += 1
        yield from encode_documents(source, tokenizer, position, end_file, watch)
        file = end_file


class EncodingProcesses:
    """Several processes, each of which encodes one file of the source at a time into its part file.

    What they share has no lock: one that is killed while it holds a lock would stop the others for good.
    """

    def __init__(self, count: int, parts: Parts, source: Source, tokenizer: TokenizerFolder, watch: Watch | None):
        self.count, self.parts, self.source, self.watch = count, parts, source, watch
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
        self.counts = context.RawArray("q", 3 * count_files(source))  # for each file those of Watch
        self.passed_on = np.zeros(3, np.int64)
        self.over = threading.Event()
        threads = max(1, (os.cpu_count() or 1) // count)
        arguments = (os.getpid(), threads, source, tokenizer.folder, parts, self.counts)
        self.pool = ProcessPoolExecutor(count, context, initializer=begin_worker, initargs=arguments)

    def __enter__(self) -> "EncodingProcesses":
        self.reporter = threading.Thread(target=self.pass_on, daemon=True)
        self.reporter.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None:  # what they have begun is begun anew; one may wait for a server
            for process in multiprocessing.active_children():
                process.terminate()
        self.pool.shutdown(cancel_futures=True)
        self.over.set()
        self.reporter.join()

    def pass_on(self) -> None:
        while self.watch is not None:
            over = self.over.wait(1.0)
            counts = np.array(self.counts).reshape(-1, 3).sum(0)
            self.watch(*map(int, counts - self.passed_on))
            self.passed_on = counts
            if over:
                return

    def encode(self, files: range) -> Iterator[int]:
        """Have the parts of `files` written, few of them beyond the one that is waited for, since all of them would
        take as much disk as the store; gives each file in its order once its part is there. Raises InputError as
        reading does, RunFailed where a process died."""
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
    """What a process of the pool does first: take its share of the cores, and see to it that it ends with its
    parent, which ends it at a Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of gigatoken and tokenizers
    pa.set_cpu_count(threads)
    global worker_arguments
    worker_arguments = arguments

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()


def write_part(file: int) -> None:
    source, tokenizer, parts, counts = worker_arguments

    def watch(*encoded: int) -> None:
        for index, count in enumerate(encoded, start=3 * file):
            counts[index] += count

    parts.write(file, encode_documents(source, TokenizerFolder(tokenizer), Position(file), file + 1, watch))
