"""What builds the optimizers of clm_owt/optimizers.py, and their learning rate; and which steps are outliers."""

import statistics

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from clm_owt.recipe import Recipe
from clm_owt.schedule import rate_factor

FUSED_DEVICES = ("cpu", "cuda", "mps")


def build_adamw(model: torch.nn.Module, recipe: Recipe) -> AdamW:
    """AdamW over two groups: matrices and embeddings decay, biases and LayerNorm gains (one dimension) do not.

    The tied embedding is one parameter. The fused kernel is taken where the parameters' device has one.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=parameters[0].device.type in FUSED_DEVICES,
    )


def build_schedule(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, min_lr_ratio: float, completed_steps: int = 0
) -> LambdaLR:
    """`get_cosine_schedule_with_warmup` with `rate_factor`, which ends at `min_lr_ratio` of the peak, for its factor.

    Equal to `get_cosine_with_min_lr_schedule_with_warmup(min_lr_rate=min_lr_ratio)` up to `total_steps`. To be stepped
    once per optimizer step, by every process: it is not to be passed to `Accelerator.prepare`, which would step it
    once per process. Optimizer step 1 is taken at the factor of 0, step `completed_steps` + 1 at that of
    `completed_steps`.
    """

    def factor(step: int) -> float:
        return rate_factor(step, warmup_steps, total_steps, min_lr_ratio)

    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    schedule.lr_lambdas = [factor for _ in schedule.lr_lambdas]
    if completed_steps:
        schedule.load_state_dict(
            schedule.state_dict() | {"last_epoch": completed_steps - 1, "_step_count": completed_steps + 1}
        )
        schedule.step()
    return schedule


class OutlierGuard:
    """Judges steps by the z-score of loss and gradient norm among the last ones, as llm.c's OutlierDetector does.

    The two lists are the run's own and are saved with it; until they are full nothing is an outlier. The window is
    OUTLIER_DETECTOR_WINDOW_SIZE of llmc/outlier_detector.h; the limit is what scripts/run_gpt3_125M.sh sets by
    `-sl 7.0 -sg 7.0` (llm.c's own default is to skip nothing).
    """

    WINDOW = 128
    LIMIT = 7.0

    def __init__(self, losses: list[float], grad_norms: list[float]):
        self._histories = (losses, grad_norms)

    def is_outlier(self, loss: float, grad_norm: float) -> bool:
        scores = [self._push(h, v) for h, v in zip(self._histories, (loss, grad_norm), strict=True)]
        return max(scores) > self.LIMIT

    def _push(self, history: list[float], value: float) -> float:
        """Add a value and give its z-score among the last `WINDOW`, itself included (0 where fewer were before it)."""
        full = len(history) == self.WINDOW
        history.append(value)
        del history[: -self.WINDOW]
        if not full:
            return 0.0
        deviation = statistics.pstdev(history)
        return (value - statistics.fmean(history)) / deviation if deviation else 0.0
