"""FP8 matrix product with scales, on SM90: TMA, WGMMA, warp-specialised, persistent, the same bits for every batch.

What decides the bits of an output is the order in which its K terms are added, and that order is fixed here: 128 of
them in the tensor core, from zero, and the sums of 128 in fp32 registers, in increasing k. Neither the tile nor the
place of a row in it enters, so tiles may follow M. (The tensor core keeps fewer than 24 bits of a sum, which is why
no more than 128 terms stay in it.)
"""

from __future__ import annotations

import math

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
import torch
from cutlass import Float32, Int32, pipeline
from cutlass.cute.nvgpu import cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from . import launch, ptx
from .scaled_mm_loads import BOX, SCALES, STEP, Loads
from .scaled_mm_scales import GROUP, Scales, raw

SHARED = 227 * 1024
ALIGN = 1024  # bytes, of what tiles in shared memory begin at
OVERLAP = 128  # columns of which registers can hold two sums of a stage, beside the total
WIDE = 8  # n tiles that are walked together, so that both operands stay in L2


class ScaledMM(Loads, Scales):
    """The kernel for one tile: out[m, n] = Σ_k x[m, k] w[n, k], scaled, plus bias.

    Args:
        rows: of x in a tile, 64 for each consumer warpgroup: 64 or 128.
        columns: of the output in a tile: a multiple of 16 up to 192.
        cluster: blocks that share loads, along m (they share w) and along n (they share x).
        loaded: rows of x that are loaded at most, where M has no more: 8, 16, 32 or all. The others of a tile are left
            as they are in shared memory, and what comes of them is not stored.
        blockwise: scales of 1×128 blocks of x and 128×128 blocks of w; otherwise of rows of x and of w. Those of x are
            fp32, and those of a block of k contiguous, at multiples of 16 bytes: they come with the stages, and warps
            of their own multiply them with w's.
        bias: whether there is one.
        dependent: w may be loaded before the kernel ahead, which makes x and x_scale, has ended. Without it nothing is,
            but the block is ready by then.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        cluster: tuple[int, int],
        loaded: int,
        blockwise: bool,
        bias: bool,
        dependent: bool,
    ) -> None:
        self.rows, self.columns, self.cluster, self.loaded = rows, columns, cluster, loaded
        self.blockwise, self.bias, self.dependent = blockwise, bias, dependent
        self.blocks = 1 if 128 % columns == 0 else 2  # of w, that a tile has parts of
        self.span = math.gcd(columns, 128)  # columns that are of one
        self.overlap = columns <= OVERLAP  # a second accumulator hides a stage's latency
        self.consumers = rows // 64
        self.threads = (1 + self.consumers) * GROUP
        self.piece = math.gcd(columns, 64)  # columns of one store
        self.pieces = columns // self.piece
        self.vectors = (not blockwise) + bias  # of which a tile needs its columns' values in the end
        self.stages = max(stages for stages in range(1, 17) if self._shared_bytes(stages) <= SHARED)
        # Warps that take turns with the stages' block scales, the same stages in every round: at the barrier of others
        # a warp might take the round before the last for the last
        self.turns = 2 - self.stages % 2

    def _shared_bytes(self, stages: int) -> int:
        """Shared memory with so many stages: what is small, then tiles, which begin at multiples of ``ALIGN``."""
        small = 2 * 8 * stages + 4 * self.consumers * self.vectors * self.columns
        small += 128 + 8 * stages + 4 * stages * self.rows * (1 + self.blocks) if self.blockwise else 0
        tiles = stages * (self.rows + self.columns) * STEP + self.rows * self.columns * 2
        return -(-small // ALIGN) * ALIGN + tiles

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        w: cute.Tensor,
        x_scale: cute.Tensor,
        w_scale: cute.Tensor,
        bias: cute.Tensor,
        out: cute.Tensor,
        processors: Int32,
        one: Float32,
        stream: cuda.CUstream,
    ):
        row_major = LayoutEnum.ROW_MAJOR
        x_layout = self._operand_layout(x.element_type, self.rows)
        w_layout = self._operand_layout(w.element_type, self.columns)
        atom = sm90.get_smem_layout_atom(row_major, out.element_type, self.piece)
        out_layout = cute.tile_to_shape(
            warpgroup.make_smem_layout_atom(atom, out.element_type),
            (64, self.piece, self.consumers * self.pieces),
            order=(0, 1, 2),
        )
        whole = tuple(self._loads(x, self._operand_layout(x.element_type, self.loaded), self.loaded, self.cluster[1]))
        parts = [tuple(self._loads(x, self._operand_layout(x.element_type, n), n, 1)) for n in self._parts()]
        tma_w, w_tma = self._loads(w, w_layout, self.columns, self.cluster[0])
        s_layout = cute.make_layout((self.rows, 1, self.stages), stride=(1, self.rows, self.rows))
        whole_s, part_s = None, None
        if cutlass.const_expr(self.blockwise):
            op = cpasync.CopyBulkTensorTileG2SOp()
            whole_s, part_s = [
                tuple(cpasync.make_tiled_tma_atom(op, x_scale, cute.make_layout((rows, 1)), (rows, 1)))
                for rows in (self.loaded, SCALES)
            ]
        tma_out, out_tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), out, cute.slice_(out_layout, (None, None, 0)), (64, self.piece)
        )
        down, across = self.rows * self.cluster[0], self.columns * self.cluster[1]
        m_tiles, n_tiles = (out.shape[0] + down - 1) // down, (out.shape[1] + across - 1) // across
        size = self.cluster[0] * self.cluster[1]
        clusters = cutlass.min(m_tiles * n_tiles, processors // size)

        scaled = self.stages if self.blockwise else 0

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, self.stages * 2]
            landed: cute.struct.MemRange[cutlass.Int64, scaled]
            vectors: cute.struct.MemRange[Float32, self.consumers * self.vectors * self.columns]
            tile_s: cute.struct.Align[cute.struct.MemRange[Float32, scaled * self.rows], 128]
            factors: cute.struct.MemRange[Float32, scaled * self.rows * self.blocks]
            tile_x: cute.struct.Align[cute.struct.MemRange[x.element_type, cute.cosize(x_layout)], ALIGN]
            tile_w: cute.struct.Align[cute.struct.MemRange[w.element_type, cute.cosize(w_layout)], ALIGN]
            tile_out: cute.struct.Align[cute.struct.MemRange[out.element_type, cute.cosize(out_layout)], ALIGN]

        assert Shared.size_in_bytes() <= SHARED
        self.shared, self.dtype = Shared, out.element_type
        self.kernel(
            whole, parts, whole_s, part_s, tma_w, w_tma, tma_out, out_tma, x_scale, w_scale, bias,
            x_layout, w_layout, s_layout, out_layout, m_tiles, n_tiles, one,
        ).launch(
            grid=[clusters * size, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[size, 1, 1],
            min_blocks_per_mp=1,
            use_pdl=True,
            stream=stream,
        )  # fmt: skip

    def _mma(self):
        fp8, major = cutlass.Float8E4M3FN, LayoutEnum.ROW_MAJOR.sm90_mma_major_mode()
        return sm90.make_trivial_tiled_mma(fp8, fp8, major, major, Float32, (1, 1, 1), (64, self.columns))

    @cute.kernel
    def kernel(
        self,
        whole: tuple[cute.CopyAtom, cute.Tensor],
        parts: list,
        whole_s: tuple[cute.CopyAtom, cute.Tensor] | None,
        part_s: tuple[cute.CopyAtom, cute.Tensor] | None,
        tma_w: cute.CopyAtom,
        w: cute.Tensor,
        tma_out: cute.CopyAtom,
        out: cute.Tensor,
        x_scale: cute.Tensor,
        w_scale: cute.Tensor,
        bias: cute.Tensor,
        x_layout: cute.ComposedLayout,
        w_layout: cute.ComposedLayout,
        s_layout: cute.Layout,
        out_layout: cute.ComposedLayout,
        m_tiles: Int32,
        n_tiles: Int32,
        one: Float32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // GROUP)
        if warp_index == 0:
            cpasync.prefetch_descriptor(whole[0])
            cpasync.prefetch_descriptor(tma_w)
            cpasync.prefetch_descriptor(tma_out)

        size = self.cluster[0] * self.cluster[1]
        cluster_layout = cute.make_layout((*self.cluster, 1))
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        at = cluster_layout.get_flat_coord(rank)
        x_mask, w_mask = 0, 0
        if cutlass.const_expr(self.cluster[1] > 1):
            x_mask = cute.make_layout_image_mask(cluster_layout, at, mode=1)
        if cutlass.const_expr(self.cluster[0] > 1):
            w_mask = cute.make_layout_image_mask(cluster_layout, at, mode=0)

        storage = SmemAllocator().allocate(self.shared)
        consumers = (self.cluster[0] + self.cluster[1] - 1) * self.consumers * 4
        stages = pipeline.PipelineTmaAsync.create(
            barrier_storage=storage.barriers.data_ptr(),
            num_stages=self.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1 + 32 * self.blockwise),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumers),
            tx_count=0,  # it depends on the tile
            cta_layout_vmnk=cute.make_layout((1, *self.cluster, 1)),
            defer_sync=True,
        )
        full, empty = storage.barriers.data_ptr().toint(), storage.barriers.data_ptr().toint() + 8 * self.stages
        if thread == 0:
            for stage in cutlass.range_constexpr(self.stages if self.blockwise else 0):
                ptx.barrier_init(storage.landed.data_ptr().toint() + 8 * stage, 1)
        pipeline.pipeline_init_arrive(cluster_shape_mn=self.cluster, is_relaxed=True)

        s_x = storage.tile_x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        s_w = storage.tile_w.get_tensor(w_layout.outer, swizzle=w_layout.inner)
        s_out = storage.tile_out.get_tensor(out_layout.outer, swizzle=out_layout.inner)
        g_w = cute.local_tile(w, (self.columns, STEP), (None, None))
        g_out = cute.local_tile(out, (64, self.piece), (None, None))
        to_w, from_w = cpasync.tma_partition(
            tma_w, at[0], cute.make_layout(self.cluster[0]), cute.group_modes(s_w, 0, 2), cute.group_modes(g_w, 0, 2)
        )
        from_out, to_out = cpasync.tma_partition(
            tma_out, 0, cute.make_layout(1), cute.group_modes(s_out, 0, 2), cute.group_modes(g_out, 0, 2)
        )
        w_copy = (tma_w, to_w, from_w, w_mask)
        x_copies = [self._copies(whole, s_x, self.loaded, STEP, self.cluster[1], at[1])]
        x_copies += [self._copies(part, s_x, n, STEP) for part, n in zip(parts, self._parts(), strict=True)]
        s_copies = None
        if cutlass.const_expr(self.blockwise):
            s_s = storage.tile_s.get_tensor(s_layout)
            s_copies = [self._copies(whole_s, s_s, self.loaded, 1), self._copies(part_s, s_s, SCALES, 1)]
            s_copies.append(storage.landed.data_ptr())
        steps = cute.size(from_w, mode=[2])
        tiles = m_tiles * n_tiles
        first, apart = block // size, blocks // size

        pipeline.pipeline_init_wait(cluster_shape_mn=self.cluster)
        cute.arch.griddepcontrol_launch_dependents()

        if group == 0:
            if cutlass.const_expr(self.consumers > 1):
                cute.arch.setmaxregister_decrease(40)
            if warp_index == 0:
                state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
                m, n = self._place(first, m_tiles, n_tiles, at)
                begun, count = Int32(0), self._count(out.shape[0], m)
                if cutlass.const_expr(not self.dependent):
                    cute.arch.griddepcontrol_wait()
                else:
                    # w is there already: as many stages of it as there are, then what has to be waited for
                    begun = cutlass.min(steps, Int32(self.stages))
                    early = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
                    for step in cutlass.range(begun):
                        barrier = self._acquire(stages, early, count)
                        self._bring_w(w_copy, n, step, early.index, barrier)
                        early.advance()
                    cute.arch.griddepcontrol_wait()
                    if self._whole(count):
                        for step in cutlass.range(begun):
                            barrier = stages.producer_get_barrier(state)
                            self._bring(x_copies, s_copies, m, step, state.index, barrier, x_mask)
                            state.advance()
                    else:
                        for step in cutlass.range(begun):
                            barrier = stages.producer_get_barrier(state)
                            self._bring_parts(x_copies, s_copies, m, step, state.index, count, barrier)
                            state.advance()
                for tile in cutlass.range(first, tiles, apart):
                    m, n = self._place(tile, m_tiles, n_tiles, at)
                    count = self._count(out.shape[0], m)
                    if self._whole(count):
                        for step in cutlass.range(begun, steps):
                            barrier = self._acquire(stages, state, self.loaded // BOX)
                            self._bring(x_copies, s_copies, m, step, state.index, barrier, x_mask)
                            self._bring_w(w_copy, n, step, state.index, barrier)
                            state.advance()
                    else:
                        for step in cutlass.range(begun, steps):
                            barrier = self._acquire(stages, state, count)
                            self._bring_parts(x_copies, s_copies, m, step, state.index, count, barrier)
                            self._bring_w(w_copy, n, step, state.index, barrier)
                            state.advance()
                    begun = Int32(0)
                if cutlass.const_expr(size > 1):  # the block has to be there until the other has told it what it read
                    for _ in cutlass.range(self.stages):
                        ptx.barrier_wait(empty + 8 * state.index, state.phase)
                        state.advance()
            elif warp_index <= self.turns:
                self._factors(
                    [part.data_ptr().toint() for part in (storage.landed, storage.tile_s, storage.factors)], full,
                    w_scale, (first, tiles, apart, m_tiles, n_tiles, at, steps), warp_index - 1, thread % 32,
                )  # fmt: skip
        else:
            if cutlass.const_expr(self.consumers > 1):
                cute.arch.setmaxregister_increase(232)
            cute.arch.griddepcontrol_wait()
            consumer = group - 1
            thread = thread % GROUP
            tiled_mma = self._mma()
            slice_ = tiled_mma.get_slice(0)
            a = tiled_mma.make_fragment_A(slice_.partition_A(s_x))
            own = a[(None, consumer, None, None)]  # the 64 rows of this warpgroup
            (value, *others), (stride, *strides) = own.shape, own.stride
            a = cute.make_tensor(own.iterator, cute.make_layout((value, 1, *others), stride=(stride, 0, *strides)))
            b = tiled_mma.make_fragment_B(slice_.partition_B(s_w))
            shape = tiled_mma.partition_shape_C((64, self.columns))
            total, sums, others = [cute.make_rmem_tensor(shape, Float32) for _ in range(3)]
            index, parity, behind = Int32(0), Int32(0), Int32(0)
            empty = ptx.in_block(empty, thread % size)  # of each block that shares loads, by a lane
            factors = storage.factors.data_ptr().toint() + 4 * (consumer * 64 + thread // 32 * 16 + thread % 32 // 4)

            store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
            by_matrix = cute.make_tiled_copy_C_atom(store, tiled_mma)
            to_shared = cute.make_tiled_copy_S(store, by_matrix)
            d_out = to_shared.get_slice(thread).partition_D(s_out)
            result = cute.make_rmem_tensor(shape, self.dtype)
            pieces = to_shared.retile(result)
            part = cute.make_rmem_tensor(cute.shape(d_out)[:3], self.dtype)
            own_vectors = storage.vectors.data_ptr().toint() + 4 * consumer * self.vectors * self.columns

            for tile in cutlass.range(first, tiles, apart):
                m, n = self._place(tile, m_tiles, n_tiles, at)
                row = m * self.rows + consumer * 64 + (thread // 32) * 16 + (thread % 32) // 4
                total.fill(0.0)
                begin = n * self.columns % 128  # this tile's part of its first block of w
                second = [begin + i >= 128 for i in range(0, self.columns, self.span)] if self.blocks > 1 else []
                down, vectors = None, []
                if cutlass.const_expr(not self.blockwise):
                    down = [raw(x_scale[cutlass.min(row + 8 * i, out.shape[0] - 1)]) for i in range(2)]
                    vectors.append(self._share(w_scale, out.shape[1], n, thread))
                if cutlass.const_expr(self.bias):
                    vectors.append(self._share(bias, out.shape[1], n, thread))
                if cutlass.const_expr(self.overlap):
                    self._multiply(full, index, parity, a, b, sums)
                    scales = self._scales(factors, index, one)
                    for _ in cutlass.range((steps - 1) // 2):
                        behind = index
                        index, parity = self._next(index, parity)
                        self._multiply(full, index, parity, a, b, others)
                        more = self._scales(factors, index, one)
                        warpgroup.wait_group(1)
                        self._release(empty, behind, thread)
                        self._promote(total, sums, scales, second)
                        behind = index
                        index, parity = self._next(index, parity)
                        self._multiply(full, index, parity, a, b, sums)
                        scales = self._scales(factors, index, one)
                        warpgroup.wait_group(1)
                        self._release(empty, behind, thread)
                        self._promote(total, others, more, second)
                    if steps % 2 == 0:
                        behind = index
                        index, parity = self._next(index, parity)
                        self._multiply(full, index, parity, a, b, others)
                        more = self._scales(factors, index, one)
                        warpgroup.wait_group(1)
                        self._release(empty, behind, thread)
                        self._promote(total, sums, scales, second)
                        warpgroup.wait_group(0)
                        self._release(empty, index, thread)
                        self._promote(total, others, more, second)
                    else:
                        warpgroup.wait_group(0)
                        self._release(empty, index, thread)
                        self._promote(total, sums, scales, second)
                    index, parity = self._next(index, parity)
                else:
                    for _ in cutlass.range(steps):
                        self._multiply(full, index, parity, a, b, sums)
                        scales = self._scales(factors, index, one)
                        warpgroup.wait_group(0)
                        self._release(empty, index, thread)
                        index, parity = self._next(index, parity)
                        self._promote(total, sums, scales, second)

                for i in cutlass.range_constexpr(self.vectors):
                    self._put(vectors[i], own_vectors + 4 * i * self.columns, thread)
                # The store of the tile before has to have read shared memory
                if warp_index % 4 == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                cute.arch.barrier(barrier_id=1 + consumer, number_of_threads=GROUP)
                self._finish(total, down, own_vectors, thread)
                result.store(total.load().to(self.dtype))
                for piece in cutlass.range_constexpr(self.pieces):
                    for value in cutlass.range_constexpr(cute.size(part)):
                        part[value] = pieces[piece * cute.size(part) + value]
                    cute.copy(to_shared, part, d_out[(None, None, None, consumer * self.pieces + piece)])
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.barrier(barrier_id=1 + consumer, number_of_threads=GROUP)
                if warp_index % 4 == 0:
                    for piece in cutlass.range_constexpr(self.pieces):
                        cute.copy(
                            tma_out,
                            from_out[(None, consumer * self.pieces + piece)],
                            to_out[(None, m * self.consumers + consumer, n * self.pieces + piece)],
                        )
                    cute.arch.cp_async_bulk_commit_group()
            if warp_index % 4 == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    def _place(self, tile, m_tiles, n_tiles, at):
        """This block's tile of m and of n: ``WIDE`` n tiles beside each other, all m tiles down, then the next."""
        band = tile // (WIDE * m_tiles)
        inside = tile % (WIDE * m_tiles)
        width = cutlass.min(n_tiles - band * WIDE, WIDE)
        m, n = inside // width, band * WIDE + inside % width
        return m * self.cluster[0] + at[0], n * self.cluster[1] + at[1]

    def _next(self, index: Int32, parity: Int32) -> tuple[Int32, Int32]:
        """The stage after one, and the parity of its barriers' phases."""
        last = index == self.stages - 1
        return cutlass.select_(last, Int32(0), index + 1), parity ^ Int32(last)

    def _release(self, empty: Int32, index: Int32, thread) -> None:
        """One warp has read a stage: all blocks that load parts of it are told."""
        ptx.barrier_arrive_if(empty + 8 * index, thread % 32 < self.cluster[0] * self.cluster[1])

    def _multiply(self, full, index, parity, a, b, accumulator) -> None:
        """One stage into ``accumulator``, which begins from zero; in flight on return."""
        ptx.barrier_wait(full + 8 * index, parity)
        warpgroup.fence()
        tiled_mma = self._mma()
        tiled_mma.set(warpgroup.Field.ACCUMULATE, False)
        for k in range(STEP // 32):
            left, right = a[(None, None, k, index)], b[(None, None, k, index)]
            cute.gemm(tiled_mma, accumulator, left, right, accumulator)
            tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()


def build(
    rows: int,
    columns: int,
    cluster: tuple[int, int],
    loaded: int,
    blockwise: bool,
    scales: tuple[torch.dtype, torch.dtype],
    bias: torch.dtype | None,
    dtype: torch.dtype,
    dependent: bool = False,
    arch: str = "",
    options: str = "",
):
    """A compiled :class:`ScaledMM`: of x, w, their scales, the bias, the output, the number of processors and 1.0.

    Args:
        rows, columns, cluster, loaded, blockwise, dependent: as there.
        scales: dtypes of those of x and w: fp32, or uint8 for UE8M0; of x fp32 if they are those of blocks.
        bias: its dtype, or None without one: any vector is then given in its place, and is not read.
        dtype: of the output.
        arch, options: for the compiler.
    """
    m, n, k = launch.symbol(), launch.symbol(16), launch.symbol(16)
    fp8 = torch.float8_e4m3fn
    if blockwise:
        groups = launch.symbol()
        shapes = (m, groups), (launch.symbol(), groups)
    else:
        shapes = (m,), (n,)
    return launch.compiled(
        ScaledMM(rows, columns, cluster, loaded, blockwise, bias is not None, dependent),
        launch.tensor(fp8, m, k, row=16, align=16),
        launch.tensor(fp8, n, k, row=16, align=16),
        launch.upright(scales[0], *shapes[0]) if blockwise else launch.strided(scales[0], *shapes[0]),
        launch.strided(scales[1], *shapes[1]),
        launch.strided(bias or torch.float32, n if bias else launch.symbol()),
        launch.tensor(dtype, m, n, row=8, align=16),
        Int32(0),
        Float32(1.0),
        arch=arch,
        options=options,
    )
