"""The memory of a training step of the real code, found by running it on tensors that hold no data.

PyTorch's FakeTensorMode runs every operation for its shapes only; a dispatch mode counts which storages live at the
same time. (torch's own MemTracker cannot read the sparse gradient of the embedding, and does not know the loss from
activations.) What is not seen: work space inside an operation, the allocator's rounding and fragmentation, the context
of a GPU, and what torch.compile saves.
"""

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.futures import Future
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from clm_owt.batch import largest_share, loss_chunk_rows, softmax_rows
from clm_owt.model.gpt2 import GPT2ForPretraining, build_model
from clm_owt.model.losses import fused_linear_loss
from clm_owt.optimizers import OPTIMIZERS
from clm_owt.planning.devices import Hardware
from clm_owt.recipe import Recipe, is_compiled
from clm_owt.training.device_memory import process_sizes, start_threads
from clm_owt.training.gradient_sum import GradientSum

PARTS = ("weights", "gradients", "optimizer", "activations", "loss")


class LiveStorages(TorchDispatchMode):
    """Bytes of the tensors alive, by part, and at the moment when they were most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.part = "activations"  # of what is created next
        self._part_of: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor, self.part)
        return result

    def see(self, tensor: torch.Tensor, part: str) -> None:
        """Count the storage of a tensor, once."""
        if tensor.layout == torch.sparse_coo:
            self.see(tensor._indices(), part)
            self.see(tensor._values(), part)
            return
        storage = tensor.untyped_storage()
        if storage in self._part_of:
            return
        owner = [part]
        self._part_of[storage] = owner
        self.live[part] += storage.nbytes()
        weakref.finalize(storage, self._forget, owner, storage.nbytes())
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)

    def _forget(self, owner: list[str], size: int) -> None:
        self.live[owner[0]] -= size

    def assign(self, tensor: torch.Tensor, part: str) -> None:
        """From now on the tensor belongs to another part."""
        self.see(tensor, part)
        owner, size = self._part_of[tensor.untyped_storage()], tensor.untyped_storage().nbytes()
        self.live[owner[0]] -= size
        self.live[part] += size
        owner[0] = part

    @contextmanager
    def creating(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


def trace_step(recipe: Recipe, vocab_size: int, micro_batch: int, hardware: Hardware) -> dict[str, int]:
    """Bytes of one process at the largest moment of a step, by part; nothing of that size is allocated.

    Blocks being alike, models of more than three layers are extrapolated from two and three.
    """
    if recipe.n_layer <= 3:
        return trace_layers(recipe, vocab_size, micro_batch, hardware)
    two, three = (
        trace_layers(dataclasses.replace(recipe, n_layer=layers), vocab_size, micro_batch, hardware)
        for layers in (2, 3)
    )
    return {part: three[part] + (recipe.n_layer - 3) * (three[part] - two[part]) for part in PARTS}


def trace_layers(recipe: Recipe, vocab_size: int, micro_batch: int, hardware: Hardware) -> dict[str, int]:
    """As `trace_step`, with all layers. The operations are those of a CPU; the loss is cut as on `hardware`."""
    tracker = LiveStorages()
    device_type, compute_bytes = hardware.device_type, hardware.compute_bytes
    compiled, logits_bytes = is_compiled(recipe.torch_compile, device_type), recipe.logits_bytes(compute_bytes)
    chunk_rows = loss_chunk_rows(vocab_size, device_type, hardware.memory, compute_bytes, logits_bytes, compiled)

    def loss(*arguments, **settings):
        with tracker.creating("loss"):
            return fused_linear_loss(
                *arguments,
                **settings,
                chunk_rows=chunk_rows,
                block_rows=softmax_rows(vocab_size, device_type),
                softmax=outputs_of_one_kernel if compiled else None,
            )

    def summing(flat: torch.Tensor) -> Future:
        """What starts the sum over processes, which takes no memory of this kind."""
        tracker.assign(flat, "gradients")
        done: Future = Future()
        done.set_result(flat)
        return done

    with FakeTensorMode(), tracker:
        with tracker.creating("weights"):
            model = build_model(recipe, vocab_size, eos_token_id=0, check_weights=False)
            model.linear_loss = loss
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.assign(p.grad, "gradients"))
        summed = hardware.processes > 1 and not hardware.sharded
        gradient_sum = GradientSum(list(model.parameters()), summing) if summed else GradientSum()
        optimizer = OPTIMIZERS[recipe.optimizer].build(model, recipe)
        # In the middle of a run: the optimizer has its state, and where the global batch is larger than a micro-batch
        # the gradients of earlier ones lie in memory.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            tracker.assign(parameter.grad, "gradients")
        with tracker.creating("optimizer"):
            optimizer.step()
        if largest_share(recipe.effective_batch_size, hardware.processes) <= micro_batch:
            optimizer.zero_grad(set_to_none=True)
        tracker.peak = Counter()
        gradient_sum.begin()
        gradient_sum.expect_last_backward()
        forward_and_backward(model, recipe, micro_batch, hardware.mixed_precision)
        gradient_sum.finish()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
    return {part: tracker.peak[part] for part in PARTS}


def outputs_of_one_kernel(logits, _target, _scale, *, gradient_dtype, **_):
    """What the compiled softmax of the loss takes memory for."""
    return logits.new_empty(len(logits), 4), torch.empty_like(logits, dtype=gradient_dtype)


def forward_and_backward(model: GPT2ForPretraining, recipe: Recipe, micro_batch: int, mixed_precision: str) -> None:
    blocks = torch.zeros(micro_batch, recipe.block_size, dtype=torch.int64, device=model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_precision != "no"):
        output = model(input_ids=blocks, labels=blocks, num_items_in_batch=blocks.numel())
    # A gradient of a known value: on a CPU the loss looks whether it is 1, which a fake tensor cannot tell.
    output.loss.backward(torch.tensor(1.0, device=model.device))


def measure_step(recipe: Recipe, vocab_size: int, micro_batch: int, mixed_precision: str, device: torch.device) -> int:
    """Bytes that model, optimizer and two real steps take on `device` at their largest.

    On a CPU what they add to the memory that the process had after a very small step, at its highest: only a fresh
    process tells. There glibc keeps much of what is freed in pieces below 32 MB, which is then counted too, unless the
    process is started with MALLOC_MMAP_THRESHOLD_=65536. (Run by the project on CPU only.)
    """
    tiny = dataclasses.replace(recipe, n_layer=1, n_head=1, n_embd=8, block_size=8, effective_batch_size=2)
    take_real_steps(tiny, 16, 1, mixed_precision, device)  # loads the code of all operations, starts the threads
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        take_real_steps(recipe, vocab_size, micro_batch, mixed_precision, device)
        return torch.cuda.max_memory_allocated(device) - before
    start_threads()
    before = process_sizes()["VmRSS"]
    take_real_steps(recipe, vocab_size, micro_batch, mixed_precision, device)
    return process_sizes()["VmHWM"] - before


def take_real_steps(
    recipe: Recipe, vocab_size: int, micro_batch: int, mixed_precision: str, device: torch.device
) -> None:
    model = build_model(recipe, vocab_size, eos_token_id=0).to(device)
    optimizer = OPTIMIZERS[recipe.optimizer].build(model, recipe)
    for _ in range(2):
        for _ in range(1 + (recipe.effective_batch_size > micro_batch)):  # more micro-batches need no more memory
            forward_and_backward(model, recipe, micro_batch, mixed_precision)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
