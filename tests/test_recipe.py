import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clm_owt.errors import RecipeError
from clm_owt.recipe import FIELDS, GROUPS
from clm_owt.recipe_reader import OTHER_NAMES, load_recipe
from clm_owt.reports.record import read_recipe

ROOT = Path(__file__).parent.parent
REQUIRED = {
    "dataset_name": "python-docs",
    "train_tokenizer_vocab_size": "512",
    "effective_batch_size": "8",
    "learning_rate": "1e-3",
    "warmup_steps": "2",
    "max_steps": "10",
}


def words(**changes: str | None) -> list[str]:
    settings = REQUIRED | changes
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def problems(argv: list[str]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(argv)
    return caught.value.problems


def recipe_file(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "trial.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--recipe", str(path)]


FILE = "\n".join(f"{name}: {value}" for name, value in REQUIRED.items()) + "\n"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(recipe):
    assert load_recipe(["--recipe", str(recipe)]).run_name == recipe.stem


def test_the_real_recipe_holds_the_guide_s_settings():
    recipe = load_recipe(["--recipe", str(ROOT / "recipes/owt_512.yaml")])
    assert (recipe.effective_batch_size, recipe.learning_rate, recipe.warmup_steps) == (512, 3e-3, 2000)
    assert (recipe.min_lr_ratio, recipe.num_train_epochs, recipe.eval_steps, recipe.block_size) == (0.1, 2, 500, 1024)
    assert (recipe.dataset_name, recipe.tokenizer_name) == ("Skylion007/openwebtext", "openai-community/gpt2")
    assert recipe.total_steps() == 34_480


def test_the_command_line_wins_over_the_file_in_both_forms(tmp_path):
    argv = recipe_file(tmp_path, FILE)
    assert load_recipe([*argv, "--penalty_weight", "0.01"]).penalty_weight == 0.01
    assert load_recipe([*argv, "--penalty_weight=-1e-2"]).penalty_weight == -0.01
    assert load_recipe([*argv, "--penalty_weight", "-0.01"]).penalty_weight == -0.01
    assert load_recipe([*argv, "--penalty_weight", "-1e-2"]).penalty_weight == -0.01
    assert load_recipe([*argv, "--sample_prompts", "one two", "three"]).sample_prompts == ("one two", "three")
    assert load_recipe([*argv, "--seed", "7"]).seed == 7


def test_none_sets_a_key_to_null(tmp_path):
    argv = recipe_file(tmp_path, FILE + "sample_steps: 5\nreport_to: []\n")
    assert load_recipe(argv).sample_steps == 5
    assert load_recipe([*argv, "--sample_steps", "none"]).sample_steps is None
    assert load_recipe([*argv, "--report_to=none"]).report_to == ()


@pytest.mark.parametrize(
    ("text", "number"),
    [("3e-3", 3e-3), ("010", 10), ("1_0.5", 10.5), ("+.5E+1", 5), ("1.", 1), ("-7e-1", -0.7), ("1:10", None),
     ("0x10", None), ("0o10", None), ("0b1", None), ("1__0", None), ("2024-02-28", None)],
)  # fmt: skip
def test_a_number_is_in_a_file_what_it_is_as_an_option(tmp_path, text, number):
    given = recipe_file(tmp_path, FILE + f"penalty_weight: {text}\n"), words(penalty_weight=text)
    if number is None:
        assert all("expected a number such as 3e-3" in problem for argv in given for problem in problems(argv))
    else:
        assert [load_recipe(argv).penalty_weight for argv in given] == [number, number]


def test_a_run_is_named_after_the_recipe_and_what_the_command_line_changes_in_its_result(tmp_path):
    argv = recipe_file(tmp_path, FILE + "penalty_weight: 0.0\n")
    assert load_recipe(argv).output_dir == "runs/trial"
    assert load_recipe([*argv, "--penalty_weight", "0.01"]).run_name == "trial,penalty_weight=0.01"
    assert load_recipe([*argv, "--max_steps", "3"]).output_dir == "runs/trial,max_steps=3"
    unchanged = ["--penalty_weight", "0", "--logging_steps", "1", "--report_to", "none", "--max_batch_size", "2"]
    assert load_recipe([*argv, *unchanged]).run_name == "trial"
    assert load_recipe([*argv, "--run_name", "mine"]).output_dir == "runs/mine"


def test_a_long_value_is_shortened_in_the_name_and_still_told_from_others(tmp_path):
    argv = recipe_file(tmp_path, FILE)
    files = [tmp_path / f"{'long' * 20}-{n}.txt" for n in range(2)]
    for file in files:
        file.write_text("x")
    text = ["--dataset_name", "text", "--data_files"]
    names = [load_recipe([*argv, *text, str(file)]).run_name for file in files]
    assert names[0] != names[1] and all(len(name) < 80 for name in names)
    assert load_recipe([*argv, *text, str(files[0])]).run_name == names[0]


def test_the_recipe_of_a_run_goes_on_where_it_lies(tmp_path):
    run = tmp_path / "moved"
    run.mkdir()
    (run / "recipe.yaml").write_text(load_recipe(words(output_dir="runs/where_it_was")).to_yaml())
    argv = ["--recipe", str(run / "recipe.yaml")]
    assert load_recipe(argv).output_dir == "runs/where_it_was"  # a recipe of that name, and no run
    (run / "plan.json").write_text("{}")
    assert load_recipe(argv).output_dir == str(run)
    assert load_recipe([*argv, "--output_dir", "runs/elsewhere"]).output_dir == "runs/elsewhere"


@pytest.mark.parametrize(
    ("given", "meant"),
    [("--lr", "learning_rate"), ("--epochs", "num_train_epochs"), ("--batch_size", "effective_batch_size"),
     ("--plan-only", "plan_only"), ("--learning-rate", "learning_rate"), ("--block_sise", "block_size")],
)  # fmt: skip
def test_an_unknown_option_is_met_by_the_right_one(given, meant):
    assert problems([*words(), given, "1"]) == [f"command line: unknown key {given}; did you mean {meant}?"]


def test_what_other_programs_call_a_key_is_no_key_here():
    assert not OTHER_NAMES.keys() & FIELDS.keys() and set(OTHER_NAMES.values()) <= FIELDS.keys()


def test_trackers_with_commas_are_met_by_spaces():
    [problem] = problems(words(report_to="wandb,tensorboard"))
    assert problem.endswith("several are separated by spaces: wandb tensorboard")


def test_a_file_that_cannot_be_read_is_the_one_thing_said(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: [1")
    assert len(problems(["--recipe", str(tmp_path / "mine.yaml"), "--what", "1"])) == 1
    [missing] = problems(["--recipe", str(tmp_path / "mime.yaml"), "--what", "1"])
    assert missing == f"--recipe: there is no file mime.yaml in {tmp_path}; did you mean mine.yaml?"
    [no_folder] = problems(["--recipe", str(tmp_path / "nowhere/mine.yaml")])
    assert no_folder.endswith(f"and no folder {tmp_path}/nowhere")


def test_help_groups_the_keys_and_gives_choices_and_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        load_recipe(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for group in GROUPS.values():
        assert f" {group}: --" in text
    assert "AdamW" in text and "(default: adamw; one of adamw, muon)" in text and "(required; at least 1)" in text
    assert "None" not in text and "MISSING" not in text


@pytest.mark.parametrize("run_name", ["trial", "09", "1e-3", "1:10", "2024-02-30", "no"])
def test_a_recipe_written_out_reads_back_the_same(tmp_path, run_name):
    prompts = {"sample_prompts": "λ: 'quoted'", "data_cache_dir": "/tmp/é", "run_name": run_name}
    recipe = load_recipe([*words(**prompts), *MILESTONES])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(["--recipe", str(path)]) == recipe
    assert read_recipe(tmp_path) == recipe.to_dict()


def test_a_validation_set_held_out_otherwise_leaves_no_validation_documents(tmp_path):
    argv = recipe_file(tmp_path, FILE)
    recipe = load_recipe([*argv, "--validation_share", "0.1"])
    assert (recipe.validation_documents, recipe.validation_key) == (None, "validation_share")
    assert recipe.run_name == "trial,validation_share=0.1"
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(["--recipe", str(tmp_path / "again.yaml")]) == recipe
    assert load_recipe(argv).validation_key == "validation_documents"


def test_all_problems_are_reported_at_once(tmp_path):
    text = "dataset_name: text\nblock_sise: 1\nlearning_rate: fast\nn_embd: 100\nwarmup_steps: 50\nmax_steps: 20\n"
    found = problems([*recipe_file(tmp_path, text), "--seed", "x", "--what", "1"])
    for expected in (
        "block_sise; did you mean block_size?",
        "learning_rate: 'fast' does not work; expected a number such as 3e-3",
        "--what",
        "seed: 'x' does not work; expected a whole number",
        "data_files: missing",
        "effective_batch_size: missing",
        "tokenizer_name: missing",
        "n_embd: 100 is not a multiple of n_head 12",
        "warmup_steps: 50 does not end before the run does, after 20 steps",
    ):
        assert any(expected in problem for problem in found), (expected, found)
    assert len(found) == 9


TOO_LONG = "x" * 300
UNREACHABLE = {
    "~nouser/x": "'~nouser/x' cannot be read (Could not determine home directory.); give a path that can",
    TOO_LONG: f"'{TOO_LONG}' cannot be read (File name too long); give a path that can",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"effective_batch_size": "0"}, "expected at least 1"),
        ({"effective_batch_size": "8.5"}, "expected a whole number"),
        ({"learning_rate": "nan"}, "expected a finite number"),
        ({"learning_rate": "-1"}, "expected greater than 0"),
        ({"min_lr_ratio": "1.1"}, "expected in [0, 1]"),
        ({"adam_beta2": "1"}, "expected in [0, 1)"),
        ({"target_memory_utilization": "0"}, "expected in (0, 1]"),
        ({"penalty_type": "entropy"}, "expected one of non_max_sum, neg_max_prob, neg_entropy, top_k_mass"),
        ({"penalty_weight": "inf"}, "expected a finite number"),
        ({"penalty_top_k": "0"}, "expected at least 1"),
        ({"torch_compile": "maybe"}, "expected true or false or auto"),
        ({"auto_batch_size": "2"}, "expected true or false"),
        ({"tokenizer_name": "gpt2"}, "excludes train_tokenizer_vocab_size 512"),
        ({"tokenizer_name": "./nowhere", "train_tokenizer_vocab_size": None}, "no folder with a tokenizer.json"),
        ({"train_tokenizer_vocab_size": "256"}, "expected at least 257"),
        ({"dataset_name": "text", "data_files": "/nowhere/*.txt"}, "'/nowhere/*.txt' matches no file here"),
        ({"dataset_name": "my folder"}, "not a Hub id"),
        ({"dataset_name": "jsonl", "data_files": "README.md"}, "jsonl files are read by dataset_name json"),
        ({"validation_share": "1"}, "expected in (0, 1)"),
        ({"validation_share": "0.1", "validation_documents": "5"}, "excludes validation_documents 5; set one of them"),
        ({"validation_documents": "none"}, "missing; expected it, validation_share or validation_files"),
        ({"validation_files": "README.md"}, "cannot be used with the built-in python-docs"),
        ({"dataset_name": "me/pages", "validation_share": "0.1"}, "is for files of your own; a dataset on the Hub"),
        (
            {"dataset_name": "text", "data_files": "README.md", "validation_files": "/nowhere/*"},
            "validation_files: '/nowhere/*' matches no file here",
        ),
        ({"text_documents": "line"}, "expected one of paragraph, file"),
        ({"text_documents": "file"}, "is for dataset_name text, not for python-docs; remove it"),
        (
            {"text_column": "body"},
            "means nothing for dataset_name python-docs, which has no columns; leave it at text",
        ),
        (
            {"dataset_name": "text", "data_files": "README.md", "text_column": "body"},
            "has no columns; leave it at text",
        ),
        ({"dataset_revision": "main"}, "cannot be used with the built-in python-docs"),
        ({"max_steps": None}, "expected max_steps or num_train_epochs"),
        ({"max_steps": None, "num_train_epochs": "1", "expected_train_blocks": "7"}, "give no whole step"),
        ({"warmup_steps": "10"}, "the rate would stop at 0.001"),
        ({"report_to": "mlflow"}, "expected any of wandb, tensorboard, trackio"),
        ({"sample_steps": "5", "sample_prompts": "none"}, "needs sample_prompts"),
        ({"eval_tasks_steps": "5"}, "is read with eval_tasks only"),
        ({"eval_task_folder": str(ROOT)}, "is read with eval_tasks only"),
        ({"push_to_hub": "true"}, "needs hub_model_id"),
        ({"hub_strategy": "always"}, "expected one of end, every_save"),
        ({"resume_from_checkpoint": "/nowhere"}, "expected auto, never or a checkpoint"),
        ({"seed": "-1"}, "expected in [0, 2**32)"),
        ({"max_steps": "1" * 400}, "1… does not work; expected a whole number or none, up to 1,000,000,000,000"),
        ({"max_steps": None, "num_train_epochs": "1e308"}, "expected greater than 0, and at most 1,000,000"),
        ({"stop_after": "99999999999999d"}, "expected a duration such as 45s, 30m, 23h30m or 1d2h, up to 9999d"),
        *(({"data_cache_dir": path}, said) for path, said in UNREACHABLE.items()),
        ({"train_tokenizer_vocab_size": None, "tokenizer_name": "~nouser/x"}, UNREACHABLE["~nouser/x"]),
        (
            {"train_tokenizer_vocab_size": None, "tokenizer_name": f"./{TOO_LONG}"},
            "cannot be read (File name too long)",
        ),
        *(({"dataset_name": "text", "data_files": path}, said) for path, said in UNREACHABLE.items()),
        ({"branch_from": TOO_LONG}, UNREACHABLE[TOO_LONG]),
        ({"resume_from_checkpoint": TOO_LONG}, UNREACHABLE[TOO_LONG]),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_what_would(changes, expected):
    found = problems(words(**changes))
    assert len(found) == 1, found
    assert expected in found[0]
    assert any(name in found[0] for name in changes) or "total steps" in found[0]


def test_tasks_without_the_harness_are_refused_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    [problem] = problems(words(eval_tasks="hellaswag"))
    assert problem.startswith(
        "eval_tasks: hellaswag needs lm_eval, which is not installed; pip install 'clm_owt[eval]'"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "found")
    recipe = load_recipe(words(eval_tasks="hellaswag", eval_task_folder=str(ROOT)))
    assert recipe.eval_tasks == ("hellaswag",) and "eval_tasks" not in recipe.run_name
    [problem] = problems(words(eval_tasks="hellaswag", eval_task_folder="nowhere"))
    assert problem.startswith("eval_task_folder: 'nowhere' is no folder; expected one with task definitions")
    [problem] = problems(words(eval_tasks="hellaswag", eval_task_folder=TOO_LONG))
    assert problem == f"eval_task_folder: {UNREACHABLE[TOO_LONG]}"


@pytest.mark.parametrize(
    ("name", "path", "unreadable"),
    [
        ("branch_from", "closed/inner", "closed/inner"),
        ("resume_from_checkpoint", "closed/inner", "closed/inner"),
        ("data_cache_dir", "closed/inner", "closed/inner"),
        ("tokenizer_name", "closed", "closed/tokenizer.json"),
        ("tokenizer_name", "open", "open/tokenizer.json"),
        ("data_files", "closed/inner", "closed/inner"),
        ("data_files", "closed", "closed"),
        ("data_files", "open/*.json", "open/tokenizer.json"),
    ],
)
def test_what_there_is_no_permission_to_read_is_named(tmp_path, monkeypatch, name, path, unreadable):
    monkeypatch.chdir(tmp_path)
    for folder in ("closed", "open"):
        Path(folder).mkdir()
    Path("text.txt").touch()
    Path("open/tokenizer.json").touch(mode=0)
    Path("closed").chmod(0)
    good = {"dataset_name": "text", "data_files": "text.txt", "tokenizer_name": "gpt2", "data_cache_dir": "cache"}
    with as_nobody():
        [problem] = problems(words(**good | {name: f"./{path}"}, train_tokenizer_vocab_size=None))
    assert problem == f"{name}: '{unreadable}' cannot be read (Permission denied); give a path that can"


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """In the working directory without root's right to everything."""
    if os.geteuid() != 0:
        yield
        return
    Path.cwd().chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_incomplete_warmup_is_taken_when_the_recipe_says_so():
    assert load_recipe(words(warmup_steps="10", allow_incomplete_warmup="true")).warmup_steps == 10


MILESTONES = ["--milestones", "20e9=3.024", "9_040_017_095=3.1", "5e9=3"]


@pytest.mark.parametrize(
    "given",
    [
        ["--milestones", "20e9=3.024", "9040017095=3.1", "5e9=3"],
        "{20e9: 3.024, 9040017095: 3.1, '5e9': 3}",
        "{2.0e+10: 3.024, 9_040_017_095: 3.1, 5000000000: 3.0}",
    ],
)
def test_milestones_are_read_however_their_tokens_are_written_and_change_no_result(tmp_path, given):
    text = "" if isinstance(given, list) else f"milestones: {given}\n"
    recipe = load_recipe([*recipe_file(tmp_path, FILE + text), *(given if isinstance(given, list) else [])])
    assert list(recipe.milestones.items()) == [(5 * 10**9, 3.0), (9_040_017_095, 3.1), (2 * 10**10, 3.024)]
    assert recipe.run_name == "trial" and "milestones" not in recipe.result_settings()


def test_no_milestones_are_none_and_an_option_takes_those_of_the_file_away(tmp_path):
    assert load_recipe(recipe_file(tmp_path, FILE + "milestones: {}\n")).milestones is None
    argv = recipe_file(tmp_path, FILE + "milestones: {5e9: 3.193}\n")
    assert load_recipe([*argv, "--milestones", "none"]).milestones is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("true", "expected a loss greater than 0 for each number of tokens"),
        ("[5e9, 3.193]", "expected a loss greater than 0 for each number of tokens"),
        ("5e9=3.193", "'5e9=3.193' does not work; expected a loss greater than 0 for each number of tokens"),
        ("{5e9: {3: 193}}", "5000000000.0: {3: 193}"),
        ("{5e9: '3.193'}", "not 5000000000.0: 3.193"),
        ("{5e9: true}", "not 5000000000.0: True"),
        ("{5e9: null}", "not 5000000000.0: None"),
        ("{5e9: .nan}", "not 5000000000.0: nan"),
        ("{5e9: -1}", "not 5000000000.0: -1"),
        ("{true: 3.193}", "not True: 3.193"),
        ("{0: 3.193}", "not 0: 3.193"),
        ("{1.5: 3.193}", "not 1.5: 3.193"),
        ("{.inf: 3.193}", "not inf: 3.193"),
        ("{many: 3.193}", "not many: 3.193"),
        ("{5e9: 3.193, '5e9': 3}", "one loss for each number of tokens, and 5e9 is given twice; keep one"),
        (["5e9"], "not 5e9: "),
        (["5e9=", "20e9=3"], "not 5e9: "),
        (["5e9=3", "5000000000=3"], "and 5000000000 is given twice; keep one"),
    ],
)
def test_milestones_that_are_no_losses_by_tokens_are_refused(tmp_path, given, said):
    text = "" if isinstance(given, list) else f"milestones: {given}\n"
    options = ["--milestones", *given] if isinstance(given, list) else []
    [problem] = problems([*recipe_file(tmp_path, FILE + text), *options])
    assert "milestones: " in problem and " does not work; expected " in problem and said in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "line 1: not valid YAML"),
        ("- a\n- b\n", "expected lines of the form `key: value`, got list"),
        ("", "got NoneType"),
        ("seed: 1\nseed: 2\n", "line 2: not valid YAML: the key 'seed' is given twice; keep one"),
        ("seed: {a: 1}\n", "seed: {'a': 1} does not work"),
        ("seed: '5'\n", "seed: '5' does not work; expected a whole number"),
        ("run_name: 5\n", "expected text (in quotes where it looks like a number)"),
        ("seed: true\n", "expected a whole number"),
        ("seed: null\n", "expected a whole number, not null"),
        ("sample_prompts: [1]\n", "expected text, or a list of texts"),
        ("7: 7\n", "unknown key 7"),
        ("seed: !!int x\n", "line 1: not valid YAML: 'x' cannot be read as int"),
        ("seed: !!timestamp x\n", "line 1: not valid YAML: 'x' cannot be read as timestamp"),
        ("seed: !!map x\n", "line 1: not valid YAML: expected a mapping node"),
        (f"\nseed: {'1' * 5000}\n", "line 2: not valid YAML: '1111"),
        ("seed: 0b_\n", "seed: '0b_' does not work; expected a whole number"),
        (f"seed: {'1' * 400}\n", "… does not work; expected a whole number, up to 1,000,000,000,000"),
        ('run_name: "a\\0b"\n', "expected text without the character NUL"),
        ('data_files: ["a\\0b"]\n', "expected text without the character NUL"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_recipe_is_refused(tmp_path, text, expected):
    found = problems([*recipe_file(tmp_path, text), *words()])
    assert any(expected in problem for problem in found), found


def test_a_key_given_twice_on_the_command_line_is_an_error(tmp_path):
    assert "--seed: given 2 times; give it once" in problems([*words(), "--seed", "1", "--seed=2"])
    recipe = recipe_file(tmp_path, FILE)
    assert problems([*recipe, *recipe]) == ["--recipe: given 2 times; give it once"]


def test_a_bad_recipe_ends_with_status_2_within_two_seconds_and_writes_nothing(tmp_path):
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(ROOT / "run_clm_owt.py"), "--recipe", "missing.yaml", "--block_sise", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - started
    assert result.returncode == 2
    assert result.stderr == (
        f"error: --recipe: there is no file missing.yaml in {tmp_path}; there are no .yaml files\n"
    )
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert seconds < 2


def test_reading_a_recipe_imports_no_torch():
    code = "import sys, clm_owt.recipe; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_key_is_read_somewhere():
    source = "".join(path.read_text() for path in (ROOT / "run_clm_owt.py", *ROOT.glob("clm_owt/**/*.py")))
    assert [name for name in FIELDS if not re.search(rf"(recipe|self)\.{name}\b", source)] == []


def test_a_recipe_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe(words()).seed = 1
