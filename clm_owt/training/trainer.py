"""The rhythm of a run: evaluate, sample, save, step, log."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from clm_owt.batch import MicroBatch, cut, next_smaller
from clm_owt.data.order import TrainingBlocks
from clm_owt.data.token_store import TokenStore
from clm_owt.errors import RunFailed
from clm_owt.model.gpt2 import GPT2ForPretraining
from clm_owt.model.losses import perplexity
from clm_owt.model.sampling import sample
from clm_owt.recipe import Recipe
from clm_owt.state import TrainState
from clm_owt.stopping import Stopped, StopRequest
from clm_owt.tracking.run_log import Throughput, Tracker
from clm_owt.training.checkpoint import CheckpointWriter, random_state, set_random_state, take_snapshot
from clm_owt.training.device_memory import is_out_of_memory, release_cached_memory
from clm_owt.training.micro_batch_search import WHAT_HELPS, DoesNotFit
from clm_owt.training.optim import OutlierGuard
from clm_owt.training.processes import Processes
from clm_owt.training.validation import Evaluation, evaluate

T = TypeVar("T")

# So many steps in a row whose loss or gradient is not finite end the run: the weights are beyond repair by waiting.
MAX_SKIPPED_IN_A_ROW = 3
# So many saves in a row that failed end it too: what it would go on to compute might be lost.
MAX_FAILED_SAVES = 3


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
    pass_on_news: Callable[[], None]  # from the process that builds the token store

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
    run.checkpoints.saved_step = state.step  # at the beginning there is nothing to save, later it is saved already
    saved = done_at_step(state)
    guard = OutlierGuard(state.recent_losses, state.recent_grad_norms) if recipe.skip_outliers else None
    try:
        while True:
            step = state.step
            if due(step, recipe.eval_steps, last) and state.validated_step < step:
                validate(run, state)
            if recipe.sample_steps and due(step, recipe.sample_steps, last) and state.sampled_step < step:
                write_samples(run, state)
            # While numbers go wrong the last checkpoint stays one from before.
            sound = state.not_finite_in_a_row == 0 or step == last
            if due(step, recipe.save_steps, last) and step > 0 and sound and done_at_step(state) != saved:
                state.elapsed_seconds = time.monotonic() - began
                save(run, state)
                saved = done_at_step(state)
            if step == last:
                break

            step_began, waited = time.perf_counter(), run.blocks.seconds_waited
            result = train_step(run, state, guard)
            waited = run.blocks.seconds_waited - waited
            run.throughput.add(run.tokens_per_step, time.perf_counter() - step_began - waited, waited)
            state.step += 1
            state.position += recipe.effective_batch_size
            state.tokens += run.tokens_per_step
            state.not_finite_in_a_row = state.not_finite_in_a_row + 1 if result.skipped == "not finite" else 0
            if result.skipped or due(state.step, recipe.logging_steps, last):
                log(run, state, result)
                run.pass_on_news()
            run.tracker.advance(state.step)
            if state.not_finite_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise RunFailed(
                    f"step {state.step}: loss {result.loss}, gradient norm {result.grad_norm}; not finite for "
                    f"{MAX_SKIPPED_IN_A_ROW} steps in a row, whose blocks metrics.jsonl names; the last checkpoint is "
                    f"from before them. Begin anew with a lower learning_rate (it is {recipe.learning_rate:g}) or a "
                    "longer warm-up, and another output_dir"
                )
        finish_saving(run)
        run.stop.reached = f"after step {last}, saved"
        run.processes.agree_to_stop(run.stop)
    except Stopped:
        state.elapsed_seconds = time.monotonic() - began
        save_at_stop(run, state)
        raise
    except RuntimeError:  # such as a connection that is lost to a process that died
        run.checkpoints.wait()
        if state.step:
            run.stop.reached = f"after step {state.step}, saved up to step {run.checkpoints.saved_step}"
        raise
    finally:
        run.checkpoints.wait()
    state.elapsed_seconds = time.monotonic() - began


def done_at_step(state: TrainState) -> tuple[int, int, int]:
    """Tells a checkpoint from one of the same step that a stop left before its validation or samples."""
    return state.step, state.validated_step, state.sampled_step


def save(run: Run, state: TrainState) -> None:
    """Begin to save. Raises RunFailed, on all processes, if the last saves before have all failed."""
    run.checkpoints.wait()  # one at a time; and its copy is gone before the next is made
    failed = run.processes.gather(run.checkpoints.failed_in_a_row)[0]  # the main process writes
    if failed >= MAX_FAILED_SAVES:
        raise RunFailed(f"{failed} saves in a row have failed, see above; {how_to_go_on(run)}")
    run.checkpoints.write(take_snapshot(state, run.model, run.optimizer, run.processes))


def finish_saving(run: Run) -> None:
    """Wait for the last save. Raises RunFailed, on all processes, if it or the last lines could not be written."""
    run.checkpoints.wait()
    problems = run.tracker.unwritten()
    if run.checkpoints.failed_in_a_row:
        problems.append("the last step could not be saved, see above")
    problems = run.processes.gather(problems)[0]  # the main process writes
    if problems:
        raise RunFailed(f"{'; '.join(problems)}; {how_to_go_on(run)}")
    run.processes.on_main(run.checkpoints.prune)  # a session before may have been killed in doing so


def save_at_stop(run: Run, state: TrainState) -> None:
    """Save the last completed step, unless it is saved, and note for the run's last line what there is."""
    run.checkpoints.wait()
    # The main process alone knows what was written; all must take part in a snapshot or none.
    saved_step = run.processes.gather(run.checkpoints.saved_step)[0]
    if saved_step < state.step:
        run.checkpoints.write(take_snapshot(state, run.model, run.optimizer, run.processes))
        run.checkpoints.wait()
        # Together: when one of its processes has left, a launcher sends the one that still writes a second signal.
        run.processes.gather(None)
    if state.step == 0:
        return
    saved = "saved" if run.checkpoints.saved_step == state.step else f"saved up to step {run.checkpoints.saved_step}"
    run.stop.reached = f"after step {state.step}, {saved}"


def how_to_go_on(run: Run) -> str:
    return f"make room or repair {run.checkpoints.folder}, and the same command continues"


def due(step: int, interval: int, last: int) -> bool:
    return step % interval == 0 or step == last


def train_step(run: Run, state: TrainState, guard: OutlierGuard | None) -> StepResult:
    """One optimizer step on the G blocks at `state.position`, exactly, whatever the cut."""
    random_states = random_state() if run.recipe.dropout else None
    try:
        sums = until_it_fits(run, state, f"step {state.step + 1}", lambda: accumulate_gradients(run, state))
    except Stopped:
        if random_states is not None:  # the step is given up, and will be repeated with the same dropout
            set_random_state(random_states)
        raise
    parameters = list(run.model.parameters())
    run.processes.sum_gradients(parameters)
    sums = run.processes.sum(sums)
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, run.recipe.max_grad_norm))
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


def until_it_fits(run: Run, state: TrainState, what: str, attempt: Callable[[], T]) -> T:
    """The result of `attempt`, which is repeated with a smaller micro-batch as long as it raises DoesNotFit."""
    while True:
        try:
            return attempt()
        except DoesNotFit:
            smaller = next_smaller(run.recipe.effective_batch_size, run.processes.count, state.micro_batch)
            if smaller is None:
                run.processes.refuse(f"{what}: out of memory with one block at a time; {WHAT_HELPS}")
            run.tracker.say(f"{what}: out of memory; repeating it with micro-batches of {smaller}")
            state.micro_batch = smaller


def accumulate_gradients(run: Run, state: TrainState) -> torch.Tensor:
    """Forward and backward of this process's micro-batches, without a word to the others; then their agreement.

    Gives the process's part [5] of loss, ce_loss, penalty, max_prob and entropy, float32 on the device: divided by the
    tokens of the whole global batch, so that parts of micro-batches and processes add up, and gradients with them.
    There is no DistributedDataParallel: nothing inside forward or backward waits for another process, so an error in
    one leaves none hanging. Raises DoesNotFit or Stopped, on all processes together, without gradients left.
    """
    if run.processes.sharded:
        return accumulate_sharded_gradients(run, state)
    sums = torch.zeros(5, device=run.accelerator.device)
    out_of_memory = False
    try:
        run.blocks.wait_for(state.position + run.recipe.effective_batch_size)
        for piece in cut(run.recipe.effective_batch_size, run.processes.count, run.processes.rank, state.micro_batch):
            run.stop.check()
            sums += forward_and_backward(run, state, piece)
    except Stopped:
        pass  # the others learn of it in the agreement
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    # The error is gone by now, and with its traceback the tensors that it held.
    verdict = run.processes.agree(out_of_memory, run.stop.signum)
    if verdict.out_of_memory or verdict.signum is not None:
        run.optimizer.zero_grad(set_to_none=True)
        release_cached_memory()
    if verdict.signum is not None:
        raise Stopped(verdict.signum)
    if verdict.out_of_memory:
        raise DoesNotFit
    return sums


def accumulate_sharded_gradients(run: Run, state: TrainState) -> torch.Tensor:
    """The same under FSDP2, where forward and backward gather parameters from all processes: as many micro-batches on
    each, agreement before the last backward, which alone reduces the gradients, and before the first forward, so that
    none leaves while it waits for data. Memory that ends inside a collective cannot be agreed on: that raises, and the
    others end with the launcher or their process group's timeout.
    """
    recipe, processes = run.recipe, run.processes
    with contextlib.suppress(Stopped):
        run.blocks.wait_for(state.position + recipe.effective_batch_size)
    processes.agree_to_stop(run.stop)
    pieces = cut(recipe.effective_batch_size, processes.count, processes.rank, state.micro_batch, equal_counts=True)
    sums = torch.zeros(5, device=run.accelerator.device)
    try:
        for piece in pieces:
            last = piece is pieces[-1]
            run.model.set_requires_gradient_sync(last)
            agree = functools.partial(processes.agree_to_stop, run.stop) if last else None
            sums += forward_and_backward(run, state, piece, before_backward=agree)
    except Exception as error:
        if is_out_of_memory(error):
            raise RuntimeError(
                f"step {state.step + 1}: out of memory with micro-batches of {state.micro_batch}, inside a step that "
                f"FSDP2 cannot repeat; continue from the last checkpoint with --max_batch_size below that"
            ) from error
        raise
    return sums


def forward_and_backward(
    run: Run, state: TrainState, piece: MicroBatch, before_backward: Callable[[], None] | None = None
) -> torch.Tensor:
    """One micro-batch: its part [5] of the step's statistics. A function of its own, so that nothing of a failed one
    is left in a variable."""
    recipe, start = run.recipe, state.position
    predicted_tokens = recipe.effective_batch_size * (recipe.block_size - 1)
    input_ids = to_device(run.blocks.read(start + piece.start, start + piece.stop), run.accelerator.device)
    with run.accelerator.autocast():
        output = run.model(input_ids=input_ids, labels=piece.labels(input_ids), num_items_in_batch=predicted_tokens)
    if before_backward is not None:
        before_backward()
    output.loss.backward()
    return torch.stack([output.loss.detach(), output.ce_loss, output.penalty, output.max_prob, output.entropy])


def whole(value: torch.Tensor) -> torch.Tensor:
    """A value that may lie in parts on the processes, as FSDP2's gradient norm does. Collective, then."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def to_device(blocks: np.ndarray, device: torch.device) -> torch.Tensor:
    """Token ids as a tensor on `device`. From pinned memory, since a copy from pageable memory would wait for the
    work queued on the GPU (not run on one by the project yet)."""
    tensor = torch.from_numpy(blocks)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def validate(run: Run, state: TrainState) -> None:
    def attempt() -> Evaluation:
        return evaluate(
            run.model,
            run.store.validation,
            run.recipe.block_size,
            state.micro_batch,
            run.accelerator,
            run.processes,
            run.stop,
        )

    result = until_it_fits(run, state, f"validation after step {state.step}", attempt)
    best = state.best_validation_loss
    state.validation_loss = result.loss
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
    recipe, processes, stop = run.recipe, run.processes, run.stop
    if processes.sharded or run.accelerator.is_main_process:
        try:
            continuations = sample(
                run.model,
                run.tokenizer,
                recipe.sample_prompts,
                max_new_tokens=recipe.sample_max_new_tokens,
                temperature=recipe.sample_temperature,
                top_p=recipe.sample_top_p,
                seed=recipe.seed + state.step,
                # Called after each token; where all sample together, they leave together.
                check=functools.partial(processes.agree_to_stop, stop) if processes.sharded else stop.check,
            )
        except Stopped:
            if processes.sharded:
                raise
        else:
            run.tracker.samples(state.step, recipe.sample_prompts, continuations)
            state.sampled_step = state.step
    processes.agree_to_stop(stop)
    state.sampled_step = state.step


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
        row["block_ids"] = run.blocks.ids(state.position - run.recipe.effective_batch_size, state.position).tolist()
        run.tracker.say(
            f"step {state.step}: skipped ({result.skipped}): loss {result.loss:.4g}, "
            f"gradient norm {result.grad_norm:.4g}; the weights are as before"
        )
    run.tracker.train_row(row)
