"""Memory that runs out is known in every form, and nothing else is taken for it."""

import pytest
import torch

from pattern_bench.core.memory import HalfDoneError, fits, is_out_of_memory


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "MPS backend out of memory (MPS allocated: 5.05 GB, other allocations: 2.29 GB, max allowed: 6.77 GB).",
        "Invalid buffer size: 24.00 GiB",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to",
        "std::bad_alloc",
        "NCCL error: unhandled cuda error, Last error: Cuda failure 2 'out of memory'",
    ],
)
def test_memory_that_runs_out_is_known_in_every_form(message):
    def runs_out():
        raise RuntimeError(message)

    assert is_out_of_memory(RuntimeError(message))
    assert not fits(runs_out)


def test_memory_of_the_host_that_really_runs_out_is_known():
    assert not fits(lambda: torch.empty(2**56, dtype=torch.uint8))
    assert not fits(lambda: bytearray(2**60))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, opa, opb, m, n, k)`",
        "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx(handle, opa, opb, m, n, k)`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "CUDA error: an illegal memory access was encountered",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
    ],
)
def test_other_failures_are_no_lack_of_memory(message):
    def fails():
        raise RuntimeError(message)

    assert not is_out_of_memory(RuntimeError(message))
    with pytest.raises(RuntimeError):
        fits(fails)


def test_what_was_half_done_is_not_tried_again():
    def half_done():
        raise HalfDoneError("half of the sums")

    with pytest.raises(MemoryError):
        fits(half_done)
