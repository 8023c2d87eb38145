"""Validation loss and perplexity: cross-entropy over every predicted token of the validation blocks, each once."""

import torch
from accelerate import Accelerator

from clm_owt.batch import IGNORE_INDEX, cut
from clm_owt.data.token_store import Split
from clm_owt.model.losses import LossStatistics
from clm_owt.stopping import StopRequest
from clm_owt.training.processes import Processes


def evaluate(
    model: torch.nn.Module,
    validation: Split,
    block_size: int,
    micro_batch: int,
    accelerator: Accelerator,
    processes: Processes,
    stop: StopRequest,
) -> LossStatistics:
    """Means over all predicted tokens of the validation blocks, which are shared out over the processes; `loss` is the
    cross-entropy, whatever the penalty.

    Raises Stopped, on all processes together, when any was told to stop, and DoesNotFit when any ran out of memory
    (but that error itself under FSDP2, whose forward is collective).
    """
    blocks = len(validation)
    predicted_tokens = blocks * (block_size - 1)

    def work() -> tuple[torch.Tensor, int]:
        """This process's sums, float64 [5] on the CPU (MPS has no float64), and the tokens that they are of."""
        totals, counted = torch.zeros(len(LossStatistics._fields), dtype=torch.float64), 0
        for piece in cut(blocks, processes.count, processes.rank, micro_batch, equal_counts=processes.sharded):
            if processes.sharded:
                processes.agree_to_stop(stop)
            else:
                stop.check()
            input_ids = torch.from_numpy(validation.read(range(piece.start, piece.stop))).to(accelerator.device)
            labels = piece.labels(input_ids)
            with torch.no_grad(), accelerator.autocast():
                output = model(input_ids=input_ids, labels=labels, num_items_in_batch=predicted_tokens)
            counted += int((labels[:, 1:] != IGNORE_INDEX).sum())
            totals += torch.stack(output).double().cpu()
        return totals, counted

    was_training = model.training
    model.eval()
    try:
        totals, counted = work() if processes.sharded else processes.attempt(work, stop)
    finally:
        model.train(was_training)
    # Imported here, since `evaluate` brings its own imports: 0.2 s beside those of a training.
    from clm_owt.model.perplexity import Perplexity

    ce_loss = totals[LossStatistics._fields.index("ce_loss")].item()
    metric = Perplexity()
    for nll_sum, n_tokens in processes.gather((ce_loss * predicted_tokens, counted)):
        metric.add(nll_sum=nll_sum, n_tokens=n_tokens)
    loss = metric.compute()["loss"]
    return LossStatistics(*processes.sum_on_cpu(totals).tolist())._replace(loss=loss, ce_loss=loss)
