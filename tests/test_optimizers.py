"""An optimizer's entry says what the optimizer really keeps, and those who read it follow it."""

import dataclasses

import pytest
import torch

from clm_owt.model.gpt2 import build_model
from clm_owt.optimizers import KINDS, OPTIMIZERS, kind_of
from clm_owt.planning.devices import Hardware
from clm_owt.planning.memory import parameters_by_kind, step_memory
from clm_owt.planning.plan import Data, make_plan
from clm_owt.recipe_reader import load_recipe

VOCABULARY = 300


@pytest.fixture
def recipe():
    argv = "--dataset_name python-docs --train_tokenizer_vocab_size 300 --block_size 32 --n_layer 2 --n_head 2 "
    argv += "--n_embd 32 --effective_batch_size 4 --learning_rate 1e-3 --warmup_steps 0 --max_steps 10"
    return load_recipe(argv.split())


@pytest.fixture
def model(recipe):
    return build_model(recipe, VOCABULARY, 0)


def test_the_parameters_of_each_kind_are_those_of_the_model(recipe, model):
    counted = dict.fromkeys(KINDS, 0)
    for name, parameter in model.named_parameters():
        counted[kind_of(name, parameter.dim())] += parameter.numel()
    assert counted == parameters_by_kind(recipe, VOCABULARY)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_entry_s_bytes_are_those_of_the_state_after_a_step(name, recipe, model):
    entry = OPTIMIZERS[name]
    optimizer = entry.build(model, dataclasses.replace(recipe, optimizer=name))
    ids = torch.zeros(1, 32, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    found = dict.fromkeys(KINDS, 0)
    for parameter_name, parameter in model.named_parameters():
        tensors = [value for value in optimizer.state[parameter].values() if value.dim()]  # without a count of steps
        found[kind_of(parameter_name, parameter.dim())] += sum(t.numel() * t.element_size() for t in tensors)
    counts = parameters_by_kind(recipe, VOCABULARY)
    assert found == {kind: entry.state_bytes[kind] * counts[kind] for kind in KINDS}


def test_plan_and_memory_follow_the_entry(recipe, monkeypatch):
    def plan():
        return make_plan(recipe, Data(None, None, None, None), VOCABULARY, 4, Hardware())

    counts, before = parameters_by_kind(recipe, VOCABULARY), plan()
    half = dataclasses.replace(OPTIMIZERS["adamw"], state_bytes={"embedding": 8, "matrix": 4, "vector": 8})
    monkeypatch.setitem(OPTIMIZERS, "adamw", half)
    saved = 4 * counts["matrix"]
    assert plan().checkpoint_bytes == before.checkpoint_bytes - saved
    assert plan().memory["optimizer"] == before.memory["optimizer"] - saved
    assert step_memory(recipe, VOCABULARY, 4, Hardware(processes=2, sharded=True))["optimizer"] == (
        half.total_state_bytes(counts) // 2
    )
