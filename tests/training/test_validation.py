"""Validation loss and perplexity against a direct computation in float64."""

import json
import math
import subprocess
import sys

import pytest
from support.runs import ROOT, environment

# 13 blocks: no batch size but 1 and 13 divides them, and neither 2 nor 3 processes do.
ON_PROCESSES = """
import json
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import GPT2Config
from clm_owt.training.validation import evaluate
from clm_owt.training.processes import Processes
from clm_owt.model.gpt2 import GPT2ForPretraining
from clm_owt.model.losses import perplexity
from clm_owt.stopping import StopRequest

class Blocks:
    blocks = np.random.RandomState(0).randint(0, 97, (13, 24))
    def __len__(self): return len(self.blocks)
    def read(self, rows): return self.blocks[np.asarray(rows)]

accelerator = Accelerator(cpu=True)
processes = Processes(accelerator)
torch.manual_seed(0)
config = GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_layer=2, n_head=2,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
model = GPT2ForPretraining(config)
for parameter in model.parameters():
    parameter.data.mul_(4)  # losses away from ln 97
with processes:
    results = [evaluate(model, Blocks(), 24, m, accelerator, processes, StopRequest()) for m in (1, 4, 5, 13)]
if processes.rank == 0:
    ids = torch.from_numpy(Blocks.blocks)
    with torch.no_grad():
        logits = model.double()(ids).logits[:, :-1]
        direct = F.cross_entropy(logits.reshape(-1, 97), ids[:, 1:].reshape(-1)).item()
    print(json.dumps([direct, [[r.loss, perplexity(r.loss)] for r in results], processes.count]))
"""


@pytest.mark.parametrize("count", [1, 2, 3])
def test_perplexity_is_that_of_a_direct_computation_on_any_number_of_processes(tmp_path, count):
    script = tmp_path / "on_processes.py"
    script.write_text(ON_PROCESSES)
    command = [sys.executable, str(script)]
    if count > 1:
        launcher = "torch.distributed.run"
        command = [sys.executable, "-m", launcher, "--standalone", f"--nproc_per_node={count}", str(script)]
    env = environment(tmp_path, PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true")
    process = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    direct, results, processes = json.loads(process.stdout.splitlines()[-1])
    assert processes == count
    for loss, perplexity in results:
        assert loss == pytest.approx(direct, rel=1e-6)
        assert perplexity == pytest.approx(math.exp(direct), rel=1e-6)
        assert perplexity == math.exp(loss)


def test_the_metric_weighs_tokens_and_not_parts():
    from clm_owt.model.perplexity import Perplexity

    metric = Perplexity()
    metric.add(nll_sum=10.0, n_tokens=1)
    metric.add_batch(nll_sum=[3.0, 5.0], n_tokens=[4, 4])
    assert metric.compute() == {"loss": 2.0, "perplexity": math.exp(2.0), "n_tokens": 9}
