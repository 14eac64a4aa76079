"""The compressor's Triton kernels, interpreted on the CPU.

Run as a script with TRITON_INTERPRET=1, this file compares the interpreted kernels by bits; a test does that in one
subprocess, because Triton reads the variable when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script

from dsv4_fusion import ops
from tests.ops import test_compressor as dense
from tests.ops import test_compressor_cache as paged
from tests.ops.interpreted import patch_fma, patch_once_a_launch
from tests.ops.test_indexer import assert_same_bits

DENSE = (
    (1, 0, 128, 4, 64, torch.bfloat16, torch.float32, True, False),
    (2, 3, 128, 4, 64, torch.bfloat16, torch.float32, True, False),
    (2, 13, 128, 4, 64, torch.bfloat16, torch.float32, False, True),
    (1, 9, 512, 4, 64, torch.bfloat16, torch.bfloat16, True, True),
    (3, 14, 64, 3, 32, torch.float32, torch.float32, False, False),
    (1, 130, 128, 64, 2, torch.float32, torch.bfloat16, False, False),
)
PAGED = (
    ("compress_csa_insert", paged.in_pieces, {"d": 512}),
    ("compress_csa_insert", paged.at_once, {"d": 128, "format": "fp8", "page_size": 16, "hadamard": True}),
    # Twelve tokens at once: their first program pools two windows, and writes rows that these have read
    (
        "compress_csa_insert",
        paged.in_pieces,
        {"format": "mxfp4", "spare": 5, "dtype": torch.float32, "lengths": (9, 2, 26)},
    ),
    ("compress_csa_insert", paged.at_once, {"ratio": 3, "n": 1, "parameters": torch.bfloat16, "lengths": (9, 2)}),
    ("compress_hca_insert", paged.one_by_one, {"spare": 3, "lengths": (9, 3)}),
    ("compress_hca_insert", paged.all_but_one, {"ratio": 16, "n": 8, "lengths": (16,)}),
    ("compress_hca_insert", paged.all_but_one, {"ratio": 16, "n": 1, "lengths": (16,)}),
    ("compress_hca_insert", paged.at_once, {"ratio": 1, "n": 2, "lengths": (4, 1)}),
    ("compress_hca_insert", paged.in_long_pieces, {"ratio": 64, "n": 32, "lengths": (150, 64)}),
)


def compare() -> int:
    count = 0
    for name in dense.OPS:
        for case in DENSE:
            first = {"first_window_position": 300} if case[7] else {}
            dense.check(name, case, "triton", **first)
            if (case[2] - case[4]) % 64 == 0:
                dense.check(name, case, "triton", **first, round_nope=True)
            count += 1
    for name, split, changes in PAGED:
        paged.check(name, split, "triton", **{"lengths": (9, 2, 6), **changes})
        count += 1
    for d, page_size in ((128, 4), (256, 1)):
        generator = torch.Generator().manual_seed(0)
        cache = torch.randint(0, 256, (9, ops.kv_cache_bytes(page_size, d)), dtype=torch.uint8, generator=generator)
        table, lengths = torch.randint(0, 9, (3, 4), generator=generator), torch.tensor([0, 4, 3]) * page_size
        options = {"head_dim": d, "page_size": page_size}
        got = ops.kv_load(cache, table, lengths, **options, implementation="triton")
        assert_same_bits([got], [ops.kv_load(cache, table, lengths, **options)])
        count += 1
    return count


def test_interpreted():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", __file__],  # numpy warns of NaN
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(2 * len(DENSE) + len(PAGED) + 2)]


if __name__ == "__main__":
    patch_once_a_launch()
    patch_fma()
    print(compare())
