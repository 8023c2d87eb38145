"""The CUDA code of the loss's compiled softmax, written out by Inductor without a GPU, and what it takes.

    python tests/kernels/loss_kernel.py a100 float32 neg_entropy top_k_mass=14     one JSON object a line

Needs triton and g++ beside the CPU build of torch. A process of its own for each device: fake_cuda replaces internals.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import fake_cuda
import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import _recursive_joint_graph_passes, _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from clm_owt.batch import padded_columns
from clm_owt.model.losses import _penalty, compiled_softmax

VOCABULARY, ROWS = 50_257, 4_677
BYTES = {"*fp32": 4, "*bf16": 2, "*i64": 8, "*i32": 4, "*i1": 1}


def lower(graph, arguments, codes):
    mode = torch._guards.detect_fake_mode(arguments)
    with V.set_fake_mode(mode):
        _recursive_joint_graph_passes(graph)
        _recursive_post_grad_passes(graph, is_inference=True)
        lowering = GraphLowering(graph, example_inputs=arguments, shape_env=mode.shape_env, is_inference=True)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*arguments)
            codes.append(lowering.codegen()[0].value)
    return graph


def written_out(penalty_type: str, top_k: int, logits_dtype: torch.dtype) -> list[str]:
    """Inductor's programs, one a graph."""
    codes: list[str] = []
    inference = functools.partial(lower, codes=codes)
    backend = aot_autograd(
        fw_compiler=inference, inference_compiler=inference, decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )  # fmt: skip
    softmax = compiled_softmax(backend)
    with FakeTensorMode(), torch.no_grad():
        z = torch.empty(ROWS, padded_columns(VOCABULARY), dtype=logits_dtype, device="cuda")
        target, scale = torch.empty(ROWS, 1, dtype=torch.int64, device="cuda"), torch.empty(ROWS, 1, device="cuda")
        penalty = _penalty(penalty_type, 0.01, top_k)
        softmax(z, target, scale, penalty=penalty, vocab_size=VOCABULARY, gradient_dtype=torch.bfloat16)
    return codes


def kernels(code: str) -> list[tuple[str, str]]:
    """Name and source of each kernel of a program."""
    return re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL)


def calls(code: str) -> list[str]:
    """The kernels and library functions that a program calls."""
    pattern = r"^\s+(triton_\w+\.run\(|extern_kernels\.\w+\(|\S+ = torch\.ops\.aten)"
    return [line.strip() for line in code.splitlines() if re.search(pattern, line)]


def bytes_a_logit(source: str) -> int:
    """Of all reads and writes of a kernel that go along the columns; a second read counts again, though a cache may
    serve it."""
    types = eval(re.search(r"'signature': (\{.*?\}), 'device'", source)[1])
    body = source[source.index("def triton") :]
    accesses = re.findall(r"tl\.(?:load|store)\((\w+) \+ \((.*)", body)
    return sum(BYTES[types[pointer]] for pointer, rest in accesses if "r0_" in rest.split("),")[0])


def resources(name: str, source: str) -> list[dict[str, object]]:
    """Of each configuration that would be tried on the device: registers and spilled bytes of a thread (these are on
    its stack), and how memory is read and written."""
    from torch._inductor.codecache import PyCodeCache

    tuner = getattr(PyCodeCache.load(source), name)
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = []
    for config in tuner.configs:
        compiled = tuner._precompile_config(config).kernel.asm
        file = pathlib.Path(tempfile.mkdtemp()) / "kernel.cubin"
        file.write_bytes(compiled["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True).stdout
        pattern = r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
        registers, stack, local = map(int, re.search(pattern, usage).groups())
        accesses = sorted(set(re.findall(r"\b((?:ld|st)\.global[\w.:]*)", compiled["ptx"])))
        found.append({"registers": registers, "spilled": stack + local, "accesses": accesses, "config": str(config)})
    return found


def main(device: str, logits: str, *penalties: str) -> None:
    import torch._inductor.config
    from torch._inductor.runtime import triton_helpers

    fake_cuda.configure(device)
    torch._inductor.config.use_static_triton_launcher = False
    torch._inductor.config.use_static_cuda_launcher = False
    triton_helpers.set_driver_to_gpu = lambda: None
    for penalty in penalties:
        penalty_type, _, top_k = penalty.partition("=")
        codes = written_out(penalty_type, int(top_k or 5), getattr(torch, logits))
        found = [kernel for code in codes for kernel in kernels(code)]
        print(
            json.dumps(
                {
                    "device": device,
                    "logits": logits,
                    "penalty": penalty,
                    "graphs": len(codes),
                    "calls": sum(len(calls(code)) for code in codes),
                    "bytes": sum(bytes_a_logit(source) for _, source in found),
                    "kernels": [resources(*kernel) for kernel in found],
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
