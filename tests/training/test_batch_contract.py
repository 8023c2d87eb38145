"""A recipe is the same run on any cut of its batch: real processes, the main job, float32 on a CPU."""

import itertools
import json

import pytest
from support.watched_fixtures import (
    STEPS,
    Record,
    assert_same_blocks,
    assert_same_loss_and_gradient,
    assert_same_losses,
    watch_forked_runs,
    watched_run,
)

from clm_owt.recipe import PENALTY_TYPES

CUTS = {1: (16, 5), 2: (8, 3), 3: (4,)}  # processes: micro-batches, for a global batch of 16
OTHER_CUTS = [(processes, m) for processes, sizes in CUTS.items() for m in sizes if (processes, m) != (1, 16)]

# Out-of-memory errors of the last process, and the micro-batches of a process with 16 blocks that follow.
FAULTS = {
    "step 7": ({"at": 7}, [16] * 6 + [8] * 14),
    "evaluation": ({"at": "validation"}, [8] * 20),
    "last micro-batch": ({"at": "last micro-batch of 7"}, [16] * 6 + [8] * 14),
    "twice in a row": ({"at": 7, "times": 2}, [16] * 6 + [6] * 14),
}

# All tests here share the runs of one fixture.
pytestmark = pytest.mark.xdist_group("batch contract")


@pytest.fixture(scope="module")
def records(warm, batch_recipe, tmp_path_factory) -> dict[tuple, Record]:
    """A run for each cut and penalty type, by (processes, micro-batch, penalty type), and for each fault with the
    largest micro-batch of one and of two processes, by (processes, fault)."""
    home = tmp_path_factory.mktemp("cuts")
    found: dict[tuple, Record] = {}
    for processes, micro_batches in CUTS.items():
        runs = []

        def add(key: tuple, *options: str, runs: list = runs, **more: object) -> None:
            name = "-".join(map(str, key)).replace(" ", "_")
            found[key] = Record(home / "records" / name, home / "runs" / name)
            runs.append(watched_run(batch_recipe, found[key].output, *options, record=str(found[key].folder), **more))

        for micro_batch, penalty in itertools.product(micro_batches, PENALTY_TYPES):
            options = ["--auto_batch_size=false", f"--max_batch_size={micro_batch}"]
            options += ["--penalty_weight=0.01", f"--penalty_type={penalty}"]
            reference = found.get((1, 16, penalty))
            weights = {"weights": str(reference.folder)} if reference else {}
            add((processes, micro_batch, penalty), *options, gradients=True, **weights)
        if processes < 3:
            for fault, (error, _) in FAULTS.items():
                errors = [{"rank": processes - 1, "kind": "memory", **error}]
                add((processes, fault), "--penalty_weight=0.01", errors=errors)
        watch_forked_runs(warm, processes, runs, home)
    return found


@pytest.mark.parametrize("penalty", PENALTY_TYPES)
@pytest.mark.parametrize(("processes", "micro_batch"), OTHER_CUTS)
def test_from_the_same_weights_every_cut_gives_the_same_loss_and_gradient(records, processes, micro_batch, penalty):
    assert_same_loss_and_gradient(records[processes, micro_batch, penalty], records[1, 16, penalty])


@pytest.mark.parametrize("penalty", PENALTY_TYPES)
@pytest.mark.parametrize(("processes", "micro_batch"), OTHER_CUTS)
def test_over_twenty_steps_the_losses_of_every_cut_agree(records, processes, micro_batch, penalty):
    assert_same_losses(records[processes, micro_batch, penalty], records[1, 16, penalty])


@pytest.mark.parametrize(("processes", "micro_batch"), OTHER_CUTS)
def test_every_cut_consumes_the_same_blocks_in_each_step(records, processes, micro_batch):
    reference = records[1, 16, "non_max_sum"]
    assert_same_blocks(records[processes, micro_batch, "non_max_sum"], reference)
    assert len({reference.block_hash(step) for step in range(1, STEPS + 1)}) == STEPS


@pytest.mark.parametrize(("processes", "micro_batch"), OTHER_CUTS)
def test_schedule_steps_and_rows_do_not_depend_on_the_number_of_processes(records, processes, micro_batch):
    """One main process writes, and the schedule is stepped once per step however many there are."""
    reference, other = records[1, 16, "non_max_sum"], records[processes, micro_batch, "non_max_sum"]
    for split, length in (("train", STEPS), ("validation", 3)):
        expected, got = reference.rows(split), other.rows(split)
        assert len(expected) == len(got) == length
        for field in ("step", "tokens", "learning_rate", "epoch"):
            assert [row.get(field) for row in got] == [row.get(field) for row in expected]
        assert all(row.keys() == expected[0].keys() for row in got)
    assert {row["micro_batch"] for row in other.rows("train")} == {micro_batch}
    plan = json.loads((other.output / "plan.json").read_text())
    assert (plan["total_steps"], plan["processes"], plan["micro_batch"]) == (STEPS, processes, micro_batch)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("processes", [1, 2])
def test_out_of_memory_during_the_run_leaves_the_loss_curve_as_it_was(records, processes, fault):
    """With two processes only one of them runs out of memory, and both step down."""
    other, reference = records[processes, fault], records[1, 16, "non_max_sum"]
    assert_same_losses(other, reference)
    assert_same_blocks(other, reference)
    sizes = [size if processes == 1 else {16: 8, 8: 4, 6: 3}[size] for size in FAULTS[fault][1]]
    assert [row["micro_batch"] for row in other.rows("train")] == sizes
