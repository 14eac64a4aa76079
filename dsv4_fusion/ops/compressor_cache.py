"""The compressor on paged caches: one call takes the new tokens of every request, prefill and decode alike.

Shapes: T tokens, d the entry's dims, r the ratio, L rows of a window (2r where windows overlap, else r), c series (2 or
1), P rows of a table; ``state`` is fp32 [pages, N, 2, c · d], a cache is uint8 [pages, page_bytes].

A row of the state is one token's values, then its gates with their bias. The token at position p of a request stands
in page ``state_table[request, (p // N) % M]``, row ``p % N``: a ring of N · M rows, or all of them if M is that large.
A page of entries is planar, values first, then scales; bytes after these and the padding of scales are never written.

====== ============================================ =========================================================
format values of an entry                           scales of an entry
====== ============================================ =========================================================
kv     d - 64 bytes e4m3fn, 64 rotated dims in bf16  one UE8M0 byte for 64 values, padded to 8 bytes
fp8    as ``indexer_k_store_fp8`` writes them: the keys of the indexer
mxfp4  as ``indexer_k_store_mxfp4`` writes them
====== ============================================ =========================================================
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ._compressor import BLOCK, entry_ref, record_ref, unscaled_ref
from ._indexer import FLOATS, INTEGERS, check_tensor
from ._library import Implementation, define, expect, refuse_grad
from .compressor import check_angles, check_parameters
from .indexer_cache import SCALE_BYTES, indexer_cache_bytes, value_bytes

KV_SCALES = 8  # bytes of an entry's scales, the padding too
FORMATS = ("kv", "fp8", "mxfp4")


def record_bytes(format: str, d: int) -> tuple[int, int]:
    """Bytes of an entry's values and of its scales."""
    return (d + BLOCK, KV_SCALES) if format == "kv" else (value_bytes(format, d), SCALE_BYTES)


@functools.cache
def _page_bytes(page_size: int, format: str, d: int) -> int:
    if format not in FORMATS:
        raise ValueError(f"format must be 'kv', 'fp8' or 'mxfp4', got {format!r}")
    if format != "kv":
        return indexer_cache_bytes(page_size, format, d)
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two, got {page_size}")
    if d not in (128, 256, 512):
        raise ValueError(f"the head dim must be 128, 256 or 512, got {d}")
    return page_size * sum(record_bytes(format, d))


def kv_cache_bytes(page_size: int, head_dim: int = 512) -> int:
    """Bytes of one page of compressed entries: 584 an entry of 512 dims, rounded up to a multiple of its 576 bytes of
    values, as FlashMLA's pages are; a page may be shorter by what is rounded, or longer.

    Args:
        page_size: entries a page, a power of two.
        head_dim: 128, 256 or 512.

    Raises:
        ValueError: any other argument.
    """
    unit = head_dim + BLOCK
    return -(-_page_bytes(page_size, "kv", head_dim) // unit) * unit


# References


def _check_tokens(
    positions: Tensor, requests: Tensor, starts: Tensor, slots: Tensor, angle: Tensor, cos: Tensor, state: Tensor,
    state_table: Tensor, end: int,
) -> None:  # fmt: skip
    """What a GPU cannot raise. ``slots`` and ``angle``, the row of ``cos``, are those of the closing tokens."""
    if requests.device.type != "cpu" or not requests.numel() or torch.compiler.is_compiling():
        return
    high, here = int(requests.max()), requests >= 0
    expect(
        high < state_table.shape[0],
        lambda: f"requests must be below {state_table.shape[0]}, the rows of state_table, got {high}",
    )
    order = torch.full_like(requests, -1)
    for request, (begin, after) in enumerate(zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True)):
        order[max(begin, 0) : max(after, 0)] = request
    expect(
        bool((order == requests).all()),
        lambda: f"starts must say where each request's tokens begin, got {starts.tolist()} for {requests.tolist()}",
    )
    least = int(positions[here].min()) if here.any() else 0
    expect(least >= 0, lambda: f"positions must not be negative, got {least}")
    same = (requests[1:] == requests[:-1]) & here[1:]
    expect(
        bool((positions[1:] - positions[:-1] == 1)[same].all()),
        lambda: f"the tokens of a request must have successive positions, got {positions.tolist()}",
    )
    pages = state_table[requests[here]]
    expect(
        bool(((pages >= 0) & (pages < state.shape[0])).all()),
        lambda: f"state_table must hold pages in [0, {state.shape[0]}) for each request, got {pages.tolist()}",
    )
    if slots.numel():
        low, high = int(slots.min()), int(slots.max())
        expect(low >= -1 and high < end, lambda: f"slots must be in [-1, {end}), got {low} to {high}")
        last = int(angle.max())
        expect(last < cos.shape[0], lambda: f"cos and sin must have a row for position {last}, got {cos.shape[0]} rows")


def _insert_ref(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    requests: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    state_table: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_eps: float,
    format: str,
    hadamard: bool,
    page_size: int,
    overlap: bool,
) -> None:
    (tokens, device), (ratio, d) = (kv.shape[0], kv.device), (position_bias.shape[0], norm_weight.shape[0])
    rows, n, ring = (1 + overlap) * ratio, state.shape[1], state.shape[1] * state_table.shape[1]
    end = cache.shape[0] * page_size
    positions, requests, slots, state_table = positions.long(), requests.long(), slots.long(), state_table.long()
    starts = starts.long()
    here = (requests >= 0) & (requests < state_table.shape[0])
    closing = here & ((positions + 1) % ratio == 0)
    angle = positions // ratio * ratio
    _check_tokens(positions, requests, starts, slots[closing], angle[closing], cos, state, state_table, end)
    new_kv = kv.float()
    new_gate = gate.float() + position_bias.float()[positions % ratio]
    new = torch.stack([new_kv, new_gate], 1)  # [T, 2, c d]

    def place(request: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return state_table[request, position // n % state_table.shape[1]], position % n

    # Entries, from the state as it was and the new tokens
    token = (closing & (slots >= 0) & (slots < end) & (angle < cos.shape[0])).nonzero().squeeze(1)
    if token.numel():
        back = torch.arange(rows, device=device) - (rows - 1)
        at, position = token.unsqueeze(1) + back, positions[token].unsqueeze(1) + back  # [E, L]
        request = requests[token].unsqueeze(1)
        inside = at >= starts[request]
        page, row = place(request, position.clamp(min=0))
        fine = (page >= 0) & (page < state.shape[0])
        old = state[torch.where(fine, page, 0), row]
        picked = torch.where(inside[..., None, None], new[at.clamp(min=0)], old)  # [E, L, 2, c d]
        exists = (inside | fine) & (position >= 0)
        if overlap:
            picked = torch.cat([picked[:, :ratio, :, :d], picked[:, ratio:, :, d:]], 1)
        values = torch.where(exists.unsqueeze(-1), picked[:, :, 0], 0.0)
        gates = torch.where(exists.unsqueeze(-1), picked[:, :, 1], -math.inf)
        entries = entry_ref(values, gates, norm_weight, cos[angle[token]], sin[angle[token]], norm_eps)
        written = record_ref(entries, format, hadamard)
        page, row = (slots[token] // page_size).unsqueeze(1), (slots[token] % page_size).unsqueeze(1)
        begin = 0
        for part, width in zip(written, record_bytes(format, d), strict=True):
            cache[page, begin + row * width + torch.arange(part.shape[1], device=device)] = part
            begin += page_size * width

    # The state, without the rows that a later token of this call takes
    after = starts[torch.where(here, requests, 0) + 1]
    kept = (here & (torch.arange(tokens, device=device) + ring >= after)).nonzero().squeeze(1)
    page, row = place(requests[kept], positions[kept])
    fine = (page >= 0) & (page < state.shape[0])
    state[page[fine], row[fine]] = new[kept[fine]]


def compress_csa_insert_ref(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    requests: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    state_table: Tensor,
    cache: Tensor,
    slots: Tensor,
    *,
    norm_eps: float = 1e-6,
    format: str = "kv",
    hadamard: bool = False,
    page_size: int = 64,
) -> None:
    """Plain PyTorch form of :func:`compress_csa_insert`."""
    _insert_ref(
        kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache, slots,
        norm_eps, format, hadamard, page_size, True,
    )  # fmt: skip


def compress_hca_insert_ref(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    requests: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    state_table: Tensor,
    cache: Tensor,
    slots: Tensor,
    *,
    norm_eps: float = 1e-6,
    format: str = "kv",
    hadamard: bool = False,
    page_size: int = 64,
) -> None:
    """Plain PyTorch form of :func:`compress_hca_insert`."""
    _insert_ref(
        kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache, slots,
        norm_eps, format, hadamard, page_size, False,
    )  # fmt: skip


def kv_load_ref(
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    head_dim: int = 512,
    page_size: int = 64,
    max_length: int | None = None,
) -> Tensor:
    """Plain PyTorch form of :func:`kv_load`."""
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
    plain, width = head_dim - BLOCK, head_dim + BLOCK

    def bytes_at(begin: int | Tensor, count: int) -> Tensor:
        return cache[page, begin + torch.arange(count, device=cache.device)]

    codes = bytes_at(row * width, plain).view(torch.float8_e4m3fn)
    rotated = bytes_at(row * width + plain, 2 * BLOCK).view(torch.bfloat16)
    exponent = bytes_at(page_size * width + row * KV_SCALES, plain // BLOCK).int()
    loaded = torch.cat([unscaled_ref(codes, exponent).bfloat16(), rotated], -1)
    return torch.where(inside.unsqueeze(-1), loaded, 0)


# Checks, in the real call and in the fake one


def _check_cache(cache: Tensor, page_size: int, format: str, d: int, device: torch.device) -> None:
    least = _page_bytes(page_size, format, int(d))
    if cache.dim() != 2:
        check_tensor("cache", cache, (None, None), (torch.uint8,), device)
    pages, page_bytes = cache.shape
    check_tensor("cache", cache, (pages, page_bytes), (torch.uint8,), device)
    if page_bytes < least:
        raise ValueError(f"a page of {page_size} {format} entries takes {least} bytes, cache has {page_bytes} a page")
    unit = 8 if format == "kv" else 4
    if cache.stride(0) % unit or cache.storage_offset() % unit:
        raise ValueError(
            f"pages of cache must begin at multiples of {unit} bytes, got page stride "
            f"{cache.stride(0)} and storage offset {cache.storage_offset()}"
        )


def _check_insert(
    overlap: bool,
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    requests: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    state_table: Tensor,
    cache: Tensor,
    slots: Tensor,
    *,
    norm_eps: float = 1e-6,
    format: str = "kv",
    hadamard: bool = False,
    page_size: int = 64,
) -> None:
    device = kv.device
    ratio, d = check_parameters(position_bias, norm_weight, norm_eps, overlap, FLOATS, device)
    _check_cache(cache, page_size, format, d, device)
    width, tokens = (1 + overlap) * d, kv.shape[0]
    check_tensor("kv", kv, (tokens, width), FLOATS, device)
    check_tensor("gate", gate, (tokens, width), (kv.dtype,), device)
    for label, tensor in (("positions", positions), ("requests", requests), ("slots", slots)):
        check_tensor(label, tensor, (tokens,), INTEGERS, device)
    check_tensor("state_table", state_table, (None, None), INTEGERS, device)
    check_tensor("starts", starts, (state_table.shape[0] + 1,), INTEGERS, device)
    check_tensor("cos", cos, (None, None), FLOATS, device)
    check_angles(d, cos, sin)
    if format == "kv" and 2 * cos.shape[1] != BLOCK:
        raise ValueError(f"a 'kv' record holds {BLOCK} rotated dims, got cos and sin for {2 * cos.shape[1]}")
    if format == "kv" and hadamard:
        raise ValueError("hadamard is for the indexer's records, 'fp8' and 'mxfp4'; got it for 'kv'")
    check_tensor("state", state, (None, None, 2, width), (torch.float32,), device)
    if not state[0:1, 0:1].is_contiguous() or state.stride(1) != 2 * width:
        raise ValueError(f"a page of state must be contiguous, got strides {list(state.stride())}")
    rows, ring = (1 + overlap) * ratio, state.shape[1] * state_table.shape[1]
    expect(
        ring >= rows,
        lambda: f"the state must have room for the {rows} rows of a window, got {ring} rows a request",
    )
    refuse_grad([kv, gate, position_bias, norm_weight, cos, sin, state])


def _check_load(
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    head_dim: int = 512,
    page_size: int = 64,
    max_length: int | None = None,
) -> None:
    _check_cache(cache, page_size, "kv", head_dim, cache.device)
    check_tensor("block_table", block_table, (None, None), INTEGERS, cache.device)
    check_tensor("lengths", lengths, (block_table.shape[0],), INTEGERS, cache.device)
    if max_length is not None:
        room = block_table.shape[1] * page_size
        expect(
            max_length >= 0 and max_length <= room,
            lambda: f"max_length must be from 0 to {room}, which the block table's pages hold, got {max_length}",
        )


# Fakes


def _fake_insert(*_: Any, **__: Any) -> None:
    """State and cache are written in place."""


def _fake_load(
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    head_dim: int = 512,
    page_size: int = 64,
    max_length: int | None = None,
) -> Tensor:
    length = block_table.shape[1] * page_size if max_length is None else max_length
    return cache.new_empty([block_table.shape[0], length, head_dim], dtype=torch.bfloat16)


# Operators

_ARGUMENTS = (
    "Tensor kv, Tensor gate, Tensor position_bias, Tensor norm_weight, Tensor positions, Tensor requests, "
    "Tensor starts, Tensor cos, Tensor sin, Tensor(a!) state, Tensor state_table, Tensor(b!) cache, Tensor slots, *, "
    "float norm_eps=1e-6, "
    'str format="kv", bool hadamard=False, int page_size=64, str? implementation=None'
)


def _kernels(function: str) -> list[Implementation]:
    return [Implementation("triton", f"dsv4_fusion.ops.triton.compressor_cache:{function}")]


def _cutedsl_limits(
    overlap: bool, kv: Tensor, gate: Tensor, position_bias: Tensor, norm_weight: Tensor, positions: Tensor,
    requests: Tensor, starts: Tensor, cos: Tensor, sin: Tensor, state: Tensor, state_table: Tensor, cache: Tensor,
    slots: Tensor, *, format: str = "kv", **_: Any,
) -> str | None:  # fmt: skip
    """A thread has four columns of up to 8 rows, or a block 64 columns of up to 128; copies take 16 bytes."""
    rows, d = (1 + overlap) * position_bias.shape[0], norm_weight.shape[0]
    if d not in ((128, 256, 512) if format == "kv" else (128,)):
        return f"the cutedsl kernels write {format} entries of other sizes, got {d} dims"
    if rows not in ((4, 8, 32, 64, 128) if format == "kv" else (4, 8)):
        return f"the cutedsl kernels pool windows of other lengths into {format} entries, got {rows} rows"
    if cos.shape[1] % 8:
        return f"the cutedsl kernels rotate multiples of 16 dims, got {2 * cos.shape[1]}"
    aligned = (kv, gate, position_bias, norm_weight, cos, sin, state)
    if any(tensor.data_ptr() % 16 or tensor.stride(0) * tensor.element_size() % 16 for tensor in aligned[:3]):
        return "the cutedsl kernels copy 16 bytes at a time: kv, gate or position_bias is not aligned to that"
    if any(tensor.data_ptr() % 16 for tensor in aligned[3:]) or state.stride(0) % 4:
        return "the cutedsl kernels copy 16 bytes at a time: an argument is not aligned to that"
    if any(tensor.stride(0) * tensor.element_size() % 16 for tensor in (cos, sin)):
        return "the cutedsl kernels copy 16 bytes at a time: rows of cos or sin are not aligned to that"
    return None


def _insert_kernels(function: str, overlap: bool) -> list[Implementation]:
    limits = functools.partial(_cutedsl_limits, overlap)
    entry = f"dsv4_fusion.ops.cutedsl.compressor_cache:{function}"
    return [Implementation("cutedsl", entry, limits, capability=(9, 0)), *_kernels(function)]


_compress_csa_insert = define(
    f"compress_csa_insert({_ARGUMENTS}) -> ()",
    reference=compress_csa_insert_ref,
    fake=_fake_insert,
    check=functools.partial(_check_insert, True),
    implementations=_insert_kernels("compress_csa_insert", True),
)
_compress_hca_insert = define(
    f"compress_hca_insert({_ARGUMENTS}) -> ()",
    reference=compress_hca_insert_ref,
    fake=_fake_insert,
    check=functools.partial(_check_insert, False),
    implementations=_insert_kernels("compress_hca_insert", False),
)
_kv_load = define(
    "kv_load(Tensor cache, Tensor block_table, Tensor lengths, *, int head_dim=512, int page_size=64, "
    "int? max_length=None, str? implementation=None) -> Tensor",
    reference=kv_load_ref,
    fake=_fake_load,
    check=_check_load,
    implementations=_kernels("kv_load"),
)


def compress_csa_insert(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    requests: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    state_table: Tensor,
    cache: Tensor,
    slots: Tensor,
    *,
    norm_eps: float = 1e-6,
    format: str = "kv",
    hadamard: bool = False,
    page_size: int = 64,
    implementation: str | None = None,
) -> None:
    """Take new tokens of every request: keep them in its state, and write an entry for each window that closes.

    A window closes with the token at position p if ``(p + 1) % r == 0``. What a request's tokens become does not depend
    on the calls in which they come: all at once, in pieces or one by one, the same bytes are written.

    Args:
        kv, gate: [T, 2d] bf16 or fp32, as in :func:`~dsv4_fusion.ops.compress_csa`. The tokens of a request stand
            together, in the order of their positions, without gaps.
        position_bias, norm_weight: as there.
        positions: [T] int32 or int64: of each token in its request, below 2^31. Those of padding may be anything.
        requests: [T] int32 or int64: each token's row of ``state_table``; -1 is padding, and nothing is done for it.
        starts: [requests + 1] int32 or int64: the first token of each request, and the end of the last one's.
        cos, sin: [P, R / 2] fp32 or bf16: a row a position. A window takes that of its first token.
        state: fp32 [pages, N, 2, 2d], changed in place; a page is contiguous.
        state_table: [requests, M] int32 or int64: the pages of each request; N · M is at least 2r. A token that is
            taken back (speculative decoding) may be given again at its position, as long as no more than N · M - 2r
            tokens after it were taken.
        cache: uint8 [pages, page_bytes], changed in place; see :func:`~dsv4_fusion.ops.kv_cache_bytes` and
            :func:`~dsv4_fusion.ops.indexer_cache_bytes`. Pages begin at multiples of 8 bytes ("kv") or 4.
        slots: [T] int32 or int64: page · page_size + row for the entry of a window that closes with this token; -1
            skips the entry, not the state. Those of other tokens may be anything. Slots must differ.
        norm_eps: added to the mean square.
        format: "kv", "fp8" or "mxfp4"; the latter are the indexer's, with d 64 or 128.
        hadamard: transform the entry before it is quantised ("fp8" and "mxfp4").
        page_size: entries a page, a power of two.
        implementation: "cutedsl", "triton", "reference", or None for the best one usable.

    A slot, page, request or position outside its range is an error; a GPU cannot raise it, and skips what it concerns.

    Raises:
        ValueError: wrong shape, dtype, device, stride or option; an input that requires grad; an implementation asked
            for by name that cannot run here.
    """
    _compress_csa_insert(
        kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache, slots,
        norm_eps=norm_eps, format=format, hadamard=hadamard, page_size=page_size, implementation=implementation,
    )  # fmt: skip


def compress_hca_insert(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    requests: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    state_table: Tensor,
    cache: Tensor,
    slots: Tensor,
    *,
    norm_eps: float = 1e-6,
    format: str = "kv",
    hadamard: bool = False,
    page_size: int = 64,
    implementation: str | None = None,
) -> None:
    """:func:`compress_csa_insert` for windows that do not overlap.

    Args:
        kv, gate: [T, d] bf16 or fp32.
        state: fp32 [pages, N, 2, d]; N · M is at least r.
        position_bias, norm_weight, positions, requests, starts, cos, sin, state_table, cache, slots, norm_eps,
            format, hadamard, page_size, implementation: as there.

    Raises:
        ValueError: as there.
    """
    _compress_hca_insert(
        kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache, slots,
        norm_eps=norm_eps, format=format, hadamard=hadamard, page_size=page_size, implementation=implementation,
    )  # fmt: skip


def kv_load(
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    head_dim: int = 512,
    page_size: int = 64,
    max_length: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Entries read back from "kv" pages: value times scale, rounded to bf16, and the rotated dims as they are.

    Args:
        cache: uint8 [pages, page_bytes], as :func:`compress_csa_insert` filled it.
        block_table: [B, N] int32 or int64: the pages of each sequence. What is beyond its length may be anything. A
            page outside the cache is an error; a GPU cannot raise it, and gives zeros.
        lengths: [B] int32 or int64, entries of each sequence, at most ``max_length``.
        head_dim: 128, 256 or 512.
        page_size: entries a page, a power of two.
        max_length: entries a sequence of the result; None for all that N pages hold, so that no length is waited for.
        implementation: "triton", "reference", or None for the best one usable.

    Returns:
        [B, max_length, head_dim] bf16, contiguous; zeros beyond each length. A scale that is NaN gives NaN.

    Raises:
        ValueError: wrong shape, dtype, device, stride or option; an implementation asked for by name that cannot run.
    """
    return _kv_load(
        cache, block_table, lengths, head_dim=head_dim, page_size=page_size, max_length=max_length,
        implementation=implementation,
    )  # fmt: skip
