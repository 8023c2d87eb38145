"""GPT-2 for pretraining: transformers' model, with a loss that never builds the logits of a batch.

What is saved is an ordinary `GPT2LMHeadModel`, whatever was done to train it fast.
"""

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from clm_owt.errors import InputError
from clm_owt.model.cpu_attention import ATTENTION
from clm_owt.model.losses import (
    IGNORE_INDEX,
    MOST_COMPILED_TOP_K,
    MOST_VARIANTS,
    compiled_softmax,
    fused_linear_loss,
)
from clm_owt.recipe import Recipe, is_compiled

# GPT-2's tanh approximation of GELU: one fused kernel, and the name under which GPT-2 has always been published. They
# differ by 5e-7.
TRAINING_ACTIVATION = "gelu_pytorch_tanh"
EXPORTED_ACTIVATION = "gelu_new"


class GPT2ForPretraining(GPT2LMHeadModel):
    """`GPT2LMHeadModel` with a fused linear loss and sharpness penalty.

    The penalty stands in attributes and not in the config, since it is no part of the model that is saved.
    """

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # otherwise the parent's first loss warns that it knows no loss for this class
        self.penalty_type = "non_max_sum"
        self.penalty_weight = 0.0
        self.penalty_top_k = 5
        self.round_logits = False  # in training alone: what validation measures is exact
        self.linear_loss = fused_linear_loss  # `compile_blocks` and `memory_trace` hand in variants of it

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ):
        """With labels [m, T] (usually the input_ids; -100 is ignored): the loss of predicting token t + 1 from those
        up to t, T - 1 positions a row, as `LossStatistics`. Sums are divided by `num_items_in_batch` (an int or a
        0-d tensor; default: the targets of this call), so that the micro-batches and processes of one step add up.
        Without labels: the parent's output, with logits [m, T, vocab_size], and nothing of it compiled: a text that
        grows has a new shape at every token."""
        if labels is None:
            with torch.compiler.set_stance("force_eager"):
                return super().forward(input_ids, **kwargs)
        if kwargs:
            raise TypeError(f"with labels the model takes nothing beside input_ids, got {', '.join(kwargs)}")

        weight = self.transformer.wte.weight
        hidden = self._hidden_states(input_ids)[:, :-1].reshape(-1, self.config.n_embd)
        targets = labels[:, 1:].reshape(-1)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORE_INDEX).sum()
        return self.linear_loss(
            hidden,
            weight,
            targets,
            num_items=num_items_in_batch,
            penalty_type=self.penalty_type,
            penalty_weight=self.penalty_weight,
            penalty_top_k=self.penalty_top_k,
            round_logits=self.round_logits and self.training,
        )

    def _hidden_states(self, input_ids: Tensor) -> Tensor:
        """The last hidden states [m, T, D] of blocks without padding: `GPT2Model.forward` without caches and masks.
        (Its search for packed sequences reads a tensor of the device, and so waits for all work queued before.)"""
        transformer = self.transformer
        weight = transformer.wte.weight
        # A dense gradient of the embedding is V x D of zeros with m T rows filled, which then is added to the head's:
        # 1-2 % of a step of GPT-2 on a CPU. The rows of a sparse one are added to a copy of the head's.
        sparse = weight.is_cpu and weight.requires_grad and not torch.compiler.is_compiling()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = transformer.drop(F.embedding(input_ids, weight, sparse=sparse) + transformer.wpe(positions))
        for block in transformer.h:
            hidden = block(hidden)
        return transformer.ln_f(hidden)

    def save_pretrained(self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **kwargs):
        """Writes an ordinary `GPT2LMHeadModel`: `gelu_new`, no prefix of torch.compile.
        `state_dict` (default: this model's) is the whole state, as `accelerator.get_state_dict` gives it."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        state_dict = {name.replace("_orig_mod.", ""): tensor for name, tensor in state_dict.items()}
        self.exported(state_dict).save_pretrained(save_directory, **kwargs)

    def exported(self, state_dict: dict[str, Tensor]) -> GPT2LMHeadModel:
        """The model that is saved, with these tensors as its own: what `from_pretrained` gives of it."""
        config = GPT2Config.from_dict(self.config.to_dict() | {"activation_function": EXPORTED_ACTIVATION})
        with torch.device("meta"):
            model = GPT2LMHeadModel(config)
        model.load_state_dict(state_dict | {"lm_head.weight": state_dict["transformer.wte.weight"]}, assign=True)
        model.tie_weights()
        model.generation_config = self.generation_config
        return model.eval()


def model_config(recipe: Recipe, vocab_size: int, eos_token_id: int) -> GPT2Config:
    """GPT-2 of the recipe's size; everything that the recipe does not name is as in GPT-2."""
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=recipe.block_size,
        n_embd=recipe.n_embd,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        activation_function=TRAINING_ACTIVATION,
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
        attn_pdrop=recipe.dropout,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        attn_implementation=ATTENTION,
    )


def build_model(recipe: Recipe, vocab_size: int, eos_token_id: int, check_weights: bool = True) -> GPT2ForPretraining:
    """The recipe's model on CPU, in float32, with tied embeddings.

    New weights are drawn from `recipe.seed` without touching the global random state, so that they are the same on
    every machine. Raises InputError where `init_from` is not a GPT-2 of the
    recipe's shape, RuntimeError where transformers did not initialise the weights as GPT-2's are (looked at with
    `check_weights`; tensors without data have nothing to look at).
    """
    config = model_config(recipe, vocab_size, eos_token_id)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(recipe.seed)
        if recipe.init_from is None:
            model = GPT2ForPretraining(config)
            if check_weights:
                check_initialisation(model)
        else:
            model = _load(recipe.init_from, config)
    model.penalty_type = recipe.penalty_type
    model.penalty_weight = recipe.penalty_weight
    model.penalty_top_k = recipe.penalty_top_k
    model.round_logits = recipe.logits_dtype == "compute"
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def compile_blocks(
    model: GPT2ForPretraining,
    torch_compile: bool | Literal["auto"],
    device: torch.device,
    backend: str | Callable = "inductor",
) -> list[str]:
    """torch.compile for every transformer block and for the softmax of the loss, in place, and lines on what is left
    out. Names of parameters stay as they are, and the blocks share what is compiled. `auto`: on CUDA alone. There the
    passes between matrix products wait for memory (as others measured, not yet this project); on a CPU they are a
    small part of a step, and compiling takes a minute.

    Every shape is a graph of its own and one graph (`fullgraph`), never one for changing shapes, so that a kernel does
    not depend on what ran before it. What cannot be compiled raises, and nothing runs uncompiled instead.
    """
    if not is_compiled(torch_compile, device.type):
        return []
    if backend == "inductor":
        refuse_missing_compiler(device.type)
    left_out = []
    if any(type(module).__module__.startswith("transformer_engine") for module in model.transformer.h.modules()):
        left_out.append("torch_compile: the loss alone; Transformer Engine's layers cannot be part of a graph")
    else:
        forward = torch.compile(
            type(model.transformer.h[0]).forward,
            fullgraph=True,
            dynamic=False,
            backend=backend,
            recompile_limit=MOST_VARIANTS,
        )
        for block in model.transformer.h:
            # Not `block.compile()`: the hooks by which FSDP2 gathers a block's parameters stay outside of the graph.
            block.forward = MethodType(forward, block)
    if model.penalty_type == "top_k_mass" and model.penalty_top_k > MOST_COMPILED_TOP_K:
        left_out.append(
            f"torch_compile: the blocks alone; with penalty_top_k {model.penalty_top_k} (above {MOST_COMPILED_TOP_K}) "
            "the loss is not compiled"
        )
    else:
        model.linear_loss = functools.partial(fused_linear_loss, softmax=compiled_softmax(backend))
    return left_out


def refuse_missing_compiler(device_type: str) -> None:
    """Raises InputError where torch.compile lacks what it calls: Triton and a C compiler on CUDA, else one of C++."""
    variable, names = ("CC", ("gcc", "clang")) if device_type == "cuda" else ("CXX", ("g++", "clang++"))
    missing = []
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        missing.append("triton")
    if variable not in os.environ and not any(map(shutil.which, names)):
        missing.append(f"a compiler ({' or '.join(names)}, or what {variable} names)")
    if missing:
        raise InputError(
            f"torch_compile: needs {' and '.join(missing)}, not found here; install it, or run without, which is "
            "slower on a GPU: --torch_compile false"
        )


@torch.no_grad()
def check_initialisation(model: GPT2LMHeadModel) -> None:
    """Compares the standard deviation of every group of weights with GPT-2's scheme: 0.02, and 0.02 / sqrt(2 n_layer)
    for the projections that write to the residual stream; biases 0, LayerNorm weights 1. (Some releases of
    transformers 5 draw those projections at 0.02.) Raises RuntimeError naming all groups that are off."""
    std = 0.02
    residual_std = std / math.sqrt(2 * model.config.n_layer)
    expected = {
        "wte.weight": std,
        "wpe.weight": std,
        "attn.c_attn.weight": std,
        "attn.c_proj.weight": residual_std,
        "mlp.c_fc.weight": std,
        "mlp.c_proj.weight": residual_std,
    }
    problems = []
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.transformer.named_parameters():
        group = next((group for group in expected if name.endswith(group)), None)
        if group is not None:
            groups.setdefault(group, []).append(parameter)
        elif not torch.all(parameter == (1 if name.endswith("weight") else 0)):
            problems.append(f"{name}: not all {1 if name.endswith('weight') else 0}")
    for group, parameters in groups.items():
        n = sum(parameter.numel() for parameter in parameters)
        measured = math.sqrt(sum(parameter.double().square().sum().item() for parameter in parameters) / n)
        # Five standard errors of the deviation of n draws, and a little for generators that cut the tails.
        if abs(measured / expected[group] - 1) > 5 / math.sqrt(2 * n) + 1e-3:
            problems.append(f"{group}: standard deviation {measured:.5f}, expected {expected[group]:.5f}")
    if problems:
        raise RuntimeError(
            f"transformers {transformers.__version__} did not initialise the weights as GPT-2's are: "
            f"{'; '.join(problems)}. Install the version in constraints.txt."
        )


def _load(init_from: str, expected: GPT2Config) -> GPT2ForPretraining:
    try:
        values, _ = GPT2Config.get_config_dict(init_from)
    except (OSError, ValueError) as error:
        raise InputError(f"init_from {init_from}: no model could be read there ({error})") from error
    if values.get("model_type") != "gpt2":
        raise InputError(f"init_from {init_from}: model_type is {values.get('model_type')}, expected gpt2")
    config = GPT2Config.from_dict(values)
    names = {
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_positions": "block_size",
        "vocab_size": "vocabulary of the tokenizer",
    }
    problems = [
        f"{name} is {getattr(expected, field)} in the recipe, {getattr(config, field)} in the model"
        for field, name in names.items()
        if getattr(config, field) != getattr(expected, field)
    ]
    if config.activation_function not in (EXPORTED_ACTIVATION, TRAINING_ACTIVATION):
        problems.append(f"activation_function is {config.activation_function}, GPT-2's is {EXPORTED_ACTIVATION}")
    for field in (
        "n_inner",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "layer_norm_epsilon",
        "tie_word_embeddings",
    ):
        if getattr(config, field) != getattr(expected, field):
            problems.append(f"{field} is {getattr(config, field)}, GPT-2's is {getattr(expected, field)}")
    if problems:
        raise InputError(f"init_from {init_from} does not fit the recipe: {'; '.join(problems)}")
    try:
        return GPT2ForPretraining.from_pretrained(init_from, config=expected, dtype=torch.float32)
    except OSError as error:
        raise InputError(f"init_from {init_from}: {error}") from error
