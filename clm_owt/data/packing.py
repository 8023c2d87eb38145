"""Writing a token store: encoded documents are packed into blocks and shards; a build can be resumed after any shard.

The manifest holds, with every shard, the place in the stream that follows it. `token_store` reads what this writes.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from clm_owt.data.corpus import Position
from clm_owt.data.documents import START
from clm_owt.data.parts import Encoded
from clm_owt.data.token_store import (
    BLOCKS_PER_SHARD,
    COLUMN,
    SPLITS,
    checksum,
    find_damaged_shard,
    read_manifest,
    shard_name,
)
from clm_owt.errors import InputError
from clm_owt.files import replacing, write_text


@dataclass(frozen=True)
class TokenPosition:
    """A place in the stream of tokens: `tokens` tokens after the beginning of a batch of documents.

    A shard ends anywhere in a batch, but reading can only be resumed between two: so the batch at `position` is
    encoded again and its first `tokens` tokens left out. `documents` (those that are not empty) and `empty` count the
    documents before the batch.
    """

    position: Position = START
    tokens: int = 0
    documents: int = 0
    empty: int = 0

    def with_tokens(self, tokens: int) -> "TokenPosition":
        """The place `tokens` tokens after the beginning of the same batch."""
        return replace(self, tokens=tokens)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "TokenPosition":
        return cls(**values | {"position": Position(**values["position"])})


class StoreWriter:
    """The store's folder and manifest, as the builder changes them. Nothing is created before the first shard.

    `description` is the head of the manifest; `before_first_shard()` and, after each shard, `on_shard(split)` are
    called. The documents of the first `held_out_files` sections of the stream are the validation set, where the
    description does not say how many documents are.
    """

    def __init__(
        self,
        folder: Path,
        description: dict,
        before_first_shard: Callable[[], None] = lambda: None,
        on_shard: Callable[[str], None] = lambda split: None,
        held_out_files: int = 0,
    ):
        self.folder = folder
        self.held_out_files = held_out_files
        self.before_first_shard = before_first_shard
        self.on_shard = on_shard
        self.block_size = description["block_size"]
        self.dtype = np.dtype(description["dtype"])
        self.source_name = source_name(description["source"])
        self.manifest = read_manifest(folder) or description | {
            "validation": {"shards": [], "complete": False},
            "train": {"shards": [], "complete": False},
            "documents": {"validation": 0, "train": 0, "empty": 0},
            "complete": False,
        }
        self.validation_documents = self.manifest["documents"]["validation"]  # of those that have been read
        self.drop_damaged_shards()

    def drop_damaged_shards(self) -> None:
        """Take from the manifest the first shard that is missing or of another size, and all that come after it."""
        damaged = find_damaged_shard(self.folder, self.manifest)
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

    def end(self) -> TokenPosition:
        """Where the build is to be resumed: the end of the last shard there is."""
        for split in reversed(SPLITS):
            if self.shards(split):
                return TokenPosition.from_json(self.shards(split)[-1]["after"])
        return TokenPosition()

    def count_held_out(self, piece: Encoded, documents_before: int) -> int:
        """How many documents of `piece` are of the validation set."""
        in_all = self.manifest["validation_documents"]
        if in_all is None:
            return len(piece.lengths) if piece.position.file < self.held_out_files else 0
        return min(max(in_all - documents_before, 0), len(piece.lengths))

    def write_shard(self, split: str, tokens: np.ndarray, end: TokenPosition) -> None:
        """Write `tokens`, a multiple of the block size, as the next shard of `split`, and list it in the manifest.
        `end` is the place after them. Raises OSError, and leaves no partial file, where the disk is full."""
        if not self.folder.is_dir():
            self.before_first_shard()
            self.folder.mkdir(parents=True)
        file = self.folder / shard_name(split, len(self.shards(split)))
        values = pa.FixedSizeListArray.from_arrays(pa.array(tokens.astype(self.dtype, copy=False)), self.block_size)
        table = pa.table({COLUMN: values})
        with replacing(file) as aside:
            with open(aside, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            shard = {"rows": table.num_rows, "bytes": aside.stat().st_size, "checksum": checksum(aside)}
        self.shards(split).append(shard | {"after": end.to_json()})
        self.count_documents(end)
        self.write_manifest()
        self.on_shard(split)

    def count_documents(self, end: TokenPosition) -> None:
        self.manifest["documents"] = {
            "validation": self.validation_documents,
            "train": max(end.documents - self.validation_documents, 0),
            "empty": end.empty,
        }

    def finish(self, end: TokenPosition, tokens: np.ndarray) -> None:
        """Complete the store with the last training shard, `tokens` (none where the shard before was the last)."""
        self.manifest["train"]["complete"] = self.manifest["complete"] = True
        if len(tokens):
            self.write_shard("train", tokens, end)
        else:
            self.count_documents(end)
            self.write_manifest()

    def write_manifest(self) -> None:
        write_text(self.folder / "manifest.json", json.dumps(self.manifest, indent=1))


def source_name(source: dict) -> str:
    """How an error calls the source of a manifest: by its file, where it is one."""
    files = source.get("files", [])
    return files[0][0] if len(files) == 1 else source["dataset_name"] + (f" ({len(files)} files)" if files else "")


class TokenBuffer:
    """Tokens that are not in a shard yet, in their order."""

    def __init__(self):
        self.pieces: list[np.ndarray] = []
        self.size = 0

    def add(self, tokens: np.ndarray) -> None:
        if len(tokens):  # an empty slice would keep alive the array that it was cut from
            self.pieces.append(tokens)
            self.size += len(tokens)

    def take(self, count: int) -> np.ndarray:
        """The first `count` tokens, removed."""
        tokens = np.concatenate(self.pieces) if self.pieces else np.empty(0, np.uint32)
        self.pieces = [tokens[count:]]
        self.size -= count
        return tokens[:count]


def write_store(writer: StoreWriter, encoded: Callable[[Position], Iterator[Encoded]]) -> None:
    """Write the store from the end of its last shard to the end of the stream; `encoded(position)` gives the documents
    from `position` on.

    The blocks are a function of the stream, the tokenizer and the block size alone, so that the files are the same
    byte for byte however often this was interrupted. Raises `InputError` for a corpus with no document, or too short
    for one validation and one training block, before anything is written.
    """
    block_size = writer.block_size
    shard_tokens = BLOCKS_PER_SHARD * block_size
    start = writer.end()
    batch, tokens_before = start, 0  # the batch that is being packed, and its tokens so far
    documents, empty = start.documents, start.empty
    validation, train = TokenBuffer(), TokenBuffer()
    validation_end = start

    for piece in encoded(start.position):
        if piece.position != batch.position:
            batch, tokens_before = TokenPosition(piece.position, 0, documents, empty), 0
        packed = start.tokens if piece.position == start.position else 0  # of this batch, already in shards
        first = min(max(packed - tokens_before, 0), len(piece.tokens))
        held_out_documents = writer.count_held_out(piece, documents)
        held_out = int(np.sum(piece.lengths[:held_out_documents]))
        if held_out_documents:
            writer.validation_documents = documents + held_out_documents
            validation_end = batch.with_tokens(tokens_before + held_out)
        validation.add(piece.tokens[first:held_out])
        train.add(piece.tokens[max(first, held_out) :])
        documents += len(piece.lengths)
        empty += piece.empty

        while validation.size >= shard_tokens:
            taken = validation.take(shard_tokens)
            writer.write_shard("validation", taken, batch.with_tokens(tokens_before + held_out - validation.size))
        tokens_before += len(piece.tokens)
        if train.size >= block_size and not writer.manifest["validation"]["complete"]:
            check_validation(writer, validation)
            finish_validation(writer, validation, validation_end)
        while train.size >= shard_tokens:
            taken = train.take(shard_tokens)
            writer.write_shard("train", taken, batch.with_tokens(tokens_before - train.size))

    check_training(writer, train, documents, empty)
    end = TokenPosition(batch.position, tokens_before, documents, empty)
    writer.finish(end, train.take(train.size // block_size * block_size))


def finish_validation(writer: StoreWriter, validation: TokenBuffer, end: TokenPosition) -> None:
    tokens = validation.take(validation.size // writer.block_size * writer.block_size)
    writer.manifest["validation"]["complete"] = True
    if len(tokens):
        writer.write_shard("validation", tokens, end)
    else:
        writer.write_manifest()


def check_validation(writer: StoreWriter, validation: TokenBuffer) -> None:
    """Raises `InputError` where the validation documents are shorter than one block."""
    if not writer.shards("validation") and validation.size < writer.block_size:
        raise InputError(
            f"{writer.source_name}: the {writer.validation_documents} validation documents are "
            f"{validation.size} tokens, shorter than one block of {writer.block_size}; "
            f"{more_or_less(writer)[0]} or lower block_size"
        )


def check_training(writer: StoreWriter, train: TokenBuffer, documents: int, empty: int) -> None:
    """Raises `InputError` where the whole stream holds no training block."""
    if documents == 0:
        raise InputError(f"{writer.source_name}: no document with text in it ({empty} empty ones)")
    held_out = writer.validation_documents
    if documents == held_out and not writer.shards("train"):
        raise InputError(
            f"{writer.source_name}: {documents} documents, all of which are held out for validation, leave none to "
            f"train on; {more_or_less(writer)[1]}"
        )
    if not writer.shards("train") and train.size < writer.block_size:
        raise InputError(
            f"{writer.source_name}: the {documents - held_out} training documents are {train.size} tokens, shorter "
            f"than one block of {writer.block_size}; lower block_size, or {more_or_less(writer)[1]}"
        )


def more_or_less(writer: StoreWriter) -> tuple[str, str]:
    """What to do for more documents in the validation set, and for fewer."""
    if "validation_files" in writer.manifest["source"]:
        return "give more validation_files", "give fewer validation_files"
    key = "validation_share" if "validation_share" in writer.manifest["source"] else "validation_documents"
    return f"raise {key}", f"lower {key}"
