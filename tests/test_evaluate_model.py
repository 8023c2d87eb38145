"""scripts/evaluate_model.py and scripts/sample.py on the model of a real run."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from runs import PYTHON, ROOT, run, timeless_metrics

from clm_owt.metrics import read_metrics

TASK = """\
task: tiny_choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def trained(tiny_recipe, tmp_path_factory) -> Path:
    """The folder of a run with sampling and evaluation."""
    home = tmp_path_factory.mktemp("trained")
    result = run(PYTHON, "--recipe", str(tiny_recipe), cwd=home)
    assert result.returncode == 0, result.stderr
    return home / "runs/tiny"


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Calls a script's `main` in an empty folder; gives its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        module = runpy.run_path(str(ROOT / "scripts" / name))
        status = 0
        try:
            module["main"]([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        output, errors = capsys.readouterr()
        return subprocess.CompletedProcess(name, status, output, errors)

    return call


def test_sampling_and_evaluation_change_no_training_loss(trained, tiny_recipe, tmp_path):
    off = ["--sample_steps", "none", "--eval_steps", "1000", "--run_name", "tiny"]
    result = run(PYTHON, "--recipe", str(tiny_recipe), *off, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with_both, without = (
        [row for row in timeless_metrics(folder) if row["split"] == "train"]
        for folder in (trained, tmp_path / "runs/tiny")
    )
    assert with_both == without
    weights = "model/model.safetensors"
    assert (trained / weights).read_bytes() == (tmp_path / "runs/tiny" / weights).read_bytes()


def test_a_recipes_validation_set_gives_the_loss_of_the_run(trained, script):
    arguments = ["--model", trained / "model", "--recipe", trained / "recipe.yaml", "--json"]
    result = script("evaluate_model.py", *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    last = [row for row in read_metrics(trained / "metrics.jsonl") if row["split"] == "validation"][-1]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(last["perplexity"], rel=1e-5)
    plan = json.loads((trained / "plan.json").read_text())
    assert found["n_tokens"] == plan["validation_blocks"] * 31


def test_any_text_is_evaluated_and_more_context_is_told_by_the_stride(trained, script, tmp_path):
    (tmp_path / "a.txt").write_text("Returns the sum of the values in a list. " * 20)
    found = {}
    for stride in (None, 8):
        options = ["--stride", stride] if stride else []
        arguments = ["--model", trained / "model", "--text", "a.txt", "--json", *options]
        result = script("evaluate_model.py", *arguments)
        assert result.returncode == 0, result.stderr
        found[stride] = json.loads(result.stdout)
    assert found[8]["n_tokens"] > found[None]["n_tokens"]
    assert all(r["perplexity"] == pytest.approx(math.exp(r["loss"])) for r in found.values())


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("evaluate_model.py", ["--model", "nowhere/at/all", "--text", "a.txt"], "--model nowhere/at/all"),
        ("sample.py", ["--model", "."], "--model .: "),
    ],
)
def test_a_model_that_is_not_there_is_an_error_of_a_line_or_two(script, name, arguments, expected):
    result = script(name, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {expected}") and len(result.stderr.splitlines()) <= 3


def test_samples_are_the_same_for_the_same_seed_as_json_and_streamed(trained, script, tmp_path):
    (tmp_path / "prompts.txt").write_text("This module\n")
    arguments = ["--model", trained / "model", "--prompt", "Returns the", "--prompts_file", "prompts.txt"]
    arguments += ["--count", "2", "--max_new_tokens", "12", "--seed", "5"]
    result = script("sample.py", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("Returns the", 5),
        ("Returns the", 6),
        ("This module", 5),
        ("This module", 6),
    ]
    assert rows[0]["text"] != rows[1]["text"]
    command = [sys.executable, ROOT / "scripts/sample.py", *arguments]
    streamed = run([str(word) for word in command], cwd=tmp_path)
    assert streamed.stdout.split() == " ".join(row["prompt"] + row["text"] for row in rows).split()


def test_a_top_k_of_one_takes_the_likeliest_token_whatever_the_seed(trained, script):
    arguments = ["--model", trained / "model", "--prompt", "Returns", "--count", "3", "--top_k", "1", "--json"]
    result = script("sample.py", *arguments, "--max_new_tokens", "8")
    assert len({json.loads(line)["text"] for line in result.stdout.splitlines()}) == 1


@pytest.mark.tasks
def test_zero_shot_tasks_run_on_local_data(trained, script, tmp_path):
    data = tmp_path / "choices.jsonl"
    rows = [{"question": f"Is {n} even?", "answer": n % 2} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny_choices.yaml").write_text(TASK.format(data=json.dumps(str(data))))
    arguments = ["--model", trained / "model", "--tasks", "tiny_choices", "--task_folder", folder]
    result = script("evaluate_model.py", *arguments)
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("tiny_choices"))
    assert line.split()[1] == "acc" and 0 <= float(line.split()[2]) <= 1
    unknown = script("evaluate_model.py", "--model", trained / "model", "--tasks", "no_such_task")
    assert unknown.returncode == 2 and "no_such_task" in unknown.stderr


def test_published_figures_stand_beside_the_metrics():
    from clm_owt.zero_shot import describe

    lines = describe({"hellaswag": {"acc": 0.3, "acc_norm": 0.31}, "piqa": {"acc": 0.6}})
    assert "0.294 (OpenAI's weights, by llm.c)" in lines[2]
    assert lines[1].endswith("-") and lines[3].endswith("-")
