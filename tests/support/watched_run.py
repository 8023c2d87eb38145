"""The main job, watched and disturbed: `watched_run.py SPEC`, in place of run_clm_owt.py.

SPEC is a JSON file with a list of runs, done one after the other by the same processes:

    argv            the options of run_clm_owt.py
    record          folder: the blocks consumed by each step
    gradients       true: and the weights before each step, loss and gradient there
    weights         folder of an earlier record: loss and gradient are taken at the weights recorded there
    errors          [{"rank", "at", "kind", "times"}]: `at` is the number of a step, "last micro-batch of STEP" or
                    "validation"; `kind` is "memory" or "other"
    budgets         {rank: bytes} that the memory is said to be
    rlimit          {rank: bytes} of address space left to that process when its search begins
    sharded         FSDP2 over gloo, which Accelerate does not do on a CPU
    back_to         step: the run's later checkpoints are removed, and it is not finished
"""

import json
import os
import resource
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch.distributed.tensor import DTensor

import run_clm_owt
from clm_owt.model.gpt2 import GPT2ForPretraining
from clm_owt.training import (
    checkpoint,
    device_memory,
)
from clm_owt.training import (
    micro_batch_search as batching,
)
from clm_owt.training import (
    processes as machine,
)
from clm_owt.training import (
    trainer as loop,
)

RANK = int(os.environ.get("RANK", "0"))
originals = {
    "train_step": loop.train_step,
    "forward_and_backward": loop.forward_and_backward,
    "forward": GPT2ForPretraining.forward,
    "processes": machine.Processes.__init__,
    "available": batching.available_memory,
    "search": batching.find_micro_batch,
}


@torch.no_grad()
def load_weights(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        weight = weights[name]
        parameter.copy_(weight if isinstance(weight, DTensor) else checkpoint.placed_like(weight, parameter))


class Watch:
    """One run of the list."""

    def __init__(self, spec: dict):
        self.spec = spec
        self.record = Path(spec["record"]) if "record" in spec else None
        self.weights = Path(spec["weights"]) if "weights" in spec else None
        self.errors = [dict(error) for error in spec.get("errors", ()) if error["rank"] == RANK]
        self.step = 0
        self.blocks: list[list[int]] = []
        if self.record:
            self.record.mkdir(parents=True, exist_ok=True)

    def strike(self, at: object) -> None:
        for error in self.errors:
            if error["at"] == at and error.setdefault("times", 1) > 0:
                error["times"] -= 1
                if error["kind"] == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
                raise ValueError("not about memory")

    def train_step(self, run, state, guard):
        self.step = state.step + 1
        if self.spec.get("gradients"):
            self.write_gradient(run, state)
        result = originals["train_step"](run, state, guard)
        if self.record:
            with (self.record / f"blocks-{RANK}.jsonl").open("a") as file:
                file.write(f"{json.dumps({'step': self.step, 'blocks': self.blocks})}\n")
        return result

    def write_gradient(self, run, state) -> None:
        """Loss and gradient of this step by the run's own code, at the weights of the earlier record or its own."""
        parameters = dict(run.model.named_parameters())
        own = {name: p.detach().clone() for name, p in parameters.items()}
        if self.weights:
            load_weights(parameters, torch.load(self.weights / f"weights-{self.step}.pt"))
        elif RANK == 0:
            torch.save(own, self.record / f"weights-{self.step}.pt")
        loss = run.processes.sum(loop.accumulate_gradients(run, state))[0]
        run.processes.sum_gradients(list(parameters.values()))
        gradient = torch.cat([loop.whole(p.grad).reshape(-1) for p in parameters.values()])
        if RANK == 0:
            torch.save({"loss": loss.item(), "gradient": gradient}, self.record / f"gradient-{self.step}.pt")
        run.optimizer.zero_grad(set_to_none=True)
        load_weights(parameters, own)

    def forward_and_backward(self, run, state, piece, **more):
        cut = batching.cut(
            run.recipe.effective_batch_size, run.processes.count, RANK, state.micro_batch, run.processes.sharded
        )
        if piece == cut[0]:
            self.blocks = []  # a step that is repeated begins again
        self.strike(self.step)
        result = originals["forward_and_backward"](run, state, piece, **more)
        if piece == cut[-1]:
            self.strike(f"last micro-batch of {self.step}")  # its gradients are there already
        if piece.weight:
            ids = run.blocks.ids(state.position + piece.start, state.position + piece.stop)
            self.blocks += np.stack([np.arange(piece.start, piece.stop), ids], 1).tolist()
        return result

    def forward(self, model, *args, **kwargs):
        if not model.training and kwargs.get("labels") is not None:
            self.strike("validation")
        return originals["forward"](model, *args, **kwargs)

    def processes(self, processes, accelerator):
        originals["processes"](processes, accelerator)
        processes.sharded = self.spec.get("sharded", False)

    def available(self, device):
        return self.spec.get("budgets", {}).get(str(RANK)) or originals["available"](device)

    def search(self, *args, **kwargs):
        if self.record:
            (self.record / f"VmSize-{RANK}").write_text(str(device_memory.process_sizes()["VmSize"]))
        left = self.spec.get("rlimit", {}).get(str(RANK))
        if left:
            device_memory.start_threads()
            size = device_memory.process_sizes()["VmSize"] + left
            resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        return originals["search"](*args, **kwargs)


def go_back(output: Path, step: int) -> None:
    for later in (output / "checkpoints").iterdir():
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    plan = json.loads((output / "plan.json").read_text())
    del plan["finished"]
    (output / "plan.json").write_text(json.dumps(plan))


def main(spec_file: str) -> None:
    specs = json.loads(Path(spec_file).read_text())
    leave = machine.Processes.__exit__
    for spec in specs:
        watch = Watch(spec)
        # The runs share the process groups, which go with the last of them.
        machine.Processes.__exit__ = leave if spec is specs[-1] else lambda *_: None
        if "back_to" in spec and RANK == 0:
            go_back(Path(spec["argv"][spec["argv"].index("--output_dir") + 1]), spec["back_to"])
        loop.train_step = watch.train_step
        loop.forward_and_backward = watch.forward_and_backward
        GPT2ForPretraining.forward = lambda model, *a, watch=watch, **k: watch.forward(model, *a, **k)
        machine.Processes.__init__ = lambda processes, a, watch=watch: watch.processes(processes, a)
        batching.available_memory = watch.available
        batching.find_micro_batch = watch.search
        run_clm_owt.main(spec["argv"])


if __name__ == "__main__":
    main(sys.argv[1])
