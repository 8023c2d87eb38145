"""The learning rate as a pure function of the step, for the plan, the pictures and the optimizer."""

import math


def rate_factor(step: int, warmup_steps: int, total_steps: int, min_lr_ratio: float) -> float:
    """The share of the peak rate after `step` steps, that is for step number `step` + 1: linear from 0 over the
    warm-up, then a cosine from 1 to `min_lr_ratio` at `total_steps`, and that share ever after.

    In the warm-up it is what transformers' `get_cosine_schedule_with_warmup` gives, in the decay `min_lr_ratio` +
    (1 - `min_lr_ratio`) times that. (Beyond `total_steps` transformers' rate rises again.)
    """
    if step < warmup_steps:
        return step / warmup_steps
    if step >= total_steps:
        return min_lr_ratio
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def schedule_problems(
    total_steps: int, warmup_steps: int | None, learning_rate: float | None, allow_incomplete_warmup: bool | None
) -> list[str]:
    """Why a run of `total_steps` cannot be: no step at all, or a warm-up that does not end before it does."""
    if total_steps < 1:
        return [f"total steps: {total_steps}; the training blocks give no whole step; lower effective_batch_size"]
    if warmup_steps and warmup_steps >= total_steps and not allow_incomplete_warmup:
        reached = (
            f" (the rate would stop at {learning_rate * total_steps / warmup_steps:.3g})" if learning_rate else ""
        )
        return [
            f"warmup_steps: {warmup_steps} does not end before the run does, after {total_steps} steps{reached}; "
            "lower warmup_steps, train longer, or set allow_incomplete_warmup: true"
        ]
    return []
