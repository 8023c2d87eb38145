import errno
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clm_owt.errors import InputError
from clm_owt.state import TrainState
from clm_owt.training.checkpoint import (
    MARKER,
    CheckpointWriter,
    checkpoints,
    find_corruption,
    find_newest,
    restore,
    set_aside_newer,
    take_snapshot,
    write_snapshot,
)

ALONE = SimpleNamespace(rank=0, is_main=True, gather=lambda value: [value])


def model_and_optimizer(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def step(model, optimizer):
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def snapshot_at(number: int, **state):
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    return take_snapshot(TrainState(step=number, **state), model, optimizer, ALONE)


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    model, optimizer = model_and_optimizer()
    for _ in range(3):
        step(model, optimizer)
    state = TrainState(step=3, position=12, tokens=99, best_validation_loss=1.5, tracker_ids={"wandb": "x"})
    path = write_snapshot(take_snapshot(state, model, optimizer, ALONE), tmp_path)
    draws = [torch.rand(2).tolist(), random.random(), np.random.rand()]
    torch.manual_seed(5)
    step(model, optimizer)

    other, other_optimizer = model_and_optimizer(seed=1)
    assert restore(path, other, other_optimizer, ALONE) == state
    assert [torch.rand(2).tolist(), random.random(), np.random.rand()] == draws
    torch.manual_seed(5)
    step(other, other_optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name])


def test_a_snapshot_is_a_copy_that_later_steps_do_not_touch():
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    snapshot = take_snapshot(TrainState(), model, optimizer, ALONE)
    before = {name: tensor.clone() for name, tensor in (snapshot.model | snapshot.optimizer).items()}
    step(model, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in (snapshot.model | snapshot.optimizer).items())


def test_tied_weights_are_saved_once(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    snapshot = take_snapshot(TrainState(), model, torch.optim.AdamW(model.parameters()), ALONE)
    assert list(snapshot.model) == ["0.weight"]


def test_a_checkpoint_has_its_name_only_when_complete(tmp_path, monkeypatch):
    from clm_owt.training import checkpoint

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "fingerprint", fail)
    with pytest.raises(OSError, match="no space"):
        write_snapshot(snapshot_at(1), tmp_path)
    assert checkpoints(tmp_path) == []
    assert find_newest(tmp_path) == (None, [])
    monkeypatch.undo()
    assert find_corruption(write_snapshot(snapshot_at(1), tmp_path)) is None


def test_older_checkpoints_are_pruned_after_the_new_one_is_complete(tmp_path):
    writer = CheckpointWriter(tmp_path, total_limit=2)
    for number in (5, 10, 15):
        writer.write(snapshot_at(number))
    writer.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000015", "step-00000010"]


def test_the_best_by_validation_loss_is_kept_besides(tmp_path):
    writer = CheckpointWriter(tmp_path, total_limit=2)
    for number, loss in ((5, 3.0), (10, 2.0), (15, None), (20, float("nan")), (25, 2.5), (30, 2.0)):
        writer.write(snapshot_at(number, validation_loss=loss, validated_step=number))
        writer.wait()
        kept = [int(path.name[-8:]) for path in checkpoints(tmp_path)]
        assert kept == {5: [5], 10: [10, 5], 15: [15, 10], 20: [20, 15, 10], 25: [25, 20, 10], 30: [30, 25]}[number]


def test_the_best_is_the_one_that_was_validated_and_no_later_one(tmp_path):
    writer = CheckpointWriter(tmp_path, total_limit=1)
    for number, loss, validated_step in ((5, 3.0, 0), (10, 2.0, 10), (15, 2.0, 10), (20, 2.5, 20), (25, 2.5, 20)):
        writer.write(snapshot_at(number, validation_loss=loss, validated_step=validated_step))
        writer.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000025", "step-00000010"]


def test_the_one_continued_from_stays_until_a_newer_is_complete(tmp_path):
    for number in (5, 10, 15):
        write_snapshot(snapshot_at(number), tmp_path)
    set_aside_newer(tmp_path, tmp_path / "step-00000005")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005"]
    assert len(list(tmp_path.glob("*.partial"))) == 2  # what was newer is no longer in the way, and not gone
    writer = CheckpointWriter(tmp_path, total_limit=1)
    writer.write(snapshot_at(7))
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_a_save_that_fails_is_reported_counted_and_leaves_the_older_ones(tmp_path, monkeypatch):
    from clm_owt.training import checkpoint

    said = []
    writer = CheckpointWriter(tmp_path, total_limit=1, say=said.append)
    writer.write(snapshot_at(5))
    writer.wait()

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flush_to_disk", no_space)
        for number in (10, 15):
            writer.write(snapshot_at(number))
        writer.wait()
    assert (writer.failed_in_a_row, writer.saved_step) == (2, 5)
    assert ["No space left" in line and f"Step {n} " in line for line, n in zip(said, (10, 15), strict=True)]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]  # what was half written made room
    assert find_corruption(tmp_path / "step-00000005") is None
    writer.write(snapshot_at(20))
    writer.wait()
    assert (writer.failed_in_a_row, writer.saved_step) == (0, 20)


def test_a_vanished_disk_is_not_replaced_by_a_new_folder(tmp_path):
    writer = CheckpointWriter(tmp_path / "mount/run/checkpoints", total_limit=2, say=lambda line: None)
    writer.write(snapshot_at(1))
    writer.wait()
    assert writer.failed_in_a_row == 1
    assert not (tmp_path / "mount").exists()


FILES = ("model.safetensors", "optimizer.safetensors", "random_states.json", "state.json", MARKER)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "emptied", "flipped in one bit", "removed"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, name, harm):
    older = write_snapshot(snapshot_at(5), tmp_path)
    file = write_snapshot(snapshot_at(10), tmp_path) / name
    content = bytearray(file.read_bytes())
    if harm == "removed":
        file.unlink()
    else:
        if harm == "flipped in one bit":
            content[len(content) // 2] ^= 1
        file.write_bytes(content[: {"truncated": len(content) - 1, "emptied": 0}.get(harm)])
    found, passed_over = find_newest(tmp_path)
    assert found == older
    assert len(passed_over) == 1 and "step-00000010" in passed_over[0]


LISTINGS = (b'{"files": []}', b'{"files": {}}', b'{"files": {"state.json": 1}}', b"null", b"1", b"[" * 99999, b"\xff")


@pytest.mark.parametrize("listing", LISTINGS)
def test_a_checkpoint_whose_marker_lists_no_files_is_passed_over(tmp_path, listing):
    older = write_snapshot(snapshot_at(5), tmp_path)
    (write_snapshot(snapshot_at(10), tmp_path) / MARKER).write_bytes(listing)
    found, passed_over = find_newest(tmp_path)
    assert found == older and MARKER in passed_over[0]


def test_what_the_program_did_not_name_is_the_users(tmp_path):
    newest = write_snapshot(snapshot_at(5), tmp_path)
    copies = [tmp_path / name for name in ("step-00000005.bak", "step-00000001-mine", "step-5", "step-mine.partial")]
    for copy in copies:
        shutil.copytree(newest, copy)
    archives = [tmp_path / name for name in ("step-00000005.tar.gz", "step-00000004.partial", "step-00000009")]
    for archive in archives:
        archive.write_text("mine")
    assert find_newest(tmp_path) == (newest, [])
    set_aside_newer(tmp_path, copies[0])
    writer = CheckpointWriter(tmp_path, total_limit=1)
    writer.write(snapshot_at(7))
    writer.wait()
    assert set(tmp_path.iterdir()) == {tmp_path / "step-00000007", *copies, *archives}


def test_damaged_checkpoints_only_are_an_error_and_no_new_run(tmp_path):
    path = write_snapshot(snapshot_at(5), tmp_path)
    (path / "state.json").unlink()
    with pytest.raises(InputError, match=r"no complete checkpoint:\n.*step-00000005: state.json is missing\nremove"):
        find_newest(tmp_path)


def test_leftovers_of_an_unfinished_save_do_not_count(tmp_path):
    path = write_snapshot(snapshot_at(5), tmp_path)
    path.rename(path.with_name(path.name + ".partial"))
    assert find_newest(tmp_path) == (None, [])


def test_a_checkpoint_holds_no_pickle(tmp_path):
    path = write_snapshot(snapshot_at(5), tmp_path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    json.loads((path / "random_states.json").read_text())


def test_the_weights_of_another_model_are_refused(tmp_path):
    path = write_snapshot(snapshot_at(5), tmp_path)
    other = torch.nn.Linear(3, 4)
    with pytest.raises(InputError, match=r"its model differs from the recipe's, at 0\.bias"):
        restore(path, other, torch.optim.AdamW(other.parameters()), ALONE)
    shutil.rmtree(path)


def test_what_a_kill_during_the_pruning_left_is_removed_at_the_end(tmp_path):
    writer = CheckpointWriter(tmp_path, total_limit=1)
    writer.prune()
    for number in (5, 10):
        write_snapshot(snapshot_at(number), tmp_path)
    (tmp_path / "step-00000005").rename(tmp_path / "step-00000005.old.partial")
    writer.prune()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
