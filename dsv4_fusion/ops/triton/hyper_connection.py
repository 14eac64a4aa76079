"""Triton kernels of mHC: two launches for pre and head, with or without the post before them; one for post alone.

``_project`` reads the streams once (mixing the sublayer's output in first, for the post forms) and leaves, for every
slice of D, partial projections and a partial sum of squares in a workspace. ``_finish`` adds the partials up, and then
some programs compute post and comb for many tokens while the others collapse and normalise one token each.

Precision: the tensor cores multiply bf16 exactly, so every fp32 operand is split in three bf16 parts that hold all of
its 24 bits (fp16 in two), and products below 2^-24 of the result are left out.

Batch invariance: partials are added in an order that D alone decides. A slice of D (BLOCK_D columns of all streams) is
summed on its own; GROUP slices are added one after the other, then the groups. Few tokens: a program does one slice and
``_finish`` adds both levels. Many tokens: a program does a whole group. The dot's shape is the same in both, and
floating-point contraction is off: where a fused multiply-add is meant, it is written.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GROUP = 8  # slices of D that are added before the groups are
ROWS = 64  # rows of every dot: what one warpgroup's matrix instruction takes
FEW_TOKENS = 256  # up to here a program does one slice of 32 tokens, above a group of slices of 64 tokens
MIX_TOKENS = 4  # tokens whose Sinkhorn iterations share a program

# The interpreter multiplies bf16 as integers and truncates when it rounds to bf16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _round(x, dtype: tl.constexpr):
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
def _widen(x):
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
def _load_streams(ptrs, mask, D: tl.constexpr, HC: tl.constexpr):
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
def _load_coefficients(post_ptrs, comb_ptrs, mask, HC: tl.constexpr):
    """post, then comb row by row: (1 + HC) · HC values a token."""
    values = ()
    for k in tl.static_range(HC):
        values += (tl.load(post_ptrs + k, mask=mask).to(tl.float32),)
    for cell in tl.static_range(HC * HC):
        values += (tl.load(comb_ptrs + cell, mask=mask).to(tl.float32),)
    return values


@triton.jit
def _widen_all(tiles, COUNT: tl.constexpr):
    wide = ()
    for i in tl.static_range(COUNT):
        wide += (_widen(tiles[i]),)
    return wide


@triton.jit
def _mix(y, streams, coefficients, dtype: tl.constexpr, k: tl.constexpr, HC: tl.constexpr):
    """New stream k, rounded: post[k] · y + Σ_j comb[j, k] · streams[j]."""
    new = y * coefficients[k]
    for j in tl.static_range(HC):
        new = tl.fma(streams[j], coefficients[HC + j * HC + k], new)
    return _round(new, dtype)


@triton.jit(do_not_specialize=["T"])
def _post(y_ptr, x_ptr, post_ptr, comb_ptr, out_ptr, T, D: tl.constexpr, HC: tl.constexpr, BLOCK_D: tl.constexpr):
    """hc_post: BLOCK_D columns of one token's streams."""
    pid = tl.program_id(0)
    d = pid % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = (pid // tl.cdiv(D, BLOCK_D)).to(tl.int64)
    mask = d < D
    coefficients = _load_coefficients(post_ptr + t * HC, comb_ptr + t * (HC * HC), None, HC)
    streams = _load_streams(x_ptr + t * (HC * D) + d, mask, D, HC)
    y = tl.load(y_ptr + t * D + d, mask=mask, other=0.0, eviction_policy="evict_first")
    streams = _widen_all(streams, HC)
    y = _widen(y)
    for k in tl.static_range(HC):
        new = _mix(y, streams, coefficients, x_ptr.dtype.element_ty, k, HC)
        tl.store(out_ptr + t * (HC * D) + k * D + d, new, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _project(
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
        coefficients = _load_coefficients(post_ptr + t * HC, comb_ptr + t * (HC * HC), row_mask, HC)
    for step in range(STEPS):
        first_d = (split * STEPS + step) * BLOCK_D
        d = first_d + tl.arange(0, BLOCK_D)[None, :]
        mask = row_mask
        fn_mask = n < MIX
        if D % (BLOCK_D * STEPS) != 0:
            mask = mask & (d < D)
            fn_mask = fn_mask & (d < D)[None]
        streams = _load_streams(x_ptr + t * (HC * D) + d, mask, D, HC)
        if POST:
            y = tl.load(y_ptr + t * D + d, mask=mask, other=0.0, eviction_policy="evict_first")
        square = tl.zeros([TOKENS, BLOCK_D], tl.float32)
        if POST:
            old = _widen_all(streams, HC)
            y = _widen(y)
            streams = ()
            for i in tl.static_range(HC):
                streams += (_mix(y, old, coefficients, x_ptr.dtype.element_ty, i, HC),)
        for i in tl.static_range(HC):
            wide = _widen(streams[i])
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
    rest = tl.arange(0, 4)[None, :]  # four columns, so that _finish reads 16 bytes at a time
    tl.store(part + t * N + MIX + rest, tl.where(rest == 0, squares[:, None], 0.0), mask=row_mask)


@triton.jit
def _group_sums(ptrs, mask, stride, PARTS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Of the partials at ptrs [rows, columns], ptrs + stride, …, the sum of each group, in order: [GROUPS, …]."""
    group = tl.arange(0, GROUPS)[:, None, None]
    parts = ()
    for i in tl.static_range(GROUP):
        part = group * GROUP + i
        parts += (tl.load(ptrs[None] + part * stride, mask=(part < PARTS) & mask[None], other=0.0),)
    tl.debug_barrier()  # no sum before the last load, or loads wait for loads; the streams' loads stay above, too
    total = tl.zeros([GROUPS, ptrs.shape[0], ptrs.shape[1]], tl.float32)
    for i in tl.static_range(GROUP):
        total += parts[i]
    return total


@triton.jit
def _finish_mixes(
    base_ptr,
    scale_ptr,
    work_ptr,
    post_ptr,
    comb_ptr,
    tile,
    T,
    rms_eps,
    hc_eps,
    D: tl.constexpr,
    HC: tl.constexpr,
    MIX: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ITERS: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """post and comb of TOKENS tokens. All columns stay in one tile, [TOKENS, N // HC, HC]: comb is its rows from 2."""
    t = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    n = tl.arange(0, N)[None, :]
    base = tl.load(base_ptr + n, mask=n < MIX, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + tl.where(n < 2 * HC, 1, 2)).to(tl.float32)
    if PDL:
        gdc_wait()
    mask = (t < T) & (n < MIX + 4)
    mixes = tl.sum(_group_sums(work_ptr + t * N + n, mask, T.to(tl.int64) * N, PARTS, GROUP, GROUPS), 0)
    squares = tl.sum(tl.where(n == MIX, mixes, 0.0), 1)
    mixes = tl.fma(mixes * tl.rsqrt(squares / (HC * D) + rms_eps)[:, None], scale, base)
    tl.store(post_ptr + t * HC + (n - HC), 2 * tl.sigmoid(mixes), mask=(t < T) & (n >= HC) & (n < 2 * HC))

    row = tl.arange(0, N // HC)[None, :, None]
    comb = tl.reshape(mixes, [TOKENS, N // HC, HC])
    comb = tl.exp(comb - tl.max(comb, 2)[:, :, None])
    comb = comb / tl.sum(comb, 2)[:, :, None] + hc_eps
    comb = tl.where((row >= 2) & (row < 2 + HC), comb, 0.0)  # the other rows stay zero, and add nothing
    comb = comb / (tl.sum(comb, 1)[:, None, :] + hc_eps)
    for _ in range(ITERS - 1):
        comb = comb / (tl.sum(comb, 2)[:, :, None] + hc_eps)
        comb = comb / (tl.sum(comb, 1)[:, None, :] + hc_eps)
    comb = tl.reshape(comb, [TOKENS, N])
    tl.store(comb_ptr + t * (HC * HC) + (n - 2 * HC), comb, mask=(t < T) & (n >= 2 * HC) & (n < MIX))


@triton.jit
def _collapse(
    y_ptr,
    x_ptr,
    post_ptr,
    comb_ptr,
    base_ptr,
    scale_ptr,
    weight_ptr,
    work_ptr,
    out_ptr,
    t,
    T,
    rms_eps,
    hc_eps,
    norm_eps,
    D: tl.constexpr,
    HC: tl.constexpr,
    MIX: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    POST: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """The collapsed stream of token t. With POST the streams are mixed once more from y and x, else x holds them."""
    t = t.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    mask = d < D
    base = tl.load(base_ptr + n, mask=n < HC, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)
    if NORM and GROUP > 1:  # few tokens: latency counts; many: registers do
        weight = tl.load(weight_ptr + d, mask=mask, other=0.0)
    if PDL:
        gdc_wait()
    streams = _load_streams(x_ptr + t * (HC * D) + d, mask, D, HC)
    if POST:
        y = tl.load(y_ptr + t * D + d, mask=mask, other=0.0, eviction_policy="evict_first")
        coefficients = _load_coefficients(post_ptr + t * HC, comb_ptr + t * (HC * HC), None, HC)
    ptrs = (work_ptr + t * N + n)[None, :]
    mixes = tl.sum(_group_sums(ptrs, (n < MIX + 4)[None, :], T.to(tl.int64) * N, PARTS, GROUP, GROUPS), 0)
    mixes = tl.reshape(mixes, [N])
    squares = tl.sum(tl.where(n == MIX, mixes, 0.0), 0)
    pre = tl.sigmoid(tl.fma(mixes * tl.rsqrt(squares / (HC * D) + rms_eps), scale, base)) + hc_eps
    wide = tl.zeros([BLOCK_D], tl.float32)
    if POST:
        streams = _widen_all(streams, HC)
        y = _widen(y)
    for k in tl.static_range(HC):
        new = _mix(y, streams, coefficients, x_ptr.dtype.element_ty, k, HC) if POST else streams[k]
        wide = tl.fma(_widen(new), tl.sum(tl.where(n == k, pre, 0.0), 0), wide)
    out = _round(wide, out_ptr.dtype.element_ty)
    if NORM:
        if GROUP == 1:
            weight = tl.load(weight_ptr + d, mask=mask, other=0.0)
        wide = _widen(out)
        wide *= tl.rsqrt(tl.sum(wide * wide, 0) / D + norm_eps)
        out = _round(weight.to(tl.float32) * wide, out_ptr.dtype.element_ty)
    tl.store(out_ptr + t * D + d, out, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _finish(
    y_ptr,
    x_ptr,
    old_post_ptr,
    old_comb_ptr,
    base_ptr,
    scale_ptr,
    weight_ptr,
    work_ptr,
    post_ptr,
    comb_ptr,
    out_ptr,
    T,
    rms_eps,
    hc_eps,
    norm_eps,
    D: tl.constexpr,
    HC: tl.constexpr,
    MIX: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ITERS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    POST: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for the mixes of TOKENS tokens (none for the head: ITERS = 0), then one for each of these tokens.

    The last tokens come first: their streams are the likeliest to be in L2 still.
    """
    tile = tl.num_programs(0) // (TOKENS + 1) - 1 - tl.program_id(0) // (TOKENS + 1)
    job = tl.program_id(0) % (TOKENS + 1)
    t = tile * TOKENS + job - 1
    if job == 0:
        if ITERS > 0:
            _finish_mixes(
                base_ptr, scale_ptr, work_ptr, post_ptr, comb_ptr, tile, T, rms_eps, hc_eps,
                D, HC, MIX, N, PARTS, GROUP, GROUPS, ITERS, TOKENS, PDL,
            )  # fmt: skip
    elif t < T:
        _collapse(
            y_ptr, x_ptr, old_post_ptr, old_comb_ptr, base_ptr, scale_ptr, weight_ptr, work_ptr, out_ptr, t, T,
            rms_eps, hc_eps, norm_eps, D, HC, MIX, N, PARTS, GROUP, GROUPS, BLOCK_D, POST, NORM, PDL,
        )  # fmt: skip


# Launches


@dataclass(frozen=True)
class _Plan:
    """What the kernels are compiled for. The token count enters by one bit."""

    n: int  # columns of the workspace: the mixes, and four for the sum of squares
    tokens: int
    block_d: int
    steps: int  # slices that a program of _project adds up
    options: dict
    parts: int  # partials that a token is left with
    group: int  # how many of them _finish adds before the groups
    groups: int  # a power of two
    row: int
    row_options: dict


def _has_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _plan(hc: int, d: int, mix: int, dtype: torch.dtype, few: bool, device: torch.device) -> _Plan:
    block_d = 32 if hc <= 4 else 16
    tokens, steps, group, warps = (32, 1, GROUP, 4) if few else (64, GROUP, 1, 8)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    if not few and hc <= 4 and dtype == torch.bfloat16:
        options["maxnreg"] = 128  # two programs a multiprocessor
    row = triton.next_power_of_2(d)
    row_options = {"num_warps": min(16, max(4, row * hc * dtype.itemsize // 8192)), "enable_fp_fusion": False}
    if _has_dependent_launch(device):
        row_options["launch_pdl"] = True  # _finish starts while _project drains, and waits for it
    return _Plan(
        n=max(16, triton.next_power_of_2(mix + 4)),
        tokens=tokens,
        block_d=block_d,
        steps=steps,
        options=options,
        parts=triton.cdiv(d, block_d * steps),
        group=group,
        groups=triton.next_power_of_2(triton.cdiv(d, block_d * GROUP)),
        row=row,
        row_options=row_options,
    )


def _on(device: torch.device):
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _fused(output, streams, post, comb, fn, base, scale, weight, rms_eps, hc_eps, iters, norm_eps, *, store=False):
    """Both launches. Returns (new streams, post, comb, collapsed), None where there is none; iters 0 is the head."""
    *lead, hc, d = streams.shape
    mix = fn.shape[0]
    tokens = streams.numel() // (hc * d)
    streams, fn, base, scale = streams.contiguous(), fn.contiguous(), base.contiguous(), scale.contiguous()
    mixed = output is not None
    if mixed:
        output, post, comb = output.contiguous(), post.contiguous(), comb.contiguous()
    if weight is not None:
        weight = weight.contiguous()
    new = torch.empty_like(streams) if store else None
    collapsed = streams.new_empty([*lead, d])
    new_post = new_comb = None
    if iters > 0:
        new_post = streams.new_empty([*lead, hc], dtype=torch.float32)
        new_comb = streams.new_empty([*lead, hc, hc], dtype=torch.float32)
    if tokens == 0:
        return new, new_post, new_comb, collapsed
    plan = _plan(hc, d, mix, streams.dtype, tokens <= FEW_TOKENS, streams.device)
    work = streams.new_empty([plan.parts, tokens, plan.n], dtype=torch.float32)
    pdl = "launch_pdl" in plan.row_options
    with _on(streams.device):
        _project[(plan.parts * triton.cdiv(tokens, plan.tokens),)](
            output, streams, post, comb, new, fn, work, tokens,
            d, hc, mix, plan.n, mixed, store, plan.tokens, ROWS, plan.block_d, plan.steps, pdl,
            **plan.options,
        )  # fmt: skip
        again = mixed and not store  # the new streams were not written: _finish mixes them once more
        _finish[(triton.cdiv(tokens, MIX_TOKENS) * (MIX_TOKENS + 1),)](
            output if again else None, new if store else streams, post if again else None, comb if again else None,
            base, scale, weight, work, new_post, new_comb, collapsed, tokens, rms_eps, hc_eps, norm_eps,
            d, hc, mix, plan.n, plan.parts, plan.group, plan.groups, iters, MIX_TOKENS, plan.row, again,
            weight is not None, pdl, **plan.row_options,
        )  # fmt: skip
    return new, new_post, new_comb, collapsed


def hc_pre(
    hidden_streams, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20, norm_eps=1e-6
):
    """Inputs that are not contiguous are copied, here and below."""
    return _fused(
        None, hidden_streams, None, None, fn, base, scale, norm_weight, rms_eps, hc_eps, sinkhorn_iters, norm_eps
    )[1:]


def hc_post(output, hidden_streams, post, comb):
    output, hidden_streams = output.contiguous(), hidden_streams.contiguous()
    new = torch.empty_like(hidden_streams)
    if new.numel() == 0:
        return new
    *_, hc, d = hidden_streams.shape
    block = min(1024, triton.next_power_of_2(d))
    with _on(new.device):
        _post[(output.numel() // d * triton.cdiv(d, block),)](
            output, hidden_streams, post.contiguous(), comb.contiguous(), new, output.numel() // d, d, hc, block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return new


def hc_post_pre(
    output, hidden_streams, post, comb, fn, base, scale, norm_weight=None,
    *, rms_eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20, norm_eps=1e-6,
):  # fmt: skip
    return _fused(
        output, hidden_streams, post, comb, fn, base, scale, norm_weight, rms_eps, hc_eps, sinkhorn_iters, norm_eps,
        store=True,
    )  # fmt: skip


def hc_head(hidden_streams, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, norm_eps=1e-6):
    return _fused(None, hidden_streams, None, None, fn, base, scale, norm_weight, rms_eps, hc_eps, 0, norm_eps)[3]


def hc_post_head(
    output, hidden_streams, post, comb, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, norm_eps=1e-6
):
    return _fused(output, hidden_streams, post, comb, fn, base, scale, norm_weight, rms_eps, hc_eps, 0, norm_eps)[3]
