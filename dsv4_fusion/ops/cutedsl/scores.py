"""The indexer's scores on SM90: TMA, WGMMA, warp-specialised; a query's heads are columns, keys are rows.

A matrix product of 64 keys and all heads of some queries stays in registers, where heads lie in a thread and its three
neighbours: relu, weight and sum are two instructions a product, and the sum over heads crosses two lanes. While one of
two warpgroups sums, the tensor cores work for the other. With FP8 they are done sooner than the sums are: there a
warpgroup has two products, one of which is in the making while it sums the other.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
import torch
from cutlass import Float32, Int32, Int64, Uint32, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from . import launch, ptx
from .scores_mxfp4 import LAYING, LINE, Queries
from .scores_pieces import COLUMNS, KEYS, SLOTS, Pieces, piece_of, rounds_of

GROUP = 128  # threads of a warpgroup
CONSUMERS = 2
PART = KEYS // CONSUMERS  # keys of a stage, which one of them takes
TURNS = 1  # the first of two named barriers
SHARED = 227 * 1024
MINUS_INFINITY = 0xFF800000


class Scores(Pieces):
    """The kernel: scores of all keys for ``COLUMNS / heads`` queries at a time.

    Args:
        heads: 32, 64 or 128.
        d: 64 or 128.
        fp8: e4m3 queries and keys, the latter with a scale; bf16 otherwise.
        limits: "all", "range" (starts and ends) or "causal" (positions).
        packed: MXFP4 queries, which warps expand to e4m3 on their way; keys are expanded before.
    """

    def __init__(self, heads: int, d: int, fp8: bool, limits: str, packed: bool = False) -> None:
        fp8 = fp8 or packed
        self.heads, self.d, self.fp8, self.limits, self.packed = heads, d, fp8, limits, packed
        self.queries = COLUMNS // heads
        self.parts = 2 if fp8 or heads == 32 else 1  # products of a warpgroup
        self.columns = COLUMNS // self.parts
        self.own = self.columns // heads  # queries of a product: 1, 2 or 4
        self.slot = 2 * self.queries + 2  # starts and ends, and the first step and the one after the last
        size = 1 if fp8 else 2
        self.line = min(d, LINE // size)  # values of a row that lie together
        self.lines = d // self.line
        self.step = 32 // size  # of a matrix instruction
        self.tiles_q = 2  # queries of the work after this one are loaded meanwhile
        per_q, per_k = COLUMNS * d * size, PART * d * size
        self.laying = Queries(COLUMNS, d) if packed else None
        waiting = self.laying.bytes if packed else 0
        self.stages = min(12, (SHARED - 4096 - waiting - self.tiles_q * (per_q + 4 * COLUMNS)) // per_k)
        # Of a thread that loads or lays out, and of one that multiplies: together no more than the block began with
        self.registers = (72, 216) if packed else (40, 232)
        self.q_bytes, self.k_bytes = per_q + 4 * COLUMNS, per_k

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        weights: cute.Tensor,
        q_scale: cute.Tensor | None,
        k_scale: cute.Tensor | None,
        start: cute.Tensor | None,
        end: cute.Tensor | None,
        out: cute.Tensor,
        ratio: Int32,
        per: Int32,
        processors: Int32,
        stream: cuda.CUstream,
    ):
        dtype = k.element_type
        q_layout, k_layout = self._layout(dtype, COLUMNS, self.tiles_q), self._layout(dtype, PART, self.stages)
        w_layout = cute.make_layout((COLUMNS, 1, self.tiles_q), stride=(1, COLUMNS, COLUMNS))
        load = cpasync.CopyBulkTensorTileG2SOp()
        tma_q, q_tma, tma_w, w_tma = None, q, None, weights
        if cutlass.const_expr(not self.packed):
            tma_q, q_tma = cpasync.make_tiled_tma_atom(
                load, q, cute.slice_(q_layout, (None, None, 0)), (COLUMNS, self.line)
            )
            tma_w, w_tma = cpasync.make_tiled_tma_atom(
                load, weights, cute.slice_(w_layout, (None, None, 0)), (COLUMNS, 1)
            )
        tma_k, k_tma = cpasync.make_tiled_tma_atom(load, k, cute.slice_(k_layout, (None, None, 0)), (PART, self.line))

        @cute.struct
        class Shared:
            barriers_q: cute.struct.MemRange[Int64, self.tiles_q * 2]
            barriers_k: cute.struct.MemRange[Int64, self.stages * 2]
            barriers_found: cute.struct.MemRange[Int64, SLOTS * 2]
            tile_q: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(q_layout)], 1024]
            tile_k: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(k_layout)], 1024]
            tile_w: cute.struct.Align[cute.struct.MemRange[Float32, COLUMNS * self.tiles_q], 128]
            limits: cute.struct.MemRange[Int32, SLOTS * self.slot]
            waiting: cute.struct.Align[cute.struct.MemRange[cutlass.Uint8, self.laying.bytes if self.packed else 0], 16]

        self.shared, self.dtype, self.result = Shared, dtype, out.element_type
        groups = (out.shape[0] + self.queries - 1) // self.queries
        chunks = (out.shape[1] + per * KEYS - 1) // (per * KEYS)
        self.kernel(
            tma_q, q_tma, tma_k, k_tma, tma_w, w_tma, q_scale, k_scale, start, end, out,
            q_layout, k_layout, w_layout, groups, chunks, per, ratio,
        ).launch(
            grid=[cutlass.min(groups * chunks, processors), 1, 1],
            block=[(1 + CONSUMERS) * GROUP, 1, 1],
            min_blocks_per_mp=1,
            use_pdl=self.packed,
            stream=stream,
        )  # fmt: skip

    def _layout(self, dtype, rows: int, stages: int):
        atom = sm90.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, self.line)
        shape = (rows, self.line, stages * self.lines)
        return cute.tile_to_shape(warpgroup.make_smem_layout_atom(atom, dtype), shape, order=(0, 1, 2))

    def _mma(self):
        major = LayoutEnum.ROW_MAJOR.sm90_mma_major_mode()
        return sm90.make_trivial_tiled_mma(self.dtype, self.dtype, major, major, Float32, (1, 1, 1), (64, self.columns))

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom | None,
        q: cute.Tensor,
        tma_k: cute.CopyAtom,
        k: cute.Tensor,
        tma_w: cute.CopyAtom | None,
        weights: cute.Tensor,
        q_scale: cute.Tensor | None,
        k_scale: cute.Tensor | None,
        start: cute.Tensor | None,
        end: cute.Tensor | None,
        out: cute.Tensor,
        q_layout: cute.ComposedLayout,
        k_layout: cute.ComposedLayout,
        w_layout: cute.Layout,
        groups: Int32,
        chunks: Int32,
        per: Int32,
        ratio: Int32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // GROUP)
        if warp_index == 0:
            cpasync.prefetch_descriptor(tma_k)
            if cutlass.const_expr(not self.packed):
                cpasync.prefetch_descriptor(tma_q)
                cpasync.prefetch_descriptor(tma_w)

        storage = SmemAllocator().allocate(self.shared)
        q_stages = self._pipeline(storage.barriers_q, self.tiles_q, self.q_bytes, LAYING if self.packed else 0)
        k_stages = self._pipeline(storage.barriers_k, self.stages, self.k_bytes, 0, GROUP // 32)
        found = self._pipeline(storage.barriers_found, SLOTS, 0, 32)  # by the warp that loads; unused without limits
        pipeline.pipeline_init_arrive(cluster_shape_mn=(1, 1), is_relaxed=True)
        s_q = storage.tile_q.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        s_k = storage.tile_k.get_tensor(k_layout.outer, swizzle=k_layout.inner)
        s_w = storage.tile_w.get_tensor(w_layout)
        limits = storage.limits.get_tensor(cute.make_layout(SLOTS * self.slot))
        one = cute.make_layout(1)
        if cutlass.const_expr(not self.packed):
            to_q, from_q = self._partition(tma_q, s_q, cute.local_tile(q, (COLUMNS, self.line), (None, None)), one)
            to_w, from_w = self._partition(tma_w, s_w, cute.local_tile(weights, (COLUMNS, 1), (None, None)), one)
        to_k, from_k = self._partition(tma_k, s_k, cute.local_tile(k, (PART, self.line), (None, None)), one)
        pipeline.pipeline_init_wait(cluster_shape_mn=(1, 1))

        length, pieces = out.shape[1], groups * chunks
        rounds = rounds_of(pieces, block, blocks)
        if group == 0:
            cute.arch.setmaxregister_decrease(self.registers[0])
            if warp_index == 0:
                if cutlass.const_expr(self.packed):
                    cute.arch.griddepcontrol_wait()  # for the kernel that expands the keys
                q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.tiles_q)
                k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
                slot = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, SLOTS)
                for turn in cutlass.range(0, rounds):
                    piece = piece_of(turn, pieces, block, blocks)
                    few, steps = piece // chunks, self._steps(length, piece % chunks, per)
                    first, last, low, high = self._visible(start, end, out.shape[0], length, few, steps, ratio)
                    if cutlass.const_expr(self.limits != "all"):
                        found.producer_acquire(slot)
                        self._leave(limits, slot.index, first, last, low, high)
                        found.producer_commit(slot)
                        slot.advance()
                    if cutlass.const_expr(not self.packed):  # noqa: SIM102 (known when compiling, the next one running)
                        if first < last:
                            q_stages.producer_acquire(q_state)
                            full = q_stages.producer_get_barrier(q_state)
                            for line in cutlass.range_constexpr(self.lines):
                                cute.copy(
                                    tma_q, from_q[(None, few, line)], to_q[(None, q_state.index * self.lines + line)],
                                    tma_bar_ptr=full,
                                )  # fmt: skip
                            cute.copy(tma_w, from_w[(None, few, 0)], to_w[(None, q_state.index)], tma_bar_ptr=full)
                            q_state.advance()
                    for tile in cutlass.range(first, last):
                        for part in cutlass.range_constexpr(CONSUMERS):
                            k_stages.producer_acquire(k_state)
                            barrier = k_stages.producer_get_barrier(k_state)
                            for line in cutlass.range_constexpr(self.lines):
                                cute.copy(
                                    tma_k, from_k[(None, tile * CONSUMERS + part, line)],
                                    to_k[(None, k_state.index * self.lines + line)], tma_bar_ptr=barrier,
                                )  # fmt: skip
                            k_state.advance()
                if cutlass.const_expr(not self.packed):
                    q_stages.producer_tail(q_state)
                k_stages.producer_tail(k_state)
            elif cutlass.const_expr(self.packed):  # noqa: SIM102 (as above)
                if warp_index <= LAYING // 32:
                    q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.tiles_q)
                    for turn in cutlass.range(0, rounds):
                        piece = piece_of(turn, pieces, block, blocks)
                        few, steps = piece // chunks, self._steps(length, piece % chunks, per)
                        first, last, _, _ = self._visible(start, end, out.shape[0], length, few, steps, ratio)
                        if first < last:
                            waiting = storage.waiting.data_ptr().toint()
                            self.laying.bring(waiting, q, q_scale, weights, few, thread - 32)
                            q_stages.producer_acquire(q_state)
                            ptx.wait_for_copies()
                            tile_q = storage.tile_q.data_ptr()
                            self.laying.lay_out(waiting, tile_q, s_w, q_state.index, thread - 32)
                            cute.arch.fence_view_async_shared()
                            q_stages.producer_commit(q_state)
                            q_state.advance()
        else:
            cute.arch.setmaxregister_increase(self.registers[1])
            if cutlass.const_expr(self.packed):
                cute.arch.griddepcontrol_wait()  # the keys' scales are read as they are needed
            consumer, thread = group - 1, thread % GROUP
            lane = thread % 32
            mine = consumer * PART + (thread // 32) * 16 + lane // 4  # this thread's first key in a stage
            tiled_mma = self._mma()
            slice_ = tiled_mma.get_slice(0)
            a = _one(tiled_mma.make_fragment_A(slice_.partition_A(s_k)), 0)
            b = tiled_mma.make_fragment_B(slice_.partition_B(s_q))
            b = [_one(b, part) for part in range(self.parts)]
            shape = tiled_mma.partition_shape_C((64, self.columns))
            products = [cute.make_rmem_tensor(shape, Float32) for _ in range(self.parts)]
            weight = cute.make_rmem_tensor((COLUMNS // 4,), Float32)
            q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.tiles_q)
            k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
            ahead = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
            if consumer == 1:  # every second stage is the other's
                k_state.advance()
                ahead.advance()

            if cutlass.const_expr(self.parts == 1):  # noqa: SIM102 (as above)
                if consumer == 1:
                    self._hand_over(consumer)
            slot = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, SLOTS)
            for turn in cutlass.range(0, rounds):
                piece = piece_of(turn, pieces, block, blocks)
                few, steps = piece // chunks, self._steps(length, piece % chunks, per)
                if cutlass.const_expr(self.limits != "all"):
                    ptx.stage_wait(found, slot)
                first, last, seen = self._limits(limits, slot.index, steps, lane)
                if cutlass.const_expr(self.limits != "all"):
                    found.consumer_release(slot)
                    slot.advance()
                where = (self._rows(out, few, lane), seen, lane)
                if first < last:  # the causal rule leaves many pieces of work with nothing to multiply
                    ptx.stage_wait(q_stages, q_state)
                    for i in cutlass.range_constexpr(COLUMNS // 4):
                        weight[i] = s_w[i // 2 * 8 + lane % 4 * 2 + i % 2, 0, q_state.index]
                        if cutlass.const_expr(self._doubled(i)):
                            weight[i] = ptx.mul(weight[i], Float32(0.5))
                    if cutlass.const_expr(self.parts == 1):
                        for tile in cutlass.range(first, last):
                            key = tile * KEYS + mine
                            scales = self._key_scales(k_scale, key, length, lane)
                            ptx.stage_wait(k_stages, k_state)
                            cute.arch.barrier(barrier_id=TURNS + consumer, number_of_threads=CONSUMERS * GROUP)
                            self._multiply(a, b[0], k_state.index, q_state.index, products[0], apart=True)
                            warpgroup.wait_group(1)  # the other's follow the last of these
                            self._hand_over(consumer)
                            warpgroup.wait_group(0)
                            k_stages.consumer_release(k_state)
                            k_state.advance()
                            k_state.advance()
                            self._store(where, self._sums(products[0], weight, 0, lane), scales, 0, key)
                    # The assembler lets a product be in flight beside sums if no way leads past the loop, and one wait
                    # in it is for both; otherwise it waits after every instruction
                    elif first + 1 < last:
                        ptx.stage_wait(k_stages, k_state)
                        self._multiply(a, b[0], k_state.index, q_state.index, products[0])
                        for step in cutlass.range(0, cutlass.max(last - first - 1, 1), unroll=1):
                            key = (first + step) * KEYS + mine
                            scales = self._key_scales(k_scale, key, length, lane)
                            self._multiply(a, b[1], k_state.index, q_state.index, products[1])
                            ahead.advance()
                            ahead.advance()
                            warpgroup.wait_group(0)
                            sums = self._sums(products[0], weight, 0, lane)
                            ptx.stage_wait(k_stages, ahead)
                            self._multiply(a, b[0], ahead.index, q_state.index, products[0])
                            self._store(where, sums, scales, 0, key)
                            warpgroup.wait_group(1)
                            k_stages.consumer_release(k_state)
                            k_state.advance()
                            k_state.advance()
                            self._store(where, self._sums(products[1], weight, 1, lane), scales, 1, key)
                        key = (last - 1) * KEYS + mine
                        scales = self._key_scales(k_scale, key, length, lane)
                        self._multiply(a, b[1], k_state.index, q_state.index, products[1])
                        warpgroup.wait_group(0)
                        sums = [self._sums(products[part], weight, part, lane) for part in range(2)]
                        k_stages.consumer_release(k_state)
                        k_state.advance()
                        k_state.advance()
                        ahead.advance()
                        ahead.advance()
                        for part in cutlass.range_constexpr(2):
                            self._store(where, sums[part], scales, part, key)
                    else:
                        key = first * KEYS + mine
                        scales = self._key_scales(k_scale, key, length, lane)
                        ptx.stage_wait(k_stages, k_state)
                        for part in cutlass.range_constexpr(2):
                            self._multiply(a, b[part], k_state.index, q_state.index, products[part])
                        warpgroup.wait_group(0)
                        k_stages.consumer_release(k_state)
                        k_state.advance()
                        k_state.advance()
                        ahead.advance()
                        ahead.advance()
                        for part in cutlass.range_constexpr(2):
                            self._store(where, self._sums(products[part], weight, part, lane), scales, part, key)
                    q_stages.consumer_release(q_state)
                    q_state.advance()
                # Keys that none of these queries sees
                for tile in cutlass.range(steps[0], first):
                    for part in cutlass.range_constexpr(self.parts):
                        self._store(where, None, None, part, tile * KEYS + mine)
                for tile in cutlass.range(last, steps[1]):
                    for part in cutlass.range_constexpr(self.parts):
                        self._store(where, None, None, part, tile * KEYS + mine)
            if cutlass.const_expr(self.parts == 1):  # noqa: SIM102 (as above)
                if consumer == 0:  # the other's last
                    cute.arch.barrier(barrier_id=TURNS + consumer, number_of_threads=CONSUMERS * GROUP)

    def _hand_over(self, consumer) -> None:
        """To the other warpgroup, whose turn it is to multiply."""
        cute.arch.barrier_arrive(barrier_id=TURNS + 1 - consumer, number_of_threads=CONSUMERS * GROUP)

    def _pipeline(self, barriers, count: int, size: int, threads: int, consumers: int = CONSUMERS * 4):
        """Filled by TMA, and released by so many warps; or filled by threads."""
        create, options = pipeline.PipelineTmaAsync.create, {}
        if threads:
            create, producers, consumers = pipeline.PipelineAsync.create, threads, CONSUMERS * GROUP
        else:
            producers = 1
            options = {"tx_count": size, "cta_layout_vmnk": cute.make_layout((1, 1, 1, 1))}
        return create(
            barrier_storage=barriers.data_ptr(),
            num_stages=count,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, producers),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumers),
            defer_sync=True,
            **options,
        )

    def _partition(self, atom, shared, source, layout):
        return cpasync.tma_partition(atom, 0, layout, cute.group_modes(shared, 0, 2), cute.group_modes(source, 0, 2))

    # After :meth:`_sums` a thread has the sums of one query of a product, and of one key or of two that are 8 apart

    def _query(self, lane):
        bit0, bit1 = lane & 1, lane >> 1 & 1
        return {1: Int32(0), 2: bit0, 4: bit0 * 2 + bit1}[self.own]

    def _keys(self, lane) -> list:
        """How far this thread's keys are from its first."""
        bit0, bit1 = lane & 1, lane >> 1 & 1
        return {1: [8 * bit0], 2: [8 * bit1], 4: [0, 8]}[self.own]

    def _rows(self, out, few, lane) -> list:
        """Of this thread's query of each product: where its scores begin, and how many there are; none of no query."""
        rows = []
        for part in range(self.parts):
            query = few * self.queries + part * self.own + self._query(lane)
            inside = query < out.shape[0]
            if self.own == 1:  # two threads have the same sum
                inside = inside & (lane & 2 == 0)
            count = Int32(cutlass.select_(inside, out.shape[1], Int32(0)))
            rows.append((out.iterator + Int64(query) * out.stride[0], count))
        return rows

    def _key_scales(self, k_scale, key, length, lane):
        if not self.fp8:
            return None
        return [k_scale[cutlass.min(key + apart, length - 1)] for apart in self._keys(lane)]

    def _multiply(self, a, b, k_index, q_index, products, apart: bool = False) -> None:
        """In flight on return; with its last instruction ``apart``, in a group of its own."""
        warpgroup.fence()
        tiled_mma = self._mma()
        tiled_mma.set(warpgroup.Field.ACCUMULATE, False)
        steps = self.line // self.step
        for line in range(self.lines):
            for step in range(steps):
                if apart and line * steps + step == self.lines * steps - 1:
                    warpgroup.commit_group()
                left = a[(None, None, step, k_index * self.lines + line)]
                right = b[(None, None, step, q_index * self.lines + line)]
                cute.gemm(tiled_mma, products, left, right, products)
                tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    def _doubled(self, column: int) -> bool:
        """Whether a product of this thread's columns is made twice as large as it should be, and its weight half.

        x + |x| is 2 relu(x), exactly, for what products of FP8 can be. It takes the pipeline of the multiply-add and
        not that of the maximum, which has half the rate: in turns they keep both busy.
        """
        return self.fp8 and column % 2 == 1

    def _sums(self, products, weight, part: int, lane):
        """Over heads: of this thread's columns first, then of the four threads that share a row.

        There are 2 sums a query, for keys 8 apart. In an exchange a thread gives away the half that it will not store,
        so that in the end each of the four has a quarter of them; a single sum is then in two threads.
        """
        per = self.heads // 4  # of a query's columns, in a thread
        sums = [Float32(0.0)] * (2 * self.own)
        for column in range(per):
            for which in range(2 * self.own):
                at = which // 2 * per + column
                product = products[at // 2 * 4 + which % 2 * 2 + at % 2]
                product = ptx.add_abs(product) if self._doubled(at) else ptx.maximum_nan(product, Float32(0.0))
                sums[which] = ptx.fma(product, weight[part * (self.columns // 4) + at], sums[which])
        for bit in range(2):
            if len(sums) == 1:
                sums = [ptx.add(sums[0], cute.arch.shuffle_sync_bfly(sums[0], offset=1 << bit))]
                continue
            odd, middle = (lane >> bit & 1) == 1, len(sums) // 2
            kept = []
            for first, second in zip(sums[:middle], sums[middle:], strict=True):
                keep, give = _choose(odd, second, first), _choose(odd, first, second)
                kept.append(ptx.add(keep, cute.arch.shuffle_sync_bfly(give, offset=1 << bit)))
            sums = kept
        return sums

    def _store(self, where, sums, scales, part: int, key) -> None:
        """This thread's sums of a product, or −inf, where there is a query and a key; ``key`` is the thread's first."""
        rows, seen, lane = where
        for i, apart in enumerate(self._keys(lane)):
            at, value = key + apart, ptx.real(Uint32(MINUS_INFINITY))
            if sums is not None:
                value = sums[i] if scales is None else ptx.mul(sums[i], scales[i])
                if self.limits != "all":
                    visible = (at >= seen[part][0]) & (at < seen[part][1])
                    value = _choose(visible, value, ptx.real(Uint32(MINUS_INFINITY)))
            self._put(*rows[part], at, value)

    @cute.jit
    def _put(self, row: cute.Pointer, count: Int32, key: Int32, value: Float32):
        if key < count:
            cute.make_tensor(row + key, cute.make_layout(1))[0] = value.to(self.result)


def _choose(condition, yes: Float32, no: Float32) -> Float32:
    return ptx.real(ptx.select(condition, ptx.bits(yes), ptx.bits(no)))


def _one(fragment: cute.Tensor, index) -> cute.Tensor:
    """The tiles of a fragment whose second mode is ``index``, which becomes one."""
    own = fragment[(None, index, None, None)]
    (value, *others), (stride, *strides) = own.shape, own.stride
    return cute.make_tensor(own.iterator, cute.make_layout((value, 1, *others), stride=(stride, 0, *strides)))


def build(
    heads: int,
    d: int,
    dtype: torch.dtype,
    limits: str,
    indices: tuple[torch.dtype | None, torch.dtype | None],
    result: torch.dtype,
    arch: str = "",
    options: str = "",
):
    """A compiled :class:`Scores`: of its tensors, the ratio, :func:`~.scores_pieces.steps`, the number of processors.

    Args:
        heads, d, limits: as there.
        dtype: of queries and keys, bf16 or e4m3fn; uint8 for MXFP4 queries, with keys in e4m3fn.
        indices: dtypes of starts and ends, None where there are none; of positions, in place of ends, if causal.
        result: of the scores.
        arch, options: for the compiler.
    """
    rows, keys, queries = launch.symbol(), launch.symbol(), launch.symbol()
    fp8, packed = dtype == torch.float8_e4m3fn, dtype == torch.uint8
    of_keys = torch.float8_e4m3fn if packed else dtype
    return launch.compiled(
        Scores(heads, d, fp8, limits, packed),
        launch.tensor(dtype, rows, d // 2 if packed else d, row=16 // dtype.itemsize, align=16),
        launch.tensor(of_keys, keys, d, row=16 // of_keys.itemsize, align=16),
        launch.upright(torch.float32, rows, 1),
        launch.strided(torch.int32, rows) if packed else None,
        launch.strided(torch.float32, keys) if fp8 or packed else None,
        *[None if index is None else launch.strided(index, queries) for index in indices],
        launch.tensor(result, queries, keys),
        Int32(4),
        Int32(1),
        Int32(0),
        arch=arch,
        options=options,
    )
