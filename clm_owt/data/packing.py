"""Writing a token store: encoded documents packed into blocks and shards, to be continued after any shard."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from clm_owt.data.documents import START, Position
from clm_owt.data.parts import Encoded
from clm_owt.data.token_store import (
    BLOCKS_PER_SHARD,
    COLUMN,
    SPLITS,
    checksum,
    read_manifest,
    shard_name,
    whole_shards,
)
from clm_owt.errors import InputError


@dataclass(frozen=True)
class Mark:
    """A place in the stream of tokens: so many tokens after the beginning of a batch of documents.

    A shard ends anywhere in a batch, but the source can only be resumed between two: so the batch is encoded again
    and its first `tokens` left out. `documents` (not empty) and `empty` count those before the batch.
    """

    position: Position = START
    tokens: int = 0
    documents: int = 0
    empty: int = 0

    def after(self, tokens: int) -> "Mark":
        """The place so many tokens after the beginning of this batch."""
        return replace(self, tokens=tokens)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Mark":
        return cls(**values | {"position": Position(**values["position"])})


class StoreWriter:
    """The store's folder and manifest, as the builder changes them. Nothing is created before the first shard."""

    def __init__(
        self,
        folder: Path,
        description: dict,
        before_first_shard: Callable[[], None] = lambda: None,
        on_shard: Callable[[str], None] = lambda split: None,
    ):
        self.folder = folder
        self.before_first_shard = before_first_shard
        self.on_shard = on_shard
        self.block_size = description["block_size"]
        self.dtype = np.dtype(description["dtype"])
        self.dataset_name = description["source"]["dataset_name"]
        self.manifest = read_manifest(folder) or description | {
            "validation": {"shards": [], "complete": False},
            "train": {"shards": [], "complete": False},
            "documents": {"validation": 0, "train": 0, "empty": 0},
            "complete": False,
        }
        self.drop_damaged()

    def drop_damaged(self) -> None:
        """Forget the first shard that is missing or of another size, and all that were written after it."""
        damaged = whole_shards(self.folder, self.manifest)
        if damaged is None:
            return
        split, index = damaged
        for later in SPLITS[SPLITS.index(split) :]:
            del self.manifest[later]["shards"][index if later == split else 0 :]
            self.manifest[later]["complete"] = False
        self.manifest["complete"] = False
        self.write_manifest()

    def shards(self, split: str) -> list[dict]:
        return self.manifest[split]["shards"]

    def mark(self) -> Mark:
        """Where to go on: after the last shard there is."""
        for split in reversed(SPLITS):
            if self.shards(split):
                return Mark.from_json(self.shards(split)[-1]["after"])
        return Mark()

    def write_shard(self, split: str, tokens: np.ndarray, after: Mark) -> None:
        """`tokens`, a whole number of blocks, become the next shard of `split`: aside, flushed, renamed, listed."""
        if not self.folder.is_dir():
            self.before_first_shard()
            self.folder.mkdir(parents=True)
        index = len(self.shards(split))
        file = self.folder / shard_name(split, index)
        values = pa.FixedSizeListArray.from_arrays(pa.array(tokens.astype(self.dtype, copy=False)), self.block_size)
        table = pa.table({COLUMN: values})
        aside = file.with_suffix(".partial")
        try:
            with open(aside, "wb") as sink:
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
                sink.flush()
                os.fsync(sink.fileno())
        except OSError:
            aside.unlink(missing_ok=True)  # on a full disk its place is wanted
            raise
        shard = {"rows": table.num_rows, "bytes": aside.stat().st_size, "checksum": checksum(aside)}
        os.replace(aside, file)
        self.shards(split).append(shard | {"after": after.to_json()})
        self.count_documents(after)
        self.write_manifest()
        self.on_shard(split)

    def count_documents(self, mark: Mark) -> None:
        validation = self.manifest["validation_documents"]
        self.manifest["documents"] = {
            "validation": min(mark.documents, validation),
            "train": max(mark.documents - validation, 0),
            "empty": mark.empty,
        }

    def finish(self, end: Mark, tokens: np.ndarray) -> None:
        """The last training shard, `tokens` (none where the shard before was the last), and the end of the store."""
        self.manifest["train"]["complete"] = self.manifest["complete"] = True
        if len(tokens):
            self.write_shard("train", tokens, end)
        else:
            self.count_documents(end)
            self.write_manifest()

    def write_manifest(self) -> None:
        aside = self.folder / "manifest.json.partial"
        with open(aside, "w", encoding="utf-8") as sink:
            json.dump(self.manifest, sink, indent=1)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(aside, self.folder / "manifest.json")


class Packer:
    """Tokens that are not yet in a shard, in their order."""

    def __init__(self):
        self.pieces: list[np.ndarray] = []
        self.size = 0

    def add(self, tokens: np.ndarray) -> None:
        if len(tokens):  # an empty slice would keep all that it was cut from
            self.pieces.append(tokens)
            self.size += len(tokens)

    def take(self, count: int) -> np.ndarray:
        """The first `count` tokens, removed."""
        tokens = np.concatenate(self.pieces) if self.pieces else np.empty(0, np.uint32)
        self.pieces = [tokens[count:]]
        self.size -= count
        return tokens[:count]


def write_store(writer: StoreWriter, encoded: Callable[[Position], Iterator[Encoded]]) -> None:
    """Continue the store from its last shard to the end of the stream; `encoded(position)` gives the documents from
    there on.

    The blocks are a function of the stream, the tokenizer and the block size alone, so that the files are the same
    byte for byte however often this was interrupted. Raises `InputError` for a corpus with no document, or too short
    for one validation and one training block, before anything is written.
    """
    block_size, held_out_documents = writer.block_size, writer.manifest["validation_documents"]
    shard_tokens = BLOCKS_PER_SHARD * block_size
    start = writer.mark()
    batch, tokens_before = start, 0  # the batch that is being packed, and its tokens so far
    documents, empty = start.documents, start.empty
    validation, train = Packer(), Packer()
    validation_end = start

    for piece in encoded(start.position):
        if piece.position != batch.position:
            batch, tokens_before = Mark(piece.position, 0, documents, empty), 0
        packed = start.tokens if piece.position == start.position else 0  # of this batch, already in shards
        first = min(max(packed - tokens_before, 0), len(piece.tokens))
        held_out = int(np.sum(piece.lengths[: max(held_out_documents - documents, 0)]))
        validation.add(piece.tokens[first:held_out])
        train.add(piece.tokens[max(first, held_out) :])
        documents += len(piece.lengths)
        empty += piece.empty

        if held_out:
            validation_end = batch.after(tokens_before + held_out)
        while validation.size >= shard_tokens:
            taken = validation.take(shard_tokens)
            writer.write_shard("validation", taken, batch.after(tokens_before + held_out - validation.size))
        tokens_before += len(piece.tokens)
        if documents >= held_out_documents and not writer.manifest["validation"]["complete"]:
            check_validation(writer, validation)
            if train.size >= block_size:
                finish_validation(writer, validation, validation_end)
        while train.size >= shard_tokens:
            taken = train.take(shard_tokens)
            writer.write_shard("train", taken, batch.after(tokens_before - train.size))

    check_training(writer, train, documents, empty)
    end = Mark(batch.position, tokens_before, documents, empty)
    writer.finish(end, train.take(train.size // block_size * block_size))


def finish_validation(writer: StoreWriter, validation: Packer, end: Mark) -> None:
    tokens = validation.take(validation.size // writer.block_size * writer.block_size)
    writer.manifest["validation"]["complete"] = True
    if len(tokens):
        writer.write_shard("validation", tokens, end)
    else:
        writer.write_manifest()


def check_validation(writer: StoreWriter, validation: Packer) -> None:
    if not writer.shards("validation") and validation.size < writer.block_size:
        raise InputError(
            f"{writer.dataset_name}: the {writer.manifest['validation_documents']} validation documents are "
            f"{validation.size} tokens, shorter than one block of {writer.block_size}; "
            "raise validation_documents or lower block_size"
        )


def check_training(writer: StoreWriter, train: Packer, documents: int, empty: int) -> None:
    if documents == 0:
        raise InputError(f"{writer.dataset_name}: no document with text in it ({empty} empty ones)")
    held_out = writer.manifest["validation_documents"]
    if documents <= held_out and not writer.shards("train"):
        raise InputError(
            f"{writer.dataset_name}: {documents} documents, of which validation_documents: {held_out} are held out, "
            "leave none to train on; lower validation_documents"
        )
    if not writer.shards("train") and train.size < writer.block_size:
        raise InputError(
            f"{writer.dataset_name}: the {documents - held_out} training documents are {train.size} tokens, shorter "
            f"than one block of {writer.block_size}; lower block_size or validation_documents"
        )
