"""Where a run is: the state that a checkpoint keeps beside tensors."""

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Where a run is. `position` counts the blocks consumed and `tokens` their tokens, skipped steps included."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    micro_batch: int = 0
    validated_step: int = -1  # the last step after which was validated, evaluated on tasks, and sampled
    tasks_step: int = -1
    sampled_step: int = -1
    validation_loss: float | None = None  # of `validated_step`
    best_validation_loss: float | None = None
    not_finite_in_a_row: int = 0  # the last steps, whose loss or gradient was not finite
    loss_scale: float | None = None  # under float16; for so many steps in a row without an overflow
    steps_at_loss_scale: int = 0
    elapsed_seconds: float = 0.0  # of training, validation and all else, over all sessions of the run
    tracker_ids: dict[str, str] = field(default_factory=dict)
    recent_losses: list[float] = field(default_factory=list)  # what skip_outliers judges by
    recent_grad_norms: list[float] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)  # cross-entropies and gradient norms of the first steps,
    first_grad_norms: list[float] = field(default_factory=list)  # by which a silent failure is seen
    symptoms: list[str] = field(default_factory=list)  # the kinds of it that were said
