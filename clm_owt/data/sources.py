"""Which documents a recipe means, exactly: a dataset on the Hub at one commit, local files or URLs with the digest of
their content, or the built-in corpus at the versions of its packages. `documents` reads them.
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

from clm_owt.console import waiting
from clm_owt.data import python_docs
from clm_owt.data.retries import with_retries
from clm_owt.data_files import matching_files, no_match
from clm_owt.errors import InputError, one_line
from clm_owt.files import replacing
from clm_owt.recipe import FILE_FORMATS, PYTHON_DOCS, Recipe, is_url

LOOKUP_SECONDS = 30  # after which the Hub's answer about a dataset is not waited for any longer


@dataclass(frozen=True)
class Source:
    """Which documents, in which order: all that the content of a token store depends on beside tokens and blocks.

    `files` pairs a path or URL with the digest of its content; `packages` a name with its version.
    """

    dataset_name: str
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None  # as the recipe names it
    commit: str | None = None  # what `revision` means
    data_files: tuple[str, ...] | None = None  # inside a dataset repository
    files: tuple[tuple[str, str], ...] = ()
    packages: tuple[tuple[str, str], ...] = ()
    text_column: str = "text"
    text_documents: str = "paragraph"
    validation_files: int = 0  # so many of `files`, the first ones, are the validation set
    validation_share: float | None = None

    def identity(self) -> dict:
        """What the content depends on: the digests of files but not their paths, the commit but not its name."""
        identity = self.to_dict() | {"files": [digest for _, digest in self.files]}
        del identity["revision"]
        return identity

    def to_dict(self) -> dict:
        """All fields, but those that later versions added only where they are set: else the names and the manifests of
        stores that earlier ones wrote would change."""
        added = ("text_documents", "validation_files", "validation_share")
        defaults = {field.name: field.default for field in fields(self)}
        return {name: v for name, v in asdict(self).items() if name not in added or v != defaults[name]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "Source":
        values = json.loads(text)
        for name in ("files", "packages"):
            values[name] = tuple(tuple(pair) for pair in values[name])
        if values["data_files"] is not None:
            values["data_files"] = tuple(values["data_files"])
        return cls(**values)


@waiting("looking up the dataset")
def resolve_source(recipe: Recipe) -> Source:
    """The exact source that `recipe` means.

    What a branch or tag on the Hub or a URL stands for is looked up once and remembered in `data_cache_dir` (see
    `remember_refs`) from the moment a token store is begun with it: an interrupted run continues with the same data,
    and a complete store needs no connection. A full commit hash needs no look-up at all.
    Raises `InputError` for missing files, unknown datasets or revisions, and an unreachable Hub.
    """
    name = recipe.dataset_name
    if name == PYTHON_DOCS:
        versions = [(package, metadata.version(package)) for package in python_docs.PACKAGES]
        packages = (("python", sys.version.split()[0]), *versions)
        return Source(name, packages=packages, validation_share=recipe.validation_share)
    if name in FILE_FORMATS:
        held_out = expand_files("validation_files", recipe.validation_files or (), name)
        paths = list(dict.fromkeys(held_out + expand_files("data_files", recipe.data_files or (), name)))
        if len(paths) == len(held_out):
            raise InputError(
                "data_files: all of them are validation_files, which leaves none to train on; name others"
            )
        digests = [with_retries(lambda path=path: file_digest(path, recipe)) for path in paths]
        return Source(
            name,
            files=tuple(zip(paths, digests, strict=True)),
            text_column=recipe.text_column,
            text_documents=recipe.text_documents,
            validation_files=len(held_out),
            validation_share=recipe.validation_share,
        )
    return Source(
        name,
        config_name=recipe.dataset_config_name,
        split=recipe.dataset_split,
        revision=recipe.dataset_revision,
        commit=with_retries(lambda: resolve_commit(recipe)),
        data_files=tuple(recipe.data_files) if recipe.data_files else None,
        text_column=recipe.text_column,
    )


def expand_files(key: str, patterns: tuple[str, ...], file_format: str) -> list[str]:
    """Absolute paths (sorted within a folder or glob) and URLs, in the order of the patterns; no file twice. Raises
    `InputError` that names the recipe's `key` for a pattern that matches no file."""
    files = []
    for pattern in patterns:
        if is_url(pattern):
            files.append(pattern)
            continue
        found = matching_files(pattern, file_format)
        if not found:
            raise InputError(no_match(key, pattern, file_format))
        files += [str(Path(path).absolute()) for path in found]
    return list(dict.fromkeys(files))


def file_digest(file: str, recipe: Recipe) -> str:
    """SHA-256 of the content of a file or URL; the remembered one for a URL that a store was begun with."""
    if is_url(file) and (known := remembered_ref(recipe, url=file)) is not None:
        return known
    with open(local_path(file), "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def local_path(file: str) -> str:
    """The path itself, or for a URL the path of its copy in the Hugging Face cache, downloaded if need be. Raises
    `InputError` for a URL that cannot be downloaded."""
    if not is_url(file):
        return file
    from datasets import DownloadConfig, DownloadManager

    try:
        return DownloadManager(download_config=DownloadConfig(disable_tqdm=True, max_retries=3)).download(file)
    except Exception as error:
        raise InputError(f"data_files: {file} cannot be downloaded ({one_line(error)})") from error


def resolve_commit(recipe: Recipe) -> str:
    """The commit that `dataset_revision` (default: the main branch) means; the remembered one where a store was begun
    with it. Raises `InputError` for an unknown or forbidden dataset or revision, or where the Hub does not answer."""
    name, revision = recipe.dataset_name, recipe.dataset_revision
    if (known := known_commit(recipe)) is not None:
        return known

    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=LOOKUP_SECONDS).sha
    except GatedRepoError as error:
        raise InputError(
            f"dataset_name: {name} is gated; accept its terms on the Hub and log in (hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"dataset_name: no dataset {name!r} on the Hub, or it is private and you are not logged in (hf auth login)"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"dataset_revision: {name} has no branch, tag or commit {revision!r}") from error
    except Exception as error:  # the HTTP client has its own classes for no route, no name, timeout, 5xx
        raise InputError(
            f"dataset_name: the Hub cannot be asked about {name!r} ({one_line(error)})\n"
            "without a connection, use a complete token store (same data_cache_dir), local files, or "
            f"dataset_name: {PYTHON_DOCS}"
        ) from error


def known_commit(recipe: Recipe) -> str | None:
    """The commit of the dataset that needs no look-up: as the recipe gives it, or as remembered."""
    revision = recipe.dataset_revision
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    return remembered_ref(recipe, dataset=recipe.dataset_name, revision=revision)


def remember_refs(source: Source, cache: Path) -> None:
    """Write down, in `cache`/refs, what the branch, tag and URLs of `source` stand for: one small file for each, which
    is never changed. (Who deletes it has the Hub or the URL asked again.)"""
    refs = [({"url": file}, digest) for file, digest in source.files if is_url(file)]
    if source.commit is not None and source.commit != source.revision:
        refs.append(({"dataset": source.dataset_name, "revision": source.revision}, source.commit))
    for ref, meant in refs:
        file = ref_file(cache, **ref)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file, suffix=f".{os.getpid()}.partial") as aside:
                aside.write_text(json.dumps(ref | {"meant": meant}))


def remembered_ref(recipe: Recipe, **ref: str | None) -> str | None:
    """What `ref` stood for when a store was begun with it; None if none was."""
    file = ref_file(Path(recipe.data_cache_dir).expanduser(), **ref)
    return json.loads(file.read_text())["meant"] if file.is_file() else None


def ref_file(cache: Path, **ref: str | None) -> Path:
    return cache / "refs" / (hashlib.sha256(json.dumps(ref, sort_keys=True).encode()).hexdigest()[:16] + ".json")
