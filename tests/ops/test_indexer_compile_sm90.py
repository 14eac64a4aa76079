"""The indexer's Triton kernels compile for Hopper without a GPU, and spill nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.ops.test_compile_sm90 import POINTERS, Case, compile_triton

POINTERS[torch.int16] = "*i16"
FP8 = torch.float8_e4m3fn
HEADS, PAIRS = 64, 32


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def query_cases() -> Iterator[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    functions = "indexer_q_fp8", "indexer_q_mxfp4"
    sizes = [
        *itertools.product(functions, (8192,), (128,), (False, True), (fp32,), (True,)),
        *itertools.product(functions, (1,), (128,), (True,), (fp32,), (True,)),
        *itertools.product(functions, (1,), (64,), (False,), (bf16,), (False,)),
    ]
    for function, tokens, d, hadamard, table, e4m3 in sizes:
        arguments = {
            "q": empty(tokens, HEADS, d, dtype=bf16),
            "positions": empty(tokens, dtype=torch.int64) if e4m3 else None,
            "cos": empty(4096 if e4m3 else tokens, PAIRS, dtype=table),
            "sin": empty(4096 if e4m3 else tokens, PAIRS, dtype=table),
            "weights": empty(tokens, HEADS, dtype=bf16),
            "hadamard": hadamard,
        }
        name = f"{function}-{tokens}x{HEADS}x{d}-hadamard={hadamard}-e4m3={e4m3}"
        patch = {"has_e4m3": lambda device, e4m3=e4m3: e4m3}
        yield Case("triton", "dsv4_fusion.ops.triton.indexer", function, arguments, name, patch)


def cache_cases() -> Iterator[Case]:
    module, bf16 = "dsv4_fusion.ops.triton.indexer_cache", torch.bfloat16
    for function, (d, fused) in itertools.product(
        ("indexer_k_store_fp8", "indexer_k_store_mxfp4"), ((64, False), (128, True))
    ):
        arguments = {
            "k": empty(100, d, dtype=bf16),
            "cache": empty(10, 64 * (d + 4), dtype=torch.uint8),
            "slots": empty(100, dtype=torch.int64),
            "hadamard": fused,
        }
        if fused:
            arguments |= {
                "norm_weight": empty(d, dtype=torch.float32),
                "positions": empty(100, dtype=torch.int32),
                "cos": empty(4096, PAIRS, dtype=torch.float32),
                "sin": empty(4096, PAIRS, dtype=torch.float32),
            }
        yield Case("triton", module, function, arguments, f"{function}-{d}-fused={fused}", {"has_e4m3": lambda _: True})
    for format, d in (("fp8", 64), ("mxfp4", 128)):
        arguments = {
            "cache": empty(10, 64 * (d + 4), dtype=torch.uint8),
            "block_table": empty(3, 4, dtype=torch.int32),
            "lengths": empty(3, dtype=torch.int32),
            "format": format,
            "head_dim": d,
        }
        yield Case("triton", module, "indexer_k_load", arguments, f"indexer_k_load-{format}-{d}")


def score_cases() -> Iterator[Case]:
    """Every format, ragged and paged, V4's heads and the most there may be."""
    module = "dsv4_fusion.ops.triton.indexer_scores"
    dtypes = {"bf16": torch.bfloat16, "fp8": FP8, "mxfp4": torch.uint8}
    integers = torch.int32
    sizes = [*itertools.product(dtypes, (64,), (128,)), ("fp8", 128, 128), ("mxfp4", 5, 64)]
    for (format, heads, d), function in itertools.product(sizes, ("indexer_scores", "indexer_scores_paged")):
        paged, width = function.endswith("paged"), d // 2 if format == "mxfp4" else d
        if paged and format == "bf16":
            continue
        batch, queries, length = (64, 2, 4096) if paged else (2, 4096, 1001)
        arguments = {
            "q": empty(batch, queries, heads, width, dtype=dtypes[format]),
            "weights": empty(batch, queries, heads, dtype=torch.float32),
            "q_scale": empty(batch, queries, heads, dtype=integers) if format == "mxfp4" else None,
        }
        if paged:
            arguments |= {
                "cache": empty(10, 64 * (width + 4), dtype=torch.uint8),
                "block_table": empty(batch, length // 64, dtype=integers),
                "lengths": empty(batch, dtype=integers),
            }
        else:
            scale = {"fp8": torch.float32, "mxfp4": integers}.get(format)
            arguments |= {
                "k": empty(batch, length, width, dtype=dtypes[format]),
                "k_scale": None if scale is None else empty(batch, length, dtype=scale),
                "positions": empty(1, queries, dtype=torch.int64),
            }
        yield Case(
            "triton", module, function, arguments, f"{function}-{format}-{heads}x{d}", {"has_e4m3": lambda _: True}
        )
    arguments = {
        "q": empty(100, 64, 128, dtype=torch.bfloat16),
        "k": empty(1000, 128, dtype=torch.bfloat16),
        "weights": empty(100, 64, dtype=torch.float32),
        "top_k": 512,
    }
    yield Case("triton", module, "indexer_topk", arguments, "indexer_topk-512")


CASES = [*query_cases(), *cache_cases(), *score_cases()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_for_sm90(case, tmp_path, monkeypatch):
    binaries = compile_triton(case, tmp_path, monkeypatch)
    assert len(binaries) == 1 + (case.function == "indexer_topk")
    for binary in binaries:
        assert binary.cubin[:4] == b"\x7fELF"
        if binary.stack is not None:
            assert binary.stack == 0, f"{binary.kernel} spills {binary.stack} bytes a thread"


def test_every_operator_is_covered():
    operators = {name for name in torch.ops.dsv4.__dict__ if name.startswith("indexer_")}
    operators -= {"indexer_topk_paged"}  # it launches what indexer_scores_paged and indexer_topk launch
    assert {name.removesuffix("_out") for name in operators} <= {case.function for case in CASES}
