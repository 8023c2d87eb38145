"""The learning rate as a pure function of the step, for the plan, the pictures and the optimizer."""

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "linear", "wsd")


@dataclass(frozen=True)
class Schedule:
    """A warm-up, linear from 0 to the peak, and what follows until `total_steps`, where the rate has come down to
    `min_lr_ratio` of the peak. It stays there ever after.

    cosine   a half cosine, as transformers' `get_cosine_schedule_with_warmup` with its decay rescaled to that floor
    linear   a straight line
    wsd      warm-up, stable, decay: the peak, and a straight line over the last `decay_share` of all steps. Up to the
             decay it is the same however long the run (Hu 2024, MiniCPM, arXiv 2404.06395)
    """

    warmup_steps: int
    total_steps: int
    min_lr_ratio: float = 0.1
    kind: str = "cosine"
    decay_share: float = 0.2

    def factor(self, step: int) -> float:
        """The share of the peak rate after `step` steps, that is for step number `step` + 1."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if step >= self.total_steps:
            return self.min_lr_ratio
        progress = max(0.0, (step - self.decay_start) / (self.total_steps - self.decay_start))
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * remaining

    @property
    def decay_start(self) -> int:
        """The step after which the rate falls."""
        if self.kind != "wsd":
            return self.warmup_steps
        return max(self.warmup_steps, self.total_steps - max(1, round(self.decay_share * self.total_steps)))

    @property
    def shape(self) -> str:
        """What follows the warm-up, in a few words."""
        if self.kind == "wsd":
            return f"constant up to step {self.decay_start:,}, then linear"
        return self.kind

    @property
    def warmup_ends(self) -> bool:
        """Whether the warm-up ends before the run does."""
        return self.warmup_steps < self.total_steps


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


def is_due(step: int, interval: int | None, total_steps: int) -> bool:
    """Whether what is done every `interval` steps (None: never), and at the end of the run, is done after `step`."""
    return interval is not None and (step % interval == 0 or step == total_steps)


def times_due(total_steps: int, interval: int, at_start: bool) -> int:
    """How often something is done that is due every `interval` steps and at the end of the run."""
    return total_steps // interval + bool(total_steps % interval) + at_start
