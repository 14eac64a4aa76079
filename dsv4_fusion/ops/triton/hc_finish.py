"""The second launch of mHC's Triton kernels: the partials' sums, post and comb, and the collapsed stream."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .hc_project import load_coefficients, load_streams, mix, round_to, widen, widen_all


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
    streams = load_streams(x_ptr + t * (HC * D) + d, mask, D, HC)
    if POST:
        y = tl.load(y_ptr + t * D + d, mask=mask, other=0.0, eviction_policy="evict_first")
        coefficients = load_coefficients(post_ptr + t * HC, comb_ptr + t * (HC * HC), None, HC)
    ptrs = (work_ptr + t * N + n)[None, :]
    mixes = tl.sum(_group_sums(ptrs, (n < MIX + 4)[None, :], T.to(tl.int64) * N, PARTS, GROUP, GROUPS), 0)
    mixes = tl.reshape(mixes, [N])
    squares = tl.sum(tl.where(n == MIX, mixes, 0.0), 0)
    pre = tl.sigmoid(tl.fma(mixes * tl.rsqrt(squares / (HC * D) + rms_eps), scale, base)) + hc_eps
    wide = tl.zeros([BLOCK_D], tl.float32)
    if POST:
        streams = widen_all(streams, HC)
        y = widen(y)
    for k in tl.static_range(HC):
        new = mix(y, streams, coefficients, x_ptr.dtype.element_ty, k, HC) if POST else streams[k]
        wide = tl.fma(widen(new), tl.sum(tl.where(n == k, pre, 0.0), 0), wide)
    out = round_to(wide, out_ptr.dtype.element_ty)
    if NORM:
        if GROUP == 1:
            weight = tl.load(weight_ptr + d, mask=mask, other=0.0)
        wide = widen(out)
        wide *= tl.rsqrt(tl.sum(wide * wide, 0) / D + norm_eps)
        out = round_to(weight.to(tl.float32) * wide, out_ptr.dtype.element_ty)
    tl.store(out_ptr + t * D + d, out, mask=mask)


@triton.jit(do_not_specialize=["T"])
def finish(
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
