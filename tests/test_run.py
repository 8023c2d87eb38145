"""The main job as its users start it: real processes, from the recipe to the exported model."""

import json
import shutil
import signal
import socket

import pytest
from support.disturbances import fork_builders
from support.runs import launcher, run, timeless_metrics, write_json_lines

from clm_owt.reports.curves import save_picture
from clm_owt.reports.record import RunRecord
from clm_owt.training.checkpoint import checkpoints


def test_one_process_under_accelerate_launch_does_the_same_bit_for_bit(complete_run, tiny_recipe, tmp_path):
    result = run(launcher(), "--recipe", str(tiny_recipe), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert timeless_metrics(tmp_path / "runs/tiny") == timeless_metrics(complete_run)
    assert (tmp_path / "runs/tiny/samples.md").read_text() == (complete_run / "samples.md").read_text()
    weights = "model/model.safetensors"
    assert (tmp_path / "runs/tiny" / weights).read_bytes() == (complete_run / weights).read_bytes()


def test_the_run_folder_holds_what_the_design_lists(complete_run, tmp_path):
    names = {path.name for path in complete_run.iterdir()}
    assert names == {
        "recipe.yaml",
        "plan.json",
        "run_state.json",
        "metrics.jsonl",
        "checkpoints",
        "samples.md",
        "model",
        "training_curves.png",
    }
    plan = json.loads((complete_run / "plan.json").read_text())
    assert (plan["total_steps"], plan["micro_batch"], plan["batch_arithmetic"]) == (
        12,
        8,
        "8 = 1 process × 1 micro-batch of 8",
    )
    assert plan["baselines"]["bigram"] < plan["baselines"]["unigram"]
    save_picture([RunRecord.read(complete_run)], tmp_path / "again.png")  # with these
    assert (complete_run / "training_curves.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert [path.name for path in checkpoints(complete_run / "checkpoints")] == ["step-00000012", "step-00000008"]


def test_the_metrics_hold_each_step_once_with_every_field(complete_run):
    rows = [json.loads(line) for line in (complete_run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation"]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert [row["step"] for row in validation] == [0, 5, 10, 12]
    shared = set("step split loss ce_loss penalty max_prob entropy perplexity tokens elapsed_seconds".split())
    timing = {"tokens_per_second", "step_seconds", "data_seconds"}
    assert all(row.keys() == shared | timing | {"epoch", "learning_rate", "grad_norm", "micro_batch"} for row in train)
    assert all(row.keys() == shared for row in validation)
    assert [row["tokens"] for row in train] == [256 * step for step in range(1, 13)]
    assert [row["learning_rate"] for row in train][:3] == [0.0, 1.5e-3, 3e-3]
    assert validation[-1]["loss"] < validation[0]["loss"]
    elapsed = [row["elapsed_seconds"] for row in rows]
    assert elapsed == sorted(elapsed) and 0 < elapsed[0] < elapsed[-1]


def test_the_model_is_an_ordinary_gpt2_that_a_pipeline_loads(complete_run):
    from transformers import GPT2LMHeadModel, pipeline

    generate = pipeline("text-generation", model=str(complete_run / "model"))
    assert type(generate.model) is GPT2LMHeadModel
    text = generate("Returns the", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("Returns the") and len(text) > len("Returns the")
    assert generate.model.config.activation_function == "gelu_new"
    assert generate.model.config.vocab_size == len(generate.tokenizer) == 400


def test_the_same_command_again_reports_the_finished_run(complete_run, warm, tiny_recipe):
    before = (complete_run / "metrics.jsonl").read_bytes()
    again = warm.start("run_clm_owt:main", ["--recipe", str(tiny_recipe)], cwd=complete_run.parent.parent)
    assert again.wait() == 0
    assert again.text.startswith("Finished tiny: 12 steps")
    assert "Plan" not in again.text
    assert (complete_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_stopped_after_a_checkpoint_continues_to_the_same_end_bit_for_bit(
    complete_run, warm, tiny_recipe, tmp_path, signum, status
):
    """Said once in all that has been said: how far it is from a published loss."""
    folder, argv = tmp_path / "runs/tiny", ["--recipe", str(tiny_recipe), "--milestones", "1e3=5", "2561=7.5"]
    stopped = warm.start("run_clm_owt:main", argv, cwd=tmp_path)
    while not checkpoints(folder / "checkpoints"):
        assert stopped.poll() is None, stopped.text
    stopped.send(signum)
    assert stopped.wait() == status
    assert "Traceback" not in stopped.text
    assert not (folder / "model").exists()  # it was stopped before the end
    said = stopped.text
    continued = warm.start("run_clm_owt:main", argv, cwd=tmp_path)
    assert continued.wait() == 0, continued.text
    assert "Continuing after step" in continued.text
    if signum != signal.SIGKILL:  # after which a validation may be repeated
        losses = {row["step"]: row["loss"] for row in timeless_metrics(folder) if row["split"] == "validation"}
        lines = [line.partition("; ")[2] for line in (said + continued.text).splitlines() if "published" in line]
        assert lines == [
            f"published at 1 k tokens: 5, this run is {losses[5] - 5:.3f} above it",
            f"published at 2.561 k tokens: 7.5, this run is {7.5 - losses[12]:.3f} below it",
        ]
    assert timeless_metrics(folder) == timeless_metrics(complete_run)
    assert (folder / "samples.md").read_text() == (complete_run / "samples.md").read_text()
    assert (folder / "model/model.safetensors").read_bytes() == (complete_run / "model/model.safetensors").read_bytes()


def test_a_second_start_in_the_folder_of_a_run_is_refused_and_changes_nothing(
    complete_run, warm, tiny_recipe, tmp_path
):
    """The first one stands still meanwhile, and is killed after that."""
    folder, argv = tmp_path / "runs/tiny", ["--recipe", str(tiny_recipe)]
    first = warm.start("run_clm_owt:main", argv, cwd=tmp_path, name="first")
    while not checkpoints(folder / "checkpoints"):
        assert first.poll() is None, first.text
    first.send(signal.SIGSTOP)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    second = warm.start("run_clm_owt:main", argv, cwd=tmp_path, name="second")
    assert second.wait() == 2
    assert f"output_dir: process {first.pid} on {socket.gethostname()} has been running in runs/tiny" in second.text
    assert f"waiting for process {first.pid} on {socket.gethostname()} to leave runs/tiny: 2 s so far" in second.text
    assert "Plan" not in second.text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    first.send(signal.SIGKILL)
    first.wait()
    third = warm.start("run_clm_owt:main", argv, cwd=tmp_path, name="third")
    assert third.wait() == 0, third.text
    assert timeless_metrics(folder) == timeless_metrics(complete_run)
    assert not (folder / ".lock").exists()


def test_a_finished_run_without_its_model_and_metrics_exports_it_again(complete_run, warm, tiny_recipe, tmp_path):
    folder = tmp_path / "runs/tiny"
    shutil.copytree(complete_run, folder)
    shutil.rmtree(folder / "model")
    (folder / "metrics.jsonl").unlink()
    again = warm.start("run_clm_owt:main", ["--recipe", str(tiny_recipe)], cwd=tmp_path)
    assert again.wait() == 0, again.text
    assert "The run is finished, but lacks model/: exported again from its newest checkpoint" in again.text
    assert "Continuing after step 12" in again.text
    assert "metrics.jsonl is missing: it begins after step 12" in again.text
    assert "is missing or holds no rows: losses and speed are not known" in again.text
    assert (folder / "model/model.safetensors").read_bytes() == (complete_run / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("key", "place", "more"),
    [
        ("output_dir", "a_file", []),
        ("output_dir", "a_file", ["--plan_only"]),
        ("output_dir", "/proc/nowhere", []),
        ("data_cache_dir", "a_file", []),
        ("data_cache_dir", "/proc/nowhere", []),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_found_before_the_plan(warm, tiny_recipe, tmp_path, key, place, more):
    (tmp_path / "a_file").touch()
    argv = ["--recipe", str(tiny_recipe), f"--{key}", str(tmp_path / place), *more]
    job = warm.start("support.disturbances:run_disturbed", argv, [fork_builders], cwd=tmp_path)
    assert job.wait() == 2, job.text
    assert job.errors.read_text().startswith(f"error: {key}: {tmp_path / place}")
    assert job.text.count("\n") == 1, job.text


def test_a_folder_that_holds_another_run_is_refused_with_the_way_on(complete_run, warm, tiny_recipe):
    before = sorted(path.name for path in complete_run.rglob("*"))
    options = ["--recipe", str(tiny_recipe), "--learning_rate", "1e-3", "--output_dir", str(complete_run)]
    refused = warm.start("run_clm_owt:main", options, cwd=complete_run.parent.parent)
    assert refused.wait() == 2
    assert "holds another run (learning_rate: 0.003 -> 0.001)" in refused.text
    assert f"--init_from {complete_run}/model --output_dir" in refused.text
    assert sorted(path.name for path in complete_run.rglob("*")) == before


def test_the_plan_alone_trains_nothing_and_leaves_no_run_folder(warm, tiny_recipe, tmp_path):
    plan = warm.start("run_clm_owt:main", ["--recipe", str(tiny_recipe), "--plan_only"], cwd=tmp_path)
    assert plan.wait() == 0, plan.text
    assert "12 steps of 256 tokens" in plan.text
    assert not (tmp_path / "runs").exists()


BAD_DATA = {
    "an empty file": (lambda folder: (folder / "x.jsonl").write_text(""), []),
    "empty documents only": (lambda folder: write_json_lines(folder / "x.jsonl", ["", ""]), []),
    "a corpus shorter than a block": (lambda folder: write_json_lines(folder / "x.jsonl", ["a b", "c d"]), []),
    "a missing column": (lambda folder: write_json_lines(folder / "x.jsonl", ["a" * 99] * 9), ["--text_column=body"]),
    "a number for text": (lambda folder: (folder / "x.jsonl").write_text('{"text": 5}\n'), []),
    "no JSON": (lambda folder: (folder / "x.jsonl").write_text("what\n"), []),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_trained_on_is_named_and_nothing_is_written(warm, tiny_recipe, tmp_path, name):
    write, options = BAD_DATA[name]
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    cache = tmp_path / "cache"
    more = ["--data_files", str(folder / "x.jsonl"), "--data_cache_dir", str(cache), "--validation_documents=1"]
    argv = ["--recipe", str(tiny_recipe), *more, *options]
    job = warm.start("support.disturbances:run_disturbed", argv, [fork_builders], cwd=tmp_path)
    assert job.wait() == 2, job.text
    assert "Traceback" not in job.text
    lines = job.errors.read_text().strip().splitlines()
    assert 1 <= len(lines) <= 3, lines
    assert lines[0].startswith("error: ")
    assert not (tmp_path / "runs").exists()
    assert not cache.exists() or not list(cache.rglob("*")), list(cache.rglob("*"))
