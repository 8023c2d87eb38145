"""Sharing a run on the Hugging Face Hub: uploads in the background, which never stop or change the training.

What is uploaded is first laid out in a folder of its own, `<run>/hub/step-00000500/`, and removed when it has arrived;
one that has not arrived stays, for `scripts/push.py <run>`.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from clm_owt.console import waiting
from clm_owt.errors import InputError
from clm_owt.files import replacing_folder
from clm_owt.hub_client import set_timeout
from clm_owt.model.gpt2 import GPT2ForPretraining
from clm_owt.recipe import Recipe
from clm_owt.reports.model_card import model_card
from clm_owt.reports.record import read_metrics, read_plan, read_recipe
from clm_owt.stopping import StopRequest
from clm_owt.upload_queue import UploadQueue

# Between the commits of a run that goes on; the Hub takes 128 an hour of a repository.
SECONDS_BETWEEN_COMMITS = 300.0

CARRIED_FILES = ("recipe.yaml", "plan.json", "training_curves.png", "samples.md")


def prepare_client() -> None:
    """Give the client of huggingface_hub a time limit, and keep its retries and progress bars from the terminal."""
    set_timeout()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()


@waiting("looking up the repository on the Hub")
def check_repository(recipe: Recipe) -> list[str]:
    """With `push_to_hub`, create the repository if there is none, and check that this user may write to it.

    Gives what is to be said: a line where the server cannot be reached. Raises InputError for what will not pass by
    itself: no token or a rejected one, a missing right, an impossible name.
    """
    repo_id = recipe.hub_model_id
    if not recipe.push_to_hub:
        return []
    prepare_client()
    try:
        private = is_private(recipe.hub_private_repo, recipe.hub_strategy)
        full_id = ensure_repository(HfApi(), repo_id, private)
        if private != recipe.hub_private_repo:
            is_now = "private" if HfApi().repo_info(full_id).private else "public, and its checkpoints with it"
            return [
                f"{full_id} is {is_now}: hub_strategy checkpoint creates private ones unless hub_private_repo is set"
            ]
    except Exception as error:
        if will_not_pass(error):
            raise InputError(f"hub_model_id: {repo_id}: {explain(error)}; or set push_to_hub: false") from error
        return [f"The Hub cannot be asked about {repo_id} ({explain(error)}): the run goes on, and uploads later"]
    return []


def is_private(hub_private_repo: bool | None, hub_strategy: str) -> bool | None:
    """Whether a repository is to be created as private (None: as the user's account has it): what only continues a
    run is for nobody else, unless the recipe says so."""
    return True if hub_private_repo is None and hub_strategy == "checkpoint" else hub_private_repo


def ensure_repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """The full id of the repository, which exists and may be written to. Raises LocalTokenNotFoundError, without
    asking the Hub, where this user has no token."""
    if huggingface_hub.get_token() is None:
        raise LocalTokenNotFoundError
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.auth_check(repo_id, write=True)  # a 409 of the creation says nothing of the right to write
    return repo_id


def will_not_pass(error: Exception) -> bool:
    """Whether repeating the request cannot help: a client's error, but not a conflict, a time-out or a full quota."""
    if isinstance(error, LocalTokenNotFoundError):  # an OSError
        return True
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return 400 <= status < 500 and status not in (408, 409, 412, 423, 425, 429)
    return not isinstance(error, (httpx2.HTTPError, OSError))


def explain(error: Exception) -> str:
    """An error in one line, with what to do where the user can do something."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or error.response.reason_phrase or type(error).__name__
        advice = {
            401: "not logged in, or the token is rejected; `hf auth login`, or a valid token in HF_TOKEN",
            403: "this token may not write there; use a token with write access, or a repository of your own",
            404: "there is no such repository that this token may see; check the name and the token",
        }
        return f"{status} {' '.join(said.split())}" + (f": {advice[status]}" if status in advice else "")
    if isinstance(error, LocalTokenNotFoundError):
        return "not logged in; `hf auth login`, or a token in HF_TOKEN"
    if isinstance(error, HFValidationError):
        return f"no valid repository id; expected name or user/name ({' '.join(str(error).split())})"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(": ")


def stage(run: Path, step: int, write_model: Callable[[Path], None]) -> Path:
    """Lay out what the repository is to hold after `step`, rows of later steps left out; the card is written when the
    repository's full name is known."""
    folder = run / "hub" / f"step-{step:08d}"
    with replacing_folder(folder) as aside:
        write_model(aside)
        for name in CARRIED_FILES:
            if (run / name).exists():
                shutil.copy(run / name, aside / name)
        rows = [json.dumps(row) + "\n" for row in read_metrics(run / "metrics.jsonl") if row["step"] <= step]
        (aside / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def upload(folder: Path, repo_id: str, private: bool | None) -> str:
    """Upload a staged folder as one commit, and mark it with a tag of the step's name. Gives the commit's URL.

    What is there already is not sent again, so that it may be repeated after any failure.
    """
    api = HfApi()
    repo_id = ensure_repository(api, repo_id, private)
    step = step_of(folder)
    (folder / "README.md").write_text(str(model_card(folder, repo_id, step)), encoding="utf-8")
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Step {step:,}")
    try:
        api.create_tag(repo_id, tag=folder.name, revision=commit.oid)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        api.delete_tag(repo_id, tag=folder.name)  # of an earlier run, or of an attempt whose answer was lost
        api.create_tag(repo_id, tag=folder.name, revision=commit.oid)
    return str(commit.commit_url)


def push(run: Path, repo_id: str | None, private: bool | None) -> str:
    """Upload a finished run, or the last upload of an unfinished one that did not arrive, now and once; gives the URL.

    Raises InputError where there is nothing to upload or no right to; other errors as they come. To be called while no
    run writes to the folder.
    """
    recipe = read_recipe(run)
    repo_id = repo_id or recipe["hub_model_id"]
    if not repo_id:
        raise InputError(f"{run}: its recipe has no hub_model_id; give one: --hub_model_id me/gpt2-owt")
    if private is None:
        private = is_private(recipe["hub_private_repo"], recipe["hub_strategy"])
    prepare_client()
    staged = sorted(path for path in (run / "hub").glob("step-*") if not path.name.endswith(".partial"))
    if (run / "model").exists():
        folder = stage(run, read_plan(run)["total_steps"], lambda aside: shutil.copytree(run / "model", aside))
    elif staged:
        folder = staged[-1]
    else:
        raise InputError(
            f"{run} has nothing to upload yet; continue the run to its end with the command it began with"
        )
    try:
        url = upload(folder, repo_id, private)
    except Exception as error:
        if will_not_pass(error):
            raise InputError(f"{repo_id}: {explain(error)}") from error
        raise
    shutil.rmtree(run / "hub")
    return url


class HubUploads:
    """The uploads of a run, one at a time; a newer one replaces one that waits. Without `push_to_hub`, and on all
    processes but the main one, it does nothing."""

    def __init__(
        self,
        recipe: Recipe,
        model: GPT2ForPretraining,
        tokenizer: PreTrainedTokenizerBase,
        total_steps: int,
        is_main: bool,
        say: Callable[..., None],
    ):
        self._recipe = recipe
        self._total_steps = total_steps
        self._run = Path(recipe.output_dir)
        self._say = say
        self._active = recipe.push_to_hub and is_main
        if not self._active:
            return
        self._model = model
        self._tokenizer = copy.deepcopy(tokenizer)  # a tokenizer must not be used by two threads at once
        shutil.rmtree(self._run / "hub", ignore_errors=True)  # of an earlier session; newer ones follow
        self._queue = UploadQueue("hub", self._upload, self._failed, will_not_pass, say, SECONDS_BETWEEN_COMMITS)

    def saved(self, checkpoint: Path) -> None:
        """Upload a checkpoint that was just written, where the recipe says so. Called beside the training, by the
        thread that writes checkpoints; what goes wrong is printed, and changes nothing."""
        step = step_of(checkpoint)
        if not self._active or self._recipe.hub_strategy == "end" or step == self._total_steps:
            return
        try:
            weights = load_file(checkpoint / "model.safetensors")
            self._offer(step, lambda aside: self._write_model(aside, weights))
        except Exception as error:
            self._say(f"Step {step:,} could not be prepared for the Hub: {explain(error)}")

    def finish(self, stop: StopRequest) -> None:
        """Upload the finished run, and wait for it. Raises Stopped when told to stop meanwhile."""
        if not self._active:
            return
        self._offer(self._total_steps, lambda aside: shutil.copytree(self._run / "model", aside))
        self._queue.close()
        self._say(f"Uploading to {self._recipe.hub_model_id}")
        stop.reached, stop.way_on = "before the upload had ended", f"to repeat it: python scripts/push.py {self._run}"
        while not self._queue.wait(0.2):
            stop.check()

    def _write_model(self, folder: Path, weights: dict) -> None:
        self._model.save_pretrained(folder, state_dict=weights)
        self._tokenizer.save_pretrained(folder)

    def _offer(self, step: int, write_model: Callable[[Path], None]) -> None:
        self._queue.offer(stage(self._run, step, write_model))

    def _upload(self, folder: Path) -> str:
        recipe = self._recipe
        upload(folder, recipe.hub_model_id, is_private(recipe.hub_private_repo, recipe.hub_strategy))
        return f"Uploaded step {step_of(folder):,} to {recipe.hub_model_id}, revision {folder.name}"

    def _failed(self, folder: Path, error: Exception) -> tuple[str, bool]:
        return (
            f"Step {step_of(folder):,} was not uploaded to {self._recipe.hub_model_id}: {explain(error)}; "
            f"to repeat it: python scripts/push.py {self._run}",
            True,
        )


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's or a staged folder."""
    return int(folder.name.removeprefix("step-"))
