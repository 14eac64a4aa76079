"""What feeds the paged compressor: the windows to pool are found, their rows copied to shared memory, and the state
written.

A *unit* is a window, or the part of its columns that a block of a cluster has. Four warps copy the rows of unit after
unit into a ring of stages, as they are, without waiting for any; other warps pool them. Neither registers nor the
latency of indices, which are read for 32 requests at a time, limit how much is under way.

A stage holds the rows one after the other, of each the values, then the gates, both from the beginning of a place
for fp32; cosines, sines, and four words: the slot (two), how many rows are old, and whether this is a unit at all.

Rows that windows have read may be overwritten only then: the warps that copied them do that themselves, after their
copies have ended. Other tokens are written by the last warps of a block, which wait for nothing.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64, Uint32

from . import ptx
from .compressor_state import State, floored, halves, modulo, whole
from .launch import DTYPES

FEEDERS = 4  # warps
FEED_BARRIER = 15  # its number, among the named ones
SHARED = 226 * 1024
MOST_STAGES = 24
MINUS_INFINITY = 0xFF800000
UNIT, STOP = 1, 0


class Feed(State):
    """The parts of both kernels that do not pool.

    Args:
        d: columns of an entry.
        columns: of a unit; a cluster of ``d / columns`` blocks has an entry.
        ratio, series: as there.
        n: rows of a page of the state.
        rope: rotated dims.
        dtype: of kv and gate, a torch dtype.
        angle: of cos and sin.
        poolers: warps that pool, in ``groups`` that take turns with the units.
        readers: arrivals that release a stage.
        savers: warps that write the state, and others.
        spare: bytes of shared memory that are not stages.
    """

    def __init__(
        self, d: int, columns: int, ratio: int, series: int, n: int, rope: int, dtype, angle, poolers: int,
        groups: int, readers: int, savers: int, spare: int,
    ) -> None:  # fmt: skip
        self.d, self.columns, self.ratio, self.series, self.n, self.rope = d, columns, ratio, series, n, rope
        self.poolers, self.groups, self.readers = poolers, groups, readers
        self.cluster = d // columns
        self.length = series * ratio
        self.each = self.length // FEEDERS  # rows of a warp
        self.aligned = n % ratio == 0  # the rows of each series stand in one page
        self.bf16, self.size = DTYPES[dtype] is BFloat16, dtype.itemsize
        self.angle_bf16, self.angle_bytes = DTYPES[angle] is BFloat16, rope // 2 * angle.itemsize
        self.row = 8 * columns
        self.angles_at = self.length * self.row
        self.meta_at = self.angles_at + 2 * self.angle_bytes
        self.stage = -(-(self.meta_at + 16) // 128) * 128
        # A multiple of the groups: one that waits for a stage has then had the unit before in it, and parities suffice
        self.stages = min((SHARED - spare) // self.stage, MOST_STAGES) // groups * groups
        self.barriers_at = self.stages * self.stage  # full, then empty, of each stage; and an idle one
        self.idle_at = self.barriers_at + 16 * self.stages
        self.spare_at = self.idle_at + 16
        self.bytes = self.spare_at + spare
        self.threads = 32 * (poolers + FEEDERS + savers)

    # Where things are in shared memory

    def at(self, base: Int32, stage: Int32) -> Int32:
        return base + stage * self.stage

    def full(self, base: Int32, stage: Int32) -> Int32:
        return base + self.barriers_at + 8 * stage

    def empty(self, base: Int32, stage: Int32) -> Int32:
        return base + self.barriers_at + 8 * self.stages + 8 * stage

    def turn(self, unit: Int32) -> tuple[Int32, Int32]:
        """The stage of a unit, and the parity of its barriers' phases."""
        unit = Uint32(unit)  # division takes half the instructions then
        return Int32(unit % self.stages), Int32(unit // self.stages & 1)

    @cute.jit
    def begin(self, base: Int32):
        """Barriers, by one thread."""
        for stage in cutlass.range_constexpr(self.stages):
            ptx.barrier_init(self.full(base, Int32(stage)), 2 * 32 * FEEDERS)
            ptx.barrier_init(self.empty(base, Int32(stage)), self.readers)
        ptx.barrier_init(base + self.idle_at, 1)

    def rarely(self, base: Int32) -> None:
        """At the beginning of a branch, so that it is jumped over where it is not taken: what has a loop is not made
        of predicated instructions, which take as long as others. This one waits for what was before the beginning."""
        ptx.barrier_wait(base + self.idle_at, Int32(1))

    # Rows into shared memory

    @cute.jit
    def feed(self, t, base: Int32, warp: Int32, lane: Int32, begin: Int32, first: Int32, apart: Int32):
        """Units of requests and blocks number ``first``, ``first + apart``, …; ``begin`` is the first column."""
        tokens, requests, ratio = t.kv.shape[0], t.table.shape[0], self.ratio
        ring = self.n * t.table.shape[1]
        items = requests + floored(tokens + ratio - 1, ratio)
        unit = Int32(0)
        while first < items:
            index = first + lane * apart
            first = first + 32 * apart
            inside = index < items
            head = index < requests
            # A request's first token is often the one with its number: loads that need not wait come together
            guess = Int32(cutlass.select_(head, index, (index - requests) * ratio))
            inside = inside & (guess < tokens)
            position = Int32(self._read(t.positions, guess, inside, 0))
            owner = self._read(t.requests, guess, inside, -1)
            start = Int32(self._read(t.starts, index, head, 0))
            after = Int32(self._read(t.starts, index + 1, head, 0))
            # A request of one token often closes its window; and a table of one column has the page of any position
            likely = self._read(t.slots, guess, head & inside, -1)
            narrow = t.table.shape[1] == 1
            only = self._raw_page(t, index, Int32(0), head & narrow)
            after = cutlass.min(after, tokens)
            some = head & (start >= 0) & (start < after)
            elsewhere = some & (start != index)
            told = [self._read(tensor, start, elsewhere, 0) for tensor in (t.positions, t.requests)]
            position = Int32(cutlass.select_(elsewhere, Int32(told[0]), position))
            owner = Int64(cutlass.select_(elsewhere, told[1], owner))
            token = Int32(cutlass.select_(head, start, guess))
            closing = token + (ratio - 1) - modulo(position, ratio)
            at = position + (closing - token)
            whole = closing - (self.length - 1)
            # Of a window that closes in a block and is whole, the block's first token is one
            block = (index >= requests) & inside & (owner >= 0) & (owner < Int64(requests))
            block = block & (at >= self.length - 1) & (whole >= 0) & (closing >= token) & (closing < tokens)
            ends, begins = [self._read(t.requests, edge, block, -1) for edge in (closing, whole)]
            start = Int32(cutlass.select_(head, start, whole))
            after = Int32(cutlass.select_(head, after, closing + 1))
            mine = (some & (owner == Int64(index)) & (position >= 0)) | block
            tried, slots, pages = [], [], []  # before it is known that a block's window is of one request
            for attempt in cutlass.range_constexpr(self.series):
                closes = closing + attempt * ratio
                reaches = (closes - (self.length - 1) < start) | (index >= requests)
                tried.append(mine & reaches & (closes < after))
                if cutlass.const_expr(attempt == 0):
                    guessed = tried[0] & head & (closes == guess)
                    slot = self._read(t.slots, closes, tried[0] & ~guessed, -1)
                    slots.append(Int64(cutlass.select_(guessed, likely, slot)))
                else:
                    slots.append(self._read(t.slots, closes, tried[attempt], -1))
            if cutlass.const_expr(self.aligned):
                for part in cutlass.range_constexpr(self.series):
                    place = at - (self.length - 1) + part * ratio
                    wanted = mine & (place >= 0) & (whole + part * ratio < start)
                    guessed = wanted & head & narrow
                    page = self._raw_page(t, index, cutlass.max(place, 0), wanted & ~guessed)
                    pages.append(Int64(cutlass.select_(guessed, only, page)))
            flags, known = Int32(0), head | ((ends == owner) & (begins == owner))
            for attempt in cutlass.range_constexpr(self.series):
                angle = floored(at + attempt * ratio, ratio) * ratio
                kept = known & tried[attempt] & (slots[attempt] >= 0) & (slots[attempt] < t.end)
                flags = flags | (Int32(kept & (angle < t.cos.shape[0])) << attempt)
            pages = [self._known(t, page) for page in pages]
            before = self._before(closing < after, position)
            tail = mine & head & (before > 0) & (start + (ring - before) < after)
            flags = flags | (Int32(tail) << self.series)

            todo = Uint32(cute.arch.vote_ballot_sync(flags != 0))
            while todo != 0:
                source = ptx.trailing_zeros(todo)
                todo = todo & (todo - 1)
                bits = cute.arch.shuffle_sync(flags, source)
                given = [cute.arch.shuffle_sync(x, source) for x in (start, closing, at, index)]
                for attempt in cutlass.range_constexpr(self.series):
                    if (bits >> attempt) & 1 != 0:
                        words = [cute.arch.shuffle_sync(x, source) for x in halves(slots[attempt])]
                        own = [cute.arch.shuffle_sync(page, source) for page in pages[attempt:]]
                        self._fill(t, base, warp, lane, begin, unit, *given, attempt, words, own)
                        unit = unit + 1
                if (bits >> self.series) & 1 != 0:
                    self._tail(t, warp, lane, begin, *given, cute.arch.shuffle_sync(after, source))
        for _ in cutlass.range_constexpr(self.groups):
            stage = self._wait(base, unit)
            if (warp == 0) & (lane == 0):
                meta = self.at(base, stage) + self.meta_at
                ptx.store_shared(meta, [Uint32(0), Uint32(0), Uint32(0), Uint32(STOP)])
            self._give(base, stage)
            unit = unit + 1

    def _wait(self, base: Int32, unit: Int32) -> Int32:
        """The stage of a unit, empty."""
        stage, parity = self.turn(unit)
        ptx.barrier_wait(self.empty(base, stage), parity ^ 1)
        return stage

    def _give(self, base: Int32, stage: Int32) -> None:
        full = self.full(base, stage)
        ptx.barrier_arrive_after_copies(full)
        ptx.barrier_arrive(full)  # of what was stored

    @cute.jit
    def _fill(self, t, base, warp, lane, begin, unit, start, closing, at, request, attempt, slot, pages):
        """One unit: the window that is number ``attempt`` of those that close from ``closing`` at ``at`` on."""
        token = closing + (attempt * self.ratio - (self.length - 1))  # the first
        position = at + (attempt * self.ratio - (self.length - 1))
        row, unroll = warp * self.each, min(self.each, 8)  # this warp's rows are of one series
        shift = Int32(cutlass.select_(row < self.length - self.ratio, 0, (self.series - 1) * self.d)) + begin
        count = cutlass.min(cutlass.max(start - (token + row), 0), self.each)  # of its rows are not of this call
        place, page = position + row, Int32(-1)
        if cutlass.const_expr(len(pages) == 0):
            place = place + lane % self.each
            page = self._page(t, request, place, (place >= 0) & (lane < count))
        else:
            page = pages[0]
            if cutlass.const_expr(self.series > 1):
                later = pages[1] if len(pages) > 1 else Int32(-1)
                page = Int32(cutlass.select_(row < self.ratio, page, later))
        there = Int32((page >= 0) & (place >= 0))
        offset = Int64(page) * t.state.stride[0] + Int64(modulo(place, self.n) * (2 * self.series * self.d) + shift)
        old = t.state_bytes + offset * 4

        stage = self._wait(base, unit)
        to = self.at(base, stage) + row * self.row
        if cutlass.const_expr(len(pages) == 0):
            low, high = halves(old)
            for j in cutlass.range(count):
                words = [cute.arch.shuffle_sync(x, j) for x in (low, high)]
                if cute.arch.shuffle_sync(there, j) != 0:
                    self._old(to + j * self.row, whole(*words), lane)
                else:
                    self._missing(to + j * self.row, lane)
        else:
            if there != 0:
                for j in cutlass.range(count, unroll=unroll):
                    self._old(to + j * self.row, old + Int64(j * (8 * self.series * self.d)), lane)
            else:
                for j in cutlass.range(count):
                    self._missing(to + j * self.row, lane)
        self._new(t, to, Int64(token + row), shift, count, lane)
        if warp == 0:
            stage_at = self.at(base, stage)
            angle = Int64(floored(at + attempt * self.ratio, self.ratio) * self.ratio)
            chunks = self.angle_bytes // 16
            for step in cutlass.range_constexpr(-(-2 * chunks // 32)):
                chunk = lane + 32 * step
                if chunk < 2 * chunks:
                    source = t.cos_bytes + angle * t.cos_step
                    if chunk >= chunks:
                        source = t.sin_bytes + angle * t.sin_step - self.angle_bytes
                    ptx.copy_async(stage_at + self.angles_at + 16 * chunk, source + Int64(16 * chunk))
            if lane == 0:
                first = cutlass.min(cutlass.max(start - token, 0), self.length)  # row of this call
                meta = [Uint32(slot[0]), Uint32(slot[1]), Uint32(first), Uint32(UNIT)]
                ptx.store_shared(stage_at + self.meta_at, meta)
        self._give(base, stage)

    def _old(self, line: Int32, source: Int64, lane: Int32) -> None:
        """A row of the state into its place."""
        quarter = self.columns // 4  # chunks of 16 bytes of the values, or gates
        for step in range(2 * quarter // 32):
            chunk = lane + 32 * step
            # Gates follow the values of all series
            further = Int32(chunk >= quarter) * (4 * (self.series * self.d - self.columns))
            ptx.copy_async(line + 16 * chunk, source + Int64(16 * chunk + further))

    def _missing(self, line: Int32, lane: Int32) -> None:
        quarter = self.columns // 4
        for step in range(2 * quarter // 32):
            chunk = lane + 32 * step
            value = ptx.select(chunk >= quarter, Uint32(MINUS_INFINITY), Uint32(0))
            ptx.store_shared(line + 16 * chunk, [value] * 4)

    @cute.jit
    def _new(self, t, to: Int32, token: Int64, shift: Int32, first: Int32, lane: Int32):
        """The rows from ``first`` on of a warp, whose first one would be that of a ``token`` of this call."""
        fresh = self.columns * self.size // 16  # chunks of the values, or gates
        for step in cutlass.range_constexpr(-(-2 * fresh // 32)):
            chunk = lane + 32 * step
            source, apart, line = t.kv_bytes, t.kv_step, to + 16 * chunk
            if chunk >= fresh:
                source, apart, line = t.gate_bytes - 16 * fresh, t.gate_step, line + (4 * self.columns - 16 * fresh)
            source = source + (token + Int64(first)) * apart + Int64(shift * self.size + 16 * chunk)
            if chunk < 2 * fresh:
                for j in cutlass.range(first, self.each, unroll=min(self.each, 8)):
                    ptx.copy_async(line + j * self.row, source)
                    source = source + apart

    @cute.jit
    def _tail(self, t, warp, lane, begin, start, closing, at, request, after):
        """The tokens of a request whose rows its windows have read."""
        position = at - (closing - start)
        before = self._before(closing < after, position)
        ptx.wait_for_copies()
        cute.arch.barrier(barrier_id=FEED_BARRIER, number_of_threads=32 * FEEDERS)
        ring = self.n * t.table.shape[1]
        for pass_ in cutlass.range_constexpr(-(-self.length // (32 * FEEDERS))):
            index = (pass_ * 32 + lane) * FEEDERS + warp
            step = ring - before + index
            wanted = (index < before) & (start + step < after)
            step += cutlass.max(after - 1 - start - step, 0) // ring * ring  # the last token with this row
            page = self._page(t, request, position + step, wanted)
            self._keep(t, lane, begin, self.columns, page, start + step, position + step)
