"""A full disk, on which also the standard output of the run is. Needs the right to mount a tmpfs."""

import contextlib
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from support.disturbances import HandedIn, at_step, fill, kill_myself, make_room

from clm_owt.training.checkpoint import checkpoints

pytestmark = pytest.mark.xdist_group("faults")


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "8m"):
    """A disk of its own at `folder`; the test is left out where this user may not mount one."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(mounted.stderr.decode().strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(home):
    """The home of a run, of 8 MB."""
    with small_disk(home):
        yield home


def test_a_disk_that_is_full_for_a_while_loses_no_line(bench, disk, record_fault):
    """A full disk during saves and logging, for a while"""
    job = bench.start(disk, partial(at_step, 12, partial(fill, disk)), partial(at_step, 23, partial(make_room, disk)))
    assert job.wait() == 0, job.text
    bench.compare(disk, bench.reference)
    record_fault("full from step 12 to 22: 2 saves failed and no line is lost")


def test_a_disk_that_stays_full_ends_the_run_which_continues_with_room(bench, disk, record_fault):
    """A full disk during saves and logging, for good"""
    job = bench.start(disk, partial(at_step, 12, partial(fill, disk)))
    assert job.wait() == 1, job.text
    saved = checkpoints(bench.checkpoints_of(disk))
    assert [path.name for path in saved] == ["step-00000010", "step-00000005"]
    make_room(disk)
    bench.finish(disk)
    record_fault("full from step 12 on: ended with an error after 3 failed saves, step 10 complete, continued")


@pytest.mark.faults
def test_a_disk_that_is_full_at_the_end_is_an_error(bench, disk, record_fault):
    """A full disk at the end of the run"""
    job = bench.start(disk, partial(at_step, 58, partial(fill, disk)))
    assert job.wait() == 1, job.text
    make_room(disk)
    bench.finish(disk)
    record_fault("full at the end: ended with an error, continued")


@pytest.mark.faults
def test_a_run_told_to_stop_on_a_full_disk_continues_from_its_last_save(bench, disk, record_fault):
    """A full disk when told to stop"""
    stop = partial(kill_myself, signal.SIGTERM)
    job = bench.start(disk, partial(at_step, 12, partial(fill, disk)), partial(at_step, 17, stop))
    assert job.wait() == 143, job.text
    make_room(disk)
    bench.finish(disk)
    record_fault("full and told to stop: continued from the last save")


def fill_at_export(disk: Path, handed_in: HandedIn) -> None:
    class Disturbed(handed_in.trainer_class):
        def export(self):
            fill(disk)
            super().export()

    handed_in.trainer_class = Disturbed


@pytest.mark.faults
def test_a_disk_that_is_full_at_the_export_is_an_error_and_then_refused(bench, disk, record_fault):
    """A full disk during the export, and still when continued"""
    job = bench.start(disk, partial(fill_at_export, disk))
    assert job.wait() == 1 and "Traceback" not in job.text, job.text
    job = bench.start(disk)
    assert job.wait() == 2 and "are free there" in job.text, job.text
    make_room(disk)
    bench.finish(disk)
    record_fault("full during the export, and still when continued: ended with an error, refused, continued")


@pytest.mark.faults
def test_a_disk_that_is_full_while_data_is_built_is_an_error(bench, home, tmp_path, record_fault):
    """A full disk during data building"""
    with small_disk(tmp_path / "disk", "16k") as disk:
        options = ["--data_cache_dir", str(disk / "cache")]
        job = bench.start(home, options=options)
        assert job.wait() == 1, job.text
        assert "No space left" in job.text and "Traceback" not in job.text, job.text
        said = job.text.strip().splitlines()[-1].replace(str(tmp_path), "")
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        bench.finish(home, options=options)
        record_fault(f"full during data building: {said}")
