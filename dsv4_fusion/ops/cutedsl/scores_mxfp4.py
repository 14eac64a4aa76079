"""MXFP4 codes as bf16, exactly: every code times its scale is one."""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64, Uint32

from . import launch, ptx

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
