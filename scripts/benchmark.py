"""What this machine gives: training steps of a recipe's model, beside the usual ways of doing the same.

    python scripts/benchmark.py --recipe recipes/owt_512.yaml          training steps
    python scripts/benchmark.py head --recipe recipes/owt_512.yaml     linear head and loss alone
    python scripts/benchmark.py logits --run runs/quickstart           what it costs to round logits to bf16
    python scripts/benchmark.py save --recipe recipes/owt_512.yaml     what a checkpoint costs the training
    python scripts/benchmark.py data --recipe recipes/owt_512.yaml     from text to a store (benchmark_data.py)
    python scripts/benchmark.py gpu --recipe recipes/owt_512.yaml      where a GPU's time goes (benchmark_gpu.py)

Random blocks: neither data nor tokenizer is needed. The paths take turns, round after round, and the product of two
2048 x 2048 matrices is timed between them, since where a machine's speed drifts only the ratios within one run mean
anything. Options of the recipe may follow (--n_layer 4 --penalty_weight 0.01). One process, one device, in the
precision of `accelerate launch --num_processes 1 --mixed_precision bf16 scripts/benchmark.py ...`, or in several by
turns: --precision no bf16. Each turn begins with a step that is not measured, so that memory is as the steps of this
path leave it; on a CPU "ours" keeps what is freed, as a run does.

    ours           clm_owt: the fused loss
    transformers   GPT2LMHeadModel as it comes, with labels; the penalty, if any, by autograd on its logits
    plain          PyTorch without transformers (scripts/plain_gpt2.py), no penalty
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, would announce every start

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from plain_gpt2 import PlainGPT2
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.loss.loss_utils import ForCausalLMLoss

from clm_owt.evaluation.windows import recipe_windows
from clm_owt.formatting import format_bytes, markdown_table
from clm_owt.model.gpt2 import EXPORTED_ACTIVATION, build_model, compile_blocks, model_config
from clm_owt.model.losses import fused_linear_loss, softmax_and_gradient
from clm_owt.optimizers import OPTIMIZERS
from clm_owt.planning.plan import flops_per_token
from clm_owt.program import count, output_file, run_script
from clm_owt.recipe import PENALTY_TYPES, Recipe
from clm_owt.recipe_reader import load_recipe
from clm_owt.state import TrainState
from clm_owt.training.checkpoint import CheckpointWriter, copy_to_host, take_snapshot
from clm_owt.training.device_memory import keep_freed_memory
from clm_owt.training.launch import find_hardware
from clm_owt.training.muon import Muon, product_type
from clm_owt.training.processes import Processes
from clm_owt.training.trained_model import load_trained

# Of the inputs of products, by precision.
COMPUTE_TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEP_PATHS = ("ours", "transformers", "plain")
GPT2_VOCABULARY = 50_257
PRODUCT_SIZE = 2048


@dataclass
class Case:
    """One way to do the work, and what was measured of it. `run()` does it once and gives the seconds of its parts."""

    name: str
    precision: str
    run: Callable[[], dict[str, float]]
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def path(self) -> str:
        return self.name.split(",")[0]

    def warm_up(self, device: torch.device) -> None:
        """Do it once unmeasured, with memory managed as where this path is at home, so that what is measured then
        finds the state that it would have left itself."""
        if device.type == "cpu":
            keep_freed_memory(self.path == "ours")
        self.run()


def main(argv: list[str]) -> None:
    commands = {
        "step": benchmark_step,
        "head": benchmark_head,
        "logits": benchmark_logits,
        "save": benchmark_save,
        "data": benchmark_preparation,
        "gpu": benchmark_on_gpu,
    }
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in commands else ("step", argv)
    commands[command](rest)


def benchmark_preparation(argv: list[str]) -> None:
    """From text to a token store (benchmark_data.py)."""
    import benchmark_data

    benchmark_data.main(argv)


def benchmark_on_gpu(argv: list[str]) -> None:
    """Steps by micro-batch, and what their time goes into (benchmark_gpu.py)."""
    import benchmark_gpu

    benchmark_gpu.main(argv)


def create_parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"benchmark.py {command}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=count, default=5, help="measured repetitions (default: %(default)s)")
    parser.add_argument("--paths", nargs="+", metavar="PATH", help="only these (default: all)")
    parser.add_argument("--penalties", nargs="*", metavar="TYPE", choices=PENALTY_TYPES, help=PENALTIES_HELP)
    parser.add_argument("--vocab_size", type=count, help="default: the recipe's, or GPT-2's 50,257")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write all measurements there")
    return parser


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", nargs="+", choices=COMPUTE_TYPES, help=PRECISION_HELP)


PRECISION_HELP = "the precision of products, or several by turns (default: that of accelerate launch; no: float32)"
PENALTIES_HELP = "also these penalty types, beside no penalty (no value: all four), at the recipe's weight or 0.01"


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, Recipe]:
    options, rest = parser.parse_known_args(argv)
    recipe = load_recipe(rest)
    options.vocab_size = options.vocab_size or recipe.train_tokenizer_vocab_size or GPT2_VOCABULARY
    if options.penalties is None:
        options.penalties = [(recipe.penalty_type, recipe.penalty_weight)]
    else:
        weight = recipe.penalty_weight or 0.01
        options.penalties = [(recipe.penalty_type, 0.0)] + [(p, weight) for p in options.penalties or PENALTY_TYPES]
    return options, dataclasses.replace(recipe, init_from=None)


def benchmark_step(argv: list[str]) -> None:
    """Complete optimizer steps of one micro-batch: forward, backward, clipping, optimizer."""
    parser = create_parser("step")
    add_precision(parser)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, help="by turns (default: the recipe's)")
    parser.add_argument("--micro_batch", type=count, default=1, help="blocks of a step (default: %(default)s)")
    parser.add_argument(
        "--profile", metavar="FILE", type=output_file, help="write a torch profiler trace of the first path"
    )
    options, recipe = parse(parser, argv)
    accelerator = Accelerator()
    precisions = options.precision or [accelerator.mixed_precision]
    shape = (options.micro_batch, recipe.block_size)
    blocks = torch.randint(options.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    blocks = blocks.to(accelerator.device)
    weights = build_model(recipe, options.vocab_size, eos_token_id=0).state_dict()

    cases = []
    for path, optimizer in itertools.product(options.paths or STEP_PATHS, options.optimizers or [recipe.optimizer]):
        model, loss = model_and_loss(path, recipe, options.vocab_size, weights, accelerator.device)
        step = TrainingStep(model, dataclasses.replace(recipe, optimizer=optimizer), accelerator)
        for precision, penalty in itertools.product(precisions, options.penalties if path != "plain" else [("", 0.0)]):
            name = case_name(path, penalty, options.precision and precision, options.optimizers and optimizer)
            work = partial(step, partial(loss, blocks=blocks, penalty=penalty), precision)
            cases.append(Case(name, precision, work))

    products = measure(cases, options.rounds, accelerator)
    parameters = sum(tensor.numel() for name, tensor in weights.items() if name != "lm_head.weight")
    flops = blocks.numel() * flops_per_token(parameters, recipe.n_layer, recipe.n_embd, recipe.block_size)
    title = f"{parameters / 1e6:.1f} M parameters, one optimizer step of {shape[0]} x {shape[1]} tokens"
    report(title, cases, products, blocks.numel(), flops, accelerator, options)
    if options.profile:
        with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
            cases[0].run()
        profile.export_chrome_trace(str(options.profile))
        print(f"profile of {cases[0].name}: {options.profile} (open it in chrome://tracing or ui.perfetto.dev)")


def model_and_loss(
    path: str, recipe: Recipe, vocab_size: int, weights: dict[str, Tensor], device: torch.device
) -> tuple[torch.nn.Module, Callable[..., Tensor]]:
    """The model of a path, with these weights of a GPT2LMHeadModel, and what gives its loss."""
    if path == "plain":
        model = PlainGPT2(vocab_size, recipe.block_size, recipe.n_layer, recipe.n_head, recipe.n_embd)
        return model.load_gpt2(weights), loss_of_plain
    if path == "ours":
        model = build_model(recipe, vocab_size, eos_token_id=0)
        compile_blocks(model, recipe.torch_compile, device)
        return model, loss_of_ours
    model = GPT2LMHeadModel(usual_config(recipe, vocab_size))
    model.load_state_dict(weights)
    model.loss_type = "ForCausalLM"
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, loss_of_transformers


class TrainingStep:
    """One optimizer step on one micro-batch, as the training loop takes it, timed in its parts. `precision`: another
    than the accelerator's."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, accelerator: Accelerator):
        self.model = model.to(accelerator.device).train()
        # So that all repetitions are of nearly one model.
        slow = dataclasses.replace(recipe, learning_rate=1e-6, embedding_learning_rate=None)
        self.optimizer = OPTIMIZERS[recipe.optimizer].build(self.model, slow)
        self.max_grad_norm = recipe.max_grad_norm
        self.accelerator = accelerator

    def __call__(self, loss_of: Callable[[torch.nn.Module], Tensor], precision: str | None = None) -> dict[str, float]:
        precision = precision or self.accelerator.mixed_precision
        if isinstance(self.optimizer, Muon):
            self.optimizer.product_type = product_type(self.accelerator.device, precision)
        clock = Clock()
        with autocast(precision, self.accelerator.device):
            loss = loss_of(self.model)
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        torch.stack((loss.detach(), norm)).tolist()
        clock.lap("clipping")
        self.optimizer.step()
        clock.lap("optimizer")
        self.optimizer.zero_grad(set_to_none=True)
        del loss
        clock.lap("freeing")
        return clock.parts


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """What `Accelerator.autocast` gives in that precision."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, COMPUTE_TYPES.get(precision, torch.bfloat16))  # fp8: bf16 outside of its layers


def loss_of_ours(model: torch.nn.Module, blocks: Tensor, penalty: tuple[str, float]) -> Tensor:
    model.penalty_type, model.penalty_weight = penalty
    return model(input_ids=blocks, labels=blocks).loss


def loss_of_plain(model: torch.nn.Module, blocks: Tensor, penalty: tuple[str, float]) -> Tensor:
    return model(blocks)


def loss_of_transformers(model: torch.nn.Module, blocks: Tensor, penalty: tuple[str, float]) -> Tensor:
    output = model(input_ids=blocks, labels=blocks, use_cache=False)
    return output.loss + penalty_by_autograd(output.logits[:, :-1], *penalty)


def penalty_by_autograd(logits: Tensor, penalty_type: str, weight: float, top_k: int = 5) -> Tensor | float:
    """`weight` times the mean penalty of logits [m, T, V], written as one would."""
    if weight == 0:
        return 0.0
    if penalty_type == "neg_entropy":
        log_p = logits.float().log_softmax(-1)
        return weight * -(log_p.exp() * log_p).sum(-1).mean()
    p = logits.float().softmax(-1)
    if penalty_type == "top_k_mass":
        return weight * (1 - p.topk(top_k).values.sum(-1)).mean()
    max_prob = p.amax(-1).mean()
    return weight * (1 - max_prob if penalty_type == "non_max_sum" else -max_prob)


def usual_config(recipe: Recipe, vocab_size: int) -> GPT2Config:
    """The recipe's model as transformers would train it: with GPT-2's own activation."""
    config = model_config(recipe, vocab_size, eos_token_id=0)
    config.activation_function = EXPORTED_ACTIVATION
    return config


def benchmark_head(argv: list[str]) -> None:
    """Linear head and loss alone, forward and backward, from hidden states to the gradients of both their inputs."""
    parser = create_parser("head")
    add_precision(parser)
    parser.add_argument(
        "--blocks",
        type=count,
        default=8,
        help="blocks of the recipe's length (default: %(default)s)",
    )
    options, recipe = parse(parser, argv)
    accelerator = Accelerator()
    precisions = options.precision or [accelerator.mixed_precision]
    torch.manual_seed(0)
    shape = (options.blocks, recipe.block_size)
    labels = torch.randint(options.vocab_size, shape).to(accelerator.device)
    hidden = torch.randn(*shape, recipe.n_embd).to(accelerator.device).requires_grad_()
    weight = torch.randn(options.vocab_size, recipe.n_embd).mul_(0.02).to(accelerator.device).requires_grad_()
    targets = labels[:, 1:].flatten()

    def ours(penalty: tuple[str, float]) -> Tensor:
        rows = hidden[:, :-1].flatten(0, 1)
        penalty_type, penalty_weight = penalty
        return fused_linear_loss(
            rows, weight, targets, num_items=len(rows), penalty_type=penalty_type, penalty_weight=penalty_weight
        ).loss

    def transformers(penalty: tuple[str, float]) -> Tensor:
        logits = F.linear(hidden, weight)
        return ForCausalLMLoss(logits, labels, options.vocab_size) + penalty_by_autograd(logits[:, :-1], *penalty)

    def run(loss_of: Callable[[], Tensor], precision: str) -> dict[str, float]:
        clock = Clock()
        with autocast(precision, accelerator.device):
            loss = loss_of()
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        hidden.grad = weight.grad = None
        return clock.parts

    functions = {"ours": ours, "transformers": transformers}
    cases = [
        Case(
            case_name(path, penalty, precision if options.precision else None),
            precision,
            partial(run, partial(functions[path], penalty), precision),
        )
        for path, precision, penalty in itertools.product(options.paths or functions, precisions, options.penalties)
    ]
    products = measure(cases, options.rounds, accelerator)
    title = f"head and loss of {shape[0]} x {shape[1]} tokens, vocabulary {options.vocab_size}, width {recipe.n_embd}"
    flops = 6.0 * len(targets) * options.vocab_size * recipe.n_embd
    report(title, cases, products, labels.numel(), flops, accelerator, options)


def benchmark_logits(argv: list[str]) -> None:
    """What `logits_dtype: compute` costs under bf16: loss and gradients of a finished run's model on its validation
    blocks with logits rounded to bf16, against the same products in float32."""
    parser = argparse.ArgumentParser(prog="benchmark.py logits", description=benchmark_logits.__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="a finished run")
    options = parser.parse_args(argv)
    model, tokenizer = load_trained(str(options.run), revision=None)
    windows = recipe_windows(str(options.run / "recipe.yaml"), tokenizer, model.config.n_positions, stride=None)
    ids = torch.stack([torch.from_numpy(block) for block, _ in windows])
    with torch.no_grad():
        hidden = model.transformer(ids).last_hidden_state[:, :-1].flatten(0, 1)
    weight, targets = model.transformer.wte.weight.detach(), ids[:, 1:].flatten()

    def rounding(logits: Tensor, *arguments, **settings):
        return softmax_and_gradient(logits.bfloat16(), *arguments, **settings)

    found = []
    for softmax in (softmax_and_gradient, rounding):
        inputs = [tensor.bfloat16().float().requires_grad_() for tensor in (hidden, weight)]
        loss = fused_linear_loss(*inputs, targets, num_items=len(targets), softmax=softmax).loss
        loss.backward()
        found.append((loss.item(), *(tensor.grad for tensor in inputs)))
    (exact, *gradients), (rounded, *others) = found
    print(f"{len(targets):,} predictions: loss {exact:.6f}, of rounded logits {rounded - exact:+.6f}")
    for name, gradient, other in zip(("hidden states", "head"), gradients, others, strict=True):
        distance, least = ((g - gradient).norm() / gradient.norm() for g in (other, gradient.bfloat16()))
        print(f"gradient of the {name}: {distance:.2%} away; its own rounding to bf16 moves it by {least:.2%}")


def benchmark_save(argv: list[str]) -> None:
    """What a checkpoint costs: the time that the training stands still beside that of copying its tensors to host
    memory, and what writing, meanwhile, adds to the steps after it."""
    parser = create_parser("save")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    options, recipe = parse(parser, argv)
    accelerator = Accelerator()
    processes = Processes(accelerator)
    model = build_model(recipe, options.vocab_size, eos_token_id=0)
    step = TrainingStep(model, recipe, accelerator)
    blocks = torch.randint(options.vocab_size, (1, min(recipe.block_size, 128))).to(accelerator.device)
    work = partial(step, partial(loss_of_ours, blocks=blocks, penalty=options.penalties[0]))
    work()  # gives the optimizer its state
    optimizer = step.optimizer
    tensors = dict(model.named_parameters())
    tensors |= {f"{n}/{m}": v for n, p in list(tensors.items()) for m, v in optimizer.state[p].items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    copies, blocked, written, added = [], [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        writer = CheckpointWriter(Path(folder) / "checkpoints", total_limit=1)
        for number in range(1, options.rounds + 1):
            usual = seconds(work, accelerator.device)
            copies.append(seconds(lambda: copy_to_host(tensors, keep=True), accelerator.device))

            def save(number: int = number) -> None:
                writer.write(take_snapshot(TrainState(step=number), model, optimizer, processes))

            blocked.append(seconds(save, accelerator.device))
            began, steps = time.perf_counter(), 0
            while not writer._pending.done():
                work()
                steps += 1
            written.append(time.perf_counter() - began)
            added.append(written[-1] - steps * min(usual, seconds(work, accelerator.device)))
            writer.wait()
    lines = {
        "copy to host memory (s)": copies,
        "the training stands still (s)": blocked,
        "as a multiple of the copy": [b / c for b, c in zip(blocked, copies, strict=True)],
        "written meanwhile, beside steps (s)": written,
        "which these steps lost (s)": added,
    }
    print(f"{format_bytes(size)} of state, {options.rounds} saves; median (and all)")
    for name, values in lines.items():
        print(f"  {name:36} {statistics.median(values):6.2f}   ({', '.join(f'{v:.2f}' for v in values)})")


def case_name(
    path: str, penalty: tuple[str, float], precision: str | None = None, optimizer: str | None = None
) -> str:
    """The name of a way to do the work, with its penalty where there is one, and the optimizer and the precision that
    were asked for."""
    penalty_type, weight = penalty
    precision = "float32" if precision == "no" else precision
    return ", ".join(filter(None, (path, optimizer, f"{penalty_type} {weight:g}" if weight else None, precision)))


class Clock:
    """Seconds of the parts of a step. Nothing waits between them: on an accelerator they are the host's alone."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = now - self._last
        self._last = now


def measure(cases: list[Case], rounds: int, accelerator: Accelerator) -> dict[str, list[float]]:
    """Every case twice unmeasured, the second time for its peak memory, then `rounds` times in turn, each time after
    once unmeasured. Gives the seconds of the matrix products in between, by precision."""
    device = accelerator.device
    factors = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, device=device)
    products: dict[str, list[float]] = {case.precision: [] for case in cases}
    for case in cases:
        case.warm_up(device)
        case.peak_bytes = peak_bytes(case.run, device)
    for _ in range(rounds):
        for case in cases:
            a, b = factors.to(COMPUTE_TYPES.get(case.precision, torch.bfloat16))
            for _ in range(3):
                products[case.precision].append(seconds(partial(torch.mm, a, b), device))
            case.warm_up(device)
            case.seconds.append(seconds(lambda case=case: case.parts.append(case.run()), device))
    return products


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that tensors take at the peak of `work` beyond those held at its beginning; on MPS unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if device.type == "cpu":
        with torch.profiler.profile(profile_memory=True) as profile:
            work()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())))
    return None


def report(
    title: str,
    cases: list[Case],
    products: dict[str, list[float]],
    tokens: int,
    flops: float,
    accelerator: Accelerator,
    options: argparse.Namespace,
) -> None:
    """Print the results as a Markdown table, and write them to `--json`. One run of a case is `tokens` and `flops`."""
    hardware = find_hardware(accelerator, Processes(accelerator))
    is_cpu, peak = hardware.device_type == "cpu", hardware.peak_flops
    threads = f", {torch.get_num_threads()} threads" if is_cpu else ""
    rates = {precision: 2 * PRODUCT_SIZE**3 / statistics.median(times) for precision, times in products.items()}
    paths = [case.path for case in cases]
    base_path = next((path for path in ("transformers", "plain") if path in paths), paths[0])
    bases = {case.precision: case for case in reversed(cases) if case.path == base_path}
    bases = [bases[precision] for precision in products]
    print(f"{title}\n{hardware.device_name}{threads}, precision {' '.join(products)}, torch {torch.__version__}")
    for precision, times in products.items():
        least, most = (2 * PRODUCT_SIZE**3 / time / 1e9 for time in (max(times), min(times)))
        print(
            f"product of {PRODUCT_SIZE} x {PRODUCT_SIZE}, precision {precision}: {rates[precision] / 1e9:,.0f} "
            f"GFLOP/s [{least:,.0f}, {most:,.0f}]"
        )
    print(f"{options.rounds} rounds, median [least, most]; {flops / 1e9:,.0f} GFLOP a run\n")
    columns = ["path", "seconds", "tokens/s", *(f"× {base.name}" for base in bases), "of product rate", "peak memory"]
    columns += ["outside"] * is_cpu + ["MFU"] * (peak is not None)
    rows = []
    for case in cases:
        middle = statistics.median(case.seconds)
        # Rounds hold what drifts: the ratio is the median of the rounds' own.
        ratios = (
            statistics.median(b / own for own, b in zip(case.seconds, base.seconds, strict=True)) for base in bases
        )
        row = [
            case.name,
            f"{middle:.3f} [{min(case.seconds):.3f}, {max(case.seconds):.3f}]",
            f"{tokens / middle:,.0f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{flops / middle / rates[case.precision]:.0%}",
            "unknown" if case.peak_bytes is None else format_bytes(case.peak_bytes),
        ]
        if is_cpu:
            inside = [sum(p.get(k, 0) for k in ("forward", "backward", "optimizer")) for p in case.parts]
            outside = [1 - part / total for part, total in zip(inside, case.seconds, strict=True)]
            row.append(f"{statistics.median(outside):.1%}")
        if peak is not None:
            row.append(f"{flops / middle / peak:.1%}")
        rows.append(row)
    print(markdown_table(columns, rows))
    if options.json:
        measured = {
            "title": title,
            "device": hardware.device_name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "tokens": tokens,
            "flops": flops,
            "product_seconds": products,
            "cases": [{k: v for k, v in vars(case).items() if k != "run"} for case in cases],
        }
        options.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
