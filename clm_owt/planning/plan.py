"""What a recipe implies: steps, tokens, rates, cut of the batch, disk, memory, time. Shown before anything is paid.

Pure arithmetic over the recipe and what is known of data and hardware. What cannot run is refused; what will run and
probably should not is warned of (cautions.py).
"""

import math
from dataclasses import asdict, dataclass

from clm_owt.batch import describe_cut
from clm_owt.errors import InputError
from clm_owt.formatting import format_bytes, format_duration
from clm_owt.planning import cautions
from clm_owt.planning.devices import Hardware
from clm_owt.planning.disks import Disk, block_bytes, disk_problems, run_folder_bytes
from clm_owt.planning.memory import count_parameters, optimizer_bytes, step_memory
from clm_owt.planning.step_time import SLOWEST, step_seconds
from clm_owt.recipe import Recipe
from clm_owt.schedule import schedule_problems, times_due

# The guide's base for scaling rates with the batch: 6e-4 at 32 blocks.
BASE_RATE, BASE_BATCH = 6e-4, 32

CURVE, CURVE_WIDTH = "▁▂▃▄▅▆▇█", 32


@dataclass(frozen=True)
class Data:
    """What is known of the data when the plan is made; None where it is still being read."""

    train_documents: int | None = None
    validation_documents: int | None = None
    train_blocks: int | None = None
    validation_blocks: int | None = None


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
    parameters = count_parameters(recipe, vocab_size)
    blocks = data.train_blocks or recipe.expected_train_blocks
    data_bytes = None if blocks is None else (blocks + (data.validation_blocks or 0)) * block_bytes(recipe, vocab_size)
    checkpoint_bytes = 4 * parameters + optimizer_bytes(recipe, vocab_size)
    output_bytes = run_folder_bytes(recipe, parameters, checkpoint_bytes, total_steps)
    needs = [(data_disk, data_bytes, "data_cache_dir"), (output_disk, output_bytes, "output_dir")]
    if problems := [*step_problems(recipe, total_steps, processes), *disk_problems(needs)]:
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
            *cautions.of_optimisation(recipe, total_steps, parameters),
            *cautions.of_validation(recipe, data.validation_blocks, evaluation_share, total_steps),
            *cautions.of_saving(recipe, seconds, total_steps),
            *cautions.of_sharding(recipe, vocab_size, micro_batch, hardware),
        ),
    )


def step_problems(recipe: Recipe, total_steps: int, processes: int) -> list[str]:
    """Why so many steps, of the recipe's batch, cannot be taken by so many processes."""
    problems = schedule_problems(
        total_steps, recipe.warmup_steps, recipe.learning_rate, recipe.allow_incomplete_warmup
    )
    if recipe.effective_batch_size < processes:
        problems.append(
            f"effective_batch_size: {recipe.effective_batch_size} blocks cannot be shared out over {processes} "
            f"processes; raise it to {processes} or start fewer processes"
        )
    return problems


def flops_per_token(parameters: int, n_layer: int, n_embd: int, block_size: int) -> float:
    """Of forward and backward: 6·N + 12·L·D·T (PaLM, appendix B: the products with weights, and attention)."""
    return 6 * parameters + 12 * n_layer * n_embd * block_size


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
