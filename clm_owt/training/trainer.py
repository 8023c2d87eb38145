"""The training loop: validate, evaluate tasks, sample, save, step, log."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from clm_owt.batch import MicroBatch, cut, next_smaller
from clm_owt.console import waiting
from clm_owt.data.order import TrainingBlocks
from clm_owt.data.token_store import TokenStore
from clm_owt.errors import RunFailed
from clm_owt.formatting import format_duration
from clm_owt.model.gpt2 import GPT2ForPretraining
from clm_owt.model.losses import LossStatistics, perplexity
from clm_owt.model.sampling import sample
from clm_owt.optimizers import OPTIMIZERS
from clm_owt.planning.devices import Hardware
from clm_owt.planning.plan import Plan
from clm_owt.recipe import Recipe
from clm_owt.reports import milestones
from clm_owt.run_state import RunReport
from clm_owt.schedule import is_due
from clm_owt.state import TrainState
from clm_owt.stopping import Stopped, StopRequest
from clm_owt.tracking.run_log import RunLog
from clm_owt.tracking.throughput import Throughput
from clm_owt.training import checkpoint, run_folder
from clm_owt.training.contention import Contention
from clm_owt.training.device_memory import is_out_of_memory, keep_freed_memory
from clm_owt.training.micro_batch_search import WHAT_HELPS, MicroBatchSearch
from clm_owt.training.optim import (
    FIRST_LOSS_SCALE,
    LEAST_LOSS_SCALE,
    OutlierGuard,
    build_schedule,
    next_loss_scale,
    unscale,
)
from clm_owt.training.processes import DoesNotFit, Processes, full_tensor
from clm_owt.training.run_folder import ExistingRun
from clm_owt.training.silent_failure import UNIGRAM_BLOCKS, SilentFailure, unigram_loss
from clm_owt.training.task_evaluation import TaskEvaluation
from clm_owt.training.validation import evaluate

T = TypeVar("T")

# So many steps in a row whose loss or gradient is not finite end the run: the weights are beyond repair by waiting.
MAX_SKIPPED_IN_A_ROW = 3
# So many saves in a row that failed end it too: what it would go on to compute might be lost.
MAX_FAILED_SAVES = 3


@dataclass(frozen=True)
class StepResult:
    """Of one step: its statistics, means over the predicted tokens of the global batch; the norm of its gradient
    before clipping; the rate it was taken with, and under float16 the loss scale. `skipped` says why the weights were
    left as they were, if they were.
    """

    statistics: LossStatistics
    grad_norm: float
    learning_rate: float
    loss_scale: float | None
    skipped: str | None


class Trainer:
    """A run from where it stands to its end.

    `existing` is what the run's folder held when the command began, `found` the micro-batch; `on_saved` are called
    with each checkpoint's folder, in the background; `after_row` after each row of the metrics. The model is not
    wrapped; under FSDP2 its parameters are sharded in place.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        *,
        model: GPT2ForPretraining,
        tokenizer: PreTrainedTokenizerBase,
        store: TokenStore,
        blocks: TrainingBlocks,
        hardware: Hardware,
        accelerator: Accelerator,
        processes: Processes,
        stop: StopRequest,
        log: RunLog,
        report: RunReport,
        existing: ExistingRun,
        found: MicroBatchSearch,
        tasks: TaskEvaluation,
        on_saved: Sequence[Callable[[Path], None]] = (),
        after_row: Callable[[], None] = lambda: None,
    ):
        self.recipe = recipe
        self.total_steps = plan.total_steps
        self.tokens_per_step = plan.tokens_per_step
        self.model = model
        self.tokenizer = tokenizer
        self.store = store
        self.blocks = blocks
        self.accelerator = accelerator
        self.processes = processes
        self.stop = stop
        self.log = log
        self.report = report
        self.tasks = tasks
        self.after_row = after_row
        self.throughput = Throughput.of(plan, recipe, hardware)
        self.contention = Contention() if hardware.device_type == "cpu" else None
        self.checkpoints = checkpoint.CheckpointWriter(
            Path(recipe.output_dir) / "checkpoints", recipe.save_total_limit, on_written=on_saved, say=log.say
        )
        processes.shard(model)
        self.gradient_sum = processes.gradient_sum(model)
        self.optimizer = OPTIMIZERS[recipe.optimizer].build(model, recipe, processes)
        self.state = self.restore(existing) if existing.checkpoint is not None else TrainState()
        if not (found.from_plan and self.state.micro_batch):  # on the same machine an earlier step-down stays
            self.state.micro_batch = found.micro_batch
        if accelerator.mixed_precision != "fp16":
            self.state.loss_scale = None
        elif self.state.loss_scale is None:
            self.state.loss_scale = FIRST_LOSS_SCALE
        self.schedule = build_schedule(
            self.optimizer, recipe.schedule(self.total_steps), completed_steps=self.state.step
        )
        self.silent_failure = SilentFailure(
            recipe, self.state.first_losses, self.state.first_grad_norms, self.state.symptoms
        )
        self.guard = (
            OutlierGuard(self.state.recent_losses, self.state.recent_grad_norms) if recipe.skip_outliers else None
        )

    def restore(self, existing: ExistingRun) -> TrainState:
        """Load the checkpoint that the run continues from, and say which. Collective."""
        state = checkpoint.restore(existing.checkpoint, self.model, self.optimizer, self.processes)
        verb = "Branching off" if existing.branches_off else "Continuing"
        self.processes.say(*existing.remarks, f"{verb} after step {state.step:,}, from {existing.checkpoint}")
        if existing.branches_off:
            state.tracker_ids = {}  # another run for the trackers
        self.processes.on_main(checkpoint.set_aside_newer, self.checkpoints.folder, existing.checkpoint)
        return state

    # The loop

    def train(self) -> None:
        """Train to the end. Raises Stopped, with the last completed step saved, when told to stop."""
        state, last = self.state, self.total_steps
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.began = time.monotonic() - state.elapsed_seconds
        self.checkpoints.saved_step = state.step  # a run that continues is saved, one that begins has nothing to save
        saved, taken = done_at_step(state), False
        try:
            while True:
                self.evaluate_where_due()
                # While numbers go wrong the last checkpoint stays one from before.
                sound = state.not_finite_in_a_row == 0 or state.step == last
                if self.due(self.recipe.save_steps) and state.step > 0 and sound and done_at_step(state) != saved:
                    state.elapsed_seconds = self.elapsed()
                    self.save()
                    saved = done_at_step(state)
                if state.step == last:
                    break

                step_began, waited = time.perf_counter(), self.blocks.seconds_waited
                with contextlib.nullcontext() if taken else waiting("the first step, with what it compiles"):
                    result = self.train_step()
                taken = True
                waited = self.blocks.seconds_waited - waited
                self.throughput.add(self.tokens_per_step, time.perf_counter() - step_began - waited, waited)
                self.advance(result)
                symptom = self.watch_for_silent_failure(result)
                if result.skipped or symptom or self.due(self.recipe.logging_steps):
                    self.log_step(result, symptom)
                self.log.advance(state.step)
                self.report.at_step(state.step, result.statistics.loss)
                self.check_skipped(result)
            self.finish_saving()
            self.stop.reached = f"after step {last}, saved"
            self.processes.agree_to_stop(self.stop)
        except Stopped:
            state.elapsed_seconds = self.elapsed()
            with self.report.saving():
                self.save_at_stop()
            raise
        except RuntimeError:  # such as a connection that is lost to a process that died
            self.checkpoints.wait()
            if state.step:
                self.stop.reached = f"after step {state.step}, saved up to step {self.checkpoints.saved_step}"
            raise
        finally:
            self.checkpoints.wait()
        state.elapsed_seconds = self.elapsed()

    def elapsed(self) -> float:
        """Seconds that the training has taken so far, with all that it does between steps, over all sessions."""
        return time.monotonic() - self.began

    def evaluate_where_due(self) -> None:
        """Validate, evaluate the tasks and sample after the last step taken, what is due there and not done."""
        recipe, state = self.recipe, self.state
        if self.due(recipe.eval_steps) and state.validated_step < state.step:
            with contextlib.nullcontext() if state.step else waiting("validation before the first step"):
                self.validate()
        tasks_due = bool(recipe.eval_tasks) and self.due(recipe.eval_tasks_steps or recipe.eval_steps)
        if tasks_due and state.tasks_step < state.step:
            self.evaluate_tasks()
        if self.due(recipe.sample_steps) and state.sampled_step < state.step:
            self.write_samples()

    def due(self, interval: int | None) -> bool:
        """Whether what is done every `interval` steps, and at the end, is to be done after the last step taken."""
        return is_due(self.state.step, interval, self.total_steps)

    def advance(self, result: StepResult) -> None:
        state = self.state
        state.step += 1
        state.position += self.recipe.effective_batch_size
        state.tokens += self.tokens_per_step
        if result.skipped != "overflow":  # which says nothing about the weights
            state.not_finite_in_a_row = state.not_finite_in_a_row + 1 if result.skipped == "not finite" else 0
        if state.loss_scale is not None:
            overflowed = not math.isfinite(result.grad_norm)
            state.loss_scale, state.steps_at_loss_scale = next_loss_scale(
                state.loss_scale, state.steps_at_loss_scale, overflowed
            )

    def watch_for_silent_failure(self, result: StepResult) -> str | None:
        """What is to be said of the first steps of the run, if anything."""

        def unigram() -> float:
            return unigram_loss(self.blocks.read(0, min(self.state.position, UNIGRAM_BLOCKS)))

        ce_loss = result.statistics.ce_loss
        return self.silent_failure.watch(self.state.step, ce_loss, result.grad_norm, unigram)

    def check_skipped(self, result: StepResult) -> None:
        """Raises RunFailed after too many steps in a row that were not finite."""
        if self.state.not_finite_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise RunFailed(
                f"step {self.state.step}: loss {result.statistics.loss}, gradient norm {result.grad_norm}; not finite "
                f"for {MAX_SKIPPED_IN_A_ROW} steps in a row, whose blocks metrics.jsonl names; the last checkpoint is "
                f"from before them. Begin anew with a lower learning_rate (it is {self.recipe.learning_rate:g}) or a "
                "longer warm-up, and another output_dir",
                final=True,
            )

    # A step

    def train_step(self) -> StepResult:
        """One optimizer step on the G blocks at `state.position`, exactly, whatever the cut."""
        random_states = checkpoint.random_state() if self.recipe.dropout else None
        try:
            sums = self.until_it_fits(f"step {self.state.step + 1}", self.accumulate_gradients)
        except Stopped:
            if random_states is not None:  # the step is given up, and will be repeated with the same dropout
                checkpoint.set_random_state(random_states)
            raise
        self.gradient_sum.finish()
        sums = self.processes.sum(sums)
        parameters, loss_scale = list(self.model.parameters()), self.state.loss_scale
        if loss_scale is not None:
            unscale(parameters, loss_scale)
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.max_grad_norm))
        # The one place of a step where the host waits for the device.
        *sums, norm = torch.cat([sums, grad_norm.reshape(1)]).tolist()
        statistics = LossStatistics(*sums)
        skipped = self.why_to_skip(statistics.loss, norm)
        learning_rate = self.schedule.get_last_lr()[0]
        if skipped is None:
            self.optimizer.step()
        self.schedule.step()
        self.discard_gradients()
        return StepResult(statistics, norm, learning_rate, loss_scale, skipped)

    def why_to_skip(self, loss: float, grad_norm: float) -> str | None:
        """Whether the weights are to stay as they are in a step of this loss and gradient norm, and why."""
        if not math.isfinite(loss):
            return "not finite"
        if not math.isfinite(grad_norm):
            scale = self.state.loss_scale
            return "overflow" if scale is not None and scale > LEAST_LOSS_SCALE else "not finite"
        if self.guard is not None and self.guard.is_outlier(loss, grad_norm):
            return "outlier"
        return None

    def until_it_fits(self, what: str, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, which is repeated with a smaller micro-batch as long as it raises DoesNotFit."""
        while True:
            try:
                return attempt()
            except DoesNotFit:
                batch, state = self.recipe.effective_batch_size, self.state
                smaller = next_smaller(batch, self.processes.count, state.micro_batch)
                if smaller is None:
                    self.processes.refuse(f"{what}: out of memory with one block at a time; {WHAT_HELPS}")
                self.log.say(f"{what}: out of memory; repeating it with micro-batches of {smaller}")
                state.micro_batch = smaller

    def accumulate_gradients(self) -> torch.Tensor:
        """Forward and backward of this process's micro-batches, and then the agreement of all processes on them.

        Gives the process's part of the step's statistics, float32 [5] on the device: divided by the tokens of the
        whole global batch, so that parts of micro-batches and processes add up, and gradients with them. Nothing in a
        forward or backward waits for another process, so an error in one leaves none hanging: the last backward only
        starts to add up the gradients of all processes, which `gradient_sum.finish` waits for. Raises DoesNotFit or
        Stopped, on all processes together, without gradients left.
        """
        if self.processes.sharded:
            return self.accumulate_sharded_gradients()

        def work() -> torch.Tensor:
            self.blocks.wait_for(self.state.position + self.recipe.effective_batch_size)
            sums = torch.zeros(len(LossStatistics._fields), device=self.accelerator.device)
            pieces = self.cut()
            for piece in pieces:
                self.stop.check()
                if piece is pieces[-1]:
                    self.gradient_sum.expect_last_backward()
                sums += self.forward_and_backward(piece)
            return sums

        self.gradient_sum.begin()
        return self.processes.attempt(work, self.stop, discard=self.discard_gradients)

    def accumulate_sharded_gradients(self) -> torch.Tensor:
        """The same under FSDP2, where forward and backward gather parameters from all processes: as many micro-batches
        on each, agreement before the last backward, which alone reduces the gradients, and before the first forward,
        so that none leaves while it waits for data. Memory that ends inside a collective cannot be agreed on: that
        raises RuntimeError, and the others end with the launcher or their process group's timeout.
        """
        with contextlib.suppress(Stopped):
            self.blocks.wait_for(self.state.position + self.recipe.effective_batch_size)
        self.processes.agree_to_stop(self.stop)
        sums = torch.zeros(len(LossStatistics._fields), device=self.accelerator.device)
        pieces = self.cut()
        try:
            for piece in pieces:
                last = piece is pieces[-1]
                self.model.set_requires_gradient_sync(last)
                agree = functools.partial(self.processes.agree_to_stop, self.stop) if last else None
                sums += self.forward_and_backward(piece, before_backward=agree)
        except Exception as error:
            if is_out_of_memory(error):
                state = self.state
                raise RuntimeError(
                    f"step {state.step + 1}: out of memory with micro-batches of {state.micro_batch}, inside a step "
                    "that FSDP2 cannot repeat; continue from the last checkpoint with --max_batch_size below that"
                ) from error
            raise
        return sums

    def cut(self) -> list[MicroBatch]:
        """This process's micro-batches of a step; under FSDP2 as many as every other's."""
        return cut(
            self.recipe.effective_batch_size,
            self.processes.count,
            self.processes.rank,
            self.state.micro_batch,
            equal_counts=self.processes.sharded,
        )

    def forward_and_backward(
        self, piece: MicroBatch, before_backward: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """One micro-batch: its part of the step's statistics, float32 [5]. A function of its own, so that nothing of a
        failed one is left in a variable."""
        start = self.state.position
        predicted_tokens = self.recipe.effective_batch_size * (self.recipe.block_size - 1)
        blocks = self.blocks.read(start + piece.start, start + piece.stop)
        input_ids = to_device(blocks, self.accelerator.device)
        with self.accelerator.autocast():
            output = self.model(
                input_ids=input_ids, labels=piece.labels(input_ids), num_items_in_batch=predicted_tokens
            )
        if before_backward is not None:
            before_backward()
        # Under float16 the gradients of a loss so many times as large: its own would round to zero.
        scale = self.state.loss_scale
        output.loss.backward(None if scale is None else torch.full_like(output.loss, scale))
        return torch.stack([value.detach() for value in output])

    def discard_gradients(self) -> None:
        self.gradient_sum.abandon()
        self.optimizer.zero_grad(set_to_none=True)

    # Between steps

    def validate(self) -> None:
        recipe, state = self.recipe, self.state

        def attempt() -> LossStatistics:
            return evaluate(
                self.model,
                self.store.validation,
                recipe.block_size,
                state.micro_batch,
                self.accelerator,
                self.processes,
                self.stop,
            )

        statistics = self.until_it_fits(f"validation after step {state.step}", attempt)
        loss, best = statistics.loss, state.best_validation_loss
        state.validation_loss = loss
        state.best_validation_loss = loss if best is None else min(best, loss)
        validated_tokens = state.validated_step * self.tokens_per_step
        state.validated_step = state.step
        row = {
            "step": state.step,
            **statistics._asdict(),
            "perplexity": perplexity(loss),
            "tokens": state.tokens,
            "elapsed_seconds": round(self.elapsed(), 2),
        }
        self.log.validation_row(row)
        reached = milestones.passed(recipe.milestones, validated_tokens, state.tokens)
        words = [f"step {state.step}: validation loss {loss:.4f}, perplexity {row['perplexity']:,.2f}"]
        words += [milestones.compare(tokens, published, loss) for tokens, published in reached.items()]
        self.log.say("; ".join(words))

    def evaluate_tasks(self) -> None:
        """The recipe's zero-shot tasks, as a row of their own."""
        state, began = self.state, time.monotonic()
        what = f"zero-shot tasks after step {state.step}"
        metrics = self.tasks.evaluate(self.model, self.tokenizer, self.stop, what)
        state.tasks_step = state.step
        self.log.tasks_row({"step": state.step, **metrics, "tokens": state.tokens})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.log.say(f"step {state.step}: {shown} ({format_duration(time.monotonic() - began)})")

    def write_samples(self) -> None:
        """Continue the recipe's prompts. Each step has its own seed, so that samples of one step do not depend on
        others. Every process samples where the parameters are sharded, since the forward pass is collective there."""
        recipe, processes, stop, step = self.recipe, self.processes, self.stop, self.state.step
        if processes.sharded or processes.is_main:
            # Weights that are gathered as bf16 go with no float32 input but under autocast.
            precision = self.accelerator.autocast() if processes.sharded else contextlib.nullcontext()
            try:
                with precision:
                    continuations = sample(
                        self.model,
                        self.tokenizer,
                        recipe.sample_prompts,
                        max_new_tokens=recipe.sample_max_new_tokens,
                        temperature=recipe.sample_temperature,
                        top_p=recipe.sample_top_p,
                        seed=recipe.seed + step,
                        # Called after each token; where all sample together, they leave together.
                        check=functools.partial(processes.agree_to_stop, stop) if processes.sharded else stop.check,
                    )
            except Stopped:
                if processes.sharded:
                    raise
            else:
                self.log.samples(step, recipe.sample_prompts, continuations)
                self.state.sampled_step = step
        processes.agree_to_stop(stop)
        self.state.sampled_step = step

    def log_step(self, result: StepResult, symptom: str | None) -> None:
        state, statistics = self.state, result.statistics
        row = {
            "step": state.step,
            "epoch": state.position / self.store.train_blocks if self.store.train_blocks else None,
            **statistics._asdict(),
            "perplexity": perplexity(statistics.ce_loss),
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": state.tokens,
            "micro_batch": state.micro_batch,
            **self.throughput.read(),
            "elapsed_seconds": round(self.elapsed(), 2),
        }
        if result.loss_scale is not None:
            row["loss_scale"] = result.loss_scale
        if result.skipped:
            batch = self.recipe.effective_batch_size
            row["skipped"] = result.skipped
            row["block_ids"] = self.blocks.ids(state.position - batch, state.position).tolist()
            self.log.say(
                f"step {state.step}: skipped ({result.skipped}): loss {statistics.loss:.4g}, "
                f"gradient norm {result.grad_norm:.4g}; the weights are as before"
                + (f", the loss scale is now {state.loss_scale:,g}" if result.skipped == "overflow" else "")
            )
        if symptom:
            row["warning"] = symptom
            self.log.say(f"warning: {symptom}")
        self.log.train_row(row)
        if warning := self.contention and self.contention.warning():
            self.log.say(warning)
        self.after_row()

    # Saving

    def save(self) -> None:
        """Begin to save. Raises RunFailed, on all processes, if the last saves before have all failed."""
        with self.report.saving():
            self.checkpoints.wait()  # one at a time; and its copy is gone before the next is made
            failed = self.processes.gather(self.checkpoints.failed_in_a_row)[0]  # the main process writes
            if failed >= MAX_FAILED_SAVES:
                raise RunFailed(f"{failed} saves in a row have failed, see above; {self.how_to_go_on()}")
            self.write_checkpoint()

    def write_checkpoint(self) -> None:
        """Copy the run's state to host memory, on all processes, and begin to write it on the main one."""
        self.checkpoints.write(checkpoint.take_snapshot(self.state, self.model, self.optimizer, self.processes))

    def finish_saving(self) -> None:
        """Wait for the last save. Raises RunFailed, on all processes, if it or the last lines could not be written."""
        self.checkpoints.wait()
        problems = self.log.unwritten()
        if self.checkpoints.failed_in_a_row:
            problems.append("the last step could not be saved, see above")
        problems = self.processes.gather(problems)[0]  # the main process writes
        if problems:
            raise RunFailed(f"{'; '.join(problems)}; {self.how_to_go_on()}")
        self.processes.on_main(self.checkpoints.prune)  # a session before may have been killed in doing so

    def save_at_stop(self) -> None:
        """Save the last completed step, unless it is saved, and note for the run's last line what there is."""
        self.checkpoints.wait()
        # The main process alone knows what was written; all must take part in a snapshot or none.
        saved_step = self.processes.gather(self.checkpoints.saved_step)[0]
        step = self.state.step
        if saved_step < step:
            self.write_checkpoint()
            self.checkpoints.wait()
            # Together: when one of its processes has left, a launcher sends the one that still writes a second signal.
            self.processes.gather(None)
        if step == 0:
            return
        saved_step = self.checkpoints.saved_step
        self.stop.reached = f"after step {step}, {'saved' if saved_step == step else f'saved up to step {saved_step}'}"

    def how_to_go_on(self) -> str:
        return f"make room or repair {self.checkpoints.folder}, and the same command continues"

    def export(self) -> None:
        """Write `model/`, draw the curves to the end, and mark the run as finished in plan.json. Collective."""
        run_folder.export(self.recipe, self.model, self.tokenizer, self.store, self.state, self.processes)
        self.log.finish_curves()
        self.processes.on_main(run_folder.mark_finished, Path(self.recipe.output_dir))


def done_at_step(state: TrainState) -> tuple[int, ...]:
    """Tells a checkpoint from one of the same step that a stop left before its validation, tasks or samples."""
    return state.step, state.validated_step, state.tasks_step, state.sampled_step


def to_device(blocks: np.ndarray, device: torch.device) -> torch.Tensor:
    """Token ids as a tensor on `device`. From pinned memory, since a copy from pageable memory would wait for the
    work queued on the GPU (not run on one by the project yet)."""
    tensor = torch.from_numpy(blocks)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
