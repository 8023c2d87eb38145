import resource

import pytest
import torch

from clm_owt.training.device_memory import is_out_of_memory, keep_freed_memory


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


def test_kept_memory_is_not_asked_for_again():
    pages = 50 * 2**20 // resource.getpagesize()

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(pages * resource.getpagesize())
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    try:
        keep_freed_memory()
        new_pages()
        assert new_pages() < pages / 100
    finally:
        keep_freed_memory(False)
    assert new_pages() > pages / 2 and new_pages() > pages / 2
