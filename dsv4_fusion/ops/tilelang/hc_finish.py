"""Second launch of the TileLang hyper-connection kernels: post, comb, and the collapsed, normalised streams."""

import tilelang.language as T

from .hc_project import F32, L2_HINTS, NARROW, ROWS, U32, chunk_slices, high, low, pack, padded

FINISHING = 3  # finishing blocks on a multiprocessor at a time


def finish_shape(hc: int, hidden: int) -> tuple[int, int, bool]:
    """Vectors of 8 columns a thread, threads, and whether all streams are held in registers while the sums arrive."""
    vectors = 2 if hidden <= 8192 else 4
    threads = -(-hidden // (8 * vectors * 32)) * 32
    return vectors, threads, vectors * hc <= 16


@T.macro
def _scale(matrix, given, factors, columns, hc, hc_eps):
    """One pass: the factors of the columns (or rows) from those of the rows (or columns)."""
    terms = T.alloc_local((hc,), F32)
    for i in T.unroll(hc):
        for j in T.unroll(hc // 2):
            first = matrix[j, i] if columns else matrix[i, j]
            second = matrix[j + hc // 2, i] if columns else matrix[i, j + hc // 2]
            terms[j] = first * given[j] + second * given[j + hc // 2]
        for j in T.unroll(hc // 2 - 1):
            terms[0] = terms[0] + terms[j + 1]
        factors[i] = factors[i] * T.fast_rcp(factors[i] * terms[0] + hc_eps)


@T.macro
def _sinkhorn(logits, lane, comb, token, hc, hc_eps, iterations):
    """Scale rows and columns of this lane's matrix in turn; only the factors are kept."""
    matrix = T.alloc_local((hc, hc), F32)
    across = T.alloc_local((hc,), F32)
    down = T.alloc_local((hc,), F32)
    total = T.alloc_var(F32)
    for i in T.unroll(hc):
        peak = T.alloc_var(F32)
        peak = logits[lane, i * hc]
        for j in T.unroll(hc - 1):
            peak = T.max(peak, logits[lane, i * hc + j + 1])
        total = 0
        for j in T.unroll(hc):
            matrix[i, j] = T.exp(logits[lane, i * hc + j] - peak)
            total = total + matrix[i, j]
        total = 1.0 / total
        for j in T.unroll(hc):
            matrix[i, j] = matrix[i, j] * total + hc_eps
        across[i] = 1
        down[i] = 1
    _scale(matrix, across, down, True, hc, hc_eps)
    for _ in T.serial(iterations - 1):
        _scale(matrix, down, across, False, hc, hc_eps)
        _scale(matrix, across, down, True, hc, hc_eps)
    for i in T.unroll(hc):
        for j in T.unroll(hc):
            matrix[i, j] = across[i] * matrix[i, j] * down[j]
        for j in T.vectorized(hc):
            comb[token, i, j] = matrix[i, j]


@T.macro
def _add_share(partial, mixes, token, share, hidden, held, mix, wide):
    """Add one of the fixed shares of a token's partial sums, in order; a lane a column."""
    _, threads, _ = finish_shape(held, hidden)
    chunk = chunk_slices(held, mix, hidden)
    chunks = hidden // (32 * chunk)
    count = -(-chunks // (threads // 32))
    rows = 1 if wide else chunk  # of the workspace in a chunk
    columns = padded(mix) + 8
    lane = T.get_thread_binding() % 32
    total = T.alloc_var(F32)
    for c in T.unroll(-(-columns // 32)):
        mixes[c] = 0
        for i in T.unroll(count):
            if share * count + i < chunks and c * 32 + lane < columns:
                total = partial[token, (share * count + i) * rows, c * 32 + lane]
                for j in T.unroll(rows - 1):
                    total = total + partial[token, (share * count + i) * rows + j + 1, c * 32 + lane]
                mixes[c] = mixes[c] + total


@T.macro
def _add_shares(partial, mixes, token, hidden, held, mix, wide):
    """A token's mixes before scaling, to every warp: each adds a share, then all add the shares."""
    _, threads, _ = finish_shape(held, hidden)
    width = -(-(padded(mix) + 8) // 32)
    shares = T.alloc_shared((threads // 32, width * 32), F32)
    warp = T.get_thread_binding() // 32
    lane = T.get_thread_binding() % 32
    _add_share(partial, mixes, token, warp, hidden, held, mix, wide)
    for c in T.unroll(width):
        shares[warp, c * 32 + lane] = mixes[c]
    T.sync_threads()
    for c in T.unroll(width):
        mixes[c] = 0
        for i in T.unroll(threads // 32):
            mixes[c] = mixes[c] + shares[i, c * 32 + lane]


@T.macro
def _place_token(mixes, logits, at, offset, factor, post, token, rms_eps, hidden, held, hc, mix):
    """post of a token, and the logits of its comb, from a warp's mixes."""
    columns = padded(mix)
    lane = T.get_thread_binding() % 32
    mean = T.shfl_sync(mixes[columns // 32], columns % 32) / T.float32(held * hidden)
    rsqrt = T.rsqrt(mean + rms_eps)
    for c in T.unroll(-(-mix // 32)):
        which = c * 32 + lane
        if which >= hc and which < 2 * hc:
            post[token, which - hc] = 2.0 / (1.0 + T.exp(-(mixes[c] * rsqrt * factor[c] + offset[c])))
        if which >= 2 * hc and which < mix:
            logits[at, which - 2 * hc] = mixes[c] * rsqrt * factor[c] + offset[c]


@T.macro
def _place(
    partial, offset, factor, post, comb, block, tokens, rms_eps, hc_eps, iterations, hidden, held, hc, mix, wide
):
    """post and comb. ``wide``: of 32 tokens, a warp a token for the sums, then a lane a token; else of one token."""
    _, threads, _ = finish_shape(held, hidden)
    warps = threads // 32
    width = -(-(padded(mix) + 8) // 32)
    logits = T.alloc_shared((32 if wide else 1, hc * hc + 1), F32)
    mixes = T.alloc_local((width,), F32)
    share = T.alloc_local((width,), F32)
    thread = T.get_thread_binding()
    if wide:
        for i in T.serial(T.ceildiv(T.max(T.min(tokens - block * 32, 32) - thread // 32, 0), warps)):
            local = thread // 32 + i * warps
            for c in T.unroll(width):
                mixes[c] = 0
            for j in T.unroll(warps):
                _add_share(partial, share, block * 32 + local, j, hidden, held, mix, wide)
                for c in T.unroll(width):
                    mixes[c] = mixes[c] + share[c]
            _place_token(mixes, logits, local, offset, factor, post, block * 32 + local, rms_eps, hidden, held, hc, mix)
        T.sync_threads()
        if thread < 32 and block * 32 + thread < tokens:
            _sinkhorn(logits, thread, comb, block * 32 + thread, hc, hc_eps, iterations)
    else:
        _add_shares(partial, mixes, block, hidden, held, mix, wide)
        if thread < 32:
            _place_token(mixes, logits, 0, offset, factor, post, block, rms_eps, hidden, held, hc, mix)
            T.sync_warp()
            _sinkhorn(logits, 0, comb, block, hc, hc_eps, iterations)  # every lane the same


@T.macro
def _load_streams(streams, x, i, vector, token, held, kept):
    for stream in T.unroll(held):
        if kept:
            T.call_extern(
                "handle",
                "dsv4_load_kept",
                T.address_of(x[i, stream, 0]),
                T.address_of(streams[token, stream, vector * 4]),
            )
        else:
            for v in T.vectorized(4):
                x[i, stream, v] = streams[token, stream, vector * 4 + v]


@T.macro
def _collapse(
    streams_, partial, offset, factor, norm_weight, collapsed_, token, tokens, rms_eps, hc_eps, norm_eps,
    hidden, held, hc, mix, norm, wide, kept,
):  # fmt: skip
    vectors, threads, early = finish_shape(held, hidden)
    warps = threads // 32
    columns = padded(mix)
    streams = T.view(streams_, (tokens, held, hidden // 2), U32)
    collapsed = T.view(collapsed_, (tokens, hidden // 2), U32)
    squares = T.alloc_shared((32,), F32)
    x = T.alloc_local((vectors, held, 4), U32)
    weight = T.alloc_local((vectors, 8), F32)
    pre = T.alloc_local((hc,), F32)
    value = T.alloc_local((2,), F32)
    words = T.alloc_local((vectors, 4), U32)
    mixes = T.alloc_local((-(-(columns + 8) // 32),), F32)
    square = T.alloc_var(F32)

    thread = T.get_thread_binding()
    warp = thread // 32
    lane = thread % 32
    if early:
        for i in T.unroll(vectors):
            if i * threads + thread < hidden // 8:
                _load_streams(streams, x, i, i * threads + thread, token, held, kept)
    _add_shares(partial, mixes, token, hidden, held, mix, wide)
    mean = T.shfl_sync(mixes[columns // 32], columns % 32) / T.float32(held * hidden)
    own = mixes[0] * T.rsqrt(mean + rms_eps) * factor[0] + offset[0]
    gate = 1.0 / (1.0 + T.exp(-own)) + hc_eps
    for stream in T.unroll(hc):
        pre[stream] = T.shfl_sync(gate, stream)
    if held < hc:
        for stream in T.unroll(hc - 1):
            pre[0] = pre[0] + pre[stream + 1]
    square = 0
    for i in T.unroll(vectors):
        if i * threads + thread < hidden // 8:
            if not early:
                _load_streams(streams, x, i, i * threads + thread, token, held, kept)
            for v in T.unroll(4):
                value[0] = pre[0] * low(x[i, 0, v])
                value[1] = pre[0] * high(x[i, 0, v])
                for stream in T.unroll(held - 1):
                    value[0] = value[0] + pre[stream + 1] * low(x[i, stream + 1, v])
                    value[1] = value[1] + pre[stream + 1] * high(x[i, stream + 1, v])
                words[i, v] = pack(value[0], value[1])
                if norm:
                    square = square + low(words[i, v]) * low(words[i, v])
                    square = square + high(words[i, v]) * high(words[i, v])
    if norm:
        for i in T.unroll(vectors):
            if i * threads + thread < hidden // 8:
                for v in T.vectorized(8):
                    weight[i, v] = norm_weight[(i * threads + thread) * 8 + v]
        for step in T.unroll(5):
            square = square + T.shfl_xor(square, 1 << step)
        if lane == 0:
            squares[warp] = square
        T.sync_threads()
        square = 0
        for i in T.unroll(warps):
            square = square + squares[i]
        rstd = T.rsqrt(square / T.float32(hidden) + norm_eps)
    for i in T.unroll(vectors):
        if i * threads + thread < hidden // 8:
            if norm:
                for v in T.unroll(4):
                    words[i, v] = pack(
                        weight[i, 2 * v] * (low(words[i, v]) * rstd), weight[i, 2 * v + 1] * (high(words[i, v]) * rstd)
                    )
            for v in T.vectorized(4):
                collapsed[token, (i * threads + thread) * 4 + v] = words[i, v]


@T.macro
def finish(
    streams, partial, base, scale, norm_weight, post, comb, collapsed, block, tokens,
    rms_eps, hc_eps, norm_eps, iterations, hidden, held, hc, mix, norm, wide, kept,
):  # fmt: skip
    """``held``: streams in memory, ``hc`` or, where all are the same, one; ``kept``: in L2, by the first launch.

    The first blocks do post and comb, so that no other waits for Sinkhorn; then the last tokens, still in L2.
    """
    vectors, threads, _ = finish_shape(held, hidden)
    if vectors == 2 and held <= 4 and threads <= 512:  # more than that does not fit into the registers
        T.annotate_min_blocks_per_sm(FINISHING if threads <= 256 else 2)
    if kept:
        T.import_source(L2_HINTS)
    # The next first launch may begin: it waits for the end of this one. Not where both would crowd the chip.
    if not wide:  # noqa: SIM102 - known when it is compiled, the other is not
        if tokens <= NARROW * ROWS:
            T.pdl_trigger()
    offset = T.alloc_local((-(-mix // 32),), F32)
    factor = T.alloc_local((-(-mix // 32),), F32)
    lane = T.get_thread_binding() % 32
    for c in T.unroll(-(-mix // 32)):  # before the wait: the first launch does not write these
        which = T.min(c * 32 + lane, mix - 1)
        offset[c] = base[which]
        factor[c] = scale[T.if_then_else(which < hc, 0, T.if_then_else(which < 2 * hc, 1, 2))]
    T.pdl_sync()
    placing = T.ceildiv(tokens, 32 if wide else 1) if mix > hc else 0
    if mix > hc:
        if block < placing:
            _place(
                partial,
                offset,
                factor,
                post,
                comb,
                block,
                tokens,
                rms_eps,
                hc_eps,
                iterations,
                hidden,
                held,
                hc,
                mix,
                wide,
            )
        else:
            _collapse(
                streams, partial, offset, factor, norm_weight, collapsed, tokens - 1 - (block - placing), tokens,
                rms_eps, hc_eps, norm_eps, hidden, held, hc, mix, norm, wide, kept,
            )  # fmt: skip
    else:
        _collapse(
            streams, partial, offset, factor, norm_weight, collapsed, block, tokens, rms_eps, hc_eps, norm_eps, hidden,
            held, hc, mix, norm, wide, kept,
        )  # fmt: skip
