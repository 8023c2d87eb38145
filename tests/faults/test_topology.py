"""Continuing on another machine, late in a long run, and beside another run."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from statistics import median

import pytest
from support.bench import BLOCKS_PER_STEP, campaign
from support.disturbances import at_step, kill_myself
from support.runs import timeless_metrics

from clm_owt.training.checkpoint import MARKER, checkpoints, fingerprint

pytestmark = pytest.mark.xdist_group("faults")

SESSIONS = [  # (processes, micro-batch, the step in which it is told to stop)
    [(1, 4, 20), (2, 2, 40), (1, 3, None)],
    [(1, 4, 20), (2, 2, 30), (2, 4, 40), (1, 3, None)],
]


def train_losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in timeless_metrics(folder) if row["split"] == "train"}


@pytest.mark.parametrize("sessions", campaign(SESSIONS, short=1))
def test_a_run_goes_on_with_other_processes_and_micro_batches(bench, home, record_fault, sessions):
    """1 -> 2 -> 1 processes, another micro-batch, at resumes"""
    for processes, micro_batch, stop_in in sessions:
        options = ["--auto_batch_size", "false", "--max_batch_size", str(micro_batch)]
        stop = [partial(at_step, stop_in, partial(kill_myself, signal.SIGTERM))] if stop_in else []
        for job in bench.start_several(home, processes, *stop, options=options):
            assert job.wait() == (143 if stop_in else 0), job.text
    found, wanted = train_losses(bench.run_of(home)), train_losses(bench.run_of(bench.reference))
    assert found.keys() == wanted.keys()
    worst = max(abs(found[step] / wanted[step] - 1) for step in wanted)
    assert worst <= 2e-6
    for processes, micro_batch, _ in sessions[1:]:
        record_fault(f"{processes} process(es), micro-batch {micro_batch}: losses differ by at most {worst:.1e}")


@pytest.mark.faults
def test_two_runs_at_once_share_an_empty_cache(bench, tmp_path, record_fault):
    """Two runs at once that share an empty cache"""
    homes = [tmp_path / "a", tmp_path / "b"]
    jobs = [bench.start(home, options=["--data_cache_dir", str(tmp_path / "cache")]) for home in homes]
    for job, home in zip(jobs, homes, strict=True):
        assert job.wait() == 0, job.text
        bench.compare(home, bench.reference)
    record_fault("both equal the undisturbed run")


@pytest.mark.parametrize("repetitions", campaign([1, 5], short=1))
def test_continuing_takes_no_longer_late_in_a_run(bench, tmp_path, record_fault, repetitions):
    """Continuing at step 30,000 of a plan of 40,000, against step 10"""
    options = ["--max_steps", "40000"]
    early = tmp_path / "early"
    bench.interrupt(early, partial(at_step, 13, kill_myself), options=options)
    late = shutil.copytree(early, tmp_path / "late")
    folder = late / "runs" / "small,max_steps=40000"
    early_step = make_late(folder)

    def seconds(home: Path, step: int) -> float:
        """CPU time to the next step."""
        copy = shutil.copytree(home, tmp_path / "copy")
        job = bench.start(copy, partial(at_step, step + 1, kill_myself), options=options)
        assert job.wait() == -signal.SIGKILL and f"Continuing after step {step:,}" in job.text, job.text
        shutil.rmtree(copy)
        return job.cpu_seconds

    pairs = [(seconds(early, early_step), seconds(late, 30_000)) for _ in range(repetitions)]
    early_seconds, late_seconds = map(median, zip(*pairs, strict=True))
    assert late_seconds < early_seconds + 1.0
    record_fault(
        f"{late_seconds:.2f} s of CPU time to the next step, without imports, against {early_seconds:.2f} s "
        f"(of {repetitions}); with a metrics.jsonl of 3,000 rows"
    )


def make_late(folder: Path) -> int:
    """Make of a run's newest checkpoint one of step 30,000; gives the step that it was of."""
    newest = checkpoints(folder / "checkpoints")[0]
    state = json.loads((newest / "state.json").read_text())
    step = state["step"]  # 10, or 5 where the kill was before the last save was complete
    late = {"step": 30_000, "position": 30_000 * BLOCKS_PER_STEP, "validated_step": 30_000, "sampled_step": 30_000}
    (newest / "state.json").write_text(json.dumps(state | late))
    listing = {file.name: fingerprint(file) for file in newest.iterdir() if file.name != MARKER}
    (newest / MARKER).write_text(json.dumps({"files": listing}))
    newest.rename(folder / "checkpoints" / "step-00030000")
    rows = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    with (folder / "metrics.jsonl").open("a") as file:
        for number in range(20, 30_001, 10):
            file.write(json.dumps(json.loads(rows[-1]) | {"step": number}) + "\n")
    return step
