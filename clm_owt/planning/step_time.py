"""The time of a training step, derived from the FLOPs that it computes and the bytes that it moves.

Work over rate, part by part, and the parts one after the other: nothing here is measured. The rates are a device's
own (planning/devices.py) times the shares of them that kernels reach; the work is counted from the code. What these
rest on stands in ASSUMPTIONS. The same derivation for programs whose rate is published (PUBLISHED) says how far off
it is: they took 0.97 to 1.67 times what it gives for them.
"""

import dataclasses
from dataclasses import dataclass

from clm_owt.batch import largest_share, loss_chunk_rows, softmax_traffic
from clm_owt.optimizers import OPTIMIZERS
from clm_owt.planning.devices import Device, Hardware, find_device
from clm_owt.planning.memory import parameters_by_kind
from clm_owt.recipe import Recipe, is_compiled

# A run is expected to take from 1 to so many times what is derived: of the programs of PUBLISHED the slowest, nanoGPT
# on eight A100 40 GB, took 1.67 times what is derived for it.
SLOWEST = 1.7


PART_NAMES = ("products", "attention", "passes", "loss", "weights", "optimizer", "reduction")


@dataclass(frozen=True)
class Shares:
    """Of a device's rates, what kernels reach: products of its peak, attention of its peak, and passes over tensors
    of its memory's rate, reductions of its link's."""

    products: float = 0.72
    attention: float = 0.38
    memory: float = 0.85
    link: float = 0.80


HOPPER = Shares(products=0.55, attention=0.25)
WITHOUT_FLASH_ATTENTION = Shares(products=0.37, attention=0.19)
SHARES = {
    **dict.fromkeys(("h100", "h100-pcie", "h200", "b200"), HOPPER),
    **dict.fromkeys(("t4", "v100", "v100-32gb"), WITHOUT_FLASH_ATTENTION),
}


@dataclass(frozen=True)
class Work:
    """The bytes that a program moves between its matrix products and its attention, whose own are in their shares.

    forward_pass, backward_pass: of a token in each layer, in units of the width; ends: of a token in embedding and
    last LayerNorm, in the same unit; logit: of each logit in the loss; matrix, embedding: of each of these parameters
    in a micro-batch (rounded to the compute type, their gradient added up); chunk: of each parameter of the head for
    every chunk of the loss after a micro-batch's first; update: of a parameter in clipping and optimizer, beside the
    optimizer's state; gradient: of a parameter's gradient as processes add it up.
    """

    forward_pass: float
    backward_pass: float
    ends: float
    logit: float
    matrix: float = 24
    embedding: float = 24
    chunk: float = 0
    update: float = 24
    gradient: float = 4


# Of this project's code, under bf16 or float16.
#   compiled blocks: Inductor's CUDA code, written out without a GPU; eager ones: tests/planning/test_step_time.py
#   ends: 38 forward (two reads of an embedding, their sum, LayerNorm, a copy, a cast), 56 backward
#   loss: Inductor's code for the softmax of a chunk (`softmax_traffic`, and more for top_k_mass); eager, 48 and a
#   rounded copy, 6
#   matrix: a cast (6), its gradient to float32 (6), added to that of the micro-batches before (12)
#   embedding: a cast (6), its gradient times the loss's own (8), that of the input's rows: zeros, the sum (16), added
#   to that of the micro-batches before (12); chunk: the product adds to that of the chunk before, which it reads (4)
#   update: gradient and parameter read, parameter written (12), the norm (4), scaling by it (8)
COMPILED = Work(44, 104, ends=94, logit=softmax_traffic("non_max_sum", 1, 2), embedding=42, chunk=4)
EAGER = Work(64, 126, ends=94, logit=54, embedding=42, chunk=4)
# Not compiled, and what compiled code moves at most.
FLOAT32 = Work(72, 156, ends=86, logit=48, matrix=12, embedding=36, chunk=0)

# What would make it faster, one on top of the other, by what it does to the counts.
IMPROVEMENTS = {
    "logits in bf16, `logits_dtype: compute`: 8 bytes for 14": {"logit": softmax_traffic("non_max_sum", 1, 2, 2)},
    "matrices rounded once a step: 6 bytes a parameter and micro-batch less": {"matrix": 18, "embedding": 36},
    "the residual stream in bf16, as llm.c has it: 90 bytes for 148": {"forward_pass": 32, "backward_pass": 58},
    "GELU inside the products, forward and backward: 40 bytes less": {"forward_pass": 16, "backward_pass": 34},
}

ASSUMPTIONS = (
    (
        "products, share of the peak",
        "72 %; 55 % on H100 and later; 37 % on T4 and V100",
        "with 72 % llm.c's rate on A100 follows from its own bytes (below); H100: assumed, llm.c's rate there would "
        "follow with 48 % where its attention is cuDNN's, with 52 % where it is FlashAttention-2's; T4: 24 of 65 "
        "TFLOP/s that cuBLAS keeps up within 70 W (NVIDIA's forum, 264462); other devices are assumed like these",
    ),
    (
        "attention, share of the peak",
        "38 %; 25 % on H100 and later; 19 % on T4 and V100",
        "FlashAttention-2, figure 4, read off: 119 of 312 TFLOP/s on A100 (causal, heads of 64, 1k tokens, both "
        "ways); H100: that times 335/225, the paper's best rates, and times 1.40, by which cuDNN's kernel, torch's "
        "choice there since 2.11 (transformers, pull request 48163), is faster (FlashAttention-3, figures 5 and 6, "
        "heads of 64, 1k tokens: 373 and 348 TFLOP/s forward and backward for 306 and 238); without a flash kernel "
        "half, assumed",
    ),
    ("memory, share of its rate", "85 %", "assumed: what copies of large tensors reach"),
    (
        "link, share of its rate",
        "80 %",
        "assumed: NCCL's bus rate in a machine, for large sums; in full, though buckets go beside the backward",
    ),
    ("FLOPs of products", "6 a token and parameter of the matrices and the head", "the head of 50,304 columns"),
    ("FLOPs of attention", "7 · length · width a token and layer", "causal: 2 forward, 5 backward, recomputed scores"),
    ("passes", "44 + 104 bytes · width a token and layer", "counted in Inductor's code, forward and backward"),
    ("embedding, last LayerNorm", "94 bytes · width a token", "counted by operation; not compiled"),
    ("loss", f"{COMPILED.logit} bytes a logit", "counted in Inductor's code; what its products move is in theirs"),
    (
        "weights, a micro-batch",
        "24 bytes a matrix's parameter, 42 an embedding's, 4 more for every chunk of the loss after the first",
        "casts and float32 gradients, counted by operation",
    ),
    (
        "optimizer and clipping",
        "24 bytes a parameter, and its state read and written",
        "AdamW: 40, counted; Muon's products, 0.4 % of a step of GPT-2 small, are left out",
    ),
    ("sum over processes", "2 (n - 1) / n · 4 bytes a parameter", "a ring, within one machine"),
    ("latency, the host, everything else", "none", "so that small micro-batches and models take longer than derived"),
)


def work_of(recipe: Recipe, hardware: Hardware) -> Work:
    """What this project's code moves for a recipe on such hardware."""
    if hardware.compute_bytes == 4:
        return FLOAT32
    if not is_compiled(recipe.torch_compile, hardware.device_type):
        return EAGER
    compute = hardware.compute_bytes
    logit = softmax_traffic(recipe.penalty_type, recipe.penalty_top_k, compute, recipe.logits_bytes(compute))
    return dataclasses.replace(COMPILED, logit=logit)


def step_parts(
    recipe: Recipe, vocab_size: int, micro_batch: int, device: Device, processes: int = 1, work: Work | None = None
) -> dict[str, float]:
    """Seconds of an optimizer step on so many of a device, by part, derived. `work`: another program's (default: this
    project's)."""
    hardware, shares = device.hardware(processes), SHARES.get(device.key, Shares())
    work = work or work_of(recipe, hardware)
    width, layers, length = recipe.n_embd, recipe.n_layer, recipe.block_size
    blocks = largest_share(recipe.effective_batch_size, processes)
    tokens, pieces = blocks * length, -(-blocks // micro_batch)
    again = recipe.gradient_checkpointing  # the blocks' forward is done once more
    kinds = parameters_by_kind(recipe, vocab_size)
    parameters = sum(kinds.values())
    columns = -(-vocab_size // 64) * 64
    compiled = is_compiled(recipe.torch_compile, hardware.device_type)
    compute = hardware.compute_bytes
    chunk_rows = loss_chunk_rows(
        vocab_size, hardware.device_type, hardware.memory, compute, recipe.logits_bytes(compute), compiled
    )
    chunks = -(-min(micro_batch, blocks) * length // chunk_rows)
    passes = work.forward_pass * (1 + again) + work.backward_pass
    weights = work.matrix * kinds["matrix"] + (work.embedding + work.chunk * (chunks - 1)) * kinds["embedding"]
    state = OPTIMIZERS[recipe.optimizer].total_state_bytes(kinds)
    memory = shares.memory * device.memory_rate
    return {
        "products": tokens * (6 * columns * width + (6 + 2 * again) * kinds["matrix"])
        / (shares.products * device.peak_flops),
        "attention": tokens * (7 + 2 * again) * length * width * layers / (shares.attention * device.peak_flops),
        "passes": tokens * (passes * layers + work.ends) * width / memory,
        "loss": tokens * work.logit * columns / memory,
        "weights": pieces * weights / memory,
        "optimizer": (work.update * parameters + 2 * state) / memory,
        "reduction": 2 * (processes - 1) / processes * work.gradient * parameters / (shares.link * device.link_rate),
    }  # fmt: skip


def step_seconds(recipe: Recipe, vocab_size: int, micro_batch: int, hardware: Hardware) -> tuple[float, float] | None:
    """Of an optimizer step, what is derived and SLOWEST times that; None for a device that is not known."""
    if hardware.device is None:
        return None
    derived = sum(step_parts(recipe, vocab_size, micro_batch, hardware.device, hardware.processes).values())
    return derived, SLOWEST * derived


# GPT-2 small at 1024 tokens, half a million of them a step, as all of PUBLISHED train it.
GPT2_SMALL = Recipe(dataset_name="openwebtext", effective_batch_size=512, learning_rate=6e-4, warmup_steps=700)


@dataclass(frozen=True)
class Published:
    """A program that trains GPT2_SMALL, and its `rate` as published, in tokens/s a device; `work` as read in its
    source."""

    name: str
    device_key: str
    processes: int
    micro_batch: int
    rate: int
    work: Work

    @property
    def device(self) -> Device:
        return find_device(self.device_key)

    def parts(self) -> dict[str, float]:
        """Seconds of its step by part, derived."""
        return step_parts(GPT2_SMALL, 50_304, self.micro_batch, self.device, self.processes, self.work)


# llm.c, bf16 parameters: two fused residual sums with LayerNorm (16), GELU (16), and again in the backward (16), its
# gradient (24), gradients of biases (18) and LayerNorms (16); on H100 GELU is in the products. Logits in bf16 are read
# twice and become their gradient.
LLM_C = Work(32, 74, ends=20, logit=6, matrix=2, embedding=4, update=12, gradient=2)
LLM_C_H100 = Work(16, 34, ends=20, logit=6, matrix=2, embedding=4, update=12, gradient=2)
# All of the model compiled, logits of bf16 read three times and a gradient written.
COMPILED_WHOLE = Work(44, 104, ends=40, logit=8)

PUBLISHED = (
    Published("llm.c", "a100-80gb", 8, 64, 218_000, LLM_C),
    Published("llm.c", "h100", 8, 64, 468_000, LLM_C_H100),
    Published("build-nanogpt", "a100-80gb", 1, 64, 182_000, COMPILED_WHOLE),
    Published("nanoGPT", "rtx-4090", 1, 12, 106_000, COMPILED_WHOLE),
    Published("nanoGPT", "a100-40gb", 8, 12, 108_000, COMPILED_WHOLE),
)
