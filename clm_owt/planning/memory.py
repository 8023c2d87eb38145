"""The memory of a training step by arithmetic, `training/memory_trace.py` finds it from the code."""

from clm_owt.batch import GRADIENT_BUCKET_BYTES, candidate_sizes, largest_share, loss_chunk_bytes, loss_chunk_rows
from clm_owt.optimizers import OPTIMIZERS
from clm_owt.planning.devices import Hardware
from clm_owt.recipe import Recipe, is_compiled


def parameters_by_kind(recipe: Recipe, vocab_size: int) -> dict[str, int]:
    """Parameters of GPT-2 with tied embeddings, by the kinds of optimizers.KINDS: (V + T)·D, 12·L·D², (13·L + 2)·D."""
    d, layers = recipe.n_embd, recipe.n_layer
    return {
        "embedding": (vocab_size + recipe.block_size) * d,
        "matrix": 12 * layers * d * d,
        "vector": (13 * layers + 2) * d,
    }


def count_parameters(recipe: Recipe, vocab_size: int) -> int:
    """Parameters of GPT-2 with tied embeddings: (V + T)·D + L·(12·D² + 13·D) + 2·D; 124,439,808 for the smallest."""
    return sum(parameters_by_kind(recipe, vocab_size).values())


def optimizer_bytes(recipe: Recipe, vocab_size: int) -> int:
    """Bytes of the optimizer's state, of all processes together."""
    return OPTIMIZERS[recipe.optimizer].total_state_bytes(parameters_by_kind(recipe, vocab_size))


def step_memory(recipe: Recipe, vocab_size: int, micro_batch: int, hardware: Hardware) -> dict[str, int]:
    """Bytes that a training step holds in each process at its largest, by part: estimated by hand, without
    torch.compile, which saves some.

    Weights, gradients and the optimizer's state are float32; FSDP shards them. For its backward a transformer block
    keeps, in units of tokens x width, 2 in float32 (the residual stream before either LayerNorm) and 14 in the compute
    type (normalised inputs 2, q k v 3, attention 1, MLP 4 + 4); with checkpointing its input alone, and one block at a
    time the rest. Autocast keeps copies of the matrices. The loss holds a chunk of logits and, compiled, its gradient;
    else twice as much work space (on CPU for 4 MB at a time) and in bf16 a rounded copy (on CPU no other); and the
    gradients of hidden states and embedding, under bf16 on CPU the latter's product as well.
    """
    width, layers, compute = recipe.n_embd, recipe.n_layer, hardware.compute_bytes
    shards = hardware.processes if hardware.sharded else 1
    tokens = micro_batch * recipe.block_size
    weights = 4 * count_parameters(recipe, vocab_size) // shards
    stream = 4 * width * tokens
    block = 2 * stream + 14 * compute * width * tokens
    kept = layers * (stream if recipe.gradient_checkpointing else block) + 2 * stream
    head = 4 * vocab_size * width
    if compute == 2:  # FSDP2 gathers a block's matrices as bf16, and drops them with the block
        dropped = hardware.sharded and hardware.mixed_precision == "bf16"
        kept += head // 2 + 2 * 12 * width * width * (min(layers, 2) if dropped else layers)
    compiled = is_compiled(recipe.torch_compile, hardware.device_type)
    logits = recipe.logits_bytes(compute)
    chunk_rows = loss_chunk_rows(vocab_size, hardware.device_type, hardware.memory, compute, logits, compiled)
    chunks = -(-tokens // chunk_rows)
    rows = -(-tokens // chunks)
    gradients = stream + head + (head // 2 if compute == 2 and hardware.device_type == "cpu" else 0)
    loss = loss_chunk_bytes(rows, vocab_size, hardware.device_type, compute, logits, compiled) + gradients
    parts = {
        "weights": weights,
        "gradients": 0,
        "optimizer": optimizer_bytes(recipe, vocab_size) // shards,
        "activations": kept,
        "loss": loss,
    }
    if recipe.gradient_checkpointing and block > loss - gradients:
        # The largest moment is not in the loss but in the first block's backward.
        parts |= {"activations": kept + block, "loss": gradients}
    if largest_share(recipe.effective_batch_size, hardware.processes) > micro_batch:
        parts["gradients"] = weights
    elif weights > parts["activations"] + parts["loss"]:  # it is at the end of the backward
        summed = hardware.processes > 1 and not hardware.sharded  # a copy of each bucket
        copies = min(GRADIENT_BUCKET_BYTES, weights) if summed else 0
        parts |= {"gradients": weights + copies, "activations": 0, "loss": 0}
    return parts


def fitting_micro_batch(recipe: Recipe, vocab_size: int, hardware: Hardware, correction: int = 0) -> tuple[int, int]:
    """The largest useful micro-batch whose step, `correction` bytes more than estimated, fits into the recipe's share
    of the device's memory, and what a run takes, at most max_batch_size; 0 where not even one block fits."""
    budget = recipe.target_memory_utilization * hardware.memory - correction
    sizes = list(candidate_sizes(recipe.effective_batch_size, hardware.processes, recipe.effective_batch_size))
    largest = next(
        (size for size in sizes if sum(step_memory(recipe, vocab_size, size, hardware).values()) <= budget), 0
    )
    return largest, next((size for size in sizes if size <= min(largest, recipe.max_batch_size)), 0)
