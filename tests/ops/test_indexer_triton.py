"""The indexer's Triton kernels: interpreted on the CPU, and on a GPU what the other tests do not cover.

Run as a script with TRITON_INTERPRET=1, this file compares the interpreted kernels; a test does that in one
subprocess, because Triton reads the variable when it is imported. Interpreted, e4m3 is made by integer arithmetic, as
on GPUs that have no conversion.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script

from dsv4_fusion import ops
from tests.ops import test_indexer as queries
from tests.ops import test_indexer_cache as keys
from tests.ops.interpreted import patch_once_a_launch

TOKENS = (0, 1, 19)


def compare_queries() -> int:
    count = 0
    sizes = ((5, 128, 64), (16, 64, 64), (3, 128, 16), (1, 64, 2))
    for name, hadamard, (heads, d, rope) in itertools.product(queries.OPS, (False, True), sizes):
        for tokens, option in itertools.product(TOKENS if heads == 5 else (5,), queries.OPTIONS[name]):
            table, positions = ((torch.float32, None), (torch.bfloat16, torch.int32))[hadamard]
            tensors = queries.arguments(tokens, heads, d, rope, table, positions)
            expected = getattr(ops, name)(**tensors, **option, hadamard=hadamard)
            results = getattr(ops, name)(**tensors, **option, hadamard=hadamard, implementation="triton")
            queries.assert_same_bits(results, expected, (name, hadamard, heads, d, rope, tokens, option))
            count += 1
    return count


def compare_keys() -> int:
    count = 0
    for name, hadamard, fused, (d, rope, page_size) in itertools.product(
        keys.STORES, (False, True), keys.FORMS, ((128, 64, 64), (64, 32, 1))
    ):
        format = name.rpartition("_")[2]
        for tokens in TOKENS if fused == keys.FUSED else (17,):
            tensors = keys.arguments(format, tokens, d, rope, page_size, 4, fused)
            option = {"page_size": page_size, "hadamard": hadamard}
            expected = keys.store(name, tensors, **option)
            got = keys.store(name, tensors, **option, implementation="triton")
            queries.assert_same_bits([got], [expected], (name, hadamard, fused, d, tokens))
            count += 1
    for format, d, page_size in itertools.product(("fp8", "mxfp4"), (64, 128), (4, 64)):
        generator = torch.Generator().manual_seed(0)
        cache = torch.randint(
            0, 256, (3, ops.indexer_cache_bytes(page_size, format, d) + 4), dtype=torch.uint8, generator=generator
        )
        table, lengths = torch.tensor([[2, 0], [1, 99]]), torch.tensor([page_size + 3, page_size])
        option = {"format": format, "head_dim": d, "page_size": page_size}
        expected = ops.indexer_k_load(cache, table, lengths, **option)
        got = ops.indexer_k_load(cache, table, lengths, **option, implementation="triton")
        queries.assert_same_bits([got], [expected], (format, d, page_size))
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
    assert done.stdout.split() == [str(2 * 2 * 3 * (len(TOKENS) + 3)), str(2 * 2 * 2 * (len(TOKENS) + 3) + 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("hadamard", [False, True])
def test_e4m3_by_integer_arithmetic(monkeypatch, hadamard):
    """What GPUs before compute capability 8.9 run."""
    pytest.importorskip("triton")
    from dsv4_fusion.ops.triton import indexer, indexer_cache

    for module in (indexer, indexer_cache):
        monkeypatch.setattr(module, "has_e4m3", lambda device: False)
    tensors = queries.arguments(300, 64)
    expected = ops.indexer_q_fp8(**tensors, hadamard=hadamard)
    results = ops.indexer_q_fp8(**queries.on_gpu(tensors), hadamard=hadamard, implementation="triton")
    queries.assert_same_bits(results, expected)
    keys.check_store("indexer_k_store_fp8", keys.arguments("fp8", 300), "triton", hadamard=hadamard)


@pytest.mark.gpu
def test_the_token_count_compiles_nothing():
    """Two kernels of the queries serve every token count, and one of the keys."""
    triton = pytest.importorskip("triton")
    compiled, hook = [], triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(kwargs["fn"].name)
    try:
        for tokens in (1, 2, 15, 16, 17, 256, 257, 512, 1000, 4096):
            ops.indexer_q_mxfp4(**queries.on_gpu(queries.arguments(tokens, 24, special=False)), implementation="triton")
            ops.indexer_k_store_mxfp4(
                **queries.on_gpu(keys.arguments("mxfp4", tokens, page_size=32)),
                page_size=32,
                implementation="triton",
            )
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert len(compiled) == 3, compiled


if __name__ == "__main__":
    patch_once_a_launch()
    print(compare_queries(), compare_keys())
