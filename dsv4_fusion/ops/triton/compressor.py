"""The dense compressor in Triton: one launch, a program for windows, or for a part of one window's dims.

Where a window has many rows its dims are spread over several programs. Each leaves its pooled values in a workspace;
the one that arrives last, by a counter, normalises and rotates the whole entry: no order depends on who that is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .compressor_row import bf16_bits, finish, load_angles, pool, round_nope, wide
from .counters import zeroed
from .indexer import has_e4m3

TILE = 1024  # the most values of a tile
WINDOWS = 512  # values of a tile of several windows


@triton.jit(do_not_specialize=["count", "windows", "first"])
def compress(
    kv_ptr,
    gate_ptr,
    bias_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    overlap_kv_ptr,
    overlap_gate_ptr,
    out_ptr,
    counter_ptr,
    pooled_ptr,
    kv_batch_stride,
    kv_stride,
    gate_batch_stride,
    gate_stride,
    bias_stride,
    cos_batch_stride,
    cos_stride,
    sin_batch_stride,
    sin_stride,
    overlap_kv_batch_stride,
    overlap_kv_stride,
    overlap_gate_batch_stride,
    overlap_gate_stride,
    count,
    windows,
    first,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    TABLE: tl.constexpr,
    NOPE: tl.constexpr,
    HARDWARE: tl.constexpr,
    WIN: tl.constexpr,
    STEPS: tl.constexpr,
    G: tl.constexpr,
    COLS: tl.constexpr,
):
    """``count`` is windows of all sequences; ``first`` the table's row of the first."""
    SPLITS: tl.constexpr = D // COLS
    LENGTH: tl.constexpr = (1 + OVERLAP) * RATIO
    split = tl.program_id(0) % SPLITS
    index = (tl.program_id(0) // SPLITS).to(tl.int64) * WIN + tl.arange(0, WIN)
    here = index < count
    batch, window = index // windows, index % windows
    line = tl.arange(0, WIN * G)  # of a tile: windows, and G rows of each
    line_index = (tl.program_id(0) // SPLITS).to(tl.int64) * WIN + line // G
    line_batch, line_window = line_index // windows, line_index % windows
    column = split * COLS + tl.arange(0, COLS)[None, :]
    values = ()
    gates = ()
    for step in tl.static_range(STEPS):
        row = step * G + line % G
        valid = (line_index < count) & (row < LENGTH)
        token = line_window * RATIO + (row - (LENGTH - RATIO))
        there = (valid & (token >= 0))[:, None]
        # The window before gives its first series, this one its second, if there are two
        shifted = tl.where(row < LENGTH - RATIO, 0, LENGTH // RATIO * D - D)[:, None] + column
        offset = (line_batch * gate_batch_stride + token * gate_stride)[:, None] + shifted
        gate = wide(tl.load(gate_ptr + offset, mask=there, other=float("-inf")))
        offset = (line_batch * kv_batch_stride + token * kv_stride)[:, None] + shifted
        kv = wide(tl.load(kv_ptr + offset, mask=there, other=0.0))
        bias_offset = ((row % RATIO) * bias_stride)[:, None] + shifted
        gate += wide(tl.load(bias_ptr + bias_offset, mask=there, other=0.0))
        if overlap_kv_ptr is not None:
            before = (valid & (token < 0))[:, None]
            offset = (line_batch * overlap_gate_batch_stride + row * overlap_gate_stride)[:, None] + column
            gate = tl.where(before, wide(tl.load(overlap_gate_ptr + offset, mask=before, other=0.0)), gate)
            offset = (line_batch * overlap_kv_batch_stride + row * overlap_kv_stride)[:, None] + column
            kv = tl.where(before, wide(tl.load(overlap_kv_ptr + offset, mask=before, other=0.0)), kv)
        values = values + (kv,)  # noqa: RUF005 (Triton unpacks no tuple)
        gates = gates + (gate,)  # noqa: RUF005 (Triton unpacks no tuple)
    pooled = pool(values, gates, STEPS, G, WIN, COLS)
    last = True
    if SPLITS > 1:
        part = pooled_ptr + index[:, None] * D + split * COLS + tl.arange(0, COLS)[None, :]
        tl.store(part, pooled)
        tl.debug_barrier()
        at = tl.program_id(0) // SPLITS
        last = tl.atomic_add(counter_ptr + at, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        if SPLITS > 1:
            tl.store(counter_ptr + at, 0)  # as the next call finds it
            whole = pooled_ptr + index[:, None] * D + tl.arange(0, D)[None, :]
            entry = tl.load(whole, cache_modifier=".cg")
        else:
            entry = pooled
        angle = window
        if TABLE:
            angle = first + window * RATIO
        cos = load_angles(cos_ptr, batch * cos_batch_stride + angle * cos_stride, here, D, R)
        sin = load_angles(sin_ptr, batch * sin_batch_stride + angle * sin_stride, here, D, R)
        x = finish(entry, wide(tl.load(weight_ptr + tl.arange(0, D))), cos, sin, eps, WIN, D, R)
        if NOPE:
            x = round_nope(x, HARDWARE, WIN, D, R)
        out = out_ptr + index[:, None] * D + tl.arange(0, D)[None, :]
        if out_ptr.dtype.element_ty == tl.int16:
            x = bf16_bits(x)
        tl.store(out, x, mask=here[:, None])


def shape(length: int, d: int) -> tuple[int, int, int]:
    """How many tiles hold a window's rows, the rows of a tile, and its columns."""
    rows = triton.next_power_of_2(length)
    g = max(1, rows // 8)
    return rows // g, g, min(d, max(16, TILE // g))


def warps(values: int, each: int) -> int:
    """For tiles of so many values, of which a thread has ``each``."""
    return max(1, min(8, values // (32 * each)))


def _compress(
    kv, gate, position_bias, norm_weight, cos, sin, overlap_kv, overlap_gate, norm_eps, first, round_nope, dtype,
    overlap,
):  # fmt: skip
    batch, length, _ = kv.shape
    ratio, d = position_bias.shape[0], norm_weight.shape[0]
    windows = length // ratio
    out = kv.new_empty([batch, windows, d], dtype=dtype or kv.dtype)
    if out.numel() == 0:
        return out
    steps, g, columns = shape((1 + overlap) * ratio, d)
    several = max(1, WINDOWS // columns) if g == 1 else 1
    count, splits = batch * windows, d // columns
    counter = pooled = None
    if splits > 1:
        counter, pooled = zeroed(count, kv.device), kv.new_empty([count * d], dtype=torch.float32)
    table = cos.dim() == 2

    def strides(tensor):
        return (0, 0) if tensor is None else tensor.stride()[:2]

    compress[(triton.cdiv(count, several) * splits,)](
        kv, gate, position_bias, norm_weight, cos, sin, overlap_kv, overlap_gate,
        out.view(torch.int16) if out.dtype == torch.bfloat16 else out, counter, pooled,
        *strides(kv), *strides(gate), position_bias.stride(0),
        *((0, cos.stride(0), 0, sin.stride(0)) if table else (*strides(cos), *strides(sin))),
        *strides(overlap_kv), *strides(overlap_gate), count, windows, first, norm_eps,
        d, 2 * cos.shape[-1], ratio, overlap, table, round_nope, round_nope and has_e4m3(kv.device),
        several, steps, g, columns,
        num_warps=warps(several * g * columns, 8), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def compress_csa(
    kv, gate, position_bias, norm_weight, cos, sin, overlap_kv=None, overlap_gate=None,
    *, norm_eps=1e-6, first_window_position=0, round_nope=False, dtype=None,
):  # fmt: skip
    return _compress(
        kv, gate, position_bias, norm_weight, cos, sin, overlap_kv, overlap_gate,
        norm_eps, first_window_position, round_nope, dtype, True,
    )  # fmt: skip


def compress_hca(
    kv, gate, position_bias, norm_weight, cos, sin,
    *, norm_eps=1e-6, first_window_position=0, round_nope=False, dtype=None,
):  # fmt: skip
    return _compress(
        kv, gate, position_bias, norm_weight, cos, sin, None, None,
        norm_eps, first_window_position, round_nope, dtype, False,
    )  # fmt: skip
