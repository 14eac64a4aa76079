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
        """A word of eight nibbles for every chunk, and the row's UE8M0 bytes, the same in all lanes.

        A block of 32 is one chunk of four lanes: the lower four have blocks 0 and 2, the upper four 1 and 3.
        """
        magnitudes = [[word & Uint32(MAGNITUDES) for word in words] for words in row]
        tops = [largest(words, ptx.pair_max) for words in magnitudes]
        # The maxima of the chunks side by side in one word: half as many shuffles
        first, last = tops[0], tops[-1]
        pair = ptx.pair_max(ptx.permute(first, last, 0x5410), ptx.permute(first, last, 0x7632))
        for distance in (1, 2):
            pair = ptx.pair_max(pair, across(pair, distance))
        packed, scales = [], Uint32(0)
        for chunk, words in enumerate(row):
            amax = pair << Uint32(16) if chunk == 0 else pair & Uint32(0xFFFF0000)
            finite = amax < Uint32(INFINITY << 16)
            limited = ptx.maximum(ptx.real(amax), floor)
            # amax / 6 = amax / 1.5 / 2^2, as in FP8Rows
            exponent = ((ptx.bits(limited) + Uint32(0x3FFFFF)) >> Uint32(23)) - Uint32(2)
            inverse = (Uint32(254) - exponent) << Uint32(7)
            inverse = inverse | (inverse << Uint32(16))
            if self.convert:
                scaled = [x for word in words for x in ptx.unpack(ptx.pair_mul(word, inverse))]
                codes = ptx.pack_e2m1(scaled)
            else:
                codes = self._round([ptx.pair_mul(word, inverse) for word in magnitudes[chunk]], words)
            packed.append([ptx.select(finite, codes, Uint32(0))])
            scales = scales | (ptx.select(finite, exponent, Uint32(255)) << Uint32(16 * chunk))
        shift = Uint32(lane * 2) & Uint32(8)
        return packed, (scales << shift) | (across(scales, 4) << (Uint32(8) - shift))

    def _round(self, magnitudes: list[Uint32], signs: list[Uint32]) -> Uint32:
        """Eight nibbles of scaled magnitudes (at most 6) and the signs of the values they come from.

        The step of E2M1 is half the power of two below a magnitude, or 1/2 below 1. Adding 64 times that power to the
        magnitude in bf16, which keeps 7 bits after the first, rounds to that step, ties to even: the sum's last bits
        count the steps c, and its exponent is 6 more than the magnitude's, k. The code is c + 2 k.
        """
        codes = []
        for x in magnitudes:
            power = ptx.pair_max(x, 0x3F80) & Uint32(ptx.both(0x7F80))
            if self.ties_to_even:
                total = ptx.pair_fma(power, 0x4280, x)
            else:
                # Times 1 - 2^-8, inside the one rounding, a tie is below the tie, and nothing else crosses one
                total = ptx.pair_fma(x, 0x3F7F, power + Uint32(ptx.both(6 << 7)))
            # total - (133 << 7) is k << 7 | c in each half; times 4 + 256, bits 8 to 10 of each half are c + 2 k
            codes.append(ptx.multiply_add(total, 260, -0x42804280 * 260))
        words = []
        for i in (0, 2):
            # bytes: values 0, 2, 1, 3 of four
            code = ptx.permute(codes[i], codes[i + 1], 0x7351)
            sign = ptx.permute(signs[i], signs[i + 1], 0xFBD9)
            nibbles = ptx.merge(0x07070707, code, sign)
            words.append(ptx.merge(0x0F0F0F0F, nibbles, nibbles >> Uint32(12)))
        return ptx.permute(words[0], words[1], 0x5410)


def rows_of(options: tuple, d: int, rope: int, capability: tuple[int, int]) -> FP8Rows | MXFP4Rows:
    """The rows for ("fp8", hadamard, power_of_two_scale) or ("mxfp4", hadamard, ties) on a device."""
    name, hadamard, last = options
    if name == "fp8":
        return FP8Rows(d, rope, hadamard, last)
    # E2M1 conversion exists on 10.0, 10.3, 11.0 and 12.x: on architecture-specific targets
    return MXFP4Rows(d, rope, hadamard, last == "even", convert=capability >= (10, 0))
