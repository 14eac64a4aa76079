"""The indexer's queries in Triton: one launch, a program for a tile of heads of one token."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .indexer_row import hadamard, quantise_fp8, quantise_mxfp4, rotate, widen

FEW_TOKENS = 256  # up to here a program does 16 heads, above 32
MXFP4_FLOOR = 6 * 2.0**-126


@triton.jit
def load_rope(ptr, row, stride, D: tl.constexpr, R: tl.constexpr):
    """A row, or a column of rows, of cos or sin as [1 or rows, D // 2] fp32: one value a pair, zero where none is."""
    pair = tl.arange(0, D // 2)[None, :] - (D - R) // 2
    return tl.load(ptr + row * stride + pair, mask=pair >= 0, other=0.0).to(tl.float32)


@triton.jit
def quantise_q(
    q_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    weights_ptr,
    out_ptr,
    scale_ptr,
    weights_out_ptr,
    q_token_stride,
    q_head_stride,
    cos_stride,
    sin_stride,
    weights_stride,
    floor,
    dim_factor,
    head_factor,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    HADAMARD: tl.constexpr,
    MXFP4: tl.constexpr,
    OPTION: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """OPTION is ties to even for MXFP4, a power of two as the scale for FP8. The token count is in the grid alone."""
    tiles: tl.constexpr = (H + HEADS - 1) // HEADS
    token = (tl.program_id(0) // tiles).to(tl.int64)
    head = (tl.program_id(0) % tiles) * HEADS + tl.arange(0, HEADS)
    here = head < H
    column = tl.arange(0, D)[None, :]
    x = tl.load(q_ptr + token * q_token_stride + head[:, None] * q_head_stride + column, mask=here[:, None], other=0.0)
    weight = tl.load(weights_ptr + token * weights_stride + head, mask=here, other=0.0).to(tl.float32)
    row = token
    if positions_ptr is not None:
        row = tl.load(positions_ptr + token).to(tl.int64)
    x = rotate(
        widen(x), load_rope(cos_ptr, row, cos_stride, D, R), load_rope(sin_ptr, row, sin_stride, D, R), HEADS, D, R
    )
    if HADAMARD:
        x = hadamard(x, HEADS, D)
    out = token * H + head
    if MXFP4:
        code, scale = quantise_mxfp4(x, floor, OPTION, HEADS, D)
        byte = tl.arange(0, D // 2)[None, :]
        tl.store(out_ptr + out[:, None] * (D // 2) + byte, code, mask=here[:, None])
        tl.store(scale_ptr + out, scale, mask=here)
    else:
        code, scale = quantise_fp8(x, floor, OPTION, HARDWARE)
        tl.store(out_ptr + out[:, None] * D + column, code, mask=here[:, None])
        weight = weight * scale
    tl.store(weights_out_ptr + out, weight * dim_factor * head_factor, mask=here)


@functools.cache
def has_e4m3(device: torch.device) -> bool:
    """Whether the GPU converts to e4m3; Triton's own conversion needs that."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _launch(q, positions, cos, sin, weights, out, scale, weights_out, floor, hadamard, option):
    """``scale`` is None for FP8."""
    tokens, heads, d = q.shape
    if tokens == 0:
        return
    tile = min(triton.next_power_of_2(heads), 16 if tokens <= FEW_TOKENS else 32)
    quantise_q[(tokens * triton.cdiv(heads, tile),)](
        q, positions, cos, sin, weights, out.view(torch.uint8), scale, weights_out,
        q.stride(0), q.stride(1), cos.stride(0), sin.stride(0), weights.stride(0), floor, d**-0.5, heads**-0.5,
        heads, d, 2 * cos.shape[1], tile, hadamard, scale is not None, option,
        scale is None and has_e4m3(q.device),
        num_warps=max(1, min(4, tile * d // 512)), enable_fp_fusion=False,
    )  # fmt: skip


def indexer_q_fp8_out(
    q, positions, cos, sin, weights, q_fp8, weights_out, *, hadamard=False, amax_floor=1e-4, power_of_two_scale=True
):
    _launch(q, positions, cos, sin, weights, q_fp8, None, weights_out, amax_floor, hadamard, power_of_two_scale)


def indexer_q_fp8(q, positions, cos, sin, weights, **options):
    q_fp8 = q.new_empty(q.shape, dtype=torch.float8_e4m3fn)
    weights_out = q.new_empty(q.shape[:2], dtype=torch.float32)
    indexer_q_fp8_out(q, positions, cos, sin, weights, q_fp8, weights_out, **options)
    return q_fp8, weights_out


def indexer_q_mxfp4_out(
    q, positions, cos, sin, weights, q_packed, q_scale, weights_out,
    *, hadamard=False, amax_floor=MXFP4_FLOOR, ties="even",
):  # fmt: skip
    _launch(q, positions, cos, sin, weights, q_packed, q_scale, weights_out, amax_floor, hadamard, ties == "even")


def indexer_q_mxfp4(q, positions, cos, sin, weights, **options):
    tokens, heads, d = q.shape
    q_packed = q.new_empty([tokens, heads, d // 2], dtype=torch.uint8)
    q_scale = q.new_empty([tokens, heads], dtype=torch.int32)
    weights_out = q.new_empty([tokens, heads], dtype=torch.float32)
    indexer_q_mxfp4_out(q, positions, cos, sin, weights, q_packed, q_scale, weights_out, **options)
    return q_packed, q_scale, weights_out
