"""What is kept of a run elsewhere, from which the same command goes on: a folder in the form of the run's own.

complete.json               its step, sizes and SHA-256 of the files below; written last
recipe.yaml  plan.json      as in the run's folder
metrics.jsonl  samples.md   up to the step
checkpoints/step-00000500/  the checkpoint, with its own complete.json
"""

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from clm_owt.files import replacing_folder
from clm_owt.state import TrainState
from clm_owt.tracking.run_log import cut_back_metrics, cut_back_samples
from clm_owt.training.checkpoint import MARKER, NAME, checkpoints, find_corruption, fingerprint

RUN_FILES = ("recipe.yaml", "plan.json", "metrics.jsonl", "samples.md")
# What a listing from elsewhere may name: nothing that would lead out of a folder.
NAMES = re.compile(rf"({'|'.join(map(re.escape, RUN_FILES))}|checkpoints/{NAME.pattern}/[a-z_]+\.[a-z]+)", re.ASCII)


@dataclass(frozen=True)
class Listing:
    """What a bundle's complete.json says."""

    step: int
    files: dict[str, dict[str, object]]  # by path, {"bytes": ..., "sha256": ...}

    @classmethod
    def read(cls, content: bytes) -> "Listing":
        """Raises ValueError for what is none."""
        try:
            found = json.loads(content)
            listing = cls(int(found["step"]), dict(found["files"]))
        except (KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{MARKER} lacks step or files") from error
        for name, entry in listing.files.items():
            if not (NAMES.fullmatch(name) and isinstance(entry, dict) and isinstance(entry.get("bytes"), int)):
                raise ValueError(f"{MARKER} lists {name!r}: {entry!r}")
        return listing

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry["bytes"] for entry in self.files.values())


def stage(run: Path, checkpoint: Path, folder: Path) -> None:
    """Lay out in `folder` what is kept of `run` with its whole `checkpoint`. The checkpoint's files are linked, not
    copied, so that they stay when it is pruned."""
    state = TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    with replacing_folder(folder) as aside:
        inside = aside / "checkpoints" / checkpoint.name
        inside.mkdir(parents=True)
        for file in checkpoint.iterdir():
            link_or_copy(file, inside / file.name)
        for name in RUN_FILES:
            if (run / name).exists():
                shutil.copyfile(run / name, aside / name)
        cut_back_metrics(aside / "metrics.jsonl", state)
        cut_back_samples(aside / "samples.md", state)
        listed = json.loads((inside / MARKER).read_text(encoding="utf-8"))["files"]
        known = {inside / name: entry for name, entry in listed.items()}  # gigabytes need not be hashed again
        paths = sorted(path for path in aside.rglob("*") if path.is_file())
        files = {path.relative_to(aside).as_posix(): known.get(path) or fingerprint(path) for path in paths}
        (aside / MARKER).write_text(json.dumps({"step": state.step, "files": files}, indent=2), encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def find_damage(bundle: Path) -> str | None:
    """What is wrong with a bundle, or None if it is complete and unaltered."""
    try:
        Listing.read((bundle / MARKER).read_bytes())
    except (OSError, ValueError) as error:
        return f"{MARKER} is missing or unreadable ({error})"
    if not any((checkpoint / MARKER).is_file() for checkpoint in checkpoints(bundle / "checkpoints")):
        return "it holds no checkpoint"
    return find_corruption(bundle)


def install(bundle: Path, run: Path) -> None:
    """Move a whole bundle, which lies on the same disk, into the run's folder, the checkpoint last: what there is at
    any moment is a run that goes on from where it was, or from there."""
    for name in RUN_FILES:
        if (bundle / name).exists():
            (bundle / name).replace(run / name)
    (checkpoint,) = (bundle / "checkpoints").iterdir()
    target = run / "checkpoints" / checkpoint.name
    target.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # a damaged one of that step
        shutil.rmtree(target)
    checkpoint.rename(target)
    shutil.rmtree(bundle)
