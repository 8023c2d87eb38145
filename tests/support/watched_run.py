"""The main job, watched and disturbed: `watched_run.py SPEC`, in place of run_clm_owt.py.

SPEC is a JSON file with a list of runs, done one after the other by the same processes:

    argv            the options of run_clm_owt.py
    record          folder: the blocks consumed by each step, and the collectives of the last one
    gradients       true: and the weights before each step, loss and gradient there
    weights         folder of an earlier record: loss and gradient are taken at the weights recorded there
    errors          [{"rank", "at", "kind", "times"}]: `at` is the number of a step, "last micro-batch of STEP" or
                    "validation"; `kind` is "memory", "kill" or "other". At "loss scale of STEP" it is so large that
                    the gradient overflows
    budgets         {rank: bytes} that the memory is said to be
    rlimit          {rank: bytes} of address space left to that process when its search begins
    mixed_precision bf16, or fp16, which Accelerate does not do on a CPU
    sharded         FSDP2 over gloo, which Accelerate does not do on a CPU
    copy_of         folder of an earlier run, from whose copy this one goes on
    back_to         step after which it goes on: the copy's later checkpoints are removed, and it is not finished

What watches and disturbs is handed to `run_clm_owt.main`: a trainer, the processes, the search for the micro-batch.
"""

import functools
import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import run_clm_owt
from clm_owt.training import checkpoint, device_memory
from clm_owt.training.micro_batch_search import MicroBatchSearch, find_micro_batch
from clm_owt.training.processes import Processes, full_tensor
from clm_owt.training.trainer import Trainer


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class Watch:
    """What is recorded of one run of the list, and the errors that are still to come in it."""

    def __init__(self, spec: dict):
        self.record = Path(spec["record"]) if "record" in spec else None
        self.weights = Path(spec["weights"]) if "weights" in spec else None
        self.gradients = spec.get("gradients", False)
        self._errors = [{"times": 1} | error for error in spec.get("errors", ()) if error["rank"] == rank()]
        if self.record:
            self.record.mkdir(parents=True, exist_ok=True)

    def asked(self, at: object) -> str | None:
        """The kind of the error that is to happen here, once."""
        for error in self._errors:
            if error["at"] == at and error["times"] > 0:
                error["times"] -= 1
                return error["kind"]
        return None

    def fail_where_asked(self, at: object) -> None:
        kind = self.asked(at)
        if kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "other":
            raise ValueError("not about memory")


def layer_norm_as_on_cuda(x, shape, weight, bias, eps, own=F.layer_norm):
    """CUDA's autocast gives LayerNorm all in float32, a CPU's does not."""
    return own(x, shape, weight.float(), bias.float(), eps)


class Collectives(TorchDispatchMode):
    """The calls of collectives, by name, and the bytes that they gather on the devices, by type."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.gathered: Counter[str] = Counter()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        if func._opname == "_allgather_base_":
            self.gathered[str(args[0].dtype)] += args[0].nbytes
        return func(*args, **(kwargs or {}))


class WatchedTrainer(Trainer):
    """Records what each step consumed, and fails where the spec asks for it."""

    watch: Watch  # set for each run of the list

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.consumed: list[list[int]] = []  # [position in the global batch, block]
        self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, model, arguments, inputs) -> None:
        if not model.training and inputs.get("labels") is not None:
            self.watch.fail_where_asked("validation")

    def train_step(self):
        step = self.state.step + 1
        if self.watch.gradients:
            self.write_gradient(step)
        with Collectives() as collectives:
            result = super().train_step()
        if self.watch.record:
            last = {"calls": collectives.calls, "gathered": collectives.gathered}
            (self.watch.record / f"collectives-{rank()}.json").write_text(json.dumps(last))
            with (self.watch.record / f"blocks-{rank()}.jsonl").open("a") as file:
                file.write(f"{json.dumps({'step': step, 'blocks': self.consumed})}\n")
        return result

    def write_gradient(self, step: int) -> None:
        """Loss and gradient of this step by the run's own code, at the weights of the earlier record or its own."""
        record, parameters = self.watch.record, dict(self.model.named_parameters())
        own = {name: p.detach().clone() for name, p in parameters.items()}
        if self.watch.weights:
            load_weights(parameters, torch.load(self.watch.weights / f"weights-{step}.pt"))
        elif rank() == 0:
            torch.save(own, record / f"weights-{step}.pt")
        loss = self.processes.sum(self.accumulate_gradients())[0]
        self.gradient_sum.finish()
        gradient = torch.cat([full_tensor(p.grad).reshape(-1) for p in parameters.values()])
        if rank() == 0:
            torch.save({"loss": loss.item(), "gradient": gradient}, record / f"gradient-{step}.pt")
        self.optimizer.zero_grad(set_to_none=True)
        load_weights(parameters, own)

    def forward_and_backward(self, piece, **more):
        step, position, pieces = self.state.step + 1, self.state.position, self.cut()
        if piece == pieces[0]:
            self.consumed = []  # a step that is repeated begins again
        self.watch.fail_where_asked(step)
        scale = self.state.loss_scale
        if self.watch.asked(f"loss scale of {step}"):
            self.state.loss_scale = 2.0**60
        result = super().forward_and_backward(piece, **more)
        self.state.loss_scale = scale
        if piece == pieces[-1]:
            self.watch.fail_where_asked(f"last micro-batch of {step}")  # its gradients are there already
        if piece.weight:
            ids = self.blocks.ids(position + piece.start, position + piece.stop)
            self.consumed += np.stack([np.arange(piece.start, piece.stop), ids], 1).tolist()
        return result


@torch.no_grad()
def load_weights(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        weight = weights[name]
        parameter.copy_(weight if isinstance(weight, DTensor) else checkpoint.placed_like(weight, parameter))


def search_under_limits(spec: dict, record: Path | None, *arguments, **more) -> MicroBatchSearch:
    """The search for the micro-batch, in the memory that the spec leaves to this process."""
    if record:
        (record / f"VmSize-{rank()}").write_text(str(device_memory.process_sizes()["VmSize"]))
    if str(rank()) in spec.get("rlimit", {}):
        device_memory.start_threads()
        size = device_memory.process_sizes()["VmSize"] + spec["rlimit"][str(rank())]
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    if str(rank()) in spec.get("budgets", {}):
        more["available"] = lambda device: spec["budgets"][str(rank())]
    return find_micro_batch(*arguments, **more)


def handed_in(spec: dict, last: bool) -> dict[str, object]:
    """What `run_clm_owt.main` is given besides its options."""
    watching = Watch(spec)

    class ThisTrainer(WatchedTrainer):
        watch = watching

    class TheseProcesses(Processes):
        def __init__(self, accelerator):
            super().__init__(accelerator)
            self.sharded = spec.get("sharded", False)
            self.accelerator = accelerator
            self.mixed_precision = accelerator.state._mixed_precision = spec.get("mixed_precision", "no")
            accelerator.native_amp = self.mixed_precision != "no"
            if self.sharded and self.mixed_precision == "bf16":
                F.layer_norm = layer_norm_as_on_cuda

        def __exit__(self, *exception):
            self.accelerator.state._mixed_precision = "no"  # the runs of the list share it
            F.layer_norm = layer_norm_as_on_cuda.__defaults__[0]
            if last:  # the runs of the list share the process groups
                super().__exit__(*exception)

    search = functools.partial(search_under_limits, spec, watching.record)
    return {"trainer_class": ThisTrainer, "processes_class": TheseProcesses, "search": search}


def go_back(finished: str, step: int, output: Path) -> None:
    """Make of a finished run one in `output` that was interrupted after an earlier checkpoint."""
    shutil.copytree(finished, output)
    for later in (output / "checkpoints").iterdir():
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    plan = json.loads((output / "plan.json").read_text())
    del plan["finished"]
    (output / "plan.json").write_text(json.dumps(plan))


def main(spec_file: str) -> None:
    specs = json.loads(Path(spec_file).read_text())
    for spec in specs:
        if "back_to" in spec and rank() == 0:
            go_back(spec["copy_of"], spec["back_to"], Path(spec["argv"][spec["argv"].index("--output_dir") + 1]))
        run_clm_owt.main(spec["argv"], **handed_in(spec, last=spec is specs[-1]))


if __name__ == "__main__":
    main(sys.argv[1])
