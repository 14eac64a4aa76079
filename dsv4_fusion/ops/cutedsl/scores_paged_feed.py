"""What feeds the paged scores: a block's part of the keys, and the warps that bring them, lay out queries, write −inf.

A stage holds 64 keys, a page, some neighbours, or a part of one, as they are in the cache: values, then scales, and
which of its pages were found. Queries are laid out where the product expects them, for the next sequence while this
one is scored.
"""

from __future__ import annotations

import functools

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float8E4M3FN, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum

from . import ptx
from .scores import MINUS_INFINITY, SHARED
from .scores_mxfp4 import counted, expand, exponent, folded, largest, table
from .scores_pieces import within

KEYS = 64  # of a stage: a page, some neighbours, or a part of one; one warpgroup takes them
COLUMNS = 128  # of a product, at most: the heads of some queries of a sequence
STAGES = 24  # at most
CONSUMERS = 3  # warpgroups, where a product is narrow enough for their registers
NARROW = 64  # columns
TOGETHER = 64  # dims of FP8 that the tensor core adds; these sums, which it cuts to 14 bits, are added in fp32
CHUNK = 2048  # keys of which a block looks for those that no query sees
LAYING = 64  # threads that lay out queries
AT_ONCE = 4  # pieces of these whose loads are under way
WARP = 32


class Feed:
    """The parts of the kernel that do not multiply.

    Args:
        heads: 32, 64 or 128.
        d: 64 or 128.
        fp8: e4m3 queries and keys with scales; MXFP4 otherwise.
        queries: of a sequence, 1 to 4.
        page_size: a power of two, 16 at least.
        each: whether every query has a length of its own.
    """

    def __init__(self, heads: int, d: int, fp8: bool, queries: int, page_size: int, each: bool) -> None:
        self.heads, self.d, self.fp8, self.queries, self.page, self.each = heads, d, fp8, queries, page_size, each
        self.columns = heads * queries
        self.share = max(n for n in range(1, queries + 1) if queries % n == 0 and heads * n <= max(COLUMNS, heads))
        self.width, self.passes = heads * self.share, queries // self.share  # a product's columns; products
        self.consumers = CONSUMERS if self.width <= NARROW else 2
        self.pages, self.rows = max(1, KEYS // page_size), min(KEYS, page_size)  # of a stage, and of a page there
        self.row = d if fp8 else d // 2  # bytes of a key
        self.parts = max(1, d // TOGETHER) if fp8 else 1  # sums of a product
        # The sums over heads of one product are made while the next one is in the making
        self.apart = not fp8 and self.passes == 1
        per_q, per_k = self.columns * (d + 4), KEYS * (self.row + 4) + 24
        self.tiles_q = 2 if 2 * per_q <= 96 * 1024 else 1
        stages = min(STAGES, (SHARED - 4096 - self.tiles_q * per_q) // per_k)
        self.stages = stages - stages % self.consumers  # one of them has the same ones always, and misses no phase

    def _layout(self, dtype, rows: int, stages: int):
        atom = sm90.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, self.d)
        return cute.tile_to_shape(warpgroup.make_smem_layout_atom(atom, dtype), (rows, self.d, stages), order=(0, 1, 2))

    # What there is to do

    def _end(self, lengths, b, query, length) -> Int32:
        """Before which keys a query sees."""
        if self.each:
            return within(Int64(lengths[b, query]), length)
        return within(cutlass.max(Int64(lengths[b]), Int64(0)) - (self.queries - 1 - query), length)

    def _tiles(self, lengths, b, length) -> Int32:
        """Stages of a sequence, of which some query sees a key."""
        ends = [
            self._end(lengths, b, query, length) for query in range(0 if self.each else self.queries - 1, self.queries)
        ]
        return (functools.reduce(cutlass.max, ends) + KEYS - 1) // KEYS

    @cute.jit
    def _part(self, lengths, out):
        """A block's part of all stages: the first one's sequence and place there, and how many."""
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        lane = cute.arch.lane_idx()
        batch, length = out.shape[0], out.shape[2]
        rounds = (batch + WARP - 1) // WARP
        total = Int32(0)
        for i in cutlass.range(0, rounds, unroll=4):
            b = i * WARP + lane
            total += select_integer(b < batch, self._tiles(lengths, cutlass.min(b, batch - 1), length), Int32(0))
        for bit in cutlass.range_constexpr(5):
            total += cute.arch.shuffle_sync_bfly(total, offset=1 << bit)
        count, more = total // blocks, total % blocks
        begin = block * count + cutlass.min(block, more)
        count += select_integer(block < more, Int32(1), Int32(0))

        before, sequence, tile = Int32(0), Int32(0), Int32(0)
        for i in cutlass.range(0, rounds):
            b = i * WARP + lane
            mine = select_integer(b < batch, self._tiles(lengths, cutlass.min(b, batch - 1), length), Int32(0))
            upto = mine
            for bit in cutlass.range_constexpr(5):
                other = cute.arch.shuffle_sync_up(upto, offset=1 << bit)
                upto += select_integer(lane >= 1 << bit, other, Int32(0))
            first = before + upto - mine
            here = (begin >= first) & (begin < first + mine)
            sequence = select_integer(here, b, sequence)
            tile = select_integer(here, begin - first, tile)
            before += cute.arch.shuffle_sync(upto, offset=WARP - 1)
        for bit in cutlass.range_constexpr(5):  # all but one are 0
            sequence = cutlass.max(sequence, cute.arch.shuffle_sync_bfly(sequence, offset=1 << bit))
            tile = cutlass.max(tile, cute.arch.shuffle_sync_bfly(tile, offset=1 << bit))
        return sequence, tile, count

    # The warp that brings keys

    @cute.jit
    def _bring(self, storage, tma_k, k, cache, table, lengths, out, work):
        sequence, tile, left = work
        stage, phase = Int32(0), Int32(1)
        few = WARP // self.pages  # stages whose pages the lanes of a warp know
        full, empty, found = (range_.data_ptr() for range_ in (storage.full, storage.empty, storage.found))
        while left > 0:
            last = cutlass.min(self._tiles(lengths, sequence, out.shape[2]), tile + left)
            ahead = self._load_page(table, sequence, tile)
            for begin in cutlass.range(tile, last, few):
                pages = self._page(cache, table, ahead, begin)
                ahead = self._load_page(table, sequence, begin + few)  # which nothing needs until then
                for at in cutlass.range(begin, cutlass.min(begin + few, last)):
                    several = [cute.arch.shuffle_sync(pages, (at - begin) * self.pages + i) for i in range(self.pages)]
                    mask = Int32(0)
                    for i in cutlass.range_constexpr(self.pages):
                        mask += select_integer(several[i] >= 0, Int32(1 << i), Int32(0))
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    with cute.arch.elect_one():
                        cute.make_tensor(found + stage, cute.make_layout(1))[0] = mask
                        size = cute.arch.popc(mask) * (self.rows * (self.row + 4))
                        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, size)
                        for i in cutlass.range_constexpr(self.pages):
                            self._copy(storage, cache, several[i], at, stage, i)
                    if cutlass.const_expr(self.fp8):
                        for i in cutlass.range_constexpr(self.pages):
                            self._copy_values(storage, tma_k, k, several[i], at, stage, i)
                    stage += 1
                    if stage == self.stages:
                        stage = Int32(0)
                        phase = phase ^ 1
            left -= last - tile
            sequence += 1
            tile = Int32(0)

    def _place(self, tile):
        """Of a lane's page in the table: the first lanes' are those of the stage ``tile``, and so on."""
        lane = cute.arch.lane_idx()
        return (tile + lane // self.pages) * KEYS // self.page + lane % self.pages

    def _load_page(self, table, sequence, tile):
        return table[sequence, cutlass.min(self._place(tile), table.shape[1] - 1)]

    def _page(self, cache, table, number, tile) -> Int32:
        """What was loaded, or −1 for no page of the cache."""
        number = Int64(number)
        known = (number >= 0) & (number < Int64(cache.shape[0])) & (self._place(tile) < table.shape[1])
        return select_integer(known, Int32(number), Int32(-1))

    @cute.jit
    def _copy(self, storage, cache, page, at, stage, i: cutlass.Constexpr):
        """Scales, and values of MXFP4, by one thread."""
        if page >= 0:
            barrier = storage.full.data_ptr() + stage
            row, to = at * KEYS % self.page, stage * KEYS + i * self.rows  # of the page, and of all stages
            source = cache.iterator + Int64(page) * cache.stride[0]
            if cutlass.const_expr(not self.fp8):
                values = storage.tile_k.data_ptr() + to * self.row
                ptx.bulk(values, source + row * self.row, self.rows * self.row, barrier)
            scales = source + (self.page * self.row + row * 4)
            ptx.bulk(storage.scales.data_ptr() + to, scales, self.rows * 4, barrier)

    @cute.jit
    def _copy_values(self, storage, tma_k, k, page, at, stage, i: cutlass.Constexpr):
        """Values of FP8, by a warp."""
        if page >= 0:
            layout = self._layout(Float8E4M3FN, self.rows, self.stages * self.pages)
            s_k = storage.tile_k.get_tensor(layout.outer, swizzle=layout.inner)
            tiles = cute.local_tile(k, (self.rows, self.d), (None, None, None))
            own, theirs = cpasync.tma_partition(
                tma_k, 0, cute.make_layout(1), cute.group_modes(s_k, 0, 2), cute.group_modes(tiles, 0, 2)
            )
            cute.copy(
                tma_k,
                theirs[(None, at * KEYS % self.page // self.rows, 0, page)],
                own[(None, stage * self.pages + i)],
                tma_bar_ptr=storage.full.data_ptr() + stage,
            )

    # The warps that lay out queries

    @cute.jit
    def _lay_out(self, storage, q, q_scale, weights, lengths, out, work, thread):
        sequence, tile, left = work
        slot, phase = Int32(0), Int32(1)
        while left > 0:
            last = cutlass.min(self._tiles(lengths, sequence, out.shape[2]), tile + left)
            if last > tile:
                cute.arch.mbarrier_wait(storage.q_empty.data_ptr() + slot, phase)
                count = (self.columns + LAYING - 1) // LAYING if cutlass.const_expr(self.fp8) else 0
                columns = [cutlass.min(i * LAYING + thread, self.columns - 1) for i in range(count)]
                kept = [weights[Int64(sequence) * self.columns + column] for column in columns]
                pieces = self.columns * self._per() // LAYING
                together = AT_ONCE if cutlass.const_expr(pieces % AT_ONCE == 0) else 2
                for i in cutlass.range(0, pieces, together):
                    some = [(i + j) * LAYING + thread for j in range(together)]
                    brought = [self._load(q, q_scale, weights, sequence, piece) for piece in some]
                    for j in cutlass.range_constexpr(together):
                        self._lay(storage, slot, some[j], brought[j])
                for i in cutlass.range_constexpr(count):
                    to = storage.weights.data_ptr() + (slot * self.columns + columns[i])
                    ptx.store_shared(to, [ptx.bits(kept[i])])
                cute.arch.fence_view_async_shared()
                cute.arch.mbarrier_arrive(storage.q_full.data_ptr() + slot)
                slot += 1
                if slot == self.tiles_q:
                    slot = Int32(0)
                    phase = phase ^ 1
            left -= last - tile
            sequence += 1
            tile = Int32(0)

    def _per(self) -> int:
        """Pieces of a row that threads take: of 16 bytes in FP8, quarters in MXFP4."""
        return self.d // 16 if self.fp8 else 4

    def _load(self, q, q_scale, weights, sequence, piece) -> tuple:
        """A piece of a row; of MXFP4 also its scales and its weight. All loads come before what needs one."""
        row = Int64(sequence) * self.columns + piece // self._per()
        source = q.iterator + (row * q.stride[0] + piece % self._per() * (16 if self.fp8 else self.d // 8))
        if self.fp8:
            return (ptx.load(source, 4),)
        return ptx.load(source, self.d // 32), Uint32(q_scale[row]), weights[row]

    @cute.jit
    def _lay(self, storage, slot, piece, loaded):
        """What :meth:`_load` gives to where the product expects it."""
        column, part = piece // self._per(), piece % self._per()
        place = slot * self.columns + column
        to = cute.recast_ptr(storage.tile_q.data_ptr(), dtype=cutlass.Uint8) + place * self.d
        mask = column % 8 if cutlass.const_expr(self.d == 128) else column // 2 % 4  # of a row's pieces of 16 bytes
        if cutlass.const_expr(self.fp8):
            ptx.store_shared(to + (part ^ mask) * 16, loaded[0])
        else:
            packed, scales, weight = loaded
            e = counted(packed, exponent(scales, part * len(packed) // 4))
            row = largest(e, (1, 2))
            sizes = table(e, row)
            for word in cutlass.range_constexpr(len(packed)):
                for half, expanded in enumerate(expand(packed[word], sizes)):
                    ptx.store_shared(to + (((2 * word + half) ^ mask) * 16 + part * 4), [expanded])
            if part == 0:
                ptx.store_shared(storage.weights.data_ptr() + place, [ptx.bits(folded(weight, row))])

    # The warp that writes where nothing is seen

    @cute.jit
    def _fill(self, lengths, out):
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        lane = cute.arch.lane_idx()
        batch, length = out.shape[0], out.shape[2]
        chunks = (length + CHUNK - 1) // CHUNK
        for piece in cutlass.range(block, batch * chunks, blocks):
            b, chunk = piece // chunks, piece % chunks
            first = cutlass.max(chunk * CHUNK, self._tiles(lengths, b, length) * KEYS)
            last = cutlass.min(chunk * CHUNK + CHUNK, length)
            for query in cutlass.range_constexpr(self.queries):
                for key in cutlass.range(first + lane, last, WARP):
                    out[b, query, key] = ptx.real(Uint32(MINUS_INFINITY)).to(self.result)


def select_integer(condition, yes: Int32, no: Int32) -> Int32:
    return Int32(cutlass.select_(condition, yes, no))
