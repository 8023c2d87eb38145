"""The zero-shot tasks that GPT-2 is judged by, through lm-evaluation-harness (the extra `[eval]`)."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clm_owt.recipe import InputError

# Of GPT-2 small (124 M), as published; task and metric as lm-evaluation-harness names them. The figures of the GPT-2
# paper (table 3) follow its own protocol: LAMBADA with a stop-word filter, WikiText with invertible de-tokenizers.
PUBLISHED = {
    ("lambada_openai", "acc"): (0.4599, "GPT-2 paper"),
    ("lambada_openai", "perplexity"): (35.13, "GPT-2 paper"),
    ("wikitext", "word_perplexity"): (29.41, "GPT-2 paper, WikiText-2"),
    ("hellaswag", "acc_norm"): (0.294, "OpenAI's weights, by llm.c"),
}


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    task_folder: Path | None,
    batch_size: int,
    limit: int | None,
) -> dict[str, dict[str, float]]:
    """The metrics of each task. `task_folder` holds task definitions of one's own (YAML), which may read local data.

    Raises InputError for a task that is unknown, data that cannot be had, and a missing lm_eval."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise InputError(f"--tasks: {error.name} is not installed; pip install 'clm_owt[eval]'") from error
    manager = TaskManager(include_path=str(task_folder) if task_folder else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(f"--tasks: unknown: {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"--tasks {' '.join(tasks)}: {type(error).__name__}: {error}") from error
    return {
        task: {name.split(",")[0]: value for name, value in metrics.items() if is_metric(name, value)}
        for task, metrics in found["results"].items()
    }


def is_metric(name: str, value: object) -> bool:
    return isinstance(value, float) and "stderr" not in name


def describe(results: dict[str, dict[str, float]]) -> list[str]:
    """A line for each metric, with the published figure beside it where there is one."""
    lines = [f"{'task':<18} {'metric':<18} {'here':>10}   GPT-2 124 M as published"]
    for task, metrics in results.items():
        for name, value in metrics.items():
            figure, source = PUBLISHED.get((task, name), (None, ""))
            beside = f"{figure:g} ({source})" if figure is not None else "-"
            lines.append(f"{task:<18} {name:<18} {value:>10.4f}   {beside}")
    return lines
