"""Recorded results: what a record holds, what running it again says, and the board of those in the repository."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from record import main
from support.runs import ROOT, environment, run

from clm_owt.errors import InputError
from clm_owt.experiments.board import board
from clm_owt.experiments.recorded_result import thinned
from clm_owt.recipe_reader import load_recipe
from clm_owt.reports.record import read_metrics

QUICKSTART = "recipes/quickstart_adamw.yaml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def write_run(folder: Path, loss: float, *options: str, precision: str = "no", elapsed: float = 100.0, **plan) -> Path:
    """A finished run of the quickstart, as far as a record reads it."""
    folder.mkdir(parents=True)
    recipe = load_recipe(["--recipe", QUICKSTART, "--output_dir", str(folder), *options])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    machine = {"device_type": "cpu", "processes": 1, "mixed_precision": precision}
    on = {"git_commit": "abc", "python": "3.12.1", "packages": {"torch": "2.13.0"}, "device": "CPU", "cores": 2,
          "threads": 1}  # fmt: skip
    whole = {"finished": True, "processes": 1, "store": "docs-1", "environment": on, "elapsed_seconds": 200.0}
    (folder / "plan.json").write_text(json.dumps(whole | {"micro_batch_search": {"machine": machine}} | plan))
    steps = [(0, 8.0), (175, loss + 1), (350, loss)]
    rows = [{"step": step, "split": "validation", "ce_loss": value, "tokens": 4096 * step,
             "elapsed_seconds": elapsed * step / 350} for step, value in steps]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder.parent / f"{folder.name}.log").write_text(f"written to {folder}\nread /home/me/notes.txt, 5 tokens/s\n")
    return folder


def add(folder: Path, name: str, runs: list[Path], *options: str) -> dict:
    """The record.yaml of the record `name` of these runs."""
    given = ["--claim", "It helps", "--folder", str(folder / "records"), "--logs", str(runs[0].parent), *options]
    assert main(["add", name, "--runs", *map(str, runs), *given]) == 0
    return yaml.safe_load((folder / "records" / name / "record.yaml").read_text())


def seeded(folder: Path, name: str, losses: list[float], *options: str) -> list[Path]:
    return [write_run(folder / f"{name}_s{s}", loss, "--seed", str(s), *options) for s, loss in enumerate(losses)]


def test_a_record_has_the_settings_their_commands_and_their_paired_difference(tmp_path):
    runs = seeded(tmp_path, "adamw", [4.0, 4.2, 4.1])
    runs += seeded(tmp_path, "muon", [3.0, 3.2, 3.0], "--optimizer", "muon")
    tuning = write_run(tmp_path / "slow", 5.0, "--learning_rate", "1e-3")
    record = add(tmp_path, "muon", runs, "--table", "tokens", "--tuning", str(tuning))
    adamw, muon = record["settings"]
    assert (adamw["name"], muon["name"]) == ("the recipe as it is", "optimizer=muon")
    assert muon["command"] == (
        "OMP_NUM_THREADS=1 accelerate launch --config_file accelerate_configs/cpu.yaml run_clm_owt.py "
        f"--recipe {QUICKSTART} --optimizer muon --seed SEED"
    )
    assert (adamw["loss"], adamw["standard_deviation"]) == (4.1, 0.1)
    assert [(r["run"], r["seed"], r["loss"]) for r in muon["runs"]] == [("muon_s0", 0, 3.0), ("muon_s1", 1, 3.2),
                                                                       ("muon_s2", 2, 3.0)]  # fmt: skip
    # Differences -1, -1, -1.1: Student's t of 2 degrees of freedom is 4.3027, the standard error 1/30.
    [difference] = record["comparison"]["differences"].values()
    assert difference["mean"] == pytest.approx(-31 / 30, abs=1e-6)
    assert difference["interval_95"] == pytest.approx([-31 / 30 - 4.30265 / 30, -31 / 30 + 4.30265 / 30], abs=1e-5)
    assert record["tuning"][0]["setting"] == "learning_rate=0.001" and record["tuning"][0]["loss"] == 5.0
    assert record["environment"]["machine"] == {"processor": "CPU", "cores": 2, "threads": 1}
    text = (tmp_path / "records/README.md").read_text()
    [first, second] = re.findall(r"^\| \d.*", text, re.MULTILINE)
    assert first.startswith("| 3.0667 ± 0.1155 | 3 seeds | optimizer=muon") and "-1.0333 [-1.1768, -0.8899]" in first
    assert second.startswith("| 4.1000 ± 0.1000 | 3 seeds | the recipe as it is")


def test_a_record_keeps_no_place_of_the_machine_that_it_ran_on(tmp_path):
    uploads = [
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "me/mine",
        "--checkpoint_mirror",
        f"file://{tmp_path}/mirror",
    ]
    [run] = seeded(tmp_path, "a", [4.0], *uploads)
    [setting] = add(tmp_path, "a", [run])["settings"]
    kept = tmp_path / "records/a/runs/a_s0"
    again = load_recipe(["--recipe", str(kept / "recipe.yaml")])
    assert (again.push_to_hub, again.hub_model_id, again.checkpoint_mirror) == (False, None, None)
    assert setting["name"] == "the recipe as it is"
    assert (kept / "log.txt").read_text() == "written to runs/a_s0\nread …/notes.txt, 5 tokens/s\n"
    assert all(str(tmp_path) not in file.read_text() for file in kept.iterdir())
    assert (kept / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_a_study_s_report_is_kept_without_the_output_of_its_runs(tmp_path):
    study = tmp_path / "study"
    (study / "measures").mkdir(parents=True)
    kept = ("report.html", "report.md", "effects.csv", "drift.png", "study.yaml", "study.log")
    for name in (*kept, "quickstart,seed=1.log"):
        (study / name).write_text(name)
    add(tmp_path, "a", seeded(tmp_path, "a", [4.0]), "--report", str(study))
    found = {file.name: file.read_text() for file in (tmp_path / "records/a/report").iterdir()}
    assert found == {name: name for name in kept}


def test_single_runs_say_so_and_take_their_deviation_from_a_record_with_seeds(tmp_path):
    add(tmp_path, "seeds", seeded(tmp_path, "a", [4.0, 4.2]))
    base, bf16 = write_run(tmp_path / "b", 4.0), write_run(tmp_path / "c", 4.1, precision="bf16")
    record = add(tmp_path, "single", [base, bf16], "--table", "tried", "--spread_of", "seeds/a_s1")
    assert record["settings"][1]["name"] == "the recipe as it is, with cpu_bf16.yaml"
    assert record["settings"][1]["standard_deviation"] == pytest.approx(0.141421)
    text = " ".join((tmp_path / "records/README.md").read_text().split())
    row = (
        "It helps | the recipe as it is, with cpu_bf16.yaml | 4.1000, one seed | 4.0000, one seed | +0.1000, one seed"
    )
    assert row in text


def test_the_loss_after_three_minutes_is_that_of_the_last_validation_within_them(tmp_path):
    fast, slow = write_run(tmp_path / "fast", 4.0, elapsed=179.0), write_run(tmp_path / "slow", 4.0, elapsed=181.0)
    [setting] = add(tmp_path, "fast", [fast], "--table", "minutes")["settings"]
    assert (setting["loss"], setting["runs"][0]["step"]) == (4.0, 350)
    [setting] = add(tmp_path, "slow", [slow], "--table", "minutes")["settings"]
    assert (setting["loss"], setting["runs"][0]["step"]) == (5.0, 175)
    with pytest.raises(InputError, match="no validation in its metrics"):
        add(tmp_path, "slowest", [write_run(tmp_path / "slowest", 4.0, elapsed=1000.0)], "--table", "minutes")


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ({"store": "docs-2"}, ["--table", "tokens"], "read the token store docs-2, those of the board docs-1"),
        ({"environment": {"python": "3", "packages": {}, "device": "CPU", "git_commit": "a"}}, [], "give --cores and"),
        ({"micro_batch_search": {"machine": {"device_type": "cuda", "processes": 8, "mixed_precision": "bf16"}}}, [],
         "8 processes on cuda, mixed_precision bf16: name the configuration"),
    ],
)  # fmt: skip
def test_runs_that_make_no_record_are_refused_with_the_reason(tmp_path, plan, options, message):
    add(tmp_path, "first", [write_run(tmp_path / "a", 4.0)], "--table", "tokens")
    with pytest.raises(InputError, match=message):
        add(tmp_path, "second", [write_run(tmp_path / "b", 4.0, **plan)], *options)
    assert not (tmp_path / "records/second").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, f"NAME: {name!r} does not work") for name in ("", ".", "..", "first/..", "a/b")),
        ("notes", "--replace: .*/records/notes has no record.yaml"),
    ],
)
def test_nothing_but_a_record_is_ever_replaced(tmp_path, name, message):
    runs = [write_run(tmp_path / "a", 4.0)]
    add(tmp_path, "first", runs)
    (tmp_path / "records/notes").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        add(tmp_path, name, runs, "--replace")
    assert sorted(tmp_path.rglob("*")) == before
    add(tmp_path, "first", runs, "--replace")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ("settings: []", "claim is missing"),
        ("claim: x\ntable: null\nsettings: []", "settings is missing"),
        ("claim: x\ntable: null\nsettings: [{}]", r"settings\[0\]\.name is missing"),
        ("claim: x\ntable: null\nsettings: [a]", r"settings\[0\] is missing"),
        ("[a]", "all of it is missing"),
        ("[" * 3000, "cannot be read"),
        (None, "environment is missing"),
    ],
)
def test_a_damaged_record_is_named_with_what_it_lacks(tmp_path, text, lacking):
    record = add(tmp_path, "first", [write_run(tmp_path / "a", 4.0)])
    del record["environment"]
    (tmp_path / "records/first/record.yaml").write_text(yaml.safe_dump(record) if text is None else text)
    for command in (["reproduce", "first"], ["board"]):
        with pytest.raises(InputError, match=rf"records/first/record\.yaml .*{lacking}"):
            main([*command, "--folder", str(tmp_path / "records")])


def test_a_branch_is_recorded_where_its_recipe_gives_the_same_run_without_a_trunk(tmp_path):
    trunk = write_run(tmp_path / "trunk", 4.0, "--lr_schedule", "wsd")
    (checkpoint := trunk / "checkpoints/step-00000175").mkdir(parents=True)
    leaving = ["--lr_schedule", "wsd", "--decay_share", "0.4", "--branch_from", str(checkpoint)]
    for name, rate, recorded in (("constant", 4e-3, True), ("decaying", 3e-3, False)):
        branch = write_run(tmp_path / name, 3.9, *leaving, resumed_after=[175])
        with (branch / "metrics.jsonl").open("a") as file:
            for step, learning_rate in ((100, 4e-3), (170, rate), (340, 1e-3)):
                file.write(json.dumps({"step": step, "split": "train", "learning_rate": learning_rate}) + "\n")
        if recorded:
            [setting] = add(tmp_path, name, [branch])["settings"]
            assert setting["name"] == "lr_schedule=wsd, decay_share=0.4"
        else:
            with pytest.raises(InputError, match="the run has no beginning of its own to repeat"):
                add(tmp_path, name, [branch])


def test_runs_of_different_ground_or_of_one_seed_twice_are_no_one_record(tmp_path):
    a, b = write_run(tmp_path / "a", 4.0), write_run(tmp_path / "b", 4.0)
    with pytest.raises(InputError, match="several runs of the recipe as it is have the same seed"):
        add(tmp_path, "twice", [a, b])
    plan = json.loads((b / "plan.json").read_text())
    plan["environment"]["packages"]["torch"] = "2.14.0"
    (b / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match=r"a and b ran on different ground: torch 2\.13\.0 -> 2\.14\.0"):
        add(tmp_path, "mixed", [a, b])
    add(tmp_path, "one", [a])
    with pytest.raises(InputError, match="is there already"):
        add(tmp_path, "one", [a])
    (tmp_path / "a.log").unlink()
    with pytest.raises(InputError, match=r"--logs: there is no .*a\.log"):
        add(tmp_path, "two", [a])
    assert {path.name for path in (tmp_path / "records").iterdir()} == {"one", "README.md"}


def test_of_long_metrics_validations_and_every_tenth_training_row_are_kept():
    rows = [{"split": "validation" if step % 50 == 0 else "train", "step": step} for step in range(101)]
    kept = [json.loads(line) for line in thinned([json.dumps(row) + "\n" for row in rows])]
    assert [row["step"] for row in kept if row["split"] == "validation"] == [0, 50, 100]
    assert [row["step"] for row in kept if row["split"] == "train"] == [10, 20, 30, 40, 51, 61, 71, 81, 91]


def test_a_recorded_run_gives_the_same_bits_again_and_a_changed_one_is_judged_by_the_seeds(
    complete_run, tiny_recipe, tmp_path, capsys
):
    folder, output = tmp_path / "records", tmp_path / "again"
    where = ["--claim", "x", "--recipe", str(tiny_recipe), "--folder", str(folder)]
    assert main(["add", "tiny", "--runs", str(complete_run), *where]) == 0
    command = ["reproduce", "tiny", "--folder", str(folder), "--output", str(output)]
    script = [sys.executable, str(ROOT / "scripts/record.py")]
    result = run(script, *command, cwd=ROOT, env=environment(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "tiny: the same bits: all values but times of 16 rows" in result.stdout
    assert len(list(output.glob("tiny/tiny/model/*.safetensors"))) == 1

    recorded = folder / "tiny/runs/tiny/metrics.jsonl"
    rows = read_metrics(recorded)
    rows[-1]["ce_loss"] += 0.01
    recorded.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "tiny/record.yaml"
    record = yaml.safe_load(path.read_text())
    record["environment"]["packages"]["torch"] = "2.0.0"
    for deviation, status, verdict in (
        (0.005, 0, "within 2 standard deviations over seeds (0.0050)"),
        (0.003, 1, "differs by 3.3 standard deviations over seeds (0.0030)"),
        (None, 1, "differs; of one seed, so that no standard deviation over seeds is known"),
    ):
        record["settings"][0]["standard_deviation"] = deviation
        path.write_text(yaml.safe_dump(record))
        capsys.readouterr()
        assert main(command) == status
        printed = capsys.readouterr().out
        assert verdict in printed and "torch 2.0.0 -> " in printed and "step 12 (validation): ce_loss" in printed
    with pytest.raises(InputError, match="tiny has no run big; it has tiny, or all"):
        main([*command, "--runs", "big"])
    with pytest.raises(InputError, match=r"there is no record tin in .*; there are: tiny"):
        main(["reproduce", "tin", "--folder", str(folder)])


# The records of the repository

RECORDS = sorted(path.parent for path in (ROOT / "records").glob("*/record.yaml"))


def test_the_board_is_up_to_date():
    assert (ROOT / "records/README.md").read_text(encoding="utf-8") == board(ROOT / "records"), (
        "python scripts/record.py board"
    )


@pytest.mark.parametrize("folder", RECORDS, ids=lambda folder: folder.name)
def test_what_a_record_claims_is_in_its_runs(folder):
    record = yaml.safe_load((folder / "record.yaml").read_text(encoding="utf-8"))
    entries = [run for setting in record["settings"] for run in setting["runs"]] + record.get("tuning", [])
    assert sorted(entry["run"] for entry in entries) == sorted(run.name for run in (folder / "runs").iterdir())
    for entry in entries:
        kept = folder / "runs" / entry["run"]
        losses = {r["step"]: r["ce_loss"] for r in read_metrics(kept / "metrics.jsonl") if r["split"] == "validation"}
        assert losses[entry["step"]] == entry["loss"]
        assert yaml.safe_load((kept / "recipe.yaml").read_text(encoding="utf-8"))["seed"] == entry["seed"]
        for file in kept.iterdir():
            assert not re.search(r"/(tmp|home|root|Users)/", file.read_text(encoding="utf-8")), file
