"""Validation loss and perplexity: cross-entropy over every predicted token of the validation blocks, each once."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from clm_owt.batching import cut
from clm_owt.data.token_store import Split
from clm_owt.machine import Processes, StopRequest


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens: `loss` in nats, its exponential, and the sharpness statistics."""

    loss: float
    perplexity: float
    penalty: float
    max_prob: float
    entropy: float


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a double cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


def evaluate(
    model: torch.nn.Module,
    validation: Split,
    block_size: int,
    micro_batch: int,
    accelerator: Accelerator,
    processes: Processes,
    stop: StopRequest,
) -> Evaluation:
    """Evaluate on all validation blocks, shared out over the processes; every token weighs the same.

    Raises Stopped, on all processes together, when any was told to stop.
    """
    blocks = len(validation)
    predicted_tokens = blocks * (block_size - 1)
    # The sums of the micro-batches are added up in float64 on the CPU (MPS has no float64).
    totals = torch.zeros(4, dtype=torch.float64)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for piece in cut(blocks, processes.count, processes.rank, micro_batch):
            if stop.signum is not None:
                break
            input_ids = torch.from_numpy(validation.read(range(piece.start, piece.stop))).to(accelerator.device)
            with accelerator.autocast():
                output = model(input_ids=input_ids, labels=input_ids, num_items_in_batch=predicted_tokens)
            totals += torch.stack([output.ce_loss, output.penalty, output.max_prob, output.entropy]).double().cpu()
    model.train(was_training)
    processes.agree_to_stop(stop)
    loss, penalty, max_prob, entropy = processes.sum_on_cpu(totals).tolist()
    return Evaluation(loss, perplexity(loss), penalty, max_prob, entropy)
