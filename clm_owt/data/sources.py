"""A stream of documents: the Hub, local files or URLs, the built-in corpus.

`resolve_source` says which documents a recipe means, exactly: everything their content depends on.
`read_documents` streams them in their fixed order and can go on from any batch. No remote code is ever run.
Every failure is an `InputError` that names the dataset or file, the column or row, and what was there instead.
"""

import functools
import glob
import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from clm_owt.data.python_docs import PYTHON_DOCS_PACKAGES
from clm_owt.data.retries import patiently
from clm_owt.errors import InputError, one_line
from clm_owt.recipe import FILE_FORMATS, PYTHON_DOCS, Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Which documents, in which order: all that the content of a token store depends on, before tokens.

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

    def identity(self) -> dict:
        """What the content depends on: the digests of files but not where they lie, the commit but not its name."""
        identity = asdict(self) | {"files": [digest for _, digest in self.files]}
        del identity["revision"]
        return identity

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Source":
        values = json.loads(text)
        for name in ("files", "packages"):
            values[name] = tuple(tuple(pair) for pair in values[name])
        if values["data_files"] is not None:
            values["data_files"] = tuple(values["data_files"])
        return cls(**values)


def resolve_source(recipe: Recipe) -> Source:
    """The exact source that `recipe` means.

    A branch or tag on the Hub is looked up once and then remembered in `data_cache_dir`, as are the digests of
    downloaded URLs, from the moment a token store is begun with them: an interrupted run continues with the same
    data, and a complete store needs no connection. A full commit hash needs no look-up at all.
    Raises `InputError` for missing files, unknown datasets or revisions, and an unreachable Hub.
    """
    name = recipe.dataset_name
    if name == PYTHON_DOCS:
        versions = [(package, metadata.version(package)) for package in PYTHON_DOCS_PACKAGES]
        return Source(name, packages=(("python", sys.version.split()[0]), *versions))
    if name in FILE_FORMATS:
        files = tuple(
            (file, patiently(functools.partial(file_digest, file, recipe)))
            for file in expand_files(recipe.data_files or ())
        )
        return Source(name, split="train", files=files, text_column=recipe.text_column)
    return Source(
        name,
        config_name=recipe.dataset_config_name,
        split=recipe.dataset_split,
        revision=recipe.dataset_revision,
        commit=patiently(lambda: resolve_commit(recipe)),
        data_files=tuple(recipe.data_files) if recipe.data_files else None,
        text_column=recipe.text_column,
    )


def is_url(path: str) -> bool:
    return "://" in path


def expand_files(patterns: tuple[str, ...]) -> list[str]:
    """Absolute paths (sorted within a glob) and URLs, in the order of the patterns; no file twice."""
    files = []
    for pattern in patterns:
        if is_url(pattern):
            files.append(pattern)
            continue
        expanded = str(Path(pattern).expanduser())
        exact = [expanded] if Path(expanded).is_file() else []
        found = exact or sorted(path for path in glob.glob(expanded, recursive=True) if Path(path).is_file())
        if not found:
            raise InputError(f"data_files: {pattern!r} names no file (looked in {Path.cwd()})")
        files += [str(Path(path).absolute()) for path in found]
    return list(dict.fromkeys(files))


def file_digest(file: str, recipe: Recipe) -> str:
    """SHA-256 of a file's content, or of what a URL gives; a URL that a store was begun with is not asked again."""
    if is_url(file):
        known = recall(recipe, url=file)
        if known is not None:
            return known
    with open(local_path(file), "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def local_path(file: str) -> str:
    """The path itself, or the downloaded copy of a URL in the Hugging Face cache."""
    if not is_url(file):
        return file
    from datasets import DownloadConfig, DownloadManager

    try:
        return DownloadManager(download_config=DownloadConfig(disable_tqdm=True, max_retries=3)).download(file)
    except Exception as error:
        raise InputError(f"data_files: {file} cannot be downloaded ({one_line(error)})") from error


def resolve_commit(recipe: Recipe) -> str:
    """The commit that `dataset_revision` (default: the main branch) means."""
    name, revision = recipe.dataset_name, recipe.dataset_revision
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    known = recall(recipe, dataset=name, revision=revision)
    if known is not None:
        return known

    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=30).sha
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
    except Exception as error:  # the HTTP client's own kinds: no route, no name, timeout, 5xx
        raise InputError(
            f"dataset_name: the Hub cannot be asked about {name!r} ({one_line(error)})\n"
            "without a connection, use a complete token store (same data_cache_dir), local files, or "
            f"dataset_name: {PYTHON_DOCS}"
        ) from error


# What a name meant when a store was begun with it: one small file a name, in `data_cache_dir`/refs.


def ref_file(cache: Path, **named: str | None) -> Path:
    return cache / "refs" / (hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16] + ".json")


def recall(recipe: Recipe, **named: str | None) -> str | None:
    file = ref_file(Path(recipe.data_cache_dir).expanduser(), **named)
    return json.loads(file.read_text())["meant"] if file.is_file() else None


def remember_refs(source: Source, cache: Path) -> None:
    """Write down what the names in `source` meant; kept from then on (delete the file to ask again)."""
    refs = [({"url": file}, digest) for file, digest in source.files if is_url(file)]
    if source.commit is not None and source.commit != source.revision:
        refs.append(({"dataset": source.dataset_name, "revision": source.revision}, source.commit))
    for named, meant in refs:
        file = ref_file(cache, **named)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_suffix(".partial")
            aside.write_text(json.dumps(named | {"meant": meant}))
            aside.rename(file)
