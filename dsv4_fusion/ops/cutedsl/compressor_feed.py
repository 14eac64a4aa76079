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

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64, Uint32

from . import ptx
from .compressor_row import wide
from .launch import DTYPES

FEEDERS = 4  # warps
FEED_BARRIER = 15  # its number, among the named ones
SHARED = 226 * 1024
MINUS_INFINITY = 0xFF800000
UNIT, STOP = 1, 0


class Feed:
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
        readers: warps that release a stage.
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
        self.stages = min((SHARED - spare) // self.stage, 24)
        self.barriers_at = self.stages * self.stage  # full, then empty, of each stage
        self.spare_at = self.barriers_at + 16 * self.stages
        self.bytes = self.spare_at + spare
        self.threads = 32 * (poolers + FEEDERS + savers)

    # Where things are in shared memory

    def at(self, base: Int32, stage: Int32) -> Int32:
        return base + stage * self.stage

    def full(self, base: Int32, stage: Int32) -> Int32:
        return base + self.barriers_at + 8 * stage

    def empty(self, base: Int32, stage: Int32) -> Int32:
        return base + self.barriers_at + 8 * self.stages + 8 * stage

    @cute.jit
    def begin(self, base: Int32):
        """Barriers, by one thread."""
        for stage in cutlass.range_constexpr(self.stages):
            ptx.barrier_init(self.full(base, Int32(stage)), 2 * 32 * FEEDERS)
            ptx.barrier_init(self.empty(base, Int32(stage)), self.readers)

    # Indices

    # All of them are read without branches: those that need not wait for each other are under way together

    def _read(self, tensor: cute.Tensor, index: Int32, inside, other: int) -> Int64:
        size = tensor.element_type.width // 8
        return ptx.load_integer(tensor.iterator.toint() + Int64(index) * (tensor.stride[0] * size), size, inside, other)

    def _raw_page(self, t, request: Int32, position: Int32, wanted) -> Int64:
        """What the table has for a request's token, -1 if it is not ``wanted``."""
        size = t.table.element_type.width // 8
        column = Int64(position // self.n % t.table.shape[1])
        offset = Int64(request) * t.table.stride[0] + column * t.table.stride[1]
        return ptx.load_integer(t.table.iterator.toint() + offset * size, size, wanted, -1)

    def _known(self, t, page: Int64) -> Int32:
        """A page of the state, or -1."""
        fine = (page >= 0) & (page < Int64(t.state.shape[0]))
        return Int32(cutlass.select_(fine, Int32(page), Int32(-1)))

    def _page(self, t, request: Int32, position: Int32, wanted) -> Int32:
        """The page of the state with a request's token, -1 if it has none."""
        return self._known(t, self._raw_page(t, request, position, wanted))

    def _before(self, closes, position: Int32) -> Int32:
        """How many rows of the state are read for a request whose tokens begin at ``position``."""
        most = cutlass.min(position, (self.length - self.ratio) + position % self.ratio)
        return Int32(cutlass.select_(closes, most, Int32(0)))

    # Rows into shared memory

    @cute.jit
    def feed(self, t, base: Int32, warp: Int32, lane: Int32, begin: Int32, first: Int32, apart: Int32):
        """Units of requests and blocks number ``first``, ``first + apart``, …; ``begin`` is the first column."""
        tokens, requests, ratio = t.kv.shape[0], t.table.shape[0], self.ratio
        ring = self.n * t.table.shape[1]
        items = requests + (tokens + ratio - 1) // ratio
        count = (items - first + apart - 1) // apart
        unit = Int32(0)
        for batch in cutlass.range((count + 31) // 32):
            index = first + (batch * 32 + lane) * apart
            inside = index < items
            head = index < requests
            # A request's first token is often the one with its number: loads that need not wait come together
            guess = Int32(cutlass.select_(head, index, (index - requests) * ratio))
            inside = inside & (guess < tokens)
            position = Int32(self._read(t.positions, guess, inside, 0))
            owner = self._read(t.requests, guess, inside, -1)
            start = Int32(self._read(t.starts, index, head, 0))
            after = Int32(self._read(t.starts, index + 1, head, 0))
            after = cutlass.min(after, tokens)
            some = head & (start >= 0) & (start < after)
            elsewhere = some & (start != index)
            told = [self._read(tensor, start, elsewhere, 0) for tensor in (t.positions, t.requests)]
            position = Int32(cutlass.select_(elsewhere, Int32(told[0]), position))
            owner = Int64(cutlass.select_(elsewhere, told[1], owner))
            token = Int32(cutlass.select_(head, start, guess))
            closing = token + (ratio - 1) - position % ratio
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
                slots.append(self._read(t.slots, closes, tried[attempt], -1))
            if cutlass.const_expr(self.aligned):
                for part in cutlass.range_constexpr(self.series):
                    place = at - (self.length - 1) + part * ratio
                    wanted = mine & (place >= 0) & (whole + part * ratio < start)
                    pages.append(self._raw_page(t, index, cutlass.max(place, 0), wanted))
            flags, known = Int32(0), head | ((ends == owner) & (begins == owner))
            for attempt in cutlass.range_constexpr(self.series):
                angle = (at + attempt * ratio) // ratio * ratio
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
                        words = [cute.arch.shuffle_sync(x, source) for x in _halves(slots[attempt])]
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
        stage = unit % self.stages
        ptx.barrier_wait(self.empty(base, stage), ((unit // self.stages) & 1) ^ 1)
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
        offset = Int64(page) * t.state.stride[0] + Int64((place % self.n) * (2 * self.series * self.d) + shift)
        old = t.state_bytes + offset * 4

        stage = self._wait(base, unit)
        to = self.at(base, stage) + row * self.row
        if cutlass.const_expr(len(pages) == 0):
            low, high = _halves(old)
            for j in cutlass.range(count):
                words = [cute.arch.shuffle_sync(x, j) for x in (low, high)]
                if cute.arch.shuffle_sync(there, j) != 0:
                    self._old(to + j * self.row, _whole(*words), lane)
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
            angle = Int64((at + attempt * self.ratio) // self.ratio * self.ratio)
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

    # Rows into the state

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

    @cute.jit
    def save(self, t, lane: Int32, first: Int32, apart: Int32):
        """Tokens number ``first``, ``first + apart``, … into the state, but for those that :meth:`_tail` writes."""
        tokens, requests = t.kv.shape[0], t.table.shape[0]
        ring = self.n * t.table.shape[1]
        count = (tokens - first + apart - 1) // apart
        for batch in cutlass.range((count + 31) // 32):
            token = first + (batch * 32 + lane) * apart
            request = self._read(t.requests, token, token < tokens, -1)
            position = Int32(self._read(t.positions, token, token < tokens, 0))
            mine = (request >= 0) & (request < Int64(requests)) & (position >= 0)
            row = Int32(request)
            page = self._raw_page(t, row, cutlass.max(position, 0), mine)
            start = Int32(self._read(t.starts, row, mine, 0))
            after = cutlass.min(Int32(self._read(t.starts, row + 1, mine, 0)), tokens)
            begun = position - (token - start)
            before = self._before(start + (self.ratio - 1) - begun % self.ratio < after, begun)
            left = (token - start) % ring >= ring - before
            wanted = mine & (token + ring >= after) & ~left
            page = Int32(cutlass.select_(wanted, self._known(t, page), Int32(-1)))
            self._keep(t, lane, Int32(0), self.d, page, token, position)

    @cute.jit
    def _keep(self, t, lane, begin, columns, page, token, position):
        """The tokens of lanes, if a page is given, into the state: some columns of each series from ``begin`` on."""
        offset = Int64(page) * t.state.stride[0] + Int64((position % self.n) * (2 * self.series * self.d))
        low, high = _halves(offset * 4)
        line = position % self.ratio
        todo = Uint32(cute.arch.vote_ballot_sync(page >= 0))
        steps = -(-columns // 128)
        together = max(1, 4 // (steps * self.series))  # tokens whose loads are under way at a time
        while todo != 0:
            sources, there = [], []
            for i in cutlass.range_constexpr(together):
                there.append(todo != 0)
                found = ptx.trailing_zeros(todo)
                sources.append(found if i == 0 else Int32(cutlass.select_(todo != 0, found, sources[0])))
                todo = todo & (todo - 1)
            for part in cutlass.range_constexpr(self.series):
                loaded = []
                for source in sources:
                    at = [cute.arch.shuffle_sync(x, source) for x in (token, line)]
                    words = [cute.arch.shuffle_sync(x, source) for x in (low, high)]
                    to = t.state_bytes + _whole(*words)
                    for step in cutlass.range_constexpr(steps):
                        column = 4 * lane + 128 * step
                        if cutlass.const_expr(columns % 128):
                            column = cutlass.min(column, columns - 4)  # of those beyond, what is stored is the same
                        column = column + begin + part * self.d
                        loaded.append((to, column, *self._four(t, Int64(at[0]), at[1], column)))
                for i in cutlass.range_constexpr(together):
                    if there[i]:
                        for to, column, kv, gate, bias in loaded[i * steps : (i + 1) * steps]:
                            values = wide(kv, self.bf16)
                            gates = [
                                ptx.add(a, b)
                                for a, b in zip(wide(gate, self.bf16), wide(bias, t.bias_bf16), strict=True)
                            ]
                            here = to + Int64(column) * 4
                            ptx.store(here, [ptx.bits(x) for x in values])
                            ptx.store(here + 4 * self.series * self.d, [ptx.bits(x) for x in gates])

    def _four(self, t, token: Int64, line: Int32, column: Int32) -> tuple:
        """Words of four values, their gates and bias."""
        shift = Int64(column * self.size)
        kv = ptx.load(t.kv_bytes + token * t.kv_step + shift, self.size, ptx.STREAMED)
        gate = ptx.load(t.gate_bytes + token * t.gate_step + shift, self.size, ptx.STREAMED)
        size = 2 if t.bias_bf16 else 4
        return kv, gate, ptx.load(t.bias_bytes + Int64(line) * t.bias_step + Int64(column * size), size)


def _halves(value: Int64) -> tuple[Int32, Int32]:
    return Int32(value & Int64(0xFFFFFFFF)), Int32(value >> 32)


def _whole(low: Int32, high: Int32) -> Int64:
    return (Int64(high) << 32) | (Int64(low) & Int64(0xFFFFFFFF))


def view(kv, gate, bias, positions, requests, starts, cos, sin, state, table, slots, end) -> SimpleNamespace:
    """The tensors of a call with the addresses and steps in bytes of those that are read 16 bytes at a time."""
    size, angle = kv.element_type.width // 8, cos.element_type.width // 8
    return SimpleNamespace(
        kv=kv, positions=positions, requests=requests, starts=starts, cos=cos, state=state, table=table, slots=slots,
        end=end, kv_bytes=kv.iterator.toint(), kv_step=kv.stride[0] * size, gate_bytes=gate.iterator.toint(),
        gate_step=gate.stride[0] * size, bias_bytes=bias.iterator.toint(),
        bias_step=bias.stride[0] * (bias.element_type.width // 8), bias_bf16=bias.element_type is BFloat16,
        cos_bytes=cos.iterator.toint(), cos_step=cos.stride[0] * angle, sin_bytes=sin.iterator.toint(),
        sin_step=sin.stride[0] * angle, state_bytes=state.iterator.toint(),
    )  # fmt: skip
