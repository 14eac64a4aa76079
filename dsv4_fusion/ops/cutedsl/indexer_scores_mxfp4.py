"""MXFP4 codes as bf16, exactly: every code times its scale is one."""

from __future__ import annotations

from cutlass import Uint32

from . import ptx


def power(scales: Uint32, byte) -> Uint32:
    """The pair of 2^(e − 127) for a byte e of four; NaN for 255."""
    e = (scales >> (Uint32(byte) * Uint32(8))) & Uint32(255)
    half = ptx.select(e == Uint32(0), Uint32(0x40), e << Uint32(7))  # 2^-127 is subnormal
    half = ptx.select(e == Uint32(255), Uint32(0x7FC0), half)
    return half * Uint32(0x10001)


def expand(codes: Uint32, factor: Uint32) -> list[Uint32]:
    """Eight codes times a power of two, as bf16 pairs of numbers 0 and 4, 1 and 5, 2 and 6, 3 and 7.

    A product with 2^12 + 2^6 puts a code's sign and its other bits where they are in a bf16, which is then 2^-126 of
    the code, subnormal where the code is.
    """
    pairs = []
    for half in (codes, codes >> Uint32(8)):
        for mask, factors in ((0x000F000F, 0x1040), (0x00F000F0, 0x104)):
            spread = ptx.multiply_add(half & Uint32(mask), factors, 0)
            pairs.append(ptx.pair_mul(ptx.pair_mul(spread & Uint32(0x81C081C0), 0x7E80), factor))
    return pairs


def in_order(pairs: list[Uint32]) -> list[Uint32]:
    """The same with neighbours in a pair."""
    first, second, third, fourth = pairs
    return [
        ptx.permute(first, second, 0x5410),
        ptx.permute(third, fourth, 0x5410),
        ptx.permute(first, second, 0x7632),
        ptx.permute(third, fourth, 0x7632),
    ]
