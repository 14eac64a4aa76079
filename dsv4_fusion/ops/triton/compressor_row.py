"""What the compressor's Triton kernels do with the rows of windows, and with entries [WIN, D].

Every order and rounding is that of ``ops/_compressor.py``, so kernels that use these are compiled with
``enable_fp_fusion=False`` and divide by ``div_rn``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .indexer_cache import _from_e4m3
from .indexer_row import (
    _bits,
    _e4m3,
    _pairs,
    _power,
    _scale_exponent,
    _unpaired,
    hadamard,
    quantise_fp8,
    quantise_mxfp4,
    rounded,
    widen,
)  # fmt: skip


@triton.jit
def wide(x):
    """bf16 or fp32 to fp32."""
    if x.dtype == tl.bfloat16:
        return widen(x)
    else:
        return x


@triton.jit
def exponential(x):
    """e^x for x from -inf to 0; the constants are those of ``exp_ref``. What comes out below -87 is replaced."""
    shifted = tl.fma(x, 1.4426950216293335, 12582912.0)  # its last bits are those of the integer n
    n = shifted - 12582912.0
    f = tl.fma(x, 1.4426950216293335, -n)
    y = tl.fma(f, 0.001326472731307149, 0.009671512991189957)
    y = tl.fma(y, f, 0.05550733581185341)
    y = tl.fma(y, f, 0.24022242426872253)
    y = tl.fma(y, f, 0.6931470036506653)
    y = tl.fma(y, f, 1.0)
    power = ((_bits(shifted) << 23) + (127 << 23)).to(tl.float32, bitcast=True)  # of a NaN, which y is too, any
    return tl.where(x < -87.0, 0.0, y * power)


@triton.jit
def _sum(terms, STEPS: tl.constexpr, G: tl.constexpr, WIN: tl.constexpr, COLS: tl.constexpr):
    """``terms`` are STEPS tiles [WIN * G, COLS], together rows [WIN, STEPS * G, COLS]; summed to [WIN, COLS], the first
    half of the rows with the second: first the tiles, which takes no exchange between threads, then their rows.
    """
    LEVELS: tl.constexpr = tl.constexpr(STEPS.bit_length() - 1)
    for level in tl.static_range(LEVELS):
        sums = ()
        for step in tl.static_range(STEPS >> (level + 1)):
            sums = sums + (terms[step] + terms[step + (STEPS >> (level + 1))],)  # noqa: RUF005 (Triton unpacks no tuple)
        terms = sums
    x = terms[0]
    ROW_LEVELS: tl.constexpr = tl.constexpr(G.bit_length() - 1)
    for level in tl.static_range(ROW_LEVELS):
        first, second = tl.split(tl.permute(tl.reshape(x, [WIN, 2, G >> (level + 1), COLS]), [0, 2, 3, 1]))
        x = first + second
    return tl.reshape(x, [WIN, COLS])


@triton.jit
def pool(kv, gate, STEPS: tl.constexpr, G: tl.constexpr, WIN: tl.constexpr, COLS: tl.constexpr):
    """STEPS tiles [WIN * G, COLS] of values and of gates, fp32, those of missing rows 0 and -inf, to [WIN, COLS]."""
    largest = gate[0]
    for step in tl.static_range(1, STEPS):
        largest = tl.maximum(largest, gate[step])
    if G > 1:
        largest = tl.max(tl.reshape(largest, [WIN, G, COLS]), 1, keep_dims=True)
        largest = tl.reshape(tl.broadcast_to(largest, [WIN, G, COLS]), [WIN * G, COLS])
    weights = ()
    products = ()
    for step in tl.static_range(STEPS):
        weight = exponential(gate[step] - largest)
        weights = weights + (weight,)  # noqa: RUF005 (Triton unpacks no tuple)
        products = products + (weight * kv[step],)  # noqa: RUF005 (Triton unpacks no tuple)
    return tl.div_rn(_sum(products, STEPS, G, WIN, COLS), _sum(weights, STEPS, G, WIN, COLS))


@triton.jit
def load_angles(ptr, offset, here, D: tl.constexpr, R: tl.constexpr):
    """Rows of cos or sin at the offsets [WIN] as [WIN, D // 2] fp32: one value a pair, zero where none is."""
    pair = tl.arange(0, D // 2)[None, :] - (D - R) // 2
    return wide(tl.load(ptr + offset[:, None] + pair, mask=here[:, None] & (pair >= 0), other=0.0))


@triton.jit
def finish(x, weight, cos, sin, eps, WIN: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """RMSNorm with a weight [D] and RoPE of pooled values, not rounded."""
    total = x * x
    LEVELS: tl.constexpr = tl.constexpr(D.bit_length() - 1)
    for level in tl.static_range(LEVELS):
        even, odd = tl.split(tl.reshape(total, [WIN, D >> (level + 1), 2]))
        total = even + odd
    total = tl.reshape(total, [WIN, 1])
    root = tl.sqrt_rn(total * (1.0 / D) + eps)
    x = x * tl.div_rn(tl.full([WIN, 1], 1.0, tl.float32), root) * weight[None, :]
    even, odd = _pairs(x, WIN, D)
    rotated = tl.arange(0, D // 2)[None, :] >= (D - R) // 2
    new_even, new_odd = even * cos - odd * sin, odd * cos + even * sin
    return _unpaired(tl.where(rotated, new_even, even), tl.where(rotated, new_odd, odd), WIN, D)


@triton.jit
def bf16_bits(x):
    """fp32 rounded to bf16, its bits; every NaN the same one."""
    bits = tl.where(x == x, _bits(rounded(x)) >> 16, 0x7FC0)
    return bits.to(tl.int16)


@triton.jit
def _scaled(x, HARDWARE: tl.constexpr, WIN: tl.constexpr, D: tl.constexpr):
    """e4m3 bytes [WIN, D // 64, 64] and the exponents of their scales [WIN, D // 64, 1]; NaN where not finite."""
    x = tl.reshape(x, [WIN, D // 64, 64])
    largest = tl.max(_bits(x) & 0x7FFFFFFF, 2, keep_dims=True)
    _, exponent, finite = _scale_exponent(largest, 1e-4, 448.0)
    exponent = tl.where(finite, exponent, 127)
    code = _e4m3(tl.where(finite, x * _power(254 - exponent), 0.0), HARDWARE)
    return tl.where(finite, code, 0x7F).to(tl.uint8), tl.where(finite, exponent, 255)


@triton.jit
def round_nope(x, HARDWARE: tl.constexpr, WIN: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """The dims that are not rotated in FP8 and back."""
    code, exponent = _scaled(x, HARDWARE, WIN, D)
    scale = tl.where(exponent == 255, float("nan"), _power(exponent))
    back = tl.reshape(_from_e4m3(code) * scale, [WIN, D])
    return tl.where(tl.arange(0, D)[None, :] < D - R, back, x)


@triton.jit
def store_entry(
    x, cache_ptr, slot, kept, page_stride,
    WIN: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, HADAMARD: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """Entries into their slots [WIN]."""
    slot = tl.where(kept, slot, 0)
    page_ptr = cache_ptr + (slot // PAGE) * page_stride
    row = slot % PAGE
    if FORMAT == "kv":
        code, exponent = _scaled(x, HARDWARE, WIN, D)
        code, exponent = tl.reshape(code, [WIN, D]), tl.reshape(exponent, [WIN, D // 64])
        column, block = tl.arange(0, D)[None, :], tl.arange(0, D // 64)[None, :]
        ptr = page_ptr + row * (D + 64)
        tl.store(ptr[:, None] + column, code, mask=kept[:, None] & (column < D - 64))
        rotated_ptr = (ptr + (D - 64)).to(tl.pointer_type(tl.int16))
        tl.store(rotated_ptr[:, None] + (column - (D - 64)), bf16_bits(x), mask=kept[:, None] & (column >= D - 64))
        scale_ptr = page_ptr + PAGE * (D + 64) + row * 8
        tl.store(scale_ptr[:, None] + block, exponent.to(tl.uint8), mask=kept[:, None] & (block < D // 64 - 1))
    else:
        x = rounded(x)
        if HADAMARD:
            x = hadamard(x, WIN, D)
        if FORMAT == "mxfp4":
            WIDTH: tl.constexpr = D // 2
            code, scale = quantise_mxfp4(x, 7.052966104933725e-38, True, WIN, D)
        else:
            WIDTH: tl.constexpr = D
            code, scale = quantise_fp8(x, 1e-4, True, HARDWARE)
            scale = scale.to(tl.int32, bitcast=True)
        byte = tl.arange(0, WIDTH)[None, :]
        tl.store(page_ptr[:, None] + row[:, None] * WIDTH + byte, code, mask=kept[:, None])
        tl.store((page_ptr + PAGE * WIDTH + row * 4).to(tl.pointer_type(tl.int32)), scale, mask=kept)
