"""The indexer's queries: RoPE, optional Hadamard, quantisation and folded weights in one launch.

Limits, which the operator checks: an even number of rotated pairs in multiples of 8 (R a multiple of 16), rows of q at
multiples of 16 bytes, rows of cos and sin at multiples of four values; compute capability 9.0 or later.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, Uint32
from torch import Tensor

from . import launch, ptx
from .formats import NAN, FP8Rows, MXFP4Rows, rows_of
from .rows import CHUNK, LANES, SPAN

THREADS = 128
FEW, MANY = 1, 4  # heads a thread
ROWS_FOR_MANY = 32768  # from this many rows on the GPU is full either way, and fewer threads load fewer angles


class Queries:
    """The kernel: each thread has its part of ``coarsening`` heads of one token, so that it loads the angles once.

    Args:
        rows: the format.
        heads: H.
        coarsening: heads a thread.
        threads: of a block.
    """

    def __init__(self, rows: FP8Rows | MXFP4Rows, heads: int, coarsening: int, threads: int = THREADS) -> None:
        self.rows, self.heads, self.coarsening, self.threads = rows, heads, coarsening, threads
        self.groups = -(-heads // coarsening)  # of a token

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
        per_block = self.threads // LANES
        self.kernel(q, positions, cos, sin, weights, values, scales, weights_out, floor).launch(
            grid=[(groups + per_block - 1) // per_block, 1, 1], block=[self.threads, 1, 1], stream=stream
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
        lane = thread % LANES
        groups = Uint32(q.shape[0] * self.groups)
        group = Uint32(block * (self.threads // LANES) + thread // LANES)
        inside = group < groups
        # Threads beyond the end do the last group's work again, and store nothing
        group = cutlass.min(group, groups - 1)
        token, first = Int64(group // self.groups), Int32(group % self.groups)
        # Neighbouring groups have neighbouring heads; a thread's own heads are `groups` apart
        own = [first + j * self.groups for j in range(count)]
        if cutlass.const_expr(heads % count):
            own = [cutlass.min(head, heads - 1) for head in own]

        # All loads first: they are in flight together
        base = q.iterator + token * q.stride[0]
        loaded = [rows.load(base + Int64(head) * q.stride[1], lane) for head in own]
        # Lane j has the weight and the scale of the thread's head j
        head = first + lane * self.groups
        writes = inside & (lane < count) & (head < heads)
        head = cutlass.min(head, heads - 1)
        weight = ptx.load_real(weights.iterator + (token * weights.stride[0] + Int64(head) * weights.stride[1]))
        at = token
        if cutlass.const_expr(positions is not None):
            at = ptx.load_index(positions.iterator + token * positions.stride[0])
        angles = rows.load_angles(cos.iterator + at * cos.stride[0], sin.iterator + at * sin.stride[0], lane)

        scale = Uint32(0)
        for j in cutlass.range_constexpr(count):
            row = rows.rotate(loaded[j], angles, lane)
            if cutlass.const_expr(rows.hadamard):
                row = rows.transform(row, lane)
            packed, bits = rows.quantise(row, lane, floor)
            scale = bits if j == 0 else ptx.select(lane == j, bits, scale)
            stores = inside if heads % count == 0 else inside & (first + j * self.groups < heads)
            if stores:
                start = (token * heads + own[j]) * (d * 4 // rows.values)
                for chunk in cutlass.range_constexpr(rows.chunks):
                    offset = (SPAN * chunk + CHUNK * lane) * 4 // rows.values
                    ptx.store(values.iterator + (start + offset), packed[chunk])

        folded = weight
        if cutlass.const_expr(scales is None):
            folded = ptx.mul(weight, ptx.real(scale))
        folded = ptx.bits(ptx.mul(ptx.mul(folded, Float32(d**-0.5)), Float32(heads**-0.5)))
        if cutlass.const_expr(scales is None):
            folded = ptx.select(scale == NAN, Uint32(NAN), folded)
        if writes:
            index = token * heads + head
            ptx.store(weights_out.iterator + index, [folded])
            if cutlass.const_expr(scales is not None):
                ptx.store(scales.iterator + index, [scale])


def build(
    rows: FP8Rows | MXFP4Rows,
    heads: int,
    positions: torch.dtype | None,
    angles: torch.dtype,
    weights: torch.dtype,
    coarsening: int,
    threads: int = THREADS,
    arch: str = "",
    options: str = "",
):
    """A compiled :class:`Queries`, which is called with its tensors and the floor.

    Args:
        rows: the format, with its options.
        heads: H.
        positions: dtype of the positions, or None without any.
        angles: dtype of cos and sin.
        weights: dtype of the weights.
        coarsening: heads a thread.
        threads: of a block.
        arch, options: for the compiler.
    """
    tokens, table = launch.symbol(), launch.symbol()
    fp8 = isinstance(rows, FP8Rows)
    table_rows = tokens if positions is None else table
    table_args = [launch.tensor(angles, table_rows, rows.rope // 2, row=4, align=4 * angles.itemsize) for _ in range(2)]
    return launch.compiled(
        Queries(rows, heads, coarsening, threads),
        launch.tensor(torch.bfloat16, tokens, heads, rows.d, row=8, align=16),
        None if positions is None else launch.strided(positions, tokens),
        *table_args,
        launch.strided(weights, tokens, heads),
        launch.tensor(torch.float8_e4m3fn if fp8 else torch.uint8, tokens, heads, rows.d if fp8 else rows.d // 2),
        None if fp8 else launch.tensor(torch.int32, tokens, heads),
        launch.tensor(torch.float32, tokens, heads),
        Float32(0.0),
        arch=arch,
        options=options,
    )


_kernels: dict[tuple, object] = {}


def _quantise(
    options: tuple,
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    values: Tensor,
    scales: Tensor | None,
    weights_out: Tensor,
    floor: float,
) -> None:
    tokens, heads, d = q.shape
    if tokens == 0:
        return
    key = (
        options,
        d,
        heads,
        cos.shape[1],
        None if positions is None else positions.dtype,
        cos.dtype,
        weights.dtype,
        MANY if tokens * heads >= ROWS_FOR_MANY else FEW,
        q.device,
    )
    kernel = _kernels.get(key)
    if kernel is None:
        rows = rows_of(options, d, 2 * cos.shape[1], launch.capability(q.device))
        kernel = _kernels[key] = build(rows, heads, *key[4:8])
    kernel(q, positions, cos, sin, weights, values, scales, weights_out, floor)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of the shape of ``x``: on the CPU a third of the cost of ``torch.empty``."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def indexer_q_fp8_out(
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    q_fp8: Tensor,
    weights_out: Tensor,
    *,
    hadamard: bool = False,
    amax_floor: float = 1e-4,
    power_of_two_scale: bool = True,
) -> None:
    """As the operator ``dsv4::indexer_q_fp8_out``."""
    options = ("fp8", hadamard, power_of_two_scale)
    _quantise(options, q, positions, cos, sin, weights, q_fp8, None, weights_out, amax_floor)


def indexer_q_fp8(
    q: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, weights: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """As the operator ``dsv4::indexer_q_fp8``."""
    q_fp8, weights_out = _like(q, torch.float8_e4m3fn), _like(weights, torch.float32)
    indexer_q_fp8_out(q, positions, cos, sin, weights, q_fp8, weights_out, **options)
    return q_fp8, weights_out


def indexer_q_mxfp4_out(
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    q_packed: Tensor,
    q_scale: Tensor,
    weights_out: Tensor,
    *,
    hadamard: bool = False,
    amax_floor: float = 6 * 2.0**-126,
    ties: str = "even",
) -> None:
    """As the operator ``dsv4::indexer_q_mxfp4_out``."""
    options = ("mxfp4", hadamard, ties)
    _quantise(options, q, positions, cos, sin, weights, q_packed, q_scale, weights_out, amax_floor)


def indexer_q_mxfp4(
    q: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, weights: Tensor, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator ``dsv4::indexer_q_mxfp4``."""
    tokens, heads, d = q.shape
    q_packed = q.new_empty((tokens, heads, d // 2), dtype=torch.uint8)
    q_scale, weights_out = _like(weights, torch.int32), _like(weights, torch.float32)
    indexer_q_mxfp4_out(q, positions, cos, sin, weights, q_packed, q_scale, weights_out, **options)
    return q_packed, q_scale, weights_out
