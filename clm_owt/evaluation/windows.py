"""Loss and perplexity of a finished model on any text: the text as one stream of tokens, cut into windows."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clm_owt.data.builder import Builder
from clm_owt.data.sources import resolve_source
from clm_owt.data.token_store import TokenStore
from clm_owt.data.tokenizer_files import load_tokenizer
from clm_owt.errors import InputError
from clm_owt.evaluation.predictions import logit_chunks
from clm_owt.model.perplexity import Perplexity
from clm_owt.recipe_reader import load_recipe

# A window: its ids, int64 [length], and how many of its last ones are to be predicted.
Window = tuple[np.ndarray, int]


def cut_windows(ids: np.ndarray, context: int, stride: int | None) -> Iterator[Window]:
    """Windows of `context` tokens of a text's ids [length], each beginning `stride` tokens after the one before, so
    that every token but the first is predicted once, from at least `context` - `stride` tokens before it. Without a
    stride they lie end to end, as training blocks do: the first token of each is context only. Raises InputError for a
    stride that is not smaller than the context."""
    if stride is not None and stride >= context:
        raise InputError(f"--stride: {stride} leaves no context in windows of {context} tokens; expected less")
    predicted_to = 1  # ids[:predicted_to] need no prediction any more
    for start in range(0, len(ids), stride or context):
        window = ids[start : start + context]
        end = start + len(window)
        new = end - max(predicted_to, start + 1)
        if new > 0:
            yield window, new
            predicted_to = end
        if stride is not None and end == len(ids):
            break


def text_windows(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, context: int, stride: int | None
) -> list[Window]:
    """Windows of text files, each a document, followed by the end-of-text token as in training. Raises InputError for
    files that cannot be read as UTF-8, and for an empty text."""
    pieces = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--text: {file} cannot be read as UTF-8 text: {error}") from error
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        pieces.append(np.array([*ids, tokenizer.eos_token_id], np.int64))
    windows = list(cut_windows(np.concatenate(pieces), context, stride))
    if not windows:
        raise InputError(f"--text: {' '.join(map(str, files))}: no text; there is nothing to predict")
    return windows


def recipe_windows(
    recipe_file: str, tokenizer: PreTrainedTokenizerBase, context: int, stride: int | None
) -> list[Window]:
    """Windows of a recipe's validation set: without a stride its very blocks, so that the loss is the one of the run.
    Where its token store is not there yet, it is built as far as needed. Raises InputError where the model's context
    is too short or its vocabulary another, and for a recipe or data that cannot be read."""
    recipe = load_recipe(["--recipe", recipe_file])
    if recipe.block_size > context:
        raise InputError(f"{recipe_file}: block_size {recipe.block_size} is more than the model's context {context}")
    source = resolve_source(recipe)
    store = TokenStore(recipe, source)
    with Builder.start(recipe, source) as builder:
        own_tokenizer = load_tokenizer(store.wait_for_tokenizer(builder.check))
        if own_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"{recipe_file}: its tokenizer is not the model's; give a recipe with the same one")
        store.wait_for_validation(builder.check)
        blocks = store.validation.read(range(len(store.validation)))
    if stride is None:
        return [(block, recipe.block_size - 1) for block in blocks]
    return list(cut_windows(blocks.reshape(-1), context, stride))


def evaluate_windows(model: PreTrainedModel, windows: Iterable[Window], batch_size: int) -> dict[str, float]:
    """`loss` in nats a token and `perplexity` of the model on the windows, and `n_tokens`, the number of predicted
    tokens, each of which has the same weight. `batch_size` windows are computed at a time."""
    metric = Perplexity()
    for logits, targets in logit_chunks(model, list(windows), batch_size):
        losses = F.cross_entropy(logits, targets, reduction="none")
        # Summed in float64, on the CPU since MPS has none.
        metric.add(nll_sum=losses.cpu().double().sum().item(), n_tokens=len(targets))
    return metric.compute()
