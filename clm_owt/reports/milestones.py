"""A recipe's milestones: validation losses that others published, by tokens trained on; how far a run is from them.

They are cross-entropies in nats per token, as the `loss` of a validation row is whatever the penalty.
"""

from collections.abc import Mapping, Sequence

from clm_owt.formatting import format_count
from clm_owt.reports.record import Row

CAVEAT = "others have other splits of the text, batches and schedules"


def passed(milestones: Mapping[int, float] | None, before: int, tokens: int) -> dict[int, float]:
    """The milestones that a run reaches after `before` tokens, and at the latest at `tokens`."""
    return {count: loss for count, loss in (milestones or {}).items() if before < count <= tokens}


def compare(count: int, published: float, loss: float) -> str:
    """How far a validation loss is from the one published after `count` tokens."""
    side = "above" if loss > published else "below"
    return (
        f"published at {format_count(count)} tokens: {published:g}, this run is {abs(loss - published):.3f} {side} it"
    )


def comparisons(milestones: Mapping[int, float] | None, validations: Sequence[Row]) -> list[tuple[Row, str]]:
    """The first validations that have reached a milestone, each with how far it is from it."""
    found, before = [], 0
    for row in validations:
        reached = passed(milestones, before, row["tokens"])
        found += [(row, compare(count, published, row["loss"])) for count, published in reached.items()]
        before = row["tokens"]
    return found
