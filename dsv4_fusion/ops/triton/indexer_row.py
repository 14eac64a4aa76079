"""What the indexer's Triton kernels do with a tile of rows [ROWS, D]: norm, RoPE, Hadamard, and the two quantisers.

Rows are fp32 values that were rounded to bf16. Every order and rounding is that of ``ops/_indexer.py``, so kernels that
use these are compiled with ``enable_fp_fusion=False`` and divide by ``div_rn``.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter loses bf16 subnormals in conversions


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def widen(x):
    """bf16 to fp32; two in two instructions, where the compiler takes three."""
    if _INTERPRETED:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )


@triton.jit
def rounded(x):
    """fp32 to the nearest bf16, a tie to the even one, as fp32; a NaN stays one."""
    if _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, even, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def _power(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _pairs(x, ROWS: tl.constexpr, D: tl.constexpr):
    """The even and the odd columns."""
    return tl.split(tl.reshape(x, [ROWS, D // 2, 2]))


@triton.jit
def _unpaired(even, odd, ROWS: tl.constexpr, D: tl.constexpr):
    return tl.reshape(tl.join(even, odd), [ROWS, D])


@triton.jit
def rms_norm(x, weight, eps, ROWS: tl.constexpr, D: tl.constexpr):
    """``weight`` is [1, D] fp32. The squares are added as a tree, neighbours first."""
    total = x * x
    for step in tl.static_range(7 if D == 128 else 6):
        even, odd = tl.split(tl.reshape(total, [ROWS, D >> (step + 1), 2]))
        total = even + odd
    root = tl.sqrt_rn(total * (1.0 / D) + eps)
    return rounded(x * tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), root) * weight)


@triton.jit
def rotate(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """``cos`` and ``sin`` are [1 or ROWS, D // 2] fp32; what they hold for pairs that are not rotated is ignored."""
    even, odd = _pairs(x, ROWS, D)
    rotated = tl.arange(0, D // 2)[None, :] >= (D - R) // 2
    new_even = rounded(even * cos - odd * sin)
    new_odd = rounded(odd * cos + even * sin)
    return _unpaired(tl.where(rotated, new_even, even), tl.where(rotated, new_odd, odd), ROWS, D)


@triton.jit
def _butterfly(x, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Of neighbours, then the lowest bit of the last index becomes its highest."""
    a, b = tl.split(tl.reshape(x, [ROWS, OUTER, INNER // 2, 2]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [ROWS, OUTER, INNER])


@triton.jit
def hadamard(x, ROWS: tl.constexpr, D: tl.constexpr):
    """Strides 1, 2, 4 in the registers of a thread, which holds eight neighbours; then transposed for the others."""
    OUTER: tl.constexpr = D // 8
    x = tl.reshape(x, [ROWS, OUTER, 8])
    for _ in tl.static_range(3):
        x = _butterfly(x, ROWS, OUTER, 8)
    x = tl.permute(x, [0, 2, 1])
    for _ in tl.static_range(4 if D == 128 else 3):
        x = _butterfly(x, ROWS, 8, OUTER)
    x = tl.reshape(tl.permute(x, [0, 2, 1]), [ROWS, D])
    return rounded(x * (D**-0.5))


@triton.jit
def _scale_exponent(bits, floor, LARGEST: tl.constexpr):
    """For the largest magnitude's bits: the quotient with LARGEST, its exponent rounded up, whether it is finite."""
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), floor)
    quotient = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    return quotient, (_bits(quotient) + 0x7FFFFF) >> 23, bits < 0x7F800000


@triton.jit
def _e4m3(y, HARDWARE: tl.constexpr):
    """fp32 of magnitude below 464, which rounds to the largest e4m3fn, 448: bytes, to nearest even."""
    if HARDWARE:
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = _bits(y)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        small = _bits(tl.abs(y) + 16384.0) - 0x46800000  # the sum's last bit is worth 2^-9, as is the subnormals'
        code = tl.where(magnitude < 0x3C800000, small, normal)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantise_fp8(x, floor, POWER_OF_TWO: tl.constexpr, HARDWARE: tl.constexpr):
    """Bytes [ROWS, D] and scales [ROWS], NaN where the row is not finite."""
    largest = tl.max(_bits(x) & 0x7FFFFFFF, 1)
    scale, exponent, finite = _scale_exponent(largest, floor, 448.0)
    if POWER_OF_TWO:
        scale = _power(exponent)
        y = x * _power(254 - exponent)[:, None]
    else:
        y = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    finite_row = finite[:, None]
    code = tl.where(finite_row, _e4m3(tl.where(finite_row, y, 0.0), HARDWARE), 0x7F)
    return code.to(tl.uint8), tl.where(finite, scale, float("nan"))


@triton.jit
def _e2m1(x, y, TIES_EVEN: tl.constexpr):
    """Codes of y = x · 2^n, at most 6 in magnitude; the sign is x's own, because y may have become zero."""
    magnitude = tl.abs(y)
    bits = _bits(magnitude)
    if TIES_EVEN:
        small = _bits(magnitude + 4194304.0) - 0x4A800000  # the sum's last bit is worth 1/2
        normal = (bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22
    else:
        small = (magnitude > 0.25).to(tl.int32) + (magnitude > 0.75).to(tl.int32)
        normal = (bits + 0x1FFFFF) >> 22
    return tl.where(magnitude < 1.0, small, normal - (126 << 1)) | ((_bits(x) >> 28) & 8)


@triton.jit
def quantise_mxfp4(x, floor, TIES_EVEN: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """Packed bytes [ROWS, D // 2] and the scale bytes in int32 [ROWS]; a block that is not finite is NaN, codes 0."""
    BLOCKS: tl.constexpr = D // 32
    even, odd = _pairs(x, ROWS, D)
    even = tl.reshape(even, [ROWS, BLOCKS, 16])
    odd = tl.reshape(odd, [ROWS, BLOCKS, 16])
    largest = tl.maximum(_bits(even) & 0x7FFFFFFF, _bits(odd) & 0x7FFFFFFF)
    _, exponent, finite = _scale_exponent(tl.max(largest, 2, keep_dims=True), floor, 6.0)
    inverse = _power(254 - exponent)
    packed = _e2m1(even, even * inverse, TIES_EVEN) | (_e2m1(odd, odd * inverse, TIES_EVEN) << 4)
    packed = tl.where(finite, packed, 0).to(tl.uint8)
    exponent = tl.reshape(tl.where(finite, exponent, 255), [ROWS, BLOCKS])
    scale = tl.sum(exponent << (8 * tl.arange(0, BLOCKS))[None, :], 1)
    return tl.reshape(packed, [ROWS, D // 2]), scale
