"""Estimate memory and time of a recipe on devices one does not have.

python scripts/estimate.py --recipe recipes/owt_512.yaml
python scripts/estimate.py --recipe recipes/owt_512.yaml --device a100-40gb rtx-4090 --gradient_checkpointing true

Memory is found by tracing a training step of the real code without allocating it (training/memory_trace.py), without
torch.compile, which saves some. Time is arithmetic: FLOPs over the device's peak, at a stated share of it (MFU). Both
are estimates. `--calibrate` measures the step on the GPU of this machine and shows that beside the estimate.
Options that are not the script's own are the recipe's.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass

from clm_owt.batch import candidate_sizes
from clm_owt.errors import InputError, exit_with
from clm_owt.formatting import format_bytes, format_duration, text_table
from clm_owt.planning.devices import DEVICES, MFU_RANGE, Device, Hardware, find_device
from clm_owt.planning.memory import count_parameters, step_memory
from clm_owt.planning.plan import flops_per_token
from clm_owt.recipe import Recipe
from clm_owt.recipe_reader import load_recipe

GPT2_VOCABULARY = 50_257
PARTS = ("weights", "gradients", "optimizer", "activations", "loss")


@dataclass(frozen=True)
class Estimate:
    """Of one recipe on one device: `largest` is the largest useful micro-batch that fits, `micro_batch` what a run
    takes, at most max_batch_size; 0 where not even one block fits. `memory` in bytes, by part, of the latter."""

    device: Device
    largest: int
    micro_batch: int
    accumulation: int
    memory: dict[str, int]
    step_seconds: tuple[float, float]


def estimate(recipe: Recipe, vocab_size: int, device: Device, processes: int, mfu: tuple[float, float]) -> Estimate:
    """Largest micro-batch within the recipe's share of the device's memory, and the time of a step at both MFUs.

    A trace takes seconds. So the size is sought by the formula of `step_memory`, and the step of what a run would take
    is traced; the difference corrects the formula, until the size that it gives has been traced.
    """
    # Imported here, so that a bad recipe is reported without waiting for torch.
    from clm_owt.training.memory_trace import trace_step

    hardware = device.hardware(processes)
    budget = recipe.target_memory_utilization * device.memory
    batch = recipe.effective_batch_size
    sizes = list(candidate_sizes(batch, processes, batch))
    correction, traced = 0, {}
    while True:
        largest = next(
            (size for size in sizes if by_formula(recipe, vocab_size, size, hardware) + correction <= budget), 0
        )
        micro_batch = next((size for size in sizes if size <= min(largest, recipe.max_batch_size)), 0)
        if micro_batch == 0 or micro_batch in traced:
            break
        traced[micro_batch] = trace_step(recipe, vocab_size, micro_batch, hardware)
        correction = sum(traced[micro_batch].values()) - by_formula(recipe, vocab_size, micro_batch, hardware)
    micro_batch = max((size for size, memory in traced.items() if sum(memory.values()) <= budget), default=0)
    flops = flops_per_token(count_parameters(recipe, vocab_size), recipe.n_layer, recipe.n_embd, recipe.block_size)
    work = flops * batch * recipe.block_size / (device.peak_flops * processes)
    return Estimate(
        device=device,
        largest=largest,
        micro_batch=micro_batch,
        accumulation=-(-batch // (micro_batch * processes)) if micro_batch else 0,
        memory=traced.get(micro_batch, {}),
        step_seconds=(work / mfu[1], work / mfu[0]),
    )


def by_formula(recipe: Recipe, vocab_size: int, micro_batch: int, hardware: Hardware) -> int:
    return sum(step_memory(recipe, vocab_size, micro_batch, hardware).values())


def measure(argv: list[str], vocab_size: int, micro_batch: int, mixed_precision: str) -> int:
    """Bytes of a real step on this machine, in a process of its own."""
    task = json.dumps({"vocab_size": vocab_size, "micro_batch": micro_batch, "mixed_precision": mixed_precision})
    command = [sys.executable, __file__, "--measure", task, *argv]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout.split()[-1])


def measure_here(task: str, recipe: Recipe) -> int:
    import torch

    from clm_owt.training.memory_trace import measure_step

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return measure_step(recipe, device=device, **json.loads(task))


def find_vocab_size(recipe: Recipe, given: int | None) -> int:
    if given or recipe.train_tokenizer_vocab_size:
        return given or recipe.train_tokenizer_vocab_size
    if recipe.tokenizer_name in ("openai-community/gpt2", "gpt2"):
        return GPT2_VOCABULARY
    raise InputError(
        f"--vocab_size: missing; the number of ids of tokenizer {recipe.tokenizer_name} is not known here"
    )


def memory_table(estimates: list[Estimate], measured: dict[str, int]) -> tuple[list[str], list[list[str]]]:
    """Header and rows. `measured`: bytes of a real step, by the key of a device."""
    header = ["device", "memory", "micro-batch", "accumulation", "largest that fits", "estimated", *PARTS]
    rows = []
    for e in estimates:
        row = [e.device.name, f"{e.device.memory_gib:g} GiB"]
        if not e.micro_batch:
            rows.append([*row, "does not fit"])
            continue
        parts = [format_bytes(e.memory[part]) for part in PARTS]
        row += [str(e.micro_batch), str(e.accumulation), str(e.largest), format_bytes(sum(e.memory.values())), *parts]
        rows.append(row + ([format_bytes(measured[e.device.key])] if e.device.key in measured else []))
    return header + ["measured"] * bool(measured), rows


def time_table(
    estimates: list[Estimate], steps: int | None, steps_per_epoch: float | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    rows = []

    def span(seconds: tuple[float, float], count: float | None) -> str:
        return (
            "?" if count is None else f"{format_duration(seconds[0] * count)} - {format_duration(seconds[1] * count)}"
        )

    for e in estimates:
        counts = (1, steps_per_epoch, steps)
        rows.append([e.device.name, f"{e.device.peak_tflops:g} T", *(span(e.step_seconds, count) for count in counts)])
    return ["device", "peak", "step", "epoch", "run"], rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/estimate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    keys = ", ".join(device.key for device in DEVICES)
    parser.add_argument("--device", nargs="+", metavar="NAME", help=f"default: all known ({keys})")
    parser.add_argument("--processes", type=int, default=1, help="devices that share the batch (default: 1)")
    parser.add_argument(
        "--mfu", nargs=2, type=float, default=MFU_RANGE, metavar=("LOW", "HIGH"), help="shares of the peak"
    )
    parser.add_argument("--vocab_size", type=int, help="where the recipe's tokenizer does not tell")
    parser.add_argument("--calibrate", action="store_true", help="also measure on this machine's GPU")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what --calibrate runs in a process of its own
    options, recipe_options = parser.parse_known_args(argv)
    recipe = load_recipe(recipe_options)
    if options.measure:
        return print(measure_here(options.measure, recipe))
    unknown = [name for name in options.device or () if find_device(name) is None]
    if unknown:
        raise InputError(f"--device: {', '.join(unknown)} not known; expected any of {keys}")
    vocab_size = find_vocab_size(recipe, options.vocab_size)
    devices = [find_device(name) for name in options.device] if options.device else list(DEVICES)
    measured = {}
    if options.calibrate:
        device = local_device()
        devices = [d for d in devices if d != device] + [device]
    estimates = [estimate(recipe, vocab_size, d, options.processes, tuple(options.mfu)) for d in devices]
    if options.calibrate and estimates[-1].micro_batch:
        e = estimates[-1]
        measured[e.device.key] = measure(recipe_options, vocab_size, e.micro_batch, e.device.mixed_precision)

    steps = recipe.total_steps()
    blocks = recipe.expected_train_blocks
    parameters = count_parameters(recipe, vocab_size)
    print(f"Estimated for {recipe.run_name}: {parameters:,} parameters, {recipe.effective_batch_size} blocks of "
          f"{recipe.block_size} tokens a step, {options.processes} device(s)\n")  # fmt: skip
    print(f"Memory of each device, estimated (target: {recipe.target_memory_utilization:.0%} of it)")
    print(text_table(*memory_table(estimates, measured)))
    print(f"\nTime, estimated at {options.mfu[1]:.0%} to {options.mfu[0]:.0%} of the device's peak")
    print(text_table(*time_table(estimates, steps, blocks and blocks / recipe.effective_batch_size)))


def local_device() -> Device:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device = find_device(name)
    if device is None:
        raise InputError(
            f"--calibrate: needs a GPU of the list in clm_owt/planning/devices.py; here is {name or 'none'}"
        )
    return device


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        exit_with(error)
