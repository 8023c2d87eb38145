import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml
from support.runs import MAIN, ROOT, environment, launcher, run

from clm_owt.experiments.sweep_file import plan_grid, read_sweep
from clm_owt.recipe_reader import load_recipe

SWEEPS = [path for kind in ("sweeps", "studies") for path in sorted((ROOT / "recipes" / kind).glob("*.yaml"))]
SCRIPT = [sys.executable, str(ROOT / "scripts/sweep.py")]


# Stands for a training: a recipe of 10 steps whose loss is (λ - 0.02)² + 1 / step, and more for each seed after 42. It
# fails at λ = 0.05, and at λ = 0.01 it kills itself after 4 steps when it runs for the first time.
STAND_IN = f"""\
import json, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from clm_owt.recipe_reader import load_recipe
recipe = load_recipe(sys.argv[1:])
weight, folder = recipe.penalty_weight, Path(recipe.output_dir)
folder.mkdir(parents=True, exist_ok=True)
print("gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
(folder / "recipe.yaml").write_text(recipe.to_yaml())
(folder / "plan.json").write_text("{{}}")
metrics = folder / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
print("starts at", done, flush=True)
if weight == 0.05:
    print("error: a weight of 0.05 is too much\\nTraceback (most recent call last):\\nSystemExit: 1")
    sys.exit(1)
for step in range(done + 1, 11):
    loss = (weight - 0.02) ** 2 + 1 / step + 0.01 * (recipe.seed - 42)
    row = {{"step": step, "split": "validation", "ce_loss": loss, "perplexity": 2.0, "max_prob": 0.5, "entropy": 1.0}}
    with metrics.open("a") as file:
        file.write(json.dumps(row) + "\\n")
    if weight == 0.01 and done == 0 and step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))
(folder / "plan.json").write_text(json.dumps({{"finished": True, "elapsed_seconds": 90.0}}))
"""


@pytest.fixture
def workplace(tmp_path) -> Path:
    (tmp_path / "train.py").write_text(STAND_IN)
    settings = {"dataset_name": "python-docs", "train_tokenizer_vocab_size": 300, "effective_batch_size": 1,
                "learning_rate": 1e-3, "warmup_steps": 1, "max_steps": 10}  # fmt: skip
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def write_sweep(folder: Path, parameter: dict[str, object], **more: object) -> None:
    content = {
        "program": "train.py",
        "method": "grid",
        "metric": {"name": "validation/ce_loss", "goal": "minimize"},
        "parameters": {"recipe": {"value": "base.yaml"}, "penalty_weight": parameter},
        "command": ["${env}", "${interpreter}", "${program}", "${args}"],
    } | more
    jsonschema.validate(content, wandb_schema())
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))


def read_table(folder: Path, name: str = "table.csv") -> list[dict[str, str]]:
    with (folder / "runs/sweeps/sweep" / name).open() as file:
        return list(csv.DictReader(file))


def statuses(folder: Path) -> dict[str, str]:
    return {row["penalty_weight"]: row["status"] for row in read_table(folder)}


def wandb_schema() -> dict[str, object]:
    """W&B's own, from its package `sweeps` (which is not imported: it needs another numpy)."""
    folder = Path(importlib.util.find_spec("sweeps").submodule_search_locations[0])
    return json.loads((folder / "config/schema.json").read_text())


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_shipped_sweeps_are_accepted_by_wandbs_schema_and_by_the_local_runner(path, monkeypatch):
    content = yaml.safe_load(path.read_text())
    jsonschema.validate(content, wandb_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"method": "gird"}, wandb_schema())
    monkeypatch.chdir(ROOT)
    runs = plan_grid(read_sweep(path), [])
    assert len({run.recipe.output_dir for run in runs}) == len(runs)


def test_the_dry_run_prints_the_commands_one_a_line():
    result = run(SCRIPT, "recipes/sweeps/lambda_owt.yaml", "--dry_run", "--max_steps", "3000", cwd=ROOT)
    assert result.stdout.splitlines() == [
        "/usr/bin/env accelerate launch run_clm_owt.py --recipe=recipes/owt_512.yaml --penalty_type=non_max_sum "
        f"--penalty_weight={weight} --max_steps 3000"
        for weight in (0, 0.005, 0.01, 0.02, 0.05)
    ]
    side_by_side = run(SCRIPT, "recipes/sweeps/lr_owt.yaml", "--dry_run", "--gpus", "0,1", cwd=ROOT)
    assert side_by_side.stdout.splitlines()[3] == (
        "/usr/bin/env accelerate launch --num_processes 1 --main_process_port 0 run_clm_owt.py "
        "--recipe=recipes/owt_512.yaml --learning_rate=0.003"
    )


def test_a_grid_keeps_finished_runs_continues_killed_ones_and_survives_failures(workplace):
    write_sweep(workplace, {"values": [0, 0.01, 0.02, 0.05]})
    first = run(SCRIPT, "sweep.yaml", cwd=workplace)
    assert first.returncode == 1
    assert statuses(workplace) == {"0": "finished", "0.01": "failed (-9)", "0.02": "finished", "0.05": "failed (1)"}
    lines = first.stdout.splitlines()
    assert lines[0] == "[1/4] penalty_weight=0: running, output in runs/sweeps/sweep/base.log"
    assert re.fullmatch(r"\[1/4\] penalty_weight=0: finished, validation 0\.1004, 0:\d\d; about \S+ s left", lines[1])
    failed = next(
        i for i, line in enumerate(lines) if re.match(r"\[4/4\] penalty_weight=0\.05: failed \(1\), 0:\d", line)
    )
    assert lines[failed + 1] == "    error: a weight of 0.05 is too much"
    second = run(SCRIPT, "sweep.yaml", cwd=workplace)
    assert second.returncode == 1  # one still fails
    assert "[1/4] penalty_weight=0: finished before, kept, validation 0.1004\n" in second.stdout
    rows = read_table(workplace)
    assert [row["penalty_weight"] for row in rows] == ["0.02", "0.01", "0", "0.05"]  # the best is the first
    assert [row["status"] for row in rows] == ["finished", "finished", "finished", "failed (1)"]
    assert [row["ce_loss"] for row in rows] == ["0.1000", "0.1001", "0.1004", ""]
    assert [row["minutes"] for row in rows] == ["1.5", "1.5", "1.5", ""]
    log = (workplace / "runs/sweeps/sweep/base,penalty_weight=0.01.log").read_text()
    assert "starts at 0" in log and "starts at 4" in log
    assert len((workplace / "runs/base,penalty_weight=0.01/metrics.jsonl").read_text().splitlines()) == 10
    assert (workplace / "runs/sweeps/sweep/table.png").read_bytes().startswith(b"\x89PNG")
    table = (workplace / "runs/sweeps/sweep/table.txt").read_text()
    assert "penalty_weight  step" in table and "a difference of one seed cannot be told from chance" in table


def test_the_best_recipe_is_written_as_one_that_runs_anew(workplace, monkeypatch):
    write_sweep(workplace, {"values": [0.02, 0]})
    assert run(SCRIPT, "sweep.yaml", cwd=workplace).returncode == 0
    monkeypatch.chdir(workplace)
    best = load_recipe(["--recipe", "runs/sweeps/sweep/best.yaml"])
    assert (best.penalty_weight, best.output_dir) == (0.02, "runs/best")


def test_several_seeds_give_each_configuration_its_mean_and_its_difference_to_the_first(workplace, monkeypatch):
    write_sweep(workplace, {"values": [0, 0.04, 0.02]})
    result = run(SCRIPT, "sweep.yaml", "--seeds", "3", "--gpus", "0,1,2", cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert len(read_table(workplace)) == 9
    rows = read_table(workplace, "comparison.csv")
    found = [(row["penalty_weight"], row["seeds"], row["ce_loss"], row["difference"], row["verdict"]) for row in rows]
    assert found == [
        ("0.02", "3", "0.1100", "-0.0004", "lower"),
        ("0", "3", "0.1104", "", "reference"),
        ("0.04", "3", "0.1104", "+0.0000", "cannot be told from chance"),
    ]
    assert "the reference penalty_weight=0 (the first value of each" in " ".join(result.stdout.split())
    table = (workplace / "runs/sweeps/sweep/table.txt").read_text()
    assert table in result.stdout and "cannot be told from chance" in table
    assert (workplace / "runs/base,penalty_weight=0.02,seed=44/metrics.jsonl").exists()
    monkeypatch.chdir(workplace)
    assert "seed" not in yaml.safe_load(Path("runs/sweeps/sweep/best.yaml").read_text())
    assert (
        "penalty_weight: 0.02; validation cross-entropy 0.1100, mean of 3 seeds"
        in Path("runs/sweeps/sweep/best.yaml").read_text()
    )


def test_runs_side_by_side_have_a_gpu_each(workplace):
    write_sweep(workplace, {"values": [0, 0.02, 0.03, 0.04]})
    began = time.monotonic()
    env = environment(workplace, SECONDS_PER_STEP="0.2")
    result = run(SCRIPT, "sweep.yaml", "--gpus", "0,1,2,3", cwd=workplace, env=env)
    assert result.returncode == 0, result.stderr
    logs = [path.read_text() for path in sorted((workplace / "runs/sweeps/sweep").glob("*.log"))]
    assert sorted(log.split()[1] for log in logs) == ["0", "1", "2", "3"]
    assert time.monotonic() - began < 4 * 2  # each sleeps for 2 s


def test_an_interrupted_sweep_stops_its_run_and_goes_on_when_started_again(workplace):
    write_sweep(workplace, {"values": [0, 0.02]})
    env = environment(workplace, SECONDS_PER_STEP="0.3")
    process = subprocess.Popen([*SCRIPT, "sweep.yaml"], cwd=workplace, env=env, stdout=subprocess.PIPE, text=True)
    metrics = workplace / "runs/base/metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "Interrupted; the same command continues." in output
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert run(SCRIPT, "sweep.yaml", cwd=workplace).returncode == 0
    assert [row["step"] for row in read_table(workplace)] == ["10", "10"]


def test_a_search_runs_as_many_as_its_cap_and_remembers_them(workplace):
    write_sweep(workplace, {"min": 0.0, "max": 0.04}, method="bayes", run_cap=3)
    assert run(SCRIPT, "sweep.yaml", cwd=workplace).returncode == 0
    first = read_table(workplace)
    assert [row["status"] for row in first] == ["finished"] * 3
    assert len({row["penalty_weight"] for row in first}) == 3
    again = run(SCRIPT, "sweep.yaml", "--run_cap", "5", cwd=workplace)
    assert again.returncode == 0 and again.stdout.count("running, output") == 2
    assert len(read_table(workplace)) == 5 and all(row in read_table(workplace) for row in first)
    assert "[4/5] penalty_weight=" in again.stdout and "[5/5] penalty_weight=" in again.stdout
    losses = [float(row["ce_loss"]) for row in read_table(workplace)]
    assert losses == sorted(losses)
    best = min(float(row["ce_loss"]) for row in read_table(workplace))
    assert f"validation cross-entropy {best:.4f}" in (workplace / "runs/sweeps/sweep/best.yaml").read_text()


def test_a_search_continues_the_trial_it_was_interrupted_in(workplace):
    write_sweep(workplace, {"values": [0.01]}, method="random", run_cap=1)
    (workplace / "train.py").write_text(STAND_IN.replace("signal.SIGKILL", "0").replace("0, 1 / step", "0"))
    env = environment(workplace, SECONDS_PER_STEP="0.3")
    process = subprocess.Popen([*SCRIPT, "sweep.yaml"], cwd=workplace, env=env, stdout=subprocess.PIPE, text=True)
    metrics = workplace / "runs/base,penalty_weight=0.01/metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    result = run(SCRIPT, "sweep.yaml", cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert [(row["step"], row["status"]) for row in read_table(workplace)] == [("10", "finished")]


def test_a_search_stops_runs_that_are_behind_the_median(workplace):
    early = {"type": "hyperband", "min_iter": 2}
    write_sweep(workplace, {"min": 0.02, "max": 0.03}, method="random", run_cap=3, early_terminate=early)
    assert run(SCRIPT, "sweep.yaml", "--run_cap", "2", cwd=workplace).returncode == 0
    # Two runs have finished; a third, much worse at each step, is stopped on its way.
    (workplace / "train.py").write_text(STAND_IN.replace("1 / step +", "100 / step +"))
    env = environment(workplace, SECONDS_PER_STEP="0.5")
    result = run(SCRIPT, "sweep.yaml", cwd=workplace, env=env)
    assert result.returncode == 0, result.stderr
    rows = read_table(workplace)
    assert rows[2]["status"] == "stopped early" and 2 <= int(rows[2]["step"]) < 10


def test_values_that_make_no_recipe_are_refused_before_any_run_begins(workplace):
    write_sweep(workplace, {"values": [0, "much", 0.01, "more"]})
    result = run(SCRIPT, "sweep.yaml", cwd=workplace)
    assert result.returncode == 2
    assert "'much' does not work" in result.stderr and "'more' does not work" in result.stderr
    assert not list((workplace / "runs").glob("base*"))


def test_a_run_started_as_a_wandb_agent_does_has_its_weight_on_every_process(tiny_recipe, tmp_path):
    env = environment(tmp_path, ACCELERATE_USE_CPU="true")
    options = [f"--recipe={tiny_recipe}", "--penalty_weight=0.01", "--max_steps=4", "--sample_steps=none"]
    result = run(launcher("cpu_2proc.yaml"), *options, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs/tiny,max_steps=4,penalty_weight=0.01"
    assert json.loads((folder / "plan.json").read_text())["processes"] == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["split"] == "train":  # each process adds its own λ · penalty
            assert row["loss"] == pytest.approx(row["ce_loss"] + 0.01 * row["penalty"], rel=1e-6)
            assert row["penalty"] > 0.9


@pytest.mark.slow
def test_a_sweep_of_real_runs_ends_with_the_right_table_though_one_fails_and_one_is_killed(tiny_recipe, tmp_path):
    fixed = {"recipe": str(tiny_recipe), "max_steps": 600, "save_steps": 50, "eval_steps": 50, "sample_steps": "none"}
    content = {
        "program": MAIN,
        "method": "grid",
        # The third rate is beyond any float: the losses after the first step are not finite.
        "parameters": {name: {"value": value} for name, value in fixed.items()}
        | {"learning_rate": {"values": [1e-3, 3e-3, 1e30, 6e-3]}},
        "command": ["${env}", "${interpreter}", "${program}", "${args}"],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    killed = tmp_path / "runs" / "tiny,max_steps=600"  # 3e-3 is the recipe's own rate
    process = subprocess.Popen([*SCRIPT, "sweep.yaml"], cwd=tmp_path, env=environment(tmp_path))
    while not (killed / "checkpoints").exists() or len(list((killed / "checkpoints").glob("step-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    [training] = psutil.Process(process.pid).children()
    os.killpg(training.pid, signal.SIGKILL)
    assert process.wait(timeout=300) == 1
    by_rate = {row["learning_rate"]: row["status"] for row in read_table(tmp_path)}
    assert by_rate == {"0.001": "finished", "0.003": "failed (-9)", "1e+30": "failed (1)", "0.006": "finished"}

    again = run(SCRIPT, "sweep.yaml", cwd=tmp_path)
    assert again.stdout.count("finished before, kept") == 2
    log = (tmp_path / "runs/sweeps/sweep/tiny,max_steps=600.log").read_text()
    assert "Continuing after step" in log
    rows = read_table(tmp_path)
    assert [row["status"] for row in rows] == ["finished", "finished", "finished", "failed (1)"]
    folders = {"0.001": "tiny,learning_rate=0.001,max_steps=600", "0.003": "tiny,max_steps=600"}
    folders["0.006"] = "tiny,learning_rate=0.006,max_steps=600"
    for row in rows[:3]:
        folder = tmp_path / "runs" / folders[row["learning_rate"]]
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["split"], last["step"], row["step"]) == ("validation", 600, "600")
        assert row["ce_loss"] == f"{last['ce_loss']:.4f}"
    finished = [float(row["ce_loss"]) for row in rows if row["status"] == "finished"]
    assert f"{min(finished):.4f}" in (tmp_path / "runs/sweeps/sweep/best.yaml").read_text().splitlines()[0]
