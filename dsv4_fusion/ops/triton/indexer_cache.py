"""The indexer's key cache in Triton: one launch to store, one to load, each with a program for a tile of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .indexer import MXFP4_FLOOR, has_e4m3, load_rope
from .indexer_row import hadamard, quantise_fp8, quantise_mxfp4, rms_norm, rotate, rounded, widen

TOKENS = 16  # a program


@triton.jit(do_not_specialize=["T", "end"])
def store(
    k_ptr,
    cache_ptr,
    slots_ptr,
    norm_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    k_stride,
    page_stride,
    cos_stride,
    sin_stride,
    T,
    end,
    norm_eps,
    floor,
    D: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    HADAMARD: tl.constexpr,
    MXFP4: tl.constexpr,
    OPTION: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """``end`` is the number of slots; OPTION as in ``quantise_q``. Nothing is written for a slot outside the cache."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < T
    column = tl.arange(0, D)[None, :]
    x = tl.load(k_ptr + token[:, None] * k_stride + column, mask=here[:, None], other=0.0)
    slot = tl.load(slots_ptr + token, mask=here, other=-1).to(tl.int64)
    kept = (slot >= 0) & (slot < end)
    x = widen(x)
    if norm_ptr is not None:
        x = rms_norm(x, tl.load(norm_ptr + column).to(tl.float32), norm_eps, TOKENS, D)
    if R > 0:
        row = token
        if positions_ptr is not None:
            row = tl.load(positions_ptr + token, mask=kept, other=0).to(tl.int64)
        row = tl.where(kept, row, 0)[:, None]  # positions of skipped tokens may be anything
        x = rotate(
            x, load_rope(cos_ptr, row, cos_stride, D, R), load_rope(sin_ptr, row, sin_stride, D, R), TOKENS, D, R
        )
    if HADAMARD:
        x = hadamard(x, TOKENS, D)
    slot = tl.where(kept, slot, 0)
    page_ptr = cache_ptr + (slot // PAGE) * page_stride
    slot = slot % PAGE
    if MXFP4:
        WIDTH: tl.constexpr = D // 2
        code, scale = quantise_mxfp4(x, floor, OPTION, TOKENS, D)
    else:
        WIDTH: tl.constexpr = D
        code, scale = quantise_fp8(x, floor, OPTION, HARDWARE)
        scale = scale.to(tl.int32, bitcast=True)
    byte = tl.arange(0, WIDTH)[None, :]
    tl.store(page_ptr[:, None] + slot[:, None] * WIDTH + byte, code, mask=kept[:, None])
    tl.store((page_ptr + PAGE * WIDTH + slot * 4).to(tl.pointer_type(tl.int32)), scale, mask=kept)


@triton.jit
def _signed(magnitude, sign):
    """The sign's bit 31 put in: Triton's minus is a subtraction from +0, which loses the sign of zero."""
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _from_e4m3(code):
    """By integer arithmetic, which every GPU has: the exponent is moved up and multiplied down, exactly."""
    code = code.to(tl.int32)
    magnitude = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return _signed(tl.where((code & 0x7F) == 0x7F, float("nan"), magnitude), (code & 0x80) << 24)


@triton.jit
def _from_e2m1(code):
    code = code.to(tl.int32)
    normal = (((code & 7) << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where((code & 7) < 2, (code & 7).to(tl.float32) * 0.5, normal)
    return _signed(magnitude, (code & 8) << 28)


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
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    MXFP4: tl.constexpr,
):
    """A program for TOKENS tokens of one sequence; zeros beyond its length and for pages outside the cache."""
    tiles = tl.cdiv(max_length, TOKENS)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    here = token < max_length
    inside = here & (token < tl.load(lengths_ptr + sequence))
    page = tl.load(table_ptr + sequence * table_stride + token // PAGE, mask=inside, other=0).to(tl.int64)
    inside = inside & (page >= 0) & (page < pages)
    page_ptr = cache_ptr + tl.where(inside, page, 0) * page_stride
    row = token % PAGE
    if MXFP4:
        byte = tl.arange(0, D // 2)[None, :]
        code = tl.load(page_ptr[:, None] + row[:, None] * (D // 2) + byte, mask=inside[:, None], other=0)
        block = tl.arange(0, D // 32)[None, :]
        scale_ptr = page_ptr[:, None] + PAGE * (D // 2) + row[:, None] * 4 + block
        exponent = tl.load(scale_ptr, mask=inside[:, None], other=0).to(tl.int32)
        scale = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)  # 2^-127 is subnormal
        scale = tl.where(exponent == 255, float("nan"), scale)[:, :, None]
        even = tl.reshape(_from_e2m1(code & 15), [TOKENS, D // 32, 16]) * scale
        odd = tl.reshape(_from_e2m1(code >> 4), [TOKENS, D // 32, 16]) * scale
        value = tl.reshape(tl.join(even, odd), [TOKENS, D])
    else:
        byte = tl.arange(0, D)[None, :]
        code = tl.load(page_ptr[:, None] + row[:, None] * D + byte, mask=inside[:, None], other=0)
        scale_ptr = (page_ptr + PAGE * D + row * 4).to(tl.pointer_type(tl.float32))
        value = _from_e4m3(code) * tl.load(scale_ptr, mask=inside, other=0.0)[:, None]
    out = (sequence * max_length + token)[:, None] * D + tl.arange(0, D)[None, :]
    bits = rounded(value).to(tl.int32, bitcast=True) >> 16
    tl.store(out_ptr + out, bits.to(tl.int16), mask=here[:, None])


def _store(
    k, cache, slots, norm_weight, positions, cos, sin, norm_eps, hadamard, floor, page_size, mxfp4, option
):  # fmt: skip
    tokens, d = k.shape
    if tokens == 0:
        return
    store[(triton.cdiv(tokens, TOKENS),)](
        k, cache, slots, norm_weight, positions, cos, sin, k.stride(0), cache.stride(0),
        0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0), tokens,
        cache.shape[0] * page_size, norm_eps, floor, d, 0 if cos is None else 2 * cos.shape[1], TOKENS, page_size,
        hadamard, mxfp4, option, not mxfp4 and has_e4m3(k.device), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def indexer_k_store_fp8(
    k, cache, slots, norm_weight=None, positions=None, cos=None, sin=None,
    *, norm_eps=1e-6, hadamard=False, amax_floor=1e-4, power_of_two_scale=True, page_size=64,
):  # fmt: skip
    _store(
        k, cache, slots, norm_weight, positions, cos, sin, norm_eps, hadamard, amax_floor, page_size, False,
        power_of_two_scale,
    )  # fmt: skip


def indexer_k_store_mxfp4(
    k, cache, slots, norm_weight=None, positions=None, cos=None, sin=None,
    *, norm_eps=1e-6, hadamard=False, amax_floor=MXFP4_FLOOR, ties="even", page_size=64,
):  # fmt: skip
    _store(
        k, cache, slots, norm_weight, positions, cos, sin, norm_eps, hadamard, amax_floor, page_size, True,
        ties == "even",
    )  # fmt: skip


def indexer_k_load(cache, block_table, lengths, *, format, head_dim=128, page_size=64, max_length=None):
    sequences = block_table.shape[0]
    length = block_table.shape[1] * page_size if max_length is None else max_length
    out = cache.new_empty([sequences, length, head_dim], dtype=torch.bfloat16)
    if out.numel() == 0:
        return out
    load[(sequences * triton.cdiv(length, TOKENS),)](
        cache, block_table, lengths, out.view(torch.int16), cache.stride(0), block_table.stride(0),
        cache.shape[0], length, head_dim, TOKENS, page_size, format == "mxfp4", num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
