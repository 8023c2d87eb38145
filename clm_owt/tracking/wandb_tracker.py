"""Weights & Biases: online where there is a key and a way to its server, else offline, to be synced later."""

import os
import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import accelerate.tracking
import wandb
from wandb.sdk.lib.wbauth import authenticate_session

from clm_owt.tracking.trackers import Tracker

CONNECT_SECONDS = 5
INIT_SECONDS = 30
FINISH_SECONDS = 60  # by default W&B waits for ever for a network that is gone


class WandbTracker(Tracker):
    """Draws every value over its step, the default, or over `tokens`; shows samples as a table, and the summary."""

    def new_run_id(self) -> str:
        return os.environ.get("WANDB_RUN_ID") or super().new_run_id()  # as a sweep's agent gives it

    def start(self, run_id: str, config: dict[str, object], begun: bool) -> None:
        mode = os.environ.get("WANDB_MODE")
        reason = offline_reason() if mode is None else None
        try:
            self._begin(run_id, mode="offline" if reason else mode)
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            reason = " ".join(str(error).split())
            wandb.teardown()  # the online run that was begun holds the id
            self._begin(run_id, mode="offline")
        if reason:
            self.say(f"W&B is offline ({reason}); to sync it later: {self._sync_command('offline-run-*')}")
        elif self._run.run.url:
            self.say(f"W&B: {self._run.run.url}")
        self._run.store_init_configuration(config)
        for pattern in ("train/*", "validation/*"):
            self._run.run.define_metric(pattern, step_metric="step")

    def row(self, step: int, values: dict[str, object]) -> None:
        self._run.log(values | {"step": step}, step=step)

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        rows = [[step, prompt, text] for prompt, text in samples]
        self._run.log_table("samples", columns=["step", "prompt", "text"], data=rows, step=step)

    def summary(self, values: dict[str, object]) -> None:
        self._run.run.summary.update(values)

    def finish(self) -> None:
        self._run.finish()

    def how_to_recover(self) -> str:
        return f"to sync what it has: {self._sync_command('*run-*')}"

    def _begin(self, run_id: str, mode: str | None) -> None:
        self._run = accelerate.tracking.WandBTracker(
            self.recipe.wandb_project,
            name=self.recipe.run_name,
            id=run_id,
            resume="allow",
            dir=self._folder,
            settings=wandb.Settings(
                init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True, silent=True
            ),
            mode=mode,
        )
        self._run.start()

    @property
    def _folder(self) -> str:
        return os.environ.get("WANDB_DIR") or str(Path(self.recipe.output_dir))

    def _sync_command(self, runs: str) -> str:
        return f"wandb sync {self._folder}/wandb/{runs}"


def offline_reason() -> str | None:
    """Why W&B cannot be online, as far as that can be told at once: no key, or no way to its server. None where
    nothing is in the way, or where a proxy would have to be asked."""
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
