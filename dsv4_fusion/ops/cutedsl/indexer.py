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

from .._library import layout, several
from . import launch, ptx
from .formats import NAN, FP8Rows, MXFP4Rows, rows_of
from .rows import CHUNK, LANES, SPAN

THREADS = 128
FEW, MANY = 1, {False: 2, True: 4}  # heads a thread; of FP8 alone, and of what computes more
ROWS_FOR_MANY = 131072  # from this many rows on the GPU is full either way, and fewer threads load fewer angles
DEFAULTS = {  # of the operators' schemas
    False: {"hadamard": False, "power_of_two_scale": True, "amax_floor": 1e-4},
    True: {"hadamard": False, "ties": "even", "amax_floor": 6 * 2.0**-126},
}


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

        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()  # after the wait: the next kernel may then read what was before
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

    def bind(self, q: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, weights: Tensor, *_: Tensor, **given):
        """A function that does this for tensors with the same metadata, and the same options."""
        (tokens, heads, d), device = q.shape, q.device
        options = DEFAULTS[self.mxfp4] | given
        floor = options.pop("amax_floor")
        options = ("mxfp4" if self.mxfp4 else "fp8", *options.values())
        many = MANY[self.mxfp4 or options[1]]
        coarsening = many if tokens * heads >= ROWS_FOR_MANY else FEW
        key = (options, d, heads, cos.shape[1], _dtype(positions), cos.dtype, weights.dtype, coarsening, device)
        if self.mxfp4:
            results = [layout((tokens, heads, d // 2), torch.uint8), layout((tokens, heads), torch.int32)]
        else:
            results = [layout((tokens, heads, d), torch.float8_e4m3fn)]
        results.append(layout((tokens, heads), torch.float32))
        if tokens == 0:
            return lambda *_: None if self.out else tuple(several(results, device))
        if key not in _kernels:
            rows = rows_of(options, d, 2 * cos.shape[1], launch.capability(device))
            _kernels[key] = build(rows, heads, *key[4:8])
        kernel, without_scales = _kernels[key], not self.mxfp4

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


indexer_q_fp8 = _Operator(mxfp4=False, out=False)
indexer_q_fp8_out = _Operator(mxfp4=False, out=True)
indexer_q_mxfp4 = _Operator(mxfp4=True, out=False)
indexer_q_mxfp4_out = _Operator(mxfp4=True, out=True)
