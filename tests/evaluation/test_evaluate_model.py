"""scripts/evaluate_model.py and scripts/sample.py on the model of a real run."""

import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.local_tasks import LOCAL_ROWS, write_local_tasks
from support.runs import PYTHON, ROOT, run, timeless_metrics

from clm_owt.reports.record import read_metrics

pytestmark = pytest.mark.xdist_group("evaluate model")  # its run is shared


@pytest.fixture(scope="module")
def trained(tiny_recipe, tmp_path_factory) -> Path:
    """The folder of a run with sampling and evaluation, and with dropout, which draws random numbers."""
    home = tmp_path_factory.mktemp("trained")
    result = run(PYTHON, "--recipe", str(tiny_recipe), "--dropout", "0.1", "--run_name", "tiny", cwd=home)
    assert result.returncode == 0, result.stderr
    return home / "runs/tiny"


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs a script in an empty folder, in this process; gives its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        status = end.value.code or 0
        output, errors = capsys.readouterr()
        return subprocess.CompletedProcess(name, status, output, errors)

    return call


def test_sampling_and_evaluation_change_no_training_loss(trained, tiny_recipe, tmp_path):
    off = ["--sample_steps", "none", "--eval_steps", "1000", "--run_name", "tiny"]
    result = run(PYTHON, "--recipe", str(tiny_recipe), "--dropout", "0.1", *off, cwd=tmp_path)
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


def test_any_text_is_evaluated_and_a_stride_gives_more_context(trained, script, tmp_path):
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


MEASURED = ["--calibration", "--generation", "--prompts", 5, "--prompt_tokens", 8, "--new_tokens", 12, "--seed", 3]


def test_calibration_and_generation_are_those_of_the_model_at_the_temperature_asked_for(trained, script, tmp_path):
    from clm_owt.evaluation.calibration import calibration
    from clm_owt.evaluation.generation import generation, prompts_from
    from clm_owt.evaluation.predictions import prediction_statistics
    from clm_owt.evaluation.windows import recipe_windows
    from clm_owt.training.trained_model import load_trained

    arguments = ["--model", trained, "--recipe", trained / "recipe.yaml", *MEASURED]
    as_it_is = json.loads(script("evaluate_model.py", *arguments, "--json").stdout)
    assert as_it_is["predictions"]["temperature"] == 1
    assert as_it_is["predictions"]["ce_loss"] == pytest.approx(as_it_is["loss"], rel=1e-6)
    result = script("evaluate_model.py", *arguments, "--entropy", 4.5, "--top_p", 0.9, "--output", "a.png", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["predictions"]["entropy"] == pytest.approx(4.5, abs=1e-4)
    temperature = found["predictions"].pop("temperature")
    model, tokenizer = load_trained(str(trained))
    windows = recipe_windows(str(trained / "recipe.yaml"), tokenizer, 32, None)
    assert found["predictions"] == prediction_statistics(model, windows, 8, temperature)._asdict()
    expected = calibration(model, windows, 8, temperature)
    assert [tuple(bin.values()) for bin in found["calibration"].pop("bins")] == expected.bins
    assert tuple(found["calibration"].values()) == expected[:4]
    texts = prompts_from(windows, 5, 20)
    settings = {"new_tokens": 12, "top_p": 0.9, "model_temperature": temperature, "seed": 3, "batch_size": 8}
    assert found["generation"] == generation(model, texts[:, :8], texts[:, 8:], **settings)._asdict()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_runs_of_a_folder_are_compared_by_what_they_differ_in(trained, script, tmp_path):
    for name, weight in (("a", 0.0), ("b", 0.1)):
        shutil.copytree(trained, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("checkpoints"))
        recipe = tmp_path / "runs" / name / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("penalty_weight: 0.0", f"penalty_weight: {weight}"))
    (tmp_path / "runs/begun").mkdir()
    (tmp_path / "runs/begun/recipe.yaml").write_text("")
    arguments = ["--model", "runs", "--recipe", trained / "recipe.yaml", *MEASURED]
    result = script("evaluate_model.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "runs/begun is left out: it has no model and no checkpoint yet" in result.stderr
    tables = result.stdout.split("\n\n")[1:]
    assert [table.split("\n")[0] for table in tables] == ["predictions", "calibration", "generation"]
    for table in tables:
        rows = [line.split() for line in table.split("\n")[2:4]]
        assert [row[0] for row in rows] == ["penalty_weight=0", "penalty_weight=0.1"] and rows[0][1:] == rows[1][1:]
    listed = json.loads(script("evaluate_model.py", *arguments[:4], "--json").stdout)
    assert [found["model"] for found in listed] == ["runs/a", "runs/b"]
    alone = json.loads(script("evaluate_model.py", "--model", "runs/a", *arguments[2:4], "--json").stdout)
    assert {"model": "runs/a", **alone} == listed[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tasks", "piqa", "--calibration"], "--calibration and --generation are of a text"),
        (["--text", "a.txt", "--temperature", 0.5], "--temperature and --entropy: nothing depends on them"),
        (["--text", "a.txt", "--calibration", "--temperature", 0], "--temperature: '0' does not work"),
        (["--text", "a.txt", "--generation", "--top_p", 0], "--top_p: '0' does not work"),
        (
            ["--text", "a.txt", "--generation", "--prompts", 0],
            "--prompts: '0' does not work; expected a whole number at least 1",
        ),
        (["--text", "a.txt", "--output", "a.png"], "--output: the diagram is of --calibration"),
        (["--text", "a.txt", "--calibration", "--output", "a.svg"], "--output: 'a.svg' does not work"),
        (["--text", "a.txt", "--calibration", "--entropy", 9], "--entropy: a mean entropy of 9 nats: no temperature"),
        (["--text", "a.txt", "--generation"], "128 prompts with their continuations, 128 tokens together: the text"),
        (["--text", "a.txt", "--generation", "--prompts", 1, "--prompt_tokens", 2, "--new_tokens", 3], "3 new tokens"),
    ],
)
def test_what_cannot_be_measured_is_an_error_that_names_the_option(trained, script, tmp_path, options, expected):
    (tmp_path / "a.txt").write_text("Returns the sum of the values in a list. " * 20)
    result = script("evaluate_model.py", "--model", trained / "model", *options)
    assert result.returncode == 2 and expected in result.stderr


def test_a_folder_of_runs_without_a_model_is_an_error(script, tmp_path):
    (tmp_path / "runs/begun").mkdir(parents=True)
    (tmp_path / "runs/begun/recipe.yaml").write_text("")
    result = script("evaluate_model.py", "--model", "runs", "--text", "a.txt")
    assert result.returncode == 2
    assert "--model runs: none of its 1 runs has a model or a checkpoint yet" in result.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("evaluate_model.py", ["--model", "nowhere/at/all", "--text", "a.txt"], "--model nowhere/at/all"),
        ("sample.py", ["--model", "."], "--model .: "),
        ("sample.py", ["--model", ".", "--prompts_file", "/dev/null"], "--prompts_file: /dev/null is empty"),
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


def test_the_least_top_k_top_p_or_temperature_takes_the_likeliest_token_whatever_the_seed(trained, script):
    arguments = ["--model", trained / "model", "--prompt", "Returns", "--count", 3, "--max_new_tokens", 8, "--json"]
    texts = set()
    for option, value in (("--top_k", 1), ("--top_p", 1e-6), ("--temperature", 1e-3)):
        result = script("sample.py", *arguments, option, value)
        texts |= {json.loads(line)["text"] for line in result.stdout.splitlines()}
    assert len(texts) == 1


@pytest.mark.parametrize("way", ["run", "run without its end", "checkpoint"])
def test_a_run_and_its_checkpoints_are_sampled_and_evaluated_like_its_model(trained, script, tmp_path, way):
    run_folder = trained
    if way == "run without its end":
        shutil.copytree(trained, run_folder := tmp_path / "copy")
        shutil.rmtree(run_folder / "model")
    given = run_folder / "checkpoints/step-00000012" if way == "checkpoint" else run_folder
    sampled = ["--prompt", "Returns the", "--max_new_tokens", "12", "--json"]
    evaluated = ["--recipe", trained / "recipe.yaml", "--json"]
    for name, arguments in (("sample.py", sampled), ("evaluate_model.py", evaluated)):
        found, expected = (script(name, "--model", model, *arguments) for model in (given, trained / "model"))
        assert found.returncode == expected.returncode == 0, found.stderr
        if name == "sample.py":
            assert found.stdout == expected.stdout
        else:
            losses = [json.loads(result.stdout)["loss"] for result in (found, expected)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_damaged_checkpoint_is_not_sampled(trained, script, tmp_path):
    shutil.copytree(trained / "checkpoints/step-00000012", tmp_path / "run/checkpoints/step-00000012")
    (tmp_path / "run/checkpoints/step-00000012/model.safetensors").write_bytes(b"")
    result = script("sample.py", "--model", "run/checkpoints/step-00000012")
    assert result.returncode == 2
    assert "model.safetensors has 0 bytes instead of" in result.stderr


@pytest.mark.tasks
def test_zero_shot_tasks_run_on_local_data(trained, script, tmp_path):
    import torch.nn.functional as F

    from clm_owt.training.trained_model import load_trained

    folder, names = write_local_tasks(tmp_path)
    arguments = ["--model", trained / "model", "--tasks", *names, "--task_folder", folder, "--json"]
    result = script("evaluate_model.py", *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert {task: set(metrics) for task, metrics in found.items()} == {
        "tiny_choices": {"acc"},
        "local_lambada_openai": {"acc", "perplexity"},
        "local_wikitext": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
        "local_hellaswag": {"acc", "acc_norm"},
        "local_piqa": {"acc", "acc_norm"},
    }
    model, tokenizer = load_trained(str(trained / "model"))
    text = LOCAL_ROWS["lambada/lambada_openai"]["text"]
    ids = tokenizer(text, return_tensors="pt").input_ids
    before_last_word = len(tokenizer(text.rsplit(" ", 1)[0]).input_ids)
    losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    nll = losses[before_last_word - 1 :].sum().item()
    assert found["local_lambada_openai"]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    unknown = script("evaluate_model.py", "--model", trained / "model", "--tasks", "no_such_task")
    assert unknown.returncode == 2 and "no_such_task" in unknown.stderr


def test_published_figures_stand_beside_the_metrics():
    from clm_owt.evaluation.zero_shot import results_table

    results = {
        "lambada_openai": {"acc": 0.3, "perplexity": 50.0},
        "hellaswag": {"acc_norm": 0.31},
        "mine": {"acc": 0.6},
    }
    assert results_table(results) == (
        "task            metric         here  GPT-2 paper  GPT-2 in lm-eval\n"
        "lambada_openai  acc          0.3000       0.4599            0.3256\n"
        "lambada_openai  perplexity  50.0000        35.13             40.06\n"
        "hellaswag       acc_norm     0.3100            -            0.3114\n"
        "mine            acc          0.6000            -                 -"
    )
