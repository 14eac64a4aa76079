"""The indexer's queries: RoPE, optional Hadamard, quantisation and folded weights in one launch.

Limits, which the operator checks: an even number of rotated pairs in multiples of 8 (R a multiple of 16), rows of q at
multiples of 16 bytes, rows of cos and sin at multiples of four values; compute capability 9.0 or later.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import Future

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int64, Uint32
from cutlass.cute.runtime import make_fake_tensor
from torch import Tensor

from .._indexer import MXFP4_FLOOR
from .._library import compiling, layout, number, several
from . import launch, ptx
from .formats import NAN, FP8Rows, MXFP4Rows, rows_of
from .rows import CHUNK, LANES

THREADS = 128
# From so many rows on, the lanes of a row and the heads of a thread, by (MXFP4, Hadamard); measured on an H200. More
# heads load the angles once; with a Hadamard transform fewer lanes have less to exchange, which gains more.
SHARES = {
    (False, False): ((0, LANES, 1), (8192, LANES, 4)),
    (True, False): ((0, LANES, 1), (8192, LANES, 2), (32768, LANES // 2, 1), (262144, LANES, 4)),
    (False, True): ((0, LANES, 1), (8192, LANES // 2, 1)),
    (True, True): ((0, LANES, 1), (8192, LANES // 2, 1)),
}
DEFAULTS = {  # of the operators' schemas
    False: {"hadamard": False, "power_of_two_scale": True, "amax_floor": 1e-4},
    True: {"hadamard": False, "ties": "even", "amax_floor": MXFP4_FLOOR},
}


def shares(mxfp4: bool, heads: int, hadamard: bool) -> list[tuple[int, int, int]]:
    """The entries of ``SHARES``, with as many heads a thread as divide H."""
    return [(rows, lanes, math.gcd(heads, most)) for rows, lanes, most in SHARES[mxfp4, hadamard]]


def share(mxfp4: bool, heads: int, hadamard: bool, rows: int) -> tuple[int, int]:
    """Lanes a row and heads a thread for a number of rows."""
    return next((lanes, own) for least, lanes, own in reversed(shares(mxfp4, heads, hadamard)) if rows >= least)


class Queries:
    """The kernel: each thread has its part of ``coarsening`` heads of one token, so that it loads the angles once.

    Args:
        rows: the format.
        heads: H, a multiple of ``coarsening``.
        coarsening: heads a thread.
        dense: q and weights are contiguous, and q has fewer than 2^32 chunks: rows are found by their number.
        threads: of a block.
    """

    def __init__(
        self, rows: FP8Rows | MXFP4Rows, heads: int, coarsening: int, dense: bool, threads: int = THREADS
    ) -> None:
        self.rows, self.heads, self.coarsening, self.dense, self.threads = rows, heads, coarsening, dense, threads
        self.groups = heads // coarsening  # of a token
        self.full = self.groups * rows.lanes % threads == 0  # no block has a thread too many

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        positions: cute.Tensor | None,
        cos: cute.Tensor,
        sin: cute.Tensor,
        weights: cute.Tensor,
        values: cute.Tensor,
        scales: cute.Tensor | None,
        weights_out: cute.Tensor,
        floor: Float32,
        stream: cuda.CUstream,
    ):
        groups = q.shape[0] * self.groups
        per_block = self.threads // self.rows.lanes
        self.kernel(q, positions, cos, sin, weights, values, scales, weights_out, floor).launch(
            grid=[(groups + per_block - 1) // per_block, 1, 1], block=[self.threads, 1, 1], use_pdl=True, stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        positions: cute.Tensor | None,
        cos: cute.Tensor,
        sin: cute.Tensor,
        weights: cute.Tensor,
        values: cute.Tensor,
        scales: cute.Tensor | None,
        weights_out: cute.Tensor,
        floor: Float32,
    ):
        rows, heads, count, d = self.rows, self.heads, self.coarsening, self.rows.d
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = thread % rows.lanes
        group = Uint32(block * (self.threads // rows.lanes) + thread // rows.lanes)
        inside = True
        if cutlass.const_expr(not self.full):
            groups = Uint32(q.shape[0] * self.groups)
            inside = group < groups
            # Threads beyond the end do the last group's work again, and store nothing
            group = cutlass.min(group, groups - 1)
        token, first = group // Uint32(self.groups), group % Uint32(self.groups)
        # Neighbouring groups have neighbouring heads; a thread's own heads are `groups` apart. What it loads and stores
        # is counted from its first chunk; that one's number fits into 32 bits where q is dense
        row = group if count == 1 else token * Uint32(heads) + first
        integer = Uint32 if self.dense else Int64
        chunk_at = Int64(integer(row) * integer(d // CHUNK) + integer(lane))

        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()  # after the wait: the next kernel may then read what was before
        at = Int64(token)
        if cutlass.const_expr(positions is not None):
            at = ptx.load_index(positions.iterator + at * positions.stride[0])
        # All other loads, before anything is done with them: they are in flight together
        if cutlass.const_expr(self.dense):
            start, step = q.iterator + chunk_at * CHUNK, self.groups * d
        else:
            start = q.iterator + (Int64(token) * q.stride[0] + Int64(first) * q.stride[1] + CHUNK * lane)
            step = self.groups * q.stride[1]
        loaded = [rows.load_from(start + j * step) for j in range(count)]
        # Lane j has the weight and the scale of the thread's head j
        head = first if count == 1 else first + Uint32(lane) % Uint32(count) * Uint32(self.groups)
        index = row if count == 1 else token * Uint32(heads) + head
        weight_at = Int64(index)
        if cutlass.const_expr(not self.dense):
            weight_at = Int64(token) * weights.stride[0] + Int64(head) * weights.stride[1]
        weight = ptx.load_real(weights.iterator + weight_at)
        angles = rows.load_angles(cos.iterator + at * cos.stride[0], sin.iterator + at * sin.stride[0], lane)

        width = CHUNK * 4 // rows.values  # of a chunk's output, in its elements
        out, scale = values.iterator + chunk_at * width, Uint32(0)
        for j in cutlass.range_constexpr(count):
            turned = rows.rotate(loaded[j], angles, lane)
            if cutlass.const_expr(rows.hadamard):
                turned = rows.transform(turned, lane)
            packed, bits = rows.quantise(turned, lane, floor)
            scale = bits if j == 0 else ptx.select(lane == j, bits, scale)
            if inside:
                for chunk in cutlass.range_constexpr(rows.chunks):
                    offset = (rows.span * chunk + j * self.groups * d) // CHUNK * width
                    ptx.store(out + offset, packed[chunk])

        folded = weight
        if cutlass.const_expr(scales is None):
            folded = ptx.mul(weight, ptx.real(scale))
        folded = ptx.bits(ptx.mul(ptx.mul(folded, Float32(d**-0.5)), Float32(heads**-0.5)))
        if cutlass.const_expr(scales is None):
            folded = ptx.select(scale == NAN, Uint32(NAN), folded)
        if inside & (lane < count):
            ptx.store(weights_out.iterator + Int64(index), [folded])
            if cutlass.const_expr(scales is not None):
                ptx.store(scales.iterator + Int64(index), [scale])


def build(
    rows: FP8Rows | MXFP4Rows,
    heads: int,
    positions: torch.dtype | None,
    angles: torch.dtype,
    weights: torch.dtype,
    coarsening: int,
    dense: bool,
    threads: int = THREADS,
    arch: str = "",
    options: str = "",
):
    """A compiled :class:`Queries`, which is called with its tensors and the floor.

    Args:
        rows: the format, with its options and lanes.
        heads: H.
        positions: dtype of the positions, or None without any.
        angles: dtype of cos and sin.
        weights: dtype of the weights.
        coarsening: heads a thread.
        dense: the inputs are contiguous, and their strides constants of the kernel.
        threads: of a block.
        arch, options: for the compiler.
    """
    tokens, table = launch.symbol(), launch.symbol()
    fp8, pairs = isinstance(rows, FP8Rows), rows.rope // 2
    table = tokens if positions is None else table

    def given(dtype: torch.dtype, *shape, row: int = 0, align: int | None = None):
        """Of any strides if it is not dense, but for the last one where rows begin at multiples of ``row`` values."""
        if dense:
            size, stride, _ = layout(shape, dtype)
            return make_fake_tensor(launch.DTYPES[dtype], size, stride, assumed_align=align)
        return launch.tensor(dtype, *shape, row=row, align=align) if row else launch.strided(dtype, *shape)

    return launch.compiled(
        Queries(rows, heads, coarsening, dense, threads),
        given(torch.bfloat16, tokens, heads, rows.d, row=8, align=16),
        None if positions is None else given(positions, tokens),
        *(given(angles, table, pairs, row=4, align=4 * angles.itemsize) for _ in range(2)),
        given(weights, tokens, heads),
        launch.tensor(torch.float8_e4m3fn if fp8 else torch.uint8, tokens, heads, rows.d if fp8 else rows.d // 2),
        None if fp8 else launch.tensor(torch.int32, tokens, heads),
        launch.tensor(torch.float32, tokens, heads),
        Float32(0.0),
        arch=arch,
        options=options,
    )


@functools.cache
def _begin(
    options: tuple, d: int, heads: int, pairs: int, positions: torch.dtype | None, angles: torch.dtype,
    weights: torch.dtype, lanes: int, coarsening: int, dense: bool, device: torch.device,
) -> Future:  # fmt: skip
    """Compiles in a thread of its own."""

    def compiled():
        with torch.cuda.device(device):
            rows = rows_of(options, d, 2 * pairs, launch.capability(device), lanes)
            return build(rows, heads, positions, angles, weights, coarsening, dense)

    return compiling().submit(compiled)


class _Operator:
    """One operator: called as its public function without ``implementation``.

    Args:
        mxfp4: the format; FP8 otherwise.
        out: it writes into tensors that are given after the others.
    """

    def __init__(self, mxfp4: bool, out: bool) -> None:
        self.mxfp4, self.out = mxfp4, out

    def __call__(self, *tensors, **options):
        return self.bind(*tensors, **options)(*tensors)

    def key(self, q: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, weights: Tensor, *_: Tensor, **given):
        """What all its kernels are compiled for."""
        options = DEFAULTS[self.mxfp4] | given
        del options["amax_floor"]
        options = ("mxfp4" if self.mxfp4 else "fp8", *options.values())
        return options, q.shape[2], q.shape[1], cos.shape[1], _dtype(positions), cos.dtype, weights.dtype

    def prepare(self, *tensors, **options) -> None:
        """Begin to compile what any number of tokens will need if they are contiguous; the tensors may be fake."""
        key = [number(part) for part in self.key(*tensors, **options)]
        for _, *own in shares(self.mxfp4, key[2], key[0][1]):
            _begin(*key, *own, True, tensors[0].device)

    def bind(self, *tensors, **options):
        """A function that does this for tensors with the same metadata, and the same options."""
        (tokens, heads, d), device = tensors[0].shape, tensors[0].device
        if self.mxfp4:
            results = [layout((tokens, heads, d // 2), torch.uint8), layout((tokens, heads), torch.int32)]
        else:
            results = [layout((tokens, heads, d), torch.float8_e4m3fn)]
        results.append(layout((tokens, heads), torch.float32))
        if tokens == 0:
            return lambda *_: None if self.out else tuple(several(results, device))
        key, dense = self.key(*tensors, **options), _dense(*tensors[:5])
        own = share(self.mxfp4, heads, key[0][1], tokens * heads)
        kernel = _begin(*key, *own, dense, device).result()
        floor, without_scales = options.get("amax_floor", DEFAULTS[self.mxfp4]["amax_floor"]), not self.mxfp4

        def call(*tensors):
            outputs = tensors[5:] if self.out else several(results, device)
            if without_scales:
                kernel(*tensors[:5], outputs[0], None, outputs[1], floor)
            else:
                kernel(*tensors[:5], *outputs, floor)
            return None if self.out else tuple(outputs)

        return call


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _dense(q: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, weights: Tensor) -> bool:
    """Whether the kernel for contiguous inputs takes these. It compares strides of dimensions of size 1 as well, which
    ``is_contiguous`` does not."""
    given = [tensor for tensor in (q, positions, cos, sin, weights) if tensor is not None]
    exact = all(tensor.stride() == layout(tuple(tensor.shape), tensor.dtype)[1] for tensor in given)
    return exact and q.numel() // CHUNK < 2**32


indexer_q_fp8 = _Operator(mxfp4=False, out=False)
indexer_q_fp8_out = _Operator(mxfp4=False, out=True)
indexer_q_mxfp4 = _Operator(mxfp4=True, out=False)
indexer_q_mxfp4_out = _Operator(mxfp4=True, out=True)
