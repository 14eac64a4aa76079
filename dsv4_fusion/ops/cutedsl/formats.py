"""The two formats a row is quantised to: FP8 (e4m3fn, one scale a row) and MXFP4 (E2M1, one scale for 32 values)."""

from __future__ import annotations

from cutlass import Float32, Int32, Uint32

from . import ptx
from .rows import LANES, Rows, across

NAN = 0x7FC00000  # fp32
INFINITY = 0x7F80  # bf16; what is not below it is not finite
MAGNITUDES = 0x7FFF7FFF  # of a pair


def largest(pairs: list[Uint32], maximum) -> Uint32:
    """By ``maximum`` of two, three at a time, since Hopper has a max of three."""
    while len(pairs) > 1:
        a, b, *rest = pairs
        pairs = [*rest[1:], maximum(maximum(a, b), rest[0])] if rest else [maximum(a, b)]
    return pairs[0]


class FP8Rows(Rows):
    """Rows to e4m3fn.

    Args:
        power_of_two: round scales up to a power of two.
        lanes: threads a row.
    """

    values = 4  # a word of output

    def __init__(self, d: int, rope: int, hadamard: bool, power_of_two: bool, lanes: int = LANES) -> None:
        super().__init__(d, rope, hadamard, lanes)
        self.power_of_two = power_of_two

    def quantise(self, row: list[list[Uint32]], lane: Int32, floor: Float32) -> tuple[list[list[Uint32]], Uint32]:
        """Words of four bytes for every chunk, and the fp32 scale's bits, the same in all lanes."""
        pair = largest([word for words in row for word in words], ptx.pair_max_abs) & Uint32(MAGNITUDES)
        for distance in self.distances:
            pair = ptx.pair_max(pair, across(pair, distance))
        amax = ptx.pair_max(pair, pair >> Uint32(16)) << Uint32(16)
        finite = amax < Uint32(INFINITY << 16)
        limited = ptx.maximum(ptx.real(amax), floor)
        nan = Uint32(NAN)
        if self.power_of_two:
            # The fp32 quotient amax / 448 = amax / 1.75 / 2^8 exceeds a power of two just when amax's mantissa exceeds
            # 1.75; below 448 · 2^-126, which the floor excludes, this would not hold.
            exponent = ((ptx.bits(limited) + Uint32(0x1FFFFF)) >> Uint32(23)) - Uint32(8)
            scale = ptx.select(finite, exponent << Uint32(23), nan)
            inverse = ptx.select(finite, (Uint32(254) - exponent) << Uint32(7), Uint32(NAN >> 16))
            inverse = inverse | (inverse << Uint32(16))
            scaled = [[ptx.unpack(ptx.pair_mul(word, inverse)) for word in words] for words in row]
        else:
            quotient = ptx.div(limited, Float32(448.0))
            scale = ptx.select(finite, ptx.bits(quotient), nan)
            divisor = ptx.real(scale)
            scaled = [[[ptx.div(x, divisor) for x in ptx.unpack(word)] for word in words] for words in row]
        packed = [[ptx.pack_e4m3(*pairs[0], *pairs[1]), ptx.pack_e4m3(*pairs[2], *pairs[3])] for pairs in scaled]
        return packed, scale


class MXFP4Rows(Rows):
    """Rows to E2M1.

    Args:
        ties_to_even: or towards zero.
        convert: use the convert instruction, which starts at SM100 and rounds ties to even.
        lanes: threads a row.
    """

    values = 8  # a word of output

    def __init__(
        self, d: int, rope: int, hadamard: bool, ties_to_even: bool, convert: bool, lanes: int = LANES
    ) -> None:
        super().__init__(d, rope, hadamard, lanes)
        self.ties_to_even, self.convert = ties_to_even, convert and ties_to_even

    def quantise(self, row: list[list[Uint32]], lane: Int32, floor: Float32) -> tuple[list[list[Uint32]], Uint32]:
        """A word of eight nibbles for every chunk, and the row's UE8M0 bytes, the same in the lower four lanes.

        A block of 32 is one chunk of four lanes: of eight, the lower four have blocks 0 and 2, the upper four 1 and 3.
        What is found out for two chunks of a lane stands side by side in the halves of a word.
        """
        magnitudes = [[ptx.pair_abs(word) for word in words] for words in row]
        tops = [largest(words, ptx.pair_max) for words in magnitudes]
        # amax / 6 = amax / 1.5 / 2^2, as in FP8Rows; the larger of two numbers has the larger exponent, or the same.
        # Above it, in units of a bf16's exponent: this one and 2
        least = ((ptx.bits(floor) + Uint32(0x3FFFFF)) >> Uint32(23)) << Uint32(7)
        least = least | (least << Uint32(16))
        packed, scales = [None] * self.chunks, []
        # Chunk c and the one half a row on: where half a row is rotated, no pair is then ready before the angles are
        # there, and the assembler has no reason to put work between the loads
        apart = max(self.chunks // 2, 1)
        for first in range(apart):
            chunks = [first, first + apart] if self.chunks > 1 else [first]
            low, high = tops[chunks[0]], tops[chunks[-1]]
            pair = ptx.pair_max(ptx.permute(low, high, 0x5410), ptx.permute(low, high, 0x7632))
            for distance in (1, 2):
                pair = ptx.pair_max(pair, across(pair, distance))
            above = (pair + Uint32(ptx.both(0x3F))) & Uint32(ptx.both(0x7F80))
            above = ptx.integers_max(above, least)
            inverse = Uint32(ptx.both(0x8000)) - above  # 254 - exponent: below 256, and above 0
            infinite = pair + Uint32(ptx.both(0x80))  # the sign of a half tells
            scales.append((ptx.multiply_add(above, 2, Uint32(-ptx.both(0x200) % 2**32)), infinite))
            factors = inverse
            if not self.ties_to_even:
                # Times 1 - 2^-8, inside the one rounding, a tie is below the tie, and nothing else crosses one
                factors = inverse - Uint32(ptx.both(1))
            doubles = factors + Uint32(ptx.both(1 << 7))
            for half, chunk in enumerate(chunks):
                words = row[chunk]
                factor = ptx.pair_of(factors, half)
                if self.convert:
                    scaled = [x for word in words for x in ptx.unpack(ptx.pair_mul(word, factor))]
                    codes = ptx.pack_e2m1(scaled)
                else:
                    codes = self._round(magnitudes[chunk], factor, ptx.pair_of(doubles, half), words)
                sign = infinite & Uint32(0x8000 << 16 * half)
                packed[chunk] = [ptx.select(sign == Uint32(0), codes, Uint32(0))]
        return packed, self._scales(scales)

    def _scales(self, found: list[tuple[Uint32, Uint32]]) -> Uint32:
        """The row's bytes from those of two chunks, which are bytes 1 and 3 of the first word; 255 where a half of the
        second one is negative."""
        scale, infinite = found[0]
        if len(found) == 2:
            other, too = found[1]
            return ptx.permute(scale, other, 0x7351) | ptx.permute(infinite, too, 0xFBD9)
        scale = scale | ptx.permute(infinite, infinite, 0xBB99)
        if self.lanes == 4:
            return ptx.permute(scale, Uint32(0), 0x4431)
        scale = ptx.permute(scale, across(scale, 4), 0x7351)
        return scale if self.chunks == 2 else scale & Uint32(0xFFFF)

    def _round(self, magnitudes: list[Uint32], factor: Uint32, double: Uint32, signs: list[Uint32]) -> Uint32:
        """Eight nibbles: magnitudes times ``factor`` (at most 6) in E2M1, and the signs of the values they come from.

        For a scaled magnitude x, E2M1's code is min(2 x, x + 2, x / 2 + 4) rounded to an integer. In bf16, 252 + 2 x
        has steps of 1 below 256, where x is 2, and of 2 from there on, as 256 + x has: the two fused sums round as the
        first two and as the third, ties to even, and the last bits of the smaller one count the codes from 252.

        Words are gathered by sums modulo 2^32: the upper half of one receives four values, and the lower half, which
        is left over, stays below 2^16.
        """
        codes = [
            ptx.pair_min(ptx.pair_fma(x, double, 0x437C), ptx.pair_fma(x, factor, 0x4380))  # 252 and 256
            for x in magnitudes
        ]
        halves = []
        for i in (0, 2):
            total = ptx.multiply_add(codes[i], 1 << 16 | 1 << 4, Uint32(-ptx.both(0x437C) * 0x01011010 % 2**32))
            total = ptx.multiply_add(codes[i + 1], 1 << 24 | 1 << 12, total)
            # bytes, 255 for a minus: values 0, 2, 1, 3 of four, whose places are bits 19, 27, 23 and 31
            sign = ptx.permute(signs[i], signs[i + 1], 0xFBD9)
            halves.append(ptx.multiply_add(sign, (1 << 19 | 1 << 7) * pow(255, -1, 2**32), total))
        return ptx.permute(*halves, 0x7632)


def rows_of(options: tuple, d: int, rope: int, capability: tuple[int, int], lanes: int = LANES) -> FP8Rows | MXFP4Rows:
    """The rows for ("fp8", hadamard, power_of_two_scale) or ("mxfp4", hadamard, ties) on a device."""
    name, hadamard, last = options
    if name == "fp8":
        return FP8Rows(d, rope, hadamard, last, lanes)
    # E2M1 conversion exists on 10.0, 10.3, 11.0 and 12.x: on architecture-specific targets
    return MXFP4Rows(d, rope, hadamard, last == "even", convert=capability >= (10, 0), lanes=lanes)
