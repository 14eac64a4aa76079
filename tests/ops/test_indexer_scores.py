"""The indexer's scores and the choice of the best: references, checks, and kernels, interpreted and on a GPU.

Run as a script with TRITON_INTERPRET=1, this file compares the interpreted kernels; a test does that in one
subprocess, because Triton reads the variable when it is imported.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script

from dsv4_fusion import ops
from dsv4_fusion.ops import _indexer
from dsv4_fusion.ops.indexer_scores import best_ref, indexer_scores_ref
from dsv4_fusion.ops.indexer_scores_paged import _load_fp8, paged_ends
from tests.ops.interpreted import patch_once_a_launch

FORMATS = ("bf16", "fp8", "mxfp4")
RANGES = ("all", "causal", "range")
PAGE = 64


def quantised(x: Tensor, format: str) -> tuple[Tensor, Tensor | None]:
    if format == "bf16":
        return x, None
    return (_indexer.quantise_fp8_ref if format == "fp8" else _indexer.quantise_mxfp4_ref)(x)


def arguments(
    format: str,
    queries: int = 5,
    heads: int = 4,
    d: int = 128,
    length: int = 37,
    batch: int | None = None,
    range: str = "causal",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random queries and keys; among the ranges are empty ones, and ones that reach beyond the keys."""
    generator = torch.Generator().manual_seed(seed)
    sequences = () if batch is None else (batch,)
    q = torch.randn(*sequences, queries, heads, d, generator=generator).bfloat16()
    k = torch.randn(*sequences, length, d, generator=generator).bfloat16()
    weights = torch.randn(*sequences, queries, heads, generator=generator)
    q, q_scale = quantised(q, format)
    k, k_scale = quantised(k, format)
    if format == "fp8":
        weights, q_scale = weights * q_scale, None
    found = {"q": q, "k": k, "weights": weights, "q_scale": q_scale, "k_scale": k_scale}
    drawn = torch.randint(-2, 4 * length + 9, (2, *sequences, queries), generator=generator)
    if range == "causal":
        found["positions"] = drawn[0]
    elif range == "range":
        found["start"], found["end"] = (drawn // 4).int()
    return found


def paged(
    format: str, batch: int = 3, queries: int = 1, heads: int = 4, d: int = 128, pages: int = 4, seed: int = 0
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Keys in shuffled pages, beyond each length pages that do not exist; and the keys [B, Tk, d]."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, pages * PAGE, d, generator=generator).bfloat16()
    cache = torch.full((batch * pages + 2, ops.indexer_cache_bytes(PAGE, format, d) + 16), 0xA5, dtype=torch.uint8)
    table = torch.randperm(batch * pages + 2, generator=generator)[: batch * pages].view(batch, pages)
    slots = (table.unsqueeze(-1) * PAGE + torch.arange(PAGE)).flatten()
    getattr(ops, f"indexer_k_store_{format}")(k.flatten(0, 1), cache, slots, page_size=PAGE)
    lengths = torch.randint(queries, pages * PAGE + 1, (batch,), generator=generator)
    lengths[0] = pages * PAGE
    table = torch.where(torch.arange(pages) * PAGE < lengths.unsqueeze(1), table, 1 << 30)
    given = arguments(format, queries, heads, d, 1, batch, "all", seed)
    given = {key: given[key] for key in ("q", "weights", "q_scale")}
    return {**given, "cache": cache, "block_table": table.int(), "lengths": lengths.int()}, k


def where_fast(tensor: Tensor) -> Tensor:
    """On a GPU, if there is one: in float64 it takes a hundredth of the CPU's time."""
    return tensor.cuda() if torch.cuda.is_available() else tensor


TENSOR_CORE = 2**-13  # Hopper cuts off, of a product of FP8, what is below 14 bits of the largest that it is added to
TOGETHER = 32  # products that one instruction adds, to what it is given


def cut_off(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """The most that Hopper's tensor cores can cut off scores of FP8 queries [..., S, H, d] and keys [..., T, d].

    An instruction aligns its products, and the sum so far, to the largest of them, keeps the highest 14 bits of each
    and drops the rest (DeepSeek-V3 technical report, section 3.5.2).
    """
    q, k, weights, lost = where_fast(q).float(), where_fast(k).float().unsqueeze(-3), where_fast(weights), 0.0
    for head in range(q.shape[-2]):
        total = torch.zeros(*q.shape[:-2], k.shape[-2], device=q.device)
        for first in range(0, q.shape[-1], TOGETHER):
            part = slice(first, first + TOGETHER)
            products = q[..., head, None, part] * k[..., part]
            largest = torch.maximum(total.abs(), products.abs().amax(-1))
            lost += weights[..., head, None].abs() * ((TOGETHER + 1) * TENSOR_CORE * largest)
            total += products.sum(-1)
    return lost.cpu()


def exact(tensors: dict[str, Tensor | None], cancelled: float = 0.1) -> tuple[Tensor, Tensor]:
    """Scores in float64 by one einsum, and the sum of their terms' sizes, with a share of what cancels in the terms."""
    tensors = {key: value if value is None else where_fast(value) for key, value in tensors.items()}
    q, k = (
        value.double() if scale is None else _indexer.dequantise_mxfp4_ref(value, bytes_of(scale, value)).double()
        for value, scale in (
            (tensors["q"], tensors["q_scale"]),
            (tensors["k"], tensors["k_scale"] if tensors["k"].dtype == torch.uint8 else None),
        )
    )
    if tensors["k"].dtype == torch.float8_e4m3fn:
        k = k * tensors["k_scale"].double().unsqueeze(-1)
    weights = tensors["weights"].double().unsqueeze(-1)
    product = torch.einsum("...shd,...td->...sht", q, k).relu() * weights
    terms = torch.einsum("...shd,...td->...sht", q.abs(), k.abs()) * weights.abs()
    return product.sum(-2).cpu(), (product.abs().sum(-2) + cancelled * terms.sum(-2)).cpu()


def bytes_of(scale: Tensor, packed: Tensor) -> Tensor:
    return scale.unsqueeze(-1).contiguous().view(torch.uint8)[..., : packed.shape[-1] // 16]


def visible(tensors: dict[str, Tensor | None]) -> Tensor:
    """By comparison of every pair."""
    key = torch.arange(tensors["k"].shape[-2])
    seen = torch.ones([*tensors["q"].shape[:-2], len(key)], dtype=torch.bool)
    if (positions := tensors.get("positions")) is not None:
        seen &= key < ((positions + 1) // 4).unsqueeze(-1)
    if tensors.get("start") is not None:
        seen &= (key >= tensors["start"].unsqueeze(-1)) & (key < tensors["end"].unsqueeze(-1))
    return seen


def assert_scores(got: Tensor, tensors: dict, tolerance: float = 1e-5) -> None:
    """−inf where nothing is seen; elsewhere within ``tolerance`` of the sum of the terms' sizes."""
    value, size = exact(tensors)
    seen = visible(tensors)
    assert got.shape == value.shape and got.is_contiguous()
    assert torch.equal(got.cpu() == -torch.inf, ~seen)
    error = (got.cpu().double() - value)[seen].abs()
    allowed = tolerance * size[seen] + 1e-30
    if tensors["q"].dtype == torch.float8_e4m3fn and got.device.type != "cpu":
        lost = cut_off(tensors["q"], tensors["k"], tensors["weights"]) * tensors["k_scale"].unsqueeze(-2)
        allowed += lost[seen]
        assert error.norm() <= TENSOR_CORE * size[seen].norm()
    assert (error <= allowed).all(), (error / allowed).max()


# The references


@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [None, 2])
def test_scores(format, range, batch):
    for heads, d, queries in ((1, 64, 3), (5, 128, 1), (128, 64, 2), (4, 128, 0)):
        tensors = arguments(format, queries, heads, d, batch=batch, range=range)
        assert_scores(ops.indexer_scores(**tensors), tensors, 1e-6)
        rounded = ops.indexer_scores(**tensors, dtype=torch.bfloat16)
        assert torch.equal(rounded, ops.indexer_scores(**tensors).bfloat16())


def test_the_reference_in_float64():
    tensors = arguments("bf16", 9, 16)
    tensors = {
        key: value.double() if value is not None and key != "positions" else value for key, value in tensors.items()
    }
    scores = indexer_scores_ref(**tensors)
    value, _ = exact(tensors)
    seen = visible(tensors)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores[seen], value[seen], rtol=1e-12, atol=1e-12)


def test_one_row_of_limits_for_all_sequences():
    tensors = arguments("bf16", batch=2)
    tensors["positions"] = tensors["positions"][:1]
    each = {**tensors, "positions": tensors["positions"].expand(2, -1)}
    assert torch.equal(ops.indexer_scores(**tensors), ops.indexer_scores(**each))


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_paged_is_ragged(format, queries):
    tensors, k = paged(format, queries=queries)
    got = ops.indexer_scores_paged(**tensors)
    k, k_scale = quantised(k, format)
    ends = tensors["lengths"].unsqueeze(1) - torch.arange(queries - 1, -1, -1)
    rest = {key: tensors[key] for key in ("q", "weights", "q_scale")}
    assert torch.equal(got, ops.indexer_scores(k=k, k_scale=k_scale, end=ends, **rest))
    assert torch.equal(got, ops.indexer_scores_paged(**{**tensors, "lengths": ends}))
    shorter = ops.indexer_scores_paged(**{**tensors, "lengths": tensors["lengths"].clamp(max=70)}, max_length=70)
    assert shorter.shape == (3, queries, 70)
    chosen = ops.indexer_topk_paged(**tensors, top_k=300)
    assert torch.equal(chosen, ops.indexer_topk(k=k, k_scale=k_scale, end=ends, top_k=300, **rest))
    assert torch.equal((chosen >= 0).sum(-1), ends) and chosen.dtype == torch.int64


@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("format", FORMATS)
def test_topk(format, range):
    tensors = arguments(format, 11, range=range)
    scores = ops.indexer_scores(**tensors)
    chosen = ops.indexer_topk(**tensors, top_k=50)
    for row, indices in zip(scores.tolist(), chosen.tolist(), strict=True):
        order = sorted((-value, index) for index, value in enumerate(row) if value > float("-inf"))[:50]
        assert indices == [index for _, index in order] + [-1] * (50 - len(order))
    assert torch.equal(ops.indexer_topk(**tensors, top_k=5), chosen[:, :5])
    assert ops.indexer_topk(**tensors, top_k=5, dtype=torch.int32).dtype == torch.int32


def test_ties_go_to_the_lowest_index():
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, -0.0, 0.0, -torch.inf, torch.nan]])
    assert best_ref(scores, 9, torch.int64).tolist() == [[7, 1, 3, 0, 2, 4, 5, -1, -1]]


# Registration and bad input


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format):
    tensors = arguments(format, batch=2)
    utils = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    utils += ["test_schema"] if format != "fp8" else []  # which compares the inputs, and cannot multiply e4m3fn
    calls = [("indexer_scores", tensors), ("indexer_topk", {**tensors, "top_k": 40, "dtype": torch.int32})]
    if format != "bf16":
        calls.append(("indexer_scores_paged", paged(format)[0]))
        calls.append(("indexer_topk_paged", {**paged(format)[0], "top_k": 40, "dtype": torch.int32}))
    for name, given in calls:
        results = torch.library.opcheck(getattr(torch.ops.dsv4, name).default, (), given, test_utils=utils)
        assert len(results) == len(utils) and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("format", "key", "change", "message"),
    [
        ("bf16", "q", lambda x: x[0], r"q must have shape \[T, H, d\] or \[B, S, H, d\], got \[4, 128\]"),
        ("bf16", "q", lambda x: x.half(), r"q must be bfloat16, float8_e4m3fn or uint8 \(packed MXFP4\), got float16"),
        ("bf16", "q", lambda x: x[..., :96], "the head dim must be 64 or 128, got 96"),
        ("bf16", "q", lambda x: x.repeat(1, 40, 1), "q must hold from 1 to 128 heads"),
        ("bf16", "k", lambda x: x[None], r"k must have shape \[Tk, d\] for q of shape"),
        ("bf16", "k", lambda x: x[:, :64], r"k must have shape \[37, 128\], got \[37, 64\]"),
        ("bf16", "k", lambda x: x.float(), "k must be bfloat16, got float32"),
        ("bf16", "k", lambda x: x.t().contiguous().t(), "the last dimension of k must be contiguous"),
        ("bf16", "weights", lambda x: x.bfloat16(), "weights must be float32, got bfloat16"),
        ("bf16", "weights", lambda x: x[1:], r"weights must have shape \[5, 4\], got \[4, 4\]"),
        ("bf16", "k_scale", lambda x: torch.ones(37), "bf16 keys take no k_scale"),
        ("bf16", "q_scale", lambda x: torch.ones(5, 4), "bf16 queries take none"),
        ("bf16", "positions", lambda x: x.float(), "positions must be int32 or int64, got float32"),
        ("bf16", "positions", lambda x: x[1:], r"positions must have shape \[5\], got \[4\]"),
        ("bf16", "end", lambda x: torch.ones(5).int(), "given by positions, or by start and end; got both"),
        ("fp8", "k_scale", lambda x: None, r"fp8 keys need k_scale"),
        ("fp8", "k_scale", lambda x: x.int(), "k_scale must be float32, got int32"),
        ("mxfp4", "q_scale", lambda x: None, r"MXFP4 queries \(uint8\) need q_scale"),
        ("mxfp4", "k_scale", lambda x: x.float(), "k_scale must be int32, got float32"),
    ],
)
def test_bad_tensors(format, key, change, message):
    tensors = arguments(format)
    tensors[key] = change(tensors.get(key))
    for call in (ops.indexer_scores, lambda **given: ops.indexer_topk(**given, top_k=3)):
        with pytest.raises(ValueError, match=message):
            call(**tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_k": 3, "dtype": torch.float32}, "dtype must be int32 or int64, got float32"),
        ({"top_k": 3, "workspace": 0}, "workspace must be a positive number of bytes, got 0"),
        ({"top_k": 3, "ratio": 0}, "ratio must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"dsv4::indexer_topk: {message}"):
        ops.indexer_topk(**arguments("bf16"), **options)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("q", lambda x: x.bfloat16(), r"q must be float8_e4m3fn or uint8 \(packed MXFP4\), got bfloat16"),
        ("q", lambda x: x[0], r"q must have shape \[B, S, H, d\]"),
        ("q", lambda x: x.view(torch.uint8).repeat(1, 5, 1, 1).view(x.dtype), "from 1 to 4 queries a sequence"),
        ("cache", lambda x: x[:, :8000], "a page of 64 fp8 tokens takes 8448 bytes, cache has 8000 a page"),
        ("block_table", lambda x: x[:2], r"block_table must have shape \[3, any\], got \[2, 4\]"),
        ("block_table", lambda x: x.float(), "block_table must be int32 or int64"),
        ("block_table", lambda x: x - 100, r"block_table must hold pages in \[0, 14\) up to each length"),
        ("block_table", lambda x: x[:, :1], "lengths must be at most 64, got 256"),
        ("lengths", lambda x: x + 1, "lengths must be at most 256, got 257"),
        ("lengths", lambda x: x[:2], r"lengths must have shape \[3\], got \[2\]"),
        ("max_length", lambda x: 257, "max_length must be from 0 to 256, which the block table's pages hold, got 257"),
    ],
)
def test_bad_paged(key, change, message):
    tensors, _ = paged("fp8")
    tensors[key] = change(tensors.get(key))
    if key == "q" and tensors["q"].dim() == 4:
        tensors["weights"] = torch.ones(tensors["q"].shape[:3])
    with pytest.raises(ValueError, match=message):
        ops.indexer_scores_paged(**tensors)
    with pytest.raises(ValueError, match=message):
        ops.indexer_topk_paged(**tensors, top_k=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "dsv4::indexer_topk_paged: top_k must be at least 0, got -1"),
        ({"top_k": 3, "dtype": torch.float32}, "dtype must be int32 or int64, got float32"),
        ({"top_k": 3, "workspace": 0}, "workspace must be a positive number of bytes, got 0"),
    ],
)
def test_bad_choices_from_pages(options, message):
    with pytest.raises(ValueError, match=message):
        ops.indexer_topk_paged(**paged("fp8")[0], **options)


def test_grad_is_refused():
    tensors = arguments("bf16")
    tensors["weights"].requires_grad_()
    with pytest.raises(ValueError, match=r"dsv4::indexer_scores: an input requires grad.*no_grad"):
        ops.indexer_scores(**tensors)


# Kernels


def check(
    tensors: dict[str, Any],
    context: object = "",
    device: str = "cpu",
    best: bool = True,
    implementation: str = "triton",
) -> None:
    """Kernels against float64, and their choice against a sort of their own scores, all at a time and in pieces."""
    given = {key: None if value is None else value.to(device) for key, value in tensors.items()}
    scores = ops.indexer_scores(**given, implementation=implementation)
    assert_scores(scores, tensors)
    if not best:
        return
    rounded = ops.indexer_scores(**given, dtype=torch.bfloat16, implementation=implementation)
    assert torch.equal(rounded, scores.bfloat16()), context
    length = tensors["k"].shape[-2]
    for top_k, workspace in ((7, 2**28), (min(length + 3, 4096), 3 * 4 * (length + 3)), (1, 1)):
        chosen = ops.indexer_topk(**given, top_k=top_k, workspace=workspace, implementation=implementation)
        assert torch.equal(chosen, best_ref(scores, top_k, torch.int64)), (context, top_k, workspace)


def check_paged(tensors: dict[str, Any], device: str = "cpu", **options) -> None:
    expected = ops.indexer_scores_paged(**tensors, **options)
    given = {key: None if value is None else value.to(device) for key, value in tensors.items()}
    got = ops.indexer_scores_paged(**given, **options, implementation="triton").cpu()
    assert torch.equal(got == -torch.inf, expected == -torch.inf)
    choices = ((7, 2**28), (40, 1)) if tensors["q"].shape[1] != 3 else ()  # interpreted, each takes a second
    for top_k, workspace in choices:
        best = {"top_k": top_k, "workspace": workspace, "implementation": "triton"}
        assert torch.equal(ops.indexer_topk_paged(**given, **options, **best).cpu(), best_ref(got, top_k, torch.int64))
    if tensors["q"].dtype == torch.float8_e4m3fn and device != "cpu":
        seen = expected != -torch.inf
        found = {"head_dim": tensors["q"].shape[-1], "page_size": PAGE, "max_length": expected.shape[-1]}
        longest = paged_ends(tensors["q"], tensors["lengths"]).amax(1)
        k, k_scale, _ = _load_fp8(tensors["cache"], tensors["block_table"], longest, **found)
        allowed = (cut_off(tensors["q"], k, tensors["weights"]) * k_scale.unsqueeze(1))[seen]
        error = (got - expected)[seen].abs()
        assert (error <= allowed + 1e-5 * expected[seen].abs()).all(), (error / allowed).max()
        assert error.norm() <= allowed.norm() / 8  # it goes one way for some and the other way for others
        return
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def check_choice(device: str, rows: int, lengths: tuple[int, ...], top_k: int) -> None:
    """Top-k itself, of scores that a few bits cannot tell apart."""
    from dsv4_fusion.ops.triton.indexer_select import best_of

    generator = torch.Generator().manual_seed(2)
    for length, outlier in itertools.product(lengths, (0.0, 1e6, 1e30, torch.inf, torch.nan, -torch.inf)):
        scores = torch.randn(1, rows, -(-length // 16) * 16, generator=generator)
        scores[..., : length // 3] = scores[..., : length // 3].round(decimals=1)
        scores[..., length // 2] = outlier
        for dtype in (torch.int32, torch.int64) if device != "cpu" else (torch.int64,):
            out = torch.full((1, rows, top_k), -7, dtype=dtype, device=device)
            best_of(scores.to(device), out, length, top_k)
            assert torch.equal(out.cpu(), best_ref(scores[..., :length], top_k, dtype)), (length, outlier)


def interpreted() -> int:
    from dsv4_fusion.ops.triton import indexer_select

    indexer_select.MOST = 16  # interpreted, a sort of 512 takes its time
    check_choice("cpu", 2, (37,), 16)
    count = 0
    for format, range in itertools.product(FORMATS, RANGES):
        sizes = ((2, 20, 128, 37, None), (3, 4, 64, 270, 2)) if range == "causal" else ((2, 5, 64, 37, 2),)
        for queries, heads, d, length, batch in sizes:
            best = format == "bf16" and length < 100  # what chooses knows nothing of formats
            check(arguments(format, queries, heads, d, length, batch, range), (format, range, heads), best=best)
            count += 1
    check(arguments("bf16", 0))
    tied = arguments("bf16", 2, 4, 64, 40, None, "all")
    tied["k"] = tied["k"][:5].repeat(8, 1)
    check(tied, "ties")
    for format, queries in itertools.product(("fp8", "mxfp4"), (1, 3)):
        tensors, _ = paged(format, 2, queries, 5, 64, 5)
        check_paged(tensors)
        check_paged({**tensors, "lengths": tensors["lengths"].clamp(max=99)}, max_length=99)
        count += 1
    return count


def test_interpreted():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(3 * 4 + 4)]


@pytest.fixture
def poisoned():
    """Memory that is handed out next holds NaN."""
    pytest.importorskip("triton")
    torch.full((2**28,), torch.nan, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("format", FORMATS)
def test_cutedsl_on_the_gpu(poisoned, format, range):
    pytest.importorskip("cutlass")
    sizes = [(1, 64, 128, 1, None), (7, 64, 128, 333, None), (257, 64, 128, 1030, 2), (33, 128, 128, 700, 1)]
    sizes += [(19, 32, 64, 65, 3), (5, 32, 128, 8200, None), (0, 64, 128, 10, None), (3, 64, 128, 0, None)]
    for queries, heads, d, length, batch in sizes:
        given = arguments(format, queries, heads, d, length, batch, range)
        check(given, (format, range, queries), "cuda", implementation="cutedsl")


@pytest.mark.gpu
@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("format", FORMATS)
def test_on_the_gpu(poisoned, format, range):
    sizes = [(1, 64, 128, 1, None), (7, 64, 128, 333, None), (257, 64, 128, 1030, 2), (33, 128, 128, 700, 1)]
    sizes += [(19, 1, 64, 65, 3), (5, 24, 64, 8200, None), (0, 64, 128, 10, None), (3, 64, 128, 0, None)]
    for queries, heads, d, length, batch in sizes:
        check(arguments(format, queries, heads, d, length, batch, range), (format, range, queries), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 2, 3, 4])
@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_paged_on_the_gpu(poisoned, format, queries):
    for heads, d, pages in ((64, 128, 9), (5, 64, 3), (128, 128, 2)):
        tensors, _ = paged(format, 5, queries, heads, d, pages)
        check_paged(tensors, "cuda")
        check_paged({**tensors, "lengths": tensors["lengths"].clamp(max=99)}, "cuda", max_length=99)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_what_a_gpu_cannot_refuse_is_not_seen(poisoned, format):
    """Pages and lengths outside the cache: −inf, and nothing is read there."""
    tensors, _ = paged(format)
    tensors["lengths"][:] = 256
    tensors["block_table"] = torch.tensor([[0, -1, 14, 1], [1 << 30, 2, -(1 << 30), 3], [4, 5, 6, 7]]).int()
    given = {key: None if value is None else value.cuda() for key, value in tensors.items()}
    got = ops.indexer_scores_paged(**given, implementation="triton").cpu()
    lost = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool().repeat_interleave(PAGE, 1)
    assert torch.equal(got[:, 0] == -torch.inf, lost)
    given["lengths"] += 1000
    assert torch.equal(ops.indexer_scores_paged(**given, implementation="triton").cpu(), got)


@pytest.mark.gpu
def test_ties_and_special_scores_on_the_gpu(poisoned):
    from dsv4_fusion.ops.triton.indexer_scores import indexer_topk

    tensors = arguments("bf16", 50, 64, length=5000, range="all")
    tensors["k"] = tensors["k"][:40].repeat(125, 1)
    check(tensors, "ties", "cuda")
    tensors["k"][7, 3] = torch.nan
    tensors["k"][::9] = 0  # scores of exactly 0
    given = {key: None if value is None else value.cuda() for key, value in tensors.items()}
    scores = ops.indexer_scores(**given)
    assert scores[:, 7].isnan().all()
    for _ in range(3):
        assert torch.equal(indexer_topk(**given, top_k=600), best_ref(scores, 600, torch.int64))
    check_choice("cuda", 70, (500, 1000, 4000, 8000, 20000), 512)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_the_batch(format):
    tensors = {k: None if v is None else v.cuda() for k, v in arguments(format, 513, 64, length=900).items()}
    whole = ops.indexer_scores(**tensors)
    for part in (slice(0, 1), slice(200, 217), slice(512, 513)):
        some = {k: v if v is None or k in ("k", "k_scale") else v[part] for k, v in tensors.items()}
        assert torch.equal(ops.indexer_scores(**some), whole[part])


@pytest.mark.gpu
def test_cuda_graph_replay_sees_new_inputs():
    pytest.importorskip("triton")
    first, second = (arguments("fp8", 40, 64, length=500, seed=seed) for seed in (0, 1))
    given = {key: None if value is None else value.cuda() for key, value in first.items()}
    ops.indexer_topk(**given, top_k=64)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        chosen = ops.indexer_topk(**given, top_k=64)
    for key, value in given.items():
        if value is not None:
            value.copy_(second[key])
    captured.replay()
    assert torch.equal(chosen, ops.indexer_topk(**given, top_k=64))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["cutedsl", "triton"])
def test_no_farther_from_float64_than_eager(implementation):
    """Eager, as the model writes it: an fp32 product of the bf16 values, relu, weights, sum."""
    pytest.importorskip("cutlass")
    tensors = arguments("bf16", 300, 64, length=800, range="all")
    given = {key: None if value is None else value.cuda() for key, value in tensors.items()}
    value, _ = exact(tensors)
    ours, eager = (
        ((scores.cpu().double() - value).norm() / value.norm()).item()
        for scores in (
            ops.indexer_scores(**given, implementation=implementation),
            ops.indexer_scores(**given, implementation="reference"),
        )
    )
    assert ours <= 1.05 * eager + 1e-7, (ours, eager)  # 1e-7: one fp32 rounding


@pytest.mark.gpu
def test_long_contexts_fit_the_workspace():
    """1,024 queries × 131,072 keys: 512 MiB of scores in pieces of 64 MiB."""
    pytest.importorskip("triton")
    q, k = torch.randn(1024, 64, 128, device="cuda").bfloat16(), torch.randn(131072, 128, device="cuda").bfloat16()
    weights = torch.randn(1024, 64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chosen = ops.indexer_topk(q, k, weights, top_k=512, workspace=2**26)
    assert torch.cuda.max_memory_allocated() - before <= 2**26 + chosen.numel() * 8 + 2**20
    scores = ops.indexer_scores(q[:8], k, weights[:8])
    assert torch.equal(chosen[:8], best_ref(scores, 512, torch.int64))


@pytest.mark.gpu
def test_the_prefill_of_32768_tokens_takes_less_than_a_gib():
    """Its queries, keys, weights, a piece of the scores, and the choice: all that there is at a time."""
    pytest.importorskip("triton")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    q = torch.empty(32768, 64, 128, device="cuda", dtype=torch.bfloat16).normal_()
    k = torch.empty(8192, 128, device="cuda", dtype=torch.bfloat16).normal_()
    weights, positions = torch.ones(32768, 64, device="cuda"), torch.arange(32768, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    chosen = ops.indexer_topk(q, k, weights, positions=positions, top_k=512)
    assert torch.cuda.max_memory_allocated() - before < 2**30
    seen = (positions + 1) // 4
    assert torch.equal((chosen >= 0).sum(1), seen.clamp(max=512)) and (chosen < seen.clamp(min=1).unsqueeze(1)).all()


@pytest.mark.gpu
def test_the_number_of_tokens_compiles_nothing():
    triton = pytest.importorskip("triton")
    compiled, hook = [], triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(kwargs["fn"].name)
    try:
        for queries, length in itertools.product((1, 16, 33, 512), (64, 100, 333, 1024)):
            given = arguments("bf16", queries, 48, length=length)
            ops.indexer_scores(**{k: None if v is None else v.cuda() for k, v in given.items()})
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert len(compiled) <= 3, compiled


if __name__ == "__main__":
    patch_once_a_launch()
    print(interpreted())
