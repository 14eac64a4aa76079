"""Single PTX instructions on scalars, where rounding, packing or width has to be exactly what is written.

A *word* is a Uint32; two bf16 values in a word are called a pair, the one with the lower index in the low half.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute.arch import inline_ptx


def _word(code: str, *operands) -> Uint32:
    return inline_ptx(code, write_only_types=[Uint32], read_only_args=list(operands))


def _float(code: str, *operands) -> Float32:
    return inline_ptx(code, write_only_types=[Float32], read_only_args=list(operands))


# Global memory, at addresses aligned to the access. Relaxed loads keep the order they are written in; the assembler
# moves others behind whatever does not need them, to save registers, and their latencies add up.

STREAMED = "ld.relaxed.gpu.global"  # passes the L1 cache by
CACHED = "ld.global"
ORDERED = "ld.relaxed.cta.global"  # through the L1 cache


def load(pointer, words: int, kind: str = CACHED) -> list[Uint32]:
    """``words`` (1, 2 or 4) words in one instruction."""
    if words == 1:
        return [_word(f"{kind}.b32 {{$w0}}, [{{$r0}}];", pointer)]
    registers = ", ".join(f"{{$w{i}}}" for i in range(words))
    code = f"{kind}.v{words}.b32 {{{registers}}}, [{{$r0}}];"
    return list(inline_ptx(code, write_only_types=[Uint32] * words, read_only_args=[pointer]))


def load_real(pointer) -> Float32:
    """A bf16 or fp32, streamed."""
    if pointer.value_type is Float32:
        return real(load(pointer, 1, STREAMED)[0])
    half = (
        f"{{ .reg .b16 zero, half; mov.b16 zero, 0; {STREAMED}.b16 half, [{{$r0}}]; mov.b32 {{$w0}}, {{zero, half}}; }}"
    )
    return real(_word(half, pointer))


def load_index(pointer) -> Int64:
    """A non-negative int32 or int64 below 2^32, streamed."""
    return Int64(load(pointer, 1, STREAMED)[0])


def load_integer(address: Int64, size: int, condition, other: int) -> Int64:
    """A signed integer of 4 or 8 bytes, streamed; ``other`` where the condition does not hold: nothing is read."""
    code = f"ld.b{8 * size} value" if size == 8 else "ld.b32 half"
    code = code.replace("ld", STREAMED)
    widen = "" if size == 8 else "cvt.s64.s32 value, half; "
    return inline_ptx(
        "{ .reg .pred here; .reg .b32 half; .reg .b64 value; setp.ne.b32 here, {$r1}, 0; "
        f"mov.b32 half, {other}; mov.b64 value, {other}; @here {code}, [{{$r0}}]; {widen}mov.b64 {{$w0}}, value; }}",
        write_only_types=[Int64],
        read_only_args=[address, Int32(condition)],
    )


def load_if(pointer, condition, other: Uint32) -> Uint32:
    """A word, or a byte as one, where the condition holds; ``other`` elsewhere: nothing is read."""
    kind = "b32" if pointer.value_type.width == 32 else "u8"
    return _word(
        "{ .reg .pred here; setp.ne.b32 here, {$r1}, 0; mov.b32 {$w0}, {$r2}; "
        f"@here ld.global.{kind} {{$w0}}, [{{$r0}}]; }}",
        pointer, Int32(condition), other,
    )  # fmt: skip


def store(pointer, words: list[Uint32]) -> None:
    """1, 2 or 4 words in one instruction."""
    if len(words) == 1:
        inline_ptx("st.global.b32 [{$r0}], {$r1};", read_only_args=[pointer, *words])
        return
    registers = ", ".join(f"{{$r{i + 1}}}" for i in range(len(words)))
    inline_ptx(f"st.global.v{len(words)}.b32 [{{$r0}}], {{{registers}}};", read_only_args=[pointer, *words])


# fp32, rounded to nearest even; never contracted, subnormals kept


def bits(x: Float32) -> Uint32:
    return _word("mov.b32 {$w0}, {$r0};", x)


def real(word: Uint32) -> Float32:
    return _float("mov.b32 {$w0}, {$r0};", word)


def add(a: Float32, b: Float32) -> Float32:
    return _float("add.rn.f32 {$w0}, {$r0}, {$r1};", a, b)


def sub(a: Float32, b: Float32) -> Float32:
    return _float("sub.rn.f32 {$w0}, {$r0}, {$r1};", a, b)


def mul(a: Float32, b: Float32) -> Float32:
    return _float("mul.rn.f32 {$w0}, {$r0}, {$r1};", a, b)


def fma(a: Float32, b: Float32, c: Float32) -> Float32:
    return _float("fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", a, b, c)


def div(a: Float32, b: Float32) -> Float32:
    return _float("div.rn.f32 {$w0}, {$r0}, {$r1};", a, b)


def sqrt(a: Float32) -> Float32:
    return _float("sqrt.rn.f32 {$w0}, {$r0};", a)


def maximum(a: Float32, b: Float32) -> Float32:
    return _float("max.f32 {$w0}, {$r0}, {$r1};", a, b)


def maximum_nan(a: Float32, b: Float32) -> Float32:
    """NaN where one of them is."""
    return _float("max.NaN.f32 {$w0}, {$r0}, {$r1};", a, b)


def add_abs(a: Float32) -> Float32:
    """a + |a|, in one instruction."""
    return _float("{ .reg .f32 size; abs.f32 size, {$r0}; add.rn.f32 {$w0}, {$r0}, size; }", a)


def select(condition, yes: Uint32, no: Uint32) -> Uint32:
    return Uint32(cutlass.select_(condition, yes, no))


def multiply_add(a: Uint32, b: int, c: Uint32) -> Uint32:
    """a · b + c of integers, modulo 2^32."""
    return _word(f"mad.lo.u32 {{$w0}}, {{$r0}}, {b % 2**32:#x}, {{$r1}};", a, c)


def merge(mask: int, ones: Uint32, zeros: Uint32) -> Uint32:
    """``ones`` where the mask has ones, ``zeros`` elsewhere, in one instruction."""
    return _word(f"lop3.b32 {{$w0}}, {{$r0}}, {{$r1}}, {mask:#x}, 0xe4;", ones, zeros)


# Conversions


def unpack(pair: Uint32) -> tuple[Float32, Float32]:
    """The two values of a bf16 pair."""
    return real(pair << Uint32(16)), real(pair & Uint32(0xFFFF0000))


def pack_bf16(low: Float32, high: Float32) -> Uint32:
    """Two fp32 rounded to a bf16 pair."""
    return _word("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", low, high)


def pack_e4m3(a: Float32, b: Float32, c: Float32, d: Float32) -> Uint32:
    """Four fp32 to e4m3fn bytes, the first lowest; finite values saturate at ±448, NaN gives 0x7F."""
    code = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, {$r1}, {$r0}; "
        "cvt.rn.satfinite.e4m3x2.f32 high, {$r3}, {$r2}; mov.b32 {$w0}, {low, high}; }"
    )
    return _word(code, a, b, c, d)


def pack_e4m3_halves(low: Uint32, high: Uint32) -> Uint32:
    """Two pairs of fp16 to e4m3fn bytes, as :func:`pack_e4m3`."""
    code = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f16x2 low, {$r0}; "
        "cvt.rn.satfinite.e4m3x2.f16x2 high, {$r1}; mov.b32 {$w0}, {low, high}; }"
    )
    return _word(code, low, high)


def pack_e2m1(values: list[Float32]) -> Uint32:
    """Eight fp32 to E2M1 nibbles, the first lowest, ties to even; from SM100 on."""
    converts = " ".join(f"cvt.rn.satfinite.e2m1x2.f32 b{i}, {{$r{2 * i + 1}}}, {{$r{2 * i}}};" for i in range(4))
    return _word(f"{{ .reg .b8 b0, b1, b2, b3; {converts} mov.b32 {{$w0}}, {{b0, b1, b2, b3}}; }}", *values)


# Pairs; an operand that is an int is a constant, the same in both halves


def _pair(operation: str, *operands: Uint32 | int) -> Uint32:
    moves, names, words = "", [], []
    for index, operand in enumerate(operands):
        if isinstance(operand, int):  # these instructions take registers only
            names.append(f"c{index}")
            moves += f".reg .b32 c{index}; mov.b32 c{index}, {both(operand):#010x}; "
        else:
            names.append(f"{{$r{len(words)}}}")
            words.append(operand)
    return _word(f"{{ {moves}{operation} {{$w0}}, {', '.join(names)}; }}", *words)


def both(half: int) -> int:
    """The word of a pair of equal values."""
    return half << 16 | half


def pair_abs(a: Uint32) -> Uint32:
    """Magnitudes."""
    return _pair("abs.bf16x2", a)


def pair_of(a: Uint32, half: int) -> Uint32:
    """Both halves one half of ``a``; the assembler lets the instructions that use it choose the half."""
    code = "{ .reg .b16 h0, h1; mov.b32 {h0, h1}, {$r0}; mov.b32 {$w0}, {hX, hX}; }".replace("X", str(half))
    return _word(code, a)


def pair_max(a: Uint32, b: Uint32 | int) -> Uint32:
    """Elementwise max; NaN if either is NaN."""
    return _pair("max.NaN.bf16x2", a, b)


def pair_max_abs(a: Uint32, b: Uint32) -> Uint32:
    """Elementwise max of the magnitudes, with some sign; NaN if either is NaN."""
    return _pair("max.NaN.xorsign.abs.bf16x2", a, b)


def pair_min(a: Uint32, b: Uint32) -> Uint32:
    """Elementwise min."""
    return _pair("min.bf16x2", a, b)


def integers_max(a: Uint32, b: Uint32) -> Uint32:
    """Elementwise max of unsigned integers of 16 bits."""
    return _word("max.u16x2 {$w0}, {$r0}, {$r1};", a, b)


def pair_mul(a: Uint32, b: Uint32 | int) -> Uint32:
    return _pair("mul.rn.bf16x2", a, b)


def pair_fma(a: Uint32, b: Uint32 | int, c: Uint32 | int) -> Uint32:
    return _pair("fma.rn.bf16x2", a, b, c)


def halves_mul(a: Uint32, b: int) -> Uint32:
    """Of fp16, by a word of two."""
    return _word(f"{{ .reg .b32 b; mov.b32 b, {b:#010x}; mul.rn.f16x2 {{$w0}}, {{$r0}}, b; }}", a)


def permute(a: Uint32, b: Uint32, selector: int | Uint32) -> Uint32:
    """Bytes of ``b:a`` by four nibbles of ``selector``; bit 3 of a nibble repeats the sign of the byte instead."""
    if isinstance(selector, int):
        return _word(f"prmt.b32 {{$w0}}, {{$r0}}, {{$r1}}, 0x{selector:04x};", a, b)
    return _word("prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};", a, b, selector)


# Shared memory, at pointers or 32-bit addresses, and copies into it


def load_shared(pointer, words: int) -> list[Uint32]:
    """``words`` (1, 2 or 4) words in one instruction, at an address aligned to them."""
    return load(pointer, words, "ld.shared")


def store_shared(pointer, words: list[Uint32]) -> None:
    """1, 2 or 4 words in one instruction."""
    if len(words) == 1:
        inline_ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[pointer, *words])
        return
    registers = ", ".join(f"{{$r{i + 1}}}" for i in range(len(words)))
    inline_ptx(f"st.shared.v{len(words)}.b32 [{{$r0}}], {{{registers}}};", read_only_args=[pointer, *words])


def bulk(to, source, size: int, barrier) -> None:
    """A copy of ``size`` bytes from global to shared memory by one thread, all at multiples of 16 bytes."""
    inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
        read_only_args=[to, source, Int32(size), barrier],
    )


def max_shared(address: Int32, value: Int32) -> None:
    """The larger signed integer of two, at the address."""
    inline_ptx("red.shared.max.s32 [{$r0}], {$r1};", read_only_args=[address, value])


def copy_async(to: Int32, source: Int64, size: int = 16) -> None:
    """4 or 16 bytes from global memory; 16 past the L1 cache."""
    cache = "cg" if size == 16 else "ca"
    inline_ptx(f"cp.async.{cache}.shared.global [{{$r0}}], [{{$r1}}], {size};", read_only_args=[to, source])


def wait_for_copies() -> None:
    """All of this thread."""
    inline_ptx("cp.async.wait_all;")


def store_bytes(pointer, bytes_: int, word: Uint32) -> None:
    """The lowest 1 or 2 bytes to global memory."""
    if bytes_ == 1:
        inline_ptx("st.global.b8 [{$r0}], {$r1};", read_only_args=[pointer, word])
    else:
        code = "{ .reg .b16 low, high; mov.b32 {low, high}, {$r1}; st.global.b16 [{$r0}], low; }"
        inline_ptx(code, read_only_args=[pointer, word])


# Barriers in shared memory


def barrier_init(address: Int32, count: int) -> None:
    inline_ptx("mbarrier.init.shared.b64 [{$r0}], {$r1};", read_only_args=[address, Int32(count)])


def barrier_arrive(address: Int32) -> None:
    inline_ptx("mbarrier.arrive.shared.b64 _, [{$r0}];", read_only_args=[address])


def in_block(address: Int32, rank: Int32) -> Int32:
    """The same address in another block of the cluster."""
    return Int32(_word("mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};", address, rank))


def barrier_arrive_if(address: Int32, condition) -> None:
    """At an address of :func:`in_block`, of who has read shared memory: what it has written is not seen there.

    For that the scope would have to be the cluster, whose release is a fence in every thread that arrives.
    """
    inline_ptx(
        "{ .reg .pred here; setp.ne.b32 here, {$r1}, 0; @here mbarrier.arrive.shared::cluster.b64 _, [{$r0}]; }",
        read_only_args=[address, Int32(condition)],
    )


def barrier_arrive_after_copies(address: Int32) -> None:
    """When all asynchronous copies of this thread so far have ended; one of the arrivals that the barrier counts."""
    inline_ptx("cp.async.mbarrier.arrive.noinc.shared.b64 [{$r0}];", read_only_args=[address])


def barrier_expect(address: Int32, count: int) -> None:
    """Arrive, and let the phase also wait for so many bytes."""
    inline_ptx("mbarrier.arrive.expect_tx.shared.b64 _, [{$r0}], {$r1};", read_only_args=[address, Int32(count)])


def barrier_wait(address: Int32, parity: Int32, scope: str = "cta") -> None:
    """Until the phase with this parity has ended."""
    code = (
        "{ .reg .pred done; again: "
        f"mbarrier.try_wait.parity.acquire.{scope}.shared::cta.b64 done, [{{$r0}}], {{$r1}}; @!done bra again; }}"
    )
    inline_ptx(code, read_only_args=[address, parity])


def stage_wait(stages, state) -> None:
    """Until a stage of a pipeline is full; the library's own wait sleeps, and the assembler moves no instruction past
    the loop that it makes of that: products and sums are laid out worse on both sides."""
    barrier_wait(stages.sync_object_full.get_barrier(state.index), state.phase)


def send(address: Int32, barrier: Int32, rank: Int32, word: Uint32) -> None:
    """A word to the same address in the block ``rank`` of the cluster, whose barrier counts its four bytes."""
    code = (
        "{ .reg .b32 to, at; mapa.shared::cluster.u32 to, {$r0}, {$r2}; mapa.shared::cluster.u32 at, {$r1}, {$r2}; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], {$r3}, [at]; }"
    )
    inline_ptx(code, read_only_args=[address, barrier, rank, word])


def trailing_zeros(word: Uint32) -> Int32:
    """32 for 0."""
    return Int32(_word("{ .reg .b32 back; brev.b32 back, {$r0}; clz.b32 {$w0}, back; }", word))
