"""What the loss is on a GPU: its compiled softmax as Inductor writes it for one, compiled to machine code here."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import ROOT

from clm_owt.batch import softmax_traffic
from clm_owt.model.losses import MOST_COMPILED_TOP_K
from clm_owt.recipe import PENALTY_TYPES

pytestmark = pytest.mark.kernels


LARGEST_TOP_K = f"top_k_mass={MOST_COMPILED_TOP_K}"
LOGITS_BYTES = {"float32": 4, "bfloat16": 2}


@pytest.fixture(scope="module", params=itertools.product(["a100", "h100"], LOGITS_BYTES), ids="-".join)
def written_out(request) -> dict[str, dict]:
    """By penalty type. A100 has compute capability 8.0, H100 9.0."""
    command = [sys.executable, str(Path(__file__).with_name("loss_kernel.py")), *request.param, *PENALTY_TYPES]
    command.append(LARGEST_TOP_K)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {found["penalty"]: found for found in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("penalty", PENALTY_TYPES)
def test_the_softmax_of_a_chunk_is_one_graph_and_one_kernel(written_out, penalty):
    assert (written_out[penalty]["graphs"], written_out[penalty]["calls"]) == (1, 1)


@pytest.mark.parametrize("penalty", PENALTY_TYPES)
def test_it_reads_each_logit_three_times_and_writes_a_rounded_gradient(written_out, penalty):
    """14 bytes, 8 of rounded logits; top_k_mass finds each of its 5 likeliest tokens in a pass of its own."""
    found = written_out[penalty]
    logit = LOGITS_BYTES[found["logits"]]
    assert found["bytes"] == softmax_traffic(penalty, 5, 2, logit) == (7 if penalty == "top_k_mass" else 3) * logit + 2


@pytest.mark.parametrize("penalty", [*PENALTY_TYPES, LARGEST_TOP_K])
def test_it_needs_few_registers_spills_none_and_moves_vectors(written_out, penalty):
    [configurations] = written_out[penalty]["kernels"]
    most_spilled = 8 if penalty == LARGEST_TOP_K else 0  # bytes of a thread
    for found in configurations:
        assert found["registers"] < 100 and found["spilled"] <= most_spilled, found
        assert any(access.startswith("ld.") and ".v" in access for access in found["accesses"]), found
        assert any(access.startswith("st.") and ".v" in access for access in found["accesses"]), found
