"""W&B, TensorBoard and Trackio, through Accelerate's trackers: they get what metrics.jsonl gets, and can only be lost.

Only the main process has any. A row is handed over once, also over kills and resumptions: `trackers.json` in the run's
folder keeps up to which step rows were handed over by earlier sessions, before metrics.jsonl is cut back.
"""

import contextlib
import json
import os
import socket
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from clm_owt.recipe import Recipe
from clm_owt.state import TrainState

RECORD = "trackers.json"
CONNECT_SECONDS = 5
WANDB_INIT_SECONDS = 30
WANDB_FINISH_SECONDS = 60  # by default it waits for ever for a network that is gone


class Trackers:
    """Those of `report_to`. One that fails is left out from then on, with a line that says so."""

    def __init__(self, recipe: Recipe, say: Callable[..., None]):
        self._recipe = recipe
        self._folder = Path(recipe.output_dir)
        self._say = say
        self._running: dict[str, GeneralTracker] = {}
        self._handed_over: dict[str, int] = {}  # the last step, by kind of row

    def start(self, state: TrainState, config: dict[str, object], written: dict[str, int]) -> None:
        """Begin, or continue the trackers' runs. `written` is the last step of the train and validation rows and of
        the samples that the run's files held before they were cut back to `state`."""
        if not self._recipe.report_to:
            return
        path = self._folder / RECORD
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"ids": {}, "handed_over": {}}
        handed_over = record["handed_over"]
        for kind, step in (*written.items(), ("train", state.step), ("validation", state.validated_step)):
            handed_over[kind] = max(step, handed_over.get(kind, -1))
        self._handed_over = handed_over
        begun = set(record["ids"]) | set(state.tracker_ids)
        record["ids"] |= state.tracker_ids
        for name in self._recipe.report_to:
            new_id = os.environ.get("WANDB_RUN_ID") if name == "wandb" else None  # as a sweep's agent gives it
            state.tracker_ids[name] = record["ids"].setdefault(name, new_id or os.urandom(4).hex())
        aside = path.with_name(path.name + ".partial")
        aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        aside.replace(path)

        starters = {"wandb": self._start_wandb, "tensorboard": self._start_tensorboard, "trackio": self._start_trackio}
        for name in self._recipe.report_to:
            try:
                self._running[name] = starters[name](state.tracker_ids[name], config, name in begun)
            except Exception as error:
                self._give_up(name, error)

    def row(self, kind: str, row: dict[str, object]) -> None:
        """A row of metrics.jsonl: `train/loss`, ..., with `tokens` and `step` as axes."""
        step = row["step"]
        if step <= self._handed_over.get(kind, -1):
            return
        values = {f"{kind}/{name}": value for name, value in row.items() if name not in ("step", "tokens")}
        values = {name: value for name, value in values.items() if value is not None}
        axes = {"tokens": row["tokens"], "step": step}

        def log(name: str, tracker: GeneralTracker) -> None:
            if name == "wandb":  # the others draw over the step that comes with every value
                tracker.log(values | axes, step=step)
            else:
                tracker.log(values | {"tokens": row["tokens"]}, step=step)

        self._each(log)

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """A table of prompts and continuations."""
        if step <= self._handed_over.get("samples", -1):
            return
        columns = ["step", "prompt", "text"]
        rows = [[step, prompt, text] for prompt, text in zip(prompts, texts, strict=True)]

        def log(name: str, tracker: GeneralTracker) -> None:
            if name == "wandb":
                tracker.log_table("samples", columns=columns, data=rows, step=step)
            elif name == "trackio":
                import pandas
                import trackio

                table = trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))
                tracker.log({"samples": table}, step=step)
            else:  # Markdown
                text = "\n\n".join(f"**{prompt}**{text}" for _, prompt, text in rows)
                tracker.log({"samples": text}, step=step)

        self._each(log)

    def summarize(self, best_validation_loss: float) -> None:
        """Put the best validation loss above the run, where a tracker has a place for it."""
        if "wandb" in self._running:
            summary = {"best_validation_loss": best_validation_loss}
            self._each(lambda name, tracker: tracker.run.summary.update(summary) if name == "wandb" else None)

    def finish(self) -> None:
        with contextlib.redirect_stdout(None):  # Trackio's parting words
            self._each(lambda name, tracker: tracker.finish())
        self._running = {}

    def _each(self, action: Callable[[str, GeneralTracker], object]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                action(name, tracker)
            except Exception as error:
                del self._running[name]
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        later = f"; to sync what it has: {self._wandb_sync('*run-*')}" if name == "wandb" else ""
        self._say(f"{name} failed ({reason}): the run goes on without it; metrics.jsonl has everything{later}")

    @property
    def _wandb_folder(self) -> str:
        return os.environ.get("WANDB_DIR") or str(self._folder)

    def _wandb_sync(self, runs: str) -> str:
        """The command that syncs later."""
        return f"wandb sync {self._wandb_folder}/wandb/{runs}"

    def _start_wandb(self, run_id: str, config: dict[str, object], begun: bool) -> WandBTracker:
        import wandb

        seconds = {"init_timeout": WANDB_INIT_SECONDS, "finish_timeout": WANDB_FINISH_SECONDS}
        options = {
            "name": self._recipe.run_name,
            "id": run_id,
            "resume": "allow",
            "dir": self._wandb_folder,
            "settings": wandb.Settings(**seconds, finish_timeout_raises=True, silent=True),
        }
        mode = os.environ.get("WANDB_MODE")
        reason = wandb_obstacle() if mode is None else None
        tracker = WandBTracker(self._recipe.wandb_project, **options, mode="offline" if reason else mode)
        try:
            tracker.start()
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            reason = " ".join(str(error).split())
            wandb.teardown()  # the online run that was begun holds the id
            tracker = WandBTracker(self._recipe.wandb_project, **options, mode="offline")
            tracker.start()
        if reason:
            self._say(f"W&B is offline ({reason}); to sync it later: {self._wandb_sync('offline-run-*')}")
        elif tracker.run.url:
            self._say(f"W&B: {tracker.run.url}")
        tracker.store_init_configuration(config)
        for pattern in ("train/*", "validation/*"):
            tracker.run.define_metric(pattern, step_metric="step")
        return tracker

    def _start_tensorboard(self, run_id: str, config: dict[str, object], begun: bool) -> TensorBoardTracker:
        tracker = TensorBoardTracker("tensorboard", self._folder)
        tracker.start()
        if not begun:
            plain = (int, float, str, bool)
            tracker.store_init_configuration(
                {name: value if isinstance(value, plain) else json.dumps(value) for name, value in config.items()}
            )
        return tracker

    def _start_trackio(self, run_id: str, config: dict[str, object], begun: bool) -> TrackioTracker:
        # Trackio knows its runs by name: of two runs of one name, only the one that began there is continued.
        options = {"name": f"{self._recipe.run_name}-{run_id}", "resume": "allow" if begun else "never"}
        options |= {"config": config, "auto_log_cpu": False, "auto_log_gpu": False}
        tracker = TrackioTracker(self._recipe.wandb_project, **options)
        with contextlib.redirect_stdout(None):
            tracker.start()
        self._say(f"Trackio: to watch it: trackio show --project {self._recipe.wandb_project}")
        return tracker


def wandb_obstacle() -> str | None:
    """Why W&B cannot be online, as far as that can be told without waiting: no key, or no way to its server."""
    import wandb
    from wandb.sdk.lib.wbauth import authenticate_session

    host = wandb.setup().settings.base_url
    # By default wandb would ask for a key, and wait for the answer.
    if authenticate_session(host=host, source="clm_owt", prompt=False, update_session=False) is None:
        return "no API key; `wandb login`"
    if urllib.request.getproxies():
        return None
    address = urlsplit(host)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached: {error}"
    return None
