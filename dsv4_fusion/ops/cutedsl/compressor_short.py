"""Short windows of the paged compressor: a thread pools two or four columns of all rows, so nothing but the norm's sum
crosses warps. As many groups of warps as there are take turns with the units."""

from __future__ import annotations

import functools

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.memory import SmemAllocator

from . import compressor_row as row
from . import ptx
from .compressor_feed import FEEDERS, STOP, Feed
from .compressor_state import view

SAVERS = 4  # warps
COLUMNS = 2  # of a thread in the format "kv": an entry is ready sooner with 2, and takes fewer instructions with 4
POOLERS = {2: 16, 4: 12}  # warps, by columns: with more there are too few registers
TOGETHER = 4  # exponentials; where the bytes are what takes time, as in long windows, one at a time is quicker


class Short(Feed):
    """The kernel for windows of 4 or 8 rows.

    Args:
        d, ratio, series, n, rope, dtype, angle: as there.
        format: "kv", "fp8" or "mxfp4"; d is 128 for the latter.
        hadamard: transform the entry first.
        page_size: entries a page of the cache.
    """

    def __init__(
        self, d: int, ratio: int, series: int, n: int, rope: int, dtype, angle, format: str, hadamard: bool,
        page_size: int,
    ) -> None:  # fmt: skip
        self.per = COLUMNS if format == "kv" else 4
        self.lanes = d // self.per  # threads of a group
        self.warps, poolers = self.lanes // 32, POOLERS[self.per]
        self.bias_bytes = 4 * series * ratio * d
        sums = 2 * 4 * 16
        super().__init__(
            d, d, ratio, series, n, rope, dtype, angle, poolers=poolers, groups=poolers // self.warps,
            readers=32 * self.warps, savers=SAVERS, spare=self.bias_bytes + 4 * d + sums,
        )  # fmt: skip
        self.format, self.hadamard, self.page_size = format, hadamard, page_size
        self.bias_at, self.factors_at = self.spare_at, self.spare_at + self.bias_bytes
        self.sums_at = self.factors_at + 4 * d

    @cute.jit
    def __call__(
        self,
        kv: cute.Tensor,
        gate: cute.Tensor,
        bias: cute.Tensor,
        weight: cute.Tensor,
        positions: cute.Tensor,
        requests: cute.Tensor,
        starts: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        state: cute.Tensor,
        table: cute.Tensor,
        cache: cute.Tensor,
        slots: cute.Tensor,
        eps: Float32,
        clusters: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(
            kv, gate, bias, weight, positions, requests, starts, cos, sin, state, table, cache, slots, eps
        ).launch(grid=[clusters, 1, 1], block=[self.threads, 1, 1], min_blocks_per_mp=1, use_pdl=True, stream=stream)

    @cute.kernel
    def kernel(
        self,
        kv: cute.Tensor,
        gate: cute.Tensor,
        bias: cute.Tensor,
        weight: cute.Tensor,
        positions: cute.Tensor,
        requests: cute.Tensor,
        starts: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        state: cute.Tensor,
        table: cute.Tensor,
        cache: cute.Tensor,
        slots: cute.Tensor,
        eps: Float32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        base = SmemAllocator().allocate(self.bytes, 128).toint()
        end = Int64(cache.shape[0]) * self.page_size
        t = view(kv, gate, bias, positions, requests, starts, cos, sin, state, table, slots, end)
        if thread == 0:
            self.begin(base)
            cute.arch.mbarrier_init_fence()
        cute.arch.griddepcontrol_launch_dependents()  # nothing there may read before this kernel has ended
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()
        if warp < self.poolers:
            self._parameters(t, base, weight, thread)
            cute.arch.barrier(barrier_id=14, number_of_threads=32 * self.poolers)
            self._pool(t, base, cache, eps, thread, lane)
        else:
            if warp < self.poolers + FEEDERS:
                self.feed(t, base, warp - self.poolers, lane, Int32(0), Int32(block), Int32(blocks))
            else:
                saver = warp - (self.poolers + FEEDERS)
                self.save(t, lane, Int32(saver * blocks + block), Int32(SAVERS * blocks))

    @cute.jit
    def _parameters(self, t, base, weight, thread):
        """The norm's weight, and rows of the bias as the rows of a window take them, in fp32."""
        if thread < self.d // 4:
            size = 2 if weight.element_type is BFloat16 else 4
            words = ptx.load(weight.iterator.toint() + Int64(4 * thread * size), size)
            words = [ptx.bits(x) for x in row.wide(words, size == 2)]
            ptx.store_shared(base + self.factors_at + 16 * thread, words)
        chunks = self.length * self.d // 4
        for step in cutlass.range_constexpr(-(-chunks // (32 * self.poolers))):
            chunk = thread + 32 * self.poolers * step
            if chunk < chunks:
                at, column = chunk // (self.d // 4), 4 * (chunk % (self.d // 4))
                shift = Int32(cutlass.select_(at < self.length - self.ratio, 0, (self.series - 1) * self.d))
                size = 2 if t.bias_bf16 else 4
                source = t.bias_bytes + Int64(at % self.ratio) * t.bias_step + Int64((column + shift) * size)
                words = ptx.load(source, size)
                words = [ptx.bits(x) for x in row.wide(words, t.bias_bf16)]
                ptx.store_shared(base + self.bias_at + 16 * chunk, words)

    @cute.jit
    def _pool(self, t, base, cache, eps, thread, lane):
        mine, group = thread % self.lanes, thread // self.lanes
        column = self.per * mine
        unit, going = Int32(group), Int32(1)
        while going != 0:
            stage, parity = self.turn(unit)
            at = self.at(base, stage)
            ptx.barrier_wait(self.full(base, stage), parity)
            low, high, old, kind = ptx.load_shared(at + self.meta_at, 4)
            if kind == STOP:
                going = Int32(0)
            else:
                x = self._pooled(base, at, Int32(old), mine)
                angles = self._angles(at, column)
                ptx.barrier_arrive(self.empty(base, stage))
                num, den = x
                x = [ptx.div(a, b) for a, b in zip(num, den, strict=True)]
                total = row.squares(x)
                if cutlass.const_expr(self.warps > 1):
                    # Two places by turns: a warp that is ahead by one unit has waited for the others since
                    turn = (unit // self.groups) & 1
                    sums = base + self.sums_at + 4 * (16 * turn + group * self.warps)
                    if lane == 0:
                        ptx.store_shared(sums + 4 * (mine // 32), [ptx.bits(total)])
                    cute.arch.barrier(barrier_id=1 + group, number_of_threads=self.lanes)
                    found = [
                        word
                        for first in range(0, self.warps, 4)
                        for word in ptx.load_shared(sums + 4 * first, min(self.warps, 4))
                    ]
                    total = row.neighbours([ptx.real(word) for word in found])
                factors = [ptx.real(word) for word in ptx.load_shared(base + self.factors_at + 4 * column, self.per)]
                x = row.norm(x, total, factors, self.d, eps)
                if cutlass.const_expr(self.rope > 0):
                    x = row.rotate(x, *angles, column >= self.d - self.rope)
                slot = (Int64(high) << 32) | Int64(low)
                self._store(cache, slot, x, mine, column)
                unit = unit + self.groups

    @cute.jit
    def _pooled(self, base, at, old, mine):
        """Sums of products and of weights. The last row is of this call; that others are too is told apart."""
        rows, columns, half = self.length, self.per, 4 * self.columns
        gates = cute.make_rmem_tensor((rows * columns,), Float32)
        num = cute.make_rmem_tensor((columns,), Float32)
        for r in cutlass.range_constexpr(rows - 1):
            for i, word in enumerate(ptx.load_shared(at + (r * self.row + half) + 4 * columns * mine, columns)):
                gates[r * columns + i] = ptx.real(word)
        for i, gate in enumerate(self._new_gates(base, at, rows - 1, mine)):
            gates[(rows - 1) * columns + i] = gate
        if old < rows - 1:
            self.rarely(base)
            for r in cutlass.range_constexpr(rows - 1):
                for i, gate in enumerate(self._new_gates(base, at, r, mine)):
                    gates[r * columns + i] = row.choose(r >= old, gate, gates[r * columns + i])
        for i in cutlass.range_constexpr(columns):
            own = [gates[r * columns + i] for r in range(rows)]
            for r, weight in enumerate(row.weights(own, functools.reduce(ptx.maximum_nan, own), TOGETHER)):
                gates[r * columns + i] = weight
        if old < rows - 1:
            self.rarely(base)
            self._sum(at, old, mine, gates, num, False)
        else:
            self._sum(at, old, mine, gates, num, True)
        den = [row.tree([gates[r * columns + i] for r in range(rows)]) for i in range(columns)]
        return [num[i] for i in range(columns)], den

    def _new_gates(self, base, at, r: int, mine) -> list[Float32]:
        """A row of this call, with the bias."""
        columns, half = self.per, 4 * self.columns
        words = ptx.load_shared(at + (r * self.row + half) + self.size * columns * mine, self.size * columns // 4)
        bias = ptx.load_shared(base + self.bias_at + r * half + 4 * columns * mine, columns)
        fresh = row.wide(words, self.bf16)
        return [ptx.add(gate, ptx.real(word)) for gate, word in zip(fresh, bias, strict=True)]

    def _sum(self, at, old, mine, weights, num, usual: bool) -> None:
        """The sum of the products; ``usual`` if only the last row is of this call."""
        rows, columns, count = self.length, self.per, self.length // 2
        products = []
        for r in range(count):  # a few rows at a time: the first and second half's, which are added first
            terms = []
            for row_ in (r, r + count):
                line = at + row_ * self.row
                new_at, words = line + self.size * columns * mine, self.size * columns // 4
                if row_ == rows - 1:
                    values = row.wide(ptx.load_shared(new_at, words), self.bf16)
                else:
                    values = row.wide(ptx.load_shared(line + 4 * columns * mine, columns), False)
                    if self.bf16 and not usual:
                        fresh = row.wide(ptx.load_shared(new_at, words), self.bf16)
                        values = [row.choose(row_ >= old, a, b) for a, b in zip(fresh, values, strict=True)]
                terms.append([ptx.mul(weights[row_ * columns + i], values[i]) for i in range(columns)])
            products.append([ptx.add(a, b) for a, b in zip(*terms, strict=True)])
        for i in range(columns):
            num[i] = row.tree([product[i] for product in products])

    def _angles(self, at: Int32, column: Int32) -> list[list[Float32]]:
        """Cosines and sines of a thread's pairs; of columns that are not rotated, any."""
        pair = cutlass.max(column - (self.d - self.rope), 0) // 2
        address = at + self.angles_at
        if self.angle_bf16:
            word = address + 4 * (pair // 2)
            words = [ptx.load_shared(word + part * self.angle_bytes, 1) for part in range(2)]
            if self.per == 2:  # one of the two in a word
                shift = Uint32(16 * (1 - pair % 2))
                return [[ptx.real((word << shift) & Uint32(0xFFFF0000))] for (word,) in words]
            return [row.wide(word, True) for word in words]
        found = [ptx.load_shared(address + 4 * pair + part * self.angle_bytes, self.per // 2) for part in range(2)]
        return [row.wide(words, False) for words in found]

    @cute.jit
    def _store(self, cache, slot, x, mine, column):
        page, place = row.place(cache, slot, self.page_size)
        d = self.d
        if cutlass.const_expr(self.format == "kv"):
            to = page + place * (d + 64) + Int64(column)
            codes, exponent = row.to_fp8(x, 64 // self.per)
            if column < d - 64:
                if cutlass.const_expr(self.per == 4):
                    ptx.store(to, [codes])
                else:
                    ptx.store_bytes(to, 2, codes)
                if column % 64 == 0:
                    scale = page + self.page_size * (d + 64) + place * 8 + Int64(column // 64)
                    ptx.store_bytes(scale, 1, exponent)
            else:
                ptx.store(to + Int64(column - (d - 64)), row.bf16_words(x))
        else:
            x = row.rounded(x)
            if cutlass.const_expr(self.hadamard):
                x = row.hadamard(x, mine)
            if cutlass.const_expr(self.format == "fp8"):
                codes, exponent = row.to_fp8(x, 32)
                ptx.store(page + place * d + Int64(column), [codes])
                if mine == 0:
                    ptx.store(page + self.page_size * d + place * 4, [row.scale_bits(exponent)])
            else:
                codes, exponent = row.to_mxfp4(x, 8)
                ptx.store_bytes(page + place * (d // 2) + Int64(column // 2), 2, codes)
                if mine % 8 == 0:
                    scale = page + self.page_size * (d // 2) + place * 4 + Int64(mine // 8)
                    ptx.store_bytes(scale, 1, exponent)
