"""Muon for the matrices of the transformer blocks, AdamW for everything else.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
orthogonal one, U V^T of its singular value decomposition, which five Newton-Schulz steps approximate. The scale
0.2 sqrt(max(rows, columns)) gives the update the root mean square that AdamW's has, so that rates and decay mean the
same for both (Liu 2025, "Muon is scalable for LLM training", arXiv 2502.16982). torch.optim.Muon computes the
same with adjust_lr_fn="match_rms_adamw", one by one; here equal shapes are one batched product, Q, K and V the three
matrices that they are, and the work is shared out over the processes.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from clm_owt.batch import share
from clm_owt.training.processes import Processes, full_tensor

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic of each step, from Jordan 2024
STEPS = 5
EPSILON = 1e-7
RMS_OF_ADAMW = 0.2

# So many elements are made orthogonal together, by all processes: some 0.3 GB of work space in bf16.
CHUNK_ELEMENTS = 2**25


def orthogonalize(matrices: Tensor) -> Tensor:
    """U S V^T, with S between 0.7 and 1.2 where it was not tiny, of each of `matrices` [n, rows, columns], with
    rows <= columns, floating. In their type."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def product_type(device: torch.device, mixed_precision: str) -> torch.dtype:
    """bf16, which the steps bear (as published), on a GPU that has it, and on a CPU where the run's other products
    are in bf16; float32 elsewhere, so that a run in float32 does not depend on what a CPU has."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = device.type == "cpu" and mixed_precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


class Muon(Optimizer):
    """Over `matrices` {name: parameter of two dimensions}; `rest` is the optimizer of all other parameters, which
    steps with this one. The fused projection `c_attn` counts as three matrices side by side along its longer side,
    whichever that is.

    Its state is one float32 tensor `momentum_buffer` a parameter, beside what `rest` keeps. All `processes` call
    `step` with equal gradients: each makes its part of the matrices orthogonal and gets the others'. Parameters that
    FSDP2 has sharded are gathered for it, a chunk at a time.
    """

    def __init__(
        self,
        matrices: dict[str, Parameter],
        rest: Optimizer,
        learning_rate: float,
        weight_decay: float,
        processes: Processes | None = None,
    ):
        super().__init__(list(matrices.values()), {"lr": learning_rate, "weight_decay": weight_decay})
        self._matrices = self.param_groups[0]
        self._pieces = {p: 3 if name.endswith("c_attn.weight") else 1 for name, p in matrices.items()}
        self._processes = processes
        mixed_precision = processes.mixed_precision if processes else "no"
        self.product_type = product_type(self._matrices["params"][0].device, mixed_precision)
        self._rest = rest
        self.param_groups += rest.param_groups  # the very dictionaries: a schedule sets the rates of both
        rest.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of both. Collective where there are several processes."""
        for shape, parameters in self._by_shape().items():
            for chunk in self._chunks(parameters, math.prod(shape)):
                self._step_chunk(chunk)
        self._rest.step()

    def _by_shape(self) -> dict[tuple[int, int], list[Parameter]]:
        """Parameters with a gradient, by the shape of their pieces, the shorter side first."""
        groups: dict[tuple[int, int], list[Parameter]] = {}
        for p in self._matrices["params"]:
            if p.grad is not None:
                short, long = sorted(p.shape)
                shape = tuple(sorted((short, long // self._pieces[p])))
                groups.setdefault(shape, []).append(p)
        return groups

    def _chunks(self, parameters: list[Parameter], piece: int) -> Iterator[list[Parameter]]:
        """The parameters in turns, so many that their pieces of `piece` elements come to about CHUNK_ELEMENTS."""
        chunk: list[Parameter] = []
        for p in parameters:
            chunk.append(p)
            if sum(self._pieces[p] for p in chunk) * piece >= CHUNK_ELEMENTS:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _step_chunk(self, parameters: list[Parameter]) -> None:
        lr, decay = self._matrices["lr"], self._matrices["weight_decay"]
        updates = [full_tensor(self._momentum(p)) for p in parameters]
        pieces = list(itertools.chain(*(self._split(p, u) for p, u in zip(parameters, updates, strict=True))))
        del updates
        orthogonal = iter(self._orthogonalize(pieces))
        for p in parameters:
            update = torch.empty(p.shape, device=p.device)
            for part in self._split(p, update):
                part.copy_(next(orthogonal).mT if part.shape[0] > part.shape[1] else next(orthogonal))
            if isinstance(p, DTensor):  # each process has all of it, and takes its shard
                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
            scale = RMS_OF_ADAMW * math.sqrt(max(part.shape))
            p.mul_(1 - lr * decay).add_(update, alpha=-lr * scale)

    def _momentum(self, p: Parameter) -> Tensor:
        """What is to be made orthogonal: Nesterov's mean of gradient and buffer, which takes the gradient in."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return p.grad.lerp(state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM), MOMENTUM)

    def _split(self, p: Parameter, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of the matrices that a tensor of the parameter's shape holds."""
        return tensor.chunk(self._pieces[p], dim=int(p.shape[1] > p.shape[0]))

    def _orthogonalize(self, pieces: list[Tensor]) -> Tensor:
        """[n, rows, columns], rows <= columns, of n pieces of equal shape or transposed: each is computed on one
        process. (With more processes than pieces some have nothing to do.)"""
        processes = self._processes
        count, rank = (processes.count, processes.rank) if processes else (1, 0)
        part = share(len(pieces), count, rank)
        mine = [piece.mT if piece.shape[0] > piece.shape[1] else piece for piece in pieces[part.start : part.stop]]
        shape, device = sorted(pieces[0].shape), pieces[0].device
        result = torch.empty(-(-len(pieces) // count), *shape, dtype=self.product_type, device=device)
        if mine:
            result[: len(mine)] = orthogonalize(torch.stack(mine).to(result.dtype))
        if count == 1:
            return result
        everyone = processes.gather_tensors(result)
        parts = [share(len(pieces), count, other) for other in range(count)]
        return torch.cat([theirs[: part.size] for theirs, part in zip(everyone, parts, strict=True)])
