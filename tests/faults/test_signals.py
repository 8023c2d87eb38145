"""Runs that are told to stop, wherever they are; each ends as it says, and continues there."""

import itertools
import re
import signal
import time
from functools import partial

import psutil
import pytest
from support.bench import BLOCKS_PER_STEP, assert_continued, campaign, what_was_said
from support.disturbances import HandedIn, at_step, kill_myself, slow_hashing
from support.runs import ON_CPU, environment, on_processes, started
from support.warm_start import Job

from clm_owt.run_state import RunState
from clm_owt.training.checkpoint import checkpoints, find_corruption

pytestmark = pytest.mark.xdist_group("faults")

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
SIGNALS = list(STATUS)


@pytest.mark.parametrize("signum", campaign(SIGNALS * 10, short=3))
def test_a_run_told_to_stop_at_a_random_instant_continues(bench, tmp_path, draw, record_fault, signum):
    """SIGTERM, SIGINT, SIGUSR1 at a random instant, continued"""
    for attempt in itertools.count():
        home, instant = tmp_path / str(attempt), bench.instant(draw, 0.9)
        job = bench.start(home)
        job.wait_for_cpu(instant)
        job.wait_for_handlers()
        began = time.monotonic()
        job.send(signum)
        job.wait(60)
        took = time.monotonic() - began
        if "Finished" not in job.text:  # a signal after the run's last word is none to the run
            break
    assert job.status == STATUS[signum], f"{signum.name} after {instant:.2f} s: status {job.status}\n{job.text}"
    said = what_was_said(job)
    assert_continued(said, bench.finish(home))
    record_fault(f"{said} ({took:.1f} s)")


def sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.time()))


def test_a_run_whose_time_ends_saves_and_asks_for_another_job(bench, home, record_fault):
    """The end of stop_after, continued"""
    pause = partial(at_step, 10, partial(sleep_until, time.time() + 6.0))
    job = bench.start(home, pause, options=["--stop_after", "5s"])
    assert job.wait(60) == STATUS[signal.SIGUSR1], job.text
    said = what_was_said(job)
    assert said.startswith("Stopped by stop_after 5s after step ")
    state = RunState.read(bench.run_of(home))
    assert (state.state, state.error, state.exit_status) == ("stopped", "stopped by stop_after 5s", 138)
    assert_continued(said, bench.finish(home))
    record_fault(said)


def wait_as_a_launcher(jobs: list[Job]) -> None:
    """Wait for all; once one has failed, tell the others to stop, as torchrun does."""
    while all(job.poll() in (None, 0) for job in jobs) and any(job.poll() is None for job in jobs):
        time.sleep(0.005)
    for job in jobs:
        job.send(signal.SIGTERM)
    for job in jobs:
        assert job.wait(60) is not None, f"it hangs\n{job.text}"


OF_TWO = [(SIGNALS[i % 3], ((1,), (0, 1), (0,))[i // 3 % 3], 0.9 if i % 2 else 0.15) for i in range(9)]


@pytest.mark.parametrize("case", campaign(OF_TWO, short=0))
def test_where_one_of_two_processes_is_told_to_stop_both_do(bench, tmp_path, draw, record_fault, case):
    """A signal to one of 2 processes, or to both, at a random instant, continued"""
    signum, victims, most = case
    for attempt in itertools.count():
        home, instant = tmp_path / str(attempt), bench.instant(draw, most, victims[0], 2)
        jobs = bench.start_several(home, 2)
        jobs[victims[0]].wait_for_cpu(instant)
        for job in jobs:
            job.wait_for_handlers()
        for victim in victims:
            jobs[victim].send(signum)
        wait_as_a_launcher(jobs)
        if "Finished" not in jobs[0].text:
            break
    statuses = {job.status for job in jobs}
    assert STATUS[signum] in statuses and statuses <= {STATUS[signum], 143}, "\n".join(job.text for job in jobs)
    said = what_was_said(*jobs)
    assert_continued(said, bench.finish(home, 2))
    record_fault(f"rank {' and '.join(map(str, victims))}: {said}")


def slow_snapshots(seconds: float, handed_in: HandedIn) -> None:
    class Disturbed(handed_in.trainer_class):
        def write_checkpoint(self):
            time.sleep(seconds)
            super().write_checkpoint()

    handed_in.trainer_class = Disturbed


def slow_saves(seconds: float, handed_in: HandedIn) -> None:
    slow_hashing(seconds / 4)


def test_a_save_that_takes_seconds_outlives_the_launchers_signal(bench, home, record_fault):
    """A signal to both of 2 processes, whose save takes seconds, and another from the launcher"""
    disturbances = [partial(slow_snapshots, 1.2), partial(slow_saves, 2.0)]
    jobs = bench.start_several(home, 2, *disturbances, options=["--save_steps", "1000"])
    jobs[0].wait_for_text("step 14/")
    for job in jobs:
        job.send(signal.SIGUSR1)
    wait_as_a_launcher(jobs)
    said = what_was_said(*jobs)
    assert [job.status for job in jobs] == [138, 138]
    assert_continued(said, bench.finish(home, 2))
    record_fault(said)


# Where a run is for long beside its steps; each sends the signal from the midst of it.


def at_call(number: int, signum: int):
    """A hook of a module, that sends a signal in its `number`-th call."""
    calls = itertools.count(1)

    def hook(*_) -> None:
        if next(calls) == number:
            kill_myself(signum)

    return hook


def in_validation(handed_in: HandedIn) -> None:
    class Disturbed(handed_in.trainer_class):
        def validate(self):
            hook = self.model.register_forward_pre_hook(at_call(2, signal.SIGTERM))
            super().validate()
            hook.remove()

    handed_in.trainer_class = Disturbed


def in_sampling(handed_in: HandedIn) -> None:
    class Disturbed(handed_in.trainer_class):
        def write_samples(self):
            if self.state.step == self.total_steps:
                self.model.register_forward_pre_hook(at_call(3, signal.SIGINT))
            super().write_samples()

    handed_in.trainer_class = Disturbed


def in_restoring(handed_in: HandedIn) -> None:
    class Disturbed(handed_in.trainer_class):
        def restore(self, existing):
            kill_myself(signal.SIGTERM)
            time.sleep(60)

    handed_in.trainer_class = Disturbed


def in_search(handed_in: HandedIn) -> None:
    search = handed_in.search

    def disturbed(model, *arguments, **more):
        model.register_forward_hook(at_call(1, signal.SIGUSR1))
        return search(model, *arguments, **more)

    handed_in.search = disturbed


def in_first_wait_for_data(handed_in: HandedIn) -> None:
    from clm_owt.data.token_store import TokenStore

    TokenStore.wait_for_rows = lambda store, rows, check: (kill_myself(signal.SIGTERM), check("rows"))


def in_later_wait_for_data(handed_in: HandedIn) -> None:
    class Disturbed(handed_in.trainer_class):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            wait_for, self.blocks.wait_for = self.blocks.wait_for, self.wait_for
            self.wait_for_blocks = wait_for

        def wait_for(self, stop):
            self.wait_for_blocks(stop)
            if stop > 20 * BLOCKS_PER_STEP:
                kill_myself(signal.SIGTERM)
                self.blocks.check("a shard")

    handed_in.trainer_class = Disturbed


def in_export(handed_in: HandedIn) -> None:
    def stop(*arguments, **more):
        kill_myself(signal.SIGINT)
        time.sleep(60)

    class Disturbed(handed_in.trainer_class):
        def export(self):
            self.model.save_pretrained = stop
            super().export()

    handed_in.trainer_class = Disturbed


PLACES = {
    in_validation: 143,
    in_export: 130,
    in_sampling: 130,
    in_search: 138,
    in_restoring: 143,
    in_first_wait_for_data: 143,
    in_later_wait_for_data: 143,
}


@pytest.mark.parametrize("place", campaign(list(PLACES), short=2))
def test_a_run_told_to_stop_where_it_is_for_long_stops_there_and_continues(bench, home, record_fault, place):
    """A signal in the midst of validation, sampling, the search for a batch size, a wait for data, the export"""
    if place is in_restoring:
        bench.interrupt(home, partial(at_step, 33, kill_myself))
    job = bench.start(home, place)
    assert job.wait(60) == PLACES[place], job.text
    said = what_was_said(job)
    assert_continued(said, bench.finish(home))
    record_fault(f"{place.__name__.replace('_', ' ')}: {said}")


@pytest.mark.parametrize("number", campaign(range(3), short=1))
def test_a_second_signal_ends_a_run_during_its_save(bench, home, record_fault, number):
    """A second signal while the save of the first is written"""
    bench.interrupt(home, partial(at_step, 12, kill_myself))
    slow = partial(at_step, 13, partial(slow_hashing, 5.0))
    job = bench.start(home, slow, options=["--save_steps", "1000"])
    job.wait_for_text("step 14/")
    job.send(signal.SIGTERM)
    time.sleep(2.5)  # of which a second counts, from when it has taken note of the first
    began = time.monotonic()
    job.send(signal.SIGTERM)
    job.wait(30)
    took = time.monotonic() - began
    assert job.status == 143 and took < 5.0, f"status {job.status} after {took:.1f} s\n{job.text}"
    saved = checkpoints(bench.checkpoints_of(home))
    assert all(find_corruption(checkpoint) is None for checkpoint in saved)
    bench.finish(home)
    record_fault(f"ended {took:.2f} s after the second, {saved[0].name} is complete")


# A save takes seconds.
SLOW_SAVES = (
    "import hashlib, time\ndigest = hashlib.file_digest\n"
    "hashlib.file_digest = lambda *arguments: time.sleep(0.5) or digest(*arguments)\n"
)
LAUNCHED = [
    (1, signal.SIGTERM, "launcher"), (1, signal.SIGKILL, "launcher"), (1, signal.SIGUSR1, "process"),
    (2, signal.SIGTERM, "launcher"), (2, signal.SIGINT, "launcher"), (2, signal.SIGKILL, "launcher"),
    (2, signal.SIGTERM, "processes"), (2, signal.SIGUSR1, "first process"), (2, signal.SIGINT, "last process"),
    (2, signal.SIGKILL, "last process"),
]  # fmt: skip


@pytest.mark.parametrize("case", campaign(LAUNCHED, short=0))
def test_a_signal_to_accelerate_launch_or_its_processes_stops_the_run(bench, home, record_fault, case):
    """Signals to `accelerate launch` with 1 and with 2 processes, or to these alone; SIGKILL of the launcher"""
    processes, signum, victim = case
    home.mkdir()
    (home / "sitecustomize.py").write_text(SLOW_SAVES)
    env = environment(home, PYTHONPATH=str(home), **ON_CPU)
    with started(on_processes(processes), *bench.argv(), cwd=home, env=env) as launched:
        launched.wait_for("step 8/")
        everything = psutil.Process(launched.process.pid).children(recursive=True)
        workers = [process for process in everything if "run_clm_owt.py" in " ".join(process.cmdline())]
        assert len(workers) == processes
        workers.sort(key=lambda worker: int(worker.environ().get("RANK", "0")))
        victims = {"launcher": [launched.process], "first process": workers[:1], "last process": workers[-1:]}
        began = time.monotonic()
        for process in victims.get(victim, workers):
            process.send_signal(signum)
        launched.process.wait(60)
        _, alive = psutil.wait_procs(workers, timeout=60)
        took = time.monotonic() - began
        assert not alive, launched.text
    said = re.findall("^Stopped by .*", launched.text, re.MULTILINE)
    assert len(said) == 1, launched.text
    killed = (signum, victim) == (signal.SIGKILL, "last process")
    assert "saved up to" not in said[0] or killed, launched.text
    assert_continued(said[0], bench.finish(home, processes))
    record_fault(f"{signum.name} to the {victim} (of {processes}): {said[0]} ({took:.1f} s)")
