"""The first launch of mHC's Triton kernels, and ``hc_post``: new streams, and partial projections of them.

``project`` reads the streams once (mixing the sublayer's output in first, for the post forms) and leaves, for every
slice of D, partial projections and a partial sum of squares in a workspace.

Precision: the tensor cores multiply bf16 exactly, so every fp32 operand is split in three bf16 parts that hold all of
its 24 bits (fp16 in two), and products below 2^-24 of the result are left out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

# The interpreter multiplies bf16 as integers and truncates when it rounds to bf16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 to the streams' dtype, to nearest even; two at a time, because single conversions to bf16 are slow."""
    if dtype != tl.bfloat16:
        return x.to(dtype)
    elif _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def widen(x):
    """To fp32; two bf16 in two instructions, where the compiler takes three."""
    if x.dtype != tl.bfloat16 or _INTERPRETED:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )


@triton.jit
def _parts(x, COUNT: tl.constexpr):
    """The bf16 parts of x, largest first: eight bits of its significand each, so three hold all of an fp32."""
    if COUNT == 1:
        return (x,)
    parts = ()
    rest = x.to(tl.float32)
    for _ in tl.static_range(COUNT):
        bits = rest.to(tl.uint32, bitcast=True)
        parts += ((bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True),)
        rest -= (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return parts


@triton.jit
def _pin(x, PACK: tl.constexpr):
    """x, opaque to the compiler. PACK values fill 32 bits."""
    if _INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)


@triton.jit
def _dot(a, w, ROWS: tl.constexpr):
    """a · wᵀ, as exact as fp32. If a has fewer than ROWS rows they are repeated: one shape of dot for every T."""
    A: tl.constexpr = 1 if a.dtype == tl.bfloat16 else (2 if a.dtype == tl.float16 else 3)
    W: tl.constexpr = 1 if w.dtype == tl.bfloat16 else (2 if w.dtype == tl.float16 else 3)
    a_parts = _parts(a, A)
    w_parts = _parts(w, W)
    total = tl.zeros([ROWS, w.shape[0]], tl.float32)
    for i in tl.static_range(A):
        part = _pin(a_parts[i], 2)  # else it is computed again, in the layout of the dot's operand
        if part.shape[0] < ROWS:
            part = tl.broadcast_to(part[None], [ROWS // part.shape[0], part.shape[0], part.shape[1]])
            part = tl.reshape(part, [ROWS, part.shape[2]])
        for j in tl.static_range(W):
            if i + j < 3:
                if _INTERPRETED:
                    product = tl.dot(part.to(tl.float32), tl.trans(w_parts[j].to(tl.float32)))
                else:
                    product = tl.dot(part, tl.trans(w_parts[j]))
                total += _pin(product, 1)  # else the dots become a chain, which only one warpgroup computes
    return total


@triton.jit
def load_streams(ptrs, mask, D: tl.constexpr, HC: tl.constexpr):
    streams = ()
    for k in tl.static_range(HC):
        streams += (tl.load(ptrs + k * D, mask=mask, other=0.0, eviction_policy="evict_first"),)
    return streams


@triton.jit
def _side_by_side(tiles, COUNT: tl.constexpr):
    """[rows, columns] each to [rows, COUNT · columns]."""
    rows: tl.constexpr = tiles[0].shape[0]
    columns: tl.constexpr = tiles[0].shape[1]
    for level in tl.static_range(3):  # 2, 4 or 8 tiles: pairs of the two halves
        if COUNT >> (level + 1) > 0:
            pairs = ()
            for i in tl.static_range(COUNT >> (level + 1)):
                pairs += (tl.join(tiles[i], tiles[i + (COUNT >> (level + 1))]),)
            tiles = pairs
    tile = tl.reshape(tiles[0], [rows, columns, COUNT])
    return tl.reshape(tl.permute(tile, [0, 2, 1]), [rows, COUNT * columns])


@triton.jit
def load_coefficients(post_ptrs, comb_ptrs, mask, HC: tl.constexpr):
    """post, then comb row by row: (1 + HC) · HC values a token."""
    values = ()
    for k in tl.static_range(HC):
        values += (tl.load(post_ptrs + k, mask=mask).to(tl.float32),)
    for cell in tl.static_range(HC * HC):
        values += (tl.load(comb_ptrs + cell, mask=mask).to(tl.float32),)
    return values


@triton.jit
def widen_all(tiles, COUNT: tl.constexpr):
    wide = ()
    for i in tl.static_range(COUNT):
        wide += (widen(tiles[i]),)
    return wide


@triton.jit
def mix(y, streams, coefficients, dtype: tl.constexpr, k: tl.constexpr, HC: tl.constexpr):
    """New stream k, rounded: post[k] · y + Σ_j comb[j, k] · streams[j]."""
    new = y * coefficients[k]
    for j in tl.static_range(HC):
        new = tl.fma(streams[j], coefficients[HC + j * HC + k], new)
    return round_to(new, dtype)


@triton.jit(do_not_specialize=["T"])
def place(y_ptr, x_ptr, post_ptr, comb_ptr, out_ptr, T, D: tl.constexpr, HC: tl.constexpr, BLOCK_D: tl.constexpr):
    """hc_post: BLOCK_D columns of one token's streams."""
    pid = tl.program_id(0)
    d = pid % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = (pid // tl.cdiv(D, BLOCK_D)).to(tl.int64)
    mask = d < D
    coefficients = load_coefficients(post_ptr + t * HC, comb_ptr + t * (HC * HC), None, HC)
    streams = load_streams(x_ptr + t * (HC * D) + d, mask, D, HC)
    y = tl.load(y_ptr + t * D + d, mask=mask, other=0.0, eviction_policy="evict_first")
    streams = widen_all(streams, HC)
    y = widen(y)
    for k in tl.static_range(HC):
        new = mix(y, streams, coefficients, x_ptr.dtype.element_ty, k, HC)
        tl.store(out_ptr + t * (HC * D) + k * D + d, new, mask=mask)


@triton.jit(do_not_specialize=["T"])
def project(
    y_ptr,
    x_ptr,
    post_ptr,
    comb_ptr,
    new_ptr,
    fn_ptr,
    work_ptr,
    T,
    D: tl.constexpr,
    HC: tl.constexpr,
    MIX: tl.constexpr,
    N: tl.constexpr,
    POST: tl.constexpr,
    STORE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """work[part, token] = partial projection (MIX columns), partial sum of squares, three zeros."""
    if PDL:
        gdc_launch_dependents()
    SPLITS: tl.constexpr = (D + BLOCK_D * STEPS - 1) // (BLOCK_D * STEPS)
    pid = tl.program_id(0)
    split = pid % SPLITS
    first = (pid // SPLITS) * TOKENS
    rows = first + tl.arange(0, TOKENS)
    t = rows.to(tl.int64)[:, None]
    row_mask = (rows < T)[:, None]
    n = tl.arange(0, N)[:, None, None]
    k = tl.arange(0, HC)[None, :, None]
    total = tl.zeros([ROWS, N], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    if POST:
        coefficients = load_coefficients(post_ptr + t * HC, comb_ptr + t * (HC * HC), row_mask, HC)
    for step in range(STEPS):
        first_d = (split * STEPS + step) * BLOCK_D
        d = first_d + tl.arange(0, BLOCK_D)[None, :]
        mask = row_mask
        fn_mask = n < MIX
        if D % (BLOCK_D * STEPS) != 0:
            mask = mask & (d < D)
            fn_mask = fn_mask & (d < D)[None]
        streams = load_streams(x_ptr + t * (HC * D) + d, mask, D, HC)
        if POST:
            y = tl.load(y_ptr + t * D + d, mask=mask, other=0.0, eviction_policy="evict_first")
        square = tl.zeros([TOKENS, BLOCK_D], tl.float32)
        if POST:
            old = widen_all(streams, HC)
            y = widen(y)
            streams = ()
            for i in tl.static_range(HC):
                streams += (mix(y, old, coefficients, x_ptr.dtype.element_ty, i, HC),)
        for i in tl.static_range(HC):
            wide = widen(streams[i])
            square = tl.fma(wide, wide, square)
        w = tl.load(fn_ptr + n * (HC * D) + k * D + d[None], mask=fn_mask, other=0.0, eviction_policy="evict_last")
        total += _dot(_side_by_side(streams, HC), tl.reshape(w, [N, HC * BLOCK_D]), ROWS)
        squares += tl.sum(square, 1)
        if STORE:  # after the dots: their fence waits for every store before it
            for i in tl.static_range(HC):
                tl.store(new_ptr + t * (HC * D) + i * D + d, streams[i], mask=mask)
    row = tl.arange(0, ROWS)
    part = work_ptr + split.to(tl.int64) * T * N
    kept = (row < TOKENS) & (first + row < T)
    columns = tl.arange(0, N)[None, :]
    tl.store(part + (first + row).to(tl.int64)[:, None] * N + columns, total, mask=kept[:, None] & (columns < MIX))
    rest = tl.arange(0, 4)[None, :]  # four columns, so that finish reads 16 bytes at a time
    tl.store(part + t * N + MIX + rest, tl.where(rest == 0, squares[:, None], 0.0), mask=row_mask)
