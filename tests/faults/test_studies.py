"""Studies that are interrupted, and continued by the same command."""

import time

import pytest
from support.studies import STAND_IN, Study, kill_everything, kill_group, terminate

pytestmark = pytest.mark.xdist_group("faults")


def test_a_study_killed_while_it_trains_and_while_it_measures_ends_with_the_same_tables(bench, tmp_path):
    """A run that fails is left out of both, and said."""
    program = tmp_path / "train.py"
    program.write_text(STAND_IN)
    env = {"FINISHED_RUN": str(bench.run_of(bench.reference)), "SECONDS_PER_STEP": "0.02"}
    whole, killed = (Study(tmp_path / name, bench.recipe, bench.warm, env, str(program)) for name in ("a", "b"))
    for study in (whole, killed):
        study.write(bench.recipe, str(program), [1, 2], [0, 0.5, 0.3])
    job = whole.start()
    assert job.wait() == 1, job.text
    assert "=0.3: see runs/studies/small/small,penalty_type=top_k_mass,penalty_weight=0.3,seed=2.log" in job.text

    job = killed.start()
    job.wait_for_text("[4/10]")
    kill_everything(job)
    job = killed.start()
    while not killed.measured():
        assert job.poll() is None, job.text
        time.sleep(0.005)
    kill_group(job)  # what measures goes on
    job = killed.start()
    assert job.wait() == 1, job.text
    assert "finished before, kept" in job.text and "Traceback" not in job.text
    assert killed.measured() == 10
    assert killed.tables() == whole.tables()
    report = (killed.folder / "report.md").read_text()
    assert "- Left out: top_k_mass, λ = 0.3, seed 2: the run failed (1)" in report


@pytest.mark.faults
def test_a_study_interrupted_at_ten_random_instants_ends_with_the_same_tables(bench, tmp_path, draw, record_fault):
    """A study of trainings interrupted (SIGKILL of all, SIGKILL of its group, SIGTERM), continued"""
    whole, interrupted = (Study(tmp_path / name, bench.recipe, bench.warm, {}) for name in ("a", "b"))
    began = time.monotonic()
    job = whole.start()
    assert job.wait(1800) == 0, job.text
    seconds = time.monotonic() - began
    done = 0
    while done < 10:
        stop = draw.choice([kill_everything, kill_group, terminate])
        job = interrupted.start()
        instant = draw.uniform(0.0, seconds / 4)
        job.wait(instant)
        if job.status is not None:  # it had ended: measured and reported anew, it can be interrupted again
            assert job.status == 0, job.text
            for file in interrupted.folder.rglob("*.*"):
                file.unlink()
            continue
        reached = f"{job.text.count('finished, validation')} runs trained, {interrupted.measured()} models measured"
        stop(job)
        assert "Traceback" not in job.text, job.text
        done += 1
        record_fault(f"{stop.__name__} after {instant:.1f} s, {reached}")
    job = interrupted.start()
    assert job.wait(1800) == 0, job.text
    assert interrupted.tables() == whole.tables()
