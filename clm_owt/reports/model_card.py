"""The model card of a run: its README on the Hub, made from the files of the run's folder alone. Imports no torch."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from clm_owt.formatting import markdown_table
from clm_owt.optimizers import OPTIMIZERS
from clm_owt.recipe import FIELDS, FILE_FORMATS, PYTHON_DOCS, default_of
from clm_owt.reports.milestones import CAVEAT, comparisons
from clm_owt.reports.record import PLACES, Row, RunRecord

# Of this software. Whoever trains on text under other terms changes it in the repository's README.
LICENSE = "apache-2.0"
TABLE_ROWS = 12


def model_card(folder: Path, repo_id: str, step: int) -> ModelCard:
    """The card of the run in `folder` as it was after `step`. Raises InputError where the folder holds no run."""
    run = RunRecord.read(folder).until(step)
    metadata = card_metadata(run.recipe, repo_id, run.validation)
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {repo_id.split('/')[-1]}",
        introduction(run, step),
        "## How to use it\n\n" + how_to_use(run.recipe, repo_id, step),
        "## Training\n\n" + training_table(run.recipe, run.plan, step),
        "## Results\n\n" + results_table(run),
    ]
    if (folder / "training_curves.png").exists():
        sections.append("![Training curves](training_curves.png)")
    if run.samples:
        sections.append("## Samples\n\n" + latest_samples(run.samples))
    sections.append("## Limits\n\n" + limits(run.recipe))
    sections.append("## The recipe\n\n" + recipe_settings(run.recipe))
    return ModelCard("\n\n".join(sections) + "\n")


def card_metadata(recipe: dict[str, Any], repo_id: str, validations: Sequence[Row]) -> ModelCardData:
    """The metadata block, with the last of the validations in the Hub's model-index form."""
    dataset = recipe["dataset_name"]
    on_hub = dataset not in (*FILE_FORMATS, PYTHON_DOCS)
    results = []
    if validations:
        last = validations[-1]
        common = {
            "task_type": "text-generation",
            "task_name": "Causal language modeling",
            "dataset_type": dataset,
            "dataset_name": f"{dataset}, {describe_held_out(recipe)} (held out)",
            "dataset_config": recipe["dataset_config_name"],
            "dataset_split": recipe["dataset_split"],
        }
        results = [
            EvalResult(
                metric_type="loss", metric_name="Cross-entropy (nats per token)", metric_value=last["loss"], **common
            ),
            EvalResult(metric_type="perplexity", metric_name="Perplexity", metric_value=last["perplexity"], **common),
        ]
    base = recipe["init_from"]
    return ModelCardData(
        model_name=repo_id.split("/")[-1],
        library_name="transformers",
        pipeline_tag="text-generation",
        license=LICENSE,
        language="en" if dataset.lower() == "skylion007/openwebtext" else None,
        datasets=[dataset] if on_hub else None,
        base_model=base if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None,
        metrics=["perplexity"],
        tags=["gpt2", "causal-lm", "clm_owt"],
        eval_results=results or None,
    )


def describe_held_out(recipe: dict[str, Any]) -> str:
    if recipe.get("validation_share"):
        return f"the last {recipe['validation_share']:g} of its text"
    if recipe.get("validation_files"):
        return "files of their own"
    return f"its first {recipe['validation_documents']:,} documents"


def introduction(run: RunRecord, step: int) -> str:
    """What the model is, how far its training is, and how good it is."""
    recipe, plan = run.recipe, run.plan
    start = f"finetuned from `{recipe['init_from']}`" if recipe["init_from"] else "trained from scratch"
    text = (
        f"A GPT-2 language model (`GPT2LMHeadModel`, {plan['parameters']:,} parameters: {recipe['n_layer']} layers, "
        f"{recipe['n_head']} heads, width {recipe['n_embd']}, context {recipe['block_size']}), {start} on "
        f"{describe_data(recipe)}, with the training recipe clm_owt."
    )
    if step < plan["total_steps"]:
        text += f" **Training is not finished: this is step {step:,} of {plan['total_steps']:,}.**"
    if run.validation:
        last = run.validation[-1]
        text += f" Validation loss {last['loss']:.4f}, perplexity {last['perplexity']:,.2f} (step {last['step']:,})."
    return text


def describe_data(recipe: dict[str, Any]) -> str:
    """What the model was trained on, as part of a sentence."""
    dataset = recipe["dataset_name"]
    if dataset == PYTHON_DOCS:
        return "the docstrings of the Python standard library and of installed packages"
    if dataset in FILE_FORMATS:
        return f"local {dataset} files"
    config = f" (`{recipe['dataset_config_name']}`)" if recipe["dataset_config_name"] else ""
    return f"[{dataset}](https://huggingface.co/datasets/{dataset}){config}"


def how_to_use(recipe: dict[str, Any], repo_id: str, step: int) -> str:
    """Code and commands that use the model, with a prompt of the recipe."""
    revision = f"step-{step:08d}"
    prompt = (recipe["sample_prompts"] or ["The"])[0]
    return f"""```python
from transformers import pipeline

generate = pipeline("text-generation", model={json.dumps(repo_id)})
print(generate({json.dumps(prompt)}, max_new_tokens=50, do_sample=True, top_p=0.9)[0]["generated_text"])
```

Steps that were uploaded are tags: `from_pretrained({json.dumps(repo_id)}, revision="{revision}")`.

To train on from these weights, with the recipe in this repository:

```bash
python run_clm_owt.py --recipe recipe.yaml --init_from {repo_id} --push_to_hub false --output_dir runs/continued
```"""


def training_table(recipe: dict[str, Any], plan: dict[str, Any], step: int) -> str:
    """How the model was trained up to `step`, and on what."""
    tokens = step * plan["tokens_per_step"]
    penalty = f"{recipe['penalty_weight']:g} · {recipe['penalty_type']}" if recipe["penalty_weight"] else "none"
    blocks = f"{plan['train_blocks']:,}" if plan["train_blocks"] else "not counted"
    environment = plan["environment"]
    optimizer = OPTIMIZERS[recipe.get("optimizer", "adamw")]  # older recipes have no such key
    facts = {
        "steps": f"{step:,} of {plan['total_steps']:,}",
        "tokens": f"{tokens:,} ({tokens / plan['parameters']:.1f} per parameter)",
        "global batch": f"{recipe['effective_batch_size']:,} blocks of {recipe['block_size']:,} tokens "
        f"({plan['batch_arithmetic']})",
        "training blocks": blocks + (" (expected)" if plan["train_blocks_expected"] else ""),
        "epochs": f"{step * recipe['effective_batch_size'] / plan['train_blocks']:.2f}"
        if plan["train_blocks"]
        else "not known",
        "dataset commit": (plan.get("source") or {}).get("commit") or "none (not from the Hub)",
        "tokenizer": recipe["tokenizer_name"]
        or f"byte-level BPE of {plan['vocab_size']:,} ids, trained on the training documents",
        "optimizer": f"{optimizer.describe(recipe)}, gradients clipped at {recipe['max_grad_norm']:g}",
        "learning rate": f"{recipe['learning_rate']:g}, {recipe['warmup_steps']:,} steps of linear warm-up, cosine "
        f"to {plan['learning_rate_floor']:g}",
        "sharpness penalty": penalty,
        "seed": f"{recipe['seed']}",
        "device": f"{plan['processes']} × {environment['device']}",
        "packages": ", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
    }
    return markdown_table(("", "value"), facts.items())


def results_table(run: RunRecord) -> str:
    """Validations by step, at most TABLE_ROWS of them, the last always among them; and the last training loss."""
    if not run.validation:
        return "No validation so far."
    last = len(run.validation) - 1
    chosen = sorted({round(i * last / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)})
    rows = [
        (f"{row['step']:,}", f"{row['tokens']:,}", f"{row['loss']:.4f}", f"{row['perplexity']:,.2f}")
        for row in (run.validation[i] for i in chosen)
    ]
    text = markdown_table(("step", "tokens", "validation loss", "perplexity"), rows)
    text += "\n\nCross-entropy in nats per predicted token, over all validation tokens; perplexity is its exponential."
    if run.train:
        row = run.train[-1]
        text += f" Last training loss: {row['loss']:.4f} (step {row['step']:,})."
    reached = comparisons(run.recipe.get("milestones"), run.validation)
    if reached:
        lines = [f"- step {row['step']:,}, validation loss {row['loss']:.4f}; {words}" for row, words in reached]
        text += "\n\n".join([f"\n\nBeside published losses ({CAVEAT}):", "\n".join(lines)])
    return text


def latest_samples(samples: dict[int, str]) -> str:
    """The last of the rounds of samples, by step, as quoted text."""
    step, text = max(samples.items())
    quoted = "\n".join(f"> {line}".rstrip() for line in text.splitlines())
    return f"After step {step:,}, the prompt in bold:\n\n{quoted}"


def limits(recipe: dict[str, Any]) -> str:
    """What the model is not good for."""
    return (
        f"A base model that continues text: it follows no instructions, its statements are not facts, and it repeats "
        f"what is in {describe_data(recipe)}, biases and errors included. It knows at most {recipe['block_size']:,} "
        "tokens of context. Its validation text comes from the same source as its training text."
    )


def recipe_settings(recipe: dict[str, Any]) -> str:
    """The settings that differ from the defaults, as YAML."""
    changed = {
        name: value
        for name, value in recipe.items()
        if name in FIELDS and name not in PLACES and value != default_of(name)
    }
    text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
    return f"What differs from the defaults ([recipe.yaml](recipe.yaml) has all):\n\n```yaml\n{text}```"
