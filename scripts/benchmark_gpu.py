"""What this machine's GPU gives, and where its time goes: `benchmark.py gpu`.

    python scripts/benchmark.py gpu --recipe recipes/owt_512.yaml
    python scripts/benchmark.py gpu --recipe recipes/owt_512.yaml --micro_batches 8 16 32 --json gpu.json

Optimizer steps on the same random blocks, cut into micro-batches of each size, in the precision that the GPU trains in
(bf16, else fp16). The ways take turns, round after round:

    ours             clm_owt, its blocks and its loss compiled
    transformers     GPT2LMHeadModel as it comes, with labels
    plain compiled   PyTorch without transformers (scripts/plain_gpt2.py), as a whole through torch.compile

Then one step of each is profiled, and the time of its kernels is told apart by their names (CLASSES): products,
attention, loss, and the rest, which holds the passes between them, the optimizer and copies, the casts of logits too
where nothing is compiled. "Idle" is the share of a step in which no kernel ran. Tokens/s and MFU are of steps without
the profiler.

Without a GPU this is a dry run: the same code on this CPU with tiny sizes, the operations' names in place of kernels'.
It says so, and its figures mean nothing.
"""

import argparse
import dataclasses
import gc
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from benchmark import TrainingStep, loss_of_ours, loss_of_transformers, peak_bytes, seconds, usual_config
from plain_gpt2 import PlainGPT2
from torch import Tensor
from torch.autograd import DeviceType
from transformers import GPT2LMHeadModel

from clm_owt.formatting import format_bytes, markdown_table
from clm_owt.model.gpt2 import build_model, compile_blocks
from clm_owt.planning.plan import flops_per_token
from clm_owt.program import output_file
from clm_owt.recipe import Recipe
from clm_owt.recipe_reader import load_recipe
from clm_owt.training.device_memory import is_out_of_memory, release_cached_memory
from clm_owt.training.launch import create_accelerator, find_hardware
from clm_owt.training.processes import Processes

PATHS = ("ours", "transformers", "plain compiled")
GPT2_VOCABULARY = 50_257
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64}
TINY_VOCABULARY = 211

# Parts of the names of CUDA kernels, and of operations on a CPU; the first that is found decides.
#   attention: flash_fwd_kernel, fmha_cutlassF_bf16_..., cudnn_generated_fort_native_sdpa_...
#   products: ampere_bf16_s16816gemm_..., sm90_xmma_gemm_..., nvjet_..., cutlass_..., splitKreduce_kernel, gemv
#   loss: what Inductor names after the operations in it (triton_red_fused_add_amax_exp_...), nll_loss and softmax
CLASSES = {
    "attention": r"flash|fmha|sdpa|attention",
    "products": r"gemm|nvjet|cutlass|cublas|splitkreduce|gemv|::(add|b)?mm$|mkldnn_linear|^triton_tem_",
    "loss": r"softmax|nll_loss|cross_entropy|(::|_)(exp|log|log1p|logsumexp|scatter|scatter_add|gather|vecdot)(_|$)",
}
# Inductor's own kernels are passes. Names of operations in them may be those of a product or of attention, beside
# whose outputs they stand (triton_poi_fused_addmm_gelu_...).
INDUCTOR_PASS = r"^triton_(?!tem_)"
SHOWN = ("products", "attention", "loss", "rest")


@dataclass
class Measured:
    """A way to train at a micro-batch: seconds of each step; seconds of one step's kernels by class, and of the step
    that they are of. `error`: why there is nothing else."""

    path: str
    micro_batch: int
    seconds: list[float] = field(default_factory=list)
    classes: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    error: str | None = None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmark.py gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--micro_batches", nargs="+", type=int, metavar="M", help="default: 8 16 32, in a dry run 1 2")
    parser.add_argument("--blocks", type=int, help="of a step (default: twice the largest micro-batch)")
    parser.add_argument("--rounds", type=int, default=5, help="measured repetitions (default: %(default)s)")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS, help="only these (default: all)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write all measurements there")
    options, rest = parser.parse_known_args(argv)
    recipe = dataclasses.replace(load_recipe(rest), init_from=None)
    dry_run = not torch.cuda.is_available()
    if dry_run:
        recipe = dataclasses.replace(recipe, **TINY)
    vocab_size = TINY_VOCABULARY if dry_run else recipe.train_tokenizer_vocab_size or GPT2_VOCABULARY
    sizes = options.micro_batches or ([1, 2] if dry_run else [8, 16, 32])
    blocks = options.blocks or 2 * max(sizes)

    choose_precision()
    accelerator = create_accelerator(recipe)
    measured = []
    for size in sizes:
        measured += measure(options.paths, recipe, vocab_size, size, blocks, options.rounds, accelerator)
    report(measured, recipe, vocab_size, blocks, dry_run, accelerator, options)


def choose_precision() -> None:
    """Unless `accelerate launch` has said which: bf16 on a GPU that has it, else fp16; on a CPU float32."""
    if torch.cuda.is_available():
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        os.environ.setdefault("ACCELERATE_MIXED_PRECISION", precision)


def measure(
    paths: list[str],
    recipe: Recipe,
    vocab_size: int,
    micro_batch: int,
    blocks: int,
    rounds: int,
    accelerator: Accelerator,
) -> list[Measured]:
    """The paths at one micro-batch, in turns. What was compiled for another size is forgotten."""
    torch._dynamo.reset()
    shape = (blocks, recipe.block_size)
    input_ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(accelerator.device)
    pieces = input_ids.split(micro_batch)
    results, steps = [Measured(path, micro_batch) for path in paths], {}

    def attempt(result: Measured, work: Callable[[], None]) -> None:
        """Once out of memory, a path is left out."""
        if result.error is None:
            try:
                work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                result.error = "out of memory"
        if result.error is not None:
            steps.pop(result.path, None)
            release_cached_memory()

    for result in results:

        def prepare(result: Measured = result) -> None:
            steps[result.path] = make_step(result.path, recipe, vocab_size, pieces, accelerator)
            for _ in range(2):  # compiles, and the optimizer gets its state
                steps[result.path]()
            result.peak_bytes = peak_bytes(steps[result.path], accelerator.device)

        attempt(result, prepare)
    for _ in range(rounds):
        for result in results:

            def time_once(result: Measured = result) -> None:
                result.seconds.append(seconds(steps[result.path], accelerator.device))

            attempt(result, time_once)
    for result in results:

        def profile(result: Measured = result) -> None:
            result.classes = seconds_by_class(steps[result.path], accelerator.device)

        attempt(result, profile)
    steps.clear()
    gc.collect()
    release_cached_memory()
    return results


def make_step(
    path: str, recipe: Recipe, vocab_size: int, pieces: tuple[Tensor, ...], accelerator: Accelerator
) -> Callable[[], None]:
    """A function that takes one optimizer step on the micro-batches `pieces`, in the way of `path`."""
    if path == "plain compiled":
        model = PlainGPT2(vocab_size, recipe.block_size, recipe.n_layer, recipe.n_head, recipe.n_embd)
        model.to(accelerator.device)
        backend = "inductor" if accelerator.device.type == "cuda" else "aot_eager"  # a dry run is to be short
        compiled = torch.compile(model, dynamic=False, backend=backend)

        def loss_of(model: torch.nn.Module, piece: Tensor) -> Tensor:
            return compiled(piece)
    elif path == "transformers":
        model = GPT2LMHeadModel(usual_config(recipe, vocab_size))
        model.loss_type = "ForCausalLM"

        def loss_of(model: torch.nn.Module, piece: Tensor) -> Tensor:
            return loss_of_transformers(model, piece, (recipe.penalty_type, recipe.penalty_weight))
    else:
        model = build_model(recipe, vocab_size, eos_token_id=0)
        compile_blocks(model, recipe.torch_compile, accelerator.device)

        def loss_of(model: torch.nn.Module, piece: Tensor) -> Tensor:
            return loss_of_ours(model, piece, (recipe.penalty_type, recipe.penalty_weight))

    step = TrainingStep(model, recipe, accelerator)
    count = sum(len(piece) for piece in pieces)

    def take() -> None:
        for piece in pieces:
            with accelerator.autocast():
                loss = loss_of(step.model, piece) * (len(piece) / count)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), step.max_grad_norm).item()
        step.optimizer.step()
        step.optimizer.zero_grad(set_to_none=True)

    return take


def seconds_by_class(work: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds of the kernels of one call by class, and `step`, the time of all of it, profiled. On a CPU of its
    operations, without those that they call."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profile:
        whole = seconds(work, device)
    found = Counter(dict.fromkeys(SHOWN, 0.0))
    if on_gpu:
        for event in profile.events():
            # Marked regions, as Inductor's around a graph, are events of the device too, and lie over its kernels.
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                found[class_of(event.name)] += event.time_range.elapsed_us() / 1e6
    else:
        for event in profile.key_averages():
            found[class_of(event.key)] += event.self_cpu_time_total / 1e6
    return {**found, "step": whole}


def class_of(name: str) -> str:
    """The class of a kernel or operation: one of SHOWN."""
    name = name.lower()
    kinds = ("loss",) if re.search(INDUCTOR_PASS, name) else CLASSES
    return next((kind for kind in kinds if re.search(CLASSES[kind], name)), "rest")


def report(
    measured: list[Measured],
    recipe: Recipe,
    vocab_size: int,
    blocks: int,
    dry_run: bool,
    accelerator: Accelerator,
    options: argparse.Namespace,
) -> None:
    """One Markdown table, and all measurements in `--json`."""
    hardware = find_hardware(accelerator, Processes(accelerator))
    model = PlainGPT2(vocab_size, recipe.block_size, recipe.n_layer, recipe.n_head, recipe.n_embd)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = blocks * recipe.block_size
    flops = flops_per_token(parameters, recipe.n_layer, recipe.n_embd, recipe.block_size)
    if dry_run:
        print("DRY RUN on a CPU, with tiny sizes: it shows that the benchmark works, and its figures mean nothing.\n")
    print(f"{parameters / 1e6:.1f} M parameters, steps of {blocks} x {recipe.block_size} tokens")
    print(f"{hardware.device_name}, precision {hardware.mixed_precision}, torch {torch.__version__}, "
          f"{options.rounds} rounds, medians [least, most]\n")  # fmt: skip
    rows = []
    for result in measured:
        if result.error:
            rows.append([result.path, result.micro_batch, result.error] + ["-"] * 8)
            continue
        middle = statistics.median(result.seconds)
        base = next((m for m in measured if m.micro_batch == result.micro_batch and m.path == "transformers"), None)
        mfu = f"{tokens / middle * flops / hardware.peak_flops:.1%}" if hardware.peak_flops else "-"
        kernels = [result.classes[kind] for kind in SHOWN]
        whole = max(result.classes["step"], sum(kernels))
        rows.append([
            result.path,
            result.micro_batch,
            f"{tokens / middle:,.0f} [{tokens / max(result.seconds):,.0f}, {tokens / min(result.seconds):,.0f}]",
            mfu,
            median_ratio(base, result) if base and base.seconds and not base.error else "-",
            *(f"{time / whole:.1%}" for time in kernels),
            f"{1 - sum(kernels) / whole:.1%}",
            "-" if result.peak_bytes is None else format_bytes(result.peak_bytes),
        ])  # fmt: skip
    header = ["path", "micro-batch", "tokens/s", "MFU", "× transformers", *SHOWN, "idle", "peak memory"]
    print(markdown_table(header, rows))
    if options.json:
        found = {
            "dry_run": dry_run,
            "device": hardware.device_name,
            "precision": hardware.mixed_precision,
            "torch": torch.__version__,
            "parameters": parameters,
            "tokens": tokens,
            "flops_per_token": flops,
            "peak_flops": hardware.peak_flops,
            "measured": [dataclasses.asdict(result) for result in measured],
        }
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def median_ratio(base: Measured, result: Measured) -> str:
    """How many times as fast as `base`: the median of the rounds' own ratios, since machines drift."""
    return f"{statistics.median(b / own for b, own in zip(base.seconds, result.seconds, strict=True)):.2f}"
