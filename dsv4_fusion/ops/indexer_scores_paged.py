"""The scores of the indexer, and the best keys by them, with the keys in a paged cache: for decoding.

The scores are those of ``indexer_scores.py``; the pages are what ``indexer_k_store_fp8`` and ``indexer_k_store_mxfp4``
fill. Source: as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._indexer import INTEGERS, check_tensor
from ._library import Implementation, define, expect, refuse_grad
from .indexer_cache import _check_cache, indexer_k_load_ref
from .indexer_scores import (
    _FORMATS,
    OUTPUTS,
    WORKSPACE,
    _check_choice,
    _check_dtype,
    _check_q,
    _cutedsl_limits,
    _dequantised,
    _topk_limits,
    best_ref,
    indexer_scores_ref,
)

QUERIES = 4  # of a sequence, at most

# References


def paged_ends(q: Tensor, lengths: Tensor) -> Tensor:
    """Keys that every query of a sequence sees, [B, S]."""
    if lengths.dim() == 2:
        return lengths
    queries = q.shape[1]
    behind = torch.arange(1 - queries, 1, device=q.device, dtype=lengths.dtype)
    return lengths.unsqueeze(1) + behind


def indexer_scores_paged_ref(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_scale: Tensor | None = None,
    *,
    page_size: int = 64,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain PyTorch form of :func:`indexer_scores_paged`."""
    format = _FORMATS[q.dtype]
    head_dim = q.shape[-1] * (2 if format == "mxfp4" else 1)
    length = block_table.shape[1] * page_size if max_length is None else max_length
    ends = paged_ends(q, lengths)
    longest = ends.amax(1) if ends.shape[1] else ends.sum(1)
    if q.device.type != "cpu":
        longest = longest.clamp(max=length)
    options: dict[str, Any] = {"head_dim": head_dim, "page_size": page_size, "max_length": length}
    if format == "fp8":  # codes, and their scales beside them: their product rounded to bf16 would be another number
        k, k_scale, found = _load_fp8(cache, block_table, longest, **options)
    else:
        k, k_scale = indexer_k_load_ref(cache, block_table, longest, format=format, **options), None
        found = _inside(cache, block_table, longest, page_size, length)
    q = _dequantised(q, q_scale, torch.float32)
    scores = indexer_scores_ref(q, k, weights, None, k_scale, None, ends, dtype=torch.float32)
    return scores.masked_fill(~found.unsqueeze(1), -torch.inf).to(dtype or torch.float32)


def _inside(cache: Tensor, block_table: Tensor, lengths: Tensor, page_size: int, length: int) -> Tensor:
    """bool [B, length]: which keys are before the length and on a page of the cache."""
    token = torch.arange(length, device=cache.device)
    page = block_table[:, token // page_size]
    return (token < lengths.unsqueeze(1)) & (page >= 0) & (page < cache.shape[0])


def _load_fp8(
    cache: Tensor, block_table: Tensor, lengths: Tensor, *, head_dim: int, page_size: int, max_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as fp32 [B, length, d] and scales [B, length], zeros outside, and what is inside."""
    options: dict[str, Any] = {"head_dim": head_dim, "page_size": page_size, "max_length": max_length}
    indexer_k_load_ref(cache, block_table, lengths, format="fp8", **options)  # its errors
    inside = _inside(cache, block_table, lengths, page_size, max_length)
    token = torch.arange(max_length, device=cache.device)
    page = torch.where(inside, block_table[:, token // page_size].long(), 0).unsqueeze(-1)
    if cache.shape[0] == 0:
        cache = cache.new_zeros([1, cache.shape[1]])
    row = (token % page_size).unsqueeze(-1)
    codes = cache[page, row * head_dim + torch.arange(head_dim, device=cache.device)].view(torch.float8_e4m3fn)
    scales = cache[page, page_size * head_dim + row * 4 + torch.arange(4, device=cache.device)].view(torch.float32)
    return (
        torch.where(inside.unsqueeze(-1), codes.float(), 0),
        torch.where(inside, scales.squeeze(-1), 0),
        inside,
    )


def indexer_topk_paged_ref(
    *tensors: Any,
    top_k: int,
    page_size: int = 64,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Plain PyTorch form of :func:`indexer_topk_paged`: all scores, then a stable sort."""
    scores = indexer_scores_paged_ref(*tensors, page_size=page_size, max_length=max_length)
    return best_ref(scores, top_k, dtype or torch.int64)


# Checks, in the real call and in the fake one


def _check_paged(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_scale: Tensor | None = None,
    *,
    page_size: int = 64,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    outputs: tuple[torch.dtype, ...] = OUTPUTS,
) -> None:
    format, d = _check_q(q, weights, q_scale, (4,))
    if format == "bf16":
        raise ValueError("the cache holds FP8 or MXFP4: q must be float8_e4m3fn or uint8 (packed MXFP4), got bfloat16")
    batch, queries = q.shape[:2]
    if not isinstance(queries, int) or not 1 <= queries <= QUERIES:
        raise ValueError(f"q must hold from 1 to {QUERIES} queries a sequence, got shape {list(q.shape)}")
    _check_cache(cache, page_size, format, d, q.device)
    check_tensor("block_table", block_table, (batch, None), INTEGERS, q.device)
    if lengths.dim() == 2:
        check_tensor("lengths", lengths, (batch, queries), INTEGERS, q.device)
    else:
        check_tensor("lengths", lengths, (batch,), INTEGERS, q.device)
    if max_length is not None:
        room = block_table.shape[1] * page_size
        expect(
            max_length >= 0 and max_length <= room,
            lambda: f"max_length must be from 0 to {room}, which the block table's pages hold, got {max_length}",
        )
    _check_dtype(dtype, outputs)
    refuse_grad([q, weights])


def _check_topk(*args: Any, top_k: int, workspace: int = WORKSPACE, **options: Any) -> None:
    _check_paged(*args, **options, outputs=INTEGERS)
    _check_choice(top_k, workspace)


# Fakes: every output is contiguous


def _fake_paged(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    block_table: Tensor,
    *_: Any,
    page_size: int = 64,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    length = block_table.shape[1] * page_size if max_length is None else max_length
    return q.new_empty([*q.shape[:2], length], dtype=dtype or torch.float32)


def _fake_topk(q: Tensor, *_: Any, top_k: int, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return q.new_empty([*q.shape[:2], top_k], dtype=dtype or torch.int64)


# Operators

LEAST_PAGE = 16  # tokens that are copied at once


def _cutedsl_paged_limits(q: Tensor, cache: Tensor, *_: Any, page_size: int = 64, **options: Any) -> str | None:
    if page_size < LEAST_PAGE:
        return f"the cutedsl kernel takes pages of at least {LEAST_PAGE} tokens, page_size is {page_size}"
    if cache.shape[0] == 0:
        return "the cutedsl kernel takes a cache of at least one page"
    if cache.stride(0) % 16 or cache.data_ptr() % 16:
        return f"the cutedsl kernel copies 16 bytes at a time: pages are not aligned to that, stride {cache.stride(0)}"
    return _cutedsl_limits(q, top_k=options.get("top_k", 0))


def _kernels(function: str, *limits: Any) -> list[Implementation]:
    entry = f"dsv4_fusion.ops.cutedsl.indexer_scores_paged:{function}"
    cutedsl = Implementation("cutedsl", entry, _cutedsl_paged_limits, capability=(9, 0))
    return [cutedsl, Implementation("triton", f"{_MODULE}:{function}", *limits)]


_MODULE = "dsv4_fusion.ops.triton.indexer_scores"
_TENSORS = "Tensor q, Tensor cache, Tensor weights, Tensor block_table, Tensor lengths, Tensor? q_scale=None"
_OPTIONS = "int page_size=64, SymInt? max_length=None, ScalarType? dtype=None"

_indexer_scores_paged = define(
    f"indexer_scores_paged({_TENSORS}, *, {_OPTIONS}, str? implementation=None) -> Tensor",
    reference=indexer_scores_paged_ref,
    fake=_fake_paged,
    check=_check_paged,
    implementations=_kernels("indexer_scores_paged"),
)
_indexer_topk_paged = define(
    f"indexer_topk_paged({_TENSORS}, *, SymInt top_k, {_OPTIONS}, int workspace={WORKSPACE}, "
    "str? implementation=None) -> Tensor",
    reference=indexer_topk_paged_ref,
    fake=_fake_topk,
    check=_check_topk,
    implementations=_kernels("indexer_topk_paged", _topk_limits),
)


def indexer_scores_paged(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_scale: Tensor | None = None,
    *,
    page_size: int = 64,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Tensor:
    """The scores of :func:`indexer_scores` with the keys in a paged cache, for decoding.

    Args:
        q: [B, S, H, d] e4m3fn or [B, S, H, d / 2] packed MXFP4 uint8, S from 1 to 4: the sequence's last tokens.
        cache: uint8 [pages, page_bytes] of the same format, as ``indexer_k_store_fp8`` or ``indexer_k_store_mxfp4``
            filled it.
        weights, q_scale, dtype: as in :func:`indexer_scores`.
        block_table: [B, N] int32 or int64: the pages of each sequence. What is beyond its length may be anything. A
            page outside the cache is an error; a GPU cannot raise it, and its keys are not seen.
        lengths: int32 or int64 [B, S], the keys every query sees; or [B], those the last one sees, each query before
            it one fewer. More than ``max_length`` is an error, and on a GPU is cut to it.
        page_size: tokens a page, a power of two.
        max_length: keys a row of the result; None for all that N pages hold, so that no length is waited for.
        implementation: "cutedsl" (32, 64 or 128 heads, pages of 16 tokens or more at multiples of 16 bytes, SM90),
            "triton", "reference", or None for the best one usable.

    Returns:
        [B, S, max_length], contiguous, −inf from a query's length on.

    Raises:
        ValueError: as :func:`indexer_scores`.
    """
    return _indexer_scores_paged(
        q,
        cache,
        weights,
        block_table,
        lengths,
        q_scale,
        page_size=page_size,
        max_length=max_length,
        dtype=dtype,
        implementation=implementation,
    )


def indexer_topk_paged(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_scale: Tensor | None = None,
    *,
    top_k: int,
    page_size: int = 64,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    workspace: int = WORKSPACE,
    implementation: str | None = None,
) -> Tensor:
    """The keys in a paged cache with the highest scores for every query, best first; a tie goes to the lowest index.

    The scores are those of :func:`indexer_scores_paged` in fp32; they exist for as many sequences at a time as
    ``workspace`` has room for, and for one at least. A score that is NaN comes first.

    Args:
        q, cache, weights, block_table, lengths, q_scale, page_size, max_length: as in :func:`indexer_scores_paged`.
        top_k: how many; it may exceed the number of keys.
        dtype: of the result, int32 or int64; None for int64.
        workspace: bytes of scores that may exist at a time.
        implementation: as there; the reference needs all scores at a time.

    Returns:
        [B, S, top_k], contiguous: places in the sequence, not in the cache; −1 after the keys that the query sees.

    Raises:
        ValueError: as :func:`indexer_scores`.
    """
    return _indexer_topk_paged(
        q,
        cache,
        weights,
        block_table,
        lengths,
        q_scale,
        top_k=top_k,
        page_size=page_size,
        max_length=max_length,
        dtype=dtype,
        workspace=workspace,
        implementation=implementation,
    )
