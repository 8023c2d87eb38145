"""What a run writes, and whether the disks have room for it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from clm_owt.formatting import format_bytes
from clm_owt.recipe import Recipe
from clm_owt.schedule import times_due


@dataclass(frozen=True)
class Disk:
    """A folder of the run: bytes free on its file system, bytes of this run that are in it already."""

    folder: str
    free: int
    present: int
    file_system: int


def block_bytes(recipe: Recipe, vocab_size: int) -> int:
    """Of a block in the token store: two bytes a token, four above 65,536 ids."""
    return recipe.block_size * (2 if vocab_size <= 65_536 else 4)


def run_folder_bytes(recipe: Recipe, parameters: int, checkpoint_bytes: int, total_steps: int) -> int:
    """At its largest: the checkpoints, of which there is one more than is kept while the newest is being written, and
    one while an older one is on its way to each place elsewhere; the exported model, about 450 bytes of metrics a row
    and 5 a sampled token."""
    rows = times_due(total_steps, recipe.logging_steps, False) + times_due(total_steps, recipe.eval_steps, True)
    rounds = times_due(total_steps, recipe.sample_steps, True) if recipe.sample_steps else 0
    most = recipe.save_total_limit + 1 + recipe.places_elsewhere
    checkpoints = min(most, times_due(total_steps, recipe.save_steps, False))
    samples = rounds * len(recipe.sample_prompts) * recipe.sample_max_new_tokens * 5
    return checkpoint_bytes * checkpoints + 4 * parameters + 450 * rows + samples


def find_disks(data_folder: Path, output_folder: Path) -> tuple[Disk, Disk]:
    """Of the token store and of the run's folder."""
    return find_disk(data_folder), find_disk(output_folder)


def find_disk(folder: Path) -> Disk:
    """Of a folder that may not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    present = sum(os.path.getsize(file) for file in folder.rglob("*") if file.is_file())
    return Disk(str(folder), shutil.disk_usage(existing).free, present, existing.stat().st_dev)


def disk_problems(needs: list[tuple[Disk | None, int | None, str]]) -> list[str]:
    """What does not fit, of (disk, bytes in the end, key of the folder); folders of one file system share it."""
    known = [(disk, max(0, size - disk.present), key) for disk, size, key in needs if disk and size is not None]
    problems = []
    for file_system in dict.fromkeys(disk.file_system for disk, _, _ in known):
        here = [need for need in known if need[0].file_system == file_system]
        needed, free = sum(size for _, size, _ in here), min(disk.free for disk, _, _ in here)
        if needed > free:
            parts = " and ".join(f"{format_bytes(size)} in {disk.folder} ({key})" for disk, size, key in here)
            keys = " or ".join(key for _, _, key in here)
            problems.append(
                f"{keys}: the run needs another {parts}, and {format_bytes(free)} are free there; "
                f"free some, point {keys} to a larger disk, or lower save_total_limit"
            )
    return problems
