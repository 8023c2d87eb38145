"""What a recipe implies: steps, tokens, rates, cut of the batch, disk, memory, time. Shown before anything is paid.

Pure arithmetic over the recipe and what is known of data and hardware, but for `find_disk`. What cannot run is
refused; what will run and probably should not is warned of.
"""

import dataclasses
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from clm_owt.batch import describe_cut
from clm_owt.errors import InputError
from clm_owt.formatting import format_bytes, format_duration
from clm_owt.optimizers import OPTIMIZERS
from clm_owt.planning.devices import Hardware
from clm_owt.planning.memory import count_parameters, optimizer_bytes, step_memory
from clm_owt.planning.step_time import SLOWEST, step_seconds
from clm_owt.recipe import Recipe, show
from clm_owt.schedule import schedule_problems

# The guide's base for scaling rates with the batch: 6e-4 at 32 blocks.
BASE_RATE, BASE_BATCH = 6e-4, 32

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

CURVE, CURVE_WIDTH = "▁▂▃▄▅▆▇█", 32


@dataclass(frozen=True)
class Data:
    """What is known of the data when the plan is made; None where it is still being read."""

    train_documents: int | None = None
    validation_documents: int | None = None
    train_blocks: int | None = None
    validation_blocks: int | None = None


@dataclass(frozen=True)
class Disk:
    """A folder of the run: bytes free on its file system, bytes of this run that are in it already."""

    folder: str
    free: int
    present: int
    file_system: int


@dataclass(frozen=True)
class Plan:
    """The numbers of a run, fixed when it begins and kept in `plan.json`. None stands for what is not known."""

    train_documents: int | None
    validation_documents: int | None
    train_blocks: int | None  # the real count, or the expected one
    train_blocks_expected: bool  # train_blocks is the recipe's expectation, the data still being read
    validation_blocks: int | None
    total_steps: int
    total_tokens: int
    tokens_per_step: int
    steps_per_epoch: float | None
    epochs: float | None
    tokens_per_parameter: float
    warmup_steps: int
    warmup_share: float
    learning_rate_peak: float
    learning_rate_floor: float
    learning_rates: dict[str, float]  # at 0, 25, 50, 75, 100 % of the run
    linear_scaled_rate: float
    square_root_scaled_rate: float
    parameters: int
    vocab_size: int
    processes: int
    micro_batch: int
    batch_arithmetic: str
    evaluations: int
    evaluation_share: float | None  # of the arithmetic of training
    samples: int  # rounds of samples
    saves: int
    train_flops: float
    data_bytes: int | None
    checkpoint_bytes: int  # of one
    output_bytes: int  # of the run's folder at its largest
    memory: dict[str, int]  # bytes per process, by part; estimated
    device: str | None
    seconds: tuple[float, float] | None  # of training and evaluation: derived (step_time), and SLOWEST times that
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def make_plan(
    recipe: Recipe,
    data: Data,
    vocab_size: int,
    micro_batch: int,
    hardware: Hardware,
    data_disk: Disk | None = None,
    output_disk: Disk | None = None,
) -> Plan:
    """The plan of a run. Raises InputError, with all reasons, where the run cannot be: no whole step, a warm-up that
    does not end, fewer blocks in a batch than processes, a length that depends on a count of blocks nobody knows yet,
    not enough disk. A disk that is not given is not judged."""
    processes = hardware.processes
    total_steps = recipe.total_steps(data.train_blocks)
    if total_steps is None:
        raise InputError(
            "num_train_epochs: the number of training blocks is not known before the data has been read; "
            "give expected_train_blocks or max_steps"
        )
    problems = schedule_problems(
        total_steps, recipe.warmup_steps, recipe.learning_rate, recipe.allow_incomplete_warmup
    )
    if recipe.effective_batch_size < processes:
        problems.append(
            f"effective_batch_size: {recipe.effective_batch_size} blocks cannot be shared out over {processes} "
            f"processes; raise it to {processes} or start fewer processes"
        )
    parameters = count_parameters(recipe, vocab_size)
    blocks = data.train_blocks or recipe.expected_train_blocks
    data_bytes = None if blocks is None else (blocks + (data.validation_blocks or 0)) * block_bytes(recipe, vocab_size)
    checkpoint_bytes = 4 * parameters + optimizer_bytes(recipe, vocab_size)
    output_bytes = run_folder_bytes(recipe, parameters, checkpoint_bytes, total_steps)
    problems += disk_problems([(data_disk, data_bytes, "data_cache_dir"), (output_disk, output_bytes, "output_dir")])
    if problems:
        raise InputError("\n".join(problems))

    tokens_per_step = recipe.effective_batch_size * recipe.block_size
    total_tokens = total_steps * tokens_per_step
    train_flops = total_tokens * flops_per_token(parameters, recipe.n_layer, recipe.n_embd, recipe.block_size)
    evaluations = times_due(total_steps, recipe.eval_steps, at_start=True)
    evaluation_share = None
    if data.validation_blocks is not None:  # a forward pass is a third of a training step's work
        evaluation_share = evaluations * data.validation_blocks * recipe.block_size / 3 / total_tokens
    seconds = step_seconds(recipe, vocab_size, micro_batch, hardware)
    if seconds is not None:
        seconds = tuple(total_steps * (1 + (evaluation_share or 0)) * step for step in seconds)
    shares = {f"{quarter * 25}%": total_steps * quarter // 4 for quarter in range(5)}
    base = recipe.effective_batch_size / BASE_BATCH
    return Plan(
        train_documents=data.train_documents,
        validation_documents=data.validation_documents,
        train_blocks=blocks,
        train_blocks_expected=data.train_blocks is None and blocks is not None,
        validation_blocks=data.validation_blocks,
        total_steps=total_steps,
        total_tokens=total_tokens,
        tokens_per_step=tokens_per_step,
        steps_per_epoch=blocks / recipe.effective_batch_size if blocks else None,
        epochs=total_steps * recipe.effective_batch_size / blocks if blocks else None,
        tokens_per_parameter=total_tokens / parameters,
        warmup_steps=recipe.warmup_steps,
        warmup_share=recipe.warmup_steps / total_steps,
        learning_rate_peak=recipe.learning_rate,
        learning_rate_floor=recipe.learning_rate * recipe.min_lr_ratio,
        learning_rates={
            share: recipe.learning_rate * recipe.schedule(total_steps).factor(step) for share, step in shares.items()
        },
        linear_scaled_rate=BASE_RATE * base,
        square_root_scaled_rate=BASE_RATE * math.sqrt(base),
        parameters=parameters,
        vocab_size=vocab_size,
        processes=processes,
        micro_batch=micro_batch,
        batch_arithmetic=describe_cut(recipe.effective_batch_size, processes, micro_batch),
        evaluations=evaluations,
        evaluation_share=evaluation_share,
        samples=times_due(total_steps, recipe.sample_steps, at_start=True) if recipe.sample_steps else 0,
        saves=times_due(total_steps, recipe.save_steps, at_start=False),
        train_flops=train_flops,
        data_bytes=data_bytes,
        checkpoint_bytes=checkpoint_bytes,
        output_bytes=output_bytes,
        memory=step_memory(recipe, vocab_size, micro_batch, hardware),
        device=hardware.device.name if hardware.device else hardware.device_name,
        seconds=seconds,
        warnings=(
            *find_warnings(recipe, data, total_steps, parameters, evaluation_share, seconds),
            *needless_sharding(recipe, vocab_size, micro_batch, hardware),
        ),
    )


def find_warnings(
    recipe: Recipe,
    data: Data,
    total_steps: int,
    parameters: int,
    evaluation_share: float | None,
    seconds: tuple[float, float] | None,
) -> list[str]:
    """What will run and probably should not, each with its numbers and what to do."""
    warnings = []
    warmup_share = recipe.warmup_steps / total_steps
    if warmup_share > LONG_WARMUP:
        usual = round(0.02 * total_steps)
        warnings.append(
            f"warmup_steps: {recipe.warmup_steps:,} of {total_steps:,} steps are {warmup_share:.1%} of the run, usual "
            f"are 1-2 %; {f'lower it to {usual:,}, or ' if usual else ''}train longer"
        )
    tokens_per_step = recipe.effective_batch_size * recipe.block_size
    if tokens_per_step >= LARGE_BATCH:
        warnings.append(
            f"effective_batch_size: {tokens_per_step:,} tokens a step; with 2 million 130 M parameters lost "
            f"{LARGE_BATCH_COST:g} nats at 10 billion tokens against half a million (published, arXiv 2509.02046); "
            "lower it where the machine allows"
        )
    rates = OPTIMIZERS[recipe.optimizer].published_rates
    published = max((p for p in rates if p[0] <= 1.05 * parameters), default=None)
    if published is not None and recipe.learning_rate > published[1]:
        warnings.append(
            f"learning_rate: {recipe.learning_rate:g} is above what is published for {recipe.optimizer} at "
            f"{parameters / 1e6:,.0f} M parameters ({published[2]}); try {published[1]:g} and below in a sweep first "
            "(recipes/sweeps/)"
        )
    key = recipe.validation_key
    held_out = (
        show(getattr(recipe, key)) if recipe.validation_documents is None else f"{recipe.validation_documents:,}"
    )
    if data.validation_blocks:
        tokens = data.validation_blocks * (recipe.block_size - 1)
        error = TOKEN_LOSS_DEVIATION / math.sqrt(tokens)
        if error > COARSE_VALIDATION:
            times = (error / COARSE_VALIDATION) ** 2
            mend = f"it takes {times:.2g} times as many"
            if recipe.validation_documents is not None:
                mend = f"raise it to {math.ceil(recipe.validation_documents * times):,}"
            warnings.append(
                f"{key}: {held_out} give {tokens:,} predicted tokens, and a loss good to about {error:.2g} nats; "
                f"{mend} for {COARSE_VALIDATION:g}"
            )
    if evaluation_share is not None and evaluation_share > COSTLY_EVALUATION:
        once = data.validation_blocks / 3 / recipe.effective_batch_size
        mend = f"lower {key} ({held_out})" if key != "validation_files" else "give fewer validation_files"
        if total_steps > recipe.eval_steps:  # else it is validated at both ends only
            mend = f"raise eval_steps ({recipe.eval_steps:,}), or {mend}"
        warnings.append(
            f"eval_steps: validation costs {evaluation_share:.1%} of the training, each as much as {once:.1f} steps; "
            f"{mend}"
        )
    if seconds is not None:
        interval = seconds[0] / total_steps * min(recipe.save_steps, total_steps)
        if interval > LONG_SAVE_INTERVAL:
            fitting = int(recipe.save_steps * LONG_SAVE_INTERVAL / interval)
            warnings.append(
                f"save_steps: {recipe.save_steps:,} steps take {format_duration(interval)} at the least, as derived "
                "for this device, and a crash loses as much; "
                f"lower it to {max(1, fitting):,}"
            )
    return warnings


def needless_sharding(recipe: Recipe, vocab_size: int, micro_batch: int, hardware: Hardware) -> list[str]:
    """That parameters are shared out which each device could hold, with micro-batches that keep it busy."""
    if not hardware.sharded or hardware.device_type == "cpu":
        return []
    size, whole = min(micro_batch, BUSY_MICRO_BATCH), dataclasses.replace(hardware, sharded=False)
    needed = sum(step_memory(recipe, vocab_size, size, whole).values())
    if needed > recipe.target_memory_utilization * hardware.memory:
        return []
    return [
        f"FSDP2: each device could hold the whole state, an estimated {format_bytes(needed)} of "
        f"{format_bytes(hardware.memory)} with micro-batches of {size}; accelerate_configs/multi_gpu.yaml is the same "
        "run without gathering parameters for every micro-batch"
    ]


def is_due(step: int, interval: int | None, total_steps: int) -> bool:
    """Whether what is done every `interval` steps (None: never), and at the end of the run, is done after `step`."""
    return interval is not None and (step % interval == 0 or step == total_steps)


def times_due(total_steps: int, interval: int, at_start: bool) -> int:
    """How often something is done that is due every `interval` steps and at the end of the run."""
    return total_steps // interval + bool(total_steps % interval) + at_start


def flops_per_token(parameters: int, n_layer: int, n_embd: int, block_size: int) -> float:
    """Of forward and backward: 6·N + 12·L·D·T (PaLM, appendix B: the products with weights, and attention)."""
    return 6 * parameters + 12 * n_layer * n_embd * block_size


def block_bytes(recipe: Recipe, vocab_size: int) -> int:
    """Of a block in the token store: two bytes a token, four above 65,536 ids."""
    return recipe.block_size * (2 if vocab_size <= 65_536 else 4)


def run_folder_bytes(recipe: Recipe, parameters: int, checkpoint_bytes: int, total_steps: int) -> int:
    """At its largest: the checkpoints, of which there is one more than is kept while the newest is being written, the
    exported model, about 450 bytes of metrics a row and 5 a sampled token."""
    rows = times_due(total_steps, recipe.logging_steps, False) + times_due(total_steps, recipe.eval_steps, True)
    rounds = times_due(total_steps, recipe.sample_steps, True) if recipe.sample_steps else 0
    checkpoints = min(recipe.save_total_limit + 1, times_due(total_steps, recipe.save_steps, False))
    samples = rounds * len(recipe.sample_prompts) * recipe.sample_max_new_tokens * 5
    return checkpoint_bytes * checkpoints + 4 * parameters + 450 * rows + samples


def find_disks(data_folder: Path, output_folder: Path) -> tuple[Disk, Disk]:
    """Of the token store and of the run's folder."""
    return find_disk(data_folder), find_disk(output_folder)


def find_disk(folder: Path) -> Disk:
    """Of a folder that may not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    present = sum(os.path.getsize(file) for file in folder.rglob("*") if file.is_file())
    return Disk(str(folder), shutil.disk_usage(existing).free, present, existing.stat().st_dev)


def disk_problems(needs: list[tuple[Disk | None, int | None, str]]) -> list[str]:
    """What does not fit, of (disk, bytes in the end, key of the folder); folders of one file system share it."""
    known = [(disk, max(0, size - disk.present), key) for disk, size, key in needs if disk and size is not None]
    problems = []
    for file_system in dict.fromkeys(disk.file_system for disk, _, _ in known):
        here = [need for need in known if need[0].file_system == file_system]
        needed, free = sum(size for _, size, _ in here), min(disk.free for disk, _, _ in here)
        if needed > free:
            parts = " and ".join(f"{format_bytes(size)} in {disk.folder} ({key})" for disk, size, key in here)
            keys = " or ".join(key for _, _, key in here)
            problems.append(
                f"{keys}: the run needs another {parts}, and {format_bytes(free)} are free there; "
                f"free some, point {keys} to a larger disk, or lower save_total_limit"
            )
    return problems


def plan_lines(plan: Plan, recipe: Recipe, not_looked_at: bool = False) -> list[str]:
    """The plan as the lines a user reads before the run. `not_looked_at`: data and tokenizer, for want of a network;
    what the lines say of them is what the recipe states."""
    not_counted, still_read = "not counted yet", "still being read"
    if not_looked_at:
        not_counted = still_read = "not looked at: no network"

    def amount(number: float | None, unit: str) -> str:
        return f"{number:,} {unit}" if number is not None else f"{unit} {not_counted}"

    blocks = amount(plan.train_blocks, "training blocks")
    if plan.train_blocks_expected:
        blocks += f" expected ({still_read})"
    epochs = f", {plan.epochs:.2f} epochs of {plan.steps_per_epoch:,.1f} steps" if plan.epochs is not None else ""
    data_bytes = f"data {not_counted}" if plan.data_bytes is None else f"data {format_bytes(plan.data_bytes)}"
    evaluation = (
        "" if plan.evaluation_share is None else f" ({plan.evaluation_share:.1%} of the training's arithmetic)"
    )
    samples = f", {plan.samples:,} rounds of {len(recipe.sample_prompts)} samples" if plan.samples else ""
    memory = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.memory.items() if size)
    steps = [plan.total_steps * i // (CURVE_WIDTH - 1) for i in range(CURVE_WIDTH)]
    schedule = recipe.schedule(plan.total_steps)
    documents = (
        f"{amount(plan.train_documents, 'training documents')}, "
        f"{amount(plan.validation_documents, 'validation documents')}"
    )
    rows = {
        "data": f"{recipe.dataset_name}: {not_counted if not_looked_at else documents}",
        "blocks": f"{blocks}, {amount(plan.validation_blocks, 'validation blocks')}, of {recipe.block_size} tokens",
        "length": f"{plan.total_steps:,} steps of {plan.tokens_per_step:,} tokens{epochs}; "
        f"{plan.total_tokens:,} tokens in all",
        "batch": plan.batch_arithmetic,
        "model": f"{plan.parameters:,} parameters: {recipe.n_layer} layers, {recipe.n_head} heads, width "
        f"{recipe.n_embd}, vocabulary {plan.vocab_size:,}; {plan.tokens_per_parameter:.1f} tokens each",
        "rate": f"peak {plan.learning_rate_peak:g} after {plan.warmup_steps:,} steps of warm-up "
        f"({plan.warmup_share:.1%} of the run), {schedule.shape}, floor {plan.learning_rate_floor:g}",
        "": f"{sparkline([schedule.factor(step) for step in steps])}  "
        + ", ".join(f"{rate:.3g} at {share}" for share, rate in plan.learning_rates.items()),
        "scaling": f"{BASE_RATE:g} at a batch of {BASE_BATCH} is {plan.linear_scaled_rate:.3g} here by the linear "
        f"rule, {plan.square_root_scaled_rate:.3g} by the square root (rules of thumb for GPT-2 small)",
        "loss": f"cross-entropy + {recipe.penalty_weight:g} · {recipe.penalty_type}"
        if recipe.penalty_weight
        else "cross-entropy",
        "intervals": f"log every {recipe.logging_steps} steps, validate every {recipe.eval_steps}, "
        f"save every {recipe.save_steps}" + (f", sample every {recipe.sample_steps}" if recipe.sample_steps else ""),
        "in all": f"{plan.evaluations:,} validations{evaluation}, "
        f"{plan.saves:,} checkpoint{'s' * (plan.saves > 1)}{samples}",
        "disk": f"{data_bytes}, checkpoints {format_bytes(plan.checkpoint_bytes)} each, "
        f"run folder up to {format_bytes(plan.output_bytes)}",
        "memory": f"{format_bytes(sum(plan.memory.values()))} of tensors a process, estimated: {memory}",
        "time": show_expected_time(plan),
        "written to": recipe.output_dir,
    }
    lines = [f"Plan of {recipe.run_name}"] + [f"  {name:<11}{text}" for name, text in rows.items()]
    return lines + [f"  warning    {text}" for text in plan.warnings]


def show_expected_time(plan: Plan) -> str:
    work = f"{plan.train_flops:.3g} FLOP"
    if plan.seconds is None:
        return f"{work}; not estimated for this device, the first steps will tell"
    low, high = (format_duration(seconds) for seconds in plan.seconds)
    rate = plan.total_tokens / plan.seconds[0]
    return (
        f"{work}; {low} to {high} on {plan.processes} x {plan.device}: derived from bytes and FLOPs of the code, "
        f"{rate:,.0f} tokens/s, to {SLOWEST:g} times that"
    )


def sparkline(values: list[float]) -> str:
    """The values as one line of characters, from 0 to the largest."""
    top = max(values) or 1.0
    return "".join(CURVE[round(value / top * (len(CURVE) - 1))] for value in values)
