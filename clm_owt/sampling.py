"""Text from the model."""

from collections.abc import Sequence

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase


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
) -> list[str]:
    """One continuation for each prompt, without the prompt, by nucleus sampling.

    The same seed gives the same text on the same machine. The random states of the caller are left as they were. A
    prompt and its continuation together are kept within the model's context.
    """
    device = next(model.parameters()).device
    context = model.config.n_positions
    was_training = model.training
    model.eval()
    continuations = []
    devices = [] if device.type in ("cpu", "mps") else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids[:, -(context - 1) :].to(device)
            if ids.shape[1] == 0:  # an empty prompt starts a document
                ids = torch.tensor([[tokenizer.eos_token_id]], device=device)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                max_new_tokens=min(max_new_tokens, context - ids.shape[1]),
                pad_token_id=tokenizer.eos_token_id,
                use_cache=True,
            )
            continuations.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    model.train(was_training)
    return continuations
