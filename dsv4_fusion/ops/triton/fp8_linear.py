"""FP8 linear layers in Triton: a quantiser that reads its input once, and a product whose order follows K alone.

Batch invariance: whatever tile M leads to, an output element is the sum of ceil(K / 128) dots of 128, each in a fresh
accumulator of the tensor core, added in fp32 one after the other. A tile is never less than 64 tokens high, because
below that Triton takes another matrix instruction, which adds otherwise. Contraction is off: fused multiply-adds are
written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ..fp8_linear import block_scales
from .indexer import has_e4m3
from .indexer_row import _bits, _e4m3, _power, widen

GROUP = 128  # values that share a block scale, and products that the tensor core adds up
AMAX_PROGRAMS = 128  # partial maxima of a whole tensor
AMAX_BLOCK = 4096
LONGEST_ROW = 32768  # what a program of the quantiser holds in registers
ROUNDINGS = {"none": 0, "power_of_two": 1, "input": 2}


# The quantiser


@triton.jit
def _wide(x, BF16: tl.constexpr):
    if BF16:
        return widen(x)
    else:
        return x.to(tl.float32)


@triton.jit
def _quotient(x, scale):
    """Rows divided by their scales, to nearest: an approximation and its exact remainder, without a division each.

    Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", theorem 7. Scales so small
    that remainders are no normal numbers are multiplied first.
    """
    up = tl.where(scale < 2.0**-60, 2.0**64, 1.0)
    scale = scale * up
    inverse = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None], x.shape)
    x = x * up[:, None]
    y = x * inverse
    surplus = tl.fma(y, tl.broadcast_to(scale[:, None], x.shape), -x)
    return tl.fma(surplus, -inverse, y)  # of -0 this is -0 + -0


@triton.jit
def largest_of_part(x_ptr, partial_ptr, rows, columns, row_stride, BLOCK: tl.constexpr, BF16: tl.constexpr):
    """The bits of the largest magnitude of every program's share of the rows."""
    column = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        for start in range(0, columns, BLOCK):
            here = start + column < columns
            offset = (tl.zeros([BLOCK], tl.int64) + row) * row_stride + start + column
            x = tl.load(x_ptr + offset, mask=here, other=0.0)
            largest = tl.maximum(largest, _bits(_wide(x, BF16)) & 0x7FFFFFFF)
    tl.store(partial_ptr + tl.program_id(0), tl.max(largest, 0))


@triton.jit(do_not_specialize=["units", "scale_group"])
def quantise(
    x_ptr,
    partial_ptr,
    out_ptr,
    scale_ptr,
    units,
    groups,
    columns,
    row_stride,
    scale_row,
    scale_group,
    floor,
    UNITS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTIALS: tl.constexpr,
    ROUNDING: tl.constexpr,
    BF16: tl.constexpr,
    HARDWARE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A unit is what shares a scale: a row, or a group of SIZE in one of ``groups`` of it.

    With PARTIALS the scale is one of the whole tensor, whose maximum is that of the partial ones.
    """
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    row, group = unit // groups, (unit % groups).to(tl.int32)
    column = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    here = (unit < units)[:, None] & (column < columns)
    if DEPENDENT:  # the next kernel may only begin when all before this one is done: it reads more than this one's
        gdc_wait()
        gdc_launch_dependents()
    x = _wide(tl.load(x_ptr + row[:, None] * row_stride + column, mask=here, other=0.0), BF16)
    if PARTIALS > 0:
        bits = tl.max(tl.load(partial_ptr + tl.arange(0, PARTIALS)), 0) + tl.zeros([UNITS], tl.int32)
    else:
        bits = tl.max(_bits(x) & 0x7FFFFFFF, 1)
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), floor)
    scale = tl.div_rn(amax, tl.full([UNITS], 448.0, tl.float32))
    if ROUNDING == 1:
        exponent = (_bits(scale) + 0x7FFFFF) >> 23
        scale = _power(exponent)
        y = x * _power(254 - exponent)[:, None]
    else:
        if ROUNDING == 2:
            if BF16:
                exact = scale.to(tl.uint32, bitcast=True)
                scale = ((exact + 0x7FFF + ((exact >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
            else:
                scale = scale.to(tl.float16).to(tl.float32)
        y = _quotient(x, scale)
    finite = bits < 0x7F800000
    number = finite[:, None] & (y == y)
    y = tl.minimum(tl.maximum(tl.where(number, y, 0.0), -448.0), 448.0)
    code = tl.where(number, _e4m3(y, HARDWARE), 0x7F).to(tl.uint8)
    tl.store(out_ptr + row[:, None] * columns + column, code, mask=here)
    scale = tl.where(finite, scale, float("nan"))
    if PARTIALS > 0:
        tl.store(scale_ptr + tl.arange(0, UNITS) * 0, scale, mask=unit == 0)
    else:
        tl.store(scale_ptr + row * scale_row + group * scale_group, scale, mask=unit < units)


def _rows(x):
    """[..., K] as [M, K]; a copy where the rows do not follow one another at one distance."""
    return x.reshape(-1, x.shape[-1])


def quantize_fp8(x, *, scaling="token", scale_rounding="none", amax_floor=1e-4):
    """It may start before the kernel ahead has ended, and the next one before it has; both wait."""
    rows = _rows(x)
    tokens, size = rows.shape
    bf16, device = x.dtype == torch.bfloat16, x.device
    groups = triton.cdiv(size, GROUP) if scaling == "block" else 1
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    if scaling == "block":
        scale = block_scales(x, (*x.shape[:-1], groups))
    else:
        scale = x.new_empty([1] if scaling == "tensor" else [*x.shape[:-1], 1], dtype=torch.float32)
    if tokens == 0:
        return values, scale.fill_(amax_floor / 448.0) if scaling == "tensor" else scale
    partial, partials = None, 0
    if scaling == "tensor":
        partials = AMAX_PROGRAMS
        partial = x.new_empty([partials], dtype=torch.int32)
        largest_of_part[(partials,)](
            rows, partial, tokens, size, rows.stride(0), AMAX_BLOCK, bf16, num_warps=8, enable_fp_fusion=False
        )
    if scaling == "block":
        units, block, warps = 8 if tokens * groups <= 4096 else 32, GROUP, 4
    else:
        block = triton.next_power_of_2(size)
        units, warps = 1, max(1, min(16, block // 256))  # 8 values a thread: few tokens wait for less
    dependent = _has_dependent_launch(device)
    options = {"launch_pdl": True} if dependent else {}
    quantise[(triton.cdiv(tokens * groups, units),)](
        rows, partial, values.view(torch.uint8), scale, tokens * groups, groups, size, rows.stride(0),
        1, scale.stride(-1), amax_floor,
        units, block, partials, ROUNDINGS[scale_rounding], bf16, has_e4m3(device), dependent,
        num_warps=warps, enable_fp_fusion=False, **options,
    )  # fmt: skip
    return values, scale


# The product


@triton.jit
def load_scale(ptr, offset, mask, E8M0: tl.constexpr):
    """Scales as fp32; E8M0's bytes are exponents."""
    if E8M0:
        exponent = tl.load(ptr + offset, mask=mask, other=127).to(tl.int32)
        power = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
        return tl.where(exponent == 255, float("nan"), power)
    else:
        return tl.load(ptr + offset, mask=mask, other=1.0)


@triton.jit(do_not_specialize=["M", "x_scale_stride", "x_scale_group"])
def multiply(
    x_desc,
    w_desc,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    x_scale_stride,
    x_scale_group,
    w_scale_stride,
    BLOCK: tl.constexpr,
    X_E8M0: tl.constexpr,
    W_E8M0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A tile of the output a program. Tiles go down BAND rows of tiles first, so that programs share what they read."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (BAND * tiles_n)
    height = min(tiles_m - band * BAND, BAND)
    inside = tl.program_id(0) - band * BAND * tiles_n
    first_m = (band * BAND + inside % height) * BLOCK_M
    first_n = (inside // height) * BLOCK_N
    row, column = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    here, there = row < M, column < N
    x_scale_row = x_scale_ptr + row.to(tl.int64) * x_scale_stride
    if DEPENDENT:
        gdc_wait()
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, 128, num_stages=STAGES):
        if BLOCK:
            group = k // 128
            x_scale = load_scale(x_scale_row, group * x_scale_group, here, X_E8M0)
            w_scale = load_scale(w_scale_ptr, (first_n // 128) * w_scale_stride + group, k < K, W_E8M0)
        x = x_desc.load([first_m, k])
        w = w_desc.load([first_n, k])
        part = tl.dot(x, w.T, out_dtype=tl.float32)
        if BLOCK:
            total = tl.fma(part, tl.broadcast_to((x_scale * w_scale)[:, None], part.shape), total)
        else:
            total += part
    if not BLOCK:
        x_scale = load_scale(x_scale_row, 0, here, X_E8M0)
        w_scale = load_scale(w_scale_ptr, column * w_scale_stride, there, W_E8M0)
        total = total * x_scale[:, None] * w_scale[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=there, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=here[:, None] & there[None, :])


@dataclass(frozen=True)
class Tile:
    """How a product is cut up; nothing of it changes a result."""

    m: int
    n: int
    warps: int
    stages: int
    band: int = 8


SMALL, MIDDLE = 64, 256  # tokens: up to here, tiles of 64 tokens that are narrow enough to give most processors one
PROCESSORS = 132
TILES = {16: Tile(64, 16, 4, 8), 32: Tile(64, 32, 4, 8), 64: Tile(64, 64, 4, 6), 128: Tile(64, 128, 4, 4)}
LARGE = Tile(128, 128, 8, 4)


@functools.cache
def tile(bucket: int, outputs: int, hopper: bool) -> Tile:
    """For up to ``bucket`` tokens; 0 is any number."""
    if not hopper:  # less shared memory
        return Tile(64, 64, 4, 2)
    if bucket == 0:
        return LARGE
    rows = bucket // 64
    enough = [n for n in TILES if rows * triton.cdiv(outputs, n) >= 0.7 * PROCESSORS]
    return TILES[max(enough, default=16)]


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _aligned(x):
    """Rows for the copy engine, which begin at multiples of 16 bytes."""
    x = _rows(x)
    return x if (x.data_ptr() | x.stride(0)) % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _bytes(scale):
    return scale if scale.dtype == torch.float32 else scale.view(torch.uint8)


def _multiply(xq, wq, x_scale, w_scale, bias, out_dtype, dependent=False):
    lead, (n, k) = xq.shape[:-1], wq.shape
    out = xq.new_empty([*lead, n], dtype=out_dtype)
    x, w = _aligned(xq), _aligned(wq)
    m = x.shape[0]
    if m == 0:
        return out
    block = w_scale.dim() == 2 and w_scale.shape[0] != n
    x_scale = _rows(x_scale) if x_scale.dim() > 1 or xq.dim() == 1 else x_scale.view(1, 1)
    w_scale = w_scale if w_scale.dim() == 2 else w_scale.view(1, 1)
    if block:
        w_scale = w_scale.contiguous()
    shape = tile(SMALL if m <= SMALL else MIDDLE if m <= MIDDLE else 0, n, _is_hopper(xq.device))
    options = {"launch_pdl": True} if dependent else {}
    multiply[(triton.cdiv(m, shape.m) * triton.cdiv(n, shape.n),)](
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [shape.m, 128]),
        TensorDescriptor(w, [n, k], [w.stride(0), 1], [shape.n, 128]),
        _bytes(x_scale), _bytes(w_scale), bias, out, m, n, k,
        x_scale.stride(0) if x_scale.shape[0] > 1 else 0, x_scale.stride(1),
        w_scale.stride(0) if w_scale.shape[0] > 1 else 0,
        block, x_scale.dtype != torch.float32, w_scale.dtype != torch.float32,
        shape.m, shape.n, shape.band, shape.stages, dependent,
        num_warps=shape.warps, enable_fp_fusion=False, **options,
    )  # fmt: skip
    return out


def scaled_mm_fp8(
    xq, wq, x_scale, w_scale, bias=None,
    *, out_dtype=torch.bfloat16, batch_invariant=True, allow_dequantize=False,
):  # fmt: skip
    return _multiply(xq, wq, x_scale, w_scale, bias, out_dtype)


def fp8_linear(
    x, wq, w_scale, bias=None,
    *, scaling=None, scale_rounding="none", amax_floor=1e-4, out_dtype=None,
    batch_invariant=True, allow_dequantize=False,
):  # fmt: skip
    if scaling is None:
        scaling = "block" if w_scale.dim() == 2 and w_scale.shape[0] != wq.shape[0] else "token"
    dependent = _has_dependent_launch(x.device) and scaling != "tensor"
    xq, x_scale = quantize_fp8(x, scaling=scaling, scale_rounding=scale_rounding, amax_floor=amax_floor)
    return _multiply(xq, wq, x_scale, w_scale, bias, out_dtype or x.dtype, dependent)


def _has_dependent_launch(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
