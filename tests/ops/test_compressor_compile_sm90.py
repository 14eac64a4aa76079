"""The compressor's Triton kernels compile for Hopper without a GPU, and spill no data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dsv4_fusion import ops
from tests.ops.test_compile_sm90 import POINTERS, Case, compile_triton

POINTERS[torch.int16] = "*i16"
BF16, FP32 = torch.bfloat16, torch.float32


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dense_cases() -> Iterator[Case]:
    for name, d, ratio, dtype, table, overlap, nope in (
        ("csa", 512, 4, BF16, False, False, False),
        ("csa", 128, 4, BF16, False, True, False),
        ("csa", 512, 4, FP32, True, False, True),
        ("hca", 512, 128, BF16, False, False, False),
        ("hca", 512, 128, FP32, True, False, True),
    ):
        width = 2 * d if name == "csa" else d
        rows = (4096,) if table else (1, 4096 // ratio)
        arguments = {
            "kv": empty(1, 4096, width, dtype=dtype),
            "gate": empty(1, 4096, width, dtype=dtype),
            "position_bias": empty(ratio, width),
            "norm_weight": empty(d),
            "cos": empty(*rows, 32, dtype=FP32 if table else BF16),
            "sin": empty(*rows, 32, dtype=FP32 if table else BF16),
            "round_nope": nope,
            "dtype": BF16,
        }
        if overlap:
            arguments |= {"overlap_kv": empty(1, ratio, d, dtype=BF16), "overlap_gate": empty(1, ratio, d)}
        label = f"compress_{name}-{d}x{ratio}-{dtype}-table={table}-overlap={overlap}".replace("torch.", "")
        patch = {"has_e4m3": lambda device: True}
        yield Case("triton", "dsv4_fusion.ops.triton.compressor", f"compress_{name}", arguments, label, patch)


def paged_cases() -> Iterator[Case]:
    module, integers = "dsv4_fusion.ops.triton.compressor_cache", torch.int64
    for name, d, ratio, format, dtype in (
        ("csa", 512, 4, "kv", BF16),
        ("csa", 128, 4, "fp8", BF16),
        ("csa", 128, 4, "mxfp4", BF16),
        ("csa", 512, 4, "kv", FP32),
        ("hca", 512, 128, "kv", BF16),
    ):
        width = 2 * d if name == "csa" else d
        bytes_ = ops.kv_cache_bytes(64, d) if format == "kv" else ops.indexer_cache_bytes(64, format, d)
        arguments = {
            "kv": empty(100, width, dtype=dtype),
            "gate": empty(100, width, dtype=dtype),
            "position_bias": empty(ratio, width),
            "norm_weight": empty(d),
            "positions": empty(100, dtype=integers),
            "requests": empty(100, dtype=torch.int32),
            "starts": empty(9, dtype=torch.int32),
            "cos": empty(4096, 32),
            "sin": empty(4096, 32),
            "state": empty(50, 16, 2, width),
            "state_table": empty(8, 16, dtype=torch.int32),
            "cache": empty(9, bytes_, dtype=torch.uint8),
            "slots": empty(100, dtype=integers),
            "format": format,
            "hadamard": format == "mxfp4",
        }
        label = f"compress_{name}_insert-{d}x{ratio}-{format}-{dtype}".replace("torch.", "")
        # Windows of 128 rows are held to 80 registers a thread, so that a multiprocessor has three programs: some
        # addresses and indices, of which there are few uses, do not fit. Tiles do.
        patch = {"has_e4m3": lambda device: True}
        yield Case("triton", module, f"compress_{name}_insert", arguments, label, patch, spills=ratio == 128)
    arguments = {
        "cache": empty(10, ops.kv_cache_bytes(64), dtype=torch.uint8),
        "block_table": empty(3, 4, dtype=torch.int32),
        "lengths": empty(3, dtype=torch.int32),
    }
    yield Case("triton", module, "kv_load", arguments, "kv_load")


CASES = [*dense_cases(), *paged_cases()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_for_sm90(case, tmp_path, monkeypatch):
    (binary,) = compile_triton(case, tmp_path, monkeypatch)
    assert binary.cubin[:4] == b"\x7fELF"
    if binary.stack is not None:
        allowed = 96 if case.spills else 0  # a tile has 128 bytes a thread
        assert binary.stack <= allowed, f"{binary.kernel} spills {binary.stack} bytes a thread"


def test_every_operator_is_covered():
    operators = {name for name in torch.ops.dsv4.__dict__ if name.startswith(("compress_", "kv_"))}
    assert operators <= {case.function for case in CASES}


# CuTe DSL


def cute_arguments(d: int, ratio: int, overlap: bool, n: int, tokens: int = 100, requests: int = 8) -> dict:
    """Of an insert, by name, in order; not on a device, so that none is needed."""
    width, integers = (1 + overlap) * d, torch.int64
    return {
        "kv": torch.zeros(tokens, width, dtype=BF16),
        "gate": torch.zeros(tokens, width, dtype=BF16),
        "position_bias": torch.zeros(ratio, width),
        "norm_weight": torch.zeros(d),
        "positions": torch.zeros(tokens, dtype=integers),
        "requests": torch.zeros(tokens, dtype=torch.int32),
        "starts": torch.zeros(requests + 1, dtype=torch.int32),
        "cos": torch.zeros(4096, 32),
        "sin": torch.zeros(4096, 32),
        "state": torch.zeros(50, n, 2, width),
        "state_table": torch.zeros(requests, 4, dtype=torch.int32),
        "cache": torch.zeros(9, ops.kv_cache_bytes(64, d), dtype=torch.uint8),
        "slots": torch.zeros(tokens, dtype=integers),
    }


MIXED = (torch.int64, torch.int32, torch.int32, torch.int32, torch.int64)
OTHER = (torch.int32, torch.int64, torch.int64, torch.int64, torch.int32)
CUTE = [
    # d, ratio, overlap, n, rope, dtypes of kv, bias, weight and cos, integers, format, hadamard, page size
    (512, 4, True, 8, 64, BF16, FP32, FP32, FP32, MIXED, "kv", False, 64),
    (512, 4, True, 8, 64, FP32, BF16, BF16, BF16, OTHER, "kv", False, 1),
    (512, 4, True, 3, 64, BF16, FP32, BF16, FP32, MIXED, "kv", False, 64),
    (256, 8, False, 8, 64, BF16, BF16, FP32, FP32, MIXED, "kv", False, 64),
    (128, 2, True, 1, 64, FP32, FP32, FP32, FP32, MIXED, "kv", False, 64),
    (128, 4, True, 8, 64, BF16, FP32, FP32, FP32, MIXED, "fp8", False, 64),
    (128, 4, True, 8, 64, BF16, FP32, FP32, FP32, MIXED, "fp8", True, 64),
    (128, 4, True, 8, 64, BF16, FP32, FP32, FP32, MIXED, "mxfp4", True, 64),
    (128, 4, False, 16, 128, FP32, BF16, FP32, BF16, OTHER, "mxfp4", False, 16),
    (512, 128, False, 128, 64, BF16, FP32, FP32, FP32, MIXED, "kv", False, 64),
    (512, 128, False, 16, 64, FP32, BF16, BF16, BF16, OTHER, "kv", False, 64),
    (256, 32, True, 32, 64, BF16, FP32, FP32, FP32, MIXED, "kv", False, 64),
    (128, 64, False, 64, 64, FP32, FP32, FP32, FP32, MIXED, "kv", False, 64),
]


@pytest.mark.parametrize("key", CUTE, ids=lambda key: f"{key[0]}x{key[1]}-{key[10]}-{key[5]}")
def test_cute_dsl_compiles_for_sm90(key, tmp_path):
    pytest.importorskip("cutlass")  # one compiler of several may be missing
    pytest.importorskip("tvm_ffi")
    from dsv4_fusion.ops.cutedsl import compressor_cache
    from tests.ops.test_indexer_cutedsl import _compile

    _compile(tmp_path, compressor_cache.build, *key)
