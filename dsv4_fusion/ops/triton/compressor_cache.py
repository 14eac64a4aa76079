"""The paged compressor in Triton: one launch, a program for a token, or for a part of its dims.

A token's program writes its row of the state, and its entry if the window it closes came in this call. What concerns
the rows of earlier calls is left to the program of a request's first token: it pools the windows that reach back, one
or two, and only then overwrites the rows of the ring that these have read. So nothing waits for another program, but
for the parts of one entry, as in ``compressor.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .compressor import shape, warps
from .compressor_row import finish, load_angles, pool, store_entry, wide
from .indexer import has_e4m3
from .indexer_cache import _from_e4m3
from .indexer_row import _power, rounded


@triton.jit
def _page(table_ptr, table_stride, request, position, mask, pages, ring, N: tl.constexpr):
    """The state's page for a request's positions, and whether there is one."""
    page = tl.load(table_ptr + request * table_stride + (position // N) % (ring // N), mask=mask, other=-1).to(tl.int64)
    there = mask & (page >= 0) & (page < pages)
    return tl.where(there, page, 0), there


@triton.jit
def _save(
    kv_ptr, gate_ptr, bias_ptr, state_ptr, table_ptr, kv_stride, gate_stride, bias_stride, state_stride, table_stride,
    token, position, request, mask, begin, pages, ring,
    D: tl.constexpr, RATIO: tl.constexpr, SERIES: tl.constexpr, N: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Tokens [n] into the state: COLS columns of each series."""
    page, there = _page(table_ptr, table_stride, request, position, mask, pages, ring, N)
    there = there[:, None]
    row_ptr = (state_ptr + page * state_stride + (position % N) * (2 * SERIES * D))[:, None]
    for series in tl.static_range(SERIES):
        column = series * D + begin + tl.arange(0, COLS)[None, :]
        kv = wide(tl.load(kv_ptr + token.to(tl.int64)[:, None] * kv_stride + column, mask=there, other=0.0))
        gate = wide(tl.load(gate_ptr + token.to(tl.int64)[:, None] * gate_stride + column, mask=there, other=0.0))
        bias = tl.load(bias_ptr + (position % RATIO)[:, None] * bias_stride + column, mask=there, other=0.0)
        tl.store(row_ptr + column, kv, mask=there)
        tl.store(row_ptr + SERIES * D + column, gate + wide(bias), mask=there)


@triton.jit(do_not_specialize=["T", "requests", "pages", "ring", "angles", "end"])
def insert(
    kv_ptr,
    gate_ptr,
    bias_ptr,
    weight_ptr,
    positions_ptr,
    requests_ptr,
    starts_ptr,
    cos_ptr,
    sin_ptr,
    state_ptr,
    table_ptr,
    cache_ptr,
    slots_ptr,
    counter_ptr,
    pooled_ptr,
    kv_stride,
    gate_stride,
    bias_stride,
    cos_stride,
    sin_stride,
    state_stride,
    table_stride,
    page_stride,
    T,
    requests,
    pages,
    ring,
    angles,
    end,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    HADAMARD: tl.constexpr,
    HARDWARE: tl.constexpr,
    STEPS: tl.constexpr,
    G: tl.constexpr,
    COLS: tl.constexpr,
):
    """``requests``, ``pages``, ``ring``, ``angles`` and ``end`` are the numbers of requests, of the state's pages
    and rows a request, of rows of cos, and of slots."""
    SPLITS: tl.constexpr = D // COLS
    SERIES: tl.constexpr = 1 + OVERLAP
    LENGTH: tl.constexpr = SERIES * RATIO
    token = tl.program_id(0) // SPLITS
    begin = (tl.program_id(0) % SPLITS) * COLS
    request = tl.load(requests_ptr + token).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int32)  # those of tokens that are used fit
    if (request >= 0) & (request < requests):
        start = tl.load(starts_ptr + request).to(tl.int32)
        after = tl.minimum(tl.load(starts_ptr + request + 1).to(tl.int32), T)
        head = token == start
        whole = token - (LENGTH - 1) >= start
        closes = (position + 1) % RATIO == 0
        tries = tl.where(head, SERIES, tl.where(closes & whole, 1, 0))
        closing = token
        if head:
            closing = token + (RATIO - 1) - position % RATIO
        for _ in range(tries):
            same = closing < after
            reaches = closing - (LENGTH - 1) < token  # else it is left to the token that closes it
            slot = tl.load(slots_ptr + closing, mask=same, other=-1).to(tl.int64)
            at = position + (closing - token)
            angle = at // RATIO * RATIO
            if same & ((closing == token) | reaches) & (slot >= 0) & (slot < end) & (angle < angles):
                line = tl.arange(0, G)
                column = begin + tl.arange(0, COLS)[None, :]
                values = ()
                gates = ()
                for step in tl.static_range(STEPS):
                    row = step * G + line
                    back = row - (LENGTH - 1)
                    ours, then = closing + back, at + back
                    inside = (row < LENGTH) & (ours >= start)
                    old = (row < LENGTH) & (then >= 0) & ~inside
                    page, old = _page(table_ptr, table_stride, request, then, old, pages, ring, N)
                    inside, old = inside[:, None], old[:, None]
                    shifted = tl.where(row < LENGTH - RATIO, 0, (SERIES - 1) * D)[:, None] + column
                    gate = wide(
                        tl.load(gate_ptr + ours.to(tl.int64)[:, None] * gate_stride + shifted, mask=inside, other=0.0)
                    )
                    bias_ptrs = bias_ptr + (row % RATIO)[:, None] * bias_stride + shifted
                    gate += wide(tl.load(bias_ptrs, mask=inside, other=0.0))
                    kv = wide(
                        tl.load(kv_ptr + ours.to(tl.int64)[:, None] * kv_stride + shifted, mask=inside, other=0.0)
                    )
                    old_ptr = (state_ptr + page * state_stride + (then % N) * (2 * SERIES * D))[:, None] + shifted
                    gate = tl.where(inside, gate, tl.load(old_ptr + SERIES * D, mask=old, other=float("-inf")))
                    kv = tl.where(inside, kv, tl.load(old_ptr, mask=old, other=0.0))
                    values = values + (kv,)  # noqa: RUF005 (Triton unpacks no tuple)
                    gates = gates + (gate,)  # noqa: RUF005 (Triton unpacks no tuple)
                pooled = pool(values, gates, STEPS, G, 1, COLS)
                last = True
                if SPLITS > 1:
                    tl.store(pooled_ptr + closing.to(tl.int64) * D + begin + tl.arange(0, COLS)[None, :], pooled)
                    tl.debug_barrier()
                    last = tl.atomic_add(counter_ptr + closing, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
                if last:
                    if SPLITS > 1:
                        entry_ptr = pooled_ptr + closing.to(tl.int64) * D + tl.arange(0, D)[None, :]
                        entry = tl.load(entry_ptr, cache_modifier=".cg")
                    else:
                        entry = pooled
                    one = tl.zeros([1], tl.int64)
                    here = one == 0
                    cos = load_angles(cos_ptr, one + angle.to(tl.int64) * cos_stride, here, D, R)
                    sin = load_angles(sin_ptr, one + angle.to(tl.int64) * sin_stride, here, D, R)
                    entry = finish(entry, weight_ptr, cos, sin, eps, 1, D, R)
                    store_entry(entry, cache_ptr, one + slot, here, page_stride, 1, D, PAGE, FORMAT, HADAMARD, HARDWARE)
            closing += RATIO
        # Offset in the ring from the first token's row: the last LENGTH - 1 are of rows that the windows above read
        shared = (token - start) % ring >= ring - (LENGTH - 1)
        if (token + ring >= after) & ~shared:
            _save(
                kv_ptr, gate_ptr, bias_ptr, state_ptr, table_ptr,
                kv_stride, gate_stride, bias_stride, state_stride, table_stride,
                token + tl.zeros([1], tl.int32), position + tl.zeros([1], tl.int32), request,
                tl.full([1], 1, tl.int1), begin, pages, ring,
                D, RATIO, SERIES, N, COLS,
            )  # fmt: skip
        if head & (LENGTH > 1):
            least = ring - (LENGTH - 1)
            if token + least < after:
                tl.debug_barrier()  # the rows that are overwritten have been read
                for tile in range(STEPS):
                    row = tile * G + tl.arange(0, G)
                    step = least + row
                    step += tl.maximum(after - 1 - token - step, 0) // ring * ring  # the last token with this row
                    mine = (row < LENGTH - 1) & (token + step < after)
                    _save(
                        kv_ptr, gate_ptr, bias_ptr, state_ptr, table_ptr,
                        kv_stride, gate_stride, bias_stride, state_stride, table_stride,
                        token + step, position + step, request, mine, begin, pages, ring,
                        D, RATIO, SERIES, N, COLS,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride", "pages", "max_length"])
def load(
    cache_ptr,
    table_ptr,
    lengths_ptr,
    out_ptr,
    page_stride,
    table_stride,
    pages,
    max_length,
    D: tl.constexpr,
    ENTRIES: tl.constexpr,
    PAGE: tl.constexpr,
):
    """A program for ENTRIES entries of one sequence; zeros beyond its length and for pages outside the cache."""
    tiles = tl.cdiv(max_length, ENTRIES)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    entry = (tl.program_id(0) % tiles) * ENTRIES + tl.arange(0, ENTRIES)
    here = entry < max_length
    inside = here & (entry < tl.load(lengths_ptr + sequence))
    page = tl.load(table_ptr + sequence * table_stride + entry // PAGE, mask=inside, other=-1).to(tl.int64)
    inside = inside & (page >= 0) & (page < pages)
    page_ptr = cache_ptr + tl.where(inside, page, 0) * page_stride
    row, column, block = entry % PAGE, tl.arange(0, D)[None, :], tl.arange(0, D // 64)[None, :]
    ptr = page_ptr + row * (D + 64)
    code = tl.load(ptr[:, None] + column, mask=inside[:, None] & (column < D - 64), other=0)
    rotated_ptr = (ptr + (D - 64)).to(tl.pointer_type(tl.int16))
    rotated = tl.load(rotated_ptr[:, None] + (column - (D - 64)), mask=inside[:, None] & (column >= D - 64), other=0)
    scale_ptr = (page_ptr + PAGE * (D + 64) + row * 8)[:, None] + block
    exponent = tl.load(scale_ptr, mask=inside[:, None] & (block < D // 64 - 1), other=0).to(tl.int32)
    scale = tl.where(exponent == 255, float("nan"), _power(exponent))[:, :, None]
    value = tl.reshape(tl.reshape(_from_e4m3(code), [ENTRIES, D // 64, 64]) * scale, [ENTRIES, D])
    bits = (rounded(value).to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    out = (sequence * max_length + entry)[:, None] * D + column
    tl.store(out_ptr + out, tl.where(column < D - 64, bits, rotated), mask=here[:, None])


def _insert(
    kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache, slots,
    norm_eps, format, hadamard, page_size, overlap,
):  # fmt: skip
    tokens, (ratio, d) = kv.shape[0], (position_bias.shape[0], norm_weight.shape[0])
    if tokens == 0:
        return
    steps, g, columns = shape((1 + overlap) * ratio, d)
    splits = d // columns
    counter = pooled = None
    if splits > 1:
        workspace = kv.new_empty([tokens * (d + 1)], dtype=torch.int32)
        counter, pooled = workspace[tokens * d :].zero_(), workspace[: tokens * d].view(torch.float32)
    insert[(tokens * splits,)](
        kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache, slots,
        counter, pooled, kv.stride(0), gate.stride(0), position_bias.stride(0), cos.stride(0), sin.stride(0),
        state.stride(0), state_table.stride(0), cache.stride(0), tokens, state_table.shape[0], state.shape[0],
        state.shape[1] * state_table.shape[1], cos.shape[0], cache.shape[0] * page_size, norm_eps,
        d, 2 * cos.shape[1], ratio, overlap,
        state.shape[1], page_size, format, hadamard, format != "mxfp4" and has_e4m3(kv.device),
        steps, g, columns, num_warps=warps(g * columns, 4), enable_fp_fusion=False,
    )  # fmt: skip


def compress_csa_insert(
    kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache, slots,
    *, norm_eps=1e-6, format="kv", hadamard=False, page_size=64,
):  # fmt: skip
    _insert(
        kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache, slots,
        norm_eps, format, hadamard, page_size, True,
    )  # fmt: skip


def compress_hca_insert(
    kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache, slots,
    *, norm_eps=1e-6, format="kv", hadamard=False, page_size=64,
):  # fmt: skip
    _insert(
        kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache, slots,
        norm_eps, format, hadamard, page_size, False,
    )  # fmt: skip


def kv_load(cache, block_table, lengths, *, head_dim=512, page_size=64, max_length=None):
    sequences = block_table.shape[0]
    length = block_table.shape[1] * page_size if max_length is None else max_length
    out = cache.new_empty([sequences, length, head_dim], dtype=torch.bfloat16)
    if out.numel() == 0:
        return out
    entries = 4
    load[(sequences * triton.cdiv(length, entries),)](
        cache, block_table, lengths, out.view(torch.int16), cache.stride(0), block_table.stride(0),
        cache.shape[0], length, head_dim, entries, page_size, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
