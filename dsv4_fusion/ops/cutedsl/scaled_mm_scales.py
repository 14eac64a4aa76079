"""Scales of the FP8 product: those of blocks, a stage at a time, and those of rows with the bias in the end."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from . import ptx

GROUP = 128  # threads of a warpgroup


class Scales:
    """What scales a tile, for a class that has these attributes.

    Attributes:
        rows, columns, blockwise, bias: as in :class:`scaled_mm.ScaledMM`.
        blocks: of w, that a tile has parts of.
        span: columns that are of one of them.
        stages: how many there are.
        turns: warps that take turns with them.
        overlap: whether a second accumulator is in flight.
        vectors: of which a tile needs its columns' values in the end.
    """

    rows: int
    columns: int
    blockwise: bool
    bias: bool
    blocks: int
    span: int
    stages: int
    turns: int
    overlap: bool
    vectors: int

    def _scales(self, factors, index, one) -> list[Float32]:
        """Of a stage: this thread's two rows', with each block of w; with scales of rows, one."""
        if not self.blockwise:
            return [one]
        at = factors + 4 * self.blocks * self.rows * index
        places = [at + 4 * self.rows * block + 32 * i for block in range(self.blocks) for i in range(2)]
        return [ptx.real(ptx.load_shared(place, 1)[0]) for place in places]

    @cute.jit
    def _factors(self, shared, full, w_scale, where, turn, lane):
        """Scales of x in a stage times those of w, by one of the warps that take turns with the stages.

        All others read the products: each such warp takes part in filling its stages.
        """
        first, tiles, apart, *_, steps = where
        landed, tile_s, factors = shared
        each, begin = self.rows // 32, turn
        index, parity = turn, Int32(0)
        if cutlass.const_expr(self.blockwise):
            cute.arch.griddepcontrol_wait()
            for tile in cutlass.range(first, tiles, apart):
                held = self._held(w_scale, where, tile, Int32(0), lane)
                coming = self._held(w_scale, where, tile, Int32(32), lane)
                for step in cutlass.range(begin, steps, self.turns):
                    if (step % 32 < self.turns) & (step >= 32):
                        held = coming
                        coming = self._held(w_scale, where, tile, step // 32 * 32 + 32, lane)
                    own = [_scale_of(cute.arch.shuffle_sync(word, step % 32), w_scale) for word in held]
                    ptx.barrier_wait(landed + 8 * index, parity)
                    row = each * lane
                    scales = [ptx.real(x) for x in ptx.load_shared(tile_s + 4 * (self.rows * index + row), each)]
                    for block in cutlass.range_constexpr(self.blocks):
                        place = factors + 4 * (self.rows * (self.blocks * index + block) + row)
                        ptx.store_shared(place, [ptx.bits(x * own[block]) for x in scales])
                    ptx.barrier_arrive(full + 8 * index)
                    over = index >= self.stages - self.turns
                    index = index + cutlass.select_(over, Int32(self.turns - self.stages), Int32(self.turns))
                    parity = parity ^ Int32(over)
                    begin = step + self.turns
                begin = begin - steps

    def _held(self, w_scale, where, tile, step, lane) -> list[Uint32]:
        """A lane's of the scales of w in the 32 stages of a tile that begin at ``step``."""
        *_, m_tiles, n_tiles, at, steps = where
        _, n = self._place(tile, m_tiles, n_tiles, at)
        group, found = step + lane, []
        for i in range(self.blocks):
            block = cutlass.min(n * self.columns // 128 + i, w_scale.shape[0] - 1)
            offset = Int64(block) * w_scale.stride[0] + Int64(group) * w_scale.stride[1]
            found.append(ptx.load_if(w_scale.iterator + offset, group < steps, Uint32(0)))
        return found

    def _promote(self, total, accumulator, scales, second) -> None:
        """``total += accumulator``, scaled where scales are those of blocks.

        ``second`` has for every span of columns whether it is of the tile's second block of w.
        With two accumulators the assembler keeps both in flight if what reads them is a multiply-add: by one.
        """
        factors = [scales] * (self.columns // self.span)
        if self.blockwise and self.blocks > 1:
            later = [[ptx.bits(x) for x in block] for block in (scales[2:], scales[:2])]
            factors = [[ptx.real(ptx.select(is_, *words)) for words in zip(*later, strict=True)] for is_ in second]
        for i in range(self.columns // 2):
            term = accumulator[i]
            if self.blockwise:
                term = term * factors[i // 4 * 8 // self.span][i // 2 % 2]
            elif self.overlap:
                term = term * scales[0]
            total[i] = total[i] + term

    def _share(self, values, n, tile, thread) -> list:
        """This thread's of a vector of N, as much of it as its warpgroup needs for a tile; nothing waits for them."""
        return [
            raw(values[cutlass.min(tile * self.columns + i + thread, n - 1)]) for i in range(0, self.columns, GROUP)
        ]

    @cute.jit
    def _put(self, share: list, to: Int32, thread):
        """Where all of the warpgroup read them."""
        for i in cutlass.range_constexpr(len(share)):
            if i * GROUP + thread < self.columns:
                ptx.store_shared(to + 4 * (i * GROUP + thread), [ptx.bits(real(share[i]))])

    def _finish(self, total, rows, vectors: Int32, thread) -> None:
        """Scales of rows, and the bias."""
        at = vectors + 8 * (thread % 4)
        rows = None if self.blockwise else [real(row) for row in rows]
        for i in range(self.columns // 8 if self.vectors else 0):
            pairs = [ptx.load_shared(at + 4 * v * self.columns + 32 * i, 2) for v in range(self.vectors)]
            for j in range(4):
                value = total[4 * i + j]
                if not self.blockwise:
                    value = value * rows[j // 2] * ptx.real(pairs[0][j % 2])
                if self.bias:
                    value = value + ptx.real(pairs[-1][j % 2])
                total[4 * i + j] = value


def raw(value):
    """What is loaded, without an instruction that waits for it."""
    return value.to(Uint32) if value.dtype == cutlass.Uint8 else value


def _scale_of(word: Uint32, scale) -> Float32:
    """What a word that was loaded of block scales stands for."""
    return real(word if scale.element_type is cutlass.Uint8 else ptx.real(word))


def real(value):
    """As fp32; a byte, and what :func:`raw` makes of it, is a UE8M0 scale."""
    exponent = raw(value)
    if exponent.dtype != Uint32:
        return value.to(Float32)
    power = ptx.select(exponent == 0, Uint32(1 << 22), exponent << 23)
    return ptx.real(ptx.select(exponent == 255, Uint32(0x7FC00000), power))
