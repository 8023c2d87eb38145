"""The search for the micro-batch, and runs whose memory really ends: limits of the kernel, no mocks of torch."""

import contextlib
import ctypes
import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from support.runs import PYTHON, ROOT, environment, run
from support.watched_fixtures import (
    GLOBAL_BATCH,
    WATCHED,
    Record,
    assert_same_losses,
    watch_forked_runs,
    watch_launched_runs,
    watched_run,
    write_spec,
)

from clm_owt.errors import InputError
from clm_owt.model.gpt2 import build_model
from clm_owt.recipe_reader import load_recipe
from clm_owt.stopping import Stopped
from clm_owt.training import device_memory
from clm_owt.training.device_memory import Limit, available_memory, cgroup_limits, limited, process_sizes
from clm_owt.training.launch import find_hardware
from clm_owt.training.micro_batch_search import find_micro_batch
from clm_owt.training.processes import Processes

pytestmark = pytest.mark.xdist_group("memory search")

MIB = 2**20
CPU = torch.device("cpu")
linux = pytest.mark.skipif(process_sizes() is None, reason="limits of memory are Linux's")


def small_recipe(*options: str):
    argv = "--dataset_name python-docs --train_tokenizer_vocab_size 300 --block_size 128 --n_layer 2 --n_head 2 "
    argv += "--n_embd 64 --effective_batch_size 16 --learning_rate 1 --warmup_steps 0 --max_steps 1"
    return load_recipe(argv.split() + list(options))


@pytest.fixture(scope="module")
def model():
    device_memory.start_threads()
    # glibc raises the size from which it returns freed memory at once; here each search is to begin with as much.
    M_MMAP_THRESHOLD = -3
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    # Each try of a search collects garbage, and would walk through all that was imported.
    gc.collect()
    gc.freeze()
    yield build_model(small_recipe(), 300, 0)
    gc.unfreeze()


@pytest.fixture
def search(model):
    """find_micro_batch for one process on this CPU."""
    accelerator = Accelerator(cpu=True)
    processes = Processes(accelerator)
    hardware = find_hardware(accelerator, processes)

    def search(*options: str, signum: int | None = None, **more: object):
        stop = SimpleNamespace(signum=signum)
        return find_micro_batch(model, small_recipe(*options), accelerator, processes, stop, hardware, **more)

    return search


def memory(size: int):
    """For `available`: so many bytes are."""
    return lambda device: size


def test_where_the_first_size_fits_it_takes_one_probe(search):
    found = search()
    assert (found.micro_batch, found.tries) == (16, [16])
    assert found.peak_memory is None or found.peak_memory > 10 * MIB
    assert search("--max_batch_size=7").micro_batch == 6  # 3 passes, as with 7
    assert search("--max_batch_size=1").micro_batch == 1


def test_without_auto_batch_size_the_recipe_s_is_taken_as_it_is(search):
    found = search("--auto_batch_size=false", "--max_batch_size=7")
    assert (found.micro_batch, found.tries) == (7, [])
    assert search("--max_batch_size=7", probing=False).micro_batch == 6


@linux
def test_under_limits_of_the_kernel(tmp_path):
    """In a process of its own: memory that malloc has kept from earlier tests would serve a probe past its limit."""
    cases = str(Path(__file__).with_name("kernel_limit_cases.py"))
    result = run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", cases], cwd=ROOT, env=environment(tmp_path)
    )
    assert result.returncode == 0, result.stdout
    assert "3 passed" in result.stdout


def test_where_not_even_one_block_fits_the_error_says_what_was_tried_and_what_helps(search, model, monkeypatch):
    def forward(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(InputError) as error:
        search(available=memory(64 * MIB))
    text = str(error.value)
    for part in ("16, 8, 6, 4, 3, 2, 1", "57 MB", "85%", "block_size", "gradient_checkpointing", "n_layer"):
        assert part in text


def test_an_error_that_is_not_about_memory_is_raised_at_once(search, model, monkeypatch):
    calls = []

    def forward(**inputs):
        calls.append(inputs)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        search()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 18.09 GB, other allocations: 1 MB, max allowed: 18 GB)"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_errors_that_accelerate_does_not_know_are_stepped_down_from_too(search, model, monkeypatch, error):
    forward = model.forward

    def fail_above_4(input_ids, **inputs):
        if len(input_ids) > 4:
            raise error
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(model, "forward", fail_above_4)
    assert search().tries == [16, 8, 6, 4]


def test_a_signal_ends_the_search(search):
    with pytest.raises(Stopped):
        search(signum=15)


def test_what_an_earlier_session_found_holds_on_the_same_machine_only(search):
    found = search("--max_batch_size=4")
    stored = json.loads(json.dumps(found.to_dict()))
    again = search("--max_batch_size=4", known=stored)
    assert (again.micro_batch, again.from_plan, again.tries) == (4, True, found.tries)
    for change in ({"memory": 1}, {"processes": 2}, {"device_name": "NVIDIA A100"}):
        elsewhere = stored | {"machine": stored["machine"] | change, "micro_batch": 3}
        assert search("--max_batch_size=4", known=elsewhere).from_plan is False
    assert search("--max_batch_size=8", known=stored).micro_batch == 8


def test_the_limits_of_cgroups_are_those_of_all_groups_around(tmp_path):
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    for group, limit, current in (("", "max", 9), ("job", "1000", 700), ("job/step", "max", 600)):
        folder = tmp_path / group
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 100\n")
    limits = cgroup_limits(tmp_path, tmp_path / "cgroup")
    assert limits == [Limit(1000, 600)]
    assert limits[0].left == 400

    memory = tmp_path / "memory"  # version 1, in a container that does not see the host's path
    memory.mkdir()
    (tmp_path / "cgroup").write_text("5:cpu:/\n4:memory:/docker/abc\n0::/\n")
    (memory / "memory.limit_in_bytes").write_text("5000\n")
    (memory / "memory.usage_in_bytes").write_text("3000\n")
    (memory / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 500\n")
    assert cgroup_limits(tmp_path, tmp_path / "cgroup") == [Limit(5000, 2500)]
    assert cgroup_limits(tmp_path, tmp_path / "nothing") == []


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    alone = available_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory(CPU) == pytest.approx(alone / 4, rel=0.1)


@linux
def test_a_limit_lets_through_what_is_below_it():
    with limited(CPU, device_memory.ceiling(CPU, 64 * MIB)):
        torch.ones(32 * MIB, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as error:
            torch.ones(65 * MIB, dtype=torch.uint8)
    assert device_memory.is_out_of_memory(error.value)
    torch.ones(65 * MIB, dtype=torch.uint8)


# The main command. Its model is large enough that 16 blocks need some 200 MiB.
LARGE = ["--n_layer=4", "--n_head=4", "--n_embd=256", "--block_size=256", "--max_steps=4", "--eval_steps=4"]


@pytest.fixture(scope="module")
def unlimited(batch_recipe, tmp_path_factory) -> tuple[Record, int]:
    """A run without a limit, and the bytes of address space that its process had when the search began."""
    home = tmp_path_factory.mktemp("unlimited")
    record = Record(home / "record", home / "run")
    spec = write_spec([watched_run(batch_recipe, record.output, *LARGE, record=str(record.folder))], home)
    result = run([sys.executable, WATCHED], spec, cwd=home)
    assert result.returncode == 0, result.stderr
    return record, int((record.folder / "VmSize-0").read_text())


@linux
def test_the_main_command_under_ulimit_finds_a_smaller_size_and_the_same_losses(unlimited, batch_recipe, tmp_path):
    record, address_space = unlimited
    kilobytes = (address_space + 300 * MIB) // 1024
    command = ["bash", "-c", f'ulimit -v {kilobytes}; exec "$@"', "bash", *PYTHON]
    result = run(command, "--recipe", str(batch_recipe), "--output_dir", str(tmp_path / "run"), *LARGE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    other = Record(Path(), tmp_path / "run")
    found = json.loads((other.output / "plan.json").read_text())["micro_batch_search"]
    assert found["tries"][0] == GLOBAL_BATCH
    assert found["tries"][-1] == found["micro_batch"] < GLOBAL_BATCH
    assert all(row["micro_batch"] <= found["micro_batch"] for row in other.rows("train"))
    assert_same_losses(other, record)


@linux
def test_where_one_of_two_processes_is_limited_both_take_what_fits_there(unlimited, batch_recipe, tmp_path):
    record, _ = unlimited
    other = Record(tmp_path / "record", tmp_path / "run")
    limits = {"record": str(other.folder), "rlimit": {"1": 240 * MIB}}
    watch_launched_runs(2, [watched_run(batch_recipe, other.output, *LARGE, **limits)], tmp_path)
    found = json.loads((other.output / "plan.json").read_text())["micro_batch_search"]
    assert found["tries"][0] == 8
    assert found["micro_batch"] < 8
    assert_same_losses(other, record)
    assert [other.block_hash(step) for step in range(1, 5)] == [record.block_hash(step) for step in range(1, 5)]


@linux
def test_where_one_block_does_not_fit_on_one_of_two_processes_both_leave_with_one_error(warm, batch_recipe, tmp_path):
    starved = watched_run(batch_recipe, tmp_path / "run", *LARGE, budgets={"1": MIB // 2})
    text = watch_forked_runs(warm, 2, [starved], tmp_path, status=2)
    assert text.count("error: max_batch_size: not even one block of 256 tokens") == 1
    assert "tried 8, 4, 3, 2, 1" in text


def test_an_error_that_is_not_about_memory_ends_all_processes_and_is_not_repeated(batch_recipe, tmp_path):
    errors = [{"rank": 1, "at": 3, "kind": "other"}]
    result = watch_launched_runs(2, [watched_run(batch_recipe, tmp_path / "run", errors=errors)], tmp_path, fails=True)
    assert "ValueError: not about memory" in result.stderr
    assert "repeating it" not in result.stdout
    assert "step 2/20" in result.stdout
    assert "step 4/20" not in result.stdout
