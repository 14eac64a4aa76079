"""The pieces of work of the ragged scores: which a block does, and which of their keys some query sees.

A piece is some queries and a part of the keys, in steps. Its limits are found by the lanes of the warp that loads, some
pieces ahead, and left in shared memory for the warpgroups that multiply.
"""

from __future__ import annotations

import functools
import math

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

COLUMNS = 256  # heads of a block's queries, all together
KEYS = 128  # of a step, half for each of two warpgroups
FEWEST = 16  # steps of a piece of work, where there are as many
EVEN, ROUNDS = 1.04, 4  # how much longer than others a processor may work; pieces that even out their own differences
SLOTS = 4  # pieces of work of which it is known ahead what is visible


class Pieces:
    """The part of the kernel that knows what is visible; arguments as there."""

    limits: str
    queries: int  # of a piece of work
    parts: int  # products of a warpgroup
    own: int  # queries of a product
    slot: int  # words that are left of a piece

    def _ends(self, start, end, query, length, ratio):
        """The keys that one query sees."""
        if self.limits == "causal":
            after = cutlass.max(cutlass.min(Int64(end[query]), Int64(2**31 - 2)) + 1, Int64(0))
            return Int32(0), cutlass.min(Int32(Uint32(after) // Uint32(ratio)), length)
        low = Int32(0) if start is None else within(Int64(start[query]), length)
        high = length if end is None else within(Int64(end[query]), length)
        return low, high

    def _steps(self, length, chunk, per):
        """All steps of a piece of work: from the first to before the last."""
        return chunk * per, cutlass.min((chunk + 1) * per, (length + KEYS - 1) // KEYS)

    @cute.jit
    def _visible(self, start, end, queries, length, few, steps, ratio):
        """The steps of a piece of work in which some query sees a key, and the limits of the lane's query."""
        first, last = steps
        low, high = Int32(0), length
        if cutlass.const_expr(self.limits != "all"):
            mine = cute.arch.lane_idx() % self.queries
            low, high = self._ends(start, end, cutlass.min(few * self.queries + mine, queries - 1), length, ratio)
            lowest, highest = low, high
            for bit in cutlass.range_constexpr(self.queries.bit_length() - 1):
                lowest = cutlass.min(lowest, cute.arch.shuffle_sync_bfly(lowest, offset=1 << bit))
                highest = cutlass.max(highest, cute.arch.shuffle_sync_bfly(highest, offset=1 << bit))
            first = cutlass.min(cutlass.max(first, lowest // KEYS), last)
            last = cutlass.max(cutlass.min(last, (highest + KEYS - 1) // KEYS), first)
        return first, last, low, high

    def _leave(self, limits, slot, *values) -> None:
        """What is visible, found by the lanes of a warp, where :meth:`_limits` finds it."""
        first, last, low, high = values
        lane, at = cute.arch.lane_idx(), slot * self.slot
        self._leave_one(limits, at + lane, low, lane < self.queries)
        self._leave_one(limits, at + self.queries + lane, high, lane < self.queries)
        self._leave_one(limits, at + 2 * self.queries, first, lane == 0)
        self._leave_one(limits, at + 2 * self.queries + 1, last, lane == 0)

    @cute.jit
    def _leave_one(self, limits, at, value, here):
        if here:
            limits[at] = value

    def _limits(self, limits, slot, steps, lane):
        """What :meth:`_leave` has left: the steps, and what the queries see whose sums this thread stores."""
        if self.limits == "all":
            return *steps, [None] * self.parts
        slot = slot * self.slot
        seen = [limits[slot + 2 * self.queries + i] for i in range(2)]
        at = [slot + part * self.own + self._query(lane) for part in range(self.parts)]
        return *seen, [(limits[query], limits[query + self.queries]) for query in at]


def rounds_of(pieces, block, blocks) -> Int32:
    """How many pieces of work a block does."""
    rounds = pieces // blocks
    return rounds + Int32(pieces - 1 - piece_of(rounds, pieces, block, blocks) < pieces)


def piece_of(turn, pieces, block, blocks) -> Int32:
    """A block's piece of work: the last pieces, which may be the longest, are first, and back and forth for balance."""
    back = turn % 2
    return pieces - 1 - (turn * blocks + block + back * (blocks - 1 - 2 * block))


def within(limit, length) -> Int32:
    return Int32(cutlass.max(cutlass.min(limit, Int64(length)), Int64(0)))


@functools.lru_cache(maxsize=256)
def steps(queries: int, keys: int, heads: int, limited: bool, processors: int) -> int:
    """Of a piece of work: as many as leave all processors about as much to do, since each piece has its queries loaded.

    Args:
        queries, keys: how many.
        heads: of a query.
        limited: queries see different keys.
        processors: of the device.
    """
    groups, all_ = -(-queries * heads // COLUMNS), -(-keys // KEYS)
    for chunks in range(1, -(-all_ // FEWEST) + 1):
        rounds = groups * chunks / processors
        if math.ceil(rounds) <= EVEN * rounds and (rounds >= ROUNDS or not limited):
            break
    return -(-all_ // chunks)
