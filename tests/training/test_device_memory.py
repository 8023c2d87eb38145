import resource
import subprocess
import sys

import pytest
import torch

from clm_owt.training.device_memory import is_out_of_memory, ulimits


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (OSError(12, "Memory mapping file failed: Cannot allocate memory"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_that_are_about_memory_are_told_from_those_that_are_not(error, expected):
    assert is_out_of_memory(error) is expected


NEW_PAGES = """
import resource
from clm_owt.training.device_memory import keep_freed_memory

def new_pages(pages):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(pages * resource.getpagesize())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for keep in (True, False):
    keep_freed_memory(keep)
    print(*(new_pages(PAGES) for _ in range(3)))
"""


@pytest.mark.parametrize("limited", [False, True])
def test_kept_memory_is_not_asked_for_again_but_under_a_ulimit_it_is(limited):
    # In a process of its own: where a heap has its gaps depends on all that was in it before.
    pages = 50 * 2**20 // resource.getpagesize()
    limited = limited or bool(ulimits())
    command = f"ulimit -v 64000000; exec {sys.executable} -" if limited else f"exec {sys.executable} -"
    program = NEW_PAGES.replace("PAGES", str(pages))
    ran = subprocess.run(["bash", "-c", command], input=program, stdout=-1, text=True, timeout=60, check=True)
    kept, given_back = ([int(count) for count in line.split()] for line in ran.stdout.splitlines())
    most, few = 0.9 * pages, 0.01 * pages
    assert kept[0] > most
    assert all(count > most if limited else count < few for count in kept[1:])
    assert min(given_back[1:]) > most
