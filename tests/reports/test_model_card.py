"""The model card of a run's folder. What huggingface_hub says of it is tested with the uploads, in tests/hub."""

import json

import pytest

from clm_owt.recipe import Recipe
from clm_owt.reports.model_card import model_card

PLAN = {
    "parameters": 1000,
    "total_steps": 40,
    "tokens_per_step": 256,
    "train_blocks": 640,
    "train_blocks_expected": False,
    "batch_arithmetic": "8 = 1 process × 1 micro-batch of 8",
    "learning_rate_floor": 3e-4,
    "vocab_size": 400,
    "processes": 1,
    "environment": {"device": "cpu", "packages": {"torch": "2.13"}},
}


@pytest.fixture
def folder(tmp_path):
    recipe = Recipe(dataset_name="json", effective_batch_size=8, learning_rate=3e-3, warmup_steps=2, run_name="tiny")
    older = ("optimizer:", "dataset_split:")  # as it was written before recipes had these
    text = "".join(line for line in recipe.to_yaml().splitlines(True) if not line.startswith(older))
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(0, 41, 2):
            row = {"step": step, "tokens": 256 * step, "loss": 5 - step / 100, "perplexity": 90.0}
            file.write(json.dumps(row | {"split": "validation"}) + "\n")
            file.write(json.dumps(row | {"step": step + 1, "split": "train"}) + "\n")
    (tmp_path / "samples.md").write_text("## Step 10\n\n**A** b\n\n## Step 30\n\n**A** c\n\n")
    return tmp_path


def test_the_card_is_of_the_step_it_is_made_for(folder):
    text = model_card(folder, "me/tiny", step=20).text
    assert "this is step 20 of 40" in text and "Validation loss 4.8000, perplexity 90.00 (step 20)" in text
    assert "After step 10, the prompt in bold:\n\n> **A** b" in text
    assert "Last training loss: 4.8200 (step 19)." in text
    text = model_card(folder, "me/tiny", step=40).text
    assert "Training is not finished" not in text and "> **A** c" in text


def test_the_card_has_the_optimizer_also_of_an_older_recipe(folder):
    text = model_card(folder, "me/tiny", step=40).text
    (line,) = [line for line in text.splitlines() if line.startswith("| optimizer ")]
    assert line.split("|")[2].strip() == ("AdamW, β 0.9 / 0.95, ε 1e-08, weight decay 0.1, gradients clipped at 1")


def test_the_card_says_what_was_held_out(folder):
    def held_out() -> str:
        return model_card(folder, "me/tiny", step=40).data.eval_results[0].dataset_name

    assert held_out() == "json, its first 1,000 documents (held out)"
    recipe = (folder / "recipe.yaml").read_text().replace("validation_share: null", "validation_share: 0.1")
    (folder / "recipe.yaml").write_text(recipe.replace("validation_documents: 1000", "validation_documents: null"))
    assert held_out() == "json, the last 0.1 of its text (held out)"


def test_the_table_of_validations_is_short_and_ends_with_the_last(folder):
    lines = model_card(folder, "me/tiny", step=40).text.splitlines()
    start = lines.index("| step | tokens | validation loss | perplexity |")
    steps = [int(line.split("|")[1]) for line in lines[start + 2 : start + 14]]
    assert steps == sorted(steps) and (steps[0], steps[-1]) == (0, 40)


def test_the_card_compares_the_first_validation_that_reached_a_milestone(folder):
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("milestones: null", "milestones: {2560: 4.75, 10240: 4}"))
    said = "- step 10, validation loss 4.9000; published at 2.56 k tokens: 4.75, this run is 0.150 above it"
    assert said in model_card(folder, "me/tiny", step=38).text.splitlines()
    assert "published at 10.24 k" not in model_card(folder, "me/tiny", step=38).text
    assert "- step 40, validation loss 4.6000; published at 10.24 k" in model_card(folder, "me/tiny", step=40).text
