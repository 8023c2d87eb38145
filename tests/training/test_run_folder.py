"""Which run a command continues, and what a finished run says."""

import dataclasses
import json

import pytest
import yaml

from clm_owt.errors import InputError
from clm_owt.recipe_reader import load_recipe
from clm_owt.training.run_folder import baseline_lines, plan_of_same_run


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
