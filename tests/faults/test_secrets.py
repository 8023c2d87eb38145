"""Tokens and keys in the environment, looked for in every file and line."""

from functools import partial

import pytest
from support.disturbances import at_step

pytestmark = pytest.mark.xdist_group("faults")

FAKES = {
    "HF_TOKEN": "hf_FAKEfakeFAKEfake0123456789abcdefgh",
    "WANDB_API_KEY": "0fake1" * 6 + "abcd",
    "HUGGING_FACE_HUB_TOKEN": "hf_OLDFAKEoldfake0123456789abcdefgh",
}


def fail() -> None:
    raise RuntimeError("on purpose")


def assert_nowhere(home, record_fault, what: str) -> None:
    files = [path for path in home.rglob("*") if path.is_file()]  # what it printed is in two of them
    found = [(name, path) for path in files for name, fake in FAKES.items() if fake.encode() in path.read_bytes()]
    assert found == []
    record_fault(f"{what}: in none of {len(files)} files")


def test_a_run_with_trackers_writes_no_secret(bench, home, record_fault):
    """Tokens and keys in the environment, looked for in every file and line"""
    options = ["--report_to", "wandb", "tensorboard"]
    job = bench.start(home, options=options, env=FAKES | {"WANDB_MODE": "offline"})
    assert job.wait() == 0, job.text
    assert any("wandb" in path.parts for path in home.rglob("*"))
    assert_nowhere(home, record_fault, "a run with W&B (offline) and TensorBoard")


def test_a_run_that_fails_writes_no_secret(bench, home, record_fault):
    """Tokens and keys in the environment, looked for in every file and line"""
    job = bench.start(home, partial(at_step, 5, fail), env=FAKES)
    assert job.wait() == 1, job.text
    assert "RuntimeError: on purpose" in job.text
    assert_nowhere(home, record_fault, "a run that fails with a traceback")
