"""The indexer's Triton kernels compile for Hopper without a GPU, and spill nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.ops.test_compile_sm90 import POINTERS, Case, compile_triton

POINTERS[torch.int16] = "*i16"
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


CASES = [*query_cases(), *cache_cases()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_for_sm90(case, tmp_path, monkeypatch):
    (binary,) = compile_triton(case, tmp_path, monkeypatch)
    assert binary.cubin[:4] == b"\x7fELF"
    if binary.stack is not None:
        assert binary.stack == 0, f"{binary.kernel} spills {binary.stack} bytes a thread"


def test_every_operator_is_covered():
    operators = {name for name in torch.ops.dsv4.__dict__ if name.startswith("indexer_")}
    assert {name.removesuffix("_out") for name in operators} <= {case.function for case in CASES}
