"""FSDP2 over gloo on a CPU: torch's own fully_shard in the main job. (Accelerate makes DDP of FSDP on a CPU.)"""

import pytest
import torch
from safetensors.torch import load_file
from support.watched_fixtures import (
    STEPS,
    Record,
    assert_same_blocks,
    assert_same_losses,
    job,
    relative,
    spec,
    watched,
)
from transformers import GPT2LMHeadModel

from clm_owt.reports.record import TIMING_FIELDS

pytestmark = pytest.mark.xdist_group("fsdp2")
OPTIONS = ("--penalty_weight=0.01", "--auto_batch_size=false", "--save_steps=10", "--sample_steps=20")


@pytest.fixture(scope="module")
def records(batch_recipe, tmp_path_factory) -> dict[str, Record]:
    """16 blocks in micro-batches of 5 on three processes: one of them has two micro-batches, the others one."""
    home = tmp_path_factory.mktemp("fsdp2")
    found = {name: Record(home / "records" / name, home / "runs" / name) for name in ("plain", "sharded", "resumed")}

    def make(name: str, *options: str, output: str | None = None, **more: object) -> dict:
        more["record"] = str(found[name].folder)
        return job(batch_recipe, found[output or name].output, *OPTIONS, *options, **more)

    one = [make("plain", "--max_batch_size=16", gradients=True)]
    three = [
        make("sharded", "--max_batch_size=5", gradients=True, weights=str(found["plain"].folder), sharded=True),
    ]
    for processes, jobs in ((1, one), (3, three)):
        result = watched(processes, spec(home / f"{processes}.json", jobs), home)
        assert result.returncode == 0, result.stderr
    return found


def test_sharded_training_has_the_loss_and_gradient_of_one_batch(records):
    for step in range(1, STEPS + 1):
        expected, got = records["plain"].gradient(step), records["sharded"].gradient(step)
        assert relative(got["loss"], expected["loss"]) < 1e-6
        assert (got["gradient"] - expected["gradient"]).norm() < 1e-6 * expected["gradient"].norm()


def test_sharded_training_has_the_losses_and_blocks_of_one_process(records):
    assert_same_losses(records["sharded"], records["plain"])
    assert_same_blocks(records["sharded"], records["plain"])
    for field in ("learning_rate", "tokens"):
        assert [row.get(field) for row in records["sharded"].rows("train")] == [
            row.get(field) for row in records["plain"].rows("train")
        ]


def test_the_exported_model_and_the_checkpoint_hold_whole_tensors(records):
    plain, sharded = (records[name].output for name in ("plain", "sharded"))
    for file in ("model/model.safetensors", "checkpoints/step-00000020/optimizer.safetensors"):
        expected, got = load_file(plain / file), load_file(sharded / file)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    assert GPT2LMHeadModel.from_pretrained(sharded / "model").num_parameters() > 0
    assert (sharded / "samples.md").read_text().count("**The quick brown fox**") == 2


def test_a_sharded_run_continues_from_a_checkpoint_bit_for_bit(records, batch_recipe, tmp_path):
    """Its own checkpoint after step 10 on as many processes, and on one process to what float32 leaves."""
    sharded = records["sharded"]
    rows, weights = timeless(sharded), (sharded.output / "model/model.safetensors").read_bytes()
    again = job(batch_recipe, sharded.output, *OPTIONS, "--max_batch_size=5", sharded=True, back_to=10)
    result = watched(3, spec(tmp_path / "again.json", [again]), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Continuing after step 10" in result.stdout
    assert timeless(sharded) == rows
    assert (sharded.output / "model/model.safetensors").read_bytes() == weights

    alone = job(batch_recipe, sharded.output, *OPTIONS, "--max_batch_size=16", back_to=10)
    result = watched(1, spec(tmp_path / "alone.json", [alone]), tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_losses(sharded, records["plain"])


def timeless(record: Record) -> list[dict]:
    rows = record.rows("train") + record.rows("validation")
    return [{name: value for name, value in row.items() if name not in TIMING_FIELDS} for row in rows]


def test_out_of_memory_inside_a_sharded_step_ends_the_run_with_what_to_do(batch_recipe, tmp_path):
    errors = [{"rank": 1, "at": 3, "kind": "memory"}]
    options = ["--auto_batch_size=false", "--max_batch_size=4"]
    failing = job(batch_recipe, tmp_path / "run", *options, sharded=True, errors=errors)
    result = watched(2, spec(tmp_path / "spec.json", [failing]), tmp_path, timeout=120)
    assert result.returncode != 0
    assert "step 3: out of memory with micro-batches of 4" in result.stderr
    assert "--max_batch_size" in result.stderr
