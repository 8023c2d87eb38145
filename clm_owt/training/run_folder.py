"""The run's folder: what was asked (recipe.yaml), what it implied and on what it ran (plan.json), how it went."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from clm_owt.data.ngrams import ngram_baselines
from clm_owt.data.sources import Source
from clm_owt.data.token_store import TokenStore
from clm_owt.errors import InputError
from clm_owt.file_lock import check_writable
from clm_owt.files import remove_leftovers, replacing, replacing_folder, write_text
from clm_owt.formatting import format_clock
from clm_owt.model.fp8 import transpose_linear_weights
from clm_owt.model.gpt2 import GPT2ForPretraining
from clm_owt.planning.devices import Hardware
from clm_owt.planning.plan import Plan
from clm_owt.recipe import FREE_IN_A_BRANCH, REMOVED_KEYS, Recipe, default_of, show
from clm_owt.reports.record import read_metrics, read_plan, read_recipe, split_rows, task_metrics
from clm_owt.state import TrainState
from clm_owt.training.checkpoint import copy_to_host, find_corruption, find_newest
from clm_owt.training.micro_batch_search import MicroBatchSearch
from clm_owt.training.processes import Processes
from clm_owt.training.run_lock import run_lock

# Data up to this many tokens are also modelled by unigrams and bigrams, for comparison; it takes seconds.
BASELINE_TOKENS = 20_000_000
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "gigatoken", "huggingface_hub", "numpy")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ExistingRun:
    """What the run's folder holds when the command starts."""

    plan: dict[str, object] | None = None
    checkpoint: Path | None = None  # to continue from; None: from the start
    remarks: tuple[str, ...] = ()  # on what it continues from, and why
    finished: bool = False
    branches_off: bool = False  # `plan` and `checkpoint` are those of the run that this one leaves

    def pin_data(self, recipe: Recipe) -> Recipe:
        """The recipe, reading the very commit of the dataset that the run began with."""
        commit = self.plan["source"]["commit"] if self.plan else None
        return dataclasses.replace(recipe, dataset_revision=commit) if commit else recipe

    @property
    def resumed_after(self) -> list[int]:
        """The steps after which the run was continued, this session included."""
        if self.checkpoint is None:
            return []
        step = json.loads((self.checkpoint / "state.json").read_text(encoding="utf-8"))["step"]
        return [before for before in (self.plan or {}).get("resumed_after", []) if before <= step] + [step]

    @property
    def reached(self) -> str:
        """How far the run is and what is saved of it, for the line that is printed when it is stopped."""
        return f"after step {self.resumed_after[-1]}, saved" if self.checkpoint else "before the first step"

    @property
    def micro_batch_search(self) -> dict[str, object] | None:
        return self.plan.get("micro_batch_search") if self.plan else None

    def check_same_data(self, store: str) -> None:
        """Raises InputError if the token store is not the one that the run began with."""
        if self.checkpoint is not None and self.plan["store"] != store:
            key = "branch_from" if self.branches_off else "output_dir"
            raise InputError(
                f"{key}: the run there began with other data or another tokenizer (token store "
                f"{self.plan['store']}, now {store}): files, packages or the tokenizer have changed since; "
                "restore them, or give another output_dir"
            )


def claim(recipe: Recipe, plan_only: bool, stack: contextlib.ExitStack) -> bool:
    """Lock the run's folder until `stack` ends, unless nothing is to be written to it; whether it is locked. Raises
    InputError where another process holds it, or it holds another run, or this one and it is not to be continued."""
    folder = Path(recipe.output_dir)
    to_be_locked = not plan_only and not (recipe.resume_from_checkpoint == "auto" and is_complete(folder))
    if plan_only:
        check_writable("output_dir", folder)
    if to_be_locked:
        stack.enter_context(run_lock(folder))
    plan_of_same_run(recipe, folder)
    return to_be_locked


def find_existing_run(recipe: Recipe, fetch: Callable[[Recipe], None] | None = None) -> ExistingRun:
    """The run that the command continues, if there is one. `fetch` may put a newer checkpoint into its folder first.

    Raises InputError where the folder holds another run, or this one and it is not to be continued.
    """
    folder = Path(recipe.output_dir)
    if fetch is not None:
        fetch(recipe)
    plan = plan_of_same_run(recipe, folder)
    finished = recipe.resume_from_checkpoint == "auto" and bool(plan) and "finished" in plan
    missing = missing_model_files(folder) if finished else []
    if finished and not missing:
        return ExistingRun(plan, finished=True)
    if recipe.resume_from_checkpoint == "never":
        return find_branch_point(recipe) if recipe.branch_from else ExistingRun()
    if recipe.resume_from_checkpoint == "auto":
        checkpoint, passed_over = find_newest(folder / "checkpoints")
        if checkpoint is None and missing:
            raise InputError(
                f"output_dir: the run in {folder} is finished, but lacks {describe(missing)}, and checkpoints to "
                "export it from; restore either from a copy, or remove the folder to train again"
            )
        if plan is None and (checkpoint is not None or (folder / "model").exists()):
            raise InputError(
                f"output_dir: {folder} holds checkpoints or a model but lacks recipe.yaml or plan.json; restore them "
                "from a copy, or give another output_dir"
            )
        if checkpoint is None and recipe.branch_from:
            return find_branch_point(recipe)
    else:
        checkpoint, passed_over = Path(recipe.resume_from_checkpoint).absolute(), []
        plan = plan_of_same_run(recipe, checkpoint.parent.parent)
        if plan is None:
            raise InputError(
                f"resume_from_checkpoint: {checkpoint} does not lie in a run's folder, with recipe.yaml and plan.json "
                "two levels above it"
            )
        reason = find_corruption(checkpoint)
        if reason is not None:
            raise InputError(f"resume_from_checkpoint: {checkpoint}: {reason}; give a complete one, or auto")
    remarks = [f"Passed over {line}" for line in passed_over]
    if missing:
        remarks.append(
            f"The run is finished, but lacks {describe(missing)}: exported again from its newest checkpoint"
        )
    return ExistingRun(plan, checkpoint, tuple(remarks))


def is_finished(folder: Path) -> bool:
    try:
        return "finished" in read_plan(folder)
    except InputError:
        return False


def is_complete(folder: Path) -> bool:
    """Whether the run in `folder` is finished, with its exported model."""
    return is_finished(folder) and not missing_model_files(folder)


def missing_model_files(folder: Path) -> list[str]:
    """The files of the exported model that are not there."""
    return [name for name in MODEL_FILES if not (folder / "model" / name).is_file()]


def describe(missing: Sequence[str]) -> str:
    """Missing files of the exported model, for a line."""
    return "model/" if len(missing) == len(MODEL_FILES) else ", ".join(f"model/{name}" for name in missing)


def plan_of_same_run(recipe: Recipe, folder: Path) -> dict[str, object] | None:
    """The plan of the run in `folder`, if there is one. Raises InputError if it is another run than the recipe's, or
    this one and it is not to be continued."""
    if not ((folder / "recipe.yaml").exists() and (folder / "plan.json").exists()):
        return None
    try:
        plan, different = read_plan(folder), differences(recipe, read_recipe(folder))
    except InputError as error:
        raise InputError(f"output_dir: {error};\n  restore it from a copy, or give another output_dir") from error
    if different:
        changes = ", ".join(different.values())
        if (folder / "model").exists():
            way_on = f"or begin a new run from its weights: --init_from {folder}/model --output_dir {folder}-2"
        else:
            way_on = f"when it has ended, --init_from {folder}/model begins a new run from its weights"
        raise InputError(f"output_dir: {folder} holds another run ({changes}); give another output_dir,\n  {way_on}")
    if recipe.resume_from_checkpoint == "never":
        raise InputError(
            f"output_dir: {folder} holds this run already, and resume_from_checkpoint is never; "
            "remove the folder or give another output_dir"
        )
    return plan


def differences(recipe: Recipe, begun: dict[str, object]) -> dict[str, str]:
    """How the settings that shape a result differ from those of a recipe.yaml, by key: `name: before -> now`."""
    now = recipe.to_dict()
    # A key that did not exist yet when the run began had its default's effect.
    before = {name: begun.get(name, default_of(name)) for name in recipe.result_settings()}
    before |= {name: begun[name] for name in REMOVED_KEYS if begun.get(name) is not None}
    return {
        name: f"{name}: {show(value)} -> {show(now.get(name))}"
        for name, value in before.items()
        if value != now.get(name)
    }


def find_branch_point(recipe: Recipe) -> ExistingRun:
    """The run that a new one leaves at the checkpoint `branch_from`, as if it were to be continued.

    Raises InputError where there is no whole checkpoint, or where its run differs in more than a branch may.
    """
    checkpoint = Path(recipe.branch_from).absolute()
    trunk = checkpoint.parent.parent
    reason = find_corruption(checkpoint)
    if reason is not None:
        raise InputError(f"branch_from: {checkpoint}: {reason}; give a complete checkpoint of a run")
    try:
        plan, different = read_plan(trunk), differences(recipe, read_recipe(trunk))
    except InputError as error:
        raise InputError(f"branch_from: {error}; a checkpoint is read with the run's folder around it") from error
    refused = [change for name, change in different.items() if name not in FREE_IN_A_BRANCH]
    if refused:
        raise InputError(
            f"branch_from: {trunk.name} differs in {', '.join(refused)}; a branch may differ in rates, length, decay, "
            "clipping and penalty only"
        )
    return ExistingRun(plan, checkpoint, branches_off=True)


def begin(
    recipe: Recipe,
    plan: Plan,
    search: MicroBatchSearch,
    hardware: Hardware,
    source: Source,
    store: str,
    existing: ExistingRun,
) -> None:
    """Create the run's folder, or renew recipe.yaml and plan.json in it. `store` is the name of the token store."""
    folder = Path(recipe.output_dir)
    if existing.branches_off and plan.total_steps <= existing.resumed_after[-1]:
        raise InputError(
            f"branch_from: {existing.checkpoint} is after step {existing.resumed_after[-1]:,}, and the run would end "
            f"after step {plan.total_steps:,}, counted from the start; raise max_steps or num_train_epochs"
        )
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if existing.branches_off:  # its history, which the log then cuts back to the checkpoint
        for name in ("metrics.jsonl", "samples.md"):
            file = existing.checkpoint.parent.parent / name
            if file.exists() and not (folder / name).exists():
                with replacing(folder / name) as aside:
                    shutil.copyfile(file, aside)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    content = {
        **plan.to_dict(),
        "micro_batch_search": search.to_dict(),
        "source": json.loads(source.to_json()),
        "store": store,
        "resumed_after": existing.resumed_after,
        "environment": environment(hardware),
    }
    write_plan(folder, content)


def export(
    recipe: Recipe,
    model: GPT2ForPretraining,
    tokenizer: PreTrainedTokenizerBase,
    store: TokenStore,
    state: TrainState,
    processes: Processes,
) -> None:
    """Write `model/` with model and tokenizer, in one piece, and what is known at the end to plan.json. Collective."""
    parameters = copy_to_host(dict(model.named_parameters()), keep=processes.is_main)
    if not processes.is_main:
        return
    folder = Path(recipe.output_dir)
    with replacing_folder(folder / "model") as aside:
        model.save_pretrained(aside, state_dict=transpose_linear_weights(model, parameters))
        tokenizer.save_pretrained(aside)
    end: dict[str, object] = {"elapsed_seconds": round(state.elapsed_seconds, 1)}
    if store.complete and store.train_blocks * recipe.block_size <= BASELINE_TOKENS:
        end["baselines"] = ngram_baselines(store, recipe.seed, state.position, len(tokenizer))
    write_plan(folder, read_plan(folder) | end)


def mark_finished(folder: Path) -> None:
    """The last that is written of a run's results: before it, the same command goes on with them."""
    write_plan(folder, read_plan(folder) | {"finished": True})


def write_plan(folder: Path, content: dict[str, object]) -> None:
    write_text(folder / "plan.json", json.dumps(content, indent=2) + "\n")


def environment(hardware: Hardware) -> dict[str, object]:
    """What the run runs on, for whoever wants to repeat it."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": hardware.device_name,
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def summarize(folder: Path) -> list[str]:
    """How a finished run went, from its folder."""
    plan = read_plan(folder)
    metrics = folder / "metrics.jsonl"
    trainings, validations, tasks = split_rows(read_metrics(metrics))
    head = f"Finished {folder.name}: {plan['total_steps']} steps, "
    head += f"{plan['total_steps'] * plan['tokens_per_step']:,} tokens in {format_clock(plan['elapsed_seconds'])}"
    if trainings and validations:
        first, last = validations[0], validations[-1]
        rates = sorted(row["tokens_per_second"] for row in trainings)
        lines = [
            f"{head}, {rates[len(rates) // 2]:,.0f} tokens/s (median)",
            f"  validation loss {first['loss']:.4f} -> {last['loss']:.4f}, perplexity {last['perplexity']:,.2f}; "
            f"last training loss {trainings[-1]['loss']:.4f}",
        ]
    else:
        lines = [head, f"  {metrics} is missing or holds no rows: losses and speed are not known"]
    lines += baseline_lines(plan.get("baselines"))
    if tasks:
        lines.append(f"  zero-shot: {', '.join(f'{name} {value:.4g}' for name, value in task_metrics(tasks[-1]))}")
    lines.append(f"  model in {folder / 'model'}" + (f", metrics in {metrics}" if metrics.exists() else ""))
    if (folder / "samples.md").exists():
        lines.append(f"  samples in {folder / 'samples.md'}")
    return lines


def baseline_lines(baselines: dict[str, float] | None) -> list[str]:
    """What n-gram models reach on the same validation blocks. (A plan.json of an older version has one fit only.)"""
    if not baselines or "unigram_all" not in baselines:
        return []
    fits = [f"  n-gram models of the {baselines['blocks']:,} blocks that it saw: unigram {baselines['unigram']:.4f}, "
            f"smoothed bigram {baselines['bigram']:.4f}"]  # fmt: skip
    if baselines["blocks_all"] > baselines["blocks"]:
        fits.append(
            f"  of all {baselines['blocks_all']:,} training blocks: unigram {baselines['unigram_all']:.4f}, "
            f"smoothed bigram {baselines['bigram_all']:.4f}"
        )
    return fits
