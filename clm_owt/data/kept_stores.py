"""The token stores that a `data_cache_dir` keeps: what is in them, who uses them, and removing those that nobody does.

A process that reads a store holds a lock on its first shard, one that builds a store or encodes parts of it locks on
files of their own (`store_lock`); the kernel releases them all when their holder dies.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clm_owt.data.packing import source_name
from clm_owt.data.parts import IN_USE, PARTS_SUFFIX
from clm_owt.data.store_lock import exclusive_lock
from clm_owt.data.token_store import read_manifest, shard_name
from clm_owt.errors import InputError

REMOVED = ".removed"  # what a folder that is being removed is called


@dataclass(frozen=True)
class KeptStore:
    """A folder of `cache`/stores: a token store, or parts that wait for `--merge`. size: bytes; last_used: seconds
    since the epoch, when it was last read or written."""

    folder: Path
    manifest: dict | None  # None: parts, or a store whose manifest is damaged
    size: int
    last_used: float

    @property
    def complete(self) -> bool:
        return bool(self.manifest) and self.manifest["complete"]

    @contextlib.contextmanager
    def claimed(self) -> Iterator[bool]:
        """Whether no process uses it; for the length of the block none can begin to read it."""
        files = [self.folder / shard_name("validation", 0), self.folder / IN_USE]
        if not self.complete:  # which store a builder builds is not known before its tokenizer is: it may be this one
            files += (self.folder.parents[1] / "locks").glob("*.lock")
        with contextlib.ExitStack() as stack:
            yield all(stack.enter_context(exclusive_lock(file)) for file in files)

    def in_use(self) -> bool:
        with self.claimed() as free:
            return not free

    def remove(self) -> bool:
        """Remove it unless it is in use; whether it was. At no moment is there half a store of that name. Raises
        OSError for one that is another user's."""
        with self.claimed() as free:
            if free:
                aside = self.folder.with_name(self.folder.name + REMOVED)
                self.folder.rename(aside)
                shutil.rmtree(aside)
        return free

    def describe(self) -> str:
        """What it holds."""
        if self.manifest is None:
            parts = len(list(self.folder.glob("*.arrow")))
            return (
                f"{parts} parts for --merge" if self.folder.name.endswith(PARTS_SUFFIX) else "a damaged manifest.json"
            )
        documents, splits = self.manifest["documents"], (self.manifest["train"], self.manifest["validation"])
        train, validation = (sum(shard["rows"] for shard in split["shards"]) for split in splits)
        return (
            f"{source_name(self.manifest['source'])}: {documents['train']:,} + {documents['validation']:,} documents, "
            f"{train:,} + {validation:,} blocks of {self.manifest['block_size']}, vocabulary "
            f"{self.manifest['tokenizer']['vocab_size']:,}" + ("" if self.complete else "; not complete")
        )


def kept_stores(cache: Path) -> list[KeptStore]:
    """The stores and parts in `cache`, the last used first. What an interrupted removal has left is removed."""
    found = []
    for folder in (cache / "stores").glob("*"):
        if folder.name.endswith(REMOVED):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        if not folder.name.endswith(PARTS_SUFFIX) and not (folder / "manifest.json").is_file():
            continue  # not begun, or a download
        manifest = None
        with contextlib.suppress(InputError):
            manifest = read_manifest(folder)
        stats = [file.stat() for file in folder.iterdir() if file.is_file()]
        last_used = max((stat.st_mtime for stat in stats), default=0.0)
        found.append(KeptStore(folder, manifest, sum(stat.st_size for stat in stats), last_used))
    return sorted(found, key=lambda store: store.last_used, reverse=True)


def prune(cache: Path, days: float) -> Iterator[tuple[KeptStore, str]]:
    """Remove the stores and parts that were not used for `days` days; gives each with what became of it: `removed`,
    `in use`, or `kept`, with the reason where it could not be removed."""
    for store in kept_stores(cache):
        if time.time() - store.last_used < days * 86_400:
            yield store, "in use" if store.in_use() else "kept"
            continue
        try:
            yield store, "removed" if store.remove() else "in use"
        except OSError as error:  # another user's
            yield store, f"kept ({error.strerror})"
