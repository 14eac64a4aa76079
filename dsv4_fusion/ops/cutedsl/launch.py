"""Compilation, once for each combination of dtypes and model sizes, and launch through tvm-ffi.

Kernels are compiled against tensors without data, whose sizes and strides that vary at run time are symbols; a launch
takes torch's tensors and stream as they are.
"""

from __future__ import annotations

import functools
import threading

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

DTYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.float32: cutlass.Float32,
    torch.int32: cutlass.Int32,
    torch.int64: cutlass.Int64,
    torch.uint8: cutlass.Uint8,
    torch.float8_e4m3fn: cutlass.Float8E4M3FN,
}


_keep: list[object] = []  # they own the loaded code
_one_at_a_time = threading.Lock()  # nothing says that the compiler may run in several threads


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def symbol(divisibility: int = 1):
    """A size that is known at run time."""
    return cute.sym_int32(divisibility)


def tensor(dtype: torch.dtype, *shape, row: int = 1, align: int | None = None):
    """A tensor whose last dimension is contiguous; other strides are run-time multiples of ``row``."""
    strides = (*(cute.sym_int64(row) for _ in shape[1:]), 1)
    return make_fake_tensor(DTYPES[dtype], shape, strides, assumed_align=align)


def upright(dtype: torch.dtype, rows, columns):
    """A matrix whose columns are contiguous, and begin at multiples of 16 bytes."""
    return make_fake_tensor(DTYPES[dtype], (rows, columns), (1, cute.sym_int64(16 // dtype.itemsize)), assumed_align=16)


def strided(dtype: torch.dtype, *shape):
    """A tensor with any strides."""
    return make_fake_tensor(DTYPES[dtype], shape, tuple(cute.sym_int64() for _ in shape))


def compiled(kernel, *arguments, arch: str = "", options: str = ""):
    """``kernel(*arguments, stream)`` compiled; ``arch`` as "sm_90a", or empty for the current device's."""
    target = f" --gpu-arch {arch}" if arch else ""
    with _one_at_a_time:
        callable_ = cute.compile(
            kernel,
            *arguments,
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi{target} {options}".strip(),
        )
    _keep.append(callable_)
    # What it calls after two wrappers in Python for keyword arguments, which cost about a microsecond
    return getattr(callable_, "_tvm_ffi_function", None) or callable_
