"""First launch of the TileLang hyper-connection kernels: new streams, and their products with ``fn``."""

import tilelang.language as T

BF16, F32, U32, I64 = "bfloat16", "float32", "uint32", "int64"
WIDE, NARROW = 8, 4  # warps of a projecting block for many and for few tokens
PROJECTING = 3  # narrow blocks on a multiprocessor at a time
HIGH = 0xFFFF0000  # the half of a 32-bit word that is a bf16 number, seen as fp32

ROWS = 16  # tokens of a tile: the tensor-core instruction's M

# The new streams on their way from the first launch to the second: kept in L2 until then, and given up by that read.
L2_HINTS = r"""
#ifndef DSV4_L2_HINTS
#define DSV4_L2_HINTS
static __device__ __forceinline__ void dsv4_store_kept(void* at, unsigned x, unsigned y, unsigned z, unsigned w) {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;"
               :: "l"(at), "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy) : "memory");
}
static __device__ __forceinline__ void dsv4_load_kept(unsigned* to, const void* at) {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(at), "l"(policy) : "memory");
}
#endif
"""


def padded(mix: int) -> int:
    return -(-mix // 8) * 8  # the tensor-core instruction's N is 8


def chunk_slices(hc: int, mix: int, hidden: int) -> int:
    """Slices of 32 columns in a chunk: as many as divide the hidden size and fit into shared memory."""
    most = 4 if hc * mix <= 96 else 1
    return next(n for n in (4, 2, 1) if n <= most and hidden % (32 * n) == 0)


def project_shape(hc: int, mix: int, hidden: int, wide: bool) -> tuple[int, int, int]:
    """Slices in a block, its warps, and rows of the workspace for a token.

    ``wide``: a block owns a whole chunk and adds its slices up, for many tokens. Otherwise it owns one slice, which
    spreads few tokens over the chip, and the second launch adds them up, in the same order.
    """
    slices = chunk_slices(hc, mix, hidden) if wide else 1
    warps = (WIDE if hc <= 4 else 8) if wide else NARROW
    return slices, warps, hidden // (32 * slices)


def low(word):
    """The first of two packed bf16 numbers, as fp32."""
    return T.reinterpret(word << 16, F32)


def high(word):
    """The second of two packed bf16 numbers, as fp32."""
    return T.reinterpret(word & T.uint32(HIGH), F32)


@T.macro
def pack(first, second):
    """Round two fp32 numbers to bf16, packed."""
    wide = T.alloc_local((2,), F32)
    narrow = T.alloc_local((2,), BF16)
    wide[0] = first
    wide[1] = second
    for i in T.vectorized(2):
        narrow[i] = T.cast(wide[i], BF16)
    return T.view(narrow, (1,), U32)[0]


@T.macro
def _load_fn(fn, parts, first, hidden, hc, shared, mix, slices, warps):
    """Cut the block's part of fn into three bf16 parts, each lane's operand of an instruction side by side.

    ``shared``: how many of fn's streams a stream stands for; they are added.
    """
    thread = T.get_thread_binding()
    lane = thread % 32
    columns = padded(mix) // 8
    blocks = slices * hc * columns
    weight = T.alloc_local((8,), F32)
    other = T.alloc_local((8,), F32)
    cut = T.alloc_local((3, 8), U32)
    packed = T.alloc_local((3, 4), U32)
    for i in T.unroll(-(-blocks // warps)):
        block = i * warps + thread // 32
        if block < blocks:
            row = block % columns * 8 + lane // 4
            column = block // columns % hc * hidden + (first + block // (columns * hc)) * 32 + lane % 4 * 8
            for v in T.vectorized(8):
                weight[v] = 0
            if row < mix:
                for v in T.vectorized(8):
                    weight[v] = fn[row, column + v]
                for same in T.unroll(shared - 1):
                    for v in T.vectorized(8):
                        other[v] = fn[row, (same + 1) * hidden + column + v]
                    for v in T.unroll(8):
                        weight[v] = weight[v] + other[v]
            for v in T.unroll(8):
                for part in T.unroll(3):
                    cut[part, v] = T.reinterpret(weight[v], U32) & T.uint32(HIGH)
                    weight[v] = weight[v] - T.reinterpret(cut[part, v], F32)
            for part in T.unroll(3):
                for v in T.unroll(4):
                    packed[part, v] = (cut[part, 2 * v] >> 16) | cut[part, 2 * v + 1]
                for half in T.unroll(2):
                    for v in T.vectorized(2):
                        parts[block, half, part, lane, v] = packed[part, half * 2 + v]


@T.macro
def _load_tile(streams, output, x, y, token, tokens, column, hidden, hc):
    """This lane's 8 columns of all streams, for its two tokens of the tile."""
    for row in T.unroll(2):
        safe = T.cast(T.min(token + 8 * row, tokens - 1), I64)  # a row past the end is computed and never written
        for stream in T.unroll(hc):
            x[row, stream, 0:4] = T.ldg128(streams[safe * (hc * hidden // 2) + column + stream * hidden // 2])
        if output is not None:
            y[row, 0:4] = T.ldg128(output[safe * (hidden // 2) + column])


@T.macro
def _mix_streams(x, y, a, post, comb, fresh, token, tokens, column, hidden, hc, kept):
    """New streams of this lane, as the tensor-core operand ``a``, and written."""
    mixing = T.alloc_local((hc + 1, hc), F32)
    wide = T.alloc_local((2,), F32)
    words = T.alloc_local((4,), U32)
    for row in T.unroll(2):
        safe = T.min(token + 8 * row, tokens - 1)
        for v in T.vectorized(hc):
            mixing[hc, v] = post[safe, v]
        for old in T.unroll(hc):
            for v in T.vectorized(hc):
                mixing[old, v] = comb[safe, old, v]
        for stream in T.unroll(hc):
            for v in T.unroll(4):
                wide[0] = mixing[hc, stream] * low(y[row, v])
                wide[1] = mixing[hc, stream] * high(y[row, v])
                for old in T.unroll(hc):
                    wide[0] = wide[0] + mixing[old, stream] * low(x[row, old, v])
                    wide[1] = wide[1] + mixing[old, stream] * high(x[row, old, v])
                words[v] = pack(wide[0], wide[1])
                a[stream, v // 2, v % 2 * 2 + row] = words[v]
            if token + 8 * row < tokens:
                at = T.cast(token + 8 * row, I64) * (hc * hidden // 2) + column
                if kept:
                    T.call_extern(
                        "handle", "dsv4_store_kept", T.address_of(fresh[at + stream * hidden // 2]),
                        words[0], words[1], words[2], words[3],
                    )  # fmt: skip
                else:
                    for v in T.vectorized(4):
                        fresh[at + (stream * hidden // 2 + v)] = words[v]


@T.macro
def _square(a, square, hc):
    """Sums of squares of the lane's two tokens over the slice."""
    for row in T.unroll(2):
        square[row] = 0
        for stream in T.unroll(hc):
            for v in T.unroll(4):
                word = a[stream, v // 2, v % 2 * 2 + row]
                square[row] = square[row] + low(word) * low(word)
                square[row] = square[row] + high(word) * high(word)
        square[row] = square[row] + T.shfl_xor(square[row], 1)
        square[row] = square[row] + T.shfl_xor(square[row], 2)


def _mma(a, at_a, b, at_b, sums, at_sums):
    return T.ptx_mma(
        F32, "m16n8k16", "row", "col", "bf16", "bf16", "fp32",
        a.data, at_a, b.data, at_b, sums.data, at_sums, T.bool(False),
    )  # fmt: skip


@T.macro
def _multiply(a, parts, fine, coarse, block, mix, hc):
    """Tensor-core products of the lane's streams with the slice's part of fn; the small parts are summed apart."""
    blocks = padded(mix) // 8
    near = blocks if blocks <= 5 else blocks // 2  # held at a time, for the registers' sake
    b = T.alloc_local((3, near, 2), U32)
    lane = T.get_thread_binding() % 32
    for v in T.unroll(blocks * 4):
        fine[v] = 0
        coarse[v] = 0
    for stream in T.unroll(hc):
        for half in T.unroll(2):
            for far in T.unroll(blocks // near):
                for part in T.unroll(3):
                    for n in T.unroll(near):
                        for v in T.vectorized(2):
                            b[part, n, v] = parts[block + stream * blocks + far * near + n, half, part, lane, v]
                # Neighbours in this order are independent: an instruction waits for its accumulator.
                for n in T.unroll(near):
                    _mma(a, (stream * 2 + half) * 4, b, (2 * near + n) * 2, fine, (far * near + n) * 4)
                for n in T.unroll(near):
                    _mma(a, (stream * 2 + half) * 4, b, n * 2, coarse, (far * near + n) * 4)
                for n in T.unroll(near):
                    _mma(a, (stream * 2 + half) * 4, b, (near + n) * 2, fine, (far * near + n) * 4)
    for v in T.unroll(blocks * 4):
        coarse[v] = coarse[v] + fine[v]


@T.macro
def project(streams_, placing, fn, new_, partial, chunk, group, groups, tokens, hidden, hc, shared, mix, wide, kept):
    """``placing``: (output, post, comb) of the sublayer before, or None; ``fn``: None for new streams alone.

    ``hc``: how many streams are held; ``shared``: how many each of them stands for; ``kept``: the new streams in L2,
    for the second launch.
    """
    if kept:
        T.import_source(L2_HINTS)
    slices, warps, _ = project_shape(hc, mix, hidden, wide)
    columns = padded(mix)
    early = hc <= 4  # registers for the next loads while this slice is multiplied
    streams = T.view(streams_, (tokens * (hc * hidden // 2),), U32)
    x = T.alloc_local((2, hc, 4), U32)
    y = T.alloc_local((2, 4), U32)
    a = T.alloc_local((hc, 2, 4), U32)
    thread = T.get_thread_binding()
    warp = thread // 32
    lane = thread % 32
    column = (chunk * slices * 32 + lane % 4 * 8) // 2  # in words of two numbers
    tiles = T.ceildiv(tokens, ROWS)
    first = group * warps + warp  # each warp takes its own tiles, one slice after the other
    stride = groups * warps
    out = None
    if placing is not None:
        out = T.view(placing[0], (tokens * (hidden // 2),), U32)
        fresh = T.view(new_, (tokens * (hc * hidden // 2),), U32)
    if fn is not None and not wide:
        T.pdl_sync()  # this launch begins before its predecessor has ended; many tokens have no use for that
    if early:
        _load_tile(streams, out, x, y, first * ROWS + lane // 4, tokens, column, hidden, hc)
    if fn is not None:
        parts = T.alloc_shared((slices * hc * columns // 8, 2, 3, 32, 2), U32)
        fine = T.alloc_local((columns // 2,), F32)
        coarse = T.alloc_local((columns // 2,), F32)
        total = T.alloc_local((columns // 2,), F32)  # over the chunk's slices
        square = T.alloc_local((2,), F32)
        squares = T.alloc_local((2,), F32)
        _load_fn(fn, parts, chunk * slices, hidden, hc, shared, mix, slices, warps)
        T.sync_threads()
        T.pdl_trigger()
    if not early:
        _load_tile(streams, out, x, y, first * ROWS + lane // 4, tokens, column, hidden, hc)
    for i in T.serial(T.ceildiv(T.max(tiles - first, 0), stride) * slices):
        token = (first + i // slices * stride) * ROWS + lane // 4
        slice_ = i % slices
        if placing is not None:
            _mix_streams(x, y, a, placing[1], placing[2], fresh, token, tokens, column + slice_ * 16, hidden, hc, kept)
        else:
            for row in T.unroll(2):
                for stream in T.unroll(hc):
                    for v in T.unroll(4):
                        a[stream, v // 2, v % 2 * 2 + row] = x[row, stream, v]
        next_token = (first + (i + 1) // slices * stride) * ROWS + lane // 4
        next_column = column + (i + 1) % slices * 16
        if early and next_token - lane // 4 < tokens:
            _load_tile(streams, out, x, y, next_token, tokens, next_column, hidden, hc)
        if fn is not None:
            _square(a, square, hc)
            _multiply(a, parts, fine, coarse, slice_ * hc * columns // 8, mix, hc)
            if slice_ == 0:
                for v in T.unroll(columns // 2):
                    total[v] = 0
                for row in T.unroll(2):
                    squares[row] = 0
            for v in T.unroll(columns // 2):
                total[v] = total[v] + coarse[v]
            for row in T.unroll(2):
                squares[row] = squares[row] + square[row]
            if slice_ == slices - 1:
                for row in T.unroll(2):
                    if token + 8 * row < tokens:
                        for n in T.unroll(columns // 8):
                            for v in T.vectorized(2):
                                partial[token + 8 * row, chunk, n * 8 + lane % 4 * 2 + v] = total[n * 4 + row * 2 + v]
                        # Zeros after it: a part of a 32-byte sector would cost a read.
                        fine[0] = T.if_then_else(lane % 4 == 0, squares[row], T.float32(0))
                        fine[1] = 0
                        for v in T.vectorized(2):
                            partial[token + 8 * row, chunk, columns + lane % 4 * 2 + v] = fine[v]
        if not early and next_token - lane // 4 < tokens:
            _load_tile(streams, out, x, y, next_token, tokens, next_column, hidden, hc)
