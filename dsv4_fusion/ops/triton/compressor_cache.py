"""The paged compressor in Triton: one launch of three kinds of programs, none of which waits for another.

A request's program pools the windows that reach back to earlier calls, one or two, and only then writes the rows of the
ring that these have read. A block's program, for as many tokens as a window has, pools the one window that closes there
with all its rows in this call. The other rows of the state are written by programs for a few tokens each. Where a
window has many rows its dims are spread over several programs, as in ``compressor.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .compressor import shape, warps
from .compressor_row import finish, load_angles, pool, store_entry, wide
from .counters import zeroed
from .indexer import has_e4m3
from .indexer_cache import _from_e4m3
from .indexer_row import _power, rounded


@triton.jit
def _save(
    kv_ptr, gate_ptr, bias_ptr, state_ptr, table_ptr, kv_stride, gate_stride, bias_stride, state_stride, table_stride,
    token, position, request, mask, begin, pages, ring,
    D: tl.constexpr, RATIO: tl.constexpr, SERIES: tl.constexpr, N: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Tokens [n] into the state: COLS columns of each series."""
    page_ptr = table_ptr + request.to(tl.int64) * table_stride + (position // N) % (ring // N)
    page = tl.load(page_ptr, mask=mask, other=-1).to(tl.int64)
    there = mask & (page >= 0) & (page < pages)
    page, there = tl.where(there, page, 0), there[:, None]
    row_ptr = (state_ptr + page * state_stride + (position % N) * (2 * SERIES * D))[:, None]
    for series in tl.static_range(SERIES):
        column = series * D + begin + tl.arange(0, COLS)[None, :]
        kv = wide(tl.load(kv_ptr + token.to(tl.int64)[:, None] * kv_stride + column, mask=there, other=0.0))
        gate = wide(tl.load(gate_ptr + token.to(tl.int64)[:, None] * gate_stride + column, mask=there, other=0.0))
        bias = tl.load(bias_ptr + (position % RATIO)[:, None] * bias_stride + column, mask=there, other=0.0)
        tl.store(row_ptr + column, kv, mask=there)
        tl.store(row_ptr + SERIES * D + column, gate + wide(bias), mask=there)


@triton.jit
def _rows_before(start, after, position, LENGTH: tl.constexpr, RATIO: tl.constexpr):
    """How many rows of the state are read for a request whose tokens [start, after) begin at ``position``."""
    closes = start + (RATIO - 1) - position % RATIO < after
    return tl.where(closes, tl.minimum(position, (LENGTH - RATIO) + position % RATIO), 0)


@triton.jit
def _save_tokens(
    kv_ptr, gate_ptr, bias_ptr, positions_ptr, requests_ptr, starts_ptr, state_ptr, table_ptr,
    kv_stride, gate_stride, bias_stride, state_stride, table_stride, token, T, requests, pages, ring,
    D: tl.constexpr, RATIO: tl.constexpr, SERIES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Tokens [n] into the state, but for those that the programs of their requests write."""
    request = tl.load(requests_ptr + token, mask=token < T, other=-1).to(tl.int64)
    position = tl.load(positions_ptr + token, mask=token < T, other=0).to(tl.int32)
    mine = (request >= 0) & (request < requests)
    start = tl.load(starts_ptr + request, mask=mine, other=0).to(tl.int32)
    after = tl.minimum(tl.load(starts_ptr + request + 1, mask=mine, other=0).to(tl.int32), T)
    before = _rows_before(start, after, position - (token - start), SERIES * RATIO, RATIO)
    left = (token - start) % ring >= ring - before
    _save(
        kv_ptr, gate_ptr, bias_ptr, state_ptr, table_ptr, kv_stride, gate_stride, bias_stride, state_stride,
        table_stride, token, position, request, mine & (token + ring >= after) & ~left, 0, pages, ring,
        D, RATIO, SERIES, N, D,
    )  # fmt: skip


@triton.jit
def _new_rows(
    inside, kv_ptr, gate_ptr, bias_ptr, kv_stride, gate_stride, bias_stride, closing, begin, step,
    D: tl.constexpr, RATIO: tl.constexpr, LENGTH: tl.constexpr, G: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Values and gates of the rows ``inside`` a window's tile number ``step``, from this call; 0 and -inf of others."""
    SERIES: tl.constexpr = LENGTH // RATIO
    line, inside = tl.arange(0, G), inside[:, None]
    column = begin + tl.arange(0, COLS)[None, :]
    if RATIO % G == 0:  # a tile's rows are of one series
        shifted = column + (0 if step * G < LENGTH - RATIO else (SERIES - 1) * D)
        bias_row = (step * G) % RATIO + line
    else:
        shifted = tl.where(step * G + line < LENGTH - RATIO, 0, (SERIES - 1) * D)[:, None] + column
        bias_row = (step * G + line) % RATIO
    ours = (closing - (LENGTH - 1) + step * G).to(tl.int64)
    gate_ptr = (gate_ptr + ours * gate_stride + line * gate_stride)[:, None] + shifted
    gate = wide(tl.load(gate_ptr, mask=inside, other=float("-inf")))
    gate += wide(tl.load(bias_ptr + (bias_row * bias_stride)[:, None] + shifted, mask=inside, other=0.0))
    kv_ptr = (kv_ptr + ours * kv_stride + line * kv_stride)[:, None] + shifted
    return wide(tl.load(kv_ptr, mask=inside, other=0.0)), gate


@triton.jit
def _pooled(
    kv_ptr, gate_ptr, bias_ptr, state_ptr, table_ptr, kv_stride, gate_stride, bias_stride, state_stride, table_stride,
    closing, at, start, request, begin, pages, ring,
    ALONE: tl.constexpr,
    D: tl.constexpr, RATIO: tl.constexpr, LENGTH: tl.constexpr, N: tl.constexpr,
    STEPS: tl.constexpr, G: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The window that closes with a token at position ``at``, of tokens from ``start`` on and else of the state.

    ALONE: the closing token is the only one that is not in the state.
    """
    SERIES: tl.constexpr = LENGTH // RATIO
    EVEN: tl.constexpr = RATIO % G == 0 and N % G == 0  # a tile's rows are of one series, and stand in one page
    count = ring // N  # pages of a ring; a window's rows go round it once at most
    first = tl.maximum(at - (LENGTH - 1), 0) // N
    turn = first % count
    line = tl.arange(0, G)
    column = begin + tl.arange(0, COLS)[None, :]
    new_values = ()
    new_gates = ()
    if not ALONE:
        for step in tl.static_range(STEPS):
            row = step * G + line
            kv, gate = _new_rows(
                (row < LENGTH) & (closing - (LENGTH - 1) + row >= start), kv_ptr, gate_ptr, bias_ptr,
                kv_stride, gate_stride, bias_stride, closing, begin, step, D, RATIO, LENGTH, G, COLS,
            )  # fmt: skip
            new_values = new_values + (kv,)  # noqa: RUF005
            new_gates = new_gates + (gate,)  # noqa: RUF005
    values = ()
    gates = ()
    for step in tl.static_range(STEPS):
        row = step * G + line
        at_row, there = at - (LENGTH - 1) + row, row < LENGTH
        if EVEN:  # the same for all rows of the tile, but for the place in the page
            at_row, there = at - (LENGTH - 1) + step * G, step * G < LENGTH
        old = (at_row >= 0) & there
        index = turn + ((tl.maximum(at_row, 0).to(tl.uint32) // N).to(tl.int32) - first)
        index -= tl.where(index >= count, count, 0)
        page = tl.load(table_ptr + request.to(tl.int64) * table_stride + index, mask=old, other=-1).to(tl.int64)
        old &= (page >= 0) & (page < pages)
        old_ptr = state_ptr + page * state_stride + (at_row.to(tl.uint32) % N).to(tl.int32) * (2 * SERIES * D)
        if EVEN:
            shifted = column + (0 if step * G < LENGTH - RATIO else (SERIES - 1) * D)
            old_ptr = old_ptr + line * (2 * SERIES * D)
        else:
            shifted = tl.where(row < LENGTH - RATIO, 0, (SERIES - 1) * D)[:, None] + column
        last = row == LENGTH - 1
        if ALONE:
            old = old & (row < LENGTH - 1)
        else:
            old = old & (row < LENGTH) & (closing - (LENGTH - 1) + row < start)
        old, old_ptr = old[:, None], old_ptr[:, None] + shifted
        if not ALONE:  # what is not loaded stays in its register
            gate = tl.load(old_ptr + SERIES * D, mask=old, other=new_gates[step])
            kv = tl.load(old_ptr, mask=old, other=new_values[step])
        elif step == (LENGTH - 1) // G:
            kv, gate = _new_rows(
                last, kv_ptr, gate_ptr, bias_ptr,
                kv_stride, gate_stride, bias_stride, closing, begin, step, D, RATIO, LENGTH, G, COLS,
            )  # fmt: skip
            if G > 1:
                gate = tl.where(last[:, None], gate, tl.load(old_ptr + SERIES * D, mask=old, other=float("-inf")))
                kv = tl.where(last[:, None], kv, tl.load(old_ptr, mask=old, other=0.0))
        else:
            gate = tl.load(old_ptr + SERIES * D, mask=old, other=float("-inf"))
            kv = tl.load(old_ptr, mask=old, other=0.0)
        values = values + (kv,)  # noqa: RUF005
        gates = gates + (gate,)  # noqa: RUF005
    return pool(values, gates, STEPS, G, 1, COLS)


@triton.jit(do_not_specialize=["T", "requests", "blocks", "pages", "ring", "angles", "end"])
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
    blocks,
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
    SAVED: tl.constexpr,
):
    """``requests``, ``blocks``, ``pages``, ``ring``, ``angles`` and ``end`` are the numbers of requests, of blocks of
    RATIO tokens, of the state's pages and rows a request, of rows of cos, and of slots; SAVED is the tokens of a
    program that only writes the state."""
    SPLITS: tl.constexpr = D // COLS
    SERIES: tl.constexpr = 1 + OVERLAP
    LENGTH: tl.constexpr = SERIES * RATIO
    index = tl.program_id(0) // SPLITS
    begin = (tl.program_id(0) % SPLITS) * COLS
    if index < requests + blocks:
        # The first token, and the first that closes a window; loads that need not wait for each other come together
        head = index < requests
        if head:
            request = index
            start = tl.load(starts_ptr + index).to(tl.int32)
            after = tl.minimum(tl.load(starts_ptr + index + 1).to(tl.int32), T)
            guess = tl.load(positions_ptr + index, mask=index < T, other=0)  # right where each request has one token
            some = (start >= 0) & (start < after)
            told = tl.load(positions_ptr + start, mask=some & (start != index), other=0)
            position = tl.where(start == index, guess, told).to(tl.int32)  # those of tokens that are used fit
            closing = start + (RATIO - 1) - position % RATIO
            owner = tl.load(requests_ptr + start, mask=some, other=-1).to(tl.int64)
            mine = some & (owner == request)
            tries = tl.where(mine, SERIES, 0)
        else:
            # Of a window that closes here and is whole, the block's first token is one
            token = (index - requests) * RATIO
            owner = tl.load(requests_ptr + token).to(tl.int64)
            request = owner.to(tl.int32)
            position = tl.load(positions_ptr + token).to(tl.int32)
            closing = token + (RATIO - 1) - position % RATIO
            start = closing - (LENGTH - 1)
            after = tl.minimum(closing + 1, T)
            position += start - token
            mine = (owner >= 0) & (owner < requests) & (position >= 0)
            mine = mine & (start >= 0) & (closing >= token) & (closing < after)
            ends = tl.load(requests_ptr + closing, mask=mine, other=-1).to(tl.int64)
            begins = tl.load(requests_ptr + start, mask=mine, other=-1).to(tl.int64)
            tries = tl.where(mine & (ends == owner) & (begins == owner), 1, 0)
        for attempt in range(tries):
            slot = tl.load(slots_ptr + closing, mask=closing < after, other=-1).to(tl.int64)
            at = position + (closing - start)
            angle = at // RATIO * RATIO
            reaches = ~head | (closing - (LENGTH - 1) < start)  # else a block's program pools it
            if (closing < after) & reaches & (slot >= 0) & (slot < end) & (angle < angles):
                one = tl.zeros([1], tl.int64)
                here = one == 0
                if SPLITS == 1:  # long before they are needed
                    cos = load_angles(cos_ptr, one + angle.to(tl.int64) * cos_stride, here, D, R)
                    sin = load_angles(sin_ptr, one + angle.to(tl.int64) * sin_stride, here, D, R)
                    weight = wide(tl.load(weight_ptr + tl.arange(0, D)))
                if closing == start:
                    pooled = _pooled(
                        kv_ptr, gate_ptr, bias_ptr, state_ptr, table_ptr,
                        kv_stride, gate_stride, bias_stride, state_stride, table_stride,
                        closing, at, start, request, begin, pages, ring,
                        True, D, RATIO, LENGTH, N, STEPS, G, COLS,
                    )  # fmt: skip
                else:
                    pooled = _pooled(
                        kv_ptr, gate_ptr, bias_ptr, state_ptr, table_ptr,
                        kv_stride, gate_stride, bias_stride, state_stride, table_stride,
                        closing, at, start, request, begin, pages, ring,
                        False, D, RATIO, LENGTH, N, STEPS, G, COLS,
                    )  # fmt: skip
                last = True
                if SPLITS > 1:
                    entry_index = index + attempt * (requests + blocks)
                    entry_ptr = pooled_ptr + entry_index.to(tl.int64) * D
                    tl.store(entry_ptr + begin + tl.arange(0, COLS)[None, :], pooled)
                    tl.debug_barrier()
                    last = tl.atomic_add(counter_ptr + entry_index, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
                if last:
                    if SPLITS > 1:
                        tl.store(counter_ptr + entry_index, 0)  # as the next call finds it
                        entry = tl.load(entry_ptr + tl.arange(0, D)[None, :], cache_modifier=".cg")
                        cos = load_angles(cos_ptr, one + angle.to(tl.int64) * cos_stride, here, D, R)
                        sin = load_angles(sin_ptr, one + angle.to(tl.int64) * sin_stride, here, D, R)
                        slot = tl.load(slots_ptr + closing).to(tl.int64)  # again: so it takes no register until here
                        weight = wide(tl.load(weight_ptr + tl.arange(0, D)))
                    else:
                        entry = pooled
                    entry = finish(entry, weight, cos, sin, eps, 1, D, R)
                    store_entry(entry, cache_ptr, one + slot, here, page_stride, 1, D, PAGE, FORMAT, HADAMARD, HARDWARE)
            closing += RATIO
        if head & mine:
            before = _rows_before(start, after, position, LENGTH, RATIO)
            least = ring - before  # the tokens from here on have the rows that were read
            if (before > 0) & (start + least < after):
                tl.debug_barrier()
                ROWS: tl.constexpr = 4 if G < 4 else G
                for tile in range(0, before, ROWS):
                    step = least + tile + tl.arange(0, ROWS)
                    ours = (step < ring) & (start + step < after)
                    step += tl.maximum(after - 1 - start - step, 0) // ring * ring  # the last token with this row
                    _save(
                        kv_ptr, gate_ptr, bias_ptr, state_ptr, table_ptr,
                        kv_stride, gate_stride, bias_stride, state_stride, table_stride,
                        start + step, position + step, request, ours, begin, pages, ring,
                        D, RATIO, SERIES, N, COLS,
                    )  # fmt: skip
    else:
        first = (tl.program_id(0) - (requests + blocks) * SPLITS) * SAVED
        _save_tokens(
            kv_ptr, gate_ptr, bias_ptr, positions_ptr, requests_ptr, starts_ptr, state_ptr, table_ptr,
            kv_stride, gate_stride, bias_stride, state_stride, table_stride,
            first + tl.arange(0, SAVED), T, requests, pages, ring, D, RATIO, SERIES, N,
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
    kv, gate, position_bias, norm_weight, positions, requests_of, starts, cos, sin, state, state_table, cache, slots,
    norm_eps, format, hadamard, page_size, overlap,
):  # fmt: skip
    tokens, (ratio, d) = kv.shape[0], (position_bias.shape[0], norm_weight.shape[0])
    if tokens == 0:
        return
    steps, g, columns = shape((1 + overlap) * ratio, d)
    splits, requests, blocks = d // columns, state_table.shape[0], triton.cdiv(tokens, ratio)
    counter = pooled = None
    if splits > 1:
        entries = (1 + overlap) * (requests + blocks)
        counter, pooled = zeroed(entries, kv.device), kv.new_empty([entries * d], dtype=torch.float32)
    num_warps = warps(g * columns, 4)
    # Four or three programs a multiprocessor; fp32 rows need more registers
    registers = {4: 128, 8: 80}.get(num_warps) if kv.dtype == torch.bfloat16 else None
    saved = max(1, 8 * 32 * num_warps // d)
    insert[((requests + blocks) * splits + triton.cdiv(tokens, saved),)](
        kv, gate, position_bias, norm_weight, positions, requests_of, starts, cos, sin, state, state_table, cache,
        slots, counter, pooled, kv.stride(0), gate.stride(0), position_bias.stride(0), cos.stride(0), sin.stride(0),
        state.stride(0), state_table.stride(0), cache.stride(0), tokens, requests, blocks, state.shape[0],
        state.shape[1] * state_table.shape[1], cos.shape[0], cache.shape[0] * page_size, norm_eps,
        d, 2 * cos.shape[1], ratio, overlap,
        state.shape[1], page_size, format, hadamard, format != "mxfp4" and has_e4m3(kv.device),
        steps, g, columns, saved, num_warps=num_warps, maxnreg=registers, enable_fp_fusion=False,
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
