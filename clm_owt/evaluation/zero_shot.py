"""The zero-shot tasks that GPT-2 is judged by, through lm-evaluation-harness (the extra `[eval]`)."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clm_owt.errors import InputError
from clm_owt.formatting import text_table

# GPT-2 small (124 M), by task and metric as lm-evaluation-harness names them: what OpenAI published, and what others
# measured of OpenAI's weights with this harness. The two differ because OpenAI prepared LAMBADA and WikiText-2 in its
# own ways ("invertible de-tokenizers"); it published nothing on HellaSwag and PIQA.
# Paper: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 3, line 117M.
# Harness: LAMBADA https://github.com/EleutherAI/lm-evaluation-harness/issues/2159, HellaSwag
# https://github.com/karpathy/build-nanogpt/blob/master/hellaswag.py, PIQA https://huggingface.co/crumb/gpt2023
PUBLISHED = {
    ("lambada_openai", "acc"): (0.4599, 0.3256),
    ("lambada_openai", "perplexity"): (35.13, 40.06),
    ("wikitext", "word_perplexity"): (29.41, None),
    ("hellaswag", "acc"): (None, 0.2892),
    ("hellaswag", "acc_norm"): (None, 0.3114),
    ("piqa", "acc"): (None, 0.6289),
}


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    task_folder: Path | None,
    batch_size: int,
    limit: int | None,
) -> dict[str, dict[str, float]]:
    """The metrics of each task, by its name and theirs. `task_folder` holds further task definitions (YAML), which may
    read local data; `limit` is how many examples of each task are taken (None: all).

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
    """Whether an entry of lm-evaluation-harness's results is a metric, and not its error or its name."""
    return isinstance(value, float) and "stderr" not in name


def results_table(results: dict[str, dict[str, float]]) -> str:
    """A line for each metric, with the published figures of GPT-2 small beside it where there are any."""
    rows = []
    for task, metrics in results.items():
        for name, value in metrics.items():
            published = PUBLISHED.get((task, name), (None, None))
            figures = ("-" if figure is None else f"{figure:g}" for figure in published)
            rows.append([task, name, f"{value:.4f}", *figures])
    return text_table(["task", "metric", "here", "GPT-2 paper", "GPT-2 in lm-eval"], rows)
