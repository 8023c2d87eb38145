"""Checkpoints: everything a run's future depends on, written aside, marked complete, renamed; then older ones pruned.

    checkpoints/step-00000500/
      model.safetensors       parameters, by name (the tied head once)
      optimizer.safetensors   the optimizer's state, as `<parameter>/<moment>`
      random_states.json      the random states of every process, by rank
      state.json              the TrainState
      complete.json           sizes and SHA-256 of the files above, written last

Nothing is pickled. A folder without a marker that fits its files is no checkpoint.
"""

import hashlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from clm_owt.console import print_lines
from clm_owt.errors import InputError
from clm_owt.files import PARTIAL, flush_to_disk
from clm_owt.model.fp8 import transpose_linear_weights
from clm_owt.state import TrainState
from clm_owt.training.processes import Processes, full_tensor

MARKER = "complete.json"

LEAVING = ".old" + PARTIAL

# The names that this program gives below `checkpoints/`. What has another name is the user's.
NAME = re.compile(r"step-(\d{8,})", re.ASCII)
LEFTOVER = re.compile(rf"{NAME.pattern}({re.escape(PARTIAL)}|{re.escape(LEAVING)})", re.ASCII)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's contents in host memory, on the main process."""

    state: dict[str, object]
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    random_states: list[object]


def take_snapshot(
    state: TrainState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> Snapshot | None:
    """Copy a run's state to host memory. Collective: every process calls it; all but the main one get None."""
    is_main = processes.is_main
    parameters = dict(model.named_parameters())
    moments = {
        f"{name}/{moment}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }
    snapshot = Snapshot(
        asdict(state),
        transpose_linear_weights(model, copy_to_host(parameters, keep=is_main)),
        transpose_linear_weights(model, copy_to_host(moments, keep=is_main)),
        processes.gather(random_state()),
    )
    return snapshot if is_main else None


def copy_to_host(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Copies of tensors on the CPU; sharded ones are gathered, which every process takes part in."""
    copies = {}
    for name, tensor in tensors.items():
        complete = full_tensor(tensor.detach())
        if keep:
            copies[name] = complete.to("cpu", copy=True)
    return copies


def restore(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> TrainState:
    """Load a checkpoint into a fresh model and optimizer, and set this process's random states."""
    parameters = dict(model.named_parameters())
    weights = transpose_linear_weights(model, load_file(folder / "model.safetensors"))
    if weights.keys() != parameters.keys():
        different = sorted(weights.keys() ^ parameters.keys())[0]
        raise InputError(f"{folder}: its model differs from the recipe's, at {different}; use another output_dir")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(placed_like(weights[name], parameter))
    for name, value in transpose_linear_weights(model, load_file(folder / "optimizer.safetensors")).items():
        parameter_name, moment = name.rsplit("/", 1)
        parameter = parameters[parameter_name]
        # The step count is a scalar; it lies beside the moments as the fused kernel wants it.
        placed = placed_like(value, parameter) if value.dim() else value.to(parameter.device)
        optimizer.state[parameter][moment] = placed
    random_states = json.loads((folder / "random_states.json").read_text())
    if processes.rank < len(random_states):
        set_random_state(random_states[processes.rank])
    return TrainState(**json.loads((folder / "state.json").read_text()))


def placed_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def random_state() -> dict[str, list]:
    """The states of all random number generators of this process, as JSON knows them."""
    version, numbers, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, words.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state().tolist() if torch.backends.mps.is_available() else [],
    }


def set_random_state(saved: dict[str, list]) -> None:
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(saved["numpy"]))
    torch.set_rng_state(torch.tensor(saved["torch"], dtype=torch.uint8))
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(saved["cuda"], dtype=torch.uint8))
    if saved["mps"] and torch.backends.mps.is_available():
        torch.mps.set_rng_state(torch.tensor(saved["mps"], dtype=torch.uint8))


class CheckpointWriter:
    """Writes snapshots in the background, one at a time, on the main process.

    A write that fails is reported at once, leaves older checkpoints as they were, and is counted; what follows from it
    is the caller's to decide.
    """

    def __init__(
        self,
        folder: Path,
        total_limit: int,
        on_written: Sequence[Callable[[Path], None]] = (),
        say: Callable[[str], None] = print_lines,
    ):
        self.folder = folder
        self.total_limit = total_limit
        self.saved_step: int | None = None  # the last that was written completely
        self.failed_in_a_row = 0
        self._on_written = on_written  # are called in the background, before the checkpoint can be pruned
        self._say = say
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def write(self, snapshot: Snapshot | None) -> None:
        """Start writing, if there is a snapshot; waits for the write before."""
        self.wait()
        if snapshot is not None:
            self._pending = self._executor.submit(self._write, snapshot)

    def wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.state["step"]
        try:
            path = write_snapshot(snapshot, self.folder)
        except Exception as error:  # OSError, or safetensors' own kind
            self.failed_in_a_row += 1
            self._say(f"Step {step:,} could not be saved ({error}); the checkpoints before it are as they were")
            return
        self.saved_step, self.failed_in_a_row = step, 0
        for call in self._on_written:
            call(path)
        self.prune()

    def prune(self) -> None:
        """Remove what is not to be kept, and what unfinished saves have left."""
        try:
            prune(self.folder, self.total_limit)
        except OSError as error:
            self._say(f"Older checkpoints could not be removed ({error})")


def write_snapshot(snapshot: Snapshot, folder: Path) -> Path:
    """Write one checkpoint below `folder`; it has its name only once it is complete and on disk."""
    final = folder / f"step-{snapshot.state['step']:08d}"
    aside = final.with_name(final.name + PARTIAL)
    folder.mkdir(exist_ok=True)  # not its parents: a run's folder that is gone was on a disk that is gone
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        save_file(snapshot.model, aside / "model.safetensors")
        save_file(snapshot.optimizer, aside / "optimizer.safetensors")
        (aside / "random_states.json").write_text(json.dumps(snapshot.random_states))
        (aside / "state.json").write_text(json.dumps(snapshot.state, indent=2))
        listing = {file.name: fingerprint(file) for file in sorted(aside.iterdir())}
        for name in listing:
            flush_to_disk(aside / name)
        (aside / MARKER).write_text(json.dumps({"files": listing}, indent=2))
        flush_to_disk(aside / MARKER)
        flush_to_disk(aside)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)  # makes room on a full disk
        raise
    if final.exists():  # the same step, from before a resumption further back
        remove(final)
    aside.rename(final)
    flush_to_disk(folder)
    return final


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, which has lost its name before its first file goes."""
    leaving = checkpoint.with_name(checkpoint.name + LEAVING)
    shutil.rmtree(leaving, ignore_errors=True)
    checkpoint.rename(leaving)
    shutil.rmtree(leaving)


def fingerprint(file: Path) -> dict[str, object]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def prune(folder: Path, total_limit: int) -> None:
    """Remove all checkpoints but the newest `total_limit` and the best besides, and what unfinished saves have left.

    For the one that writes them, after a write: nothing that ends in PARTIAL is in use then.
    """
    everything = checkpoints(folder)
    best = min(everything, key=validation, default=None)
    for old in everything[total_limit:]:
        if old != best:
            remove(old)
    for leftover in folders_named(folder, LEFTOVER):
        shutil.rmtree(leftover)


def validation(checkpoint: Path) -> tuple[float, int]:
    """The last validation loss at or before a checkpoint (infinite where there is none), and how many steps before."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        loss, age = state["validation_loss"], state["step"] - state["validated_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf, 0
    return (math.inf, 0) if loss is None or math.isnan(loss) else (loss, age)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, newest first, complete or not."""
    return sorted(folders_named(folder, NAME), key=step_named, reverse=True)


def step_named(checkpoint: Path) -> int:
    """The step in the name of one of `checkpoints`."""
    return int(NAME.fullmatch(checkpoint.name)[1])


def folders_named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The folders directly below `folder` whose whole name matches."""
    return [path for path in folder.glob("step-*") if pattern.fullmatch(path.name) and path.is_dir()]


def set_aside_newer(folder: Path, checkpoint: Path) -> None:
    """Take their names from the checkpoints below `folder` that are newer than the one a run continues from: they are
    damaged, or of a course that is left. They stay until the next save is complete."""
    step = json.loads((checkpoint / "state.json").read_text())["step"]  # its name may be a user's
    for newer in checkpoints(folder):
        if step_named(newer) > step:
            aside = newer.with_name(newer.name + PARTIAL)
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)


def find_corruption(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is complete and unaltered."""
    try:
        listing = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MARKER} is missing or unreadable"
    if not (isinstance(listing, dict) and listing and all(isinstance(entry, dict) for entry in listing.values())):
        return f"{MARKER} lists no files"
    for name, expected in listing.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            found = fingerprint(file)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found["bytes"] != expected.get("bytes"):
            return f"{name} has {found['bytes']} bytes instead of {expected.get('bytes')}"
        if found != expected:
            return f"{name} is altered (its SHA-256 differs)"
    return None


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest usable checkpoint below `folder` (None if there is none at all), and why newer ones were passed over.

    Raises InputError where there are checkpoints and none is usable: that is no reason to start anew.
    """
    passed_over = []
    for checkpoint in checkpoints(folder):
        reason = find_corruption(checkpoint)
        if reason is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint}: {reason}")
    if passed_over:
        raise InputError(
            "resume_from_checkpoint: no complete checkpoint:\n"
            + "\n".join(f"  {line}" for line in passed_over)
            + f"\nremove {folder} to start anew, or give another output_dir"
        )
    return None, []
