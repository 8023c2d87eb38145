"""The zero-shot tasks of a recipe beside the training, as scripts/evaluate_model.py evaluates them on the export."""

import contextlib
import io
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from clm_owt.console import waiting
from clm_owt.errors import RunFailed
from clm_owt.evaluation.zero_shot import ZeroShotTasks
from clm_owt.model.fp8 import transpose_linear_weights
from clm_owt.model.gpt2 import GPT2ForPretraining
from clm_owt.recipe import Recipe
from clm_owt.stopping import StopRequest
from clm_owt.training.checkpoint import copy_to_host
from clm_owt.training.device_memory import is_out_of_memory, release_cached_memory
from clm_owt.training.processes import Processes


class TaskEvaluation:
    """The tasks of `eval_tasks`, with definitions and data, on the main process. Raises InputError, on all processes,
    for tasks that cannot be evaluated here. Collective."""

    def __init__(self, recipe: Recipe, processes: Processes):
        self._processes = processes
        self._tasks: ZeroShotTasks | None = None
        self._examples = 0
        if recipe.eval_tasks:
            self._examples = processes.on_main(self._load, recipe)

    def _load(self, recipe: Recipe) -> int:
        with waiting(f"loading the zero-shot tasks {' '.join(recipe.eval_tasks)}"):
            self._tasks = ZeroShotTasks(recipe.eval_tasks, recipe.eval_task_folder, key="eval_tasks")
        return self._tasks.examples

    @property
    def lines(self) -> list[str]:
        """What there is to evaluate, for the user."""
        return [f"Zero-shot tasks: {self._examples:,} examples each time"] if self._examples else []

    def evaluate(
        self, model: GPT2ForPretraining, tokenizer: PreTrainedTokenizerBase, stop: StopRequest, what: str
    ) -> dict[str, float]:
        """The metrics of the model as it would be exported, by `<task>/<metric>`; on the main process, and nothing on
        the others. Collective: parameters in shards are gathered, and the others wait while the main one computes.

        In float32 without autocast, from a copy of the weights. Raises Stopped, on all processes together, and
        RunFailed where memory does not suffice.
        """
        processes = self._processes
        weights = copy_to_host(dict(model.named_parameters()), keep=processes.is_main)

        def work(check: Callable[[], None]) -> dict[str, float]:
            exported = model.exported(transpose_linear_weights(model, weights)).to(processes.device)
            try:
                # The harness's own bars of progress would go through the lines of the training.
                with waiting(what), contextlib.redirect_stderr(io.StringIO()):
                    results = self._tasks.evaluate(exported, tokenizer, check=check)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise RunFailed(
                    f"{what}: out of memory with a copy of the model beside the training; make room on the device, or "
                    "continue with --eval_tasks none: scripts/evaluate_model.py evaluates the export"
                ) from error
            return {f"{task}/{name}": value for task, metrics in results.items() for name, value in metrics.items()}

        release_cached_memory()
        try:
            return processes.by_main(work, stop) or {}
        finally:
            release_cached_memory()
