"""MXFP4 rows as FP8: e4m3 has room for the codes and for how far their blocks' scales are apart.

A code times 2^6 is one of e4m3's numbers (6 · 64 is 384), and so is a code times 2^-8. The blocks with a row's largest
scale are multiplied by 2^6, others by as much less as their scale is, and the row keeps a scale 2^(e − 6). That is
exact for blocks whose scales are up to 2^14 apart; of smaller ones codes are rounded to multiples of 2^-9, which is
2^-15 of the row's largest number, or less. A block of zeros counts for nothing, whatever its scale.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, Uint32

from . import launch, ptx

HIGHEST = 6  # exponent of what codes of a row's largest blocks are multiplied by
BLOCK = 32  # dims that have a scale
LAYING = 96  # threads that lay out queries
LINE = 128  # bytes of a row that lie together in shared memory
THREADS = 128  # of a block that expands keys
SIZES = (0x38000000, 0x3E003C00, 0x42004000, 0x46004400)  # of codes, in pairs of fp16


def exponent(scales: Uint32, byte) -> Uint32:
    """A byte of four."""
    return (scales >> (Uint32(byte) * Uint32(8))) & Uint32(255)


def counted(codes: list[Uint32], e: Uint32) -> Uint32:
    """The exponent of a block, or of a part of one, as its row's may be: 0 for nothing but zeros, unless it is NaN."""
    some = codes[0]
    for word in codes[1:]:
        some = some | word
    return ptx.select(((some & Uint32(0x77777777)) != Uint32(0)) | (e == Uint32(255)), e, Uint32(0))


def largest(e: Uint32, offsets: tuple[int, ...]) -> Uint32:
    """Of two exponents of 16 bits, over the lanes that have a row's other blocks."""
    for offset in offsets:
        e = ptx.integers_max(e, cute.arch.shuffle_sync_bfly(e, offset=offset))
    return e


def table(e: Uint32, row: Uint32) -> tuple[Uint32, Uint32]:
    """The eight sizes of a code as e4m3 bytes, times 2^(6 + e − row); exponents are :func:`counted`."""
    bias = Int32(HIGHEST + 15)
    power = Uint32(cutlass.max(bias + Int32(e) - Int32(row), Int32(0))) * Uint32(0x04000400)  # two of fp16
    sizes = [ptx.halves_mul(power, pair) for pair in SIZES]
    return ptx.pack_e4m3_halves(sizes[0], sizes[1]), ptx.pack_e4m3_halves(sizes[2], sizes[3])


def expand(codes: Uint32, sizes: tuple[Uint32, Uint32]) -> list[Uint32]:
    """Eight codes as bytes, by their :func:`table`: four in a word, and four more."""
    which, turned = codes & Uint32(0x77777777), codes << Uint32(4)
    words = []
    for selected, signs in ((which, 0x5140), (which >> Uint32(16), 0x7362)):
        found = ptx.permute(*sizes, selected)
        words.append(ptx.merge(0x80808080, ptx.permute(turned, codes, signs), found))
    return words


def factor(row: Uint32) -> Float32:
    """2^(e − 127) for a row's exponent, which is 64 times what its bytes are to be multiplied by; NaN for 255."""
    special = ((row + Uint32(1)) & Uint32(255)) < Uint32(2)  # 0 and 255
    return ptx.real((row << Uint32(23)) | ptx.select(special, Uint32(0x400000), Uint32(0)))


def folded(weight: Float32, row: Uint32) -> Float32:
    """A weight times its query's factor, and what two rows of bytes are too large by."""
    return ptx.mul(ptx.mul(weight, Float32(2.0 ** (-2 * HIGHEST))), factor(row))


class Queries:
    """Queries on their way to the tensor cores, by ``LAYING`` threads: copied as they are, then laid out as bytes.

    A copy is read by the thread that asked for it, so that no barrier is needed: of 16 bytes, a block of 32 dims, of
    the word with its scale, and, by the thread of a head's first block, of a weight.

    Args:
        columns: heads of all queries of a tile.
        d: 64 or 128.
    """

    def __init__(self, columns: int, d: int) -> None:
        self.columns, self.d, self.per = columns, d, d // BLOCK
        self.rows = LAYING // self.per  # that are laid out together, a multiple of 8
        self.rounds = -(-columns // self.rows)
        self.scales_at = 16 * self.rounds * LAYING
        self.weights_at = self.scales_at + 4 * self.rounds * LAYING
        self.bytes = self.weights_at + 4 * self.rounds * self.rows

    def _place(self, thread) -> tuple[Int32, Int32]:
        """A thread's first column and its block; eight neighbours have different columns, and store at once."""
        return thread // (8 * self.per) * 8 + thread % 8, thread // 8 % self.per

    @cute.jit
    def bring(self, waiting: Int32, q, q_scale, weights, few, thread):
        """Begin to copy what this thread will lay out of the queries number ``few``: blocks, their scales, weights."""
        last = q.shape[0] - 1  # what is behind it is of no query
        column, block = self._place(thread)
        for i in cutlass.range_constexpr(self.rounds):
            here, at = i * self.rows + column, i * LAYING + thread
            row = Int64(cutlass.min(few * self.columns + here, last))
            ptx.copy_async(waiting + 16 * at, q.iterator.toint() + row * q.stride[0] + Int64(block * 16))
            scale = q_scale.iterator.toint() + row * q_scale.stride[0] * 4
            ptx.copy_async(waiting + (self.scales_at + 4 * at), scale, 4)
            if block == 0:
                ptx.copy_async(waiting + (self.weights_at + 4 * here), weights.iterator.toint() + row * 4, 4)

    @cute.jit
    def lay_out(self, waiting: Int32, tile_q: cute.Pointer, s_w, tile, thread):
        """As bytes into the tile of ``tile_q`` where the product expects them, and their weights; after the copies."""
        shared = cute.recast_ptr(tile_q, dtype=cutlass.Uint8)
        column, block = self._place(thread)
        turned = column % 8 if self.d == LINE else column // 2 % 4
        first = shared + (tile * self.columns + column) * self.d
        to = [first + (block * 2 + half ^ turned) * 16 for half in range(2)]
        for i in cutlass.range(0, self.rounds, unroll=2):
            here, at = i * self.rows + column, i * LAYING + thread
            codes = ptx.load_shared(waiting + 16 * at, 4)
            (scales,) = ptx.load_shared(waiting + (self.scales_at + 4 * at), 1)
            e = counted(codes, exponent(scales, block))
            row = largest(e, (8, 16)[: self.per // 2])
            if here < self.columns:
                sizes = table(e, row)
                for half in cutlass.range_constexpr(2):
                    words = expand(codes[2 * half], sizes) + expand(codes[2 * half + 1], sizes)
                    ptx.store_shared(to[half] + i * (self.rows * self.d), words)
                if block == 0:
                    (weight,) = ptx.load_shared(waiting + (self.weights_at + 4 * here), 1)
                    s_w[here, 0, tile] = folded(ptx.real(weight), row)


class Expansion:
    """The kernel: keys as bytes with a scale, of which the scores are FP8's.

    The scores that follow begin meanwhile, and wait for it before they read keys.
    """

    def __init__(self, d: int) -> None:
        self.per = d // BLOCK  # of a key; a thread takes one

    @cute.jit
    def __call__(
        self, codes: cute.Tensor, scales: cute.Tensor, out: cute.Tensor, factors: cute.Tensor, stream: cuda.CUstream
    ):
        blocks = out.shape[0] * self.per
        self.kernel(codes, scales, out, factors, blocks).launch(
            grid=[(blocks + THREADS - 1) // THREADS, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self, codes: cute.Tensor, scales: cute.Tensor, out: cute.Tensor, factors: cute.Tensor, blocks: Int32
    ):  # fmt: skip
        cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        group, _, _ = cute.arch.block_idx()
        at = group * THREADS + thread
        key, block = Int64(cutlass.min(at, blocks - 1) // self.per), thread % self.per
        words = ptx.load(codes.iterator + (key * codes.stride[0] + block * 16), 4, ptx.STREAMED)
        (scale,) = ptx.load(scales.iterator + key * scales.stride[0], 1, ptx.STREAMED)
        e = counted(words, exponent(scale, block))
        row = largest(e, (1, 2)[: self.per // 2])
        if at < blocks:
            sizes = table(e, row)
            for half in cutlass.range_constexpr(2):
                bytes_ = expand(words[2 * half], sizes) + expand(words[2 * half + 1], sizes)
                ptx.store(out.iterator + (key * out.stride[0] + block * BLOCK + half * 16), bytes_)
            if block == 0:
                factors[key] = factor(row)


def build(d: int, arch: str = "", options: str = ""):
    """A compiled :class:`Expansion`, called with codes, scales, and the bytes and factors to write."""
    keys = launch.symbol()
    return launch.compiled(
        Expansion(d),
        launch.tensor(torch.uint8, keys, d // 2, row=16, align=16),
        launch.strided(torch.int32, keys),
        launch.tensor(torch.float8_e4m3fn, keys, d, row=16, align=16),
        launch.tensor(torch.float32, keys),
        arch=arch,
        options=options,
    )
