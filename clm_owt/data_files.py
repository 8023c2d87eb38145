"""Which files of this machine an entry of `data_files` names: a path, a folder, or a glob."""

import glob
import os
from pathlib import Path

# How the files of a format are named that a folder stands for; each may also be compressed.
ENDINGS = {
    "text": (".txt",),
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}
COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst", ".lz4")


def matching_files(pattern: str, file_format: str) -> list[str]:
    """The paths of the files that `pattern` names, sorted; none where it names none.

    A file of that very name is meant before a glob is, whatever characters are in it. A folder stands for the files in
    it and in its subfolders that are named as `file_format`'s are, hidden ones left out. Raises OSError for a path
    that cannot be looked at, and RuntimeError for a `~user` who is unknown.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        os.scandir(path).close()  # glob passes over a folder that cannot be read
        names = tuple(ending + compressed for ending in ENDINGS[file_format] for compressed in COMPRESSED)
        found = [name for name in glob.glob(f"{glob.escape(str(path))}/**/*", recursive=True) if name.endswith(names)]
    else:
        found = glob.glob(str(path), recursive=True)
    return sorted(name for name in found if Path(name).is_file())


def no_match(key: str, pattern: str, file_format: str) -> str:
    """What to say of the recipe's `key` where `matching_files` finds none."""
    if Path(pattern).expanduser().is_dir():
        endings = ", ".join(ENDINGS[file_format])
        return (
            f"{key}: the folder {pattern!r} holds no {file_format} files (named {endings}, compressed or not); for "
            f"others give a glob, such as {str(Path(pattern) / '**/*.md')!r}"
        )
    return f"{key}: {pattern!r} matches no file here ({Path.cwd()}); give existing paths, folders, globs or URLs"
