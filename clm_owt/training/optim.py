"""What builds the optimizers of clm_owt/optimizers.py, and their learning rate; the loss scale of float16; and which
steps are outliers."""

import statistics
from collections.abc import Iterable

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from clm_owt.optimizers import kind_of
from clm_owt.recipe import Recipe
from clm_owt.schedule import Schedule
from clm_owt.training.muon import Muon
from clm_owt.training.processes import Processes

FUSED_DEVICES = ("cpu", "cuda", "mps")

# The loss scale of float16, as torch.amp.GradScaler moves it. At the least a gradient that overflows is no matter of
# scale.
FIRST_LOSS_SCALE, LEAST_LOSS_SCALE = 2.0**16, 1.0
STEPS_BEFORE_GROWTH = 2000


def build_adamw(model: torch.nn.Module, recipe: Recipe, processes: Processes | None = None) -> AdamW:
    """AdamW over two groups: matrices and embeddings decay, biases and LayerNorm gains (one dimension) do not.

    The tied embedding is one parameter. The fused kernel is taken where the parameters' device has one.
    """
    return adamw([p for p in model.parameters() if p.requires_grad], recipe, recipe.learning_rate)


def build_muon(model: torch.nn.Module, recipe: Recipe, processes: Processes | None = None) -> Muon:
    """Muon over the matrices of the transformer blocks, AdamW at `embedding_learning_rate` over the rest."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in parameters.items() if kind_of(name, p.dim()) == "matrix"}
    rest = [p for name, p in parameters.items() if name not in matrices]
    rate = recipe.learning_rate if recipe.embedding_learning_rate is None else recipe.embedding_learning_rate
    return Muon(matrices, adamw(rest, recipe, rate), recipe.learning_rate, recipe.weight_decay, processes)


def adamw(parameters: list[torch.nn.Parameter], recipe: Recipe, learning_rate: float) -> AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        groups,
        lr=learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=parameters[0].device.type in FUSED_DEVICES,
    )


def build_schedule(optimizer: Optimizer, rates: Schedule, completed_steps: int = 0) -> LambdaLR:
    """`get_cosine_schedule_with_warmup` with the factor of `rates`, which ends at a floor and need not be a cosine.

    Equal to transformers' `get_cosine_with_min_lr_schedule_with_warmup` or, by its kind, `get_wsd_schedule` up to the
    end. To be stepped once per optimizer step, by every process: it is not to be passed to `Accelerator.prepare`,
    which would step it once per process. Optimizer step 1 is taken at the factor of 0, step `completed_steps` + 1 at
    that of `completed_steps`.
    """
    schedule = get_cosine_schedule_with_warmup(optimizer, rates.warmup_steps, rates.total_steps)
    schedule.lr_lambdas = [rates.factor for _ in schedule.lr_lambdas]
    if completed_steps:
        schedule.load_state_dict(
            schedule.state_dict() | {"last_epoch": completed_steps - 1, "_step_count": completed_steps + 1}
        )
        schedule.step()
    return schedule


def next_loss_scale(scale: float, steps: int, overflowed: bool) -> tuple[float, int]:
    """The loss scale after a step that was taken with `scale`, after `steps` others in a row without an overflow; and
    how many these are now. Half of it after an overflow, twice after 2,000 steps without one.

    (GradScaler itself keeps its scale on the device and asks each step whether a gradient was infinite, for which the
    host would wait. Here the host knows the gradient's norm anyway, the same on all processes.)
    """
    if overflowed:
        return max(scale / 2, LEAST_LOSS_SCALE), 0
    return (scale * 2, 0) if steps + 1 == STEPS_BEFORE_GROWTH else (scale, steps + 1)


def unscale(parameters: Iterable[torch.nn.Parameter], scale: float) -> None:
    """Divide the gradients by the loss scale, a power of two: exact, but for numbers that float32 hardly holds."""
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / scale)


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
