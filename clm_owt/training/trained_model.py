"""A model for use: of the Hub, of a folder, or of a run, finished or not."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from clm_owt.data.sources import Source
from clm_owt.data.tokenizer_files import load_tokenizer, tokenizer_folder
from clm_owt.errors import InputError
from clm_owt.model.gpt2 import model_config
from clm_owt.recipe import FIELDS, Recipe
from clm_owt.reports.record import read_plan, read_recipe
from clm_owt.training.checkpoint import MARKER, find_corruption, find_newest

EXPECTED = "expected a run's folder, one of its checkpoints, a folder with a model, or a Hub id"


def load_trained(name: str, revision: str | None = None) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """Model and tokenizer in float32 on the best device here, for a Hub id, a folder that `save_pretrained` wrote, a
    run's folder (its `model/` or, before its end, its newest whole checkpoint) or a checkpoint in one.

    Raises InputError where there is none, or where it is damaged.
    """
    folder = Path(name)
    if (folder / "plan.json").is_file():
        checkpoint = None if (folder / "model").is_dir() else find_newest(folder / "checkpoints")[0]
        name = str(checkpoint or folder / "model")
    if (Path(name) / MARKER).is_file():
        model, tokenizer = load_checkpoint(Path(name))
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise InputError(f"--model {name}: {str(error).strip().splitlines()[0]}; {EXPECTED}") from error
    return model.to(best_device()).eval(), tokenizer


def load_checkpoint(folder: Path) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """Of a checkpoint in a run's folder, whose recipe and plan tell what it is a checkpoint of."""
    reason = find_corruption(folder)
    if reason is not None:
        raise InputError(f"--model {folder}: {reason}; {EXPECTED}")
    run = folder.absolute().parent.parent
    settings, plan = read_recipe(run), read_plan(run)
    recipe = Recipe(**{name: value for name, value in settings.items() if name in FIELDS})
    tokenizer_files = tokenizer_folder(recipe, Source.from_json(json.dumps(plan["source"])))
    try:
        tokenizer = load_tokenizer(tokenizer_files)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {folder}: its tokenizer is not in {tokenizer_files} any more ({error})") from error
    model = GPT2LMHeadModel(model_config(recipe, plan["vocab_size"], tokenizer.eos_token_id))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["transformer.wte.weight"][: plan["vocab_size"]]  # without rows of padding
    model.load_state_dict(weights | {"transformer.wte.weight": embedding, "lm_head.weight": embedding})
    return model, tokenizer


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
