"""Plans where there is no network: they come at once, and say what they did not look at."""

import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
from support.hub_server import HubServer
from support.runs import ROOT

from clm_owt.data.reachability import PROBE_SECONDS, find_unreachable, why_unreachable
from clm_owt.recipe_reader import load_recipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def plan_only(warm, home: Path, *options: str):
    job = warm.start("run_clm_owt:main", [*options, "--plan_only"], cwd=home)  # under HF_HUB_OFFLINE=1
    assert job.wait() is not None
    return job


@pytest.mark.parametrize(
    "file", [file for file in RECIPES if not file.stem.startswith("quickstart")], ids=lambda file: file.stem
)
def test_every_shipped_recipe_has_a_plan_without_a_network(warm, tmp_path, file):
    job = plan_only(warm, tmp_path, "--recipe", str(file))
    assert job.status == 0, job.text
    assert "Data and tokenizer are not looked at (HF_HUB_OFFLINE is set)" in job.text
    recipe = load_recipe(["--recipe", str(file)])
    assert f"{recipe.dataset_name}: not looked at: no network" in job.text
    assert f" {recipe.total_steps():,} steps of " in job.text
    assert "vocabulary 50,257" in job.text
    assert job.cpu_seconds < 5
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--expected_train_blocks", "none"], "num_train_epochs: the number of training blocks is not known"),
        (["--tokenizer_name", "me/mine"], "tokenizer_name: me/mine was not downloaded yet"),
    ],
)
def test_what_only_a_network_would_tell_is_named(warm, tmp_path, options, expected):
    job = plan_only(warm, tmp_path, "--recipe", str(ROOT / "recipes/owt_512.yaml"), *options)
    assert job.status == 2 and job.errors.read_text().startswith(f"error: {expected}"), job.text


def test_a_tokenizer_that_was_downloaded_before_is_counted(
    warm, tmp_path, gpt2_tokenizer_folder, byte_tokenizer_folder
):
    kept = tmp_path / "cache/tokenizers/me--mine"
    kept.parent.mkdir(parents=True)
    kept.symlink_to(byte_tokenizer_folder)
    options = ["--tokenizer_name", "me/mine", "--data_cache_dir", str(tmp_path / "cache")]
    job = plan_only(warm, tmp_path, "--recipe", str(ROOT / "recipes/owt_512.yaml"), *options)
    assert job.status == 0 and "vocabulary 257" in job.text, job.text


def test_a_server_that_does_not_answer_is_left_after_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        assert why_unreachable(address).startswith(f"{address}: ")
        assert time.monotonic() - began < PROBE_SECONDS + 1
    assert "ConnectError" in why_unreachable(address)  # it is closed by now
    with HubServer(tmp_path) as server:
        assert why_unreachable(server.url) is None  # a 404, which is an answer


def test_data_that_are_here_need_no_server(tmp_path, byte_tokenizer_folder):
    (tmp_path / "text.txt").write_text("a")
    local = f"--dataset_name text --data_files {tmp_path}/text.txt --effective_batch_size 1 --learning_rate 1 "
    local += f"--warmup_steps 1 --max_steps 2 --tokenizer_name {byte_tokenizer_folder}"
    assert find_unreachable(load_recipe(local.split())) is None
