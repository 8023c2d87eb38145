"""Estimate memory and time of a recipe on devices one does not have.

python scripts/estimate.py --recipe recipes/owt_512.yaml
python scripts/estimate.py --recipe recipes/owt_512.yaml --device a100-40gb rtx-4090 --gradient_checkpointing true
python scripts/estimate.py --recipe recipes/owt_512.yaml --device a100-80gb h100 rtx-4090 t4 --parts

Memory is found by tracing a training step of the real code without allocating it (training/memory_trace.py), without
torch.compile, which saves some. Time is derived from FLOPs and bytes of the code (planning/step_time.py); `--parts`
shows of which parts, on what assumptions, and how far off this is for programs whose rates are published. Neither is
measured. `--calibrate` measures the step's memory on the GPU of this machine and shows that beside the estimate.
Options that are not the script's own are the recipe's.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass

from clm_owt.errors import InputError
from clm_owt.formatting import format_bytes, format_duration, markdown_table, text_table
from clm_owt.planning.devices import DEVICES, Device, find_device
from clm_owt.planning.memory import count_parameters, fitting_micro_batch, step_memory
from clm_owt.planning.plan import flops_per_token
from clm_owt.planning.step_time import (
    ASSUMPTIONS,
    COMPILED,
    EAGER,
    FLOAT32,
    GPT2_SMALL,
    IMPROVEMENTS,
    PART_NAMES,
    PUBLISHED,
    SLOWEST,
    step_parts,
    step_seconds,
    work_of,
)
from clm_owt.program import count, run_script
from clm_owt.recipe import Recipe
from clm_owt.recipe_reader import load_recipe

PARTS = ("weights", "gradients", "optimizer", "activations", "loss")


@dataclass(frozen=True)
class Estimate:
    """Of one recipe on one device: `largest` is the largest useful micro-batch that fits, `micro_batch` what a run
    takes, at most max_batch_size; 0 where not even one block fits. `memory` in bytes, by part, of the latter;
    `step_seconds` as derived and at the most."""

    device: Device
    largest: int
    micro_batch: int
    accumulation: int
    memory: dict[str, int]
    step_seconds: tuple[float, float]


def estimate(recipe: Recipe, vocab_size: int, device: Device, processes: int = 1) -> Estimate:
    """Largest micro-batch within the recipe's share of the device's memory, and the time of a step.

    A trace takes seconds. So the size is sought by the formula of `step_memory`, and the step of what a run would take
    is traced; the difference corrects the formula, until the size that it gives has been traced.
    """
    # Imported here, so that a bad recipe is reported without waiting for torch.
    from clm_owt.training.memory_trace import trace_step

    hardware = device.hardware(processes)
    budget = recipe.target_memory_utilization * device.memory
    correction, traced = 0, {}
    while True:
        largest, micro_batch = fitting_micro_batch(recipe, vocab_size, hardware, correction)
        if micro_batch == 0 or micro_batch in traced:
            break
        traced[micro_batch] = trace_step(recipe, vocab_size, micro_batch, hardware)
        by_formula = step_memory(recipe, vocab_size, micro_batch, hardware)
        correction = sum(traced[micro_batch].values()) - sum(by_formula.values())
    micro_batch = max((size for size, memory in traced.items() if sum(memory.values()) <= budget), default=0)
    return Estimate(
        device=device,
        largest=largest,
        micro_batch=micro_batch,
        accumulation=-(-recipe.effective_batch_size // (micro_batch * processes)) if micro_batch else 0,
        memory=traced.get(micro_batch, {}),
        step_seconds=step_seconds(recipe, vocab_size, micro_batch or 1, hardware),
    )


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
    from clm_owt.data.tokenizer_files import known_vocab_size

    try:
        return given or known_vocab_size(recipe)
    except InputError as error:
        raise InputError(f"--vocab_size: missing; {error}") from error


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
    estimates: list[Estimate], tokens: int, steps: int | None, steps_per_epoch: float | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows. `tokens`: of a step."""
    rows = []

    def span(seconds: tuple[float, float], count: float | None) -> str:
        return (
            "?" if count is None else f"{format_duration(seconds[0] * count)} - {format_duration(seconds[1] * count)}"
        )

    for e in estimates:
        counts = (1, steps_per_epoch, steps)
        spans = (span(e.step_seconds, count) for count in counts)
        rows.append([e.device.name, f"{tokens / e.step_seconds[0]:,.0f}", *spans])
    return ["device", "tokens/s", "step", "epoch", "run"], rows


def print_parts(recipe: Recipe, vocab_size: int, estimates: list[Estimate], processes: int) -> None:
    """How the time is derived, as Markdown tables: parts, assumptions, what would make it faster, and what the same
    derivation gives for programs whose rates are published."""
    print("Derived, not measured: milliseconds of a step by part, tokens/s a device\n")
    print(markdown_table(*parts_table(recipe, vocab_size, estimates, processes)))
    print("\nAssumed and counted\n")
    print(markdown_table(["of what", "value", "from"], ASSUMPTIONS))
    print("\nWhat would make it faster, one on top of the other: tokens/s a device, derived\n")
    print(markdown_table(*improvements_table(recipe, vocab_size, estimates, processes)))
    print("\nThe same derivation for programs with a published rate: tokens/s a device\n")
    print(markdown_table(*published_table()))


def parts_table(
    recipe: Recipe, vocab_size: int, estimates: list[Estimate], processes: int
) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    flops = flops_per_token(count_parameters(recipe, vocab_size), recipe.n_layer, recipe.n_embd, recipe.block_size)
    rows = []
    for e in estimates:
        parts = step_parts(recipe, vocab_size, e.micro_batch, e.device, processes)
        rate = tokens_per_second(recipe, parts, processes)
        shown = (f"{1000 * seconds:,.0f}" for seconds in parts.values())
        rows.append(
            [e.device.name, str(e.micro_batch), *shown, f"{rate:,.0f}", f"{rate * flops / e.device.peak_flops:.0%}"]
        )
    return ["device", "micro-batch", *PART_NAMES, "tokens/s", "MFU"], rows


def improvements_table(
    recipe: Recipe, vocab_size: int, estimates: list[Estimate], processes: int
) -> tuple[list[str], list[list[str]]]:
    """Header and rows, for the devices on which the blocks run compiled in bf16 or fp16."""
    estimates = [e for e in estimates if work_of(recipe, e.device.hardware()) not in (EAGER, FLOAT32)]
    work, rows = COMPILED, []
    for name, change in {"as it is": {}, **IMPROVEMENTS}.items():
        work = dataclasses.replace(work, **change)
        parts = (step_parts(recipe, vocab_size, e.micro_batch, e.device, processes, work) for e in estimates)
        rows.append([name, *(f"{tokens_per_second(recipe, part, processes):,.0f}" for part in parts)])
    return ["change", *(e.device.name for e in estimates)], rows


def published_table() -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    rows = []
    for p in PUBLISHED:
        derived = tokens_per_second(GPT2_SMALL, p.parts(), p.processes)
        machine = f"{p.processes} x {p.device.name}"
        rows.append([p.name, machine, f"{p.rate:,}", f"{derived:,.0f}", f"{derived / p.rate:.2f}"])
    return ["program", "machine", "published", "derived", "derived / published"], rows


def tokens_per_second(recipe: Recipe, parts: dict[str, float], processes: int) -> float:
    """Of one device, from the seconds of a step's parts."""
    return recipe.effective_batch_size * recipe.block_size / processes / sum(parts.values())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/estimate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    keys = ", ".join(device.key for device in DEVICES)
    parser.add_argument("--device", nargs="+", metavar="NAME", help=f"default: all known ({keys})")
    parser.add_argument("--processes", type=count, default=1, help="devices that share the batch (default: 1)")
    parser.add_argument("--parts", action="store_true", help="how the time is derived, in place of memory and time")
    parser.add_argument("--vocab_size", type=count, help="where the recipe's tokenizer does not tell")
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
    estimates = [estimate(recipe, vocab_size, d, options.processes) for d in devices]
    if options.calibrate and estimates[-1].micro_batch:
        e = estimates[-1]
        measured[e.device.key] = measure(recipe_options, vocab_size, e.micro_batch, e.device.mixed_precision)

    if options.parts:
        return print_parts(recipe, vocab_size, [e for e in estimates if e.micro_batch], options.processes)
    steps = recipe.total_steps()
    blocks = recipe.expected_train_blocks
    parameters = count_parameters(recipe, vocab_size)
    print(f"Estimated for {recipe.run_name}: {parameters:,} parameters, {recipe.effective_batch_size} blocks of "
          f"{recipe.block_size} tokens a step, {options.processes} device(s)\n")  # fmt: skip
    print(f"Memory of each device, estimated (target: {recipe.target_memory_utilization:.0%} of it)")
    print(text_table(*memory_table(estimates, measured)))
    print(f"\nTime, from as derived from bytes and FLOPs of the code, with its tokens/s, to {SLOWEST:g} times that")
    tokens = recipe.effective_batch_size * recipe.block_size
    print(text_table(*time_table(estimates, tokens, steps, blocks and blocks / recipe.effective_batch_size)))


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
    run_script(main)
