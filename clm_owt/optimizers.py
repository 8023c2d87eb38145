"""The optimizers of a recipe: one entry each. To add one, add an entry here and its function in training/optim.py.

The plan and the memory estimates read an entry's bytes, the search for the micro-batch allocates them, the model card
prints its description, and the training builds it. This module imports no torch.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from clm_owt.recipe import Recipe
    from clm_owt.training.processes import Processes

# The parameters of a GPT-2, as optimizers tell them apart: `embedding` wte and wpe, `matrix` the other tensors of two
# dimensions, `vector` biases and LayerNorm weights.
KINDS = ("embedding", "matrix", "vector")


@dataclass(frozen=True)
class OptimizerEntry:
    """state_bytes: bytes that the optimizer keeps for each parameter, by the parameter's kind; describe: a line for
    the model card, from the settings of recipe.yaml; builder: `module:function` that makes it of (model, recipe,
    processes); published_rates: (parameters, peak rate, where), the highest known of each size, above which the plan
    warns."""

    state_bytes: Mapping[str, int]
    describe: Callable[[Mapping[str, Any]], str]
    builder: str
    published_rates: tuple[tuple[int, float, str], ...] = ()

    def build(
        self, model: "torch.nn.Module", recipe: "Recipe", processes: "Processes | None" = None
    ) -> "torch.optim.Optimizer":
        """Over the model's parameters; `processes` (None: this one) may share the work of a step."""
        return pkgutil.resolve_name(self.builder)(model, recipe, processes)

    def total_state_bytes(self, parameters: Mapping[str, int]) -> int:
        """Of a model with so many parameters of each kind."""
        return sum(self.state_bytes[kind] * count for kind, count in parameters.items())


def describe_adamw(recipe: Mapping[str, Any]) -> str:
    return (
        f"AdamW, β {recipe['adam_beta1']:g} / {recipe['adam_beta2']:g}, ε {recipe['adam_epsilon']:g}, "
        f"weight decay {recipe['weight_decay']:g}"
    )


def describe_muon(recipe: Mapping[str, Any]) -> str:
    rate = recipe.get("embedding_learning_rate") or recipe["learning_rate"]
    return (
        f"Muon (momentum 0.95, updates of AdamW's size, weight decay {recipe['weight_decay']:g}) for the matrices of "
        f"the transformer blocks; for the rest, at a peak rate of {rate:g}, {describe_adamw(recipe)}"
    )


OPTIMIZERS = {
    "adamw": OptimizerEntry(
        state_bytes=dict.fromkeys(KINDS, 8),  # two moments in float32
        describe=describe_adamw,
        builder="clm_owt.training.optim:build_adamw",
        published_rates=(
            (124_000_000, 1.8e-3, "6e-4 in nanoGPT, llm.c, Mistral and MARS, up to 1.8e-3 with a changed model"),
            (355_000_000, 3e-4, "llm.c, MARS"),
            (774_000_000, 2.5e-4, "llm.c; 2e-4 in MARS"),
            (1_558_000_000, 6e-4, "llm.c, with 1 M tokens a step; 2e-4 in MARS"),
        ),
    ),
    "muon": OptimizerEntry(
        state_bytes={"embedding": 8, "matrix": 4, "vector": 8},  # one momentum in float32; AdamW's two
        describe=describe_muon,
        builder="clm_owt.training.optim:build_muon",
        published_rates=(
            (124_000_000, 1.6e-2, "6e-3 for GPT-2 small in MARS-M, 8e-3 to 1.6e-2 for 130 M in arXiv 2509.02046"),
        ),
    ),
}


def kind_of(name: str, dimensions: int) -> str:
    """The kind of a parameter, from its name in `GPT2LMHeadModel` and its number of dimensions."""
    if name.endswith(("wte.weight", "wpe.weight")):
        return "embedding"
    return "matrix" if dimensions >= 2 else "vector"
