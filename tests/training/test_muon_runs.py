"""The contracts of a run hold with Muon: real processes, the main job, float32 on a CPU."""

import pytest
from safetensors.torch import load_file
from support.runs import timeless_metrics
from support.watched_fixtures import (
    STEPS,
    Record,
    assert_same_blocks,
    assert_same_loss_and_gradient,
    assert_same_losses,
    watch_forked_runs,
    watched_run,
)

pytestmark = pytest.mark.xdist_group("muon")
OPTIONS = ("--optimizer=muon", "--embedding_learning_rate=5e-4", "--penalty_weight=0.01", "--auto_batch_size=false")
RUNS_OF = {  # by the number of processes: micro-batch, and whether FSDP2 shards
    1: {"plain": (16, False), "continued": (16, False), "small": (5, False), "from sharded": (16, False)},
    2: {"two": (3, False), "from one": (8, False)},
    3: {"sharded": (5, True), "continued sharded": (5, True)},
}
CONTINUED = {"continued": "plain", "from one": "plain", "continued sharded": "sharded", "from sharded": "sharded"}


@pytest.fixture(scope="module")
def records(warm, batch_recipe, tmp_path_factory) -> dict[str, Record]:
    """One run for each cut, and those that continue another one from its checkpoint after step 10."""
    home = tmp_path_factory.mktemp("muon")
    found = {n: Record(home / "records" / n, home / "runs" / n) for runs in RUNS_OF.values() for n in runs}

    def make(name: str, micro_batch: int, sharded: bool) -> dict:
        record, more = found[name], {"sharded": sharded}
        if name in CONTINUED:
            more |= {"copy_of": str(found[CONTINUED[name]].output), "back_to": 10}
        else:
            more |= {"record": str(record.folder), "gradients": True}
            more |= {} if name == "plain" else {"weights": str(found["plain"].folder)}
        if name == "from one":  # one of its two processes runs out of memory when its last gradients are there
            more["errors"] = [{"rank": 1, "kind": "memory", "at": "last micro-batch of 13"}]
        return watched_run(
            batch_recipe, record.output, *OPTIONS, f"--max_batch_size={micro_batch}", "--save_steps=10", **more
        )

    for processes, runs in RUNS_OF.items():
        late = [name for name in runs if name == "from sharded"]
        watch_forked_runs(warm, processes, [make(n, *cut) for n, cut in runs.items() if n not in late], home)
    watch_forked_runs(warm, 1, [make("from sharded", *RUNS_OF[1]["from sharded"])], home)
    return found


@pytest.mark.parametrize("name", ["small", "two", "sharded"])
def test_every_cut_takes_the_same_step_and_ends_with_the_same_losses(records, name):
    """A step that is taken over several processes shares out the matrices, and each gets the same update."""
    assert_same_loss_and_gradient(records[name], records["plain"])
    assert_same_losses(records[name], records["plain"])
    assert_same_blocks(records[name], records["plain"])


@pytest.mark.parametrize("name", ["continued", "continued sharded"])
def test_a_run_continues_bit_for_bit(records, name):
    continued, whole = records[name].output, records[CONTINUED[name]].output
    assert timeless_metrics(continued) == timeless_metrics(whole)
    for file in ("model/model.safetensors", f"checkpoints/step-{STEPS:08d}/optimizer.safetensors"):
        assert (continued / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("name", ["from one", "from sharded"])
def test_a_checkpoint_is_continued_on_another_number_of_processes(records, name):
    assert_same_losses(records[name], records[CONTINUED[name]])


def test_a_checkpoint_holds_one_momentum_a_matrix_unsharded(records):
    kept = load_file(records["sharded"].output / f"checkpoints/step-{STEPS:08d}/optimizer.safetensors")
    names = {name.removeprefix("transformer.h.0.") for name in kept if ".h.0." in name}
    assert {name for name in names if "weight" in name and "ln_" not in name} == {
        f"{matrix}.weight/momentum_buffer" for matrix in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert kept["transformer.h.0.attn.c_attn.weight/momentum_buffer"].shape == (32, 96)
    assert "transformer.wte.weight/exp_avg" in kept
