"""Checkpoints that are kept elsewhere, of a real run: at addresses of fsspec in this process, on the Hub in others."""

import dataclasses
import json
import math
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from support.disturbances import at_step, kill_myself, use_hub
from support.hub_server import HubServer
from support.runs import timeless_metrics
from support.warm_start import Job

from clm_owt.errors import InputError, RecipeError, RunFailed
from clm_owt.recipe import Recipe
from clm_owt.recipe_reader import load_recipe
from clm_owt.remote import checkpoints as remote
from clm_owt.remote.bundle import Listing, find_damage, stage
from clm_owt.remote.places import Mirror
from clm_owt.reports.record import read_metrics, read_samples

pytestmark = pytest.mark.xdist_group("remote")

RUN = "support.disturbances:run_disturbed"
REPO = "tester/tiny"
PUSH = ["--push_to_hub", "--hub_model_id", REPO, "--hub_strategy", "checkpoint"]


@pytest.fixture(scope="module")
def finished(warm, tiny_recipe, tmp_path_factory) -> Path:
    """The folder of a finished run, with the checkpoints of steps 8 and 12 of 12."""
    home = tmp_path_factory.mktemp("finished")
    job = warm.start(RUN, ["--recipe", str(tiny_recipe)], [], cwd=home)
    assert job.wait() == 0, job.text
    return home / "runs/tiny"


@pytest.fixture
def recipe(tiny_recipe, tmp_path, monkeypatch) -> Recipe:
    """Of that run on another machine, with a mirror, in a folder that is empty."""
    monkeypatch.setattr(remote, "FETCH_PAUSES", (0.0, 0.0))
    mirror = ["--checkpoint_mirror", f"file://{tmp_path}/mirror", "--output_dir", str(tmp_path / "here")]
    return load_recipe(["--recipe", str(tiny_recipe), *mirror])


def bundle(run: Path, step: int, folder: Path) -> Path:
    stage(run, run / f"checkpoints/step-{step:08d}", folder)
    return folder


def kept(recipe: Recipe) -> list[str]:
    """The bundles at the mirror, newest first, by step."""
    names = (path.name for path in Path(recipe.checkpoint_mirror.removeprefix("file://")).glob("step-*"))
    return sorted((name.rpartition("-")[0] for name in names), reverse=True)


def assert_same_run(folder: Path, other: Path) -> None:
    assert timeless_metrics(folder) == timeless_metrics(other)
    for name in ("model/model.safetensors", "samples.md"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_without_a_token_no_answer_of_the_hub_is_waited_for(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    hub = {"push_to_hub": True, "hub_model_id": "tiny", "hub_strategy": "checkpoint", "checkpoint_mirror": None}
    with pytest.raises(InputError, match="cannot be asked for a checkpoint: not logged in; `hf auth login`"):
        remote.fetch_newer(dataclasses.replace(recipe, **hub))
    assert "trying again" not in capsys.readouterr().out


# What is kept


def test_a_bundle_is_the_runs_folder_as_it_was_after_the_step(finished, tmp_path):
    folder = bundle(finished, 8, tmp_path / "bundle")
    assert find_damage(folder) is None
    assert max(row["step"] for row in read_metrics(folder / "metrics.jsonl")) == 8
    assert max(read_samples(folder / "samples.md")) == 6
    assert Listing.read((folder / "complete.json").read_bytes()).step == 8
    linked = folder / "checkpoints/step-00000008/model.safetensors"
    assert linked.samefile(finished / "checkpoints/step-00000008/model.safetensors")


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step-00000008/model.safetensors", "complete.json"])
def test_a_bundle_in_which_a_bit_is_flipped_or_a_file_cut_is_damaged(finished, tmp_path, name):
    folder = bundle(finished, 8, tmp_path / "bundle")
    content = (folder / name).read_bytes()
    (folder / name).unlink()  # it is linked
    (folder / name).write_bytes(content[:-1])
    assert find_damage(folder) is not None
    if name != "complete.json":
        (folder / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        assert "altered" in find_damage(folder)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "checkpoints/../x.json", "checkpoints/step-1/../../x.y"]
)
def test_a_listing_that_leads_out_of_its_folder_is_none(name):
    content = json.dumps({"step": 1, "files": {name: {"bytes": 1, "sha256": "0"}}}).encode()
    with pytest.raises(ValueError, match="lists"):
        Listing.read(content)


# A mirror


def test_a_mirror_keeps_the_newest_and_what_else_lies_there(finished, recipe, tmp_path):
    place, other = Mirror(recipe), tmp_path / "mirror/step-00000001/mine"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    assert place.find() == []
    for step in (8, 12):
        place.put(bundle(finished, step, tmp_path / "bundle"))
        assert [found.listing.step for found in place.find()] == [step]
    assert kept(recipe)[0] == "step-00000012" and other.exists()
    place.fetch(place.find()[0], tmp_path / "fetched")
    assert find_damage(tmp_path / "fetched") is None


PUTS = 10  # of the four files of the run, the five of the checkpoint, the listing


def test_a_put_that_is_cut_short_anywhere_leaves_the_one_before(finished, recipe, tmp_path, monkeypatch):
    place = Mirror(recipe)
    place.put(bundle(finished, 8, tmp_path / "old"))
    newer = bundle(finished, 12, tmp_path / "new")
    for operations in range(100):
        left = operations

        def counted(operation, *arguments, own, **more):
            nonlocal left
            left -= 1
            if left < 0:
                raise ConnectionError("cut")
            return own(operation, *arguments, **more)

        with monkeypatch.context() as patch:
            for name in ("put_file", "pipe_file", "rm_file", "rm"):
                own = getattr(type(place._files), name)
                patch.setattr(type(place._files), name, partial_method(counted, own))
            try:
                place.put(newer)
            except ConnectionError:
                pass
            else:
                break
        newest = place.find()[0]
        place.fetch(newest, tmp_path / f"fetched-{operations}")
        assert find_damage(tmp_path / f"fetched-{operations}") is None
        assert newest.listing.step == (8 if operations < PUTS else 12)
    assert operations > PUTS and [found.listing.step for found in place.find()] == [12]


def partial_method(counted, own):
    return lambda *arguments, **more: counted(*arguments, own=own, **more)


def test_any_file_system_of_fsspec_will_do(finished, recipe, tmp_path):
    place = Mirror(dataclasses.replace(recipe, checkpoint_mirror="memory://some/where"))
    place.check()
    for step in (8, 12):
        place.put(bundle(finished, step, tmp_path / "bundle"))
    (found,) = place.find()
    place.fetch(found, tmp_path / "fetched")
    assert find_damage(tmp_path / "fetched") is None and found.listing.step == 12


@pytest.mark.parametrize(
    ("mirror", "reason"),
    [
        ("file", "FileExistsError: [Errno 17] File exists"),
        ("file/x", "NotADirectoryError: [Errno 20] Not a directory"),
        ("x" * 300, "OSError: [Errno 36] File name too long"),
    ],
)
def test_a_folder_that_cannot_be_is_refused_before_the_run(recipe, tmp_path, mirror, reason):
    (tmp_path / "file").write_text("mine")
    address = str(tmp_path / mirror)
    with pytest.raises(InputError, match=re.escape(f"checkpoint_mirror: {address} cannot be written to ({reason}")):
        remote.check_places(dataclasses.replace(recipe, checkpoint_mirror=address))
    assert (tmp_path / "file").read_text() == "mine"


# The same command in an empty folder


def test_an_empty_folder_becomes_the_runs(finished, recipe, tmp_path, capsys):
    Mirror(recipe).put(bundle(finished, 8, tmp_path / "bundle"))
    remote.fetch_newer(recipe)
    here = Path(recipe.output_dir)
    assert {path.name for path in here.iterdir()} == {
        "recipe.yaml", "plan.json", "metrics.jsonl", "samples.md", "checkpoints"}  # fmt: skip
    assert remote.newest_step(here) == 8
    assert "Fetched step 8 from file://" in capsys.readouterr().out


def test_a_folder_with_as_new_a_checkpoint_is_left_alone(finished, recipe, tmp_path):
    Mirror(recipe).put(bundle(finished, 8, tmp_path / "bundle"))
    here = Path(recipe.output_dir)
    for step in (8, 12):
        remote.install(bundle(finished, step, tmp_path / "bundle"), make(here))
        before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
        remote.fetch_newer(recipe)
        assert before == {path: path.stat().st_mtime_ns for path in here.rglob("*")}


def make(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_an_older_or_damaged_folder_gets_the_newer_one(finished, recipe, tmp_path):
    here = make(Path(recipe.output_dir))
    remote.install(bundle(finished, 8, tmp_path / "bundle"), here)
    Mirror(recipe).put(bundle(finished, 12, tmp_path / "bundle"))
    remote.fetch_newer(recipe)
    assert remote.newest_step(here) == 12
    (here / "checkpoints/step-00000012/state.json").write_text("{}")
    shutil.rmtree(here / "checkpoints/step-00000008")
    remote.fetch_newer(recipe)
    assert remote.newest_step(here) == 12
    assert timeless_metrics(here) == timeless_metrics(finished)


def damage(recipe: Recipe, step: int) -> None:
    (file,) = Path(recipe.checkpoint_mirror.removeprefix("file://")).glob(
        f"step-{step:08d}-*/checkpoints/*/state.json"
    )
    file.write_text(file.read_text().replace("1", "2", 1))


def test_a_damaged_one_is_passed_over_with_a_line_but_never_for_a_new_start(
    finished, recipe, tmp_path, monkeypatch, capsys
):
    place = Mirror(recipe)
    place.put(bundle(finished, 8, tmp_path / "bundle"))
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "_bundles", lambda self: [])  # the older one is not removed
        place.put(bundle(finished, 12, tmp_path / "bundle"))
    damage(recipe, 12)
    remote.fetch_newer(recipe)
    assert remote.newest_step(Path(recipe.output_dir)) == 8
    printed = capsys.readouterr().out
    assert "the checkpoint of step 12 at file://" in printed and "going on without it" in printed
    assert printed.count("trying again") == len(remote.FETCH_PAUSES)

    shutil.rmtree(recipe.output_dir)
    damage(recipe, 8)
    with pytest.raises(RunFailed, match=r"state\.json is altered.*or begin anew by resume_from_checkpoint: never"):
        remote.fetch_newer(recipe)
    assert not list(Path(recipe.output_dir).rglob("*.json"))
    remote.fetch_newer(dataclasses.replace(recipe, resume_from_checkpoint="never"))
    assert not list(Path(recipe.output_dir).rglob("*.json"))


def test_another_recipes_checkpoint_is_refused(finished, recipe, tmp_path):
    Mirror(recipe).put(bundle(finished, 8, tmp_path / "bundle"))
    with pytest.raises(InputError, match=r"holds the checkpoint of another run \(learning_rate: 0.003 -> 0.001\)"):
        remote.fetch_newer(dataclasses.replace(recipe, learning_rate=1e-3))


def test_without_an_answer_nothing_begins_anew_and_what_is_here_goes_on(
    finished, recipe, tmp_path, monkeypatch, capsys
):
    def refuse(self) -> list:
        raise ConnectionError("refused")

    monkeypatch.setattr(Mirror, "find", refuse)
    with pytest.raises(RunFailed, match="cannot be asked for a checkpoint: ConnectionError: refused"):
        remote.fetch_newer(recipe)
    remote.install(bundle(finished, 8, tmp_path / "bundle"), make(Path(recipe.output_dir)))
    remote.fetch_newer(recipe)
    assert "going on without it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("s4://bucket/x", "at no address that fsspec knows"),
        ("ftp://me:secret@server/x", "holds a password"),
        ("s3://bucket/x", r"needs s3fs; pip install 'clm_owt\[mirror\]'"),
        ("gs://bucket/x", "needs gcsfs; pip install gcsfs"),
        ("memory://x", "a run can keep nothing at memory://"),
        ("https://me:secret@server/x", "'server/x': a run can keep nothing at https://"),
        ("me:secret@server:/x", "'server:/x' is no address"),
        ("s3:/bucket/x", "is no address; expected one with ://, such as s3://bucket/runs/x, or the path of a folder"),
        (r"C:\x", "is no address; expected one with ://"),
        ("data:,x", "is no address; expected one with ://"),
        ("s3://[bad/x", "needs s3fs"),
    ],
)
def test_an_address_that_cannot_work_is_named(tiny_recipe, monkeypatch, address, expected):
    from clm_owt import recipe_reader

    monkeypatch.setattr(recipe_reader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=expected) as error:
        load_recipe(["--recipe", str(tiny_recipe), "--checkpoint_mirror", address])
    assert "secret" not in str(error.value)


# Whole runs


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add_token("hf_write", user="tester")
        yield server


def start(warm, tiny_recipe, server: HubServer, home: Path, *disturbances, options=PUSH) -> Job:
    argv, env = ["--recipe", str(tiny_recipe), *options], {"HF_TOKEN": "hf_write"}
    return warm.start(RUN, argv, [partial(use_hub, server.url), *disturbances], cwd=home, env=env)


def test_a_killed_run_goes_on_from_the_hub_in_an_empty_folder(warm, tiny_recipe, finished, server, tmp_path):
    first = start(warm, tiny_recipe, server, tmp_path / "a", partial(at_step, 11, kill_myself))
    assert first.wait() == -signal.SIGKILL
    assert "is private: hub_strategy checkpoint" in first.text
    repository = server.repository(REPO)
    second = start(warm, tiny_recipe, server, tmp_path / "b")
    assert second.wait() == 0, second.text
    assert "Fetched step 8 from tester/tiny on the Hub" in second.text or "Fetched step 4 from" in second.text
    assert_same_run(tmp_path / "b/runs/tiny", finished)
    assert not (tmp_path / "b/runs/tiny/outgoing").exists()

    assert repository.private
    assert not [name for name in repository.files() if name.startswith("last-checkpoint")]
    assert "step-00000012" in repository.tags  # as with every_save
    branch = repository.branches["last-checkpoint"]
    files = [name.partition("/")[2] for name in branch[-1].files if name.startswith("last-checkpoint/")]
    assert len(branch) == 1  # older ones are in no history
    assert {Path(name).parts[1] for name in files if name.startswith("checkpoints")} == {"step-00000012"}

    third = start(warm, tiny_recipe, server, tmp_path / "c")  # of the finished run
    assert third.wait() == 0 and "Fetched step 12" in third.text, third.text
    assert_same_run(tmp_path / "c/runs/tiny", finished)


def test_a_hub_that_is_gone_stops_no_training_and_lets_none_begin_anew(warm, tiny_recipe, finished, server, tmp_path):
    options = [*PUSH[:2], "tester/outage", *PUSH[3:]]

    fault = server.fault("/api/models/tester/outage/revision/*", times=math.inf, status=503)
    refused = start(warm, tiny_recipe, server, tmp_path / "a", options=options)
    assert refused.wait() == 1, refused.text
    assert "error: hub_model_id: tester/outage on the Hub cannot be asked for a checkpoint: 503" in refused.text
    assert "Traceback" not in refused.text and not list(tmp_path.rglob("recipe.yaml"))

    fault.times = 0
    commits = server.fault("*/commit/*", times=math.inf, status=503)
    job = start(warm, tiny_recipe, server, tmp_path / "b", options=options)
    assert job.wait() == 0, job.text
    assert "is not kept at tester/outage on the Hub: 503" in job.text and "the next save tries again" in job.text
    commits.times = 0
    assert_same_run(tmp_path / "b/runs/tiny", finished)


def test_a_run_that_is_told_to_stop_leaves_its_last_step_elsewhere(warm, tiny_recipe, finished, tmp_path):
    options = ["--recipe", str(tiny_recipe), "--checkpoint_mirror", f"file://{tmp_path}/mirror"]
    job = warm.start(RUN, options, [partial(at_step, 7, partial(kill_myself, signal.SIGTERM))], cwd=tmp_path / "a")
    assert job.wait() == 128 + signal.SIGTERM, job.text
    assert "Step 6 is kept at file://" in job.text
    again = warm.start(RUN, options, [], cwd=tmp_path / "b")
    assert again.wait() == 0, again.text
    assert "Fetched step 6 from file://" in again.text and "Continuing after step 6" in again.text
    assert_same_run(tmp_path / "b/runs/tiny", finished)


def test_processes_other_than_the_main_one_keep_nothing(recipe):
    with remote.RemoteCheckpoints(recipe, False, print) as uploads:
        uploads.saved(Path("step-00000010"))
    assert kept(recipe) == []
