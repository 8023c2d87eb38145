"""Text from the model."""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer


@torch.no_grad()
def sample(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    top_k: int = 0,
    streamer: BaseStreamer | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """One continuation for each prompt, without the prompt, by nucleus sampling.

    The same seed gives the same text on the same machine, whatever the other prompts. The random states of the caller
    are left as they were. A prompt and its continuation together are kept within the model's context. `top_k` 0 leaves
    all tokens; `streamer` gets the tokens as they come. `check` is called after each token: raise there to break off.
    """
    device = next(model.parameters()).device
    context = model.config.n_positions
    was_training = model.training
    model.eval()
    continuations = []
    devices = [] if device.type in ("cpu", "mps") else [device]
    try:
        with (
            torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"),
            any_algorithms(),
        ):
            for prompt in prompts:
                # Of each prompt its own: it does not depend on the others, and different ones do not go on alike.
                torch.manual_seed(seed + zlib.crc32(prompt.encode()))
                ids = tokenizer(prompt, return_tensors="pt").input_ids[:, -(context - 1) :].to(device)
                if ids.shape[1] == 0:  # an empty prompt starts a document
                    ids = torch.tensor([[tokenizer.eos_token_id]], device=device)
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    max_new_tokens=min(max_new_tokens, context - ids.shape[1]),
                    pad_token_id=tokenizer.eos_token_id,
                    use_cache=True,
                    # Where parameters are sharded every process must take as many forward passes as the longest text.
                    synced_gpus=isinstance(next(model.parameters()), DTensor),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Interruptible(check)]),
                )
                continuations.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    finally:
        model.train(was_training)
    return continuations


@contextlib.contextmanager
def any_algorithms() -> Iterator[None]:
    """Deterministic algorithms are not asked for: the nucleus is found by a cumulative sum, of which CUDA has no
    deterministic one for floating-point numbers. (Not run on CUDA by the project.)"""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class Interruptible(StoppingCriteria):
    """Ends no continuation, but lets `check` break off the whole."""

    def __init__(self, check: Callable[[], None]):
        self._check = check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self._check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
