"""A run on machines whose disks do not last: its newest checkpoint is kept elsewhere, beside the training, and fetched
by the same command in an empty folder."""

import hashlib
import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

import yaml

from clm_owt.console import print_lines, waiting
from clm_owt.errors import InputError, RunFailed, one_line
from clm_owt.files import PARTIAL
from clm_owt.formatting import format_bytes
from clm_owt.recipe import Recipe
from clm_owt.remote.bundle import Listing, find_damage, install, stage
from clm_owt.remote.places import HubPlace, Mirror, Place, RemoteBundle
from clm_owt.training.checkpoint import MARKER, checkpoints, find_corruption, step_named
from clm_owt.training.run_folder import differences, is_complete, plan_of_same_run
from clm_owt.upload_queue import UploadQueue

T = TypeVar("T")

FETCH_PAUSES = (2.0, 10.0, 30.0)  # before the next attempt to ask or to download
LEAVING_SECONDS = 100.0  # for the last upload of a run that was stopped; a spot machine is taken away after 30 to 120


def places_of(recipe: Recipe) -> list[Place]:
    """Where the recipe has checkpoints kept. Raises InputError for an address that cannot be one."""
    places: list[Place] = []
    if recipe.push_to_hub and recipe.hub_strategy == "checkpoint":
        places.append(HubPlace(recipe))
    if recipe.checkpoint_mirror:
        try:
            places.append(Mirror(recipe))
        except Exception as error:  # of fsspec and the libraries behind it
            raise InputError(f"checkpoint_mirror: {recipe.checkpoint_mirror}: {one_line(error)}") from error
    return places


def check_places(recipe: Recipe) -> list[str]:
    """See whether checkpoints can be kept, before the run begins. Gives a line for what may pass; raises InputError
    for what will not."""
    said = []
    for place in places_of(recipe):
        try:
            with waiting(f"looking at {place.name}"):
                place.check()
        except Exception as error:
            if place.will_not_pass(error):
                raise InputError(f"{place.key}: {place.name} cannot be written to ({place.explain(error)})") from error
            said.append(
                f"{place.name} cannot be reached ({place.explain(error)}): the run goes on, each save tries again"
            )
    return said


class Unavailable(Exception):
    """What a place may have could not be had, after several attempts; the message says why. `for_good`: no further
    attempt would help."""

    def __init__(self, why: str, for_good: bool):
        super().__init__(why)
        self.for_good = for_good


def fetch_newer(recipe: Recipe) -> None:
    """Put the newest checkpoint that is kept elsewhere into the run's folder, unless one there is as new.

    Raises InputError where another run's is kept there; RunFailed or, where no attempt would help, InputError where it
    is not known whether there is one, or it cannot be had, and none is here: no run begins anew without a word.
    """
    folder = Path(recipe.output_dir)
    places = places_of(recipe)
    if not places or recipe.resume_from_checkpoint != "auto" or is_complete(folder):
        return
    plan_of_same_run(recipe, folder)
    kept: list[tuple[RemoteBundle, Place]] = []
    problems: dict[str, Unavailable] = {}
    for place in places:
        try:
            bundles = try_repeatedly(place, place.find, f"looking for a checkpoint at {place.name}")
        except Unavailable as error:
            problems[f"{place.key}: {place.name} cannot be asked for a checkpoint: {error}"] = error
        else:
            kept += [(bundle, place) for bundle in bundles]
    here = newest_step(folder)
    for bundle, place in sorted(kept, key=lambda pair: pair[0].listing.step, reverse=True):
        try:
            check_same_run(recipe, bundle, place)
            if bundle.listing.step > here:
                fetch(folder, bundle, place)
        except Unavailable as error:
            which = f"the checkpoint of step {bundle.listing.step:,} at {place.name}"
            problems[f"{place.key}: {which} cannot be had: {error}"] = error
        else:
            here = max(here, bundle.listing.step)
    if problems and here < 0:
        for_good = all(error.for_good for error in problems.values())
        way_on = "mend that" if for_good else "the same command tries again"
        raise (InputError if for_good else RunFailed)(
            "; ".join([*problems, f"{way_on}, or begin anew by resume_from_checkpoint: never"])
        )
    for problem in problems:
        print_lines(f"{problem}; going on without it")


def try_repeatedly(place: Place, action: Callable[[], T], what: str) -> T:
    """What `action` gives, after several attempts if need be. Raises Unavailable."""
    pauses = iter(FETCH_PAUSES)
    while True:
        try:
            with waiting(what):
                return action()
        except Exception as error:
            pause = None if place.will_not_pass(error) else next(pauses, None)
            if pause is None:
                raise Unavailable(place.explain(error), place.will_not_pass(error)) from error
            print_lines(f"{place.name}: {place.explain(error)}; trying again in {pause:g} s")
            time.sleep(pause)


def newest_step(run: Path) -> int:
    """The step of the newest whole checkpoint in a run's folder; -1 where there is none."""
    whole = (folder for folder in checkpoints(run / "checkpoints") if find_corruption(folder) is None)
    return next(map(step_named, whole), -1)


class Damaged(OSError):
    """What was downloaded is not what was put there."""


def check_same_run(recipe: Recipe, bundle: RemoteBundle, place: Place) -> None:
    """Raises InputError where a bundle is of another run than the recipe's; Unavailable."""

    def read() -> dict[str, object]:
        content = place.read(bundle, "recipe.yaml")
        if hashlib.sha256(content).hexdigest() != bundle.listing.files["recipe.yaml"]["sha256"]:
            raise Damaged("recipe.yaml is damaged on its way or there")
        return yaml.safe_load(content)

    different = differences(recipe, try_repeatedly(place, read, f"asking {place.name} whose checkpoint it has"))
    if different:
        raise InputError(
            f"{place.key}: {place.name} holds the checkpoint of another run ({', '.join(different.values())}); "
            f"give another {place.key}, or resume_from_checkpoint: never to begin anew and replace it"
        )


def fetch(folder: Path, bundle: RemoteBundle, place: Place) -> None:
    """Download a bundle, verify it, and install it in the run's folder. Raises Unavailable."""
    aside = folder / f"fetched{PARTIAL}"
    shutil.rmtree(aside, ignore_errors=True)
    step = bundle.listing.step

    def download() -> None:
        place.fetch(bundle, aside)
        if damage := find_damage(aside):
            raise Damaged(f"damaged on its way or there: {damage}")

    began = time.monotonic()
    try:
        aside.mkdir(parents=True)
        try_repeatedly(
            place, download, f"fetching step {step:,} from {place.name}, {format_bytes(bundle.listing.size)}"
        )
        install(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    seconds = time.monotonic() - began
    print_lines(
        f"Fetched step {step:,} from {place.name}: {format_bytes(bundle.listing.size)}, whole, {seconds:.1f} s"
    )


class RemoteCheckpoints:
    """Keeps the newest checkpoint of a run at the places of its recipe, in the background. On all processes but the
    main one it does nothing.

    In a `with` statement, whose end waits for the last of them: of a run that was stopped or failed for
    LEAVING_SECONDS at most, of a finished one until it has arrived or was given up.
    """

    def __init__(self, recipe: Recipe, is_main: bool, say: Callable[[str], None]):
        self._run = Path(recipe.output_dir)
        self._say = say
        self._staging = self._run / "outgoing"
        self._numbers = itertools.count()  # the same step may be saved twice
        self._queues: list[tuple[Place, UploadQueue]] = []
        if not is_main:
            return
        shutil.rmtree(self._staging, ignore_errors=True)  # of an earlier session
        for place in places_of(recipe):
            self._queues.append((place, self._start(place)))

    def _start(self, place: Place) -> UploadQueue:
        def upload(bundle: Path) -> str:
            place.put(bundle)
            return f"Step {step_of(bundle):,} is kept at {place.name}"

        def failed(bundle: Path, error: Exception) -> tuple[str, bool]:
            return (
                f"Step {step_of(bundle):,} is not kept at {place.name}: {place.explain(error)}; the next save tries "
                "again",
                False,
            )

        return UploadQueue(place.key, upload, failed, place.will_not_pass, self._say, place.interval)

    def saved(self, checkpoint: Path) -> None:
        """Keep a checkpoint that was just written. Called beside the training, by the thread that writes checkpoints;
        what goes wrong is printed, and changes nothing."""
        for place, queue in self._queues:
            bundle = self._staging / f"{next(self._numbers)}"
            try:
                stage(self._run, checkpoint, bundle)
            except Exception as error:
                self._say(f"{checkpoint.name} could not be prepared for {place.name}: {one_line(error)}")
            else:
                queue.offer(bundle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for _, queue in self._queues:
            queue.close()
        deadline = None if kind is None else time.monotonic() + LEAVING_SECONDS
        for place, queue in self._queues:
            with waiting(f"uploading the last checkpoint to {place.name}", self._say):
                while not queue.wait(0.2):
                    if deadline is not None and time.monotonic() > deadline:
                        self._say(f"The last checkpoint has not reached {place.name} within {LEAVING_SECONDS:g} s")
                        break
        if self._queues:
            shutil.rmtree(self._staging, ignore_errors=True)


def step_of(bundle: Path) -> int:
    return Listing.read((bundle / MARKER).read_bytes()).step
