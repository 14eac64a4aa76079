"""The indexer's scores in Triton: a program holds a tile of keys, and goes through a few queries of one sequence.

The product is keys × heads, so that a thread's accumulators are many heads of few keys: relu, weights and the sum over
heads stay in registers, but for two shuffles. Nothing of [T, H, Tk] is written. FP8 is multiplied as it is where the
GPU can; MXFP4 is expanded to bf16, which holds every code times its scale. A program whose queries all see none of its
keys writes −inf and multiplies nothing.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .indexer import has_e4m3
from .indexer_cache import _from_e2m1, _from_e4m3
from .indexer_row import rounded, widen
from .indexer_select import best_of

QUERIES = 16  # a program, at most: so many share the load of its keys
PROGRAMS = 528  # wanted at least, four for each multiprocessor of an H200
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter multiplies bf16 as integers
BF16, FP8, MXFP4 = (tl.constexpr(format) for format in range(3))


@triton.jit
def _bf16(x):
    """fp32 that bf16 holds; subnormals of bf16 are lost in the interpreter's own conversion."""
    return (rounded(x).to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


# Four bytes hold eight codes. Each selects the bytes of its magnitude in bf16 from tables of eight, and its sign's; the
# bytes are paired to bf16, even dims and odd ones, and multiplied by their scales. Two instructions and a half a code.
_E2M1 = tl.constexpr("""
{
.reg .b32 code, low, high, sign, zero;
mov.b32 zero, 0x80008000;
and.b32 code, $4, 0x7777;
prmt.b32 low, 0xC0800000, 0xC0804000, code;
prmt.b32 high, 0x3F3F3F00, 0x40404040, code;
shr.b32 sign, $4, 3;
and.b32 sign, sign, 0x1111;
prmt.b32 sign, 0x8000, 0, sign;
or.b32 high, high, sign;
prmt.b32 $0, low, high, 0x6240;
prmt.b32 $2, low, high, 0x7351;
shr.u32 code, $4, 16;
shr.u32 sign, code, 3;
and.b32 code, code, 0x7777;
prmt.b32 low, 0xC0800000, 0xC0804000, code;
prmt.b32 high, 0x3F3F3F00, 0x40404040, code;
and.b32 sign, sign, 0x1111;
prmt.b32 sign, 0x8000, 0, sign;
or.b32 high, high, sign;
prmt.b32 $1, low, high, 0x6240;
prmt.b32 $3, low, high, 0x7351;
fma.rn.bf16x2 $0, $0, $5, zero;
fma.rn.bf16x2 $1, $1, $6, zero;
fma.rn.bf16x2 $2, $2, $5, zero;
fma.rn.bf16x2 $3, $3, $6, zero;
}
""")


@triton.jit
def _expand_mxfp4(code, scale, ROWS: tl.constexpr, D: tl.constexpr):
    """Packed bytes [ROWS, D / 2] and scale bytes in int32 [ROWS] to bf16 [ROWS, D]."""
    BLOCKS: tl.constexpr = D // 32
    exponent = (scale[:, None] >> (8 * tl.arange(0, BLOCKS))[None, :]) & 255
    power = tl.where(exponent == 0, 0x40, exponent << 7)  # bits of bf16; 2^-127 is subnormal
    power = tl.where(exponent == 255, 0x7FC0, power)[:, :, None]
    if _INTERPRETED:
        factor = (power << 16).to(tl.float32, bitcast=True)
        even = tl.reshape(_from_e2m1(code & 15), [ROWS, BLOCKS, 16]) * factor
        odd = tl.reshape(_from_e2m1(code >> 4), [ROWS, BLOCKS, 16]) * factor
        return _bf16(tl.reshape(tl.join(even, odd), [ROWS, D]))
    else:
        factor = tl.reshape(tl.broadcast_to(power.to(tl.int16), [ROWS, BLOCKS, 16]), [ROWS, D // 2])
        even, odd = tl.inline_asm_elementwise(
            _E2M1, "=&r,=&r,=&r,=&r,r,r,r", [code, factor], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
        return tl.reshape(tl.join(even, odd), [ROWS, D])


@triton.jit(do_not_specialize=["rows"])
def expand(code_ptr, scale_ptr, out_ptr, rows, ROWS: tl.constexpr, D: tl.constexpr):
    """Contiguous MXFP4 [rows, D / 2] with scales [rows] as bf16 [rows, D]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    code = tl.load(code_ptr + row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :], mask=(row < rows)[:, None])
    scale = tl.load(scale_ptr + row, mask=row < rows)
    values = _expand_mxfp4(code, scale, ROWS, D)
    tl.store(out_ptr + row[:, None] * D + tl.arange(0, D)[None, :], values, mask=(row < rows)[:, None])


def expanded(values, scale):
    """MXFP4 [..., d / 2] and its scales [...] as bf16 [..., d], exactly."""
    values, scale = values.contiguous(), scale.contiguous()
    d = 2 * values.shape[-1]
    out = values.new_empty([*values.shape[:-1], d], dtype=torch.bfloat16)
    if out.numel():
        rows = out.numel() // d
        expand[(triton.cdiv(rows, 32),)](values, scale, out, rows, 32, d, num_warps=4)
    return out


@triton.jit
def _operand(ptr, scale_ptr, here, ROWS: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr, E4M3: tl.constexpr):
    """Rows of values at ``ptr`` [ROWS, 1] as the product takes them; ``scale_ptr`` [ROWS] is read for MXFP4."""
    if FORMAT == MXFP4:
        code = tl.load(ptr + tl.arange(0, D // 2)[None, :], mask=here[:, None], other=0)
        scale = tl.load(scale_ptr.to(tl.pointer_type(tl.int32)), mask=here, other=0)
        return _expand_mxfp4(code, scale, ROWS, D)
    elif FORMAT == FP8:
        code = tl.load(ptr + tl.arange(0, D)[None, :], mask=here[:, None], other=0)
        if E4M3:
            return code.to(tl.float8e4nv, bitcast=True)
        else:
            return _bf16(_from_e4m3(code))
    else:
        return tl.load(ptr + tl.arange(0, D)[None, :], mask=here[:, None], other=0.0)


@triton.jit
def _within(limit, most):
    """An integer cut to [0, most], as int32."""
    return tl.minimum(tl.maximum(limit, 0), most).to(tl.int32)


@triton.jit
def _products(k, q):
    """k · qᵀ, fp32."""
    if _INTERPRETED:
        return tl.dot(widen(k), tl.trans(widen(q)))
    else:
        return tl.dot(k, tl.trans(q))


_OF_COUNTS = ["k_scale_batch", "table_batch", "start_batch", "end_batch", "out_batch", "out_token"]


@triton.jit(do_not_specialize=[*_OF_COUNTS, "S", "length", "pages", "group", "add", "divide"])
def score(
    q_ptr,
    q_scale_ptr,
    k_ptr,
    k_scale_ptr,
    w_ptr,
    start_ptr,
    end_ptr,
    table_ptr,
    out_ptr,
    q_batch,
    q_token,
    q_head,
    q_scale_batch,
    q_scale_token,
    k_batch,
    k_row,
    k_scale_batch,
    w_batch,
    w_token,
    table_batch,
    start_batch,
    end_batch,
    end_token,
    out_batch,
    out_token,
    S,
    length,
    pages,
    group,
    add,
    divide,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    FORMAT: tl.constexpr,
    E4M3: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Names that end in _batch, _token, _head, _row are strides. A query sees keys before (end + add) // divide.

    With PAGE, k is the cache and ``k_row`` the stride of its pages. H is padded to HEADS, a group of queries to
    QUERIES. ALIGNED: rows of the output are 16 scores apart, or a multiple of that.
    """
    if ALIGNED:
        out_batch = tl.multiple_of(out_batch, 16)
        out_token = tl.multiple_of(out_token, 16)
    WIDTH: tl.constexpr = D // 2 if FORMAT == MXFP4 else D
    tile = tl.program_id(0)
    first = tl.program_id(1) * group
    last = tl.minimum(first + group, S)
    batch = tl.program_id(2).to(tl.int64)
    key = tile * KEYS + tl.arange(0, KEYS)
    query = first + tl.arange(0, QUERIES)
    mine = query < last
    lowest = 0
    highest = length
    if start_ptr is not None:
        start = tl.load(start_ptr + batch * start_batch + query, mask=mine, other=2147483647)
        lowest = _within(tl.min(start, 0), length)
    if end_ptr is not None:
        end = tl.load(end_ptr + batch * end_batch + query * end_token, mask=mine, other=-add)
        if PAGE > 0 and end_token == 0:
            end -= S - 1 - query
        highest = _within(_within(tl.max(end, 0) + add, 2147483647) // divide, length)

    out_ptr += batch * out_batch + key
    if (tile * KEYS < highest) & ((tile + 1) * KEYS > lowest):
        seen = (key < highest) & (key >= lowest)
        if PAGE > 0:
            page = tl.load(table_ptr + batch * table_batch + key // PAGE, mask=seen, other=-1).to(tl.int64)
            seen = seen & (page >= 0) & (page < pages)
            page_ptr = k_ptr + tl.where(seen, page, 0) * k_row
            rows = page_ptr + key % PAGE * WIDTH
            scales = page_ptr + PAGE * WIDTH + key % PAGE * 4
        else:
            rows = k_ptr + batch * k_batch + key.to(tl.int64) * k_row
            scales = k_scale_ptr
            if FORMAT != BF16:
                scales = k_scale_ptr + batch * k_scale_batch + key
        k = _operand(rows[:, None], scales, seen, KEYS, D, FORMAT, E4M3)
        if FORMAT == FP8:
            k_scale = tl.load(scales.to(tl.pointer_type(tl.float32)), mask=seen, other=0.0)

        head = tl.arange(0, HEADS)
        here = head < H
        q_rows = q_ptr + batch * q_batch + head[:, None] * q_head
        w_rows = w_ptr + batch * w_batch + head
        for at in tl.range(first, last, num_stages=STAGES):
            row = tl.cast(at, tl.int64)
            q_scales = q_scale_ptr
            if FORMAT == MXFP4:
                q_scales = q_scale_ptr + batch * q_scale_batch + row * q_scale_token + head
            q = _operand(q_rows + row * q_token, q_scales, here, HEADS, D, FORMAT, E4M3)
            w = tl.load(w_rows + row * w_token, mask=here, other=0.0)
            product = tl.maximum(_products(k, q), 0.0, propagate_nan=tl.PropagateNan.ALL)
            total = tl.sum(product * w[None, :], 1)
            if FORMAT == FP8:
                total = total * k_scale
            visible = seen
            if start_ptr is not None:
                visible = visible & (key >= tl.load(start_ptr + batch * start_batch + at))
            if end_ptr is not None:
                limit = tl.load(end_ptr + batch * end_batch + at * end_token)
                if PAGE > 0 and end_token == 0:
                    limit -= S - 1 - at
                visible = visible & (key < _within(limit + add, 2147483647) // divide)
            total = tl.where(visible, total, float("-inf"))
            if _INTERPRETED and out_ptr.dtype.element_ty == tl.bfloat16:
                total = _bf16(total)
            tl.store(out_ptr + row * out_token, total, mask=key < length)
    else:
        for at in range(first, last):
            nothing = tl.full([KEYS], float("-inf"), tl.float32)
            tl.store(out_ptr + tl.cast(at, tl.int64) * out_token, nothing, mask=key < length)


def _tiles(heads: int, format: int) -> tuple[int, int]:
    """Keys of a program and its warps: 64 accumulators a thread."""
    if heads > 64:
        return 128, 8
    return (
        (256, 8) if format == 0 else (128, 4)
    )  # more registers than bf16 takes: smaller programs, two or three beside


def _group(queries: int, others: int, most: int) -> int:
    """Queries of a program: as many as leave enough programs for the GPU; the scores do not depend on it."""
    return max(1, min(most, queries * others // PROGRAMS))


def _launch(q, q_scale, k, k_scale, weights, start, end, end_token, table, out, length, add, divide, page):
    """Of 4-dimensional ``q``; ``out`` is [B, S, at least length]."""
    batch, queries, heads, width = q.shape
    if out.numel() == 0:
        return
    format = {torch.bfloat16: 0, torch.float8_e4m3fn: 1, torch.uint8: 2}[q.dtype]
    keys, warps = _tiles(heads, format)
    tiles = triton.cdiv(length, keys)
    group = _group(queries, tiles * batch, 4 if page else QUERIES)
    if format == 1:
        q, k = q.view(torch.uint8), k.view(torch.uint8)

    def stride(tensor, axis):
        return 0 if tensor is None or tensor.shape[axis] == 1 else tensor.stride(axis)

    score[(tiles, triton.cdiv(queries, group), batch)](
        q, q_scale, k, k_scale, weights, start, end, table, out,
        q.stride(0), q.stride(1), q.stride(2), stride(q_scale, 0), stride(q_scale, 1),
        0 if page else k.stride(0), k.stride(0) if page else k.stride(1), stride(k_scale, 0),
        weights.stride(0), weights.stride(1), table.stride(0) if page else 0, stride(start, 0), stride(end, 0),
        end_token, out.stride(0), out.stride(1), queries, length, k.shape[0], group, add, divide,
        heads, max(16, triton.next_power_of_2(heads)), width * (2 if format == 2 else 1), format,
        format == 1 and has_e4m3(q.device), page, keys, 4 if page else QUERIES, 3,
        out.stride(0) % 16 == 0 and out.stride(1) % 16 == 0, num_warps=warps,
    )  # fmt: skip


def batched(tensor, dim):
    return tensor if tensor is None or tensor.dim() == dim else tensor.unsqueeze(0)


def ragged(q, k, weights, q_scale, k_scale, start, end, positions):
    """All of it with a batch dimension."""
    limits = [batched(each, 2) for each in (start, positions if positions is not None else end)]
    return (
        batched(q, 4), batched(k, 3), batched(weights, 3), batched(q_scale, 3), batched(k_scale, 2), *limits,
    )  # fmt: skip


def scores_into(out, q, k, weights, q_scale, k_scale, start, end, causal, ratio):
    rule = (1, ratio) if causal else (0, 1)
    _launch(q, q_scale, k, k_scale, weights, start, end, 1, None, out, k.shape[1], *rule, 0)


def indexer_scores(
    q, k, weights, q_scale=None, k_scale=None, start=None, end=None, positions=None, *, ratio=4, dtype=None
):
    out = q.new_empty([*q.shape[:-2], k.shape[-2]], dtype=dtype or torch.float32)
    tensors = ragged(q, k, weights, q_scale, k_scale, start, end, positions)
    scores_into(batched(out, 3), *tensors, positions is not None, ratio)
    return out


def paged_into(out, q, cache, weights, block_table, lengths, q_scale, length, page_size):
    ends = lengths if lengths.dim() == 2 else lengths.unsqueeze(1)
    end_token = 1 if lengths.dim() == 2 else 0
    _launch(q, q_scale, cache, cache, weights, None, ends, end_token, block_table, out, length, 0, 1, page_size)


def indexer_scores_paged(
    q, cache, weights, block_table, lengths, q_scale=None, *, page_size=64, max_length=None, dtype=None
):
    length = block_table.shape[1] * page_size if max_length is None else max_length
    out = q.new_empty([*q.shape[:2], length], dtype=dtype or torch.float32)
    paged_into(out, q, cache, weights, block_table, lengths, q_scale, length, page_size)
    return out


def best_paged(
    paged_into, q, cache, weights, block_table, lengths, q_scale=None,
    *, top_k, page_size=64, max_length=None, dtype=None, workspace=256 * 2**20,
):  # fmt: skip
    """:func:`dsv4_fusion.ops.indexer_topk_paged` with the scores of ``paged_into``."""
    length = block_table.shape[1] * page_size if max_length is None else max_length
    batch, queries = q.shape[:2]
    out = q.new_empty([batch, queries, top_k], dtype=dtype or torch.int64)
    if out.numel() == 0:
        return out
    width = _width(length)
    some = max(1, min(batch, workspace // max(1, 4 * width * queries)))
    scores = q.new_empty([some, queries, width], dtype=torch.float32)
    for b in range(0, batch, some):
        few = slice(b, b + some)
        rows = out[few]
        into = scores[: rows.shape[0]]
        scale = None if q_scale is None else q_scale[few]
        paged_into(into, q[few], cache, weights[few], block_table[few], lengths[few], scale, length, page_size)
        best_of(into, rows, length, top_k)
    return out


indexer_topk_paged = functools.partial(best_paged, paged_into)


def _width(length):
    """Of rows of scores: whatever the length, they begin where Triton expects it of all or of none."""
    return triton.cdiv(length, 16) * 16


def best(
    scores_into, q, k, weights, q_scale=None, k_scale=None, start=None, end=None, positions=None,
    *, top_k, ratio=4, dtype=None, workspace=256 * 2**20,
):  # fmt: skip
    """:func:`dsv4_fusion.ops.indexer_topk` with the scores of ``scores_into``."""
    out = q.new_empty([*q.shape[:-2], top_k], dtype=dtype or torch.int64)
    if out.numel() == 0:
        return out
    chosen = batched(out, 3)
    q, k, weights, q_scale, k_scale, start, end = ragged(q, k, weights, q_scale, k_scale, start, end, positions)
    (batch, queries), length = q.shape[:2], k.shape[1]
    width = _width(length)
    some = max(1, min(batch * queries, workspace // max(1, 4 * width)))
    sequences = max(1, some // queries)  # at a time, or a part of one
    some = min(some, queries)
    scores = q.new_empty([sequences, some, width], dtype=torch.float32)
    for b in range(0, batch, sequences):
        few = slice(b, b + sequences)
        for s in range(0, queries, some):
            part = few, slice(s, s + some)

            def limit(tensor, part=part):
                return (
                    tensor if tensor is None else tensor[part if tensor.shape[0] == batch else (slice(0, 1), part[1])]
                )

            rows = chosen[part]
            into = scores[: rows.shape[0], : rows.shape[1]]
            scale = None if q_scale is None else q_scale[part]
            k_part = None if k_scale is None else k_scale[few]
            tensors = q[part], k[few], weights[part], scale, k_part, limit(start), limit(end)
            scores_into(into, *tensors, positions is not None, ratio)
            best_of(into, rows, length, top_k)
    return out


indexer_topk = functools.partial(best, scores_into)
