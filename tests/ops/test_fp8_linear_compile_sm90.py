"""The Triton kernels of FP8 linear layers compile for Hopper without a GPU, and spill nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ops.test_compile_sm90 import Case, compile_triton

MODULE = "dsv4_fusion.ops.triton.fp8_linear"
PATCH = {"has_e4m3": lambda device: True}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> Iterator[Case]:
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    for scaling, size, rounding in (
        ("token", 8192, "none"),
        ("token", 1024, "power_of_two"),
        ("block", 4096, "power_of_two"),
        ("tensor", 4096, "input"),
    ):
        arguments = {"x": empty(300, size, dtype=bf16), "scaling": scaling, "scale_rounding": rounding}
        yield Case("triton", MODULE, "quantize_fp8", arguments, f"quantize_fp8-{scaling}-{size}", PATCH)
    shapes = [(1, 1536, 4096), (64, 4096, 4096), (16, 32768, 1024), (256, 4096, 8192), (4096, 4096, 4096)]
    for (m, n, k), block in [*((shape, False) for shape in shapes), *((shape, True) for shape in shapes[1:])]:
        groups = k // 128
        scale = torch.float8_e8m0fnu if n == 32768 else torch.float32
        arguments = {
            "xq": empty(m, k, dtype=fp8),
            "wq": empty(n, k, dtype=fp8),
            "x_scale": empty(m, groups if block else 1, dtype=scale),
            "w_scale": empty(n // 128, groups, dtype=scale) if block else empty(n, 1),
            "bias": None if block else empty(n, dtype=bf16),
        }
        yield Case("triton", MODULE, "scaled_mm_fp8", arguments, f"scaled_mm_fp8-{m}x{n}x{k}-block={block}", PATCH)
    arguments = {"x": empty(7, 4096, dtype=bf16), "wq": empty(528, 4096, dtype=fp8), "w_scale": empty(528, 1)}
    dependent = PATCH | {"_has_dependent_launch": lambda device: True}
    yield Case("triton", MODULE, "fp8_linear", arguments, "fp8_linear", dependent)


CASES = list(cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_for_sm90(case, tmp_path, monkeypatch):
    binaries = compile_triton(case, tmp_path, monkeypatch)
    assert len(binaries) == (2 if case.function == "fp8_linear" or "tensor" in case.name else 1)
    for binary in binaries:
        assert binary.cubin[:4] == b"\x7fELF"
        if binary.stack is not None:
            assert binary.stack == 0, f"{binary.kernel} spills {binary.stack} bytes a thread"
