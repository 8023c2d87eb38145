"""Which run a command continues, and what a finished run says."""

import dataclasses
import json

import pytest
import yaml

from clm_owt.errors import InputError
from clm_owt.recipe_reader import load_recipe
from clm_owt.training.run_folder import (
    MODEL_FILES,
    ExistingRun,
    baseline_lines,
    find_existing_run,
    plan_of_same_run,
    summarize,
)


@pytest.fixture
def recipe():
    argv = "--dataset_name python-docs --train_tokenizer_vocab_size 300 --effective_batch_size 4 --learning_rate 1e-3 "
    return load_recipe((argv + "--warmup_steps 0 --max_steps 10").split())


@pytest.fixture
def folder(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "plan.json").write_text(json.dumps({"total_steps": 10}))
    return tmp_path


def test_a_run_of_an_older_version_is_the_same_run_where_a_new_key_has_its_default(recipe, folder):
    settings = yaml.safe_load((folder / "recipe.yaml").read_text())
    del settings["optimizer"], settings["weight_decay"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert plan_of_same_run(recipe, folder) == {"total_steps": 10}
    with pytest.raises(InputError, match=r"holds another run \(weight_decay: 0.1 -> 0.2\)"):
        plan_of_same_run(dataclasses.replace(recipe, weight_decay=0.2), folder)


def test_a_setting_of_the_machine_makes_no_other_run(recipe, folder):
    assert plan_of_same_run(dataclasses.replace(recipe, max_batch_size=3), folder) == {"total_steps": 10}


@pytest.mark.parametrize("name", ["recipe.yaml", "plan.json"])
def test_a_file_that_cannot_be_read_is_named(name, recipe, folder):
    (folder / name).write_text("{torn")
    with pytest.raises(InputError, match=rf"output_dir: .*{name} cannot be read"):
        plan_of_same_run(recipe, folder)


def test_the_summary_says_on_which_blocks_the_n_gram_models_are_fitted():
    seen = {"unigram": 6.688, "bigram": 4.4844, "blocks": 5600, "unigram_all": 6.6849, "bigram_all": 4.2867}
    assert baseline_lines(seen | {"blocks_all": 15800}) == [
        "  n-gram models of the 5,600 blocks that it saw: unigram 6.6880, smoothed bigram 4.4844",
        "  of all 15,800 training blocks: unigram 6.6849, smoothed bigram 4.2867",
    ]
    assert len(baseline_lines(seen | {"blocks_all": 5600})) == 1  # it saw them all
    assert baseline_lines(None) == baseline_lines({"unigram": 6.7, "bigram": 4.3}) == []


@pytest.fixture
def finished(recipe, folder):
    """The recipe of a finished run, as its folder holds it."""
    plan = {"total_steps": 10, "tokens_per_step": 64, "finished": True, "elapsed_seconds": 5.0}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "model").mkdir()
    for name in MODEL_FILES:
        (folder / "model" / name).touch()
    return dataclasses.replace(recipe, output_dir=str(folder))


def test_a_finished_run_needs_its_checkpoints_no_more(finished, folder):
    damaged = folder / "checkpoints" / "step-00000010"
    damaged.mkdir(parents=True)
    assert find_existing_run(finished) == ExistingRun(json.loads((folder / "plan.json").read_text()), finished=True)


@pytest.mark.parametrize(
    ("gone", "named"), [(("model.safetensors",), "model/model.safetensors"), (MODEL_FILES, "model/")]
)
def test_a_finished_run_without_model_and_checkpoints_is_refused_and_never_trained_again(
    finished, folder, gone, named
):
    for name in gone:
        (folder / "model" / name).unlink()
    with pytest.raises(
        InputError, match=rf"is finished, but lacks {named}, and checkpoints to export it from; restore"
    ):
        find_existing_run(finished)


@pytest.mark.parametrize("name", ["recipe.yaml", "plan.json"])
def test_a_model_without_its_recipe_or_plan_is_not_written_over(finished, folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=r"holds checkpoints or a model but lacks recipe.yaml or plan.json"):
        find_existing_run(finished)


def test_a_finished_run_without_metrics_says_so(finished, folder):
    assert summarize(folder) == [
        f"Finished {folder.name}: 10 steps, 640 tokens in 0:05",
        f"  {folder / 'metrics.jsonl'} is missing or holds no rows: losses and speed are not known",
        f"  model in {folder / 'model'}",
    ]
