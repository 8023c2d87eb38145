"""Memory of a training step on this machine: estimated without it, and measured."""

import estimate
import pytest

from clm_owt.formatting import format_bytes
from clm_owt.planning.devices import Hardware
from clm_owt.recipe_reader import load_recipe
from clm_owt.training.device_memory import total_memory
from clm_owt.training.memory_trace import trace_step

pytestmark = pytest.mark.gpu

# The estimate does not know the allocator's rounding, nor the work space of the library's products.
BOUND = 0.2
TINY = ["--n_layer", "2", "--n_embd", "128", "--n_head", "2", "--block_size", "256"]


@pytest.mark.parametrize("micro_batch", [4, 8])
def test_the_estimate_is_near_what_a_step_takes(micro_batch, machine, finding, monkeypatch):
    """Memory of a step, estimated by tracing and measured: GPT-2 small, not compiled."""
    options = ["--recipe", "recipes/owt_512.yaml", "--torch_compile", "false", *TINY * machine.dry_run]
    vocab_size = 4096 if machine.dry_run else 50_257
    precision = "no" if machine.dry_run else machine.precision
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # else glibc keeps what is freed
    measured = estimate.measure(options, vocab_size, micro_batch, precision)
    hardware = Hardware(machine.device.type, None, total_memory(machine.device), mixed_precision=precision)
    estimated = sum(trace_step(load_recipe(options), vocab_size, micro_batch, hardware).values())
    shown = f"{format_bytes(estimated)} estimated, {format_bytes(measured)} measured"
    finding(f"micro-batch {micro_batch}: {shown}", f"± {BOUND:.0%}")
    assert abs(estimated / measured - 1) < BOUND
