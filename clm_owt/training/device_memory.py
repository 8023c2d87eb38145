"""Memory of the device that a process computes on: how much there is, a limit on it, its peak, and errors about it."""

import contextlib
import ctypes
import errno
import gc
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

try:
    import resource
except ImportError:  # Windows
    resource = None

# Out-of-memory errors that Accelerate's should_reduce_batch_size does not know, or only in one of their forms.
MORE_MEMORY_ERRORS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
)
# What a run comes to need beside tensors once it trains, where `ulimit` counts it: stacks and heaps of threads that
# read, save and draw. Some 100 MiB were seen, and without them the process is ended by the C library.
NOT_FOR_TENSORS = 256 * 2**20
# What PyTorch allows itself on MPS unless told otherwise (PYTORCH_MPS_HIGH_WATERMARK_RATIO).
MPS_DEFAULT_FRACTION = 1.7


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # a file of tokens that could not be mapped
        return True
    if isinstance(error, Exception) and should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MORE_MEMORY_ERRORS)


def release_cached_memory() -> None:
    """Give freed memory back to the device, and what glibc keeps of it to the system, once nothing refers to the
    tensors of the failed try."""
    gc.collect()
    clear_device_cache()
    if trim := of_glibc("malloc_trim"):
        trim(0)


@dataclass(frozen=True)
class Limit:
    """Bytes that may be used, and of them those that are."""

    total: int
    used: int

    @property
    def left(self) -> int:
        return max(self.total - self.used, 0)


def total_memory(device: torch.device) -> int:
    """Bytes of memory that `device` has; on a CPU no more than cgroup and `ulimit` allow."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return min([psutil.virtual_memory().total, *(limit.total for limit in cgroup_limits() + ulimits())])


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still come to hold on `device`: what others leave free, and on an accelerator what
    its own allocator holds already. On a CPU within the limits of the cgroup and of `ulimit`, and shared evenly with
    the other processes that were launched on this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    shared = min([psutil.virtual_memory().available, *(limit.left for limit in cgroup_limits())])
    own = (limit.left - min(NOT_FOR_TENSORS, limit.left // 2) for limit in ulimits())
    return min([shared // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), *own])


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[Limit]:
    """The memory limits of this process's cgroup and of those around it. Pages of files that the kernel can drop at
    once count as unused. Version 2 of cgroups, and 1."""
    limits = []
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, total, used, droppable = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, droppable = root / "memory", "total_inactive_file"
            total, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = mount / path.strip("/")
        # In a container the path may be the host's, of which only the end of the way up, the mount itself, is there.
        for group in (own, *own.parents):
            if not group.is_relative_to(mount):
                break
            with contextlib.suppress(OSError, ValueError):  # no such folder; "max"
                bytes_total, bytes_used = int((group / total).read_text()), int((group / used).read_text())
                match = re.search(rf"^{droppable} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
                limits.append(Limit(bytes_total, bytes_used - (int(match[1]) if match else 0)))
    return limits


def ulimits() -> list[Limit]:
    """The limits of this process's address space (`ulimit -v`) and data (`ulimit -d`), where set."""
    sizes = process_sizes()
    if sizes is None:
        return []
    soft = {"VmSize": resource.getrlimit(resource.RLIMIT_AS)[0], "VmData": resource.getrlimit(resource.RLIMIT_DATA)[0]}
    return [Limit(total, sizes[name]) for name, total in soft.items() if total != resource.RLIM_INFINITY]


def process_sizes() -> dict[str, int] | None:
    """Sizes of this process in bytes by their names in /proc/self/status (VmSize, VmData, VmHWM, ...); None where
    there is no Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = re.findall(r"^(\w+):\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in fields}


def ceiling(device: torch.device, budget: int) -> int:
    """What `limited` takes, so that a process may come to hold `budget` bytes, as available_memory counts them: these
    on an accelerator, and on a CPU the data that it has already beside them."""
    if device.type == "cpu" and (sizes := process_sizes()) is not None:
        return sizes["VmData"] + budget
    return budget


@contextlib.contextmanager
def limited(device: torch.device, most: int) -> Iterator[None]:
    """Let this process hold at most `most` bytes in all, as `ceiling` gives them.

    On a CPU by RLIMIT_DATA, under which PyTorch's allocator raises where otherwise the kernel would end the process.
    That is Linux's meaning of it: macOS counts no mapped memory there and Windows has no such limit, so a CPU's memory
    is not limited on them. Not run on an accelerator by the project yet.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(most / total, 1.0), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    elif device.type == "mps":
        torch.mps.set_per_process_memory_fraction(most / torch.mps.recommended_max_memory())
        try:
            yield
        finally:
            default = os.environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO", MPS_DEFAULT_FRACTION)
            torch.mps.set_per_process_memory_fraction(float(default))
    elif process_sizes() is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    else:
        yield


def start_threads() -> None:
    """Make PyTorch start its threads on a CPU: one that cannot be started under a limit ends the process."""
    try:
        a = torch.ones(512, 512, requires_grad=True)  # 262,144 elements, 8 times what one thread would keep to itself
        (a @ a).exp().sum().backward()
    except Exception as error:
        if not is_out_of_memory(error):  # then nothing else fits either, which the search says better
            raise


def share_one_heap() -> None:
    """Under a `ulimit` let later threads allocate from the main heap: glibc would reserve 64 MiB of address space for
    each, which counts as used."""
    m_arena_max = -8  # malloc.h
    if ulimits() and (mallopt := of_glibc("mallopt")):
        mallopt(m_arena_max, 1)


def keep_freed_memory(keep: bool = True) -> None:
    """Let glibc keep what is freed for what is allocated next. By itself it gives large pieces back to the system at
    once; a step allocates and frees the same tensors as the one before, and pages that come anew are zeroed first,
    170,000 of them in a step of GPT-2 small in bf16. The process stays as large as it once was. Not under a `ulimit`,
    where gaps between what is kept would count as used.

    Without `keep`: as glibc does it by itself, after it has seen that large pieces come and go.
    """
    mallopt = of_glibc("mallopt")
    if mallopt is None or (keep and ulimits()):
        return
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4  # malloc.h
    mallopt(m_mmap_max, 0 if keep else 65_536)
    mallopt(m_trim_threshold, -1 if keep else 64 * 2**20)
    if not keep:
        mallopt(m_mmap_threshold, 32 * 2**20)
        release_cached_memory()


def of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then that since the start
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since the reset: of tensors on CUDA, of the whole process (resident) on a Linux CPU; on MPS
    what is allocated now, which is the best there is. None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    sizes = process_sizes()
    return sizes["VmHWM"] if sizes else None
