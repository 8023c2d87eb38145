import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from clm_owt.model.gpt2 import TRAINING_ACTIVATION
from clm_owt.planning.devices import DEVICES, Hardware, find_device
from clm_owt.planning.step_time import (
    COMPILED,
    EAGER,
    FLOAT32,
    GPT2_SMALL,
    IMPROVEMENTS,
    PART_NAMES,
    PUBLISHED,
    SLOWEST,
    Work,
    step_parts,
    step_seconds,
    work_of,
)

A100 = find_device("a100-80gb")
TOKENS = 512 * 1024


def derive(**changes):
    settings = {"vocab_size": 50_304, "micro_batch": 32, "device": A100} | changes
    recipe = settings.pop("recipe", GPT2_SMALL)
    return step_parts(recipe, **settings)


def test_the_parts_of_a_step_are_those_worked_out_by_hand():
    # 85 M parameters of matrices, 39.4 M of embeddings, 124.4 M + 36,096 (the padding) in all; 16 micro-batches, each
    # of 4 chunks of 8,804 rows or less; 312 TFLOP/s, 2,039 GB/s.
    parts = derive()
    assert tuple(parts) == PART_NAMES
    memory = 0.85 * 2.039e12
    assert parts["products"] == pytest.approx(TOKENS * 6 * (50_304 * 768 + 84_934_656) / (0.72 * 312e12))
    assert parts["attention"] == pytest.approx(TOKENS * 7 * 1024 * 768 * 12 / (0.38 * 312e12))
    assert parts["passes"] == pytest.approx(TOKENS * (148 * 12 + 94) * 768 / memory)
    assert parts["loss"] == pytest.approx(TOKENS * COMPILED.logit * 50_304 / memory)
    weights = COMPILED.matrix * 84_934_656 + (COMPILED.embedding + 3 * COMPILED.chunk) * (50_304 + 1024) * 768
    assert parts["weights"] == pytest.approx(16 * weights / memory)
    assert parts["optimizer"] == pytest.approx(40 * 124_475_904 / memory)
    assert parts["reduction"] == 0


def test_processes_share_the_blocks_and_sum_gradients_over_the_link():
    one, eight = derive(), derive(processes=8)
    for part in ("products", "attention", "passes", "loss", "weights"):
        assert eight[part] == pytest.approx(one[part] / 8)
    assert eight["optimizer"] == one["optimizer"]
    assert eight["reduction"] == pytest.approx(2 * 7 / 8 * 4 * 124_475_904 / (0.8 * 300e9))


def test_a_smaller_micro_batch_moves_the_weights_more_often():
    assert derive(micro_batch=8)["weights"] > 2 * derive()["weights"]
    assert derive(micro_batch=8)["products"] == derive()["products"]


def test_checkpointing_repeats_the_forward_of_the_blocks_and_not_the_head():
    once, twice = derive(), derive(recipe=dataclasses.replace(GPT2_SMALL, gradient_checkpointing=True))
    assert twice["products"] - once["products"] == pytest.approx(TOKENS * 2 * 84_934_656 / (0.72 * 312e12))
    assert twice["attention"] == pytest.approx(once["attention"] * 9 / 7)
    assert twice["loss"] == once["loss"]


def test_rounded_logits_move_six_bytes_less_and_larger_chunks_read_the_head_less_often():
    exact, rounded = derive(), derive(recipe=dataclasses.replace(GPT2_SMALL, logits_dtype="compute"))
    assert rounded["loss"] == pytest.approx(exact["loss"] * 8 / 14)
    assert rounded["weights"] < exact["weights"]
    assert all(rounded[part] == exact[part] for part in PART_NAMES if part not in ("loss", "weights"))


def test_code_that_is_not_compiled_moves_more_and_float32_most():
    def work(torch_compile, **hardware):
        return work_of(dataclasses.replace(GPT2_SMALL, torch_compile=torch_compile), Hardware(**hardware))

    assert work("auto", device_type="cuda", mixed_precision="bf16") == COMPILED
    assert work(False, device_type="cuda", mixed_precision="bf16") is EAGER
    assert work("auto", device_type="mps") is FLOAT32
    assert COMPILED.forward_pass + COMPILED.backward_pass < EAGER.forward_pass + EAGER.backward_pass
    assert EAGER.forward_pass + EAGER.backward_pass < FLOAT32.forward_pass + FLOAT32.backward_pass


class PassBytes(TorchDispatchMode):
    """Bytes that operations on whole activations read and write, but for matrix products, attention and views."""

    LIBRARY = ("mm", "attention")
    VIEWS = ("view", "transpose", "split", ".t.", "detach", "unsqueeze")

    def __init__(self, smallest: int):
        super().__init__()
        self.smallest, self.moved = smallest, Counter()

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if not any(part in name for part in self.LIBRARY + self.VIEWS):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.moved[name] += sum(t.numel() * t.element_size() for t in tensors if t.numel() >= self.smallest)
        return result


@pytest.mark.parametrize(("work", "dtype"), [(EAGER, torch.bfloat16), (FLOAT32, torch.float32)])
def test_the_passes_of_blocks_that_are_not_compiled_are_counted(work, dtype):
    width, length = 32, 256
    config = {"n_embd": width, "n_head": 2, "n_layer": 1, "attn_implementation": "sdpa", "n_positions": length}
    no_dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    block = GPT2Block(GPT2Config(**config, **no_dropout, activation_function=TRAINING_ACTIVATION), layer_idx=0).train()
    hidden = torch.randn(1, length, width, requires_grad=True)
    gradient = torch.randn(1, length, width)
    with PassBytes(smallest=width * length) as forward, torch.autocast("cpu", dtype, enabled=work is EAGER):
        output = block(hidden)
    output = output[0] if isinstance(output, tuple) else output
    with PassBytes(smallest=width * length) as backward:
        output.backward(gradient)
    assert forward.moved.total() == work.forward_pass * width * length
    assert backward.moved.total() == work.backward_pass * width * length


def test_what_is_derived_for_programs_of_a_known_rate_is_near_it_and_never_slower_than_is_said():
    ratios = {(p.name, p.device_key): TOKENS / p.processes / sum(p.parts().values()) / p.rate for p in PUBLISHED}
    assert max(ratios.values()) <= SLOWEST
    assert min(ratios.values()) >= 0.95
    for program in (("llm.c", "a100-80gb"), ("nanoGPT", "rtx-4090")):
        assert ratios[program] == pytest.approx(1, abs=0.05)
    assert ratios["llm.c", "h100"] == pytest.approx(1.1, abs=0.01)


def test_each_improvement_is_one_and_together_they_pass_llm_c():
    for key, llm_c in (("a100-80gb", 218_000), ("h100", 468_000)):
        work, rates = COMPILED, []
        for change in IMPROVEMENTS.values():
            work = dataclasses.replace(work, **change)
            rates.append(TOKENS / sum(derive(device=find_device(key), work=work).values()))
        assert rates == sorted(rates) and rates[-1] > llm_c


def test_a_range_is_given_for_every_known_device_and_none_for_others():
    for device in DEVICES:
        low, high = step_seconds(GPT2_SMALL, 50_257, 8, device.hardware())
        assert low > 0.3 and high == SLOWEST * low
    assert step_seconds(GPT2_SMALL, 50_257, 8, Hardware("cuda", "Abacus 9000")) is None
    assert step_seconds(GPT2_SMALL, 50_257, 8, Hardware()) is None


def test_work_is_compared_part_by_part():
    nothing = Work(0, 0, ends=0, logit=0, matrix=0, embedding=0, update=0, gradient=0)
    parts = derive(work=nothing, recipe=dataclasses.replace(GPT2_SMALL, optimizer="adamw"))
    assert [name for name, seconds in parts.items() if seconds] == ["products", "attention", "optimizer"]
