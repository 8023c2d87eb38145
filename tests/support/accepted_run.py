"""The main job, with memory that ends in one of its steps, and its compiled code counted: `accepted_run.py SPEC`, in
place of run_clm_owt.py. SPEC is a JSON file:

    argv            the options of run_clm_owt.py
    tight_step      the step that finds too little memory for its micro-batch
    stand_in        true: in place of Inductor a backend that compiles nothing, which a CPU has done with at once
    record          a JSON file to write: of the last step, and of one before

What the record holds: `compiled_calls`, how often compiled code ran in the last step; `micro_batches` of that step;
`blocks`, the transformer blocks of the model; `compiled`, the graphs that Dynamo had made before the last step and
after it; `limit` and `needed`, bytes of the step that did not fit; `peak`, bytes at the last step's largest.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import run_clm_owt
from clm_owt.training import device_memory
from clm_owt.training.trainer import Trainer

COMPILED_CALL = "Torch-Compiled Region"  # what the profiler is told whenever compiled code runs


class AcceptedTrainer(Trainer):
    spec: dict
    record: dict

    def train_step(self):
        step = self.state.step + 1
        if step == self.total_steps:
            return self.count_compiled_code()
        if step == self.spec["tight_step"]:
            self.record["micro_batch_before"] = self.state.micro_batch
        else:  # the peak is of the last step before
            device_memory.reset_peak_memory(self.accelerator.device)
        return super().train_step()

    def count_compiled_code(self):
        before = graphs_compiled()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = super().train_step()
        calls = sum(event.count for event in profile.key_averages() if event.key.startswith(COMPILED_CALL))
        self.record |= {
            "compiled_calls": calls,
            "micro_batches": [piece.size for piece in self.cut()],
            "blocks": len(self.model.transformer.h),
            "compiled": [before, graphs_compiled()],
            "peak": device_memory.peak_memory(self.accelerator.device),
        }
        return result

    def accumulate_gradients(self):
        """In the tight step the first micro-batch size gets half of what it takes beside the state."""
        step, device = self.state.step + 1, self.accelerator.device
        if step != self.spec["tight_step"] or self.state.micro_batch != self.record["micro_batch_before"]:
            return super().accumulate_gradients()
        device_memory.release_cached_memory()
        if device.type == "cuda":
            held, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
            most, needed = (held + peak) // 2, peak
        else:  # nothing more at all
            most = needed = device_memory.process_sizes()["VmData"]
        self.record |= {"limit": most, "needed": needed}
        with device_memory.limited(device, most):
            return super().accumulate_gradients()


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def main(spec_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    if spec["stand_in"]:
        compile_with = torch.compile
        torch.compile = lambda *functions, **settings: compile_with(*functions, **settings | {"backend": "eager"})
    AcceptedTrainer.spec, AcceptedTrainer.record = spec, {}
    run_clm_owt.main(spec["argv"], trainer_class=AcceptedTrainer)
    Path(spec["record"]).write_text(json.dumps(AcceptedTrainer.record))


if __name__ == "__main__":
    main(sys.argv[1])
