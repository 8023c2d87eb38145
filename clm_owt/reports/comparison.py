"""Whether runs differ by more than chance: differences over paired seeds, with their intervals."""

import importlib.util
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from clm_owt.errors import InputError

Setting = TypeVar("Setting", bound=Hashable)

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Of the means of two settings over the same seeds, and its interval of CONFIDENCE. With one pair there is none:
    low and high are infinite."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if self.pairs < 2:
            return f"{self.mean:+.4f}, of one seed: cannot be told from chance"
        verdict = "" if self.beyond_chance else ", cannot be told from chance"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]{verdict}"


def paired_difference(ours: Sequence[float], reference: Sequence[float], comparisons: int = 1) -> Difference:
    """`ours` minus `reference`, whose values of equal position are of equal seeds; Student's t interval of their
    differences. Where it is one of several `comparisons` with a reference, it is so much wider (Sidak's correction)
    that all of them together hold with CONFIDENCE. Raises ValueError for different lengths, or none."""
    differences = [a - b for a, b in zip(ours, reference, strict=True)]
    if not differences:
        raise ValueError("no seeds: expected values of at least one")
    mean = statistics.fmean(differences)
    half = half_interval(differences, CONFIDENCE ** (1 / comparisons))
    return Difference(mean, mean - half, mean + half, len(differences))


def half_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """Half of Student's t interval of the mean of normal `values`; infinite for a single one."""
    if len(values) < 2:
        return float("inf")
    from scipy.stats import t  # takes a second, and most of what imports this compares nothing

    return float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def check_intervals_can_be_computed() -> None:
    """Raises InputError without scipy: at once, and not after the runs that are to be compared."""
    if importlib.util.find_spec("scipy") is None:
        raise InputError("intervals over several seeds need scipy; pip install 'clm_owt[sweep]'")


def compare(values: Mapping[Setting, Mapping[int, float]], reference: Setting) -> dict[Setting, Difference]:
    """Each setting but `reference` against it, over the seeds that both have; `values` are by setting and seed. The
    reference is to be chosen before the values are known: the best one of many looks better than it is."""
    others = [setting for setting in values if setting != reference]
    found = {}
    for setting in others:
        seeds = sorted(values[setting].keys() & values[reference].keys())
        if seeds:
            pair = ([values[s][seed] for seed in seeds] for s in (setting, reference))
            found[setting] = paired_difference(*pair, comparisons=len(others))
    return found
