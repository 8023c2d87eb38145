import json

import pytest
import yaml

from clm_owt.errors import InputError
from clm_owt.reports.record import (
    RunRecord,
    last_steps,
    read_metrics,
    read_plan,
    read_recipe,
    split_rows,
    task_metrics,
)

ROWS = [
    {"step": 0, "split": "validation"},
    {"step": 1, "split": "train", "micro_batch": 8},
    {"step": 2, "split": "train", "micro_batch": 4},
    {"step": 2, "split": "validation"},
    {"step": 2, "split": "tasks", "hellaswag/acc": 0.25, "tokens": 64},
    {"step": 3, "split": "train", "micro_batch": 4},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"run_name": "tiny"}))
    (tmp_path / "plan.json").write_text(json.dumps({"resumed_after": [2]}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 4, "spl')
    (tmp_path / "samples.md").write_text("## Step 1\n\n**A** b\n\n## Step 3\n\n**A** c\n\n")
    return tmp_path


def test_a_torn_last_line_is_left_out(folder):
    assert read_metrics(folder / "metrics.jsonl") == ROWS
    assert split_rows(ROWS) == ([ROWS[1], ROWS[2], ROWS[5]], [ROWS[0], ROWS[3]], [ROWS[4]])
    assert last_steps(folder) == {"train": 3, "validation": 2, "tasks": 2, "samples": 3}


def test_a_record_holds_what_the_folder_does(folder):
    run = RunRecord.read(folder)
    assert (run.name, run.train, run.validation) == (folder.name, [ROWS[1], ROWS[2], ROWS[5]], [ROWS[0], ROWS[3]])
    assert run.tasks == [ROWS[4]] and task_metrics(ROWS[4]) == [("hellaswag/acc", 0.25)]
    assert run.samples == {1: "**A** b", 3: "**A** c"}
    assert run.marks == [(1, "micro-batch 8 → 4"), (2, "resumed")]


def test_a_record_can_be_cut_back_to_a_step(folder):
    run = RunRecord.read(folder).until(2)
    assert (run.train, run.validation, run.samples) == ([ROWS[1], ROWS[2]], [ROWS[0], ROWS[3]], {1: "**A** b"})


def test_a_folder_that_holds_no_run_is_named(folder):
    with pytest.raises(InputError) as error:
        read_recipe(folder / "nowhere")
    assert str(error.value) == f"{folder / 'nowhere'} is no run's folder: it has no recipe.yaml"
    (folder / "plan.json").unlink()
    with pytest.raises(InputError, match=r"is no run's folder: it has no plan\.json$"):
        RunRecord.read(folder)


@pytest.mark.parametrize("content", ["{", "[1]", "", "a: b: c", "\0"])
def test_a_damaged_file_is_named_with_what_is_wrong_in_one_line(folder, content):
    for name, read in (("recipe.yaml", read_recipe), ("plan.json", read_plan)):
        (folder / name).write_text(content)
        with pytest.raises(InputError) as error:
            read(folder)
        assert str(error.value).startswith(f"{folder / name} cannot be read: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", [b"garbage", b"[1]", b"{}", b'{"step": 1, "split": "x"}', b"\xff", b"[" * 99999, b""])
def test_a_line_of_metrics_that_is_no_row_is_named(folder, line):
    path = folder / "metrics.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + line + b"\n" + json.dumps(ROWS[1]).encode() + b"\n")
    with pytest.raises(InputError) as error:
        read_metrics(path)
    assert str(error.value).startswith(f"{path}, line 2: expected a row in JSON with step and split")


def test_samples_that_are_no_text_are_named(folder):
    (folder / "samples.md").write_bytes(b"## Step 1\n\xff")
    with pytest.raises(InputError, match=r"samples\.md cannot be read: .*; restore it"):
        last_steps(folder)
