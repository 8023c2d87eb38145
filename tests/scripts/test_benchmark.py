"""The benchmark runs and writes what it says; its numbers are the machine's and are not tested."""

import json

import benchmark
import pytest
import torch

SMALL = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --vocab_size 61 --rounds 2".split()


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(benchmark, "PRODUCT_SIZE", 32)
    keys = "dataset_name: x\ntokenizer_name: y\neffective_batch_size: 4\nlearning_rate: 1e-3\nwarmup_steps: 1\n"
    (tmp_path / "recipe.yaml").write_text(keys + "max_steps: 2\n")
    return ["--recipe", str(tmp_path / "recipe.yaml"), *SMALL]


def test_steps_of_all_paths_are_measured_in_turn(recipe, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.json" for name in ("measured", "profile")}
    options = ["--penalties", "--json", str(files["measured"]), "--profile", str(files["profile"])]
    benchmark.main([*recipe, *options])
    names = [case["name"] for case in json.loads(files["measured"].read_text())["cases"]]
    penalties = ["", *(f", {penalty} 0.01" for penalty in benchmark.PENALTY_TYPES)]
    assert names == [path + penalty for path in ("ours", "transformers") for penalty in penalties] + ["plain"]
    for case in json.loads(files["measured"].read_text())["cases"]:
        assert len(case["seconds"]) == len(case["parts"]) == 2
        assert all(sum(parts.values()) <= total for parts, total in zip(case["parts"], case["seconds"], strict=True))
    output = capsys.readouterr().out
    assert all(f"| {name} " in output for name in names)
    assert "traceEvents" in json.loads(files["profile"].read_text())


def test_precisions_take_turns(recipe, tmp_path, capsys):
    file = tmp_path / "measured.json"
    benchmark.main([*recipe, "--paths", "ours", "plain", "--precision", "no", "bf16", "--json", str(file)])
    measured = json.loads(file.read_text())
    names = [(case["name"], case["precision"]) for case in measured["cases"]]
    assert names == [
        (f"{path}, {name}", p) for path in ("ours", "plain") for name, p in (("float32", "no"), ("bf16",) * 2)
    ]
    assert {precision: len(times) for precision, times in measured["product_seconds"].items()} == {
        "no": 12,
        "bf16": 12,
    }
    assert "| × plain, float32 | × plain, bf16 |" in capsys.readouterr().out


def test_optimizers_take_turns(recipe, tmp_path):
    file = tmp_path / "measured.json"
    options = ["--paths", "ours", "plain", "--optimizers", "adamw", "muon", "--precision", "no", "bf16"]
    benchmark.main([*recipe, *options, "--json", str(file)])
    names = [case["name"] for case in json.loads(file.read_text())["cases"]]
    assert names == [
        f"{path}, {optimizer}, {precision}"
        for path in ("ours", "plain")
        for optimizer in ("adamw", "muon")
        for precision in ("float32", "bf16")
    ]


def test_all_paths_start_from_the_same_loss(recipe, monkeypatch):
    losses = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (losses.append(loss.item()), backward(loss))[1])
    benchmark.main([*recipe, "--rounds", "1"])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)  # at a learning rate of 1e-6


def test_the_head_is_measured_alone(recipe, capsys):
    benchmark.main(["head", *recipe, "--blocks", "2", "--penalties", "neg_entropy"])
    output = capsys.readouterr().out
    assert "| ours, neg_entropy 0.01 " in output and "| transformers, neg_entropy 0.01 " in output


def test_the_peak_of_memory_counts_what_was_freed_too():
    def work():
        first = torch.empty(1000, dtype=torch.float64)
        second = torch.empty(3000, dtype=torch.float64)
        del second
        return first

    assert benchmark.peak_bytes(work, torch.device("cpu")) == 32_000
