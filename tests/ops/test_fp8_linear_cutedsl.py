"""The CuTe DSL product without a GPU: every tile compiles for sm_90a, and every number of tokens gets one of few."""

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

from dsv4_fusion.ops.cutedsl import fp8_linear, scaled_mm
from dsv4_fusion.ops.fp8_linear import quantize_fp8_ref
from tests.ops.test_indexer_scores_cutedsl import registers_suffice, sleeps

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FP32, BYTE, BF16, FP16 = torch.float32, torch.uint8, torch.bfloat16, torch.float16
OUTPUTS = (16, 1536, 4096, 8192, 32768)
SMS = 132


@pytest.mark.parametrize("block", [False, True])
def test_a_weight_has_few_tiles(block):
    for outputs in OUTPUTS:
        found = {fp8_linear.tile_of(tokens, outputs, block, SMS) for tokens in range(1, 16385)}
        assert found == fp8_linear.tiles(outputs, block, SMS)
        assert len(found) <= 13


def test_small_products_fill_the_processors_once():
    for outputs, columns in ((1536, 16), (4096, 32), (8192, 64), (32768, 128)):
        for tokens, loaded in ((1, 8), (8, 8), (9, 16), (17, 32), (33, 64)):
            assert fp8_linear.tile_of(tokens, outputs, False, SMS) == fp8_linear.Tile(64, columns, (1, 1), loaded)
        assert fp8_linear.tile_of(64, outputs, True, SMS) == fp8_linear.Tile(64, columns, (1, 1), 64)
    for block in (False, True):
        assert fp8_linear.tile_of(1024, 1536, block, SMS) == fp8_linear.Tile(128, 96, (1, 1), 128)
        assert fp8_linear.tile_of(4096, 4096, block, SMS) == LARGE
        assert fp8_linear.tile_of(128, 65536, block, SMS).cluster == (1, 1)  # there is one row of tiles
        assert fp8_linear.tile_of(128, 4096, block, SMS) == fp8_linear.Tile(64, 64, (2, 1), 64)
        assert fp8_linear.tile_of(192, 1536, block, SMS).cluster == (1, 1)  # no tile is without a partner
        assert fp8_linear.tile_of(1024, 4096, block, SMS).cluster == (1, 1)
    assert fp8_linear.tile_of(4096, 32768, False, SMS) == fp8_linear.Tile(128, 192, (2, 1), 128)
    for outputs in (1536, 32768):  # not the tiles with which one round is soonest
        assert fp8_linear.tile_of(4096, outputs, True, SMS) == LARGE


@pytest.mark.parametrize("block", [False, True])
def test_what_a_layer_needs_was_prepared(monkeypatch, block):
    """For one token too, whose scales' strides views do not keep."""
    prepared = set()
    monkeypatch.setattr(fp8_linear, "_processors", lambda device: SMS)
    monkeypatch.setattr(fp8_linear, "_begin", lambda *key: prepared.add(key))
    wq = torch.zeros(4096, 256, dtype=torch.float8_e4m3fn)
    w_scale = torch.ones(32, 2) if block else torch.ones(4096, 1)
    linear = fp8_linear.Linear()
    linear.prepare(torch.zeros(1, 256, dtype=BF16), wq, w_scale)
    for shape in ((1, 256), (1, 1, 256), (256,), (2, 256), (1, 2, 256), (8, 256), (33, 256), (129, 256), (4096, 256)):
        _, x_scale = quantize_fp8_ref(torch.zeros(shape, dtype=BF16), scaling="block" if block else "token")
        one = fp8_linear.tile_of(x_scale[..., 0].numel(), 4096, block, SMS)
        assert linear.product.key(one, wq, FP32, w_scale, None, BF16) in prepared, shape
        assert not block or fp8_linear._by_group(x_scale), shape


@pytest.mark.parametrize("scaling", ["token", "tensor", "block"])
def test_a_copied_weight_is_not_loaded_early(scaling):
    """The product begins while the quantiser runs; a copy that is made between them would not be there yet."""
    linear = fp8_linear.Linear()
    weight = torch.zeros(64 * 128 + 1, dtype=torch.uint8).view(torch.float8_e4m3fn)
    as_it_is, copied = weight[:-1].view(64, 128), weight[1:].view(64, 128)
    assert linear.product_of(as_it_is, scaling).dependent == (scaling != "tensor")
    assert not linear.product_of(copied, scaling).dependent


LARGE = fp8_linear.Tile(128, 128, (1, 2), 128)  # pairs share x
VARIANTS = [
    (fp8_linear.Tile(64, 16, (1, 1), 8), False, (FP32, FP32), None, BF16, True),
    (fp8_linear.Tile(64, 32, (1, 1), 64), False, (FP32, FP32), BF16, FP16),
    (fp8_linear.Tile(64, 64, (2, 1), 64), True, (FP32, BYTE), FP32, BF16),
    (fp8_linear.Tile(64, 128, (1, 1), 64), True, (FP32, FP32), None, BF16, True),
    (fp8_linear.Tile(64, 16, (1, 1), 16), True, (FP32, FP32), None, BF16, True),
    (fp8_linear.Tile(128, 64, (1, 1), 128), False, (BYTE, FP32), None, BF16),
    (LARGE, False, (FP32, FP32), BF16, BF16),
    (LARGE, True, (FP32, FP32), None, BF16, True),
    (fp8_linear.Tile(128, 96, (1, 1), 128), True, (FP32, BYTE), None, BF16),
    (fp8_linear.Tile(128, 160, (1, 1), 128), True, (FP32, FP32), BF16, BF16),
    (fp8_linear.Tile(128, 192, (1, 1), 128), False, (FP32, FP32), None, FP16),
    (fp8_linear.Tile(128, 192, (2, 1), 128), False, (FP32, FP32), BF16, BF16),
    (fp8_linear.Tile(128, 192, (1, 1), 128), True, (FP32, FP32), None, BF16, True),
]


@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: f"{variant[0].rows}x{variant[0].columns}-{variant[1:]}"
)
def test_compiles_for_sm90(variant, tmp_path):
    """Four matrix instructions a stage, waited for together, and no register spilled."""
    tile, *rest = variant
    options = f"--keep-cubin --dump-dir {tmp_path}"
    scaled_mm.build(*tile, *rest, arch="sm_90a", options=options)
    (cubin,) = tmp_path.glob("*.cubin")
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert "STACK:0" in usage.stdout + usage.stderr
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    copies = 4 if tile.columns <= scaled_mm.OVERLAP else 1  # of the stage's code, where two are in flight
    assert sass.count("QGMMA") == 4 * copies
    assert sass.count("WARPGROUP.DEPBAR") == copies + (copies > 1)
    assert not re.search(r"\b(STL|LDL)\b", sass)
    assert tile.rows == 64 or (registers_suffice(sass, usage.stdout + usage.stderr, 3) and not sleeps(sass))
