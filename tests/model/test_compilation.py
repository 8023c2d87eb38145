"""What of a step runs compiled, counted by a backend that compiles nothing."""

import functools
import importlib.util

import pytest
import torch
from model.test_gpt2 import T, blocks, build, gradients, relative_error, without_key_bias

from clm_owt.errors import InputError
from clm_owt.model import gpt2
from clm_owt.model.fp8 import conv1d_to_linear
from clm_owt.model.gpt2 import compile_blocks, refuse_missing_compiler

LAYERS = 3


class Counting:
    """A backend of torch.compile: graphs made, and how often any of them ran forwards."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*arguments):
            self.runs += 1
            return graph(*arguments)

        return run


def micro_batch(model, size: int) -> None:
    ids = blocks(size)
    model(input_ids=ids, labels=ids).loss.backward()


def validate(model, size: int) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=blocks(size), labels=blocks(size))
    model.train()


def draw(model, tokens: int) -> None:
    model.eval()
    model.generate(blocks(1)[:, :2], max_new_tokens=tokens, do_sample=True, eos_token_id=None, pad_token_id=0)
    model.train()


# What happens in a run, and how many compiled graphs run in it: each block, and the softmax of the loss.
COMPILED = LAYERS + 1
PROBE = [(micro_batch, 8, COMPILED), (micro_batch, 5, COMPILED)]
VALIDATION = [(validate, 5, COMPILED), (validate, 2, COMPILED)]
SAMPLES = [(draw, T - 2, 0)]
STEP = [(micro_batch, 5, COMPILED), (micro_batch, 5, COMPILED), (micro_batch, 2, COMPILED)]
SMALLER_STEP = [(micro_batch, 3, COMPILED), (micro_batch, 1, COMPILED)]  # after out-of-memory
ORDERS = {
    "a run": PROBE + VALIDATION + SAMPLES + STEP + VALIDATION + SAMPLES + STEP,
    "resumed without a probe": STEP + VALIDATION + SAMPLES + STEP,
    "sampled first": SAMPLES + STEP + SAMPLES + VALIDATION + STEP,
    "stepped down": PROBE + STEP + SMALLER_STEP + SAMPLES + VALIDATION + SMALLER_STEP + STEP,
}


@pytest.fixture
def compiled():
    torch._dynamo.reset()

    def make(**changes):
        model, counting = build(**changes), Counting()
        return model, counting

    yield make
    torch._dynamo.reset()


@pytest.mark.parametrize("layers", ["Conv1D", "Linear, as FP8 has them"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_block_of_every_micro_batch_runs_compiled_in_any_order(compiled, order, layers):
    model, counting = compiled(penalty_weight=0.1)
    if layers != "Conv1D":
        conv1d_to_linear(model)
    assert compile_blocks(model, True, torch.device("cpu"), counting) == []
    found = []
    for event, size, _ in ORDERS[order]:
        before = counting.runs
        event(model, size)
        found.append((event.__name__, size, counting.runs - before))
    assert found == [(event.__name__, size, expected) for event, size, expected in ORDERS[order]]


def test_a_step_s_two_sizes_are_two_graphs_of_the_blocks_and_one_of_the_loss(compiled):
    model, counting = compiled(penalty_weight=0.1)
    compile_blocks(model, True, torch.device("cpu"), counting)
    for _ in range(2):
        for event, size, _ in STEP:
            event(model, size)
    assert counting.graphs == 3


def test_what_would_run_uncompiled_is_an_error(compiled, monkeypatch):
    monkeypatch.setattr(gpt2, "MOST_VARIANTS", 2)
    model, counting = compiled()
    compile_blocks(model, True, torch.device("cpu"), counting)
    micro_batch(model, 2)
    micro_batch(model, 3)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        micro_batch(model, 4)


def test_a_penalty_with_too_many_likeliest_tokens_is_named_as_not_compiled(compiled):
    model, counting = compiled(penalty_type="top_k_mass", penalty_top_k=40, penalty_weight=0.1)
    [line] = compile_blocks(model, True, torch.device("cpu"), counting)
    assert line.startswith("torch_compile: the blocks alone; with penalty_top_k 40 (above 14)")
    micro_batch(model, 2)
    assert counting.runs == LAYERS


def test_the_compiled_model_gives_the_same_loss_and_gradients(compiled):
    model, ids = build(penalty_weight=0.1), blocks()
    model(input_ids=ids, labels=ids).loss.backward()
    other, _ = compiled(penalty_weight=0.1)
    compile_blocks(other, True, torch.device("cpu"), "aot_eager")
    other(input_ids=ids, labels=ids).loss.backward()
    for name, gradient in gradients(model).items():
        own = without_key_bias(name, gradients(other)[name])
        assert relative_error(own, without_key_bias(name, gradient)) < 1e-5, name


def test_blocks_are_compiled_where_it_pays_and_keep_their_names():
    for torch_compile, device, compiled in (("auto", "cpu", False), ("auto", "cuda", True), (True, "cpu", True)):
        model = build()
        names = set(model.state_dict())
        compile_blocks(model, torch_compile, torch.device(device), Counting())
        assert {"forward" in vars(block) for block in model.transformer.h} == {compiled}
        assert isinstance(model.linear_loss, functools.partial) == compiled
        assert set(model.state_dict()) == names


def test_a_missing_compiler_is_named_before_anything_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"torch_compile: needs a compiler \(g\+\+ or clang\+\+, or what CXX names\)"):
        compile_blocks(build(), True, torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs triton and a compiler \(gcc or clang, .*--torch_compile false"):
        compile_blocks(build(), "auto", torch.device("cuda"))
    monkeypatch.setenv("CXX", "/opt/bin/c++")
    refuse_missing_compiler("cpu")


def test_training_rounds_logits_where_the_recipe_says_so_and_validation_never():
    for logits_dtype, expected in (("float32", [False, False]), ("compute", [True, False])):
        model, seen = build(logits_dtype=logits_dtype), []
        model.linear_loss = lambda *_, round_logits, seen=seen, **__: seen.append(round_logits)
        for training in (True, False):
            model.train(training)
            model(blocks(1), labels=blocks(1))
        assert seen == expected
