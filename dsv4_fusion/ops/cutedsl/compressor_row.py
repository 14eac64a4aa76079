"""Entries of the compressor on registers: what a thread does with the columns it has, in the order of
``ops/_compressor.py``.

A thread has 2 or 4 neighbouring columns of an entry, its *columns*; ``lanes`` neighbouring threads have a block of 64.
"""

from __future__ import annotations

import struct

from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute.arch import inline_ptx

from .._compressor import AMAX_FLOOR, EXP2, INTEGER, LEAST, LOG2_E
from .._indexer import MXFP4_FLOOR
from . import ptx
from .formats import NAN
from .rows import across

INFINITY = 0x7F800000
MAGNITUDE = 0x7FFFFFFF


def _constant(value: float) -> str:
    return f"0f{struct.unpack('>I', struct.pack('>f', value))[0]:08X}"


def _exponential(count: int) -> str:
    """PTX of ``exp_ref`` for ``count`` numbers: each of its operations for all of them before the next, because the
    assembler leaves them so, and the next one has to wait for the result."""
    coefficients = [_constant(coefficient) for coefficient in reversed(EXP2)]
    steps = [
        f"fma.rn.f32 s@, {{$r@}}, {_constant(LOG2_E)}, {_constant(INTEGER)};",
        f"sub.rn.f32 n@, s@, {_constant(INTEGER)};",
        f"neg.f32 n@, n@; fma.rn.f32 f@, {{$r@}}, {_constant(LOG2_E)}, n@; mov.f32 y@, {coefficients[0]};",
        *[f"fma.rn.f32 y@, y@, f@, {coefficient};" for coefficient in coefficients[1:]],
        # The last bits of s are those of the integer
        "mov.b32 e@, s@; shl.b32 e@, e@, 23; mov.b32 p@, y@; add.u32 p@, p@, e@; mov.b32 y@, p@;",
        f"setp.lt.f32 small@, {{$r@}}, {_constant(LEAST)}; selp.f32 {{$w@}}, {_constant(0.0)}, y@, small@;",
    ]
    names = ".reg .f32 s@, n@, f@, y@; .reg .b32 e@, p@; .reg .pred small@;"
    return "{ " + " ".join(step.replace("@", str(i)) for step in [names, *steps] for i in range(count)) + " }"


def exponentials(x: list[Float32], together: int) -> list[Float32]:
    """e^x for each x, from -inf to 0, so many together; of a NaN any number."""
    found = []
    for first in range(0, len(x), together):
        some = x[first : first + together]
        result = inline_ptx(_exponential(len(some)), write_only_types=[Float32] * len(some), read_only_args=some)
        found += [result] if len(some) == 1 else list(result)
    return found


def weights(gates: list[Float32], largest: Float32, together: int) -> list[Float32]:
    """Of rows; ``largest`` is NaN where the gate of any row is, and the first weight then too."""
    found = exponentials([ptx.sub(gate, largest) for gate in gates], together)
    return [ptx.add(found[0], ptx.sub(largest, largest)), *found[1:]]


def ordered(x: Float32) -> Int32:
    """An integer that is larger just where x is."""
    bits = Int32(ptx.bits(x))
    return bits ^ ((bits >> 31) & Int32(MAGNITUDE))


def unordered(key: Int32) -> Float32:
    return ptx.real(Uint32(key ^ ((key >> 31) & Int32(MAGNITUDE))))


def tree(terms: list[Float32]) -> Float32:
    """The first half of the terms added to the second, down to one."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [ptx.add(a, b) for a, b in zip(terms[:half], terms[half:], strict=True)]
    return terms[0]


def neighbours(terms: list[Float32]) -> Float32:
    """Neighbours added first, down to one."""
    while len(terms) > 1:
        terms = [ptx.add(terms[i], terms[i + 1]) for i in range(0, len(terms), 2)]
    return terms[0]


def squares(x: list[Float32], lanes: int = 32) -> Float32:
    """The sum of the squares of a thread's columns and those of its ``lanes`` neighbours, in all of them."""
    total, distance = neighbours([ptx.mul(value, value) for value in x]), 1
    while distance < lanes:
        total = ptx.add(total, across(total, distance))
        distance *= 2
    return total


def norm(x: list[Float32], total: Float32, weight: list[Float32], d: int, eps: Float32) -> list[Float32]:
    root = ptx.sqrt(ptx.add(ptx.mul(total, Float32(1 / d)), eps))
    inverse = ptx.div(Float32(1.0), root)
    return [ptx.mul(ptx.mul(value, inverse), factor) for value, factor in zip(x, weight, strict=True)]


def rotate(x: list[Float32], cos: list[Float32], sin: list[Float32], rotated) -> list[Float32]:
    """Pairs turned where ``rotated``, without a rounding at the end."""
    turned = []
    for i, (c, s) in enumerate(zip(cos, sin, strict=True)):
        even, odd = x[2 * i], x[2 * i + 1]
        first = ptx.sub(ptx.mul(even, c), ptx.mul(odd, s))
        second = ptx.add(ptx.mul(odd, c), ptx.mul(even, s))
        turned += [choose(rotated, first, even), choose(rotated, second, odd)]
    return turned


def choose(condition, yes: Float32, no: Float32) -> Float32:
    return ptx.real(ptx.select(condition, ptx.bits(yes), ptx.bits(no)))


def wide(words: list[Uint32], bf16: bool) -> list[Float32]:
    """Words of bf16 pairs, or of fp32."""
    return [value for word in words for value in ptx.unpack(word)] if bf16 else [ptx.real(word) for word in words]


def rounded(x: list[Float32]) -> list[Float32]:
    """To bf16 and back."""
    return wide([ptx.pack_bf16(x[i], x[i + 1]) for i in range(0, len(x), 2)], True)


def bf16_words(x: list[Float32]) -> list[Uint32]:
    """bf16 pairs; every NaN the same one."""
    words = []
    for i in range(0, len(x), 2):
        low, high = [ptx.bits(value) & Uint32(MAGNITUDE) for value in x[i : i + 2]]
        word = ptx.pack_bf16(x[i], x[i + 1])
        word = ptx.select(low > Uint32(INFINITY), (word & Uint32(0xFFFF0000)) | Uint32(0x7FC0), word)
        words.append(ptx.select(high > Uint32(INFINITY), (word & Uint32(0xFFFF)) | Uint32(0x7FC00000), word))
    return words


def place(cache, slot: Int64, page_size: int) -> tuple[Int64, Int64]:
    """The address of a slot's page, which has a power of two of them, and its number there."""
    page = slot >> (page_size.bit_length() - 1)
    return cache.iterator.toint() + page * cache.stride[0], slot & (page_size - 1)


def _largest(x: list[Float32], lanes: int) -> Uint32:
    """The bits of the largest magnitude of the columns of neighbouring ``lanes``; NaN's are larger than infinity's."""
    top = Uint32(0)
    for value in x:
        top = _max(top, ptx.bits(value) & Uint32(MAGNITUDE))
    distance = 1
    while distance < lanes:
        top = _max(top, across(top, distance))
        distance *= 2
    return top


def _max(a: Uint32, b: Uint32) -> Uint32:
    return ptx.select(a > b, a, b)


def to_fp8(x: list[Float32], lanes: int) -> tuple[Uint32, Uint32]:
    """e4m3 bytes of a thread's columns, lowest first, and the biased exponent of the scale of its ``lanes``
    neighbours, rounded up to a power of two; where these are not finite, NaN: 0x7F and 255."""
    top = _largest(x, lanes)
    finite = top < Uint32(INFINITY)
    limited = ptx.bits(ptx.maximum(ptx.real(top), Float32(AMAX_FLOOR)))
    # amax / 448 = amax / 1.75 / 2^8 exceeds a power of two just when amax's mantissa exceeds 1.75, as in FP8Rows
    exponent = ((limited + Uint32(0x1FFFFF)) >> Uint32(23)) - Uint32(8)
    inverse = ptx.real((Uint32(254) - exponent) << Uint32(23))
    scaled = [ptx.mul(value, inverse) for value in x]
    scaled += [Float32(0.0)] * (4 - len(x))
    codes = ptx.select(finite, ptx.pack_e4m3(*scaled), Uint32(0x7F7F7F7F))
    return codes, ptx.select(finite, exponent, Uint32(255))


def scale_bits(exponent: Uint32) -> Uint32:
    """The fp32 scale with this exponent, NaN for 255."""
    return ptx.select(exponent == Uint32(255), Uint32(NAN), exponent << Uint32(23))


def to_mxfp4(x: list[Float32], lanes: int) -> tuple[Uint32, Uint32]:
    """Nibbles of a thread's columns, lowest first, and the UE8M0 scale of its ``lanes`` neighbours; where these are
    not finite, 0 and 255."""
    top = _largest(x, lanes)
    finite = top < Uint32(INFINITY)
    limited = ptx.bits(ptx.maximum(ptx.real(top), Float32(MXFP4_FLOOR)))
    exponent = ((limited + Uint32(0x3FFFFF)) >> Uint32(23)) - Uint32(2)
    inverse = ptx.real((Uint32(254) - exponent) << Uint32(23))
    codes = Uint32(0)
    for i, value in enumerate(x):
        sign = (ptx.bits(value) >> Uint32(28)) & Uint32(8)
        bits = ptx.bits(ptx.mul(value, inverse)) & Uint32(MAGNITUDE)
        small = ptx.bits(ptx.add(ptx.real(bits), Float32(4194304.0))) - Uint32(0x4A800000)  # steps of 1/2
        normal = ((bits + Uint32(0x1FFFFF) + ((bits >> Uint32(22)) & Uint32(1))) >> Uint32(22)) - Uint32(126 << 1)
        code = ptx.select(bits < Uint32(0x3F800000), small, normal) | sign
        codes = codes | (code << Uint32(4 * i))
    return ptx.select(finite, codes, Uint32(0)), ptx.select(finite, exponent, Uint32(255))


def hadamard(x: list[Float32], lane: Int32) -> list[Float32]:
    """Of 128 values, four a lane, natural order, strides 1, 2, 4, …; rounded to bf16."""
    for stride in (1, 2):
        for i in range(4):
            if not i & stride:
                a, b = x[i], x[i + stride]
                x[i], x[i + stride] = ptx.add(a, b), ptx.sub(a, b)
    for distance in (1, 2, 4, 8, 16):
        # a + b in the lower lane, a - b in the upper: other + (±1) · own, whose product is exact
        sign = ptx.real(Uint32(0x3F800000) | (Uint32(lane & distance) << Uint32(32 - distance.bit_length())))
        x = [ptx.fma(value, sign, across(value, distance)) for value in x]
    return rounded([ptx.mul(value, Float32(128**-0.5)) for value in x])
