"""The trackers of `report_to`, such as W&B: they are given what metrics.jsonl gets, and a run never depends on one.

To add a tracker, write a module with its class, derived from `Tracker`, beside this one, and add its line to TRACKERS
and its name to `recipe.TRACKERS`.
"""

import json
import os
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path

from clm_owt.files import write_text
from clm_owt.recipe import Recipe
from clm_owt.state import TrainState

# The class of each tracker. Its module is imported only for a run that reports to it.
TRACKERS = {
    "wandb": "clm_owt.tracking.wandb_tracker:WandbTracker",
    "tensorboard": "clm_owt.tracking.tensorboard_tracker:TensorBoardTracker",
    "trackio": "clm_owt.tracking.trackio_tracker:TrackioTracker",
}

RECORD = "trackers.json"


class Tracker:
    """What a tracker shows of one run. Any method but the constructor may raise anything: the tracker is dropped then,
    with one line. `say` prints a line to the terminal."""

    def __init__(self, recipe: Recipe, say: Callable[..., None]):
        self.recipe = recipe
        self.say = say

    def new_run_id(self) -> str:
        """The id of a run that begins."""
        return os.urandom(4).hex()

    def start(self, run_id: str, config: dict[str, object], begun: bool) -> None:
        """Begin the run `run_id`, or continue it where an earlier session has `begun` it. `config` holds the settings
        of recipe and plan."""
        raise NotImplementedError

    def row(self, step: int, values: dict[str, object]) -> None:
        """The values after `step`: `train/loss` and such, and `tokens`, the tokens seen so far."""
        raise NotImplementedError

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Pairs of a prompt and its continuation."""
        raise NotImplementedError

    def summary(self, values: dict[str, object]) -> None:
        """Values of the run as a whole, which replace earlier ones of their name. A tracker that has no place for them
        leaves this out."""

    def finish(self) -> None:
        """End the run, or this session of it, when all has been sent."""
        raise NotImplementedError

    def how_to_recover(self) -> str | None:
        """What the user can do, after a failure, to see what this tracker was given; None for nothing."""
        return None


class Trackers:
    """The trackers of a run's main process; those that fail are dropped.

    A row is handed over once, also over kills and resumptions: `trackers.json` in the run's folder keeps the id of the
    run at each tracker, and up to which step earlier sessions handed over rows and samples.
    """

    def __init__(self, recipe: Recipe, say: Callable[..., None]):
        self._recipe = recipe
        self._path = Path(recipe.output_dir) / RECORD
        self._say = say
        self._running: dict[str, Tracker] = {}
        self._handed_over: dict[str, int] = {}  # the last step, by kind of row

    def start(self, state: TrainState, config: dict[str, object], written: dict[str, int]) -> None:
        """Begin, or continue, the run at each tracker. `written` is the last step of the rows of each split and of
        the samples that the run's files held before they were cut back to `state`."""
        for name in self._recipe.report_to:
            try:
                self._running[name] = pkgutil.resolve_name(TRACKERS[name])(self._recipe, self._say)
            except Exception as error:  # a package that cannot be imported
                self._drop(name, error)
        if self._running:
            begun = self._update_record(state, written)
            self._each(lambda name, tracker: tracker.start(state.tracker_ids[name], config, name in begun))

    def row(self, kind: str, row: dict[str, object]) -> None:
        """A row of metrics.jsonl, of `kind` train, validation or tasks."""
        step = row["step"]
        if step <= self._handed_over.get(kind, -1):
            return
        values = {
            f"{kind}/{name}": value
            for name, value in row.items()
            if name not in ("step", "tokens") and value is not None
        }
        self._each(lambda _, tracker: tracker.row(step, values | {"tokens": row["tokens"]}))

    def samples(self, step: int, prompts: Sequence[str], continuations: Sequence[str]) -> None:
        """The continuations of the prompts after `step`."""
        if step > self._handed_over.get("samples", -1):
            pairs = list(zip(prompts, continuations, strict=True))
            self._each(lambda _, tracker: tracker.samples(step, pairs))

    def summary(self, values: dict[str, object]) -> None:
        """Values of the run as a whole, such as its best validation loss."""
        self._each(lambda _, tracker: tracker.summary(values))

    def finish(self) -> None:
        """End all trackers. May be called twice."""
        self._each(lambda _, tracker: tracker.finish())
        self._running = {}

    def _update_record(self, state: TrainState, written: dict[str, int]) -> set[str]:
        """Bring trackers.json and the ids in `state` to one; gives the trackers that knew the run before."""
        record = {"ids": {}, "handed_over": {}}
        if self._path.exists():
            record = json.loads(self._path.read_text(encoding="utf-8"))
        ids, self._handed_over = record["ids"], record["handed_over"]
        reached = {"train": state.step, "validation": state.validated_step, "tasks": state.tasks_step}
        for kind, step in (*written.items(), *reached.items()):
            self._handed_over[kind] = max(step, self._handed_over.get(kind, -1))
        ids |= state.tracker_ids
        begun = set(ids)
        for name, tracker in self._running.items():
            state.tracker_ids[name] = ids.setdefault(name, tracker.new_run_id())
        write_text(self._path, json.dumps(record, indent=2) + "\n")
        return begun

    def _each(self, action: Callable[[str, Tracker], object]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                action(name, tracker)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        tracker = self._running.pop(name, None)
        recovery = tracker and tracker.how_to_recover()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self._say(
            f"{name} failed ({reason}): the run goes on without it; metrics.jsonl has everything"
            + (f"; {recovery}" if recovery else "")
        )
