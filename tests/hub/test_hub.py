"""Sharing: real runs that upload to the loopback Hub, with the client of huggingface_hub as it is."""

import json
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import push
import pytest
from support.hub_server import HubServer
from support.runs import PYTHON, ROOT, run, timeless_metrics

from clm_owt import hub, upload_queue
from clm_owt.errors import InputError
from clm_owt.recipe import Recipe
from clm_owt.reports.model_card import card_metadata
from clm_owt.reports.record import read_metrics
from clm_owt.stopping import Stopped, StopRequest
from clm_owt.training.run_lock import run_lock

pytestmark = pytest.mark.xdist_group("hub")  # its runs are shared

REPO = "tester/tiny"
PUSH = ["--push_to_hub", "--hub_model_id", REPO]

# The main job with less patience than people have.
IMPATIENT = """\
import sys
from clm_owt import hub, hub_client, upload_queue
hub.SECONDS_BETWEEN_COMMITS, upload_queue.RETRY_PAUSES, hub_client.TIMEOUT_SECONDS = {interval}, (0.2, 0.4, 0.8), 1.5
import run_clm_owt
run_clm_owt.main(sys.argv[1:])
"""


def impatient(interval: float = 0.0) -> list[str]:
    return [sys.executable, "-c", IMPATIENT.format(interval=interval)]


def online(server: HubServer, home: Path, token: str | None = "hf_write") -> dict[str, str]:
    """The environment of a user of this Hub, in which programs given as text import this project."""
    return server.env(token, home=home / "hf", PYTHONPATH=str(ROOT))


def in_fresh_process(server: HubServer, home: Path, code: str):
    """What `code` assigns to `result`, in a process with an empty cache."""
    command = [sys.executable, "-c", f"import json\n{code}\nprint(json.dumps(result))"]
    process = run(command, cwd=home, env=online(server, home))
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> HubServer:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add_token("hf_write", user="tester", role="write")
        server.add_token("hf_read", user="tester", role="read")
        yield server


@pytest.fixture(scope="module")
def private_run(warm, tiny_recipe, tmp_path_factory) -> Path:
    """The folder of a run without upload."""
    home = tmp_path_factory.mktemp("private")
    job = warm.start("run_clm_owt:main", ["--recipe", str(tiny_recipe)], cwd=home)
    assert job.wait() == 0, job.text
    return home / "runs/tiny"


@pytest.fixture(scope="module")
def shared_run(server, tiny_recipe, tmp_path_factory):
    """A run that was uploaded at its saves, and what it printed."""
    home = tmp_path_factory.mktemp("shared")
    options = ["--recipe", str(tiny_recipe), *PUSH, "--hub_strategy", "every_save"]
    result = run(impatient(), *options, cwd=home, env=online(server, home))
    assert result.returncode == 0, result.stderr
    return home / "runs/tiny", result


def assert_same_training(folder: Path, other: Path) -> None:
    assert timeless_metrics(folder) == timeless_metrics(other)
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (other / weights).read_bytes()


def test_a_run_that_uploads_trains_as_one_that_does_not(shared_run, private_run):
    assert_same_training(shared_run[0], private_run)


def test_the_repository_holds_what_somebody_else_needs(server, shared_run):
    folder, result = shared_run
    assert f"Uploaded step 12 to {REPO}, revision step-00000012" in result.stdout
    repository = server.repository(REPO)
    assert set(repository.files()) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "plan.json",
        "recipe.yaml",
        "samples.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_curves.png",
    }
    assert repository.read("model.safetensors") == (folder / "model/model.safetensors").read_bytes()
    assert repository.read("metrics.jsonl") == (folder / "metrics.jsonl").read_bytes()
    assert not (folder / "hub").exists() or not list((folder / "hub").iterdir())


def test_the_token_is_in_no_file_and_no_line(server, shared_run):
    folder, result = shared_run
    written = {str(path): path.read_bytes() for path in folder.parents[1].rglob("*") if path.is_file()}
    uploaded = {name: server.repository(REPO).read(name) for name in server.repository(REPO).files()}
    printed = {"output": result.stdout.encode(), "errors": result.stderr.encode()}
    assert len(written) > 20 and len(uploaded) == 12
    assert [name for name, content in (written | uploaded | printed).items() if b"hf_write" in content] == []


@pytest.fixture(scope="module")
def downloaded(server, shared_run, tmp_path_factory):
    """What somebody else gets from the repository, in a fresh process with an empty cache."""
    folder, _ = shared_run
    earlier = sorted(server.repository(REPO).tags)[0]
    code = f"""
from huggingface_hub import ModelCard, hf_hub_download, metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer
from clm_owt.model.sampling import sample
def text(model_id):
    model = AutoModelForCausalLM.from_pretrained(model_id)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    return sample(model, tokenizer, ["Returns the"], max_new_tokens=20, temperature=1.0, top_p=0.9, seed=3)[0]
earlier = AutoModelForCausalLM.from_pretrained("{REPO}", revision="{earlier}")
card = ModelCard.load("{REPO}")
card.validate()
result = dict(
    before=text("{folder / "model"}"), after=text("{REPO}"), earlier="{earlier}",
    same=bool((earlier.lm_head.weight == AutoModelForCausalLM.from_pretrained("{REPO}").lm_head.weight).all()),
    results={{r.metric_type: r.metric_value for r in card.data.eval_results}},
    metadata=metadata_load(hf_hub_download("{REPO}", "README.md")),
    card=card.text,
)
"""
    return SimpleNamespace(**in_fresh_process(server, tmp_path_factory.mktemp("somebody"), code))


def test_a_fresh_process_samples_the_same_text_and_loads_an_earlier_step(server, downloaded):
    assert len(downloaded.before) > 10
    assert downloaded.after == downloaded.before
    assert downloaded.earlier in ("step-00000004", "step-00000008")
    assert not downloaded.same
    last_row = server.repository(REPO).read("metrics.jsonl", downloaded.earlier).decode().splitlines()[-1]
    assert json.loads(last_row)["step"] <= int(downloaded.earlier.removeprefix("step-"))


def test_the_model_card_passes_the_checks_of_huggingface_hub(shared_run, downloaded):
    last = [row for row in read_metrics(shared_run[0] / "metrics.jsonl") if row["split"] == "validation"][-1]
    assert downloaded.results == {"loss": last["loss"], "perplexity": last["perplexity"]}
    metadata = downloaded.metadata
    assert metadata["license"] and metadata["library_name"] == "transformers"
    assert {"gpt2", "causal-lm"} <= set(metadata["tags"])
    assert metadata["model-index"][0]["name"] == "tiny"
    for heading in ("How to use it", "Training", "Results", "Samples", "Limits", "The recipe"):
        assert f"## {heading}" in downloaded.card
    assert f"{last['loss']:.4f}" in downloaded.card and "![Training curves](training_curves.png)" in downloaded.card


def test_the_card_names_what_the_model_came_from():
    settings = {"dataset_name": "Skylion007/openwebtext", "init_from": "openai-community/gpt2"}
    recipe = Recipe(**settings, effective_batch_size=512, learning_rate=1e-3, warmup_steps=100).to_dict()
    metadata = card_metadata(recipe, "me/gpt2-owt", []).to_dict()
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["Skylion007/openwebtext"] and metadata["language"] == "en"
    assert metadata["base_model"] == "openai-community/gpt2"
    local = card_metadata(recipe | {"dataset_name": "json", "init_from": "runs/a/model"}, "me/gpt2-owt", []).to_dict()
    assert not {"datasets", "language", "base_model"} & local.keys()


def test_the_command_on_the_card_trains_on_from_the_shared_weights(server, shared_run, downloaded, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(server.repository(REPO).read("recipe.yaml"))
    (options,) = re.findall(r"^python run_clm_owt.py (.*)$", downloaded.card, flags=re.MULTILINE)
    command = [*PYTHON, *options.split(), "--max_steps", "3", "--warmup_steps", "1"]
    result = run(command, cwd=tmp_path, env=online(server, tmp_path))
    assert result.returncode == 0, result.stderr
    before, after = (
        [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"]
        for folder in (shared_run[0], tmp_path / "runs/continued")
    )
    assert after[0]["step"] == 0 and after[0]["loss"] == before[-1]["loss"]


def test_outages_cut_connections_and_stalls_are_overcome(private_run, tiny_recipe, tmp_path, request):
    server, repo = request.getfixturevalue("hub"), "tester/outages"  # with an empty storage
    server.fault("*/preupload/*", status=503)
    put = server.fault("/storage/*", method="PUT", cut=True)
    stall = server.fault(f"*/{repo}/commit/*", stall=4)
    refused = server.fault(f"*/{repo}/commit/*", status=503)
    lost = server.fault(f"*/{repo}/commit/*", after=0, cut=True)
    result = run(
        impatient(),
        *["--recipe", str(tiny_recipe), "--push_to_hub", "--hub_model_id", repo],
        cwd=tmp_path,
        env=online(server, tmp_path),
    )
    assert result.returncode == 0, result.stderr
    assert (put.hits, stall.hits, refused.hits, lost.hits) == (1, 1, 1, 1)
    assert f"Uploaded step 12 to {repo}" in result.stdout
    assert "Traceback" not in result.stderr and "not uploaded" not in result.stdout
    repository = server.repository(repo)
    assert len(repository.commits) == 2  # the first is the repository's own
    assert repository.tags == {"step-00000012": repository.sha}
    assert_same_training(tmp_path / "runs/tiny", private_run)


def test_a_server_that_is_gone_costs_one_line_and_push_py_repeats_the_upload(private_run, tiny_recipe, tmp_path):
    with HubServer(tmp_path / "server") as server:
        server.add_token("hf_write", user="tester")
        env = online(server, tmp_path)
    # It is stopped from here on.
    result = run(impatient(), "--recipe", str(tiny_recipe), *PUSH, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    about_hub = [line for line in result.stdout.splitlines() if REPO in line]
    assert len(about_hub) == 3, about_hub  # at the start, at the end, and that it begins
    assert about_hub[0].startswith(f"The Hub cannot be asked about {REPO}")
    assert about_hub[2].endswith("to repeat it: python scripts/push.py runs/tiny")
    assert "Traceback" not in result.stderr
    assert_same_training(tmp_path / "runs/tiny", private_run)

    command = [sys.executable, str(ROOT / "scripts/push.py"), "runs/tiny"]
    with server:
        back = run(command, cwd=tmp_path, env=env)
        assert back.returncode == 0, back.stderr
        assert server.repository(REPO).tags.keys() == {"step-00000012"}
    assert not (tmp_path / "runs/tiny/hub").exists()


def test_a_rejected_token_ends_the_run_before_it_begins(server, tiny_recipe, tmp_path):
    env = online(server, tmp_path, token="hf_unknown")
    result = run(PYTHON, "--recipe", str(tiny_recipe), *PUSH, cwd=tmp_path, env=env)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: hub_model_id: {REPO}: 401 ")
    assert "hf auth login" in result.stderr and len(result.stderr.splitlines()) == 1
    assert "hf_unknown" not in result.stdout + result.stderr
    assert not (tmp_path / "runs").exists()


def test_the_start_tells_errors_from_outages(server, tmp_path):
    server.add_repository("somebody/else")
    server.add_repository("tester/mine")
    server.fault("/api/repos/create", stall=3)
    server.fault("/api/repos/create", status=503)
    cases = [
        ("hf_write", "tester/mine"),
        ("hf_write", "tester/mine"),
        ("hf_write", "tester/mine"),
        ("hf_read", "tester/mine"),
        ("hf_write", "somebody/else"),
        ("hf_write", "tester/no such name"),
        ("", "tester/mine"),
    ]
    code = f"""
import os
from clm_owt import hub, hub_client
from clm_owt.reports.record import read_metrics
hub_client.TIMEOUT_SECONDS = 1.0
from clm_owt.errors import InputError
from clm_owt.recipe import Recipe
result = []
for token, repo_id in {cases!r}:
    os.environ["HF_TOKEN"] = token
    recipe = Recipe(dataset_name="x", effective_batch_size=1, learning_rate=1, warmup_steps=1,
                    push_to_hub=True, hub_model_id=repo_id)
    try:
        result.append(hub.check_repository(recipe))
    except InputError as error:
        result.append(str(error))
"""
    stalled, failed, writable, read_only, foreign, name, no_token = in_fresh_process(server, tmp_path, code)
    assert stalled[0].startswith("The Hub cannot be asked about tester/mine") and "the run goes on" in stalled[0]
    assert "503" in failed[0] and "the run goes on" in failed[0]
    assert writable == []
    assert "403" in read_only and "write access" in read_only
    assert "403" in foreign
    assert "no valid repository id" in name
    assert "hub_model_id: tester/mine: not logged in; `hf auth login`, or a token in HF_TOKEN" in no_token


@pytest.fixture
def half_a_run(tmp_path) -> Path:
    """What a folder may hold that is of an older version, or damaged, with an upload that waits."""
    (tmp_path / "recipe.yaml").write_text("run_name: tiny\n")
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "hub/step-00000004").mkdir(parents=True)
    return tmp_path


def test_push_py_leaves_a_run_alone_that_is_running(half_a_run):
    with run_lock(half_a_run), pytest.raises(InputError, match="has been running in"):
        push.main([str(half_a_run), "--hub_model_id", REPO])
    assert (half_a_run / "hub/step-00000004").is_dir()


def test_push_py_names_what_a_folder_lacks(half_a_run):
    with pytest.raises(InputError, match="its recipe has no hub_model_id; give one: --hub_model_id me/gpt2-owt"):
        push.main([str(half_a_run)])
    (half_a_run / "model").mkdir()
    with pytest.raises(InputError, match=r"/plan\.json has no 'total_steps': it is damaged, or of another version"):
        push.main([str(half_a_run), "--hub_model_id", REPO])


class Queue:
    """`HubUploads` whose `upload` does what a test says, and keeps what came and when."""

    def __init__(self, folder: Path, monkeypatch, outcomes=(), interval: float = 0.0, pauses=(0.05, 0.05)):
        self.said: list[str] = []
        self.attempts: list[tuple[str, float]] = []
        self.go = threading.Event()  # an upload lasts until the test says so
        self.begun = threading.Event()
        self._outcomes = iter(outcomes)
        monkeypatch.setattr(hub, "SECONDS_BETWEEN_COMMITS", interval)
        monkeypatch.setattr(upload_queue, "RETRY_PAUSES", pauses)
        monkeypatch.setattr(hub, "upload", self._upload)
        monkeypatch.setattr(hub, "stage", self._stage)
        self.folder = folder
        recipe = SimpleNamespace(
            output_dir=str(folder),
            push_to_hub=True,
            hub_model_id=REPO,
            hub_private_repo=None,
            hub_strategy="every_save",
        )
        self.uploads = hub.HubUploads(recipe, None, None, 100, True, self.said.append)
        monkeypatch.setattr(hub, "load_file", lambda path: {})

    def _stage(self, run: Path, step: int, write_model) -> Path:
        folder = self.folder / "hub" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        return folder

    def _upload(self, folder: Path, repo_id: str, private: bool | None) -> str:
        self.attempts.append((folder.name, time.monotonic()))
        self.begun.set()
        assert self.go.wait(10)
        error = next(self._outcomes, None)
        if error is not None:
            raise error
        return "url"

    def save(self, *steps: int) -> None:
        for step in steps:
            self.uploads.saved(self.folder / f"step-{step:08d}")

    def finish(self) -> list[str]:
        """The names of the uploads that were tried."""
        self.uploads.finish(StopRequest())
        return [name for name, _ in self.attempts]


def test_one_upload_at_a_time_and_the_newest_replaces_those_that_wait(tmp_path, monkeypatch):
    queue = Queue(tmp_path, monkeypatch)
    queue.save(10)
    assert queue.begun.wait(10)
    queue.save(20, 30, 40)
    queue.go.set()
    assert queue.finish() in (["step-00000010", "step-00000100"], ["step-00000010", "step-00000040", "step-00000100"])
    assert not list((tmp_path / "hub").iterdir())


def test_commits_keep_their_distance(tmp_path, monkeypatch):
    assert hub.SECONDS_BETWEEN_COMMITS == 300
    queue = Queue(tmp_path, monkeypatch, interval=0.3)
    queue.go.set()
    queue.save(10)
    while not queue.said:
        time.sleep(0.01)
    queue.save(20)
    while len(queue.said) < 2:
        time.sleep(0.01)
    (_, first), (_, second) = queue.attempts
    assert second - first >= 0.3


def test_the_last_upload_does_not_wait(tmp_path, monkeypatch):
    queue = Queue(tmp_path, monkeypatch, interval=300.0)
    queue.go.set()
    queue.save(10)
    while not queue.said:
        time.sleep(0.01)
    began = time.monotonic()
    assert queue.finish() == ["step-00000010", "step-00000100"]
    assert time.monotonic() - began < 10


def test_an_error_that_may_pass_is_tried_again_and_one_that_will_not_is_not(tmp_path, monkeypatch):
    queue = Queue(tmp_path / "a", monkeypatch, outcomes=[ConnectionError("gone"), TimeoutError("slow")])
    queue.go.set()
    assert queue.finish() == ["step-00000100"] * 3
    assert queue.said[-1].startswith("Uploaded step 100")

    queue = Queue(tmp_path / "b", monkeypatch, outcomes=[ConnectionError("gone")] * 9)
    queue.go.set()
    assert queue.finish() == ["step-00000100"] * 3
    expected = f"Step 100 was not uploaded to {REPO}: ConnectionError: gone; to repeat it: python scripts/push.py"
    assert queue.said[-1].startswith(expected)
    assert list((tmp_path / "b/hub").iterdir())  # what scripts/push.py uploads

    queue = Queue(tmp_path / "c", monkeypatch, outcomes=[ValueError("no card")])
    queue.go.set()
    assert queue.finish() == ["step-00000100"]
    assert "was not uploaded" in queue.said[-1]


def test_a_newer_save_takes_the_place_of_one_that_waits_to_be_tried_again(tmp_path, monkeypatch):
    queue = Queue(tmp_path, monkeypatch, outcomes=[ConnectionError("gone")], pauses=(30.0,))
    queue.go.set()
    queue.save(10)
    assert queue.begun.wait(10)
    assert queue.finish() == ["step-00000010", "step-00000100"]


def test_a_signal_ends_the_wait_for_the_last_upload(tmp_path, monkeypatch):
    queue = Queue(tmp_path, monkeypatch)  # an upload that does not end
    stop = StopRequest()
    stop._received = signal.SIGTERM
    with pytest.raises(Stopped):
        queue.uploads.finish(stop)
    assert stop.way_on.startswith("to repeat it: python scripts/push.py")  # the run itself has ended
    queue.go.set()


def test_processes_other_than_the_main_one_upload_nothing(tmp_path):
    recipe = SimpleNamespace(output_dir=str(tmp_path), push_to_hub=True, hub_model_id=REPO, hub_strategy="every_save")
    uploads = hub.HubUploads(recipe, None, None, 100, False, print)
    uploads.saved(tmp_path / "step-00000010")
    uploads.finish(StopRequest())
    assert not list(tmp_path.iterdir())
