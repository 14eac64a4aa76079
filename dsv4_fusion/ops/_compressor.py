"""The arithmetic of a compressed entry, shared by the compressor's operators.

An entry pools L rows of d values, each row with a gate a value: 2 · ratio rows where windows overlap (the previous
window's first series, then this one's second), else ratio. Everything is fp32 up to one rounding at the end, in one
fixed order, so that all implementations give the same bits, however the tokens arrive:

1. ``exp(gate - max gate)`` by :func:`exp_ref`; these, and their products with the values, are summed as a tree, the
   first half of the rows with the second, and divided. Rows that do not exist have the value 0 and the gate -inf.
2. RMSNorm; the squares are summed as a tree, neighbours first.
3. RoPE on the interleaved pairs of the last dims, of the values that are not rounded yet.
4. One rounding to the dtype of the result; or the bytes of a record.

In float64 all of it is float64.

Source: DeepSeek-V4 technical report (section 2.3) and inference code; the layout of the 584-byte record is vLLM's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._indexer import FP8_MAX, hadamard_ref, quantise_fp8_ref, quantise_mxfp4_ref

BLOCK = 64  # values of a record that share a scale, and dims of it that are rotated
AMAX_FLOOR = 1e-4
# 2^f for f from -1/2 to 1/2: of the polynomials of degree 5 that are 1 at 0, the one with the least largest relative
# error (Remez; 0.92e-7), its coefficients rounded to fp32
EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
LOG2_E = 1.4426950216293335
INTEGER = 12582912.0  # 1.5 · 2^23: added and subtracted again, it rounds to the nearest integer
LEAST = -87.0  # below, the exponential is 0


def fma_ref(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a · b + c in fp32, rounded once, where |c| is at least |a · b| or the sum exact in float64.

    Every GPU has an instruction for it. Here the product is exact in float64, and the sum is rounded to odd there: a
    second rounding then does no harm.
    """
    product = a.double() * b
    total = product + c
    lost = product - (total - c)
    bits = total.view(torch.int64)
    nudged = (lost != 0) & (bits & 1 == 0)  # to the odd neighbour, on the side of what was lost
    bits = bits + torch.where((lost > 0) == (total > 0), 1, -1) * nudged
    return bits.view(torch.float64).float()


def exp_ref(x: Tensor) -> Tensor:
    """e^x for x from -inf to 0, within 1.3e-7, and of numbers above 2^-20 within 3.5e-7 of themselves; exactly 1 at 0.

    By operations that every device rounds alike: x · log2 e is an integer and a rest, whose power is a polynomial.
    """
    if x.dtype == torch.float64:
        return x.exp()
    inside = x.clamp(min=LEAST)
    n = fma_ref(inside, LOG2_E, INTEGER) - INTEGER
    f = fma_ref(inside, LOG2_E, -n)
    y = torch.full_like(f, EXP2[-1])
    for coefficient in reversed(EXP2[:-1]):
        y = fma_ref(y, f, coefficient)
    power = ((n.nan_to_num(0.0).int() + 127) << 23).view(torch.float32)
    return torch.where(x < LEAST, 0.0, y * power)


def _halves(x: Tensor) -> Tensor:
    """The sum over the last dimension but one, a power of two long: the first half is added to the second."""
    while x.shape[-2] > 1:
        first, second = x.unflatten(-2, (2, -1)).unbind(-3)
        x = first + second
    return x.squeeze(-2)


def pool_ref(kv: Tensor, gate: Tensor) -> Tensor:
    """[..., L, d] values and gates, fp32 or float64, to [..., d]."""
    missing = (1 << (kv.shape[-2] - 1).bit_length()) - kv.shape[-2]
    kv, gate = F.pad(kv, (0, 0, 0, missing)), F.pad(gate, (0, 0, 0, missing), value=-math.inf)
    weight = exp_ref(gate - gate.amax(-2, keepdim=True))
    return _halves(weight * kv) / _halves(weight)


def norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension, a power of two, without a rounding at the end."""
    total = x * x
    while total.shape[-1] > 1:
        even, odd = total.unflatten(-1, (-1, 2)).unbind(-1)
        total = even + odd
    mean = total * (1 / x.shape[-1]) + eps
    root = mean.double().sqrt().to(x.dtype)  # PyTorch's fp32 square root on the CPU can be the second nearest
    return x * (torch.ones_like(root) / root) * weight.to(x.dtype)


def rotate_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of the last ``2 * cos.shape[-1]`` dims, without a rounding at the end."""
    plain = x.shape[-1] - 2 * cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x[..., plain:].unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return torch.cat([x[..., :plain], rotated.flatten(-2)], -1)


def entry_ref(kv: Tensor, gate: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, norm_eps: float) -> Tensor:
    """Rows [..., L, d] with their gates to entries [..., d], not rounded yet."""
    return rotate_ref(norm_ref(pool_ref(kv, gate), norm_weight, norm_eps), cos, sin)


# Records


def scaled_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [..., n] to e4m3fn codes [..., n] and the biased exponents of their power-of-two scales [..., n / 64].

    A block that is not finite becomes NaN: codes 0x7F, exponent 255.
    """
    blocks = x.unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    finite = amax.isfinite()
    amax = torch.where(finite, amax, 1.0).clamp(min=AMAX_FLOOR)
    exponent = ((amax / torch.full_like(amax, FP8_MAX)).view(torch.int32) + 0x7FFFFF) >> 23
    inverse = ((254 - exponent) << 23).view(torch.float32)
    y = (blocks * inverse.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    codes = torch.where(finite.unsqueeze(-1), y, torch.nan).to(torch.float8_e4m3fn)
    codes = torch.where(finite.unsqueeze(-1), codes.view(torch.uint8), 0x7F).flatten(-2)
    return codes.view(torch.float8_e4m3fn), torch.where(finite, exponent, 255)


def unscaled_ref(codes: Tensor, exponent: Tensor) -> Tensor:
    """What :func:`scaled_ref` stands for, in fp32."""
    scale = torch.where(exponent == 255, torch.nan, (exponent << 23).view(torch.float32))
    return (codes.float().unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2)


def round_nope_ref(x: Tensor, rope: int) -> Tensor:
    """The dims that are not rotated, rounded to FP8 in blocks of 64 and back; the others as they are."""
    plain = x.shape[-1] - rope
    return torch.cat([unscaled_ref(*scaled_ref(x[..., :plain])), x[..., plain:]], -1)


def record_ref(x: Tensor, format: str, hadamard: bool) -> tuple[Tensor, Tensor]:
    """fp32 entries [E, d] to the bytes of their values and of their scales, uint8 [E, n] and [E, m]."""
    if format == "kv":
        codes, exponent = scaled_ref(x[:, :-BLOCK])
        rotated = x[:, -BLOCK:]
        bits = torch.where(rotated.isnan(), 0x7FC0, rotated.bfloat16().view(torch.int16))  # one NaN on all devices
        values = torch.cat([codes.view(torch.uint8), bits.to(torch.int16).view(torch.uint8)], -1)
        return values, exponent.to(torch.uint8)
    x = x.bfloat16()
    x = hadamard_ref(x) if hadamard else x
    values, scales = quantise_fp8_ref(x) if format == "fp8" else quantise_mxfp4_ref(x)
    return values.view(torch.uint8), scales.unsqueeze(1).view(torch.uint8)
