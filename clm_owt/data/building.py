"""From a recipe to its complete token store: the tokenizer, the lock, the encoded documents, the shards.

`builder` runs this beside the training, `scripts/prepare_data.py` ahead of it.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from clm_owt.console import print_lines
from clm_owt.data.documents import count_files, count_held_out_files
from clm_owt.data.packing import StoreWriter, write_store
from clm_owt.data.parts import EncodingProcesses, OnEncoded, Parts, read_or_encode
from clm_owt.data.sources import Source, remember_refs
from clm_owt.data.store_lock import store_lock
from clm_owt.data.token_store import FORMAT_VERSION, store_folder
from clm_owt.data.tokenizer_files import TokenizerFolder, provided_tokenizer, tokenizer_folder
from clm_owt.recipe import Recipe

UNEXPECTED_SHARE = 0.001  # of the expected count of blocks: a greater difference is reported


def build(
    recipe: Recipe,
    source: Source,
    on_shard: Callable[[str], None] = lambda split: None,
    num_workers: int = 1,
    on_encoded: OnEncoded | None = None,
) -> None:
    """Write what is missing of the recipe's tokenizer and store. Returns when the store is complete; while another
    process builds the same store, waits for it, and takes over should that one die.

    `on_shard(split)` is called after each shard, `on_encoded` as documents are encoded. Raises `InputError` for a
    source or tokenizer that cannot work, OSError where the disk is full.
    """
    cache = Path(recipe.data_cache_dir).expanduser()
    with building_lock(recipe, source), provided_tokenizer(recipe, source) as (tokenizer, publish_tokenizer):

        def before_first_shard() -> None:
            publish_tokenizer()
            remember_refs(source, cache)

        folder = store_folder(recipe, source, tokenizer)
        if folder.is_dir():  # begun before, whatever has become of its tokenizer
            before_first_shard()
        parts = Parts(folder)

        def shard_written(split: str) -> None:
            parts.drop_before(writer.end().position.file)
            on_shard(split)

        head = manifest_head(recipe, source, tokenizer)
        writer = StoreWriter(folder, head, before_first_shard, shard_written, count_held_out_files(source))
        if not writer.manifest["complete"]:
            if num_workers > 1:
                before_first_shard()  # other processes read the tokenizer
                with EncodingProcesses(num_workers, parts, source, tokenizer, on_encoded) as processes:
                    write_store(writer, processes.read)
            else:
                write_store(writer, functools.partial(read_or_encode, parts, source, tokenizer, on_encoded=on_encoded))
            warn_of_unexpected_count(recipe, writer)
        parts.drop()


def encode_parts(
    recipe: Recipe, source: Source, files: range, num_workers: int = 1, on_encoded: OnEncoded | None = None
) -> Parts:
    """Encode `files` of the source into part files, from which `build` then packs the store; parts that are there
    stay as they are. Raises as `build` does."""
    with building_lock(recipe, source), provided_tokenizer(recipe, source) as (_, publish_tokenizer):
        publish_tokenizer()
        remember_refs(source, Path(recipe.data_cache_dir).expanduser())
    tokenizer = TokenizerFolder(tokenizer_folder(recipe, source))
    parts = Parts(store_folder(recipe, source, tokenizer))
    if parts.missing(files):
        with parts.in_use(), EncodingProcesses(num_workers, parts, source, tokenizer, on_encoded) as processes:
            for _ in processes.encode(files):
                pass
    return parts


def find_missing_parts(recipe: Recipe, source: Source) -> list[int]:
    """The files of the source that are neither in the store yet nor in part files."""
    files, folder = range(count_files(source)), tokenizer_folder(recipe, source)
    if not (folder / "tokenizer.json").is_file():
        return list(files)
    tokenizer = TokenizerFolder(folder)
    folder = store_folder(recipe, source, tokenizer)
    begun = StoreWriter(folder, manifest_head(recipe, source, tokenizer)).end().position.file
    return Parts(folder).missing(files[begun:])


def building_lock(recipe: Recipe, source: Source) -> AbstractContextManager[None]:
    """The lock of the recipe's token store, whose folder is not known before its tokenizer is."""
    tokenizer = str(tokenizer_folder(recipe, source))
    same_store = json.dumps([source.identity(), tokenizer, recipe.block_size, recipe.validation_documents])
    name = hashlib.sha256(same_store.encode()).hexdigest()[:16] + ".lock"
    return store_lock(Path(recipe.data_cache_dir).expanduser() / "locks" / name)


def manifest_head(recipe: Recipe, source: Source, tokenizer: TokenizerFolder) -> dict:
    """What the manifest of a store begins with: what the store was made of."""
    return {
        "format": FORMAT_VERSION,
        "source": json.loads(source.to_json()),
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "eos_token": tokenizer.eos_token,
            "eos_token_id": tokenizer.eos_token_id,
            "vocab_size": tokenizer.vocab_size,
        },
        "block_size": recipe.block_size,
        "validation_documents": recipe.validation_documents,
        "dtype": tokenizer.dtype.name,
    }


def warn_of_unexpected_count(recipe: Recipe, writer: StoreWriter) -> None:
    """Print a line where the training blocks are not as many as the recipe's `expected_train_blocks`."""
    expected, counted = recipe.expected_train_blocks, sum(shard["rows"] for shard in writer.shards("train"))
    if expected and abs(counted - expected) > UNEXPECTED_SHARE * expected:
        print_lines(
            f"expected_train_blocks: the data hold {counted:,} training blocks, {counted / expected - 1:+.2%} of the "
            f"{expected:,} expected; a run that has begun keeps its steps, for a new one correct the recipe"
        )
