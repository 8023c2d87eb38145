"""A dataset server that fails for a while: the same data as without, and it is said."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from support.bench import campaign
from support.hub_fixtures import GPT2, OPENWEBTEXT

from clm_owt.data.retries import READ_PAUSES, is_transient
from clm_owt.errors import InputError

ROOT = Path(__file__).parents[2]

BUILD = """
import json, sys
from clm_owt import hub_client
from clm_owt.data import documents
from clm_owt.data.building import build
from clm_owt.data.sources import resolve_source
from clm_owt.recipe_reader import load_recipe
hub_client.TIMEOUT_SECONDS = 1.0
documents.READ_PAUSES = documents.READ_PAUSES[:int(sys.argv[2])]
recipe = load_recipe(json.loads(sys.argv[1]))
build(recipe, resolve_source(recipe))
"""


def build_store(hub, cache: Path, attempts: int = 12, tokenizer: str = "none") -> subprocess.CompletedProcess[str]:
    argv = ["--dataset_name", OPENWEBTEXT, "--block_size", "8", "--tokenizer_name", tokenizer]
    argv += ["--train_tokenizer_vocab_size", "300" if tokenizer == "none" else "none"]
    argv += ["--validation_documents", "20", "--data_cache_dir", str(cache)]
    argv += ["--effective_batch_size", "1", "--learning_rate", "1", "--warmup_steps", "0", "--max_steps", "1"]
    env = hub.env(home=cache / "hf") | {"PYTHONPATH": str(ROOT), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    command = [sys.executable, "-c", BUILD, json.dumps(argv), str(attempts - 1)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)


def shards(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (cache / "stores").rglob("*.arrow")}


# What requests in a row meet; seven are more than the client itself repeats.
TROUBLES = {
    "503 for a list of files": {"pattern": "/api/datasets/*", "status": 503, "times": 1},
    "503": {"pattern": "/storage/*", "status": 503, "times": 7},
    "reset": {"pattern": "/storage/*", "reset": True, "times": 7},
    "cut after 2,000 bytes": {"pattern": "/storage/*", "after": 2000, "cut": True, "times": 2},
    "stalled for 3 s": {"pattern": "/storage/*", "stall": 3.0, "times": 1},
}


@pytest.mark.parametrize("number", campaign(range(4), short=1))
def test_503_resets_stalls_and_cuts_change_nothing_in_the_data_and_are_said(
    owt_hub, tmp_path, draw, record_fault, number
):
    """A request for data that is answered by 503, a reset, a cut or a stall, while the token store is built"""
    result = build_store(owt_hub, tmp_path / "quiet")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    faults = {what: owt_hub.fault(**TROUBLES[what]) for what in draw.sample(sorted(TROUBLES), len(TROUBLES))}
    result = build_store(owt_hub, tmp_path / "troubled")
    assert result.returncode == 0, result.stderr
    assert "trying again in 1 s" in result.stdout
    assert all("trying again in" in line for line in result.stdout.splitlines()), result.stdout
    assert shards(tmp_path / "troubled") == shards(tmp_path / "quiet") != {}
    for what, fault in faults.items():
        assert fault.hits == fault.times, what
        for _ in range(fault.times):
            record_fault(what)


def test_a_server_that_stays_away_is_an_error_and_the_store_goes_on_when_it_is_back(owt_hub, tmp_path):
    assert sum(READ_PAUSES) == 363  # what docs/data.md says: about six minutes
    result = build_store(owt_hub, tmp_path / "quiet", tokenizer=GPT2)
    last_file = owt_hub.requests("/storage/*")[-1].path
    away = owt_hub.fault(last_file, status=503, times=math.inf)
    result = build_store(owt_hub, tmp_path / "left", attempts=3, tokenizer=GPT2)
    assert result.returncode == 1
    assert [line.rpartition("; ")[2] for line in result.stdout.splitlines()] == [
        "trying again in 1 s",
        "trying again in 2 s",
    ]
    assert "InputError: " in result.stderr and "cannot be read" in result.stderr
    begun = shards(tmp_path / "left")
    assert begun
    owt_hub.faults.remove(away)
    result = build_store(owt_hub, tmp_path / "left", tokenizer=GPT2)
    assert (result.returncode, result.stdout) == (0, "")
    assert shards(tmp_path / "left") == shards(tmp_path / "quiet") != begun


def test_an_error_that_will_not_pass_is_not_tried_again(owt_hub, tmp_path):
    owt_hub.fault("/api/datasets/*", status=404, times=9)
    result = build_store(owt_hub, tmp_path / "cache")
    assert result.returncode == 1
    assert "trying again" not in result.stdout
    assert "InputError: dataset_name: " in result.stderr


@pytest.mark.parametrize(
    ("cause", "transient"),
    [(ConnectionResetError(), True), (TimeoutError(), True), (ValueError("5"), False), (FileNotFoundError(), False)],
)
def test_only_errors_of_the_connection_are_transient(cause, transient):
    try:
        raise InputError("x: cannot be read") from cause
    except InputError as error:
        assert is_transient(error) == transient
