"""MXFP4 codes as bf16, exactly: every code times its scale is one."""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64, Uint32

from . import launch, ptx

LAYING = 96  # threads that lay out queries
LINE = 128  # bytes of a row that lie together in shared memory
LARGEST = 128  # byte of a scale up to which the first of two factors is all
THREADS = 128  # of a block that expands keys, a word each


def powers(scales: Uint32, byte) -> tuple[Uint32, Uint32]:
    """Two pairs whose product is 2^(e − 1) for a byte e of four; NaN for 255. The second is 1 up to LARGEST."""
    e = exponent(scales, byte)
    first = ptx.select(e < Uint32(LARGEST), e, Uint32(LARGEST)) + Uint32(126)
    first = ptx.select(e == Uint32(255), Uint32(0x7FC0), first << Uint32(7))
    second = ptx.select(e > Uint32(LARGEST), e, Uint32(LARGEST)) - Uint32(1)
    return first * Uint32(0x10001), (second << Uint32(7)) * Uint32(0x10001)


def exponent(scales: Uint32, byte) -> Uint32:
    """A byte of four."""
    return (scales >> (Uint32(byte) * Uint32(8))) & Uint32(255)


def spread(codes: Uint32) -> list[Uint32]:
    """Eight codes times 2^-126, as bf16 pairs of numbers 0 and 4, 1 and 5, 2 and 6, 3 and 7.

    A product with 2^12 + 2^6 puts a code's sign and its other bits where they are in a bf16, which is then subnormal
    where the code is.
    """
    pairs = []
    for half in (codes, codes >> Uint32(8)):
        for mask, factor in ((0x000F000F, 0x1040), (0x00F000F0, 0x104)):
            pairs.append(ptx.multiply_add(half & Uint32(mask), factor, 0) & Uint32(0x81C081C0))
    return pairs


def expand(codes: Uint32, factors: tuple[Uint32, Uint32]) -> list[Uint32]:
    """Eight codes times their scale, in the same order."""
    return [ptx.pair_mul(ptx.pair_mul(pair, factors[0]), factors[1]) for pair in spread(codes)]


class Queries:
    """Queries on their way to the tensor cores, by ``LAYING`` threads: copied as they are, then laid out as bf16.

    A copy is read by the thread that asked for it, so that no barrier is needed: of 16 bytes, a block of 32 dims, of
    the word with its scale, and of a weight.

    Args:
        columns: heads of all queries of a tile.
        d: 64 or 128.
    """

    def __init__(self, columns: int, d: int) -> None:
        self.columns, self.d, self.lines = columns, d, d // (LINE // 2)
        self.rows = LAYING * 32 // d  # that are laid out together, a multiple of 8
        self.blocks = -(-columns // self.rows) * LAYING
        self.kept = -(-columns // LAYING) * LAYING
        self.bytes = 20 * self.blocks + 4 * self.kept

    def _place(self, thread) -> tuple[Int32, Int32]:
        """A thread's first column and its block; eight neighbours have different columns, and store at once."""
        blocks = self.d // 32
        return thread // (8 * blocks) * 8 + thread % 8, thread // 8 % blocks

    @cute.jit
    def bring(self, waiting: Int32, q, q_scale, weights, few, thread):
        """Begin to copy what this thread will lay out of the queries number ``few``: blocks, their scales, weights."""
        last = q.shape[0] - 1  # what is behind it is of no query
        column, block = self._place(thread)
        first = few * self.columns + column
        for i in cutlass.range_constexpr(self.blocks // LAYING):
            row = Int64(cutlass.min(first + i * self.rows, last))
            at = i * LAYING + thread
            source = q.iterator.toint() + row * q.stride[0] + Int64(block * 16)
            ptx.copy_async(waiting + 16 * at, source)
            scale = q_scale.iterator.toint() + row * q_scale.stride[0] * 4
            ptx.copy_async(waiting + (16 * self.blocks + 4 * at), scale, 4)
        for i in cutlass.range_constexpr(self.kept // LAYING):
            column = i * LAYING + thread
            row = Int64(cutlass.min(few * self.columns + column, last))
            ptx.copy_async(waiting + (20 * self.blocks + 4 * column), weights.iterator.toint() + row * 4, 4)

    @cute.jit
    def lay_out(self, waiting: Int32, tile_q: cute.Pointer, s_w, tile, thread):
        """As bf16 into the tile of ``tile_q`` where the product expects them, and their weights; after the copies."""
        shared = cute.recast_ptr(tile_q, dtype=cutlass.Uint8)
        for i in cutlass.range_constexpr(self.kept // LAYING):
            column = i * LAYING + thread
            (weight,) = ptx.load_shared(waiting + (20 * self.blocks + 4 * column), 1)
            if column < self.columns:
                s_w[column, 0, tile] = ptx.real(weight)
        column, block = self._place(thread)
        to = []  # where the four pieces of 16 bytes go, of the first row
        for word in cutlass.range_constexpr(4):
            piece = block * 4 + word
            line = (tile * self.lines + piece // 8) * self.columns + column
            to.append(shared + (line * LINE + (piece % 8 ^ column % 8) * 16))
        for i in cutlass.range(0, self.blocks // LAYING, unroll=2):
            at = i * LAYING + thread
            packed = ptx.load_shared(waiting + 16 * at, 4)
            (scales,) = ptx.load_shared(waiting + (16 * self.blocks + 4 * at), 1)
            if i * self.rows + column < self.columns:
                self._block(to, i * (self.rows * LINE), packed, scales, block)

    @cute.jit
    def _block(self, to, behind, packed, scales, block):
        pairs = cute.make_rmem_tensor((16,), Uint32)
        for word in cutlass.range_constexpr(4):
            for i, pair in enumerate(spread(packed[word])):
                pairs[word * 4 + i] = ptx.pair_mul(pair, powers(scales, block)[0])
        if exponent(scales, block) > Uint32(LARGEST):
            for i in cutlass.range_constexpr(16):
                pairs[i] = ptx.pair_mul(pairs[i], powers(scales, block)[1])
        for word in cutlass.range_constexpr(4):
            ptx.store_shared(to[word] + behind, [pairs[word * 4 + i] for i in range(4)])


class Expansion:
    """The kernel: keys as bf16, eight dims in the order of :func:`spread`.

    The scores that follow begin meanwhile, and wait for it before they read keys.
    """

    def __init__(self, d: int) -> None:
        self.words = d // 8  # of a key

    @cute.jit
    def __call__(self, values: cute.Tensor, scales: cute.Tensor, out: cute.Tensor, stream: cuda.CUstream):
        words = out.shape[0] * self.words
        self.kernel(values, scales, out, words).launch(
            grid=[(words + THREADS - 1) // THREADS, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, values: cute.Tensor, scales: cute.Tensor, out: cute.Tensor, words: Int32):
        cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        at = block * THREADS + thread
        if at < words:
            key, word = Int64(at // self.words), at % self.words
            (codes,) = ptx.load(values.iterator + (key * values.stride[0] + word * 4), 1, ptx.STREAMED)
            (scale,) = ptx.load(scales.iterator + key * scales.stride[0], 1, ptx.STREAMED)
            pairs = expand(codes, powers(scale, word // 4))
            ptx.store(out.iterator + (key * out.stride[0] + word * 8), pairs)


def build(d: int, arch: str = "", options: str = ""):
    """A compiled :class:`Expansion`, called with codes, scales and the result."""
    keys = launch.symbol()
    return launch.compiled(
        Expansion(d),
        launch.tensor(torch.uint8, keys, d // 2, row=16, align=16),
        launch.strided(torch.int32, keys),
        launch.tensor(torch.bfloat16, keys, d, row=8, align=16),
        arch=arch,
        options=options,
    )
