"""Importing this makes torch's Inductor write its CUDA code on a machine without a GPU, with the CPU build of torch.

`fake_cuda.configure("a100" | "h100")` says for which one. Fake tensors (`FakeTensorMode`) on "cuda" can then be made,
sliced and compiled under `no_grad`; nothing is computed. It replaces internals of torch 2.13 and triton 3.7, so use it
in a process of its own.
"""

import collections
import ctypes
import pathlib
import subprocess
import tempfile

import torch
import torch._inductor.config as inductor_config
from torch.utils.cpp_extension import include_paths

DEVICES = {"a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108), "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132)}
NAME, CAPABILITY, PROCESSORS = DEVICES["a100"]
GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>); }
"""


def configure(device: str) -> None:
    global NAME, CAPABILITY, PROCESSORS
    NAME, CAPABILITY, PROCESSORS = DEVICES[device]


def _load_guard() -> None:
    """A device guard for CUDA that does nothing: without it fake CUDA tensors cannot be sliced. Needs g++."""
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "guard.cpp").write_text(GUARD)
    library = pathlib.Path(torch.__file__).parent / "lib"
    subprocess.run(
        [
            "g++",
            "-shared",
            "-fPIC",
            "-std=c++20",
            "-O1",
            *[f"-I{p}" for p in include_paths()],
            "guard.cpp",
            "-o",
            "libguard.so",
            f"-L{library}",
            "-lc10",
            f"-Wl,-rpath,{library}",
        ],
        cwd=folder,
        check=True,
    )
    ctypes.CDLL(str(folder / "libguard.so"))


Properties = collections.namedtuple(
    "Properties",
    "name major minor total_memory multi_processor_count regs_per_multiprocessor "
    "max_threads_per_multi_processor warp_size gcnArchName max_threads_per_block L2_cache_size "
    "shared_memory_per_block_optin shared_memory_per_block shared_memory_per_multiprocessor",
)


def properties(*_, **__) -> Properties:
    return Properties(
        NAME, *CAPABILITY, 85 * 10**9, PROCESSORS, 65536, 2048, 32, "", 1024, 40 * 2**20, 166912, 49152, 167936
    )


def _install() -> None:
    inductor_config.force_disable_caches = True
    inductor_config.compile_threads = 1
    inductor_config.triton.autotune_at_compile_time = False
    inductor_config.joint_graph_constant_folding = False
    import torch._dynamo.device_interface as device_interface

    class Interface(device_interface.CudaInterface):
        class Worker:
            set_device = staticmethod(lambda device: None)
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(properties)

        get_device_properties = staticmethod(properties)
        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        is_available = staticmethod(lambda: True)
        set_device = staticmethod(lambda device: None)
        synchronize = staticmethod(lambda device=None: None)
        get_compute_capability = staticmethod(lambda device=None: CAPABILITY[0] * 10 + CAPABILITY[1])
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)
        is_dtype_supported = staticmethod(lambda dtype, including_emulation=False: True)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    device_interface.init_device_reg()
    device_interface.register_interface_for_device("cuda", Interface)
    device_interface.register_interface_for_device("cuda:0", Interface)
    for name, value in {
        "get_device_properties": properties,
        "get_device_capability": lambda *a, **k: CAPABILITY,
        "get_device_name": lambda *a, **k: NAME,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *a, **k: True,
        "get_rng_state": lambda *a, **k: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *a, **k: None,
        "_exchange_device": lambda d: 0,
        "_maybe_exchange_device": lambda d: 0,
    }.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "12.8"
    import torch.utils._triton as torch_triton

    for name in dir(torch_triton):
        if hasattr(getattr(torch_triton, name), "cache_clear"):
            getattr(torch_triton, name).cache_clear()
    import torch._inductor.fx_passes.fuse_attention as fuse_attention
    import torch._inductor.fx_passes.misc_patterns as misc_patterns
    import torch._inductor.fx_passes.pad_mm as pad_mm

    fuse_attention._sfdp_init = pad_mm._pad_mm_init = misc_patterns._misc_patterns_init = lambda *a, **k: None
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", CAPABILITY[0] * 10 + CAPABILITY[1], 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
        get_device_interface = staticmethod(lambda: torch.cuda)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda *a: 0)
        is_active = staticmethod(lambda: True)

    triton.runtime.driver.set_active(Driver())
    for name, value in {
        "_cuda_getDevice": lambda: 0,
        "_cuda_setDevice": lambda d: None,
        "_cuda_exchangeDevice": lambda d: 0,
        "_cuda_maybeExchangeDevice": lambda d: 0,
        "_cuda_getCurrentRawStream": lambda d: 0,
        "_cuda_getDeviceCount": lambda: 1,
    }.items():
        if not hasattr(torch._C, name):
            setattr(torch._C, name, value)


_load_guard()
_install()
