"""What of a run will work and probably should not be so: each with its numbers and what to do."""

import dataclasses
import math
from collections.abc import Iterator

from clm_owt.formatting import format_bytes, format_duration
from clm_owt.optimizers import OPTIMIZERS
from clm_owt.planning.devices import Hardware
from clm_owt.planning.memory import step_memory
from clm_owt.recipe import Recipe, show

# Standard deviation of a token's loss in nats, in mid-training; the mean of n tokens is good to about 3.2/sqrt(n).
TOKEN_LOSS_DEVIATION = 3.2

LONG_WARMUP = 0.10

# Of 130 M parameters at 10 billion tokens, AdamW tuned for each batch (arXiv 2509.02046): so many nats more than with
# half a million tokens a step.
LARGE_BATCH, LARGE_BATCH_COST = 2_000_000, 0.05

COARSE_VALIDATION = 0.02  # nats; runs of a sweep differ by less

COSTLY_EVALUATION = 0.05

BUSY_MICRO_BATCH = 8  # blocks; larger ones change little for a GPU

LONG_SAVE_INTERVAL = 3600  # seconds


def of_optimisation(recipe: Recipe, total_steps: int, parameters: int) -> Iterator[str]:
    """Of warm-up, batch and learning rate."""
    warmup_share = recipe.warmup_steps / total_steps
    if warmup_share > LONG_WARMUP:
        usual = round(0.02 * total_steps)
        yield (
            f"warmup_steps: {recipe.warmup_steps:,} of {total_steps:,} steps are {warmup_share:.1%} of the run, usual "
            f"are 1-2 %; {f'lower it to {usual:,}, or ' if usual else ''}train longer"
        )
    tokens_per_step = recipe.effective_batch_size * recipe.block_size
    if tokens_per_step >= LARGE_BATCH:
        yield (
            f"effective_batch_size: {tokens_per_step:,} tokens a step; with 2 million 130 M parameters lost "
            f"{LARGE_BATCH_COST:g} nats at 10 billion tokens against half a million (published, arXiv 2509.02046); "
            "lower it where the machine allows"
        )
    rates = OPTIMIZERS[recipe.optimizer].published_rates
    published = max((p for p in rates if p[0] <= 1.05 * parameters), default=None)
    if published is not None and recipe.learning_rate > published[1]:
        yield (
            f"learning_rate: {recipe.learning_rate:g} is above what is published for {recipe.optimizer} at "
            f"{parameters / 1e6:,.0f} M parameters ({published[2]}); try {published[1]:g} and below in a sweep first "
            "(recipes/sweeps/)"
        )


def of_validation(recipe: Recipe, blocks: int | None, share: float | None, total_steps: int) -> Iterator[str]:
    """Of how well so many validation blocks tell a loss, and of the share of the training's time that they take."""
    key = recipe.validation_key
    held_out = (
        show(getattr(recipe, key)) if recipe.validation_documents is None else f"{recipe.validation_documents:,}"
    )
    tokens = (blocks or 0) * (recipe.block_size - 1)
    error = TOKEN_LOSS_DEVIATION / math.sqrt(tokens) if tokens else 0.0
    if error > COARSE_VALIDATION:
        times = (error / COARSE_VALIDATION) ** 2
        mend = f"it takes {times:.2g} times as many"
        if recipe.validation_documents is not None:
            mend = f"raise it to {math.ceil(recipe.validation_documents * times):,}"
        yield (
            f"{key}: {held_out} give {tokens:,} predicted tokens, and a loss good to about {error:.2g} nats; "
            f"{mend} for {COARSE_VALIDATION:g}"
        )
    if share is not None and share > COSTLY_EVALUATION:
        once = blocks / 3 / recipe.effective_batch_size
        mend = f"lower {key} ({held_out})" if key != "validation_files" else "give fewer validation_files"
        if total_steps > recipe.eval_steps:  # else it is validated at both ends only
            mend = f"raise eval_steps ({recipe.eval_steps:,}), or {mend}"
        yield (f"eval_steps: validation costs {share:.1%} of the training, each as much as {once:.1f} steps; {mend}")


def of_saving(recipe: Recipe, seconds: tuple[float, float] | None, total_steps: int) -> Iterator[str]:
    """Of how much a crash loses. `seconds`: of the run, derived."""
    if seconds is None:
        return
    interval = seconds[0] / total_steps * min(recipe.save_steps, total_steps)
    if interval > LONG_SAVE_INTERVAL:
        fitting = int(recipe.save_steps * LONG_SAVE_INTERVAL / interval)
        yield (
            f"save_steps: {recipe.save_steps:,} steps take {format_duration(interval)} at the least, as derived for "
            f"this device, and a crash loses as much; lower it to {max(1, fitting):,}"
        )


def of_sharding(recipe: Recipe, vocab_size: int, micro_batch: int, hardware: Hardware) -> Iterator[str]:
    """That parameters are shared out which each device could hold, with micro-batches that keep it busy."""
    if not hardware.sharded or hardware.device_type == "cpu":
        return
    size, whole = min(micro_batch, BUSY_MICRO_BATCH), dataclasses.replace(hardware, sharded=False)
    needed = sum(step_memory(recipe, vocab_size, size, whole).values())
    if needed <= recipe.target_memory_utilization * hardware.memory:
        yield (
            f"FSDP2: each device could hold the whole state, an estimated {format_bytes(needed)} of "
            f"{format_bytes(hardware.memory)} with micro-batches of {size}; accelerate_configs/multi_gpu.yaml is the "
            "same run without gathering parameters for every micro-batch"
        )
