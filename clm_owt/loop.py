"""The rhythm of a run: evaluate, sample, save, step, log."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from clm_owt.batching import cut, is_out_of_memory, next_smaller, release_cached_memory
from clm_owt.checkpoint import CheckpointWriter, TrainState, take_snapshot
from clm_owt.data.order import TrainingBlocks
from clm_owt.data.token_store import TokenStore
from clm_owt.evaluation import evaluate, perplexity
from clm_owt.machine import Processes, Stopped, StopRequest, Verdict
from clm_owt.modeling import GPT2ForPretraining
from clm_owt.optim import OutlierGuard
from clm_owt.recipe import Recipe
from clm_owt.sampling import sample
from clm_owt.tracking import Throughput, Tracker

# So many steps in a row whose loss or gradient is not finite end the run: the weights are beyond repair by waiting.
MAX_SKIPPED_IN_A_ROW = 3


@dataclass
class Run:
    """All that a step needs. The model is not wrapped; under FSDP2 its parameters are sharded in place."""

    recipe: Recipe
    total_steps: int
    model: GPT2ForPretraining
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    store: TokenStore
    blocks: TrainingBlocks
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    processes: Processes
    stop: StopRequest
    tracker: Tracker
    throughput: Throughput
    checkpoints: CheckpointWriter

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.effective_batch_size * self.recipe.block_size


@dataclass(frozen=True)
class StepResult:
    """Global means over the predicted tokens of one step, the norm of its gradient before clipping, and the rate it
    was taken with. `skipped` says why the weights were left as they were, if they were."""

    loss: float
    ce_loss: float
    penalty: float
    max_prob: float
    entropy: float
    grad_norm: float
    learning_rate: float
    skipped: str | None


def train(run: Run, state: TrainState) -> None:
    """Train from `state` to the end. Raises Stopped, with the last completed step saved, when told to stop."""
    recipe, last = run.recipe, run.total_steps
    began = time.monotonic() - state.elapsed_seconds
    saved_step = state.step  # at the beginning there is nothing to save, after a resumption it is saved already
    guard = OutlierGuard(state.recent_losses, state.recent_grad_norms) if recipe.skip_outliers else None
    not_finite_in_a_row = 0
    try:
        while True:
            step = state.step
            if due(step, recipe.eval_steps, last) and state.validated_step < step:
                validate(run, state)
            if recipe.sample_steps and due(step, recipe.sample_steps, last) and state.sampled_step < step:
                write_samples(run, state)
            if due(step, recipe.save_steps, last) and saved_step < step:
                state.elapsed_seconds = time.monotonic() - began
                run.checkpoints.write(take_snapshot(state, run.model, run.optimizer, run.processes))
                saved_step = step
            if step == last:
                break

            step_began, waited = time.perf_counter(), run.blocks.seconds_waited
            result = train_step(run, state, guard)
            waited = run.blocks.seconds_waited - waited
            run.throughput.add(run.tokens_per_step, time.perf_counter() - step_began - waited, waited)
            state.step += 1
            state.position += recipe.effective_batch_size
            state.tokens += run.tokens_per_step
            if result.skipped or due(state.step, recipe.logging_steps, last):
                log(run, state, result)
            run.tracker.advance(state.step)
            not_finite_in_a_row = not_finite_in_a_row + 1 if result.skipped == "not finite" else 0
            if not_finite_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise FloatingPointError(
                    f"step {state.step}: loss {result.loss}, gradient norm {result.grad_norm}; not finite for "
                    f"{MAX_SKIPPED_IN_A_ROW} steps in a row; lower learning_rate ({recipe.learning_rate:g}) or "
                    "lengthen warmup_steps, and continue from an earlier checkpoint"
                )
    except Stopped:
        state.elapsed_seconds = time.monotonic() - began
        if saved_step < state.step:
            run.checkpoints.write(take_snapshot(state, run.model, run.optimizer, run.processes))
        raise
    finally:
        run.checkpoints.wait()
    state.elapsed_seconds = time.monotonic() - began


def due(step: int, interval: int, last: int) -> bool:
    return step % interval == 0 or step == last


def train_step(run: Run, state: TrainState, guard: OutlierGuard | None) -> StepResult:
    """One optimizer step on the G blocks at `state.position`, exactly, whatever the cut."""
    verdict, sums = accumulate_gradients(run, state)
    while verdict.out_of_memory:
        state.micro_batch = next_smaller(run.recipe.effective_batch_size, run.processes.count, state.micro_batch)
        run.tracker.say(
            f"step {state.step + 1}: out of memory; repeating it with micro-batches of {state.micro_batch}"
        )
        verdict, sums = accumulate_gradients(run, state)
    if verdict.signum is not None:
        run.optimizer.zero_grad(set_to_none=True)
        raise Stopped(verdict.signum)

    parameters = list(run.model.parameters())
    run.processes.sum_gradients(parameters)
    sums = run.processes.sum(sums)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, run.recipe.max_grad_norm)
    # The one place of a step where the host waits for the device.
    loss, ce_loss, penalty, max_prob, entropy, norm = torch.cat([sums, grad_norm.reshape(1)]).tolist()
    skipped = None
    if not (math.isfinite(loss) and math.isfinite(norm)):
        skipped = "not finite"
    elif guard is not None and guard.is_outlier(loss, norm):
        skipped = "outlier"
    learning_rate = run.schedule.get_last_lr()[0]
    if skipped is None:
        run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, ce_loss, penalty, max_prob, entropy, norm, learning_rate, skipped)


def accumulate_gradients(run: Run, state: TrainState) -> tuple[Verdict, torch.Tensor]:
    """Forward and backward of this process's micro-batches, without a word to the others; then their agreement.

    Gives the verdict and the process's part [5] of loss, ce_loss, penalty, max_prob and entropy, float32 on the
    device: divided by the tokens of the whole global batch, so that parts of micro-batches and processes add up.
    """
    recipe, device = run.recipe, run.accelerator.device
    predicted_tokens = recipe.effective_batch_size * (recipe.block_size - 1)
    sums = torch.zeros(5, device=device)
    out_of_memory = False
    try:
        for piece in cut(recipe.effective_batch_size, run.processes.count, run.processes.rank, state.micro_batch):
            run.stop.check()
            input_ids = to_device(run.blocks.read(state.position + piece.start, state.position + piece.stop), device)
            with run.accelerator.autocast():
                output = run.model(input_ids=input_ids, labels=input_ids, num_items_in_batch=predicted_tokens)
            output.loss.backward()
            parts = (output.loss.detach(), output.ce_loss, output.penalty, output.max_prob, output.entropy)
            sums += torch.stack(parts)
            del output
    except Stopped:
        pass  # the others learn of it in the agreement
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    verdict = run.processes.agree(out_of_memory, run.stop.signum)
    if verdict.out_of_memory:
        run.optimizer.zero_grad(set_to_none=True)
        release_cached_memory()
    return verdict, sums


def to_device(blocks: np.ndarray, device: torch.device) -> torch.Tensor:
    """Token ids as a tensor on `device`. From pinned memory, since a copy from pageable memory would wait for the
    work queued on the GPU (not run on one by the project yet)."""
    tensor = torch.from_numpy(blocks)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def validate(run: Run, state: TrainState) -> None:
    result = evaluate(
        run.model,
        run.store.validation,
        run.recipe.block_size,
        state.micro_batch,
        run.accelerator,
        run.processes,
        run.stop,
    )
    best = state.best_validation_loss
    state.best_validation_loss = result.loss if best is None else min(best, result.loss)
    state.validated_step = state.step
    run.tracker.validation_row(
        {
            "step": state.step,
            "loss": result.loss,
            "ce_loss": result.loss,
            "penalty": result.penalty,
            "max_prob": result.max_prob,
            "entropy": result.entropy,
            "perplexity": result.perplexity,
            "tokens": state.tokens,
        }
    )
    run.tracker.say(f"step {state.step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:,.2f}")


def write_samples(run: Run, state: TrainState) -> None:
    """Continue the recipe's prompts. Each step has its own seed, so that samples of one step do not depend on others.

    Every process samples where the parameters are sharded, since the forward pass is collective there.
    """
    recipe = run.recipe
    if run.processes.sharded or run.accelerator.is_main_process:
        continuations = sample(
            run.model,
            run.tokenizer,
            recipe.sample_prompts,
            max_new_tokens=recipe.sample_max_new_tokens,
            temperature=recipe.sample_temperature,
            top_p=recipe.sample_top_p,
            seed=recipe.seed + state.step,
        )
        run.tracker.samples(state.step, recipe.sample_prompts, continuations)
    state.sampled_step = state.step
    run.processes.agree_to_stop(run.stop)


def log(run: Run, state: TrainState, result: StepResult) -> None:
    row = {
        "step": state.step,
        "epoch": state.position / run.store.train_blocks if run.store.train_blocks else None,
        "loss": result.loss,
        "ce_loss": result.ce_loss,
        "penalty": result.penalty,
        "max_prob": result.max_prob,
        "entropy": result.entropy,
        "perplexity": perplexity(result.ce_loss),
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens": state.tokens,
        "micro_batch": state.micro_batch,
        **run.throughput.read(),
    }
    if result.skipped:
        row["skipped"] = result.skipped
        run.tracker.say(
            f"step {state.step}: skipped ({result.skipped}): loss {result.loss:.4g}, "
            f"gradient norm {result.grad_norm:.4g}; the weights are as before"
        )
    run.tracker.train_row(row)
