"""FSDP2 over gloo on a CPU: torch's own fully_shard in the main job. (Accelerate makes DDP of FSDP on a CPU.)"""

import pytest
import torch
from safetensors.torch import load_file
from support.runs import timeless_metrics
from support.watched_fixtures import (
    Record,
    assert_same_blocks,
    assert_same_loss_and_gradient,
    assert_same_losses,
    relative,
    watch_forked_runs,
    watch_launched_runs,
    watched_run,
)
from transformers import GPT2LMHeadModel

pytestmark = pytest.mark.xdist_group("fsdp2")
OPTIONS = ("--penalty_weight=0.01", "--auto_batch_size=false", "--save_steps=10", "--sample_steps=20")


@pytest.fixture(scope="module")
def records(warm, batch_recipe, tmp_path_factory) -> dict[str, Record]:
    """16 blocks in micro-batches of 5 on three processes: one of them has two micro-batches, the others one. And the
    same continued from the checkpoint after step 10, on three processes and on one. And both in bf16."""
    home = tmp_path_factory.mktemp("fsdp2")
    names = ("plain", "sharded", "continued", "continued on one", "plain in bf16", "sharded in bf16")
    found = {name: Record(home / "records" / name, home / "runs" / name) for name in names}

    def make(name: str, micro_batch: int, **spec: object) -> dict:
        options = (*OPTIONS, f"--max_batch_size={micro_batch}")
        return watched_run(batch_recipe, found[name].output, *options, record=str(found[name].folder), **spec)

    weights = {"gradients": True, "weights": str(found["plain"].folder)}
    after_10 = {"copy_of": str(found["sharded"].output), "back_to": 10}
    bf16 = {"mixed_precision": "bf16", "gradients": True}
    watch_forked_runs(warm, 1, [make("plain", 16, gradients=True), make("plain in bf16", 16, **bf16)], home)
    three = [make("sharded", 5, sharded=True, **weights), make("continued", 5, sharded=True, **after_10)]
    three.append(make("sharded in bf16", 5, sharded=True, **bf16 | {"weights": str(found["plain in bf16"].folder)}))
    assert watch_forked_runs(warm, 3, three, home).count("Continuing after step 10") == 1
    watch_forked_runs(warm, 1, [make("continued on one", 16, **after_10)], home)
    return found


def test_sharded_training_has_the_loss_and_gradient_of_one_batch(records):
    assert_same_loss_and_gradient(records["sharded"], records["plain"])


def test_sharded_training_has_the_losses_and_blocks_of_one_process(records):
    assert_same_losses(records["sharded"], records["plain"])
    assert_same_blocks(records["sharded"], records["plain"])
    for field in ("learning_rate", "tokens"):
        assert [row.get(field) for row in records["sharded"].rows("train")] == [
            row.get(field) for row in records["plain"].rows("train")
        ]


def test_in_bf16_blocks_are_gathered_as_such_and_train_as_on_one_process(records):
    """Loss and gradient at the same weights, to the 8 bits of bf16; the gradient of the embedding is float32's."""
    plain, sharded = records["plain in bf16"], records["sharded in bf16"]
    for step in (1, 20):
        expected, got = plain.gradient(step), sharded.gradient(step)
        assert relative(got["loss"], expected["loss"]) < 1e-3
        assert (got["gradient"] - expected["gradient"]).norm() < 2e-2 * expected["gradient"].norm()
    assert relative(sharded.rows("validation")[-1]["loss"], plain.rows("validation")[-1]["loss"]) < 2e-3
    exact, rounded = (records[name].collectives["gathered"] for name in ("sharded", "sharded in bf16"))
    assert exact.keys() == {"torch.float32"}
    assert rounded["torch.float32"] + 2 * rounded["torch.bfloat16"] == exact["torch.float32"]
    assert rounded["torch.bfloat16"] > 0


def test_the_exported_model_and_the_checkpoint_hold_unsharded_tensors(records):
    plain, sharded = (records[name].output for name in ("plain", "sharded"))
    for file in ("model/model.safetensors", "checkpoints/step-00000020/optimizer.safetensors"):
        expected, got = load_file(plain / file), load_file(sharded / file)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    assert GPT2LMHeadModel.from_pretrained(sharded / "model").num_parameters() > 0
    assert (sharded / "samples.md").read_text().count("**The quick brown fox**") == 2


def test_a_sharded_run_continues_from_a_checkpoint_bit_for_bit(records):
    continued, sharded = records["continued"].output, records["sharded"].output
    assert timeless_metrics(continued) == timeless_metrics(sharded)
    weights = "model/model.safetensors"
    assert (continued / weights).read_bytes() == (sharded / weights).read_bytes()


def test_a_checkpoint_of_a_sharded_run_is_continued_by_one_process(records):
    assert_same_losses(records["continued on one"], records["plain"])


def test_out_of_memory_inside_a_sharded_step_ends_the_run_with_what_to_do(batch_recipe, tmp_path):
    errors = [{"rank": 1, "at": 3, "kind": "memory"}]
    options = ["--auto_batch_size=false", "--max_batch_size=4"]
    failing = watched_run(batch_recipe, tmp_path / "run", *options, sharded=True, errors=errors)
    result = watch_launched_runs(2, [failing], tmp_path, fails=True, timeout=120)
    assert "step 3: out of memory with micro-batches of 4" in result.stderr
    assert "--max_batch_size" in result.stderr
