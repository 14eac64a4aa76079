"""No number of tokens, requests or keys has a Triton kernel of its own: compilations are counted, without a GPU."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4_fusion import ops
from tests.ops.test_compile_sm90 import record

triton = pytest.importorskip("triton")

COUNTS = sorted({*range(1, 150), *range(150, 8192, 397), 511, 512, 513, 2047, 2048, 2049, 8192})
BF16, FP8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
MODULE = "dsv4_fusion.ops.triton."
PATCH = {
    "has_e4m3": lambda device: True,
    "_is_hopper": lambda device: True,
    "_has_dependent_launch": lambda device: True,
}


def compile_keys(module_name: str, function: str, calls: Iterable[tuple[list, dict]]) -> dict[str, set[tuple]]:
    """What Triton would compile for these calls, for each kernel: its constants, dtypes, divisibility and options."""
    if triton.knobs.runtime.interpret:
        pytest.skip("kernels are interpreted here")
    module = importlib.import_module(module_name)
    with pytest.MonkeyPatch.context() as patch:
        launches = record(patch)
        for each in [each for key, each in sys.modules.items() if key.startswith(MODULE)]:
            for name in PATCH.keys() & vars(each).keys():
                patch.setattr(each, name, PATCH[name])
        for args, kwargs in calls:
            getattr(module, function)(*args, **kwargs)
    compiled: dict[str, set[tuple]] = {}
    for kernel, args, options in launches:
        key: list[Any] = [*sorted(options.items())]
        for parameter, value in zip(kernel.params, args, strict=True):
            if parameter.is_constexpr or value is None:
                key.append(value)
            elif isinstance(value, torch.Tensor):
                key.append(value.dtype)
            elif hasattr(value, "block_shape"):
                key.append((value.base.dtype, *value.block_shape))
            elif isinstance(value, int):
                free = parameter.do_not_specialize
                key.append((value >= 2**31, not free and value == 1, not free and value % 16 == 0))
        compiled.setdefault(kernel.__name__, set()).add(tuple(key))
    return compiled


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def hyper_connection(function: str) -> Callable[[int, int], dict]:
    def make(tokens: int, batch: int) -> dict:
        lead = (batch, tokens)
        post = {
            "output": empty(*lead, 4096),
            "hidden_streams": empty(*lead, 4, 4096),
            "post": empty(*lead, 4, dtype=FP32),
            "comb": empty(*lead, 4, 4, dtype=FP32),
        }
        mixes = 4 if "head" in function else 24
        pre = {
            "fn": empty(mixes, 4 * 4096, dtype=FP32),
            "base": empty(mixes, dtype=FP32),
            "scale": empty(1 if "head" in function else 3, dtype=FP32),
            "norm_weight": empty(4096),
        }
        if function == "hc_post":
            return post
        return {**(post if "post" in function else {"hidden_streams": post["hidden_streams"]}), **pre}

    return make


def queries(tokens: int, batch: int) -> dict:
    tokens *= batch
    table = {name: empty(4096, 32, dtype=FP32) for name in ("cos", "sin")}
    positions = empty(tokens, dtype=torch.int64)
    return {"q": empty(tokens, 64, 128), "positions": positions, **table, "weights": empty(tokens, 64)}


def keys(tokens: int, batch: int) -> dict:
    slots = empty(tokens * batch, dtype=torch.int64)
    return {"k": empty(tokens * batch, 128), "cache": empty(tokens + 9, 64 * 132, dtype=torch.uint8), "slots": slots}


def pages(tokens: int, batch: int) -> dict:
    """``tokens`` of each request, in pages of 64."""
    table = empty(batch, -(-tokens // 64), dtype=torch.int32)
    return {"block_table": table, "lengths": empty(batch, dtype=torch.int32)}


def loads(tokens: int, batch: int) -> dict:
    return {"cache": empty(tokens + 9, 64 * 132, dtype=torch.uint8), "format": "fp8"} | pages(tokens, batch)


def scores(tokens: int, batch: int) -> dict:
    return {
        "q": empty(batch, tokens, 64, 128),
        "k": empty(batch, -(-tokens // 4), 128),
        "weights": empty(batch, tokens, 64, dtype=FP32),
        "positions": empty(batch, tokens, dtype=torch.int64),
    }


def choices(tokens: int, batch: int) -> dict:
    """As the model asks: 512 entries, or all of them."""
    given = scores(tokens, batch)
    return given | {"top_k": min(512, given["k"].shape[1])}


def paged_scores(tokens: int, batch: int) -> dict:
    given = {"q": empty(batch, 2, 64, 128, dtype=FP8), "weights": empty(batch, 2, 64, dtype=FP32)}
    return given | {"cache": empty(tokens + 9, 64 * 132, dtype=torch.uint8)} | pages(tokens, batch)


def paged_choices(tokens: int, batch: int) -> dict:
    return paged_scores(tokens, batch) | {"top_k": 512}


def windows(ratio: int, d: int, overlap: bool) -> Callable[[int, int], dict]:
    def make(tokens: int, batch: int) -> dict:
        width = 2 * d if ratio == 4 else d
        given = {name: empty(batch, tokens * ratio, width) for name in ("kv", "gate")}
        given |= {name: empty(batch, tokens, 32) for name in ("cos", "sin")}
        given |= {"position_bias": empty(ratio, width), "norm_weight": empty(d)}
        if overlap:
            given |= {name: empty(batch, ratio, d) for name in ("overlap_kv", "overlap_gate")}
        return given

    return make


def inserts(ratio: int) -> Callable[[int, int], dict]:
    def make(tokens: int, batch: int) -> dict:
        width = 1024 if ratio == 4 else 512
        tokens *= batch
        return {
            "kv": empty(tokens, width),
            "gate": empty(tokens, width),
            "position_bias": empty(ratio, width),
            "norm_weight": empty(512),
            "positions": empty(tokens, dtype=torch.int64),
            "requests": empty(tokens, dtype=torch.int32),
            "starts": empty(batch + 1, dtype=torch.int32),
            "cos": empty(4096, 32, dtype=FP32),
            "sin": empty(4096, 32, dtype=FP32),
            "state": empty(tokens + 50, 8, 2, width, dtype=FP32),
            "state_table": empty(batch, 16, dtype=torch.int32),
            "cache": empty(tokens + 9, ops.kv_cache_bytes(64, 512), dtype=torch.uint8),
            "slots": empty(tokens, dtype=torch.int64),
        }

    return make


def kv_pages(tokens: int, batch: int) -> dict:
    return {"cache": empty(tokens + 9, ops.kv_cache_bytes(64), dtype=torch.uint8)} | pages(tokens, batch)


def activations(tokens: int, batch: int) -> dict:
    return {"x": empty(batch, tokens, 4096)}


def groups(tokens: int, batch: int) -> dict:
    return activations(tokens, batch) | {"scaling": "block", "scale_rounding": "power_of_two"}


def linear(*scales: int) -> Callable[[int, int], dict]:
    def make(tokens: int, batch: int) -> dict:
        weight = {"wq": empty(1536, 4096, dtype=FP8), "w_scale": empty(*scales, dtype=FP32)}
        return activations(tokens, batch) | weight

    return make


CASES: dict[str, tuple[str, str, Callable[[int, int], dict], int]] = {
    # name: module, function, arguments for (tokens, batch), how many variants of a kernel there may be
    **{
        name: ("hyper_connection", name, hyper_connection(name), 3)
        for name in ("hc_pre", "hc_post", "hc_post_pre", "hc_head", "hc_post_head")
    },
    "indexer_q_fp8": ("indexer", "indexer_q_fp8", queries, 2),
    "indexer_q_mxfp4": ("indexer", "indexer_q_mxfp4", queries, 2),
    "indexer_k_store_fp8": ("indexer_cache", "indexer_k_store_fp8", keys, 1),
    "indexer_k_load": ("indexer_cache", "indexer_k_load", loads, 1),
    "indexer_scores": ("indexer_scores", "indexer_scores", scores, 2),
    "indexer_scores_paged": ("indexer_scores", "indexer_scores_paged", paged_scores, 2),
    "indexer_topk": ("indexer_scores", "indexer_topk", choices, 4),
    "indexer_topk_paged": ("indexer_scores", "indexer_topk_paged", paged_choices, 4),
    "compress_csa": ("compressor", "compress_csa", windows(4, 512, False), 1),
    "compress_csa with a window before": ("compressor", "compress_csa", windows(4, 512, True), 1),
    "compress_hca": ("compressor", "compress_hca", windows(128, 512, False), 1),
    "compress_csa_insert": ("compressor_cache", "compress_csa_insert", inserts(4), 2),
    "compress_hca_insert": ("compressor_cache", "compress_hca_insert", inserts(128), 2),
    "kv_load": ("compressor_cache", "kv_load", kv_pages, 1),
    "quantize_fp8": ("fp8_linear", "quantize_fp8", activations, 1),
    "quantize_fp8 by block": ("fp8_linear", "quantize_fp8", groups, 2),
    "fp8_linear": ("fp8_linear", "fp8_linear", linear(1536, 1), 3),
    "fp8_linear by block": ("fp8_linear", "fp8_linear", linear(12, 32), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_no_count_has_a_kernel_of_its_own(case):
    module, function, make, most = CASES[case]
    calls = [([], make(tokens, batch)) for batch in (1, 2, 3) for tokens in COUNTS]
    compiled = compile_keys(MODULE + module, function, calls)
    assert compiled
    varying = {kernel: [set(column) for column in zip(*found, strict=False)] for kernel, found in compiled.items()}
    for kernel, found in compiled.items():
        assert len(found) <= most, (kernel, len(found), [column for column in varying[kernel] if len(column) > 1])


def test_no_count_has_a_cutedsl_kernel_of_its_own():
    pytest.importorskip("cutlass")  # one compiler of several may be missing
    pytest.importorskip("tvm_ffi")
    from dsv4_fusion.ops.cutedsl.indexer_scores_paged import _key

    given = [paged_scores(tokens, batch) for batch in (1, 2, 3) for tokens in COUNTS]
    assert len({_key(each["q"], each["block_table"], each["lengths"], 64, None) for each in given}) == 1


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("name", ["indexer_q_fp8", "indexer_q_mxfp4", "indexer_q_fp8_out", "indexer_q_mxfp4_out"])
def test_queries_have_few_cutedsl_kernels_which_are_prepared(monkeypatch, name, hadamard):
    pytest.importorskip("cutlass")
    pytest.importorskip("tvm_ffi")
    from dsv4_fusion.ops.cutedsl import indexer

    begun = []

    def begin(*key):
        begun.append(key)
        return SimpleNamespace(result=lambda: None)

    monkeypatch.setattr(indexer, "_begin", begin)
    operator = getattr(indexer, name)
    operator.prepare(*queries(7, 1).values(), hadamard=hadamard)
    prepared = set(begun)
    begun.clear()
    for tokens, batch in itertools.product(COUNTS, (1, 2, 3)):
        operator.bind(*queries(tokens, batch).values(), hadamard=hadamard)
    assert len(prepared) == (4 if not hadamard and "mxfp4" in name else 2) and set(begun) == prepared


def test_a_kernel_specialised_by_its_tokens_would_be_found():
    def make(tokens: int) -> tuple[list, dict]:
        given = choices(tokens, 1)
        return [], given | {"q": empty(1, tokens, tokens, 128), "weights": empty(1, tokens, tokens, dtype=FP32)}

    compiled = compile_keys(MODULE + "indexer_scores", "indexer_topk", [make(tokens) for tokens in range(4, 40)])
    assert len(compiled["score"]) == 36  # heads are a constant
