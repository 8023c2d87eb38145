"""The memory footprint of a training step, before it is taken."""

from clm_owt.recipe import Recipe


def count_parameters(recipe: Recipe, vocab_size: int) -> int:
    """Parameters of GPT-2 with tied embeddings: (V + T)·D + L·(12·D² + 13·D) + 2·D; 124,439,808 for the smallest."""
    d = recipe.n_embd
    return (vocab_size + recipe.block_size) * d + recipe.n_layer * (12 * d * d + 13 * d) + 2 * d


def step_memory(
    recipe: Recipe,
    vocab_size: int,
    micro_batch: int,
    *,
    processes: int = 1,
    mixed_precision: str = "no",
    sharded: bool = False,
    device_type: str = "cpu",
    device_memory: int = 0,
) -> dict[str, int]:
    """Bytes that a training step holds in each process at its largest, by part: estimated by hand, without
    torch.compile, which saves some. `memory_trace.trace_step` finds the same from the code.

    Weights, gradients and two moments are float32; FSDP shards them. For its backward a transformer block keeps, in
    units of tokens x width, 2 in float32 (the residual stream before either LayerNorm) and 14 in the compute type
    (normalised inputs 2, q k v 3, attention 1, MLP 4 + 4); with checkpointing its input alone, and one block at a time
    the rest. Autocast keeps copies of the matrices. The loss holds a chunk of logits (see losses.default_chunk_rows)
    with twice as much work space (on CPU 4 MB at a time), in bf16 a rounded copy, and the gradients of hidden states
    and embedding.
    """
    width, layers = recipe.n_embd, recipe.n_layer
    tokens = micro_batch * recipe.block_size
    state = 4 * count_parameters(recipe, vocab_size) // (processes if sharded else 1)
    compute = 4 if mixed_precision == "no" else 2
    stream = 4 * width * tokens
    block = 2 * stream + 14 * compute * width * tokens
    kept = layers * (stream if recipe.gradient_checkpointing else block) + 2 * stream
    head = 4 * vocab_size * width
    kept += 0 if compute == 4 else 2 * 12 * width * width * layers + head // 2
    limit = max(1, device_memory // 32 // (10 * vocab_size)) if device_type == "cuda" and device_memory else 1024
    rows = -(-tokens // -(-tokens // limit))
    work = min(rows * vocab_size, 2**20) if device_type == "cpu" else rows * vocab_size
    gradients = stream + head
    loss = (4 if compute == 4 else 6) * rows * vocab_size + 8 * work + gradients
    parts = {"weights": state, "gradients": 0, "optimizer": 2 * state, "activations": kept, "loss": loss}
    if recipe.gradient_checkpointing and block > loss - gradients:
        # The largest moment is not in the loss but in the first block's backward.
        parts |= {"activations": kept + block, "loss": gradients}
    if -(-recipe.effective_batch_size // processes) > micro_batch:
        parts["gradients"] = state
    elif state > parts["activations"] + parts["loss"]:  # it is at the end of the backward
        parts |= {"gradients": state, "activations": 0, "loss": 0}
    return parts
