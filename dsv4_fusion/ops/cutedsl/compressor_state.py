"""The state of the paged compressor: where a request's rows are, and tokens that are kept in it.

Indices are read without branches: those that need not wait for each other are under way together.
"""

from __future__ import annotations

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64, Uint32

from . import ptx
from .compressor_row import wide


class State:
    """What reads indices and writes rows; its attributes are those of ``Feed``, and ``t`` is a :func:`view`."""

    def _read(self, tensor: cute.Tensor, index: Int32, inside, other: int) -> Int64:
        size = tensor.element_type.width // 8
        return ptx.load_integer(tensor.iterator.toint() + Int64(index) * (tensor.stride[0] * size), size, inside, other)

    def _raw_page(self, t, request: Int32, position: Int32, wanted) -> Int64:
        """What the table has for a request's token, -1 if it is not ``wanted``."""
        size = t.table.element_type.width // 8
        column = Int64(position // self.n % t.table.shape[1])
        offset = Int64(request) * t.table.stride[0] + column * t.table.stride[1]
        return ptx.load_integer(t.table.iterator.toint() + offset * size, size, wanted, -1)

    def _known(self, t, page: Int64) -> Int32:
        """A page of the state, or -1."""
        fine = (page >= 0) & (page < Int64(t.state.shape[0]))
        return Int32(cutlass.select_(fine, Int32(page), Int32(-1)))

    def _page(self, t, request: Int32, position: Int32, wanted) -> Int32:
        """The page of the state with a request's token, -1 if it has none."""
        return self._known(t, self._raw_page(t, request, position, wanted))

    def _before(self, closes, position: Int32) -> Int32:
        """How many rows of the state are read for a request whose tokens begin at ``position``."""
        most = cutlass.min(position, (self.length - self.ratio) + position % self.ratio)
        return Int32(cutlass.select_(closes, most, Int32(0)))

    @cute.jit
    def save(self, t, lane: Int32, first: Int32, apart: Int32):
        """Tokens number ``first``, ``first + apart``, … into the state, but for those that :meth:`_tail` writes."""
        tokens, requests = t.kv.shape[0], t.table.shape[0]
        ring = self.n * t.table.shape[1]
        count = (tokens - first + apart - 1) // apart
        for batch in cutlass.range((count + 31) // 32):
            token = first + (batch * 32 + lane) * apart
            request = self._read(t.requests, token, token < tokens, -1)
            position = Int32(self._read(t.positions, token, token < tokens, 0))
            mine = (request >= 0) & (request < Int64(requests)) & (position >= 0)
            row = Int32(request)
            page = self._raw_page(t, row, cutlass.max(position, 0), mine)
            start = Int32(self._read(t.starts, row, mine, 0))
            after = cutlass.min(Int32(self._read(t.starts, row + 1, mine, 0)), tokens)
            begun = position - (token - start)
            before = self._before(start + (self.ratio - 1) - begun % self.ratio < after, begun)
            left = (token - start) % ring >= ring - before
            wanted = mine & (token + ring >= after) & ~left
            page = Int32(cutlass.select_(wanted, self._known(t, page), Int32(-1)))
            self._keep(t, lane, Int32(0), self.d, page, token, position)

    @cute.jit
    def _keep(self, t, lane, begin, columns, page, token, position):
        """The tokens of lanes, if a page is given, into the state: some columns of each series from ``begin`` on."""
        offset = Int64(page) * t.state.stride[0] + Int64((position % self.n) * (2 * self.series * self.d))
        low, high = halves(offset * 4)
        line = position % self.ratio
        todo = Uint32(cute.arch.vote_ballot_sync(page >= 0))
        steps = -(-columns // 128)
        most = 4 if self.bf16 else 2  # loads under way at a time, for which there are registers
        together = max(1, most // (steps * self.series))  # tokens of which they are
        while todo != 0:
            sources, there = [], []
            for i in cutlass.range_constexpr(together):
                there.append(todo != 0)
                found = ptx.trailing_zeros(todo)
                sources.append(found if i == 0 else Int32(cutlass.select_(todo != 0, found, sources[0])))
                todo = todo & (todo - 1)
            for part in cutlass.range_constexpr(self.series):
                for first in cutlass.range_constexpr(0, steps, most):
                    loaded, some = [], min(most, steps - first)
                    for source in sources:
                        at = [cute.arch.shuffle_sync(x, source) for x in (token, line)]
                        words = [cute.arch.shuffle_sync(x, source) for x in (low, high)]
                        to = t.state_bytes + whole(*words)
                        for step in cutlass.range_constexpr(first, first + some):
                            column = 4 * lane + 128 * step
                            if cutlass.const_expr(columns % 128):
                                column = cutlass.min(column, columns - 4)  # those beyond store the same as others
                            column = column + begin + part * self.d
                            loaded.append((to, column, *self._four(t, Int64(at[0]), at[1], column)))
                    for i in cutlass.range_constexpr(together):
                        if there[i]:
                            for to, column, kv, gate, bias in loaded[i * some : (i + 1) * some]:
                                self._store_four(t, to + Int64(column) * 4, kv, gate, bias)

    def _store_four(self, t, to: Int64, kv: list, gate: list, bias: list) -> None:
        values, shift = wide(kv, self.bf16), wide(bias, t.bias_bf16)
        gates = [ptx.add(a, b) for a, b in zip(wide(gate, self.bf16), shift, strict=True)]
        ptx.store(to, [ptx.bits(x) for x in values])
        ptx.store(to + 4 * self.series * self.d, [ptx.bits(x) for x in gates])

    def _four(self, t, token: Int64, line: Int32, column: Int32) -> tuple:
        """Words of four values, their gates and bias."""
        shift = Int64(column * self.size)
        kv = ptx.load(t.kv_bytes + token * t.kv_step + shift, self.size, ptx.STREAMED)
        gate = ptx.load(t.gate_bytes + token * t.gate_step + shift, self.size, ptx.STREAMED)
        size = 2 if t.bias_bf16 else 4
        return kv, gate, ptx.load(t.bias_bytes + Int64(line) * t.bias_step + Int64(column * size), size)


def halves(value: Int64) -> tuple[Int32, Int32]:
    return Int32(value & Int64(0xFFFFFFFF)), Int32(value >> 32)


def whole(low: Int32, high: Int32) -> Int64:
    return (Int64(high) << 32) | (Int64(low) & Int64(0xFFFFFFFF))


def view(kv, gate, bias, positions, requests, starts, cos, sin, state, table, slots, end) -> SimpleNamespace:
    """The tensors of a call with the addresses and steps in bytes of those that are read 16 bytes at a time."""
    size, angle = kv.element_type.width // 8, cos.element_type.width // 8
    return SimpleNamespace(
        kv=kv, positions=positions, requests=requests, starts=starts, cos=cos, state=state, table=table, slots=slots,
        end=end, kv_bytes=kv.iterator.toint(), kv_step=kv.stride[0] * size, gate_bytes=gate.iterator.toint(),
        gate_step=gate.stride[0] * size, bias_bytes=bias.iterator.toint(),
        bias_step=bias.stride[0] * (bias.element_type.width // 8), bias_bf16=bias.element_type is BFloat16,
        cos_bytes=cos.iterator.toint(), cos_step=cos.stride[0] * angle, sin_bytes=sin.iterator.toint(),
        sin_step=sin.stride[0] * angle, state_bytes=state.iterator.toint(),
    )  # fmt: skip
