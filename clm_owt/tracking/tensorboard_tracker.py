"""TensorBoard: event files in `tensorboard/` in the run's folder."""

import json
from collections.abc import Sequence

import accelerate.tracking

from clm_owt.tracking.trackers import Tracker


class TensorBoardTracker(Tracker):
    """Draws every value over its step; shows samples as Markdown, and the settings once."""

    def start(self, run_id: str, config: dict[str, object], begun: bool) -> None:
        self._run = accelerate.tracking.TensorBoardTracker("tensorboard", self.recipe.output_dir)
        self._run.start()
        if not begun:
            plain = (int, float, str, bool)
            self._run.store_init_configuration(
                {name: value if isinstance(value, plain) else json.dumps(value) for name, value in config.items()}
            )

    def row(self, step: int, values: dict[str, object]) -> None:
        self._run.log(values, step=step)

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        markdown = "\n\n".join(f"**{prompt}**{text}" for prompt, text in samples)
        self._run.log({"samples": markdown}, step=step)

    def finish(self) -> None:
        self._run.finish()
