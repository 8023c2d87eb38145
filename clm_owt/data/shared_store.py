"""A token store on the Hugging Face Hub: a dataset repository that `load_dataset` reads too."""

import json
import shutil
import tempfile
from pathlib import Path

from clm_owt.data.retries import with_retries
from clm_owt.data.sources import Source, remember_refs
from clm_owt.data.token_store import TokenStore, find_damaged_shard, read_manifest, store_folder, store_identity
from clm_owt.data.tokenizer_files import TOKENIZER_FILES, TokenizerFolder, publish_tokenizer, tokenizer_folder
from clm_owt.errors import InputError, one_line
from clm_owt.files import flush_to_disk
from clm_owt.hub_client import set_timeout
from clm_owt.recipe import Recipe

TOKENIZER = "tokenizer"  # the folder of the tokenizer in the repository

CARD = """\
---
tags:
- clm_owt
- token-store
configs:
- config_name: default
  data_files:
  - split: train
    path: train-*.arrow
  - split: validation
    path: validation-*.arrow
---

# Tokens of {dataset_name}

{train_blocks:,} training and {validation_blocks:,} validation blocks of {block_size} tokens, documents laid end to
end, each followed by the end-of-text id {eos_token_id}. The tokenizer is in `{tokenizer}/`; `manifest.json` holds the
source, the counts and a checksum of every file. The license is that of {dataset_name}.

```python
from datasets import load_dataset

blocks = load_dataset("{repo_id}", split="train", streaming=True)
```
"""


def upload_store(store: TokenStore, repo_id: str, private: bool = False) -> None:
    """Upload a complete store and its tokenizer as the dataset `repo_id`, created if there is none; files that are
    there already are not sent again. Raises InputError where the Hub refuses or cannot be reached."""
    from huggingface_hub import HfApi, utils

    set_timeout()
    utils.disable_progress_bars()
    api = HfApi()
    card = CARD.format(
        dataset_name=store.source.dataset_name,
        train_blocks=len(store.train),
        validation_blocks=len(store.validation),
        block_size=store.block_size,
        eos_token_id=store.tokenizer.eos_token_id,
        tokenizer=TOKENIZER,
        repo_id=repo_id,
    )
    tokenizer_files = [store.tokenizer.folder / name for name in TOKENIZER_FILES]
    try:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for file in filter(Path.is_file, tokenizer_files):
                shutil.copy(file, folder)
            api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, path_in_repo=TOKENIZER)
        api.upload_folder(
            repo_id=repo_id, repo_type="dataset", folder_path=store.folder, allow_patterns=["*.arrow", "manifest.json"]
        )
        api.upload_file(repo_id=repo_id, repo_type="dataset", path_or_fileobj=card.encode(), path_in_repo="README.md")
    except Exception as error:  # the Hub and the HTTP client have their own classes
        raise InputError(
            f"--upload_to: {repo_id} does not take the store ({one_line(error)}); log in with a token that may write "
            "there (hf auth login), and the same command goes on"
        ) from error


def download_store(recipe: Recipe, source: Source, repo_id: str) -> None:
    """Download the store and tokenizer of `recipe` from the dataset `repo_id`, unless they are here already. Raises
    InputError for a repository that holds another recipe's store, or none, or where the Hub cannot be reached."""
    if TokenStore(recipe, source).is_complete_on_disk():
        return
    stores = Path(recipe.data_cache_dir).expanduser() / "stores"
    aside = stores / f"{repo_id.replace('/', '--')}.partial"  # stays where this is interrupted, to be resumed
    with_retries(lambda: download_files(repo_id, aside))
    try:
        manifest = read_manifest(aside)
        if manifest is None or not manifest["complete"] or find_damaged_shard(aside, manifest) is not None:
            raise InputError(f"--download_from: {repo_id} holds no complete token store")
        tokenizer = TokenizerFolder(aside / TOKENIZER)
        check_same_store(recipe, source, tokenizer, manifest, repo_id)
    except InputError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if not (tokenizer_folder(recipe, source) / "tokenizer.json").is_file():
        publish_tokenizer(aside / TOKENIZER, tokenizer_folder(recipe, source))
    remember_refs(source, stores.parent)
    folder = store_folder(recipe, source, tokenizer)
    for leftover in (TOKENIZER, ".cache"):
        shutil.rmtree(aside / leftover, ignore_errors=True)
    for file in aside.iterdir():
        flush_to_disk(file)
    shutil.rmtree(folder, ignore_errors=True)  # one that was begun
    aside.rename(folder)


def download_files(repo_id: str, folder: Path) -> None:
    """The files of a shared store into `folder`; those that are there already are not downloaded again."""
    from huggingface_hub import snapshot_download, utils

    set_timeout()
    utils.disable_progress_bars()
    try:
        snapshot_download(
            repo_id,
            repo_type="dataset",
            local_dir=folder,
            allow_patterns=["*.arrow", "manifest.json", f"{TOKENIZER}/*"],
        )
    except Exception as error:  # the Hub and the HTTP client have their own classes
        raise InputError(f"--download_from: {repo_id} cannot be taken from the Hub ({one_line(error)})") from error


def check_same_store(recipe: Recipe, source: Source, tokenizer: TokenizerFolder, manifest: dict, repo_id: str) -> None:
    """Raises InputError, with every difference, where `manifest` is not of the store that the recipe means."""
    theirs = store_identity(
        Source.from_json(json.dumps(manifest["source"])),
        manifest["tokenizer"]["sha256"],
        manifest["block_size"],
        manifest["validation_documents"],
        manifest["format"],
    )
    here = tokenizer_folder(recipe, source)
    sha256 = TokenizerFolder(here).sha256 if (here / "tokenizer.json").is_file() else tokenizer.sha256
    ours = store_identity(source, sha256, recipe.block_size, recipe.validation_documents)
    differing = [f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in ours if theirs.get(key) != ours[key]]
    if differing:
        raise InputError(f"--download_from: {repo_id} is the store of another recipe: " + "; ".join(differing))
