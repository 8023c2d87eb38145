import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from support.runs import ROOT, environment

from clm_owt.planning.devices import Hardware, find_device
from clm_owt.planning.memory import step_memory
from clm_owt.recipe_reader import load_recipe
from clm_owt.training.memory_trace import PARTS, LiveStorages, trace_layers, trace_step

# As a user's model, small: 4 blocks of width 256 on 16 sequences of 256 tokens.
SMALL = ["--recipe", "recipes/quickstart_adamw.yaml", "--n_embd", "256", "--n_head", "4"]

CPU = Hardware()


def small(**changes):
    recipe = load_recipe(SMALL)
    return dataclasses.replace(recipe, **changes)


@pytest.fixture(scope="module")
def estimate():
    spec = importlib.util.spec_from_file_location("estimate", ROOT / "scripts/estimate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["estimate"] = module
    spec.loader.exec_module(module)
    return module


def total(recipe, vocab_size=4096, micro_batch=16, hardware=CPU) -> int:
    return sum(trace_step(recipe, vocab_size, micro_batch, hardware).values())


# model, vocabulary, micro-batch, penalty, checkpointing: a quick one, and the rest with `make test-slow`
COMBINATIONS = [
    pytest.param({}, 4096, 16),
    pytest.param({"gradient_checkpointing": True, "block_size": 512}, 4096, 16, marks=pytest.mark.slow),
    pytest.param(
        {"penalty_type": "neg_entropy", "penalty_weight": 0.1, "n_layer": 6}, 4096, 8, marks=pytest.mark.slow
    ),
    pytest.param({"penalty_type": "top_k_mass", "penalty_weight": 0.1}, 20_000, 8, marks=pytest.mark.slow),
    pytest.param({"gradient_checkpointing": True, "n_embd": 512}, 20_000, 2, marks=pytest.mark.slow),
    pytest.param(
        {"penalty_type": "neg_max_prob", "penalty_weight": -0.1, "n_layer": 8, "block_size": 512},
        8192,
        4,
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("changes", "vocab_size", "micro_batch"), COMBINATIONS)
def test_the_estimate_is_within_a_tenth_of_what_the_kernel_reports_of_real_steps(
    changes, vocab_size, micro_batch, tmp_path, precision="no"
):
    recipe = small(**changes)
    options = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    task = json.dumps({"vocab_size": vocab_size, "micro_batch": micro_batch, "mixed_precision": precision})
    base = [word for i, word in enumerate(SMALL) if not ({SMALL[i], SMALL[i - 1]} & set(options[::2]))]
    command = [sys.executable, "scripts/estimate.py", "--measure", task, *base, *options]
    # glibc would keep what is freed in pieces below 32 MB, which no estimate of tensors can know.
    env = environment(tmp_path, MALLOC_MMAP_THRESHOLD_="65536")
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    measured = int(result.stdout.split()[-1])
    hardware = Hardware(mixed_precision=precision)
    assert total(recipe, vocab_size, micro_batch, hardware) == pytest.approx(measured, rel=0.10)
    assert sum(step_memory(recipe, vocab_size, micro_batch, hardware).values()) == pytest.approx(measured, rel=0.10)


@pytest.mark.slow
def test_the_same_of_steps_under_bf16(tmp_path):
    test_the_estimate_is_within_a_tenth_of_what_the_kernel_reports_of_real_steps({}, 4096, 16, tmp_path, "bf16")


def test_the_parts_of_the_state_are_exact_and_nothing_is_missed():
    parts = trace_step(small(effective_batch_size=64), 4096, 16, CPU)
    parameters = 4096 * 256 + 256 * 256 + 4 * (12 * 256**2 + 13 * 256) + 2 * 256
    assert parts["weights"] == parts["gradients"] == 4 * parameters
    assert 8 * parameters <= parts["optimizer"] <= 8 * parameters + 4 * 100  # and a step count for each tensor
    assert set(parts) == set(PARTS)


def test_more_layers_are_extrapolated_to_what_a_complete_trace_gives():
    extrapolated = trace_step(small(n_layer=5), 4096, 4, CPU)
    complete = trace_layers(small(n_layer=5), 4096, 4, CPU)
    assert extrapolated == complete


def test_memory_rises_and_falls_with_each_setting_as_it_does_in_reality():
    base = total(small(n_layer=3))
    assert total(small(n_layer=3), micro_batch=8) < base < total(small(n_layer=3), micro_batch=24)
    assert total(small(n_layer=3, gradient_checkpointing=True)) < 0.7 * base
    assert total(small(n_layer=2)) < base
    assert total(small(n_layer=3, block_size=128)) < base
    assert total(small(n_layer=3), vocab_size=8192) > base
    assert total(small(n_layer=3), hardware=Hardware(mixed_precision="bf16")) < base
    assert total(small(n_layer=3, effective_batch_size=64)) > base  # gradients of earlier micro-batches
    penalty = total(small(n_layer=3, penalty_weight=0.1, penalty_type="neg_entropy"))
    assert penalty == pytest.approx(base, rel=0.02)  # it costs no memory, in the fused loss


@pytest.mark.parametrize(
    ("changes", "hardware"),
    [
        ({}, CPU),
        ({"effective_batch_size": 64}, CPU),
        ({"effective_batch_size": 64}, Hardware(processes=4)),
        ({"gradient_checkpointing": True}, CPU),
        ({}, Hardware(mixed_precision="bf16")),
        ({}, Hardware("cuda", None, 40 << 30, mixed_precision="bf16")),
        ({"gradient_checkpointing": True}, Hardware("cuda", None, 8 << 30, mixed_precision="bf16")),
    ],
)
def test_the_plans_formula_is_within_a_tenth_of_the_trace(changes, hardware):
    recipe = small(**changes)
    traced = total(recipe, 16_384, 16, hardware)
    assert sum(step_memory(recipe, 16_384, 16, hardware).values()) == pytest.approx(traced, rel=0.10)


def test_the_buckets_in_which_processes_sum_their_gradients_are_counted():
    """Where the weights are most of the memory, the end of the backward is the fullest moment."""
    recipe = small(n_layer=2, block_size=16, effective_batch_size=4)
    traced = {
        n: total(dataclasses.replace(recipe, effective_batch_size=n), 4096, 1, Hardware(processes=n)) for n in (1, 4)
    }
    weights = trace_step(recipe, 4096, 1, CPU)["weights"]
    assert traced[4] == pytest.approx(5 * weights, rel=0.01)  # weights, two moments, gradients and their copy
    assert traced[1] < 4.5 * weights
    assert sum(step_memory(recipe, 4096, 1, Hardware(processes=4)).values()) == pytest.approx(traced[4], rel=0.01)


def test_storages_are_counted_once_and_forgotten_when_they_die():
    with LiveStorages() as tracker:
        a = torch.zeros(1000)
        view = a[:10]
        assert tracker.live.total() == 4000
        tracker.assign(view, "weights")
        assert tracker.live["weights"] == 4000 and tracker.live["activations"] == 0
        with tracker.creating("loss"):
            b = a + 1
        assert tracker.live["loss"] == 4000
        del a, view, b
        c = torch.zeros(10)
        assert tracker.live.total() == 40 and tracker.peak.total() == 8000
        del c


def test_the_tables_hold_every_device_asked_for_and_say_that_they_are_estimated(tmp_path):
    command = [
        sys.executable,
        "scripts/estimate.py",
        "--device",
        "rtx-3060",
        "t4",
        "m1",
        *SMALL,
    ]
    command += ["--n_layer", "2", "--max_batch_size", "4"]
    result = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "Memory of each device, estimated (target: 85% of it)" in result.stdout
    assert "Time, from as derived from bytes and FLOPs of the code, with its tokens/s, to 1.7 times" in result.stdout
    rows = re.findall(r"^(RTX 3060 12 GB|T4|M1 16 GB) .*$", result.stdout, re.MULTILINE)
    assert rows == ["RTX 3060 12 GB", "T4", "M1 16 GB"] * 2
    [memory] = re.findall(r"^RTX 3060 12 GB +11.8 GiB +4 +4 +16 .*$", result.stdout, re.MULTILINE)
    assert "0 bytes" not in memory.split("MB", 1)[0]


def test_the_largest_micro_batch_fits_and_the_next_does_not(estimate):
    recipe = small(n_layer=3, effective_batch_size=4096, max_batch_size=4096, target_memory_utilization=0.1)
    device = find_device("m1")  # 10.7 GiB, float32
    result = estimate.estimate(recipe, 4096, device)
    budget = 0.1 * device.memory
    assert result.micro_batch == result.largest
    assert sum(result.memory.values()) <= budget
    assert total(recipe, 4096, result.largest + 8, device.hardware()) > budget
    assert result.accumulation == -(-4096 // result.micro_batch)


def test_a_model_that_does_not_fit_is_said_not_to(estimate):
    recipe = small(n_layer=3, target_memory_utilization=0.001)
    result = estimate.estimate(recipe, 4096, find_device("m1"))
    assert (result.micro_batch, result.largest, result.memory) == (0, 0, {})
    assert "does not fit" in estimate.memory_table([result], {})[1][0]


def test_times_are_those_of_a_step_and_their_multiples(estimate):
    recipe = load_recipe(["--recipe", "recipes/owt_512.yaml"])
    result = estimate.Estimate(find_device("a100-40gb"), 32, 32, 16, {}, (2.889932, 7.224831))
    _, [row] = estimate.time_table([result], 524_288, recipe.total_steps(), 8_827_040 / 512)
    assert row == ["A100 40 GB", "181,419", "2.9 s - 7.2 s", "14 h - 35 h", "28 h - 2.9 days"]


def test_the_parts_of_a_step_are_shown_with_what_they_rest_on(estimate, capsys):
    recipe = load_recipe(["--recipe", "recipes/owt_512.yaml"])
    devices = [find_device(key) for key in ("a100-80gb", "h100", "rtx-4090", "m1")]
    estimate.print_parts(recipe, 50_257, [estimate.Estimate(d, 32, 32, 16, {}, (1.0, 2.0)) for d in devices], 1)
    output = capsys.readouterr().out
    header, parts = estimate.parts_table(recipe, 50_257, [estimate.Estimate(devices[0], 32, 32, 16, {}, (1, 2))], 1)
    assert header[2:9] == ["products", "attention", "passes", "loss", "weights", "optimizer", "reduction"]
    rate = int(parts[0][-2].replace(",", ""))
    assert 524_288 / rate * 1000 == pytest.approx(sum(int(cell.replace(",", "")) for cell in parts[0][2:9]), abs=4)
    assert all(f"| {name} " in output for name in ("M1 16 GB", "attention, share of the peak", "build-nanogpt"))
    improvements, rows = estimate.improvements_table(
        recipe, 50_257, [estimate.Estimate(d, 32, 32, 16, {}, (1, 2)) for d in devices], 1
    )
    assert improvements == ["change", "A100 80 GB", "H100 SXM", "RTX 4090"]  # of compiled code in bf16
    rates = [int(row[1].replace(",", "")) for row in rows]
    assert rates == sorted(rates) and rates[-1] > 218_000  # llm.c's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "abacus"], "--device: abacus not known; expected any of rtx-3060"),
        (["--calibrate"], "--calibrate: needs a GPU of the list"),
        (["--train_tokenizer_vocab_size", "none", "--tokenizer_name", "me/other"], "--vocab_size: missing"),
    ],
)
def test_what_cannot_be_estimated_is_refused(options, message, tmp_path):
    result = subprocess.run(
        [sys.executable, "scripts/estimate.py", *SMALL, *options],
        cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2
    assert f"error: {message}" in result.stderr
