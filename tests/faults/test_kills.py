"""Runs that are killed, and continued by the same command."""

import itertools
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from support.bench import SAVE_STEPS, STEPS, campaign, last_step
from support.disturbances import PROCESS_GROUP_TIMEOUT, HandedIn, at_step, before_file_operation, kill_myself

from clm_owt.training.checkpoint import checkpoints

pytestmark = pytest.mark.xdist_group("faults")


@pytest.mark.parametrize("number", campaign(range(20), short=2))
def test_a_run_killed_at_a_random_instant_continues(bench, tmp_path, draw, record_fault, number):
    """SIGKILL at a random instant, continued"""
    for attempt in itertools.count():  # a run that had ended was not killed: another instant
        home, instant = tmp_path / str(attempt), bench.instant(draw)
        job = bench.start(home)
        job.wait_for_cpu(instant)
        job.kill()
        if job.status == -signal.SIGKILL:
            break
    reached, saved = last_step(job), checkpoints(bench.checkpoints_of(home))
    bench.finish(home)
    saved = saved[0].name if saved else "no checkpoint yet"
    record_fault(f"after {instant:.2f} s of CPU time, {reached}, {saved}")


@pytest.mark.parametrize(
    "steps", campaign([(14, 33), (7, 8, 9), (14, 33, 52), (3, 31, 58), (29, 30, 31, 32)], short=1)
)
def test_a_run_killed_in_several_sessions_in_a_row_continues(bench, home, record_fault, steps):
    """SIGKILL of each of several sessions in a row, one after the epoch boundary"""
    for step in steps:
        bench.interrupt(home, partial(at_step, step, kill_myself))
    text = bench.finish(home)
    assert "Continuing after step" in text or steps[-1] <= SAVE_STEPS
    for step in steps:
        record_fault(f"in step {step}")


VICTIMS = [((0,), (1,), (0, 1))[i % 3] for i in range(20)]


@pytest.mark.parametrize("victims", campaign(VICTIMS, short=1))
def test_where_one_of_two_processes_is_killed_both_end_and_the_run_continues(
    bench, tmp_path, draw, record_fault, victims
):
    """SIGKILL of one of 2 processes, or both"""
    for attempt in itertools.count():
        home, instant = tmp_path / str(attempt), bench.instant(draw, 1.0, victims[0], 2)
        jobs = bench.start_several(home, 2)
        jobs[victims[0]].wait_for_cpu(instant)
        for victim in victims:
            jobs[victim].kill()
        if any(jobs[victim].status == -signal.SIGKILL for victim in victims):
            break
        for job in jobs:
            job.wait()
    began = time.monotonic()
    for job in jobs:
        assert job.wait(PROCESS_GROUP_TIMEOUT + 40) is not None, f"the survivor hangs\n{job.text}"
    took = time.monotonic() - began
    reached = last_step(jobs[0])
    bench.finish(home, 2)
    who = " and ".join(map(str, victims))
    record_fault(f"rank {who} after {instant:.2f} s, {reached}; all had ended {took:.1f} s later")


# The fourth save is the first that prunes; after the last one no other tidies up.
PRUNING_SAVE, LAST_SAVE = 4 * SAVE_STEPS, STEPS
ONE_OPERATION, ALL_OPERATIONS = [22], range(1, 1000)


@pytest.mark.parametrize(
    ("save", "numbers"),
    [
        (LAST_SAVE, ONE_OPERATION),
        pytest.param(PRUNING_SAVE, ALL_OPERATIONS, marks=pytest.mark.faults),
        pytest.param(LAST_SAVE, ALL_OPERATIONS, marks=pytest.mark.faults),
    ],
)
def test_a_save_that_a_kill_cuts_short_costs_no_checkpoint(bench, tmp_path, record_fault, save, numbers):
    """SIGKILL between any two file operations of a save"""
    for number in numbers:
        home = tmp_path / str(number)
        begins, ends = (f"step-{step:08d}.partial" for step in (save, save + SAVE_STEPS))
        job = bench.start(home, partial(before_file_operation, number, begins, ends, kill_myself))
        if job.wait() == 0 and number > 20:
            break  # there is no such operation any more
        assert job.status == -signal.SIGKILL, job.text
        left = sorted(path.name for path in bench.checkpoints_of(home).iterdir())
        bench.finish(home)
        record_fault(f"save of step {save}, before operation {number}, leaving {', '.join(left)}")


def in_last_drawing(handed_in: HandedIn) -> None:
    """The process is killed when the last picture of its curves is written, and not yet renamed."""

    def watch(event: str, arguments: tuple) -> None:
        if event == "os.rename" and "training_curves" in str(arguments[0]) and Path("runs/small/model").exists():
            kill_myself()

    sys.addaudithook(watch)


def test_a_run_killed_after_the_export_is_finished_by_the_same_command(bench, home, record_fault):
    """SIGKILL between the export and the end of the run"""
    bench.interrupt(home, in_last_drawing)
    (bench.run_of(home) / "run_state.json.4711.partial").touch()  # as of a process killed while it wrote its state
    assert "Continuing after step 60" in bench.finish(home)
    record_fault("in the last drawing of the curves: exported again")


@pytest.mark.parametrize("number", campaign(range(8), short=0))
def test_a_token_store_whose_building_was_killed_is_the_same_bytes(bench, home, draw, record_fault, number):
    """SIGKILL while the token store is built"""
    cache = home / "cache"
    options = ["--data_cache_dir", str(cache)]
    job = bench.start(home, options=options)
    delay = draw.uniform(0.0, 12.0)
    if number % 2:
        while job.poll() is None and not list(cache.rglob("*.lock")):
            time.sleep(0.002)
        delay = draw.uniform(0.0, 1.0)
    job.wait(delay)
    job.kill()
    found = sorted({path.name for path in cache.rglob("*") if path.is_file()})
    bench.finish(home, options=options)
    stores = [
        sorted((path.name, path.read_bytes()) for path in (folder / "stores").rglob("*.arrow"))
        for folder in (cache, bench.cache)
    ]
    assert stores[0] == stores[1] != []
    record_fault(f"with {', '.join(found) or 'nothing'} in the cache")
