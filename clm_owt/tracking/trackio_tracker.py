"""Trackio: a dashboard on this machine, from a database in the cache of Hugging Face."""

import contextlib
from collections.abc import Sequence

import accelerate.tracking
import pandas
import trackio

from clm_owt.tracking.trackers import Tracker


class TrackioTracker(Tracker):
    """Draws every value over its step; shows samples as a table."""

    def start(self, run_id: str, config: dict[str, object], begun: bool) -> None:
        self._run = accelerate.tracking.TrackioTracker(
            self.recipe.wandb_project,
            # Trackio knows its runs by name: of two runs of one name, only the one that began there is continued.
            name=f"{self.recipe.run_name}-{run_id}",
            resume="allow" if begun else "never",
            config=config,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        with contextlib.redirect_stdout(None):
            self._run.start()
        self.say(f"Trackio: to watch it: trackio show --project {self.recipe.wandb_project}")

    def row(self, step: int, values: dict[str, object]) -> None:
        self._run.log(values, step=step)

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        rows = [(step, prompt, text) for prompt, text in samples]
        table = trackio.Table(dataframe=pandas.DataFrame(rows, columns=["step", "prompt", "text"]))
        self._run.log({"samples": table}, step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(None):
            trackio.finish()  # not the run's own: Trackio would finish it again at the exit, and say so
