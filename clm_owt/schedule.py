"""The learning rate as a pure function of the step."""

import math


def learning_rate_at(step: int, peak: float, warmup_steps: int, total_steps: int, min_lr_ratio: float) -> float:
    """The rate of the schedule after `step` steps, that is of step number `step` + 1: linear from 0 over the warm-up,
    then a cosine that ends at `min_lr_ratio` of the peak; what `optim.build_schedule` gives."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return peak * min_lr_ratio
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


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
