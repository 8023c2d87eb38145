"""Token stores built ahead: by several processes, in parts, killed, shared; always the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_fixtures import english_documents, write_openwebtext
from support.runs import PYTHON, ROOT, environment, launcher, run, timeless_metrics, write_json_lines
from tokenizers import Tokenizer

from clm_owt.reports.record import read_metrics

SCRIPT = [sys.executable, str(ROOT / "scripts/prepare_data.py")]
FILES = 5


@pytest.fixture(scope="module")
def parquet_files(tmp_path_factory) -> str:
    """Five files of paragraphs, some of them empty, several row groups each."""
    paragraphs = [part for document in english_documents() for part in document.split("\n\n")]
    paragraphs[100:100] = ["", ""]
    paragraphs[-50:-50] = [""] * 7
    folder = write_openwebtext(tmp_path_factory.mktemp("corpus") / "data", paragraphs, FILES, rows_per_group=500)
    return str(folder / "plain_text" / "*.parquet")


def options_for(files: str, cache: Path, **settings: object) -> list[str]:
    defaults = {
        "dataset_name": "parquet",
        "data_files": files,
        "train_tokenizer_vocab_size": 300,
        "block_size": 8,
        "validation_documents": 60,
        "effective_batch_size": 512,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_steps": 40,
        "data_cache_dir": cache,
    }
    return [f"--{name}={value}" for name, value in (defaults | settings).items()]


def prepare(options: list[str], cwd: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run(SCRIPT, *options, *more, cwd=cwd, env=environment(cwd, **env))


def store_of(cache: Path) -> dict[str, bytes]:
    (folder,) = (cache / "stores").iterdir()  # and nothing beside it
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(parquet_files, tmp_path_factory) -> Path:
    """The cache of a store built in one piece by one process."""
    home = tmp_path_factory.mktemp("whole")
    result = prepare(options_for(parquet_files, home / "cache"), home)
    assert result.returncode == 0, result.stderr
    assert "38 empty documents" in " ".join(result.stdout.split())
    assert len(store_of(home / "cache")) > 10
    return home / "cache"


# the same bytes


def test_two_workers_build_the_same_bytes(whole, parquet_files, tmp_path):
    result = prepare(options_for(parquet_files, tmp_path / "cache"), tmp_path, "--num_workers=2")
    assert (result.returncode, result.stderr) == (0, "")
    assert store_of(tmp_path / "cache") == store_of(whole)


def test_no_more_workers_are_started_than_there_are_files(whole, parquet_files, tmp_path):
    lines = "--num_workers: 5 instead of 6, since a worker encodes one file at a time\n"
    result = prepare(options_for(parquet_files, tmp_path / "cache"), tmp_path, "--num_workers=6")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(lines)
    assert store_of(tmp_path / "cache") == store_of(whole)


def test_the_reference_encoder_builds_the_same_bytes(whole, parquet_files, tmp_path):
    result = prepare(options_for(parquet_files, tmp_path / "cache"), tmp_path, CLM_OWT_ENCODER="tokenizers")
    assert (result.returncode, result.stderr) == (0, "")
    assert store_of(tmp_path / "cache") == store_of(whole)


def test_parts_are_merged_to_the_same_bytes(whole, parquet_files, tmp_path):
    options = options_for(parquet_files, tmp_path / "cache")
    assert "Part 3/3: 2 of 5 files" in prepare(options, tmp_path, "--part=3/3", "--num_workers=2").stdout
    assert "Part 1/3: 1 of 5 files" in prepare(options, tmp_path, "--part=1/3").stdout
    result = prepare(options, tmp_path, "--merge")
    assert (result.returncode, result.stderr) == (2, "error: --merge: 2 parts are not there yet, files 1, 2\n")
    assert prepare(options, tmp_path, "--part=2/3").returncode == 0

    part = next((tmp_path / "cache/stores").glob("*.parts/00002.arrow"))
    content = part.read_bytes()
    part.write_bytes(content[:-2000])
    result = prepare(options, tmp_path, "--merge")
    assert result.returncode == 2
    assert f"error: {part}: cannot be read" in result.stderr and "delete it and start again" in result.stderr
    part.write_bytes(content)

    result = prepare(options, tmp_path, "--merge")
    assert result.returncode == 0, result.stderr
    assert "0 documents (0/s)" in result.stdout  # all were encoded before
    assert store_of(tmp_path / "cache") == store_of(whole)


def kill_at_random(options: list[str], cwd: Path, kills: int, longest: float) -> None:
    """Start the preparation and kill it, or all its processes, at a random instant, until so many kills met it."""
    draw, done = random.Random(kills), 0
    while done < kills:
        workers = draw.randint(1, 2)
        backend = draw.choice(["gigatoken", "tokenizers"])
        process = subprocess.Popen(
            [*SCRIPT, *options, f"--num_workers={workers}"],
            cwd=cwd,
            env=environment(cwd, CLM_OWT_ENCODER=backend),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(draw.uniform(0.3, longest))
        if process.poll() is None:
            kill = os.kill if done % 3 else os.killpg  # the process, which its workers notice; or all of them
            kill(process.pid, signal.SIGKILL)
        done += process.wait() == -signal.SIGKILL
        if any((cwd / "cache/stores").glob("*/manifest.json")):
            (manifest,) = (cwd / "cache/stores").glob("*/manifest.json")
            if json.loads(manifest.read_text())["complete"]:
                for file in manifest.parent.iterdir():  # complete: begin again
                    file.unlink()
                manifest.parent.rmdir()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_instants_it_goes_on_to_the_same_bytes(whole, parquet_files, tmp_path, kills):
    options = options_for(parquet_files, tmp_path / "cache")
    began = time.monotonic()
    assert prepare(options_for(parquet_files, tmp_path / "timed"), tmp_path, "--num_workers=2").returncode == 0
    longest = time.monotonic() - began
    kill_at_random(options, tmp_path, kills, longest)
    result = prepare(options, tmp_path, "--num_workers=2")
    assert result.returncode == 0, result.stderr
    assert store_of(tmp_path / "cache") == store_of(whole)


def test_a_killed_worker_is_an_error_and_the_same_command_goes_on(whole, parquet_files, tmp_path):
    options = options_for(parquet_files, tmp_path / "cache")
    process = subprocess.Popen(
        [*SCRIPT, *options, "--num_workers=2"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    workers: list[int] = []
    while process.poll() is None and not workers:
        for child in Path(children).read_text().split():
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                workers.append(int(child))
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("error: num_workers: one of the 2 encoding processes died") and "Traceback" not in errors
    assert prepare(options, tmp_path).returncode == 0
    assert store_of(tmp_path / "cache") == store_of(whole)


# before the run, or during it


# The builder reads its first batch, and each further one when training has come to a stand for want of it.
SLOW_BUILDER = """
import os, sys, time
if "clm_owt.data.builder" in sys.orig_argv:
    from clm_owt.data import parts
    read_documents = parts.read_documents
    def progress():
        return os.path.exists("during/metrics.jsonl") and os.path.getsize("during/metrics.jsonl")
    def read_slowly(*arguments, **named):
        for number, batch in enumerate(read_documents(*arguments, **named)):
            seen = None
            while number and (not seen or seen != progress()):
                seen = progress()
                time.sleep(0.4)
            yield batch
    parts.read_documents = read_slowly
"""


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_training_consumes_the_same_blocks_from_a_store_that_is_still_being_built_slowly(
    whole, parquet_files, tmp_path, processes
):
    """40 steps over ten shards: the losses are equal to the bit, and one of the runs did wait."""
    small = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--logging_steps=1", "--sample_steps=none"]
    command = PYTHON if processes == 1 else launcher("cpu_2proc.yaml")
    on_cpu = {"ACCELERATE_USE_CPU": "true"}
    slowly = tmp_path / "slowly"
    slowly.mkdir()
    (slowly / "sitecustomize.py").write_text(SLOW_BUILDER)
    rows = {}
    for name, cache, env in (("before", whole, {}), ("during", tmp_path / "cache", {"PYTHONPATH": str(slowly)})):
        result = run(
            command,
            *options_for(parquet_files, cache, output_dir=tmp_path / name, effective_batch_size=2048),
            *small,
            cwd=tmp_path,
            env=environment(tmp_path, **on_cpu, **env),
        )
        assert result.returncode == 0, result.stderr
        rows[name] = timeless_metrics(tmp_path / name)
        for row in rows[name]:
            row.pop("epoch", None)  # unknown until the store is complete
        waited = sum(row.get("data_seconds", 0) for row in read_metrics(tmp_path / name / "metrics.jsonl"))
        assert (waited > 0.5) == (name == "during")
    assert len(rows["before"]) > 40
    assert rows["before"] == rows["during"]


def test_an_unexpected_count_of_blocks_is_reported(whole, parquet_files, tmp_path):
    blocks = sum(shard["rows"] for shard in json.loads(store_of(whole)["manifest.json"])["train"]["shards"])
    for expected, said in ((blocks + blocks // 990, True), (blocks + blocks // 1010, False)):
        options = options_for(parquet_files, tmp_path / str(said), expected_train_blocks=expected)
        result = prepare(options, tmp_path)
        assert result.returncode == 0, result.stderr
        assert (f"expected_train_blocks: the data hold {blocks:,} training blocks, -0.10%" in result.stdout) == said


def test_a_store_that_does_not_fit_on_the_disk_is_refused(parquet_files, tmp_path):
    options = options_for(parquet_files, tmp_path / "cache", expected_train_blocks=10**12)
    result = prepare(options, tmp_path)
    assert result.returncode == 2
    assert (
        result.stderr.startswith("error: data_cache_dir: the run needs another 16 TB") and "are free" in result.stderr
    )
    assert not (tmp_path / "cache").exists()


# what a complete store is good for


def test_verifying_names_every_altered_shard(parquet_files, tmp_path):
    options = options_for(parquet_files, tmp_path / "cache")
    result = prepare(options, tmp_path, "--verify")
    assert result.returncode == 2 and "no complete token store" in result.stderr
    assert prepare(options, tmp_path).returncode == 0
    result = prepare(options, tmp_path, "--verify")
    assert result.returncode == 0 and "shards are complete and as they were written" in result.stdout
    (folder,) = (tmp_path / "cache/stores").iterdir()
    for name in ("train-00001.arrow", "validation-00000.arrow"):
        content = bytearray((folder / name).read_bytes())
        content[-500] ^= 4
        (folder / name).write_bytes(content)
    result = prepare(options, tmp_path, "--verify")
    assert result.returncode == 2
    named = [folder / "validation-00000.arrow", folder / "train-00001.arrow"]
    assert [line.split(": altered")[0].removeprefix("error: ") for line in result.stderr.splitlines()] == [
        *map(str, named)
    ]


def test_the_export_is_read_as_nanogpt_reads_its_files(whole, parquet_files, tmp_path):
    result = prepare(options_for(parquet_files, whole), tmp_path, "--export=nanogpt", "--export_dir=bins")
    assert result.returncode == 0, result.stderr
    shards = sorted(name for name in store_of(whole) if name.startswith("train-"))
    data = np.memmap(tmp_path / "bins/train.bin", dtype=np.uint16, mode="r")
    from datasets import Dataset

    (folder,) = (whole / "stores").iterdir()
    blocks = np.concatenate([np.array(Dataset.from_file(str(folder / name))["input_ids"]) for name in shards])
    assert np.array_equal(data, blocks.reshape(-1))
    assert np.count_nonzero(np.memmap(tmp_path / "bins/val.bin", dtype=np.uint16, mode="r") == 0) in (59, 60)


def test_a_store_goes_to_the_hub_and_comes_back(hub, whole, parquet_files, tmp_path):
    env = hub.env(token="hf_write", home=tmp_path / "hf") | {"OMP_NUM_THREADS": "1"}
    options = options_for(parquet_files, whole)
    result = run(SCRIPT, *options, "--upload_to=tester/tokens", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    elsewhere = options_for(parquet_files, tmp_path / "cache")
    result = run(SCRIPT, *elsewhere, "--download_from=tester/tokens", cwd=tmp_path, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert store_of(tmp_path / "cache") == store_of(whole)
    assert prepare(elsewhere, tmp_path, "--verify").returncode == 0

    read = "from datasets import load_dataset; d = load_dataset('tester/tokens', split='train'); print(len(d), d[5])"
    result = run([sys.executable, "-c", read], cwd=tmp_path, env=env)
    manifest = json.loads(store_of(whole)["manifest.json"])
    assert result.stdout.startswith(f"{sum(shard['rows'] for shard in manifest['train']['shards'])} {{'input_ids': [")

    other = options_for(parquet_files, tmp_path / "other", block_size=16)
    result = run(SCRIPT, *other, "--download_from=tester/tokens", cwd=tmp_path, env=env)
    assert result.returncode == 2
    assert (
        result.stderr
        == "error: --download_from: tester/tokens is the store of another recipe: block_size: 8 there, 16 here\n"
    )
    assert not list((tmp_path / "other").rglob("*.arrow"))


@pytest.mark.parametrize("option", ["--part=0/4", "--part=5/4", "--part=half", "--num_workers=0"])
def test_an_option_that_cannot_be_is_named(parquet_files, tmp_path, option):
    result = prepare(options_for(parquet_files, tmp_path / "cache"), tmp_path, option)
    assert result.returncode == 2
    assert option.split("=")[0] in result.stderr and "does not work" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_document_of_200_megabytes_is_encoded_like_any_other(tmp_path, kind, gpt2_tokenizer_folder):
    text = " ".join(english_documents())
    documents = [
        "a first one, to validate with " * 50,
        (text * (200_000_000 // len(text) + 1))[:200_000_000],
        "",
        text,
    ]
    file = tmp_path / f"big.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": pa.array(documents, pa.large_string())}), file)
    else:
        write_json_lines(file, documents)
    settings = {
        "dataset_name": kind,
        "train_tokenizer_vocab_size": "none",
        "validation_documents": 1,
        "block_size": 64,
    }
    options = options_for(str(file), tmp_path / "cache", **settings, tokenizer_name=gpt2_tokenizer_folder)
    result = prepare(options, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 documents" in result.stdout and "1 empty documents" in " ".join(result.stdout.split())
    result = prepare(options, tmp_path, "--export=nanogpt")
    tokens = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    (end,) = np.flatnonzero(tokens == 50256)[:1]
    tokenizer = Tokenizer.from_file(str(gpt2_tokenizer_folder / "tokenizer.json"))
    assert tokenizer.decode(tokens[:2000].tolist()) == documents[1][: len(tokenizer.decode(tokens[:2000].tolist()))]
    last = tokenizer.decode(tokens[end - 2000 : end].tolist())
    assert documents[1].endswith(last) and len(last) > 2000
