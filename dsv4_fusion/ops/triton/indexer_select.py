"""The highest scores of a row in Triton, exactly and without a tie left to chance.

Scores become integers of the same order. The top_k-th highest is found two bits at a time, by counting how many are no
less than each candidate; then those above it are taken, and the first of those equal to it. Last they are sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ordered(score):
    """fp32 to uint32 of the same order: NaN, whatever its sign, is highest, and −inf is 0."""
    bits = tl.where(score == score, score.to(tl.uint32, bitcast=True), 0x7FC00000).to(tl.uint32)
    ordered = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000).to(tl.uint32)
    return tl.where(score == float("-inf"), 0, ordered).to(tl.uint32)


@triton.jit
def _scores(row_ptr, begin, length, BLOCK: tl.constexpr):
    index = begin + tl.arange(0, BLOCK)
    return _ordered(tl.load(row_ptr + index, mask=index < length, other=float("-inf")))


@triton.jit(do_not_specialize=["out_batch", "length", "top_k"])
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
):
    """A program for a row. ``top_k`` is padded to K; the rows of ``out`` have ``top_k`` entries."""
    row = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    scores_ptr += batch * scores_batch + row * scores_row
    out_ptr += batch * out_batch + row * top_k

    threshold = tl.full([], 0, tl.uint32)  # the largest number that top_k of the scores reach; 0 if too few are seen
    above = 0  # how many scores are higher
    for step in range(16):
        shift = 30 - 2 * step
        one = tl.full([], 1, tl.uint32) << shift
        first = 0
        second = 0
        third = 0
        for begin in range(0, length, BLOCK):
            score = _scores(scores_ptr, begin, length, BLOCK)
            first += tl.sum((score >= threshold + one).to(tl.int32), 0)
            second += tl.sum((score >= threshold + 2 * one).to(tl.int32), 0)
            third += tl.sum((score >= threshold + 3 * one).to(tl.int32), 0)
        digit = (first >= top_k).to(tl.int32) + (second >= top_k).to(tl.int32) + (third >= top_k).to(tl.int32)
        above = tl.where(digit == 3, above, tl.where(digit == 2, third, tl.where(digit == 1, second, first)))
        threshold += digit.to(tl.uint32) * one

    equal = 0  # so far
    count = 0
    for begin in range(0, length, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        score = _scores(scores_ptr, begin, length, BLOCK)
        same = ((score == threshold) & (score > 0)).to(tl.int32)
        rank = equal + tl.cumsum(same, 0) - same
        taken = ((score > threshold) | ((same > 0) & (rank < top_k - above))).to(tl.int32)
        place = count + tl.cumsum(taken, 0) - taken
        tl.store(out_ptr + place, index, mask=taken > 0)
        equal += tl.sum(same, 0)
        count += tl.sum(taken, 0)

    tl.debug_barrier()  # what the other threads stored
    place = tl.arange(0, K)
    chosen = tl.load(out_ptr + place, mask=place < count, other=0).to(tl.int32)
    score = _ordered(tl.load(scores_ptr + chosen, mask=place < count, other=float("-inf")))
    pair = (score.to(tl.int64) << 31) | (0x7FFFFFFF - chosen).to(tl.int64)
    pair = tl.where(place < count, pair, -1)
    pair = tl.sort(pair, descending=True)
    chosen = 0x7FFFFFFF - (pair & 0x7FFFFFFF)
    tl.debug_barrier()  # all have loaded
    tl.store(out_ptr + place, tl.where(pair < 0, -1, chosen), mask=place < top_k)
