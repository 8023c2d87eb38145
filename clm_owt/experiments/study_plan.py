"""What a study will take: runs, steps, tokens; time and cost by device, derived. Nothing is read but the recipe."""

import dataclasses
import statistics
from collections.abc import Sequence

from clm_owt.data.tokenizer_files import known_vocab_size
from clm_owt.errors import InputError
from clm_owt.experiments.sweep_file import SweptRun
from clm_owt.formatting import format_count, format_duration, text_table
from clm_owt.planning.devices import Device
from clm_owt.planning.memory import fitting_micro_batch
from clm_owt.planning.step_time import SLOWEST, step_seconds
from clm_owt.recipe import Recipe

HOUR = 3600


def plan_lines(
    name: str,
    runs: Sequence[SweptRun],
    notes: Sequence[str],
    devices: Sequence[Device],
    vocab_size: int | None,
    price: float | None,
    at_once: int,
) -> list[str]:
    """The plan of a study as lines. `price`: of an hour of a device; `at_once`: runs at a time, each on one device.

    Raises InputError where the length of a run, or without `vocab_size` the vocabulary, is not known before the data
    has been read.
    """
    recipe = runs[0].recipe
    steps = recipe.total_steps()
    if steps is None:
        raise InputError(
            f"{name}: num_train_epochs: the number of training blocks is not known before the data has been read; "
            "give expected_train_blocks or max_steps"
        )
    for run in runs:
        run.read_folder()
    seeds = len({run.recipe.seed for run in runs})
    tokens = recipe.effective_batch_size * recipe.block_size
    penalised = [run for run in runs if run.recipe.penalty_weight]
    rows = [["λ = 0", "", str(len(runs) - len(penalised))]]
    for penalty_type in dict.fromkeys(run.recipe.penalty_type for run in penalised):
        own = [run.recipe for run in penalised if run.recipe.penalty_type == penalty_type]
        weights = ", ".join(f"{weight:g}" for weight in sorted({r.penalty_weight for r in own}))
        rows.append([penalty_type, weights, str(len(own))])
    rows = [[*row, f"{steps:,}", format_count(float(f"{steps * tokens:.4g}"))] for row in rows]
    lines = [
        f"Plan of the study {name}: {len(runs)} runs of {steps:,} steps of {tokens:,} tokens, {seeds} seeds; "
        f"{len(runs) * steps:,} steps and {format_count(float(f'{len(runs) * steps * tokens:.4g}'))} tokens in all",
        *notes,
        "",
        text_table(["penalty", "λ", "runs", "steps a run", "tokens a run"], rows),
        "",
        *finished_lines(runs),
        f"Time and cost of training, derived from bytes and FLOPs of the code, to {SLOWEST:g} times that; one device "
        "a run. Measuring the models is some passes over the validation set more:",
        text_table(*cost_table(runs, vocab_size or known_vocab_size(recipe), devices, price, at_once)),
    ]
    return lines


def finished_lines(runs: Sequence[SweptRun]) -> list[str]:
    finished = [run.seconds for run in runs if run.status == "finished"]
    if not finished:
        return []
    mean = statistics.fmean(finished)
    left = len(runs) - len(finished)
    return [
        f"{len(finished)} have finished, in {format_duration(mean)} each; the {left} others will take "
        f"{format_duration(left * mean)} at that pace, one after the other"
        if left
        else f"All have finished, in {format_duration(mean)} each",
        "",
    ]


def cost_table(
    runs: Sequence[SweptRun], vocab_size: int, devices: Sequence[Device], price: float | None, at_once: int
) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one for each device."""
    rows = []
    for device in devices:
        recipes = [training_of(run.recipe) for run in runs]
        seconds = {}
        for recipe in recipes:
            if repr(recipe) not in seconds:
                seconds[repr(recipe)] = run_seconds(recipe, vocab_size, device)
        row = [device.name, f"{device.memory_gib:g} GiB"]
        found = [seconds[repr(recipe)] for recipe in recipes]
        if None in found:
            rows.append([*row, "does not fit"])
            continue
        ends = [[run[i] for run in found] for i in (0, 1)]
        hours = [sum(end) / HOUR for end in ends]
        row.append(" - ".join(format_duration(statistics.fmean(end)) for end in ends))
        rounds = -(-len(runs) // at_once)
        row.append(" - ".join(format_duration(statistics.fmean(end) * rounds) for end in ends))
        row.append(" - ".join(map(amount, hours)))
        if price is not None:
            row.append(" - ".join(amount(number * price) for number in hours))
        rows.append(row)
    header = ["device", "memory", "a run", f"all, {at_once} at a time", "device-hours"]
    return header + ["cost"] * (price is not None), rows


def amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:,.3g}"


def training_of(recipe: Recipe) -> Recipe:
    """The same for recipes whose steps take the same time."""
    weight = float(bool(recipe.penalty_weight))
    return dataclasses.replace(recipe, seed=0, penalty_weight=weight, run_name="", output_dir="")


def run_seconds(recipe: Recipe, vocab_size: int, device: Device) -> tuple[float, float] | None:
    """Of a training on one device, as derived and at the most; None where it does not fit."""
    hardware = device.hardware()
    _, micro_batch = fitting_micro_batch(recipe, vocab_size, hardware)
    if not micro_batch:
        return None
    low, high = step_seconds(recipe, vocab_size, micro_batch, hardware)
    return recipe.total_steps() * low, recipe.total_steps() * high
