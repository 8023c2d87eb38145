"""The zero-shot tasks that GPT-2 is judged by, through lm-evaluation-harness (the extra `[eval]`)."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clm_owt.errors import InputError
from clm_owt.formatting import text_table

if TYPE_CHECKING:  # of the extra [eval]
    from lm_eval.api.model import LM

BATCH_SIZE = 8  # requests at a time
SEED = 1234  # lm_eval's own, of all but Python's random numbers

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


class ZeroShotTasks:
    """Tasks with their definitions and data, ready to be evaluated again and again. `folder` holds further definitions
    (YAML), which may read local data; `key` is what the user calls the tasks.

    Raises InputError for a task that is unknown or does not work, data that cannot be had, and a missing lm_eval.
    """

    def __init__(self, names: Sequence[str], folder: Path | str | None, key: str):
        try:
            from lm_eval.models.dummy import DummyLM
            from lm_eval.tasks import TaskManager
        except ModuleNotFoundError as error:
            raise InputError(f"{key}: {error.name} is not installed; pip install 'clm_owt[eval]'") from error
        asked = f"{key} {' '.join(names)}"
        try:
            with seeded():
                manager = TaskManager(include_path=str(folder) if folder else None)
                unknown = [name for name in names if not manager.match_tasks([name])]
                if not unknown:
                    self._loaded = manager.load(list(names))
                    self._evaluate(DummyLM(), limit=1)  # what does not work comes to light here
        except Exception as error:  # whatever a definition does
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"{asked}: {reason}; repair the definition, or get the data and name its place"
            ) from error
        if unknown:
            raise InputError(f"{key}: unknown: {', '.join(unknown)}; `lm-eval ls tasks` lists them")

    @property
    def examples(self) -> int:
        """Of all tasks together."""
        return sum(len(task.eval_docs) for task in self._loaded["tasks"].values())

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = BATCH_SIZE,
        limit: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, dict[str, float]]:
        """The metrics of each task, by its name and theirs. `limit` is how many examples of each task are taken (None:
        all). `check` is called before each forward pass: raise there to break off. The random states of the caller are
        left as they were."""
        from lm_eval.models.huggingface import HFLM

        hook = model.register_forward_pre_hook(lambda *_: check())
        try:
            with seeded():
                # A copy of the tokenizer, since it is given a token for padding.
                lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
                return self._evaluate(lm, limit)
        finally:
            hook.remove()

    def _evaluate(self, lm: "LM", limit: int | None) -> dict[str, dict[str, float]]:
        """As lm_eval.simple_evaluate, which would ask the system for its versions each time."""
        import lm_eval

        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        found = lm_eval.evaluate(lm, self._loaded, limit=limit, bootstrap_iters=0, log_samples=False)
        return {
            task: {name.split(",")[0]: value for name, value in metrics.items() if is_metric(name, value)}
            for task, metrics in found["results"].items()
        }


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Random numbers from the seeds of lm-evaluation-harness, and after that from the states that were before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


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
