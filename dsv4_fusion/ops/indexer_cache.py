"""The keys of DeepSeek-V4's sparse-attention indexer: quantised into a paged cache, and read back.

Shapes: T tokens, d head dim (64 or 128), R rotated dims, P rows of a table; a cache is uint8 [pages, page_bytes].

A page of n tokens is planar: the values of its tokens one after the other, then their scales, 4 bytes each.

====== ================================== =====================================
format values of a token                  scale of a token
====== ================================== =====================================
fp8    d bytes e4m3fn                     one fp32
mxfp4  d / 2 bytes E2M1, even dim lowest  d / 32 bytes UE8M0, then zeros
====== ================================== =====================================

Bytes after the scales are padding, and are never written. The arithmetic of a row is that of the queries
(``_indexer.py``); the norm before it adds squares in the order of that Hadamard transform: neighbours first.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ._indexer import (
    FLOATS,
    INTEGERS,
    MXFP4_FLOOR,
    check_dim,
    check_quantiser,
    check_rope,
    check_tensor,
    cutedsl_limits,
    cutedsl_unaligned,
    dequantise_fp8_ref,
    dequantise_mxfp4_ref,
    hadamard_ref,
    quantise_fp8_ref,
    quantise_mxfp4_ref,
    rms_norm_ref,
    rope_rows,
    rotate_ref,
)
from ._library import Implementation, define, expect, refuse_grad

FORMATS = ("fp8", "mxfp4")
SCALE_BYTES = 4  # a token, in either format


def value_bytes(format: str, head_dim: int) -> int:
    """Bytes of a token's values."""
    return head_dim if format == "fp8" else head_dim // 2


@functools.cache
def _page_bytes(page_size: int, format: str, head_dim: int) -> int:
    if format not in FORMATS:
        raise ValueError(f"format must be 'fp8' or 'mxfp4', got {format!r}")
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two, got {page_size}")
    check_dim(head_dim)
    return page_size * (value_bytes(format, head_dim) + SCALE_BYTES)


def indexer_cache_bytes(page_size: int, format: str, head_dim: int = 128) -> int:
    """Bytes of one page of the indexer's key cache; a page may be longer.

    Args:
        page_size: tokens a page, a power of two.
        format: "fp8" (132 bytes a token for head_dim 128) or "mxfp4" (68).
        head_dim: 64 or 128.

    Raises:
        ValueError: any other argument.
    """
    return _page_bytes(page_size, format, head_dim)


# References


def _row_ref(
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None,
    positions: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm_eps: float,
    hadamard: bool,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    """The rows to be quantised, and their slots: tokens that are skipped are left out, whatever their positions."""
    end = cache.shape[0] * page_size
    if slots.device.type == "cpu" and slots.numel() and not torch.compiler.is_compiling():
        low, high = int(slots.min()), int(slots.max())
        expect(low >= -1 and high < end, lambda: f"slots must be in [-1, {end}), got {low} to {high}")
    kept = (slots >= 0) & (slots < end)
    k = k[kept]
    if norm_weight is not None:
        k = rms_norm_ref(k, norm_weight, norm_eps)
    if cos is not None and sin is not None:
        if positions is None:
            cos, sin = cos[kept], sin[kept]
        else:
            cos, sin = rope_rows(positions[kept], cos, sin)
        k = rotate_ref(k, cos, sin)
    return hadamard_ref(k) if hadamard else k, slots[kept].long()


def _store_ref(cache: Tensor, slots: Tensor, values: Tensor, scales: Tensor, page_size: int) -> None:
    """``values`` uint8 [T, n] and ``scales``, four bytes each, into the slots."""
    page, row = slots.unsqueeze(1) // page_size, slots.unsqueeze(1) % page_size
    width = values.shape[1]
    cache[page, row * width + torch.arange(width, device=cache.device)] = values
    begin = page_size * width
    scales = scales.unsqueeze(1).view(torch.uint8)
    cache[page, begin + row * SCALE_BYTES + torch.arange(SCALE_BYTES, device=cache.device)] = scales


def indexer_k_store_fp8_ref(
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    hadamard: bool = False,
    amax_floor: float = 1e-4,
    power_of_two_scale: bool = True,
    page_size: int = 64,
) -> None:
    """Plain PyTorch form of :func:`indexer_k_store_fp8`."""
    k, slots = _row_ref(k, cache, slots, norm_weight, positions, cos, sin, norm_eps, hadamard, page_size)
    values, scale = quantise_fp8_ref(k, amax_floor, power_of_two_scale)
    _store_ref(cache, slots, values.view(torch.uint8), scale, page_size)


def indexer_k_store_mxfp4_ref(
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    hadamard: bool = False,
    amax_floor: float = MXFP4_FLOOR,
    ties: str = "even",
    page_size: int = 64,
) -> None:
    """Plain PyTorch form of :func:`indexer_k_store_mxfp4`."""
    k, slots = _row_ref(k, cache, slots, norm_weight, positions, cos, sin, norm_eps, hadamard, page_size)
    values, scale = quantise_mxfp4_ref(k, amax_floor, ties)
    _store_ref(cache, slots, values, scale, page_size)


def indexer_k_load_ref(
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    format: str,
    head_dim: int = 128,
    page_size: int = 64,
    max_length: int | None = None,
) -> Tensor:
    """Plain PyTorch form of :func:`indexer_k_load`."""
    if max_length is None:
        max_length = block_table.shape[1] * page_size
    token = torch.arange(max_length, device=cache.device)
    page, row = block_table[:, token // page_size].long(), (token % page_size).unsqueeze(-1)
    inside = token < lengths.unsqueeze(1)
    if cache.device.type == "cpu" and not torch.compiler.is_compiling():
        high = int(lengths.max()) if lengths.numel() else 0
        expect(high <= max_length, lambda: f"lengths must be at most {max_length}, got {high}")
        asked = page[inside]
        expect(
            bool(((asked >= 0) & (asked < cache.shape[0])).all()),
            lambda: (
                f"block_table must hold pages in [0, {cache.shape[0]}) up to each length, got {block_table.tolist()}"
            ),
        )
    inside = inside & (page >= 0) & (page < cache.shape[0])
    page = torch.where(inside, page, 0).unsqueeze(-1)
    if cache.shape[0] == 0:
        cache = cache.new_zeros([1, cache.shape[1]])
    width = value_bytes(format, head_dim)
    values = cache[page, row * width + torch.arange(width, device=cache.device)]
    scales = cache[page, page_size * width + row * SCALE_BYTES + torch.arange(SCALE_BYTES, device=cache.device)]
    if format == "fp8":
        loaded = dequantise_fp8_ref(values.view(torch.float8_e4m3fn), scales.view(torch.float32).squeeze(-1))
    else:
        loaded = dequantise_mxfp4_ref(values, scales[..., : head_dim // 32])
    return torch.where(inside.unsqueeze(-1), loaded, 0)


# Checks, in the real call and in the fake one


def _check_cache(cache: Tensor, page_size: int, format: str, head_dim: int, device: torch.device) -> None:
    least = _page_bytes(page_size, format, int(head_dim))
    if cache.dim() != 2:
        check_tensor("cache", cache, (None, None), (torch.uint8,), device)
    pages, page_bytes = cache.shape
    check_tensor("cache", cache, (pages, page_bytes), (torch.uint8,), device)
    if page_bytes < least:
        raise ValueError(f"a page of {page_size} {format} tokens takes {least} bytes, cache has {page_bytes} a page")
    if cache.stride(0) % 4 or cache.storage_offset() % 4:
        raise ValueError(
            "pages of cache must begin at multiples of 4 bytes, got page stride "
            f"{cache.stride(0)} and storage offset {cache.storage_offset()}"
        )


def _check_store(
    format: str,
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    page_size: int = 64,
    **options: Any,
) -> None:
    if k.dim() != 2:
        raise ValueError(f"k must have shape [T, d], got {list(k.shape)}")
    (tokens, d), device = k.shape, k.device
    _check_cache(cache, page_size, format, d, device)
    check_tensor("k", k, (tokens, d), (torch.bfloat16,), device)
    check_tensor("slots", slots, (tokens,), INTEGERS, device)
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, (d,), FLOATS, device)
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"norm_eps must be a positive, finite number, got {norm_eps}")
    if (cos is None) != (sin is None) or (cos is None and positions is not None):
        given = ", ".join(
            label for label, value in (("positions", positions), ("cos", cos), ("sin", sin)) if value is not None
        )
        raise ValueError(f"RoPE takes cos and sin, and positions if these are a table; got {given} alone")
    if cos is not None and sin is not None:
        check_rope(tokens, d, positions, cos, sin, device)
    check_quantiser(format == "mxfp4", **options)
    refuse_grad([k, cache, norm_weight, cos, sin])


def _check_load(
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    format: str,
    head_dim: int = 128,
    page_size: int = 64,
    max_length: int | None = None,
) -> None:
    _check_cache(cache, page_size, format, head_dim, cache.device)
    check_tensor("block_table", block_table, (None, None), INTEGERS, cache.device)
    check_tensor("lengths", lengths, (block_table.shape[0],), INTEGERS, cache.device)
    if max_length is not None:
        room = block_table.shape[1] * page_size
        expect(
            max_length >= 0 and max_length <= room,
            lambda: f"max_length must be from 0 to {room}, which the block table's pages hold, got {max_length}",
        )


# Fakes


def _fake_store(*_: Any, **__: Any) -> None:
    """The cache is written in place."""


def _fake_load(
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    format: str,
    head_dim: int = 128,
    page_size: int = 64,
    max_length: int | None = None,
) -> Tensor:
    length = block_table.shape[1] * page_size if max_length is None else max_length
    return cache.new_empty([block_table.shape[0], length, head_dim], dtype=torch.bfloat16)


# Operators


def _cutedsl_limits(
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    **_: Any,
) -> str | None:
    if cache.stride(0) % 8 or cache.data_ptr() % 8:
        return f"the cutedsl kernels write 8 bytes at a time: pages are not aligned to that, stride {cache.stride(0)}"
    return cutedsl_limits(k, cos, sin) or (cutedsl_unaligned(norm_weight) if norm_weight is not None else None)


def _kernels(function: str) -> list[Implementation]:
    return [
        Implementation(
            "cutedsl", f"dsv4_fusion.ops.cutedsl.indexer_cache:{function}", _cutedsl_limits, capability=(9, 0)
        ),
        Implementation("triton", f"dsv4_fusion.ops.triton.indexer_cache:{function}"),
    ]


_ARGUMENTS = (
    "Tensor k, Tensor(a!) cache, Tensor slots, Tensor? norm_weight=None, Tensor? positions=None, Tensor? cos=None, "
    "Tensor? sin=None, *, float norm_eps=1e-6, bool hadamard=False"
)
_END = "int page_size=64, str? implementation=None"

_indexer_k_store_fp8 = define(
    f"indexer_k_store_fp8({_ARGUMENTS}, float amax_floor=1e-4, bool power_of_two_scale=True, {_END}) -> ()",
    reference=indexer_k_store_fp8_ref,
    fake=_fake_store,
    check=functools.partial(_check_store, "fp8"),
    implementations=_kernels("indexer_k_store_fp8"),
)
_indexer_k_store_mxfp4 = define(
    f'indexer_k_store_mxfp4({_ARGUMENTS}, float amax_floor={MXFP4_FLOOR!r}, str ties="even", {_END}) -> ()',
    reference=indexer_k_store_mxfp4_ref,
    fake=_fake_store,
    check=functools.partial(_check_store, "mxfp4"),
    implementations=_kernels("indexer_k_store_mxfp4"),
)
_indexer_k_load = define(
    "indexer_k_load(Tensor cache, Tensor block_table, Tensor lengths, *, str format, int head_dim=128, "
    "int page_size=64, int? max_length=None, str? implementation=None) -> Tensor",
    reference=indexer_k_load_ref,
    fake=_fake_load,
    check=_check_load,
    implementations=[Implementation("triton", "dsv4_fusion.ops.triton.indexer_cache:indexer_k_load")],
)


def indexer_k_store_fp8(
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    hadamard: bool = False,
    amax_floor: float = 1e-4,
    power_of_two_scale: bool = True,
    page_size: int = 64,
    implementation: str | None = None,
) -> None:
    """Quantise keys to FP8 and store them; before it RMSNorm, RoPE and Hadamard, each if it is asked for.

    The quantiser is that of :func:`~dsv4_fusion.ops.indexer_q_fp8`; here the scale is stored. A key that holds a NaN
    or an infinity is stored as bytes 0x7F with the scale NaN (bits 0x7FC00000).

    Args:
        k: [T, d] bf16; d is 64 or 128 and contiguous.
        cache: uint8 [pages, page_bytes], changed in place; pages begin at multiples of 4 bytes, and have at least
            :func:`indexer_cache_bytes`. Bytes of no slot, and padding, are left as they are.
        slots: [T] int32 or int64: page · page_size + row. Tokens with slot −1 are skipped. Other slots outside the
            cache are an error; a GPU cannot raise it, and skips these tokens too. Slots must differ.
        norm_weight: [d] fp32 or bf16: normalise the key first, in fp32, rounded to bf16.
        positions, cos, sin: as in :func:`~dsv4_fusion.ops.indexer_q_fp8`; without cos and sin nothing is rotated.
            Positions of skipped tokens may be anything.
        norm_eps: added to the mean square.
        hadamard, amax_floor, power_of_two_scale: as in :func:`~dsv4_fusion.ops.indexer_q_fp8`.
        page_size: tokens a page, a power of two.
        implementation: "cutedsl", "triton", "reference", or None for the best one usable.

    Raises:
        ValueError: wrong shape, dtype, device, stride or option; an input that requires grad; an implementation asked
            for by name that cannot run here.
    """
    _indexer_k_store_fp8(
        k,
        cache,
        slots,
        norm_weight,
        positions,
        cos,
        sin,
        norm_eps=norm_eps,
        hadamard=hadamard,
        amax_floor=amax_floor,
        power_of_two_scale=power_of_two_scale,
        page_size=page_size,
        implementation=implementation,
    )


def indexer_k_store_mxfp4(
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    hadamard: bool = False,
    amax_floor: float = MXFP4_FLOOR,
    ties: str = "even",
    page_size: int = 64,
    implementation: str | None = None,
) -> None:
    """Quantise keys to MXFP4 and store them; before it RMSNorm, RoPE and Hadamard, each if it is asked for.

    The quantiser is that of :func:`~dsv4_fusion.ops.indexer_q_mxfp4`, the rest is :func:`indexer_k_store_fp8`.

    Args:
        k, cache, slots, norm_weight, positions, cos, sin, norm_eps, page_size, implementation: as in
            :func:`indexer_k_store_fp8`.
        hadamard, amax_floor, ties: as in :func:`~dsv4_fusion.ops.indexer_q_mxfp4`.

    Raises:
        ValueError: as :func:`indexer_k_store_fp8`.
    """
    _indexer_k_store_mxfp4(
        k,
        cache,
        slots,
        norm_weight,
        positions,
        cos,
        sin,
        norm_eps=norm_eps,
        hadamard=hadamard,
        amax_floor=amax_floor,
        ties=ties,
        page_size=page_size,
        implementation=implementation,
    )


def indexer_k_load(
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    format: str,
    head_dim: int = 128,
    page_size: int = 64,
    max_length: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Keys read back from the cache: value times scale in fp32, rounded to bf16.

    Args:
        cache: uint8 [pages, page_bytes], as :func:`indexer_k_store_fp8` or :func:`indexer_k_store_mxfp4` filled it.
        block_table: [B, N] int32 or int64: the pages of each sequence. What is beyond its length may be anything. A
            page outside the cache is an error; a GPU cannot raise it, and gives zeros.
        lengths: [B] int32 or int64, tokens of each sequence, at most ``max_length``.
        format: "fp8" or "mxfp4".
        head_dim: 64 or 128.
        page_size: tokens a page, a power of two.
        max_length: tokens a sequence of the result; None for all that N pages hold, so that no length is waited for.
        implementation: "triton", "reference", or None for the best one usable.

    Returns:
        [B, max_length, head_dim] bf16, contiguous; zeros beyond each length. A scale that is NaN gives NaN.

    Raises:
        ValueError: wrong shape, dtype, device, stride or option; an implementation asked for by name that cannot run.
    """
    return _indexer_k_load(
        cache,
        block_table,
        lengths,
        format=format,
        head_dim=head_dim,
        page_size=page_size,
        max_length=max_length,
        implementation=implementation,
    )
