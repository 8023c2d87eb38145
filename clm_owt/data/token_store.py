"""A stream of documents packed into blocks, in shards on disk, as a run reads it. `packing` writes it.

A store is a folder of Arrow files and `manifest.json`. Each document's ids are followed by one end-of-text id;
documents lie end to end, across shard boundaries too, cut into blocks of `block_size`; only the last incomplete
block is dropped. The head of the stream of documents is the validation split, the rest the training split: its first
`validation_documents` that are not empty, or what the other validation keys put there. To look into one:

    from datasets import Dataset
    shard = Dataset.from_file(f"{folder}/train-00000.arrow")
    tokenizer.decode(shard[0]["input_ids"])
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from clm_owt.data.sources import Source
from clm_owt.data.store_lock import shared_lock
from clm_owt.data.tokenizer_files import TokenizerFolder, tokenizer_folder
from clm_owt.errors import InputError
from clm_owt.recipe import Recipe

BLOCKS_PER_SHARD = 8192  # a constant of the format: 16 MB at 1024 tokens of 2 bytes
FORMAT_VERSION = 1
SPLITS = ("validation", "train")
COLUMN = "input_ids"
POLL_SECONDS = 0.1
NOTED_SECONDS = 3600

# Called over and over during a wait, with what is waited for; whatever it raises ends the wait.
Check = Callable[[str], None]


def store_folder(recipe: Recipe, source: Source, tokenizer: TokenizerFolder) -> Path:
    """The folder of the recipe's token store: one for each digest of everything that the content depends on."""
    identity = store_identity(source, tokenizer.sha256, recipe.block_size, recipe.validation_documents)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "--", source.dataset_name)
    return Path(recipe.data_cache_dir).expanduser() / "stores" / f"{name}-{digest}"


def store_identity(
    source: Source,
    tokenizer_sha256: str,
    block_size: int,
    validation_documents: int | None,
    format_version: int = FORMAT_VERSION,
) -> dict:
    """Everything that the content of a token store depends on."""
    return source.identity() | {
        "tokenizer": tokenizer_sha256,
        "block_size": block_size,
        "validation_documents": validation_documents,
        "format": format_version,
    }


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.arrow"


def checksum(file: Path) -> str:
    """xxh3_128 of a file's content, as hexadecimal digits: 16 MB in about 2 ms, less than reading them takes."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict | None:
    """The manifest of the store in `folder`, None where there is none. Raises `InputError` for one that is damaged."""
    file = folder / "manifest.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{file}: no valid JSON; delete {folder} and start again") from error


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
        self.store.note_use()
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

    Waits call `check(what)` ten times a second, with what is waited for; an exception that it raises ends the wait.
    """

    def __init__(self, recipe: Recipe, source: Source):
        self.recipe = recipe
        self.source = source
        self.block_size = recipe.block_size
        self.folder: Path | None = None  # known once the tokenizer is there
        self.tokenizer: TokenizerFolder | None = None
        self.manifest: dict | None = None
        self.in_use: BinaryIO | None = None  # the lock on its first shard, against its removal
        self.used_at = -math.inf
        self.validation = Split(self, "validation")
        self.train = Split(self, "train")

    def find(self) -> bool:
        """Whether the tokenizer is there, on which the store's folder depends."""
        folder = tokenizer_folder(self.recipe, self.source)
        if self.folder is None and (folder / "tokenizer.json").is_file():
            self.tokenizer = TokenizerFolder(folder)
            self.folder = store_folder(self.recipe, self.source, self.tokenizer)
        return self.folder is not None

    def refresh(self) -> None:
        """Read the manifest again, unless it is known to be complete."""
        if self.find() and not (self.manifest and self.manifest["complete"]):
            self.manifest = read_manifest(self.folder) or self.manifest
        if self.in_use is None and self.manifest and self.manifest["validation"]["complete"]:
            self.in_use = shared_lock(self.folder / shard_name("validation", 0))
            self.note_use()

    def note_use(self) -> None:
        """Let the manifest's time be that of the last use, to an hour."""
        if time.monotonic() - self.used_at > NOTED_SECONDS:
            self.used_at = time.monotonic()
            with contextlib.suppress(OSError):  # another user's store
                os.utime(self.folder / "manifest.json")

    @property
    def complete(self) -> bool:
        """Whether all of the source is in the store, as the manifest says."""
        self.refresh()
        return bool(self.manifest) and self.manifest["complete"]

    def is_complete_on_disk(self) -> bool:
        """Whether it is complete and every shard is there in its full size. (Contents are verified when a shard is
        first opened.)"""
        return self.complete and find_damaged_shard(self.folder, self.manifest) is None

    @property
    def train_blocks(self) -> int | None:
        """The number of training blocks; None until all are there."""
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

    def counts(self) -> dict[str, int | None]:
        """Documents and blocks of both splits; None where they are not all there yet."""
        return {
            "train_documents": self.documents["train"] if self.complete else None,
            "validation_documents": self.documents["validation"],
            "train_blocks": self.train_blocks,
            "validation_blocks": len(self.validation),
        }

    def wait(self, there: Callable[[], bool], what: str, check: Check) -> None:
        """Until `there()`, looking at the files anew every POLL_SECONDS."""
        self.refresh()
        while not there():
            check(what)
            time.sleep(POLL_SECONDS)
            self.refresh()

    def wait_for_tokenizer(self, check: Check) -> Path:
        """Until the tokenizer is there; gives its folder."""
        self.wait(self.find, "the tokenizer", check)
        return self.tokenizer.folder

    def wait_for_validation(self, check: Check) -> None:
        self.wait(lambda: self.manifest and self.manifest["validation"]["complete"], "the validation blocks", check)

    def wait_for_first_step(self, check: Check, say: Callable[[str], None]) -> None:
        """Until the plan can be made and the first step be taken: the validation blocks and those of a batch are
        there, or all blocks, where the number of steps depends on how many there are."""
        self.wait_for_validation(check)
        if self.recipe.total_steps() is None:
            say("The number of steps depends on the number of blocks: reading all of the data first.")
            self.wait_complete(check)
        self.wait_for_rows(self.recipe.effective_batch_size, check)

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


def find_damaged_shard(folder: Path, manifest: dict) -> tuple[str, int] | None:
    """(split, index) of the first listed shard that is missing or not of its full size; None if there is none."""
    for split in SPLITS:
        for index, shard in enumerate(manifest[split]["shards"]):
            file = folder / shard_name(split, index)
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                return split, index
    return None
