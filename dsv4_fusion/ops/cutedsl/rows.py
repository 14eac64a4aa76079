"""Rows of the indexer on registers: which thread holds what, RMSNorm, RoPE and the Hadamard transform.

A row is the d (64 or 128) bf16 values of one head of one token. L (8 or 4) neighbouring threads hold it, each one
*chunk* of 8 values for every *span* of 8 L: chunk c of lane l begins at value 8 (L c + l), so that every load is 16
bytes a thread and consecutive along the row, and with the usual 64 rotated dims all lanes rotate the same number.
In registers a chunk is four words of two bf16 values.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Uint32

from . import ptx

LANES = 8  # the most
CHUNK = 8  # values a load


def across(value, distance: int):
    """The value of the lane whose number differs in the bit ``distance``."""
    return cute.arch.shuffle_sync_bfly(value, distance)


class Rows:
    """Everything up to quantisation; a format adds ``quantise``.

    Args:
        d: 64 or 128.
        rope: rotated dims, the last of a row: a multiple of 16, or 0.
        hadamard: transform the rows after RoPE.
        lanes: threads a row, 8 or 4. Fewer have more values each, and exchange less.
    """

    def __init__(self, d: int, rope: int, hadamard: bool, lanes: int = LANES) -> None:
        self.d, self.rope, self.hadamard, self.lanes = d, rope, hadamard, lanes
        self.span = lanes * CHUNK  # values of one chunk of all lanes
        self.distances = (1, 2, 4) if lanes == 8 else (1, 2)  # of lanes, neighbours first
        self.chunks = d // self.span

    def load(self, row, lane: Int32) -> list[list[Uint32]]:
        """The lane's chunks of the row that begins at the pointer ``row``."""
        return self.load_from(row + CHUNK * lane)

    def load_from(self, start) -> list[list[Uint32]]:
        """The chunks of a lane whose first begins at the pointer ``start``."""
        # The last, which are rotated, come first: they have the longest way to go
        row = [ptx.load(start + self.span * chunk, 4, ptx.STREAMED) for chunk in reversed(range(self.chunks))]
        return row[::-1]

    # RoPE

    def _plain(self, chunk: int) -> int:
        """How many values of the span ``chunk`` are not rotated, at most all."""
        return min(max(self.d - self.rope - self.span * chunk, 0), self.span)

    def load_angles(self, cos, sin, lane: Int32) -> list:
        """Four cosines and sines for every chunk, from a token's rows at the pointers ``cos`` and ``sin``; None for
        chunks without rotated dims. Lanes without any read those of the first pair."""
        angles = [None] * self.chunks
        for chunk in reversed(range(self.chunks)):  # the last first, as in load_from
            if self._plain(chunk) == self.span:
                continue
            first = CHUNK * lane + (self.span * chunk - (self.d - self.rope))
            if self._plain(chunk) > 0:
                first = cutlass.max(first, 0)
            angles[chunk] = [self._four(pointer + (first >> 1)) for pointer in (cos, sin)]
        return angles

    @staticmethod
    def _four(pointer) -> list[Float32]:
        if pointer.value_type is BFloat16:
            low, high = ptx.load(pointer, 2, ptx.ORDERED)
            return [*ptx.unpack(low), *ptx.unpack(high)]
        return [ptx.real(word) for word in ptx.load(pointer, 4, ptx.ORDERED)]

    def rotate(self, row: list[list[Uint32]], angles: list, lane: Int32) -> list[list[Uint32]]:
        """Interleaved pairs turned in fp32, every product rounded, then rounded to bf16."""
        rotated = []
        for chunk, (words, angle) in enumerate(zip(row, angles, strict=True)):
            if angle is None:
                rotated.append(words)
                continue
            turned = []
            for word, c, s in zip(words, *angle, strict=True):
                even, odd = ptx.unpack(word)
                first = ptx.sub(ptx.mul(even, c), ptx.mul(odd, s))
                second = ptx.add(ptx.mul(odd, c), ptx.mul(even, s))
                turned.append(ptx.pack_bf16(first, second))
            plain = self._plain(chunk)
            if plain > 0:  # the boundary is between lanes: keep the words of those before it
                mask = Uint32((CHUNK * lane - plain) >> 31)
                turned = [(word & mask) | (new & ~mask) for word, new in zip(words, turned, strict=True)]
            rotated.append(turned)
        return rotated

    # Sums and differences over the row: bits 0 to 2 of an index are in a chunk, then come the lane's, then the chunk's

    def _wide(self, row: list[list[Uint32]]) -> list[list[Float32]]:
        return [[value for word in words for value in ptx.unpack(word)] for words in row]

    def load_norm(self, weight, lane: Int32) -> list[list[Float32]]:
        """The lane's factors of the norm from the pointer ``weight``, fp32 or bf16."""
        starts = [weight + (self.span * chunk + CHUNK * lane) for chunk in range(self.chunks)]
        return [self._four(start) + self._four(start + 4) for start in starts]

    def norm(self, row: list[list[Uint32]], weight: list[list[Float32]], eps: Float32) -> list[list[Uint32]]:
        """RMSNorm: squares added as a tree, neighbours first; one rounding to bf16."""
        wide = self._wide(row)
        sums = []
        for values in wide:
            tree = [ptx.mul(x, x) for x in values]
            while len(tree) > 1:
                tree = [ptx.add(tree[i], tree[i + 1]) for i in range(0, len(tree), 2)]
            total = tree[0]
            for distance in self.distances:
                total = ptx.add(total, across(total, distance))
            sums.append(total)
        while len(sums) > 1:
            sums = [ptx.add(sums[i], sums[i + 1]) for i in range(0, len(sums), 2)]
        (total,) = sums
        root = ptx.sqrt(ptx.add(ptx.mul(total, Float32(1 / self.d)), eps))
        inverse = ptx.div(Float32(1.0), root)
        scaled = [
            [ptx.mul(ptx.mul(x, inverse), w) for x, w in zip(values, factors, strict=True)]
            for values, factors in zip(wide, weight, strict=True)
        ]
        return self._narrow(scaled)

    @staticmethod
    def _narrow(wide: list[list[Float32]]) -> list[list[Uint32]]:
        return [[ptx.pack_bf16(values[i], values[i + 1]) for i in range(0, CHUNK, 2)] for values in wide]

    def transform(self, row: list[list[Uint32]], lane: Int32) -> list[list[Uint32]]:
        """Hadamard, natural order, strides 1, 2, 4, …, in fp32; times d^-1/2, rounded to bf16."""
        wide = self._wide(row)
        for stride in (1, 2, 4):
            for values in wide:
                for i in range(CHUNK):
                    if not i & stride:
                        a, b = values[i], values[i + stride]
                        values[i], values[i + stride] = ptx.add(a, b), ptx.sub(a, b)
        for distance in self.distances:
            # a + b in the lower lane, a - b in the upper: other + (±1) · own, whose product is exact
            sign = ptx.real(Uint32(0x3F800000) | (Uint32(lane & distance) << Uint32(32 - distance.bit_length())))
            wide = [[ptx.fma(x, sign, across(x, distance)) for x in values] for values in wide]
        stride = 1
        while stride < self.chunks:
            for i in range(self.chunks):
                if not i & stride:
                    low, high = wide[i], wide[i + stride]
                    wide[i] = [ptx.add(a, b) for a, b in zip(low, high, strict=True)]
                    wide[i + stride] = [ptx.sub(a, b) for a, b in zip(low, high, strict=True)]
            stride *= 2
        factor = Float32(self.d**-0.5)
        return self._narrow([[ptx.mul(x, factor) for x in values] for values in wide])
