"""MXFP4 codes as bf16, exactly: every code times its scale is one."""

from __future__ import annotations

from cutlass import Uint32

from . import ptx

LARGEST = 128  # byte of a scale up to which the first of two factors is all


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


def in_order(pairs: list[Uint32]) -> list[Uint32]:
    """The same with neighbours in a pair."""
    first, second, third, fourth = pairs
    return [
        ptx.permute(first, second, 0x5410),
        ptx.permute(third, fourth, 0x5410),
        ptx.permute(first, second, 0x7632),
        ptx.permute(third, fourth, 0x7632),
    ]
