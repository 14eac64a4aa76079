"""The two formats a row is quantised to: FP8 (e4m3fn, one scale a row) and MXFP4 (E2M1, one scale for 32 values)."""

from __future__ import annotations

from cutlass import Float32, Int32, Uint32

from . import ptx
from .rows import Rows, across

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
    """

    values = 4  # a word of output

    def __init__(self, d: int, rope: int, hadamard: bool, power_of_two: bool) -> None:
        super().__init__(d, rope, hadamard)
        self.power_of_two = power_of_two

    def quantise(self, row: list[list[Uint32]], lane: Int32, floor: Float32) -> tuple[list[list[Uint32]], Uint32]:
        """Words of four bytes for every chunk, and the fp32 scale's bits, the same in all lanes."""
        pair = largest([word for words in row for word in words], ptx.pair_max_abs) & Uint32(MAGNITUDES)
        for distance in (1, 2, 4):
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
    """

    values = 8  # a word of output

    def __init__(self, d: int, rope: int, hadamard: bool, ties_to_even: bool, convert: bool) -> None:
        super().__init__(d, rope, hadamard)
        self.ties_to_even, self.convert = ties_to_even, convert and ties_to_even

    def quantise(self, row: list[list[Uint32]], lane: Int32, floor: Float32) -> tuple[list[list[Uint32]], Uint32]:
        """A word of eight nibbles for every chunk, and the row's UE8M0 bytes, the same in the lower four lanes.

        A block of 32 is one chunk of four lanes: the lower four have blocks 0 and 2, the upper four 1 and 3. What is
        found out for the two blocks of a lane stands side by side in the halves of a word.
        """
        magnitudes = [[word & Uint32(MAGNITUDES) for word in words] for words in row]
        tops = [largest(words, ptx.pair_max) for words in magnitudes]
        first, last = tops[0], tops[-1]
        pair = ptx.pair_max(ptx.permute(first, last, 0x5410), ptx.permute(first, last, 0x7632))
        for distance in (1, 2):
            pair = ptx.pair_max(pair, across(pair, distance))
        # amax / 6 = amax / 1.5 / 2^2, as in FP8Rows; the larger of two numbers has the larger exponent, or the same.
        # Above it, in units of a bf16's exponent: this one and 2
        least = ((ptx.bits(floor) + Uint32(0x3FFFFF)) >> Uint32(23)) << Uint32(7)
        above = (pair + Uint32(ptx.both(0x3F))) & Uint32(ptx.both(0x7F80))
        above = ptx.integers_max(above, least | (least << Uint32(16)))
        inverse = Uint32(ptx.both(0x8000)) - above  # 254 - exponent: below 256, and above 0
        scales = ((above - Uint32(ptx.both(0x100))) >> Uint32(7)) & Uint32(ptx.both(0xFF))
        packed = []
        for chunk, words in enumerate(row):
            finite = pair < Uint32(INFINITY << 16) if chunk else (pair << Uint32(16)) < Uint32(INFINITY << 16)
            factor = ptx.permute(inverse, inverse, 0x3232 if chunk else 0x1010)
            if self.convert:
                scaled = [x for word in words for x in ptx.unpack(ptx.pair_mul(word, factor))]
                codes = ptx.pack_e2m1(scaled)
            else:
                codes = self._round(magnitudes[chunk], factor, words)
            packed.append([ptx.select(finite, codes, Uint32(0))])
            scales = ptx.select(finite, scales, scales | Uint32(0xFF << 16 * chunk))
        if len(row) == 1:
            scales = scales & Uint32(0xFF)
        return packed, scales | (across(scales, 4) << Uint32(8))

    def _round(self, magnitudes: list[Uint32], inverse: Uint32, signs: list[Uint32]) -> Uint32:
        """Eight nibbles: magnitudes times ``inverse`` (at most 6) in E2M1, and the signs of the values they come from.

        For a scaled magnitude x, E2M1's code is min(2 x, x + 2, x / 2 + 4) rounded to an integer. In bf16, 252 + 2 x
        has steps of 1 below 256, where x is 2, and of 2 from there on, as 256 + x has: the two fused sums round as the
        first two and as the third, ties to even, and the last bits of the smaller one count the codes from 252.
        """
        factor = inverse
        if not self.ties_to_even:
            # Times 1 - 2^-8, inside the one rounding, a tie is below the tie, and nothing else crosses one
            factor = inverse - Uint32(ptx.both(1))
        double = factor + Uint32(ptx.both(1 << 7))
        codes = [
            ptx.pair_min(ptx.pair_fma(x, double, 0x437C), ptx.pair_fma(x, factor, 0x4380))  # 252 and 256
            for x in magnitudes
        ]
        words = []
        for i in (0, 2):
            # bytes: values 0, 2, 1, 3 of four
            code = ptx.permute(codes[i], codes[i + 1], 0x6240)
            sign = ptx.permute(signs[i], signs[i + 1], 0xFBD9)
            words.append(ptx.merge(0x07070707, code, sign))
        low, high = ptx.permute(*words, 0x5410), ptx.permute(*words, 0x7632)
        return ptx.merge(0x0F0F0F0F, low, high << Uint32(4)) ^ Uint32(0x44444444)  # 252 ends in the bits 100


def rows_of(options: tuple, d: int, rope: int, capability: tuple[int, int]) -> FP8Rows | MXFP4Rows:
    """The rows for ("fp8", hadamard, power_of_two_scale) or ("mxfp4", hadamard, ties) on a device."""
    name, hadamard, last = options
    if name == "fp8":
        return FP8Rows(d, rope, hadamard, last)
    # E2M1 conversion exists on 10.0, 10.3, 11.0 and 12.x: on architecture-specific targets
    return MXFP4Rows(d, rope, hadamard, last == "even", convert=capability >= (10, 0))
