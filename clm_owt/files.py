"""Files and folders that are there complete or not at all: written aside, flushed to disk, renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"


@contextlib.contextmanager
def replacing(path: Path, suffix: str = PARTIAL, flush: bool = True) -> Iterator[Path]:
    """A path beside `path` to write a file to: at the end of the block it is flushed to disk and becomes `path` in one
    step, a file of that name being replaced. After an error nothing is left of it. `suffix` is added to the name; take
    another where several processes may write the same file. Without `flush` a power cut may lose the content, for a
    file that is renewed every few seconds."""
    aside = path.with_name(path.name + suffix)
    try:
        yield aside
        if flush:
            flush_to_disk(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: a path beside `path` where the block makes one. The folder that had the name is removed
    between the last file and the renaming; what an earlier process has left aside, before the block."""
    aside = path.with_name(path.name + PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    yield aside
    for file in filter(Path.is_file, aside.rglob("*")):
        flush_to_disk(file)
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)
    flush_to_disk(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed had written aside in `folder`, where no other writes now."""
    for path in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, replaced in one step."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder (so that its entries survive a power cut)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
