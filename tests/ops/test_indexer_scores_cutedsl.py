"""The CuTe DSL scores without a GPU: every variant compiles for sm_90a, and no register is spilled."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass")
pytest.importorskip("tvm_ffi")
pytest.importorskip("triton")  # its wheel has the disassembler

import triton

from dsv4_fusion.ops.cutedsl import indexer_scores

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FP32, BF16, FP8, INT32, INT64 = torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int64
VARIANTS = [
    (64, 128, FP8, "causal", (None, INT64), FP32),
    (64, 128, BF16, "all", (None, None), FP32),
    (128, 128, BF16, "range", (INT32, INT64), BF16),
    (32, 64, FP8, "range", (None, INT32), FP32),
    (128, 64, FP8, "all", (None, None), BF16),
]


def compiled(variant, folder: Path) -> str:
    """Its code, and no register is spilled."""
    indexer_scores.build(*variant, arch="sm_90a", options=f"--keep-cubin --dump-dir {folder}")
    (cubin,) = folder.glob("*.cubin")
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert "STACK:0" in usage.stdout + usage.stderr
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(STL|LDL)\b", sass)
    return sass


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_compiles_for_sm90(variant, tmp_path):
    """The tensor cores have more to do when a warpgroup begins to sum, and relu and weight are two instructions."""
    heads, d, dtype, *_ = variant
    sass = compiled(variant, tmp_path)
    steps = d * dtype.itemsize // 32
    order = re.findall(r"\b([QH]GMMA|WARPGROUP\.ARRIVE|WARPGROUP\.DEPBAR|BAR\.ARV)\b", sass)
    product = "QGMMA" if dtype == FP8 else "HGMMA"
    one = ["WARPGROUP.ARRIVE"] + [product] * steps
    terms = indexer_scores.COLUMNS * 64 // 128  # of a thread, in a stage
    if indexer_scores.Scores(heads, d, dtype == FP8, "all").parts == 1:
        stage = [*one, "WARPGROUP.DEPBAR", "BAR.ARV", "WARPGROUP.DEPBAR"]
        stages = order.count("BAR.ARV") - 1
        assert order == ["BAR.ARV"] + stage * stages
    else:
        wait, stages = "WARPGROUP.DEPBAR", 3  # in the loop, after it, and of a piece with one stage
        assert order == one + (one + [wait]) * 3 + one + one + [wait]
    doubled = len(
        re.findall(r"FADD R\d+, R\d+(?:\.reuse)?, \|R\d+(?:\.reuse)?\||FADD R\d+, \|R\d+(?:\.reuse)?\|, R\d+", sass)
    )
    assert doubled == (terms // 2 * stages if dtype == FP8 else 0)
    assert sass.count("FMNMX") + doubled == sass.count("FFMA") == terms * stages
