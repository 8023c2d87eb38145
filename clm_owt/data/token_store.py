"""A stream of documents packed into blocks, in shards on disk: written once, resumable, checked.

A store is a folder of Arrow files and `manifest.json`. Each document's ids are followed by one end-of-text id;
documents lie end to end, across shard boundaries too, cut into blocks of `block_size`; only the last incomplete
block is dropped. The first `validation_documents` non-empty documents are the validation split, the rest the
training split. To look into one:

    from datasets import Dataset
    shard = Dataset.from_file(f"{folder}/train-00000.arrow")
    tokenizer.decode(shard[0]["input_ids"])

The training side (`TokenStore`) only looks at files. `write_store` is the builder's.
"""

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import xxhash

from clm_owt.data.encoding import Encoder, TokenizerFolder, tokenizer_folder
from clm_owt.data.sources import START, Position, Source, read_documents
from clm_owt.recipe import InputError, Recipe

BLOCKS_PER_SHARD = 8192  # a constant of the format: 16 MB at 1024 tokens of 2 bytes
FORMAT_VERSION = 1
SPLITS = ("validation", "train")
COLUMN = "input_ids"
ENCODED_BYTES = 4_000_000  # of text in one call of the encoder; bounds memory where documents are long
POLL_SECONDS = 0.1

Check = Callable[[str], None]


def store_folder(recipe: Recipe, source: Source, tokenizer: TokenizerFolder) -> Path:
    """One folder per digest of everything the content depends on."""
    depends_on = source.identity() | {
        "tokenizer": tokenizer.sha256,
        "block_size": recipe.block_size,
        "validation_documents": recipe.validation_documents,
        "format": FORMAT_VERSION,
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "--", source.dataset_name)
    return Path(recipe.data_cache_dir).expanduser() / "stores" / f"{name}-{digest}"


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.arrow"


def checksum(file: Path) -> str:
    """xxh3_128 of the content: 16 MB in about 2 ms once read, so that reading stays the cost."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict | None:
    file = folder / "manifest.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{file}: no valid JSON; delete {folder} and start again") from error


# The training side


class Split:
    """The blocks of one split: row r lies in shard r // 8192 at r % 8192, since every shard but the last is full."""

    def __init__(self, store: "TokenStore", name: str):
        self.store = store
        self.name = name
        self.verified: set[int] = set()
        self.shard = functools.cache(self.open_shard)  # a mapping holds no file descriptor; 1,100 for OpenWebText

    @property
    def shard_rows(self) -> list[int]:
        """Blocks of each shard there is so far."""
        return [shard["rows"] for shard in self.store.manifest[self.name]["shards"]]

    def __len__(self) -> int:
        """Blocks there are so far."""
        return sum(self.shard_rows)

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Blocks `rows`, as int64 [len(rows), block_size]."""
        rows = np.asarray(rows, np.int64)
        shards, inside = np.divmod(rows, BLOCKS_PER_SHARD)
        blocks = np.empty((len(rows), self.store.block_size), np.int64)
        for index in np.unique(shards):
            chosen = shards == index
            blocks[chosen] = self.shard(int(index))[inside[chosen]]
        return blocks

    def open_shard(self, index: int) -> np.ndarray:
        """Shard `index`, memory-mapped, uint16 or uint32 [rows, block_size]; its checksum is verified the first time.
        Raises `InputError` for a missing or altered file."""
        from datasets import Dataset

        file = self.store.folder / shard_name(self.name, index)
        written = self.store.manifest[self.name]["shards"][index]
        if not file.is_file():
            raise InputError(f"{file}: missing; start again to have it written anew")
        if index not in self.verified:
            if file.stat().st_size != written["bytes"] or checksum(file) != written["checksum"]:
                raise InputError(
                    f"{file}: altered since it was written; delete it and start again to have it written anew"
                )
            self.verified.add(index)
        column = Dataset.from_file(str(file)).data.column(COLUMN).chunk(0)
        return column.flatten().to_numpy(zero_copy_only=True).reshape(written["rows"], self.store.block_size)


class TokenStore:
    """A recipe's token store, as training sees it: looks at files only, so every rank may wait on its own.

    Waits call `check(what)` some ten times a second, with what is waited for; raise from it to leave the wait.
    """

    def __init__(self, recipe: Recipe, source: Source):
        self.recipe = recipe
        self.source = source
        self.block_size = recipe.block_size
        self.folder: Path | None = None  # known once the tokenizer is there
        self.tokenizer: TokenizerFolder | None = None
        self.manifest: dict | None = None
        self.validation = Split(self, "validation")
        self.train = Split(self, "train")

    # looking

    def find(self) -> bool:
        """Whether the tokenizer is there, and with it the place of the store known."""
        folder = tokenizer_folder(self.recipe, self.source)
        if self.folder is None and (folder / "tokenizer.json").is_file():
            self.tokenizer = TokenizerFolder(folder)
            self.folder = store_folder(self.recipe, self.source, self.tokenizer)
        return self.folder is not None

    def refresh(self) -> None:
        """Take in what the builder has published since."""
        if self.find() and not (self.manifest and self.manifest["complete"]):
            self.manifest = read_manifest(self.folder) or self.manifest

    def is_whole(self) -> bool:
        """Complete, with every file there in its full size (contents are verified when a shard is first opened)."""
        self.refresh()
        return bool(self.manifest) and self.manifest["complete"] and whole_shards(self.folder, self.manifest) is None

    @property
    def complete(self) -> bool:
        self.refresh()
        return bool(self.manifest) and self.manifest["complete"]

    @property
    def train_blocks(self) -> int | None:
        """Training blocks, once all are there."""
        return len(self.train) if self.complete else None

    @property
    def train_blocks_so_far(self) -> int:
        self.refresh()
        return len(self.train) if self.manifest else 0

    @property
    def documents(self) -> dict[str, int]:
        """Documents read so far: `validation`, `train`, and the `empty` ones that were left out."""
        self.refresh()
        return self.manifest["documents"]

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens in the blocks so far, per split."""
        self.refresh()
        return {"validation": len(self.validation) * self.block_size, "train": len(self.train) * self.block_size}

    # waiting

    def wait(self, there: Callable[[], bool], what: str, check: Check) -> None:
        self.refresh()
        while not there():
            check(what)
            time.sleep(POLL_SECONDS)
            self.refresh()

    def wait_for_tokenizer(self, check: Check) -> Path:
        """The folder of the tokenizer, once it is there."""
        self.wait(self.find, "the tokenizer", check)
        return self.tokenizer.folder

    def wait_for_validation(self, check: Check) -> None:
        self.wait(lambda: self.manifest and self.manifest["validation"]["complete"], "the validation blocks", check)

    def wait_for_rows(self, rows: int, check: Check) -> None:
        """Until there are `rows` training blocks, or the store is complete."""
        shard = max(rows - 1, 0) // BLOCKS_PER_SHARD
        self.wait(
            lambda: self.manifest and (len(self.train) >= rows or self.manifest["complete"]),
            f"shard {shard} of the training blocks",
            check,
        )

    def wait_complete(self, check: Check) -> None:
        self.wait(lambda: self.complete, "the whole token store", check)


def whole_shards(folder: Path, manifest: dict) -> tuple[str, int] | None:
    """None where every listed shard is there in its full size; else (split, index) of the first that is not."""
    for split in SPLITS:
        for index, shard in enumerate(manifest[split]["shards"]):
            file = folder / shard_name(split, index)
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                return split, index
    return None


# The builder's side


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
        self.pieces.append(tokens)
        self.size += len(tokens)

    def take(self, count: int) -> np.ndarray:
        """The first `count` tokens, removed."""
        tokens = np.concatenate(self.pieces) if self.pieces else np.empty(0, np.uint32)
        self.pieces = [tokens[count:]]
        self.size -= count
        return tokens[:count]


def with_end_of_text(ids: np.ndarray, lengths: np.ndarray, eos_token_id: int, dtype: np.dtype) -> np.ndarray:
    """ids of several documents end to end, each followed by the end-of-text id."""
    tokens = np.full(len(ids) + len(lengths), eos_token_id, dtype)
    is_text = np.ones(len(tokens), bool)
    is_text[np.cumsum(lengths + 1) - 1] = False
    tokens[is_text] = ids
    return tokens


def groups_of_documents(texts: pa.LargeStringArray) -> list[pa.LargeStringArray]:
    """`texts` in slices of at most ENCODED_BYTES; a longer document alone."""
    ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset + 1 : texts.offset + len(texts) + 1]
    groups, start, bytes_before = [], 0, ends[0] - len(texts[0].as_buffer()) if len(texts) else 0
    while start < len(texts):
        stop = max(int(np.searchsorted(ends, bytes_before + ENCODED_BYTES, side="right")), start + 1)
        groups.append(texts.slice(start, stop - start))
        start, bytes_before = stop, ends[stop - 1]
    return groups


def write_store(writer: StoreWriter, source: Source, encoder: Encoder, eos_token_id: int) -> None:
    """Continue the store from its last shard to the end of the stream.

    The blocks are a function of the stream, the tokenizer and the block size alone, so that the files are the same
    byte for byte however often this was interrupted. Raises `InputError` for a corpus with no document, or too short
    for one validation and one training block, before anything is written.
    """
    block_size, held_out_documents = writer.block_size, writer.manifest["validation_documents"]
    shard_tokens = BLOCKS_PER_SHARD * block_size
    start = writer.mark()
    documents, empty = start.documents, start.empty
    validation, train = Packer(), Packer()
    validation_end = end = start

    for position, texts in read_documents(source, start.position):
        before_batch = Mark(position, 0, documents, empty)
        left_out = start.tokens if position == start.position else 0  # of this batch, already in shards
        batch_tokens = 0
        for group in groups_of_documents(texts):
            filled = group.filter(pa.compute.not_equal(pa.compute.binary_length(group), 0))
            empty += len(group) - len(filled)
            ids, lengths = encoder.encode(filled)
            tokens = with_end_of_text(ids, lengths, eos_token_id, writer.dtype)
            first = min(max(left_out - batch_tokens, 0), len(tokens))
            held_out = int(np.sum(lengths[: max(held_out_documents - documents, 0)] + 1))
            validation.add(tokens[first:held_out])
            train.add(tokens[max(first, held_out) :])
            documents += len(filled)

            def after(tokens_of_batch: int, before_batch=before_batch) -> Mark:
                return Mark(before_batch.position, tokens_of_batch, before_batch.documents, before_batch.empty)

            if held_out:
                validation_end = after(batch_tokens + held_out)
            while validation.size >= shard_tokens:
                taken = validation.take(shard_tokens)
                writer.write_shard("validation", taken, after(batch_tokens + held_out - validation.size))
            batch_tokens += len(tokens)
            if documents >= held_out_documents and not writer.manifest["validation"]["complete"]:
                check_validation(writer, validation, source)
                if train.size >= block_size:
                    finish_validation(writer, validation, validation_end)
            while train.size >= shard_tokens:
                taken = train.take(shard_tokens)
                writer.write_shard("train", taken, after(batch_tokens - train.size))
            end = Mark(position, batch_tokens, documents, empty)

    check_training(writer, train, source, documents, empty)
    writer.finish(Mark(end.position, end.tokens, documents, empty), train.take(train.size // block_size * block_size))


def finish_validation(writer: StoreWriter, validation: Packer, end: Mark) -> None:
    tokens = validation.take(validation.size // writer.block_size * writer.block_size)
    writer.manifest["validation"]["complete"] = True
    if len(tokens):
        writer.write_shard("validation", tokens, end)
    else:
        writer.write_manifest()


def check_validation(writer: StoreWriter, validation: Packer, source: Source) -> None:
    if not writer.shards("validation") and validation.size < writer.block_size:
        raise InputError(
            f"{source.dataset_name}: the {writer.manifest['validation_documents']} validation documents are "
            f"{validation.size} tokens, shorter than one block of {writer.block_size}; "
            "raise validation_documents or lower block_size"
        )


def check_training(writer: StoreWriter, train: Packer, source: Source, documents: int, empty: int) -> None:
    if documents == 0:
        raise InputError(f"{source.dataset_name}: no document with text in it ({empty} empty ones)")
    held_out = writer.manifest["validation_documents"]
    if documents <= held_out and not writer.shards("train"):
        raise InputError(
            f"{source.dataset_name}: {documents} documents, of which validation_documents: {held_out} are held out, "
            "leave none to train on; lower validation_documents"
        )
    if not writer.shards("train") and train.size < writer.block_size:
        raise InputError(
            f"{source.dataset_name}: the {documents - held_out} training documents are {train.size} tokens, shorter "
            f"than one block of {writer.block_size}; lower block_size or validation_documents"
        )
