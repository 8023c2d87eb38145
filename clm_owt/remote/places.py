"""Where a run's newest checkpoint is kept beside its folder: on the Hub, or at any address that fsspec can write to.

A place takes bundles (`bundle`), has the newest whole one at any moment, and gives it back. What goes wrong is raised
as the libraries raise it, and told in words by `explain`.
"""

import contextlib
import errno
import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import fsspec
import httpx2
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from clm_owt import hub, hub_client
from clm_owt.errors import one_line
from clm_owt.recipe import Recipe
from clm_owt.remote.bundle import Listing
from clm_owt.training.checkpoint import MARKER, fingerprint

# Of the file systems of fsspec. s3fs repeats requests itself; botocore, which does so too, would draw its pauses from
# Python's random numbers, whose state is a part of the run's.
S3_OPTIONS = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
OPTIONS = {"file": {"auto_mkdir": True}, "local": {"auto_mkdir": True}, "s3": S3_OPTIONS, "s3a": S3_OPTIONS}


# Of a place: nobody mends them while the run goes on.
LASTING_ERRORS = (
    PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, NotImplementedError
)  # fmt: skip


@dataclass(frozen=True)
class RemoteBundle:
    """A whole bundle at a place: what it lists, and where it is there."""

    listing: Listing
    where: str


class Place(Protocol):
    key: str  # of the recipe
    name: str  # in a line
    interval: float  # seconds between two bundles

    def put(self, bundle: Path) -> None:
        """Keep the bundle instead of what is kept. A kill or an error at any instant leaves the former one whole."""

    def check(self) -> None:
        """Raise what would keep a bundle from being put here, as far as that can be seen beforehand."""

    def find(self) -> list[RemoteBundle]:
        """The whole bundles, newest first: one at most, unless a kill has kept an older one from being removed."""

    def read(self, bundle: RemoteBundle, name: str) -> bytes:
        """One of its files, a small one. Nothing is verified."""

    def fetch(self, bundle: RemoteBundle, folder: Path) -> None:
        """Download it into a folder, in which files of an attempt before are taken over. Nothing is verified."""

    def will_not_pass(self, error: Exception) -> bool:
        """Whether repeating what raised it cannot help."""

    def explain(self, error: Exception) -> str:
        """The error in one line."""


class HubPlace:
    """The folder `last-checkpoint` in a branch of that name of the run's repository.

    Each bundle is one commit, to which the branch is squashed then, so that checkpoints of gigabytes do not pile up in
    its history; that of the main branch stays.
    """

    BRANCH = FOLDER = "last-checkpoint"

    key = "hub_model_id"

    def __init__(self, recipe: Recipe):
        hub.prepare_client()
        self.name = f"{recipe.hub_model_id} on the Hub"
        self.interval = hub.SECONDS_BETWEEN_COMMITS
        self._repo_id = recipe.hub_model_id
        self._private = hub.is_private(recipe.hub_private_repo, recipe.hub_strategy)
        self._api = HfApi()

    def put(self, bundle: Path) -> None:
        repo_id = hub.ensure_repository(self._api, self._repo_id, self._private)
        self._api.create_branch(repo_id, branch=self.BRANCH, exist_ok=True)
        message = f"Checkpoint of step {Listing.read((bundle / MARKER).read_bytes()).step:,}"
        self._api.upload_folder(
            repo_id=repo_id,
            revision=self.BRANCH,
            folder_path=bundle,
            path_in_repo=self.FOLDER,
            delete_patterns="checkpoints/*",
            commit_message=message,
        )
        with contextlib.suppress(httpx2.HTTPError):  # the next one does it for both
            self._api.super_squash_history(repo_id, branch=self.BRANCH, commit_message=message)

    def check(self) -> None:
        """Of the repository, that is `hub.check_repository`."""

    def find(self) -> list[RemoteBundle]:
        repo_id = self._repo_id
        if "/" not in repo_id:
            repo_id = f"{self._api.whoami(cache=True)['name']}/{repo_id}"
        try:
            self._api.repo_info(repo_id, revision=self.BRANCH, timeout=hub_client.TIMEOUT_SECONDS)
            listing = Listing.read(self._download(repo_id, MARKER))
        except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError):
            return []
        return [RemoteBundle(listing, repo_id)]

    def read(self, bundle: RemoteBundle, name: str) -> bytes:
        return self._download(bundle.where, name)

    def _download(self, repo_id: str, name: str) -> bytes:
        with tempfile.TemporaryDirectory() as aside:
            file = hf_hub_download(repo_id, f"{self.FOLDER}/{name}", revision=self.BRANCH, local_dir=aside)
            return Path(file).read_bytes()

    def fetch(self, bundle: RemoteBundle, folder: Path) -> None:
        aside = folder / "download"
        snapshot_download(bundle.where, revision=self.BRANCH, allow_patterns=f"{self.FOLDER}/*", local_dir=aside)
        for name in (*bundle.listing.files, MARKER):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / self.FOLDER / name).replace(folder / name)

    def will_not_pass(self, error: Exception) -> bool:
        if isinstance(error, RevisionNotFoundError):  # the commit was squashed away since it was looked up
            return False
        return hub.will_not_pass(error) or isinstance(error, OfflineModeIsEnabled)

    def explain(self, error: Exception) -> str:
        return hub.explain(error)


class Mirror:
    """A folder at an address of fsspec, with one folder below it for each bundle, named by its step and content.

    Stores of objects replace nothing in one step: so the marker of a bundle is written last, and others are removed
    after that, each its marker first.
    """

    BUNDLE = re.compile(r"step-(\d{8})-[0-9a-f]{16}", re.ASCII)

    key = "checkpoint_mirror"
    interval = 0.0

    def __init__(self, recipe: Recipe):
        self.name = recipe.checkpoint_mirror
        protocol = fsspec.core.split_protocol(self.name)[0] or "file"
        self._files, self._root = fsspec.core.url_to_fs(self.name, **OPTIONS.get(protocol, {}))
        self._root = self._root.rstrip("/")

    def put(self, bundle: Path) -> None:
        content = (bundle / MARKER).read_bytes()
        listing = Listing.read(content)
        name = f"step-{listing.step:08d}-{hashlib.sha256(content).hexdigest()[:16]}"
        for file in listing.files:
            self._files.put_file(str(bundle / file), f"{self._root}/{name}/{file}")
        self._files.pipe_file(f"{self._root}/{name}/{MARKER}", content)
        for other in self._bundles():
            if other != name:
                folder = f"{self._root}/{other}"
                if self._files.exists(f"{folder}/{MARKER}"):
                    self._files.rm_file(f"{folder}/{MARKER}")
                self._files.rm(folder, recursive=True)

    def check(self) -> None:
        probe = f"{self._root}/.writable"
        self._files.pipe_file(probe, b"")
        self._files.rm_file(probe)

    def find(self) -> list[RemoteBundle]:
        found, damaged = [], None
        for name in self._bundles():
            try:
                content = self._files.cat_file(f"{self._root}/{name}/{MARKER}")
                if content:
                    found.append(RemoteBundle(Listing.read(content), name))
            except FileNotFoundError:  # it is being written or removed, or its writing was cut short
                continue
            except ValueError as error:
                damaged = damaged or ValueError(f"{name}: {error}")
        if damaged and not found:
            raise damaged
        return found

    def read(self, bundle: RemoteBundle, name: str) -> bytes:
        return self._files.cat_file(f"{self._root}/{bundle.where}/{name}")

    def fetch(self, bundle: RemoteBundle, folder: Path) -> None:
        for file, entry in bundle.listing.files.items():
            target = folder / file
            if target.is_file() and fingerprint(target) == entry:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(f"{self._root}/{bundle.where}/{file}", str(target))
        self._files.get_file(f"{self._root}/{bundle.where}/{MARKER}", str(folder / MARKER))

    def _bundles(self) -> list[str]:
        """The names of what lies there, whole or not, newest first."""
        self._files.invalidate_cache()
        try:
            paths = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
        return sorted(filter(self.BUNDLE.fullmatch, names), reverse=True)

    def will_not_pass(self, error: Exception) -> bool:
        without_keys = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # of botocore
        return (
            isinstance(error, LASTING_ERRORS)
            or getattr(error, "errno", None) in (errno.EROFS, errno.ENAMETOOLONG)
            or type(error).__name__ in without_keys
        )

    def explain(self, error: Exception) -> str:
        return one_line(error)
