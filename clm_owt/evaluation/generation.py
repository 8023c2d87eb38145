"""Text that a model writes on from prompts: how sure it is while it does, beside how sure it is on real text, and how
much it repeats itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from clm_owt.errors import InputError
from clm_owt.evaluation.predictions import draw, entropy_and_variance, logit_chunks

if TYPE_CHECKING:
    from clm_owt.evaluation.windows import Window

LONGEST_NGRAM = 4


def prompts_from(windows: Sequence["Window"], count: int, length: int) -> Tensor:
    """`count` pieces of `length` tokens [count, length], int64, evenly spaced over the windows: the same ones for the
    same windows. None crosses from one window to another, but some may from one document to the next. Asked for the
    length of prompt and continuation together, the pieces only need to be parted: `[:, :n]` and `[:, n:]`. Raises
    InputError where there are not so many."""
    pieces = [ids[i : i + length] for ids, _ in windows for i in range(0, len(ids) - length + 1, length)]
    if len(pieces) < count:
        raise InputError(
            f"{count} prompts with their continuations, {length} tokens together: the text has {len(pieces)}; "
            "expected fewer or shorter ones, or a longer text"
        )
    return torch.stack([torch.from_numpy(pieces[i * len(pieces) // count]) for i in range(count)]).long()


class Repetition(NamedTuple):
    """`seq_rep_4`: the share of a text's 4-grams that are repetitions, 1 - distinct/all, mean over the texts (Welleck
    et al., "Neural text generation with unlikelihood training", 2020). `distinct_n`: distinct n-grams of all texts
    together over the number of their n-grams (after Li et al., "A diversity-promoting objective function", 2016); it
    falls with the amount of text, and is to be compared at the same amount only."""

    seq_rep_4: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    distinct_4: float


def repetition(texts: Tensor) -> Repetition:
    """Of texts [count, length], int64, each of at least 4 tokens."""
    rows = texts.tolist()
    by_length = {n: [list(zip(*(row[i:] for i in range(n)), strict=False)) for row in rows] for n in range(1, 5)}
    repeated = [1 - len(set(ngrams)) / len(ngrams) for ngrams in by_length[4]]
    distinct = (len(set().union(*texts)) / sum(map(len, texts)) for texts in by_length.values())
    return Repetition(sum(repeated) / len(repeated), *distinct)


class Generation(NamedTuple):
    """Of the texts that a model writes on from prompts: the fields of `Repetition`, and the mean entropy in nats of
    its next-token distribution at each position, in its own text and in the real continuations of the same prompts.
    `entropy_drift` is the first minus the second, mean over the positions (after Braverman et al., "Calibration,
    entropy rates, and memory in language models", 2020). At the first position both are the same."""

    seq_rep_4: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    distinct_4: float
    entropy_by_position: list[float]
    real_entropy_by_position: list[float]
    entropy_drift: float


@torch.no_grad()
def generation(
    model: PreTrainedModel,
    prompts: Tensor,
    continuations: Tensor,
    *,
    new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    model_temperature: float = 1.0,
    seed: int,
    batch_size: int,
) -> Generation:
    """Of `new_tokens` sampled tokens after each of `prompts` [count, length], int64, whose real `continuations` are
    [count, at least new_tokens]. Texts go on after an end-of-text token, as training blocks do.

    `model_temperature` divides the logits, and makes another model of it: entropies are of that. `temperature` and
    `top_p` (the nucleus) are of sampling alone, after it. Each token is drawn with a uniform number that depends on
    `seed`, prompt and position alone, not on `batch_size`; models that are compared at one seed share these numbers.
    Raises InputError where texts are longer than the model's context, or shorter than 4 tokens, and ValueError for
    continuations that are too short or too few.
    """
    count, length = prompts.shape
    if continuations.shape[0] != count or continuations.shape[1] < new_tokens:
        raise ValueError(f"continuations {list(continuations.shape)}: expected [{count}, at least {new_tokens}]")
    if new_tokens < LONGEST_NGRAM:
        raise InputError(f"{new_tokens} new tokens: expected at least {LONGEST_NGRAM}, since 4-grams are counted")
    if length + new_tokens > (context := model.config.n_positions):
        raise InputError(
            f"{length} tokens of a prompt and {new_tokens} new ones: expected at most the model's context of {context}"
        )
    uniform = torch.rand(count, new_tokens, generator=torch.Generator().manual_seed(seed))
    sampled = [
        write_on(
            model,
            prompts[part].to(model.device),
            uniform[part].to(model.device),
            temperature=temperature,
            top_p=top_p,
            model_temperature=model_temperature,
        )
        for part in torch.arange(count).split(batch_size)
    ]
    texts, entropies = (torch.cat(parts) for parts in zip(*sampled, strict=True))
    real_texts = torch.cat((prompts, continuations[:, :new_tokens]), 1).numpy()
    chunks = logit_chunks(model, [(text, new_tokens) for text in real_texts], batch_size)
    real = torch.cat([entropy_and_variance((z / model_temperature).log_softmax(-1))[0].cpu() for z, _ in chunks])
    own, real = (rows.double().view(count, new_tokens).mean(0) for rows in (entropies.cpu(), real))
    return Generation(
        *repetition(texts),
        entropy_by_position=own.tolist(),
        real_entropy_by_position=real.tolist(),
        entropy_drift=(own - real).mean().item(),
    )


def write_on(
    model: PreTrainedModel,
    prompts: Tensor,
    uniform: Tensor,
    *,
    temperature: float,
    top_p: float,
    model_temperature: float,
) -> tuple[Tensor, Tensor]:
    """The tokens [count, new] that follow prompts [count, length], int64, drawn at the numbers `uniform` [count, new]
    of [0, 1), and the entropy [count, new] in nats of the distribution that each is drawn from, before sampling's
    `temperature` and `top_p` change it."""
    cache = DynamicCache(config=model.config)
    inputs, tokens, entropies = prompts, [], []
    for numbers in uniform.unbind(1):
        logits = model(inputs, past_key_values=cache, use_cache=True).logits[:, -1].float() / model_temperature
        entropies.append(entropy_and_variance(logits.log_softmax(-1))[0])
        q = (logits / temperature).softmax(-1)
        tokens.append(draw(nucleus(q, top_p) if top_p < 1 else q, numbers))
        inputs = tokens[-1][:, None]
    return torch.stack(tokens, 1), torch.stack(entropies, 1)


def nucleus(q: Tensor, top_p: float) -> Tensor:
    """Probabilities [n, V] with 0 for all but the fewest likeliest tokens that have `top_p` together (Holtzman et al.,
    "The curious case of neural text degeneration", 2020), and those that are as likely as the last of them."""
    # Sorted by NumPy: 64 x 4,096 take 0.4 ms on one core, and torch's sort, as in TopPLogitsWarper, 13.
    ascending = torch.from_numpy(np.sort(q.cpu().numpy(), axis=-1))
    outside = (ascending.cumsum(-1) <= 1 - top_p).sum(-1, keepdim=True).clamp(max=q.shape[-1] - 1)
    return q.masked_fill(q < ascending.gather(-1, outside).to(q.device), 0.0)
