"""Zero-shot tasks beside a training, on local data: `make test-tasks`."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from support.local_tasks import write_local_tasks
from support.runs import ON_CPU, PYTHON, ROOT, environment, on_processes, run, timeless_metrics
from support.watched_fixtures import watch_launched_runs

pytestmark = [pytest.mark.tasks, pytest.mark.xdist_group("tasks in a run")]

WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[str]:
    """The options that ask for local tasks."""
    folder, names = write_local_tasks(tmp_path_factory.mktemp("local"))
    return ["--eval_tasks", *names, "--eval_task_folder", str(folder)]


@pytest.fixture(scope="module")
def evaluated(tasks, tiny_recipe, tmp_path_factory) -> Path:
    """The folder of a run with tasks beside each validation, and with dropout, which draws random numbers."""
    home = tmp_path_factory.mktemp("evaluated")
    result = run(PYTHON, *options(tiny_recipe), *tasks, cwd=home)
    assert result.returncode == 0, result.stderr
    assert "Zero-shot tasks: 20 examples each time" in result.stdout and "Running" not in result.stderr
    return home / "runs/tiny"


def options(recipe: Path) -> list[str]:
    return ["--recipe", str(recipe), "--dropout", "0.1", "--run_name", "tiny"]


def rows(folder: Path, *splits: str) -> list[dict]:
    return [row for row in timeless_metrics(folder) if row["split"] in splits]


def evaluate_export(folder: Path, tasks: list[str], capsys, monkeypatch) -> dict[str, float]:
    """What scripts/evaluate_model.py gives of a run's export, by `<task>/<metric>`."""
    arguments = ["--model", str(folder / "model"), "--json", *(word.replace("--eval_t", "--t") for word in tasks)]
    monkeypatch.setattr("sys.argv", ["evaluate_model.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts/evaluate_model.py"), run_name="__main__")
    assert not end.value.code
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {f"{task}/{name}": value for task, metrics in found.items() for name, value in metrics.items()}


def metrics_of(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("step", "split", "tokens")}


def test_a_run_has_rows_of_its_tasks_and_the_last_is_what_its_export_gives(evaluated, tasks, capsys, monkeypatch):
    found = rows(evaluated, "tasks")
    assert [(row["step"], row["tokens"]) for row in found] == [(0, 0), (5, 1280), (10, 2560), (12, 3072)]
    assert metrics_of(found[-1]) == evaluate_export(evaluated, tasks, capsys, monkeypatch)
    assert len({row["local_wikitext/word_perplexity"] for row in found}) == 4


def test_tasks_change_nothing_else_in_a_run(evaluated, tiny_recipe, tmp_path):
    result = run(PYTHON, *options(tiny_recipe), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    without = tmp_path / "runs/tiny"
    assert rows(without, "train", "validation") == rows(evaluated, "train", "validation")
    assert (without / "samples.md").read_bytes() == (evaluated / "samples.md").read_bytes()
    assert (without / WEIGHTS).read_bytes() == (evaluated / WEIGHTS).read_bytes()


def test_a_run_killed_after_its_tasks_and_before_a_save_has_the_same_rows_in_the_end(
    evaluated, tasks, tiny_recipe, tmp_path
):
    """As it lies after a kill: rows after step 10, and the last checkpoint after step 8."""
    folder = tmp_path / "runs/tiny"
    shutil.copytree(evaluated, folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints/step-00000012")
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({name: plan[name] for name in plan if name != "finished"}))
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines(True) if json.loads(line)["step"] < 11]
    (folder / "metrics.jsonl").write_text("".join(kept))
    assert json.loads(kept[-1])["split"] == "tasks"
    result = run(PYTHON, *options(tiny_recipe), *tasks, cwd=tmp_path)
    assert result.returncode == 0 and "Continuing after step 8" in result.stdout, result.stderr
    assert timeless_metrics(folder) == timeless_metrics(evaluated)


def test_two_processes_and_fsdp2_evaluate_the_model_that_they_export(
    tasks, tiny_recipe, tmp_path, capsys, monkeypatch
):
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    command = [*on_processes(2), *options(tiny_recipe), *tasks, "--output_dir", str(plain)]
    result = run(command, cwd=tmp_path, env=environment(tmp_path, **ON_CPU))
    assert result.returncode == 0, result.stderr
    spec = {"argv": [*options(tiny_recipe), *tasks, "--output_dir", str(sharded)], "sharded": True}
    watch_launched_runs(2, [spec], tmp_path)
    for folder in (plain, sharded):
        found = rows(folder, "tasks")
        assert [row["step"] for row in found] == [0, 5, 10, 12]
        assert metrics_of(found[-1]) == evaluate_export(folder, tasks, capsys, monkeypatch)


@pytest.mark.parametrize("fault", ["unknown", "data"])
def test_tasks_that_cannot_be_evaluated_end_the_run_before_it_begins(fault, tiny_recipe, tmp_path):
    definition = (
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\ntest_split: test\n"
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.yaml").write_text(definition + "doc_to_text: a\ndoc_to_target: b\n")
    name = {"unknown": "no_such_task", "data": "mine"}[fault]
    result = run(PYTHON, *options(tiny_recipe), "--eval_tasks", name, "--eval_task_folder", "tasks", cwd=tmp_path)
    assert result.returncode == 2 and "Plan" not in result.stdout
    said = {"unknown": "eval_tasks: unknown: no_such_task; `lm-eval ls tasks`", "data": "eval_tasks mine: "}[fault]
    assert result.stderr.splitlines()[-1].startswith(f"error: {said}"), result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "runs").exists()


OUT_OF_MEMORY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import run_clm_owt, torch
from clm_owt.model.gpt2 import GPT2ForPretraining

def exported(self, state_dict, whole=GPT2ForPretraining.exported):
    model = whole(self, state_dict)
    model.register_forward_pre_hook(lambda *_: torch.empty(2**60))
    return model

GPT2ForPretraining.exported = exported
run_clm_owt.main(sys.argv[1:])
"""


def test_memory_that_does_not_suffice_for_the_tasks_ends_the_run_in_a_line(tasks, tiny_recipe, tmp_path):
    result = run([sys.executable, "-c", OUT_OF_MEMORY], *options(tiny_recipe), *tasks, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: zero-shot tasks after step 0: out of memory")


def test_a_task_leaves_the_random_states_of_its_caller(evaluated, tasks):
    import random

    import numpy as np
    import torch

    from clm_owt.evaluation.zero_shot import ZeroShotTasks
    from clm_owt.training.checkpoint import random_state
    from clm_owt.training.trained_model import load_trained

    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    model, tokenizer = load_trained(str(evaluated / "model"))
    before, pad_token = random_state(), tokenizer.pad_token
    mine = ZeroShotTasks(["tiny_choices"], tasks[-1], key="--tasks")
    assert mine.evaluate(model, tokenizer) == mine.evaluate(model, tokenizer)
    assert random_state() == before and tokenizer.pad_token == pad_token
    with pytest.raises(KeyboardInterrupt):
        mine.evaluate(model, tokenizer, check=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert random_state() == before and not model._forward_pre_hooks
