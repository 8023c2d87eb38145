"""Whether what a recipe reads can be read here and now. For its plan, which does without where it cannot: a run needs
its data, and asks again and again (`retries`); a plan is to come at once."""

import threading

import httpx2
import huggingface_hub

from clm_owt.data.sources import known_commit, remembered_ref, resolve_source
from clm_owt.data.token_store import TokenStore
from clm_owt.data.tokenizer_files import needs_download
from clm_owt.errors import one_line
from clm_owt.recipe import FILE_FORMATS, PYTHON_DOCS, Recipe, is_url

PROBE_SECONDS = 2.0  # for an answer of any kind, which takes a tenth of it where there is a network


def find_unreachable(recipe: Recipe) -> str | None:
    """Why data or tokenizer of `recipe` cannot be read, in a few words; None if they are here, or each server that is
    to be asked for them gives an answer of any kind within PROBE_SECONDS."""
    reasons = (why_unreachable(server) for server in dict.fromkeys(servers_to_ask(recipe)))
    return next(filter(None, reasons), None)


def servers_to_ask(recipe: Recipe) -> list[str]:
    """The addresses of what is not here yet: the Hub, files that are given as URLs."""
    hub = huggingface_hub.constants.ENDPOINT
    for_tokenizer = [hub] if needs_download(recipe) else []
    if recipe.dataset_name == PYTHON_DOCS:
        return for_tokenizer
    if recipe.dataset_name in FILE_FORMATS:
        for_data = [file for file in (*recipe.data_files, *(recipe.validation_files or ())) if is_url(file)]
        known = all(remembered_ref(recipe, url=file) for file in for_data)
    else:
        for_data, known = [hub], known_commit(recipe) is not None
    if for_data and known and not for_tokenizer and TokenStore(recipe, resolve_source(recipe)).is_complete_on_disk():
        return []
    return for_data + for_tokenizer


def why_unreachable(server: str) -> str | None:
    """None if it gives an answer of any kind, an error too."""
    if huggingface_hub.constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    outcome = [f"no answer within {PROBE_SECONDS:g} s"]

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(server, timeout=PROBE_SECONDS)
        except (httpx2.HTTPError, OSError) as error:
            outcome[0] = one_line(error)
        else:
            outcome.clear()

    # In a thread, since nothing limits how long a name is looked up.
    asking = threading.Thread(target=ask, name="probe", daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS + 0.5)
    return f"{server}: {outcome[0]}" if outcome else None
