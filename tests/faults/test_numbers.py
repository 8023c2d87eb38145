"""Numbers that go wrong in a step."""

from functools import partial

import pytest
import torch
from support.bench import BLOCKS_PER_STEP
from support.disturbances import HandedIn, at_step, kill_myself

from clm_owt.reports.record import read_metrics
from clm_owt.training.checkpoint import checkpoints

pytestmark = pytest.mark.xdist_group("faults")


def not_a_number(module, inputs, output):
    return output * float("nan")


def loss_not_a_number(module, inputs, output):
    return output._replace(loss=output.loss * float("nan"))


def not_finite(kind: str, steps: range, handed_in: HandedIn) -> None:
    """NaN or infinity in each micro-batch of these steps."""

    class Disturbed(handed_in.trainer_class):
        def forward_and_backward(self, piece, **more):
            if self.state.step + 1 not in steps:
                return super().forward_and_backward(piece, **more)
            if kind == "gradient":
                sums = super().forward_and_backward(piece, **more)
                next(self.model.parameters()).grad.view(-1)[7] = float("inf")
                return sums
            if kind == "data":
                hook = self.model.transformer.drop.register_forward_hook(not_a_number)
            else:
                hook = self.model.register_forward_hook(loss_not_a_number)
            try:
                return super().forward_and_backward(piece, **more)
            finally:
                hook.remove()

    handed_in.trainer_class = Disturbed


def skipped_rows(folder) -> list[dict]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if "skipped" in row]


KINDS = ("data", "loss", "gradient")


def test_a_step_whose_numbers_are_not_finite_is_left_out(bench, tmp_path, record_fault):
    """NaN in the embedded data, NaN in the loss, infinity in a gradient: one step"""
    weights = set()
    for kind in KINDS:
        job = bench.start(tmp_path / kind, partial(not_finite, kind, range(23, 24)))
        assert job.wait() == 0, job.text
        folder = bench.run_of(tmp_path / kind)
        (row,) = skipped_rows(folder)
        assert (row["step"], row["skipped"], len(row["block_ids"])) == (23, "not finite", BLOCKS_PER_STEP)
        assert "step 23: skipped (not finite)" in job.text
        weights.add((folder / "model/model.safetensors").read_bytes())
        record_fault(f"{kind}, step 23: skipped")
    assert len(weights) == 1  # the same whatever went wrong: nothing of it is in the weights


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.faults if k != "loss" else []) for k in KINDS])
def test_three_steps_in_a_row_that_are_not_finite_end_the_run(bench, home, record_fault, kind):
    """NaN in the embedded data, NaN in the loss, infinity in a gradient: in every step"""
    job = bench.start(home, partial(not_finite, kind, range(24, 60)))
    assert job.wait() == 1, job.text
    assert "step 26: " in job.text and "Traceback" not in job.text, job.text
    assert checkpoints(bench.checkpoints_of(home))[0].name == "step-00000020"
    bench.finish(home)  # without the fault
    record_fault(f"{kind}, from step 24: ended after 3 steps, the last checkpoint is of step 20")


def gradient_too_large(step: int, handed_in: HandedIn) -> None:
    """A thousand times, in one step."""
    from clm_owt.training.optim import OutlierGuard

    OutlierGuard.WINDOW, OutlierGuard.LIMIT = 20, 4.0  # 60 steps do not fill its own

    class Disturbed(handed_in.trainer_class):
        def forward_and_backward(self, piece, **more):
            sums = super().forward_and_backward(piece, **more)
            if self.state.step + 1 == step:
                with torch.no_grad():
                    for parameter in self.model.parameters():
                        parameter.grad *= 1000.0
            return sums

    handed_in.trainer_class = Disturbed


def test_an_outlier_is_left_out_also_by_a_run_that_is_killed_around_it(bench, tmp_path, record_fault):
    """A gradient a thousand times too large, with skip_outliers; killed before and after it"""
    options = ["--skip_outliers", "true", "--output_dir", "runs/small"]
    outlier = partial(gradient_too_large, 33)
    for name, kills in {"alone": (), "killed": (32, 36)}.items():
        for step in kills:
            bench.interrupt(tmp_path / name, outlier, partial(at_step, step, kill_myself), options=options)
        job = bench.start(tmp_path / name, outlier, options=options)
        assert job.wait() == 0, job.text
        (row,) = skipped_rows(bench.run_of(tmp_path / name))
        assert (row["step"], row["skipped"], len(row["block_ids"])) == (33, "outlier", BLOCKS_PER_STEP)
        # Where it was killed, a session before has said it.
        assert "step 33: skipped (outlier)" in job.text or kills, job.text
        bench.compare(tmp_path / name, tmp_path / "alone")
        record_fault(f"step 33: skipped; killed in {kills or 'no step'}: the same")
