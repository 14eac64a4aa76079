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


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_compiles_for_sm90(variant, tmp_path):
    """The other warpgroup's turn comes before the last product is done, and relu and weight are two instructions."""
    _, d, dtype, *_ = variant
    indexer_scores.build(*variant, arch="sm_90a", options=f"--keep-cubin --dump-dir {tmp_path}")
    (cubin,) = tmp_path.glob("*.cubin")
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert "STACK:0" in usage.stdout + usage.stderr
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(STL|LDL)\b", sass)
    steps = d * dtype.itemsize // 32
    copies = len(re.findall(r"\b[QH]GMMA\b", sass)) // steps  # of a stage's code
    order = re.findall(r"\b([QH]GMMA|WARPGROUP\.DEPBAR|BAR\.ARV)\b", sass)
    product = "QGMMA" if dtype == FP8 else "HGMMA"
    stage = [product] * steps + ["WARPGROUP.DEPBAR", "BAR.ARV", "WARPGROUP.DEPBAR"]
    assert order == ["BAR.ARV"] + stage * copies
    products = indexer_scores.COLUMNS * 64 // 128  # of a thread
    assert sass.count("FMNMX") == sass.count("FFMA") == products * copies
