"""How fast a run trains: tokens per second, and the share of the device's peak that this is (MFU)."""

from typing import Self

from clm_owt.planning.devices import Hardware
from clm_owt.planning.plan import Plan, flops_per_token
from clm_owt.recipe import Recipe


class Throughput:
    """Tokens per second of the training steps since the last reading. Validation, sampling, saving and waiting for
    data are left out. `peak_flops`, of all processes' devices together, is in FLOP/s; None where it is not known."""

    def __init__(self, flops_per_token: float, peak_flops: float | None):
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._begin_window()

    @classmethod
    def of(cls, plan: Plan, recipe: Recipe, hardware: Hardware) -> Self:
        """The throughput of a run of this plan on this hardware."""
        flops = flops_per_token(plan.parameters, recipe.n_layer, recipe.n_embd, recipe.block_size)
        return cls(flops, hardware.peak_flops and hardware.peak_flops * hardware.processes)

    def add(self, tokens: int, step_seconds: float, data_seconds: float) -> None:
        """Add one step on `tokens` tokens: its seconds without waiting for data, and those of waiting."""
        self._steps += 1
        self._tokens += tokens
        self._step_seconds += step_seconds
        self._data_seconds += data_seconds

    def read(self) -> dict[str, float]:
        """The timing fields of a row: `tokens_per_second`; `step_seconds`, the mean of a step; `data_seconds`, of all
        steps together; `mfu` where the peak is known. The next reading begins here. At least one step is needed."""
        rate = self._tokens / self._step_seconds
        fields = {
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(self._step_seconds / self._steps, 5),
            "data_seconds": round(self._data_seconds, 5),
        }
        if self._peak_flops:
            fields["mfu"] = round(rate * self._flops_per_token / self._peak_flops, 4)
        self._begin_window()
        return fields

    def _begin_window(self) -> None:
        self._steps = self._tokens = 0
        self._step_seconds = self._data_seconds = 0.0
