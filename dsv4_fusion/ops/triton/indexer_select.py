"""The highest scores of a row in Triton, exactly and without a tie left to chance.

Scores become integers of the same order. A bisection by counting finds a number that top_k of them reach; it ends as
soon as no more than top_k do. Those are sorted last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._library import rehearse

MINUS_INFINITY = tl.constexpr(-0x7F800001)  # as ordered
BLOCKS = 1024, 4096, 8192  # scores that a program holds
MOST = 512  # keys chosen, in V4-Flash; short sequences have fewer, and no kernel of their own


@triton.jit
def _ordered(score):
    """fp32 to int32 of the same order; NaN, whatever its sign, is highest."""
    bits = tl.where(score == score, (score + 0.0).to(tl.int32, bitcast=True), 0x7FC00000)  # −0 is 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scores(row_ptr, begin, length, BLOCK: tl.constexpr):
    index = begin + tl.arange(0, BLOCK)
    score = tl.load(row_ptr + index, mask=index // 4 < tl.cdiv(length, 4), other=float("-inf"))
    return _ordered(tl.where(index < length, score, float("-inf")))


@triton.jit
def _middle(low, high, step):
    """A number above ``low`` and below ``high``: the middle of their values or, every third step, of their bits.

    Scores crowd around a value more than around an exponent; the bits bound the number of steps.
    """
    middle = _ordered(0.5 * _value(low) + 0.5 * _value(high))
    middle = tl.where(step % 3 == 2, (low >> 1) + (high >> 1), middle)
    return tl.minimum(tl.maximum(middle, low + 1), high - 1)


@triton.jit
def _steps(score, low, high, STEPS: tl.constexpr):
    """The place of a score between two others, as an integer not above STEPS."""
    first = _value(low)
    place = (_value(score) - first) * (STEPS / (_value(high) - first))
    place = tl.where(place > 0, place, 0.0)  # not so is NaN
    return tl.where(place < STEPS, place, STEPS).to(tl.int32)


@triton.jit
def _bit(DIMS: tl.constexpr, axis: tl.constexpr):
    """[2] * DIMS: whether an index is 1 along an axis."""
    return tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (DIMS - 1 - axis)) == 1


@triton.jit
def _descending(x, K: tl.constexpr):
    """int32 [K] in descending order: a bitonic sort whose exchanges all point one way, as runs to ascend are inverted.

    That makes each of them a minimum or a maximum.
    """
    DIMS: tl.constexpr = tl.standard._log2(K)
    x = tl.reshape(x, [2] * DIMS)
    for run in tl.static_range(1, DIMS + 1):
        if run < DIMS:
            x = tl.where(_bit(DIMS, DIMS - 1 - run), ~x, x)
        for step in tl.static_range(run):
            other = x ^ tl.xor_sum(x, DIMS - run + step, True)
            x = tl.where(_bit(DIMS, DIMS - run + step), tl.minimum(x, other), tl.maximum(x, other))
        if run < DIMS:
            x = tl.where(_bit(DIMS, DIMS - 1 - run), ~x, x)
    return tl.reshape(x, [K])


@triton.jit(do_not_specialize=["scores_batch", "scores_row", "out_batch", "length", "top_k"])
def select(
    scores_ptr,
    out_ptr,
    scores_batch,
    scores_row,
    out_batch,
    length,
    top_k,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    """A program for a row. ``top_k`` is padded to K; the rows of ``out`` have ``top_k`` entries.

    HELD says that a row has at most BLOCK scores, which then are read once.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    scores_ptr += batch * tl.multiple_of(scores_batch, 4) + row * tl.multiple_of(scores_row, 4)
    out_ptr += batch * out_batch + row * top_k
    held = _scores(scores_ptr, 0, length, BLOCK)

    # At least top_k are not below `low`, if so many are seen, and fewer, `above`, not below `high`.
    low = 0x7FFFFFFF
    highest = MINUS_INFINITY
    reach = 0
    above = 0
    for begin in range(0, BLOCK if HELD else length, BLOCK):
        score = held if HELD else _scores(scores_ptr, begin, length, BLOCK)
        seen = score > MINUS_INFINITY
        low = tl.minimum(low, tl.min(tl.where(seen, score, 0x7FFFFFFF), 0))
        highest = tl.maximum(highest, tl.max(score, 0))
        reach += tl.sum(seen.to(tl.int32), 0)
    high = highest + 1
    step = 0
    while (reach > top_k) & (low + 1 < high):
        middle = _middle(low, high, step)
        count = 0
        for begin in range(0, BLOCK if HELD else length, BLOCK):
            score = held if HELD else _scores(scores_ptr, begin, length, BLOCK)
            count += tl.sum((score >= middle).to(tl.int32), 0)
        enough = count >= top_k
        low = tl.where(enough, middle, low)
        reach = tl.where(enough, count, reach)
        high = tl.where(enough, high, middle)
        above = tl.where(enough, above, count)
        step += 1
    high = tl.where(reach > top_k, high, low)
    above = tl.where(reach > top_k, above, reach)

    # All that are not below `high`, then the first of those equal to `low`.
    higher = 0  # so far
    equal = 0
    for begin in range(0, BLOCK if HELD else length, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        score = held if HELD else _scores(scores_ptr, begin, length, BLOCK)
        both = tl.where(score >= high, 1, tl.where(score >= low, 1 << 16, 0))
        before = tl.cumsum(both, 0) - both
        place = tl.where(score >= high, higher + (before & 0xFFFF), above + equal + (before >> 16))
        tl.store(out_ptr + place, index, mask=(both > 0) & (place < top_k))
        if not HELD:
            total = tl.sum(both, 0)
            higher += total & 0xFFFF
            equal += total >> 16

    # 32 bits are for a number of few bits that grows with the score, and the place, which grows with the index.
    tl.debug_barrier()  # what the other threads stored
    place = tl.arange(0, K)
    count = tl.minimum(reach, top_k)
    valid = place < count
    chosen = tl.load(out_ptr + place, mask=valid, other=0).to(tl.int32)
    score = _ordered(tl.load(scores_ptr + chosen, mask=valid, other=float("-inf")))
    BITS: tl.constexpr = tl.standard._log2(K)
    STEPS: tl.constexpr = (1 << min(31 - BITS, 24)) - 1  # a number that fp32 has
    both = (_steps(score, low, highest, STEPS) << BITS) | (K - 1 - place)
    both = tl.where(valid, both, -1)
    both = tl.reshape(tl.trans(tl.reshape(both, [K // 16, 16])), [K])  # most exchanges become a thread's own
    both = _descending(both, K)
    chosen = tl.load(out_ptr + (K - 1 - (both & (K - 1))), mask=valid, other=-1)
    tl.debug_barrier()  # all have loaded
    tl.store(out_ptr + place, chosen, mask=place < top_k)

    # Where those few bits could not tell two scores apart, neighbours change places until all are in order.
    phase = 0
    settled = 0
    while settled < 2:
        tl.debug_barrier()
        partner = tl.where((place + phase) % 2 == 0, place + 1, place - 1)
        inside = valid & (partner >= 0) & (partner < count)
        mine = tl.load(out_ptr + place, mask=inside, other=0).to(tl.int32)
        other = tl.load(out_ptr + partner, mask=inside, other=0).to(tl.int32)
        score = _ordered(tl.load(scores_ptr + mine, mask=inside, other=0.0))
        rival = _ordered(tl.load(scores_ptr + other, mask=inside, other=0.0))
        better = (score > rival) | ((score == rival) & (mine < other))
        worse = (score < rival) | ((score == rival) & (mine > other))
        change = inside & tl.where(place < partner, worse, better)
        tl.debug_barrier()
        tl.store(out_ptr + place, other, mask=change)
        settled = tl.where(tl.max(change.to(tl.int32), 0) > 0, 0, settled + 1)
        phase = 1 - phase


def best_of(scores, out, length: int, top_k: int) -> None:
    """Indices of the ``top_k`` highest of the first ``length`` scores of each row, as int32 or int64 [B, T, top_k].

    The rows of ``scores``, fp32 [B, T, at least length], begin at multiples of 64 bytes, and 16 or a multiple end them.
    """
    padded = max(MOST, triton.next_power_of_2(top_k))
    block = next((size for size in BLOCKS if length <= size and padded <= size), BLOCKS[-1])
    select[(out.shape[1], out.shape[0])](
        scores, out, scores.stride(0), scores.stride(1), out.stride(0), length, top_k, padded, block, length <= block,
        num_warps=block // 1024, maxnreg=128 if block == BLOCKS[-1] else None,  # two programs a multiprocessor
    )  # fmt: skip


def begin(device: torch.device, length: int, top_k: int, dtype: torch.dtype) -> None:
    """Begin to compile what :func:`best_of` will need for such scores and choices."""

    def run() -> None:
        scores = torch.zeros(1, 1, triton.cdiv(length, 16) * 16, device=device)
        best_of(scores, torch.empty(1, 1, top_k, dtype=dtype, device=device), length, top_k)

    if length and top_k:
        rehearse((best_of, device, length, top_k, dtype), device, run)
