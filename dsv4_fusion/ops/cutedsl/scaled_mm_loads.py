"""What a block of the FP8 product loads: tiles of x, whole or in pieces, their scales, and tiles of w."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum

from . import ptx

STEP = 128  # k of a stage, and of a promotion
BOX = 8  # rows of x: what is loaded of a tile is a multiple of them
SCALES = 32  # scales of rows that are loaded together: the copy engine writes at multiples of 128 bytes
MISSING = 32  # rows behind the end of M that cost more to fill with zeros than to load the others in pieces


class Loads:
    """The loads of one tile and stage, for a class that has these attributes.

    Attributes:
        rows, columns, cluster, loaded, blockwise: as in :class:`scaled_mm.ScaledMM`.
        stages: how many there are.
    """

    rows: int
    columns: int
    cluster: tuple[int, int]
    loaded: int
    blockwise: bool
    stages: int

    def _operand_layout(self, dtype, extent: int):
        atom = sm90.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, STEP)
        return cute.tile_to_shape(
            warpgroup.make_smem_layout_atom(atom, dtype), (extent, STEP, self.stages), order=(0, 1, 2)
        )

    def _loads(self, tensor, layout, extent: int, sharers: int):
        op = cpasync.CopyBulkTensorTileG2SOp() if sharers == 1 else cpasync.CopyBulkTensorTileG2SMulticastOp()
        one = cute.slice_(layout, (None, None, 0))
        return cpasync.make_tiled_tma_atom(op, tensor, one, (extent, STEP), num_multicast=sharers)

    def _parts(self) -> list[int]:
        """Rows of the pieces in which a tile is loaded that M ends in; none where blocks share x."""
        return [n for n in (64, 32, 16, 8) if n <= self.loaded - MISSING and self.cluster[1] == 1]

    def _copies(self, loads, shared, rows: int, width: int, sharers: int = 1, rank: int = 0):
        """The atom that copies so many rows, and their places: to [_, piece, stage], from [_, piece, step]."""
        atom, tensor = loads
        to = cute.group_modes(cute.local_tile(shared, (rows, width), (None, 0, None)), 0, 2)
        from_ = cute.group_modes(cute.local_tile(tensor, (rows, width), (None, None)), 0, 2)
        return atom, *cpasync.tma_partition(atom, rank, cute.make_layout(sharers), to, from_)

    def _count(self, rows, m):
        """Boxes of x that are loaded of a tile: all unless many are missing, and nobody shares them."""
        all_ = Int32(self.loaded // BOX)
        if not self._parts():
            return all_
        here = cutlass.max(rows - m * self.rows, Int32(0))  # none beyond the last tile
        return ptx.select(here > self.loaded - MISSING, all_, (here + (BOX - 1)) // BOX)

    def _acquire(self, stages, state, count):
        """Wait until a stage is empty; its barrier, which then expects what is loaded."""
        stages.sync_object_empty.wait(state.index, state.phase)
        stages.sync_object_full.arrive_and_expect_tx(state.index, self.columns * STEP + count * (BOX * STEP))
        return stages.producer_get_barrier(state)

    def _whole(self, count):
        """Whether all boxes of a tile are loaded: asked once a tile, since a branch in every stage costs time."""
        return count == self.loaded // BOX if self._parts() else True

    def _bring_w(self, w_copy, n, step, stage, barrier) -> None:
        """Begin to load a tile of w."""
        atom, to, from_, mask = w_copy
        cute.copy(atom, from_[(None, n, step)], to[(None, stage)], tma_bar_ptr=barrier, mcast_mask=mask)

    def _bring(self, x_copies, s_copies, m, step, stage, barrier, x_mask) -> None:
        """Begin to load a tile of x, and its scales where they come with the stages."""
        atom, to, from_ = x_copies[0]
        cute.copy(atom, from_[(None, m, step)], to[(None, 0, stage)], tma_bar_ptr=barrier, mcast_mask=x_mask)
        if self.blockwise:
            atom, to, from_ = s_copies[0]
            landed = self._expect(s_copies[-1], stage, self.loaded)
            cute.copy(atom, from_[(None, m, step)], to[(None, 0, stage)], tma_bar_ptr=landed)

    def _expect(self, landed, stage, rows):
        """The barrier of a stage's scales, which then expects those of so many rows."""
        with cute.arch.elect_one():
            ptx.barrier_expect((landed + stage).toint(), 4 * rows)
        return landed + stage

    @cute.jit
    def _bring_parts(self, x_copies, s_copies, m, step, stage, count, barrier):
        """Begin to load ``count`` boxes of a tile of x, and their scales where they come with the stages."""
        for i in cutlass.range_constexpr(len(x_copies) - 1):  # the largest first, each at a multiple of its rows
            atom, to, from_ = x_copies[i + 1]
            boxes = self._parts()[i] // BOX
            if count & boxes != 0:
                at = count // (2 * boxes) * 2
                rows = m * (self.rows // BOX // boxes) + at
                cute.copy(atom, from_[(None, rows, step)], to[(None, at, stage)], tma_bar_ptr=barrier)
        if cutlass.const_expr(self.blockwise):
            atom, to, from_ = s_copies[1]
            landed = self._expect(s_copies[-1], stage, (count * BOX + (SCALES - 1)) // SCALES * SCALES)
            for i in cutlass.range_constexpr(max(self.loaded - MISSING, 0) // SCALES):
                if count > i * (SCALES // BOX):
                    rows = m * (self.rows // SCALES) + i
                    cute.copy(atom, from_[(None, rows, step)], to[(None, i, stage)], tma_bar_ptr=landed)
