"""Validation loss and perplexity: cross-entropy over every predicted token of the validation blocks, each once."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from clm_owt.batch import cut
from clm_owt.data.token_store import Split
from clm_owt.model.losses import IGNORE_INDEX
from clm_owt.stopping import Stopped, StopRequest
from clm_owt.training.device_memory import is_out_of_memory, release_cached_memory
from clm_owt.training.micro_batch_search import DoesNotFit
from clm_owt.training.processes import Processes


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens: `loss` in nats, its exponential, and the sharpness statistics."""

    loss: float
    perplexity: float
    penalty: float
    max_prob: float
    entropy: float


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

    Raises Stopped, on all processes together, when any was told to stop, and DoesNotFit when any ran out of memory
    (but that error itself under FSDP2, whose forward is collective).
    """
    blocks = len(validation)
    predicted_tokens = blocks * (block_size - 1)
    counted_tokens = 0
    # The sums of the micro-batches are added up in float64 on the CPU (MPS has no float64).
    totals = torch.zeros(4, dtype=torch.float64)
    was_training = model.training
    out_of_memory = False
    model.eval()
    try:
        for piece in cut(blocks, processes.count, processes.rank, micro_batch, equal_counts=processes.sharded):
            if processes.sharded:
                processes.agree_to_stop(stop)
            else:
                stop.check()
            input_ids = torch.from_numpy(validation.read(range(piece.start, piece.stop))).to(accelerator.device)
            labels = piece.labels(input_ids)
            with torch.no_grad(), accelerator.autocast():
                output = model(input_ids=input_ids, labels=labels, num_items_in_batch=predicted_tokens)
            counted_tokens += int((labels[:, 1:] != IGNORE_INDEX).sum())
            totals += torch.stack([output.ce_loss, output.penalty, output.max_prob, output.entropy]).double().cpu()
    except Stopped:
        pass  # the others learn of it in the agreement
    except Exception as error:
        if processes.sharded or not is_out_of_memory(error):
            raise
        out_of_memory = True
    finally:
        model.train(was_training)
    verdict = processes.agree(out_of_memory, stop.signum)
    if verdict.signum is not None:
        raise Stopped(verdict.signum)
    if verdict.out_of_memory:
        release_cached_memory()
        raise DoesNotFit
    # Imported here, since `evaluate` brings its own imports: 0.2 s beside those of a training.
    from clm_owt.model.perplexity import Perplexity

    metric = Perplexity()
    for nll_sum, n_tokens in processes.gather((totals[0].item() * predicted_tokens, counted_tokens)):
        metric.add(nll_sum=nll_sum, n_tokens=n_tokens)
    result = metric.compute()
    _, penalty, max_prob, entropy = processes.sum_on_cpu(totals).tolist()
    return Evaluation(result["loss"], result["perplexity"], penalty, max_prob, entropy)
