"""The indexer's scores of keys in pages, on SM90: memory is read once, and everything else happens meanwhile.

A block goes through a contiguous part of all sequences' keys, of the same size for every block whatever the lengths
are, 64 keys at a time: these are a product's rows, and the heads of all queries of a sequence its columns. One warp
brings keys, two lay out queries, one writes −inf behind the sequences; two or three warpgroups take the keys in turns,
each on its own. FP8 is multiplied from shared memory, where TMA has swizzled it. MXFP4 comes as it is, and a thread
expands to e4m3 in registers what the product wants of it there: dims are multiplied in an order in which these are
whole words of one block, and the queries are laid out in the same order. Where one product has all columns, its sums
are made while the next product is.
"""

from __future__ import annotations

import functools

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
import torch
from cutlass import Float8E4M3FN, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from . import launch, ptx
from .scores import GROUP, MINUS_INFINITY, _choose
from .scores_mxfp4 import counted, expand, exponent, factor, largest, table
from .scores_paged_feed import KEYS, LAYING, WARP, Feed, select_integer


class PagedScores(Feed):
    """The kernel; arguments as there."""

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        q_scale: cute.Tensor | None,
        cache: cute.Tensor,
        weights: cute.Tensor,
        table: cute.Tensor,
        lengths: cute.Tensor,
        out: cute.Tensor,
        processors: Int32,
        stream: cuda.CUstream,
    ):
        q_layout = self._layout(Float8E4M3FN, self.width, self.tiles_q * self.passes)
        k_layout = self._layout(Float8E4M3FN, KEYS, self.stages) if cutlass.const_expr(self.fp8) else None
        tma_k, k = None, None
        if cutlass.const_expr(self.fp8):
            values = cute.make_tensor(
                cute.recast_ptr(cache.iterator, dtype=Float8E4M3FN),
                cute.make_layout((self.page, self.d, cache.shape[0]), stride=(self.d, 1, cache.stride[0])),
            )
            box = self._layout(Float8E4M3FN, self.rows, 1)
            tma_k, k = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(), values, cute.slice_(box, (None, None, 0)), (self.rows, self.d)
            )

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, self.stages]
            empty: cute.struct.MemRange[Int64, self.stages]
            q_full: cute.struct.MemRange[Int64, self.tiles_q]
            q_empty: cute.struct.MemRange[Int64, self.tiles_q]
            found: cute.struct.MemRange[Int32, self.stages]
            tile_q: cute.struct.Align[cute.struct.MemRange[Float8E4M3FN, cute.cosize(q_layout)], 1024]
            tile_k: cute.struct.Align[cute.struct.MemRange[Float8E4M3FN, self.stages * KEYS * self.row], 1024]
            scales: cute.struct.Align[cute.struct.MemRange[Uint32, self.stages * KEYS], 128]
            weights: cute.struct.Align[cute.struct.MemRange[Float32, self.tiles_q * self.columns], 128]

        self.shared, self.result = Shared, out.element_type
        most = out.shape[0] * ((out.shape[2] + KEYS - 1) // KEYS)
        self.kernel(tma_k, k, q, q_scale, cache, weights, table, lengths, out, q_layout, k_layout).launch(
            grid=[cutlass.min(most, processors), 1, 1],
            block=[(1 + self.consumers) * GROUP, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    def _mma(self):
        major = LayoutEnum.ROW_MAJOR.sm90_mma_major_mode()
        source = warpgroup.OperandSource.SMEM if self.fp8 else warpgroup.OperandSource.RMEM
        dtype = Float8E4M3FN
        return sm90.make_trivial_tiled_mma(dtype, dtype, major, major, Float32, (1, 1, 1), (64, self.width), source)

    @cute.kernel
    def kernel(
        self,
        tma_k: cute.CopyAtom | None,
        k: cute.Tensor | None,
        q: cute.Tensor,
        q_scale: cute.Tensor | None,
        cache: cute.Tensor,
        weights: cute.Tensor,
        table: cute.Tensor,
        lengths: cute.Tensor,
        out: cute.Tensor,
        q_layout: cute.ComposedLayout,
        k_layout: cute.ComposedLayout | None,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // GROUP)
        storage = SmemAllocator().allocate(self.shared)
        if warp == 0:
            if cutlass.const_expr(self.fp8):
                cpasync.prefetch_descriptor(tma_k)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(storage.full.data_ptr() + i, 1)
                    cute.arch.mbarrier_init(storage.empty.data_ptr() + i, 4)
                for i in cutlass.range_constexpr(self.tiles_q):
                    cute.arch.mbarrier_init(storage.q_full.data_ptr() + i, LAYING)
                    cute.arch.mbarrier_init(storage.q_empty.data_ptr() + i, self.consumers * 4)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        work = self._part(lengths, out)
        if group == 0:
            cute.arch.setmaxregister_decrease(56)
            if warp == 0:
                self._bring(storage, tma_k, k, cache, table, lengths, out, work)
            elif warp == 3:
                self._fill(lengths, out)
            else:
                self._lay_out(storage, q, q_scale, weights, lengths, out, work, thread - WARP)
        else:
            cute.arch.setmaxregister_increase(152 if self.consumers == 3 else 224)
            self._score(storage, q_layout, k_layout, lengths, out, work, group - 1, thread % GROUP)

    # The warpgroups that multiply and sum

    @cute.jit
    def _score(self, storage, q_layout, k_layout, lengths, out, work, consumer, thread):
        sequence, tile, left = work
        lane = thread % WARP
        own = thread // WARP * 16 + lane // 4  # this thread's first key in a stage
        stage, phase = consumer, Int32(0)
        round_ = Int32(0)  # of sequences
        skipped = consumer  # stages of others before this one's next
        tiled_mma = self._mma()
        part = tiled_mma.get_slice(0)
        s_q = storage.tile_q.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        b = tiled_mma.make_fragment_B(part.partition_B(s_q))
        if cutlass.const_expr(self.fp8):
            s_k = storage.tile_k.get_tensor(k_layout.outer, swizzle=k_layout.inner)
            a = tiled_mma.make_fragment_A(part.partition_A(s_k))
        else:
            a = cute.make_rmem_tensor(tiled_mma.partition_shape_A((KEYS, self.d)), Float8E4M3FN)
        shape = tiled_mma.partition_shape_C((KEYS, self.width))
        products = [cute.make_rmem_tensor(shape, Float32) for _ in range(2 if self.apart else self.parts)]
        weight = cute.make_rmem_tensor((self.width // 4,), Float32)
        while left > 0:
            last = cutlass.min(self._tiles(lengths, sequence, out.shape[2]), tile + left)
            if last > tile:
                slot = Int32(Uint32(round_) % self.tiles_q)
                cute.arch.mbarrier_wait(storage.q_full.data_ptr() + slot, Int32(Uint32(round_) // self.tiles_q % 2))
                if cutlass.const_expr(self.passes == 1):
                    self._weights(storage, weight, slot, lane)
                # Of the queries whose sums this thread has in the end: before which keys they see, and their scores
                ends = [self._end(lengths, sequence, query, out.shape[2]) for query in self._mine(lane)]
                starts = [
                    out.iterator + (Int64(sequence) * out.stride[0] + Int64(query) * out.stride[1])
                    for query in self._mine(lane)
                ]
                to = (ends, starts, out.shape[2], lane)
                key, count = (tile + skipped) * KEYS + own, last - tile - skipped + (self.consumers - 1)
                count = count // self.consumers
                skipped -= (last - tile) % self.consumers
                skipped += select_integer(skipped < 0, Int32(self.consumers), Int32(0))
                if cutlass.const_expr(self.apart):
                    if count > 0:
                        found, scale = self._begin(storage, a, b, products[0], own, stage, phase, slot, lane)
                        stage, phase = self._next(stage, phase)
                        warpgroup.wait_group(0)
                        for _ in cutlass.range((count - 1) // 2, unroll=1):
                            for turn in cutlass.range_constexpr(2):
                                after = self._begin(storage, a, b, products[1 - turn], own, stage, phase, slot, lane)
                                stage, phase = self._next(stage, phase)
                                self._end_stage(products[turn], weight, to, key, (found, scale), own)
                                key += self.consumers * KEYS
                                found, scale = after
                                warpgroup.wait_group(0)
                        if count % 2 == 0:
                            after = self._begin(storage, a, b, products[1], own, stage, phase, slot, lane)
                            stage, phase = self._next(stage, phase)
                            self._end_stage(products[0], weight, to, key, (found, scale), own)
                            warpgroup.wait_group(0)
                            self._end_stage(products[1], weight, to, key + self.consumers * KEYS, after, own)
                        else:
                            self._end_stage(products[0], weight, to, key, (found, scale), own)
                else:
                    for _ in cutlass.range(count, unroll=1):
                        cute.arch.mbarrier_wait(storage.full.data_ptr() + stage, phase)
                        self._stage(storage, a, b, products, weight, to, key, own, stage, slot)
                        stage, phase = self._next(stage, phase)
                        key += self.consumers * KEYS
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(storage.q_empty.data_ptr() + slot)
                round_ += 1
            left -= last - tile
            sequence += 1
            tile = Int32(0)

    def _next(self, stage, phase) -> tuple[Int32, Int32]:
        """This warpgroup's stage after this one, and its phase."""
        after = stage + self.consumers
        return select_integer(after >= self.stages, after - self.stages, after), phase ^ Int32(after >= self.stages)

    def _begin(self, storage, a, b, product, own, stage, phase, slot, lane) -> tuple[Uint32, Float32]:
        """The product of 64 MXFP4 keys, once they have arrived, in flight on return; for :meth:`_end_stage`."""
        cute.arch.mbarrier_wait(storage.full.data_ptr() + stage, phase)
        rows, found = self._take(storage, a, own, stage, lane)
        self._multiply_words(a, b, product, slot)
        return found, factor(ptx.select(lane & 1 == 1, rows[1], rows[0]))

    def _take(self, storage, a, own, stage, lane) -> tuple[list[Uint32], Uint32]:
        """Of a stage of MXFP4 keys this thread's part of two, as bytes in ``a``: their rows' exponents, and which pages
        were found. The stage is released.

        A word of either row gives a step of 32 dims.
        """
        keys, per = [stage * KEYS + own + 8 * i for i in range(2)], self.d // 32
        scales = [ptx.load_shared(storage.scales.data_ptr() + key, 1)[0] for key in keys]
        found = ptx.load_shared(storage.found.data_ptr() + stage, 1)[0]
        values = storage.tile_k.data_ptr() + lane % 4 * (4 * per)
        words = [ptx.load_shared(values + key * self.row, per) for key in keys]
        self._release(storage, stage)
        own = [counted(words[i], exponent(scales[i], lane % 4 * per // 4)) for i in range(2)]
        both = largest(own[0] | own[1] << Uint32(16), (1, 2))
        rows = [both & Uint32(0xFFFF), both >> Uint32(16)]
        bytes_ = cute.recast_tensor(a, Uint32)
        for i in range(2):
            sizes = table(own[i], rows[i])
            for word in range(per):
                for half, expanded in enumerate(expand(words[i][word], sizes)):
                    bytes_[word * 4 + half * 2 + i] = expanded
        return rows, found

    def _multiply_words(self, a, b, product, place) -> None:
        """MXFP4 as bytes in ``a``; in flight on return."""
        tiled_mma = self._mma()
        warpgroup.fence()
        for step in range(self.d // 32):
            tiled_mma.set(warpgroup.Field.ACCUMULATE, step > 0)
            cute.gemm(tiled_mma, product, a[(None, None, step)], b[(None, None, step, place)], product)
        warpgroup.commit_group()

    def _end_stage(self, product, weight, to, key, about, own) -> None:
        """Sums over heads of a product that has ended, and their place."""
        lane, (found, scale) = to[-1], about
        later = lane & 1
        for i, sum_ in enumerate(self._sums([product], weight, lane)):
            self._put(*self._row(to, i), key + 8 * later, sum_, scale, self._here(found, own, later))

    def _here(self, found, own, later) -> Uint32:
        """Whether the page of one of this thread's two keys was found."""
        return (found >> Uint32((own + 8 * later) // self.page)) & Uint32(1) if self.pages > 1 else found

    def _stage(self, storage, a, b, products, weight, to, key, own, stage, slot):
        """64 keys, from the moment they have arrived."""
        lane = to[-1]
        later = lane & 1
        if self.fp8:
            scales = [ptx.load_shared(storage.scales.data_ptr() + (stage * KEYS + own + 8 * i), 1)[0] for i in range(2)]
            found = ptx.load_shared(storage.found.data_ptr() + stage, 1)[0]
            scale = ptx.real(ptx.select(later == 1, scales[1], scales[0]))
        else:
            rows, found = self._take(storage, a, own, stage, lane)
            scale = factor(ptx.select(later == 1, rows[1], rows[0]))
        here = self._here(found, own, later)
        count = len(to[0]) // self.passes
        for turn in range(self.passes):
            if self.fp8:
                self._multiply(a, b, products, stage, slot * self.passes + turn)
                if turn == self.passes - 1:
                    self._release(storage, stage)
            else:
                self._multiply_words(a, b, products[0], slot * self.passes + turn)
                warpgroup.wait_group(0)
            if self.passes > 1:
                self._weights(storage, weight, slot * self.passes + turn, lane)
            sums = self._sums(products, weight, lane)
            for i in range(count):
                self._put(*self._row(to, turn * count + i), key + 8 * later, sums[i], scale, here)

    def _release(self, storage, stage) -> None:
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(storage.empty.data_ptr() + stage)

    def _weights(self, storage, weight, place, lane) -> None:
        """Of this thread's columns."""
        for i in range(self.width // 8):
            at = storage.weights.data_ptr() + (place * self.width + i * 8 + lane % 4 * 2)
            for j, word in enumerate(ptx.load_shared(at, 2)):
                weight[2 * i + j] = ptx.real(word)

    def _multiply(self, a, b, products, stage, place) -> None:
        """FP8, ``TOGETHER`` dims to each of the products."""
        tiled_mma = self._mma()
        warpgroup.fence()
        steps = self.d // 32 // self.parts
        for i, product in enumerate(products):
            for step in range(steps):
                tiled_mma.set(warpgroup.Field.ACCUMULATE, step > 0)
                at = i * steps + step
                cute.gemm(tiled_mma, product, a[(None, None, at, stage)], b[(None, None, at, place)], product)
        warpgroup.commit_group()
        warpgroup.wait_group(0)

    def _sums(self, products, weight, lane):
        """Over heads: of this thread's columns first, then of the four threads that share two keys.

        In the end threads with an even number have the first key, and those whose number has bit 1 set the second half
        of the queries, if there is one.
        """
        per = self.heads // 4  # of a query's columns, in a thread
        sums = [Float32(0.0)] * (2 * self.share)
        for i in range(per):
            for which in range(len(sums)):
                row, at = which // self.share, which % self.share * per + i
                found = [product[at // 2 * 4 + row * 2 + at % 2] for product in products]
                value = ptx.maximum_nan(functools.reduce(ptx.add, found), Float32(0.0))
                sums[which] = ptx.fma(value, weight[at], sums[which])
        for bit in range(2):
            if len(sums) % 2:
                sums = [ptx.add(each, cute.arch.shuffle_sync_bfly(each, offset=1 << bit)) for each in sums]
                continue
            odd, half = (lane >> bit & 1) == 1, len(sums) // 2
            kept = []
            for one, other in zip(sums[:half], sums[half:], strict=True):
                keep, give = _choose(odd, other, one), _choose(odd, one, other)
                kept.append(ptx.add(keep, cute.arch.shuffle_sync_bfly(give, offset=1 << bit)))
            sums = kept
        return sums

    def _mine(self, lane) -> list:
        """The queries whose sums a thread has in the end, for all products."""
        count = self.share if self.share % 2 else self.share // 2
        second = 0 if self.share % 2 else (lane >> 1 & 1) * count
        return [Int32(turn * self.share + second + i) for turn in range(self.passes) for i in range(count)]

    def _row(self, to, i: int) -> tuple:
        """Of one of this thread's queries: before which keys it sees, its scores, how many, and if they are stored."""
        ends, starts, length, lane = to
        return ends[i], starts[i], length, (lane >> 1 & 1 == 0) if self.share % 2 == 1 else True

    @cute.jit
    def _put(self, end, start: cute.Pointer, length, mine, key, value, scale, found):
        value = ptx.mul(value, scale)
        value = _choose((found != 0) & (key < end), value, ptx.real(Uint32(MINUS_INFINITY)))
        if mine & (key < length):
            cute.make_tensor(start + key, cute.make_layout(1))[0] = value.to(self.result)


def build(
    heads: int,
    d: int,
    dtype: torch.dtype,
    queries: int,
    page_size: int,
    indices: tuple[torch.dtype, torch.dtype],
    each: bool,
    result: torch.dtype,
    arch: str = "",
    options: str = "",
):
    """A compiled :class:`PagedScores`, called with its tensors and the number of processors.

    Args:
        heads, d, queries, page_size, each: as there.
        dtype: of queries, e4m3fn, or uint8 for MXFP4.
        indices: dtypes of the block table and of the lengths.
        result: of the scores.
        arch, options: for the compiler.
    """
    rows, pages, batch, width = launch.symbol(), launch.symbol(), launch.symbol(), launch.symbol()
    fp8 = dtype == torch.float8_e4m3fn
    size = batch, *([queries] if each else [])
    return launch.compiled(
        PagedScores(heads, d, fp8, queries, page_size, each),
        launch.tensor(dtype, rows, d if fp8 else d // 2, row=16, align=16),
        None if fp8 else launch.strided(torch.int32, rows),
        launch.tensor(torch.uint8, pages, launch.symbol(), row=16, align=16),
        launch.strided(torch.float32, launch.symbol()),
        launch.strided(indices[0], batch, width),
        launch.strided(indices[1], *size),
        launch.tensor(result, batch, queries, launch.symbol()),
        Int32(0),
        arch=arch,
        options=options,
    )
