"""Checkpoints that are damaged between two sessions."""

import shutil
from functools import partial
from random import Random

import pytest
from support.bench import campaign
from support.disturbances import at_step, kill_myself

from clm_owt.training.checkpoint import MARKER, checkpoints

pytestmark = pytest.mark.xdist_group("faults")

NAMES = ("optimizer.safetensors", "model.safetensors", "random_states.json", "state.json", MARKER)


def flip_a_bit(content: bytearray, draw: Random) -> None:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def overwrite(content: bytearray, draw: Random) -> None:
    """Up to a page, each byte with another."""
    start = draw.randrange(len(content))
    for i in range(start, min(start + draw.randrange(1, 4096), len(content))):
        content[i] ^= draw.randrange(1, 256)


def truncate(content: bytearray, draw: Random) -> None:
    del content[draw.randrange(1, len(content)) :]


def extend(content: bytearray, draw: Random) -> None:
    content += draw.randbytes(draw.randrange(1, 4096))


def empty(content: bytearray, draw: Random) -> None:
    content.clear()


AT_RANDOM = {
    "flipped in one bit": flip_a_bit,
    "overwritten": overwrite,
    "truncated": truncate,
    "extended": extend,
}
DAMAGES = AT_RANDOM | {"emptied": empty, "removed": None}
CASES = [(name, damage) for damages in (DAMAGES, AT_RANDOM, AT_RANDOM) for name in NAMES for damage in damages]


@pytest.fixture(scope="module")
def interrupted(_bench, tmp_path_factory):
    """A run that was killed in step 38."""
    home = tmp_path_factory.mktemp("interrupted") / "home"
    _bench.interrupt(home, partial(at_step, 38, kill_myself))
    return home


@pytest.mark.parametrize("case", campaign(CASES, short=1))
def test_a_run_continues_from_the_checkpoint_before_a_damaged_one(bench, interrupted, home, draw, record_fault, case):
    """A file of the newest checkpoint flipped in one bit, overwritten, truncated, extended, emptied, removed"""
    name, damage = case
    shutil.copytree(interrupted, home)
    newest = checkpoints(bench.checkpoints_of(home))[0]
    assert newest.name == "step-00000035"
    file, content = newest / name, bytearray((newest / name).read_bytes())
    if change := DAMAGES[damage]:
        change(content, draw)
        file.write_bytes(content)
    else:
        file.unlink()
    text = bench.finish(home)
    (said,) = (line for line in text.splitlines() if line.startswith("Passed over"))
    assert said.startswith(f"Passed over runs/small/checkpoints/{newest.name}: ")
    assert "Continuing after step 30" in text
    record_fault(f"{name} {damage}: {said}")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(bench, interrupted, home, record_fault):
    """A file of every checkpoint removed"""
    shutil.copytree(interrupted, home)
    for checkpoint in checkpoints(bench.checkpoints_of(home)):
        (checkpoint / "state.json").unlink()
    job = bench.start(home)
    assert job.wait() == 2, job.text
    assert "no complete checkpoint" in job.text and "Traceback" not in job.text
    record_fault("all of them: refused")
