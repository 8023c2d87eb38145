"""What a recipe implies: blocks, steps, tokens, the cut of the batch. Pure arithmetic, shown before anything is paid."""

from dataclasses import asdict, dataclass

from clm_owt.batching import describe_cut
from clm_owt.recipe import InputError, Recipe, schedule_problems


@dataclass(frozen=True)
class Data:
    """What is known of the data when the plan is made; None where it is still being read."""

    train_documents: int | None
    validation_documents: int | None
    train_blocks: int | None
    validation_blocks: int | None


@dataclass(frozen=True)
class Plan:
    """The numbers of a run, fixed when it begins and kept in `plan.json`."""

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
    warmup_steps: int
    warmup_share: float
    learning_rate_peak: float
    learning_rate_floor: float
    parameters: int
    vocab_size: int
    processes: int
    micro_batch: int
    batch_arithmetic: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def make_plan(recipe: Recipe, data: Data, *, vocab_size: int, processes: int, micro_batch: int) -> Plan:
    """The plan of a run. Raises InputError where the run cannot be: no whole step, a warm-up that does not end,
    fewer blocks in a batch than processes, or a length that depends on a count of blocks nobody knows yet."""
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
    if problems:
        raise InputError("\n".join(problems))
    tokens_per_step = recipe.effective_batch_size * recipe.block_size
    blocks = data.train_blocks or recipe.expected_train_blocks
    return Plan(
        train_documents=data.train_documents,
        validation_documents=data.validation_documents,
        train_blocks=blocks,
        train_blocks_expected=data.train_blocks is None and blocks is not None,
        validation_blocks=data.validation_blocks,
        total_steps=total_steps,
        total_tokens=total_steps * tokens_per_step,
        tokens_per_step=tokens_per_step,
        steps_per_epoch=blocks / recipe.effective_batch_size if blocks else None,
        epochs=total_steps * recipe.effective_batch_size / blocks if blocks else None,
        warmup_steps=recipe.warmup_steps,
        warmup_share=recipe.warmup_steps / total_steps,
        learning_rate_peak=recipe.learning_rate,
        learning_rate_floor=recipe.learning_rate * recipe.min_lr_ratio,
        parameters=count_parameters(recipe, vocab_size),
        vocab_size=vocab_size,
        processes=processes,
        micro_batch=micro_batch,
        batch_arithmetic=describe_cut(recipe.effective_batch_size, processes, micro_batch),
    )


def count_parameters(recipe: Recipe, vocab_size: int) -> int:
    """Parameters of GPT-2 with tied embeddings: (V + T)·D + L·(12·D² + 13·D) + 2·D; 124,439,808 for the smallest."""
    d = recipe.n_embd
    return (vocab_size + recipe.block_size) * d + recipe.n_layer * (12 * d * d + 13 * d) + 2 * d


def describe(plan: Plan, recipe: Recipe) -> list[str]:
    """The plan as the lines a user reads before the run."""

    def amount(number: float | None, unit: str) -> str:
        return f"{number:,} {unit}" if number is not None else f"{unit} not counted yet"

    blocks = amount(plan.train_blocks, "training blocks")
    if plan.train_blocks_expected:
        blocks += " expected (still being read)"
    epochs = f", {plan.epochs:.2f} epochs of {plan.steps_per_epoch:,.1f} steps" if plan.epochs is not None else ""
    rows = {
        "data": f"{recipe.dataset_name}: {amount(plan.train_documents, 'training documents')}, "
        f"{amount(plan.validation_documents, 'validation documents')}",
        "blocks": f"{blocks}, {amount(plan.validation_blocks, 'validation blocks')}, of {recipe.block_size} tokens",
        "length": f"{plan.total_steps:,} steps of {plan.tokens_per_step:,} tokens{epochs}; "
        f"{plan.total_tokens:,} tokens in all",
        "batch": plan.batch_arithmetic,
        "model": f"{plan.parameters:,} parameters: {recipe.n_layer} layers, {recipe.n_head} heads, width "
        f"{recipe.n_embd}, vocabulary {plan.vocab_size:,}; {plan.total_tokens / plan.parameters:.1f} tokens each",
        "rate": f"peak {plan.learning_rate_peak:g} after {plan.warmup_steps:,} steps of warm-up "
        f"({plan.warmup_share:.1%} of the run), floor {plan.learning_rate_floor:g}",
        "loss": f"cross-entropy + {recipe.penalty_weight:g} · {recipe.penalty_type}"
        if recipe.penalty_weight
        else "cross-entropy",
        "rhythm": f"log every {recipe.logging_steps} steps, validate every {recipe.eval_steps}, "
        f"save every {recipe.save_steps}" + (f", sample every {recipe.sample_steps}" if recipe.sample_steps else ""),
        "written to": recipe.output_dir,
    }
    return [f"Plan of {recipe.run_name}"] + [f"  {name:<11}{text}" for name, text in rows.items()]
