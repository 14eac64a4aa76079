"""Long windows of the paged compressor: a cluster has an entry, each block 64 columns of it, which are a block of its
quantisation too. All warps that pool share a unit: each has every sixteenth row. A warp of its own finishes units,
while the others pool the next: it adds what the warps have, and the blocks exchange one number, the sum of squares."""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.memory import SmemAllocator

from .._compressor import BLOCK
from . import compressor_row as row
from . import ptx
from .compressor_feed import FEEDERS, STOP, Feed
from .compressor_state import view

POOLERS, SAVERS = 16, 3  # warps; the last one of a block finishes
LARGEST = 3  # buffers of maxima
LEAST = 0x80000000  # of their integers


class Long(Feed):
    """The kernel for windows of 32, 64 or 128 rows, in the format "kv".

    Args:
        d, ratio, series, n, rope, dtype, angle: as there.
        page_size: entries a page of the cache.
    """

    def __init__(self, d: int, ratio: int, series: int, n: int, rope: int, dtype, angle, page_size: int) -> None:
        maxima, sums, exchanged = LARGEST * 4 * BLOCK, 2 * POOLERS * 8 * BLOCK, 2 * 4 * 8
        barriers = 6 * 8
        super().__init__(
            d, BLOCK, ratio, series, n, rope, dtype, angle, poolers=POOLERS, groups=1, readers=POOLERS + 1,
            savers=SAVERS + 1, spare=maxima + sums + exchanged + barriers,
        )  # fmt: skip
        self.page_size = page_size
        self.rows = self.length // POOLERS  # of a thread
        self.sums_at = self.spare_at
        self.maxima_at = self.sums_at + sums
        self.exchanged_at = self.maxima_at + maxima
        self.more_at = self.exchanged_at + exchanged  # barriers: sums full, sums empty, exchanged; two of each

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
        ).launch(
            grid=[clusters * self.cluster, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            min_blocks_per_mp=1,
            use_pdl=True,
            stream=stream,
        )

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
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        base = SmemAllocator().allocate(self.bytes, 128).toint()
        end = Int64(cache.shape[0]) * self.page_size
        t = view(kv, gate, bias, positions, requests, starts, cos, sin, state, table, slots, end)
        begin = rank * BLOCK
        if thread == 0:
            self.begin(base)
            for turn in cutlass.range_constexpr(2):
                ptx.barrier_init(self._more(base, 0, Int32(turn)), POOLERS)
                ptx.barrier_init(self._more(base, 1, Int32(turn)), 1)
                ptx.barrier_init(self._more(base, 2, Int32(turn)), 1)
            cute.arch.mbarrier_init_fence()
        if thread < LARGEST * BLOCK:
            ptx.store_shared(base + self.maxima_at + 4 * thread, [Uint32(LEAST)])
        cute.arch.griddepcontrol_launch_dependents()  # nothing there may read before this kernel has ended
        cute.arch.sync_threads()
        cute.arch.cluster_arrive_relaxed()
        cute.arch.griddepcontrol_wait()
        # No block sends before all have their barriers, nor ends before it has what the others send: the warp that does
        # both waits for that first, the others last, when it has long been so
        if warp < POOLERS:
            self._pool(t, base, begin, warp, lane)
            cute.arch.cluster_wait()
        else:
            if warp < POOLERS + FEEDERS:
                self.feed(
                    t, base, warp - POOLERS, lane, begin, Int32(block // self.cluster), Int32(blocks // self.cluster)
                )
                cute.arch.cluster_wait()
            else:
                if warp < POOLERS + FEEDERS + SAVERS:
                    saver = warp - (POOLERS + FEEDERS)
                    self.save(t, lane, Int32(saver * blocks + block), Int32(SAVERS * blocks))
                    cute.arch.cluster_wait()
                else:
                    cute.arch.cluster_wait()
                    self._finish(base, cache, weight, eps, rank, lane)

    def _more(self, base: Int32, which: int, turn: Int32) -> Int32:
        return base + (self.more_at + 16 * which) + 8 * turn

    @cute.jit
    def _pool(self, t, base, begin, warp, lane):
        rows, columns = self.rows, 2
        # The bias of this thread's rows and columns, which are the same in every unit
        bias = cute.make_rmem_tensor((rows * columns,), Float32)
        for r in cutlass.range_constexpr(rows):
            at = warp + POOLERS * r
            shift = Int32(cutlass.select_(at < self.length - self.ratio, 0, (self.series - 1) * self.d))
            size = 2 if t.bias_bf16 else 4
            source = t.bias_bytes + Int64(at % self.ratio) * t.bias_step + Int64((begin + shift + 2 * lane) * size)
            for i, value in enumerate(row.wide(ptx.load(source, size // 2), t.bias_bf16)):
                bias[r * columns + i] = value
        unit, going = Int32(0), Int32(1)
        while going != 0:
            stage, parity = self.turn(unit)
            at = self.at(base, stage)
            ptx.barrier_wait(self.full(base, stage), parity)
            _, _, old, kind = ptx.load_shared(at + self.meta_at, 4)
            if kind == STOP:
                going = Int32(0)
            else:
                self._unit(base, at, stage, unit, Int32(old), bias, warp, lane)
                unit = unit + 1

    @cute.jit
    def _unit(self, base, at, stage, unit, old, bias, warp, lane):
        rows, columns, half = self.rows, 2, 4 * BLOCK
        gates = cute.make_rmem_tensor((rows * columns,), Float32)
        values = cute.make_rmem_tensor((rows * columns,), Float32)
        for r in cutlass.range_constexpr(rows):
            line = at + (warp + POOLERS * r) * self.row + 8 * lane
            for i, word in enumerate(ptx.load_shared(line + half, 2)):
                gates[r * columns + i] = ptx.real(word)
            for i, word in enumerate(ptx.load_shared(line, 2)):
                values[r * columns + i] = ptx.real(word)
        if old <= warp + POOLERS * (rows - 1):
            self.rarely(base)
            for r in cutlass.range_constexpr(rows):
                new = warp + POOLERS * r >= old
                line = at + (warp + POOLERS * r) * self.row + 4 * lane
                gate, value = [[x[r * columns + i] for i in range(columns)] for x in (gates, values)]
                if cutlass.const_expr(self.bf16):
                    gate, value = [row.wide(ptx.load_shared(line + x, 1), True) for x in (half, 0)]
                for i in cutlass.range_constexpr(columns):
                    index = r * columns + i
                    gates[index] = row.choose(new, ptx.add(gate[i], bias[index]), gates[index])
                    values[index] = row.choose(new, value[i], values[index])
        cute.arch.sync_warp()
        if lane == 0:
            ptx.barrier_arrive(self.empty(base, stage))
        # Three buffers: while one is read, the last one is made ready for the unit after the next
        maxima = base + self.maxima_at + Int32(Uint32(unit) % LARGEST) * (4 * BLOCK)
        for i in cutlass.range_constexpr(columns):
            largest = gates[i]
            for r in cutlass.range_constexpr(1, rows):
                largest = ptx.maximum_nan(largest, gates[r * columns + i])
            ptx.max_shared(maxima + 8 * lane + 4 * i, row.ordered(largest))
        cute.arch.barrier(barrier_id=14, number_of_threads=32 * POOLERS)
        found = [row.unordered(Int32(word)) for word in ptx.load_shared(maxima + 8 * lane, 2)]
        if warp == 0:
            ready = base + self.maxima_at + Int32(Uint32(unit + 2) % LARGEST) * (4 * BLOCK)
            ptx.store_shared(ready + 8 * lane, [Uint32(LEAST)] * 2)
        sums = []
        for i in cutlass.range_constexpr(columns):
            weights = row.weights([gates[r * columns + i] for r in range(rows)], found[i], 1)
            sums.append(row.tree([ptx.mul(weights[r], values[r * columns + i]) for r in range(rows)]))
            sums.append(row.tree(weights))
        turn = unit & 1
        ptx.barrier_wait(self._more(base, 1, turn), ((unit >> 1) & 1) ^ 1)
        ptx.store_shared(
            base + self.sums_at + turn * (POOLERS * 8 * BLOCK) + warp * (8 * BLOCK) + 16 * lane,
            [ptx.bits(x) for x in sums],
        )
        cute.arch.sync_warp()
        if lane == 0:
            ptx.barrier_arrive(self._more(base, 0, turn))

    @cute.jit
    def _finish(self, base, cache, weight, eps, rank, lane):
        column = rank * BLOCK + 2 * lane
        size = 2 if weight.element_type is BFloat16 else 4
        words = ptx.load(weight.iterator.toint() + Int64(column * size), size // 2)
        factors = row.wide(words, size == 2)
        last = rank == self.cluster - 1
        unit, going = Int32(0), Int32(1)
        while going != 0:
            stage, parity = self.turn(unit)
            at = self.at(base, stage)
            ptx.barrier_wait(self.full(base, stage), parity)
            low, high, _, kind = ptx.load_shared(at + self.meta_at, 4)
            if kind == STOP:
                going = Int32(0)
            else:
                angles = self._angles(at, lane)
                cute.arch.sync_warp()
                if lane == 0:
                    ptx.barrier_arrive(self.empty(base, stage))
                turn, phase = unit & 1, (unit >> 1) & 1
                exchanged = self._more(base, 2, turn)
                if lane == 0:
                    ptx.barrier_expect(exchanged, 4 * self.cluster)
                ptx.barrier_wait(self._more(base, 0, turn), phase)
                x = self._whole(base + self.sums_at + turn * (POOLERS * 8 * BLOCK) + 16 * lane)
                cute.arch.sync_warp()
                if lane == 0:
                    ptx.barrier_arrive(self._more(base, 1, turn))
                place = base + self.exchanged_at + turn * 32
                total = row.squares(x)
                if lane < self.cluster:
                    ptx.send(place + 4 * rank, exchanged, lane, ptx.bits(total))
                ptx.barrier_wait(exchanged, phase, "cluster")
                parts = [ptx.real(ptx.load_shared(place + 4 * i, 1)[0]) for i in range(self.cluster)]
                x = row.norm(x, row.neighbours(parts), factors, self.d, eps)
                slot = (Int64(high) << 32) | Int64(low)
                page, inside = row.place(cache, slot, self.page_size)
                to = page + inside * (self.d + BLOCK)
                if last:
                    x = row.rotate(x, *angles, lane >= 0)
                    ptx.store(to + Int64(self.d - BLOCK + 4 * lane), row.bf16_words(x))
                else:
                    codes, exponent = row.to_fp8(x, 32)
                    ptx.store_bytes(to + Int64(column), 2, codes)
                    if lane == 0:
                        scale = page + self.page_size * (self.d + BLOCK) + inside * 8 + Int64(rank)
                        ptx.store_bytes(scale, 1, exponent)
                unit = unit + 1

    def _whole(self, address: Int32) -> list[Float32]:
        """Two columns, of what the warps have of them."""
        parts = [ptx.load_shared(address + warp * (8 * BLOCK), 4) for warp in range(POOLERS)]
        sums = [row.tree([ptx.real(part[i]) for part in parts]) for i in range(4)]
        return [ptx.div(sums[0], sums[1]), ptx.div(sums[2], sums[3])]

    def _angles(self, at: Int32, lane: Int32) -> list[list[Float32]]:
        """A cosine and a sine, of the only block with columns that are rotated."""
        if self.angle_bf16:
            address = at + self.angles_at + 4 * (lane // 2)
            words = [ptx.load_shared(address + part * self.angle_bytes, 1)[0] for part in range(2)]
            shift = Uint32(16 * (1 - lane % 2))
            return [[ptx.real((word << shift) & Uint32(0xFFFF0000))] for word in words]
        address = at + self.angles_at + 4 * lane
        return [[ptx.real(ptx.load_shared(address + part * self.angle_bytes, 1)[0])] for part in range(2)]
