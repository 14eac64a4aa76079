"""The indexer's keys: optional RMSNorm, RoPE and Hadamard, quantisation, and the store into a paged cache, one launch.

Limits, which the operator checks: those of the queries' kernels for k, cos and sin; the norm's weight at a multiple of
16 bytes; pages of the cache at multiples of 8 bytes.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int64
from torch import Tensor

from . import launch, ptx
from .formats import FP8Rows, MXFP4Rows, rows_of
from .rows import CHUNK, LANES

THREADS = 64  # of a block: small, so that a few tokens already spread over the GPU
SCALE_BYTES = 4


class Keys:
    """The kernel: a row is a token; slots outside the cache are skipped, and their positions not read.

    Args:
        rows: the format.
        page_size: tokens a page, a power of two.
    """

    def __init__(self, rows: FP8Rows | MXFP4Rows, page_size: int) -> None:
        self.rows, self.page_size = rows, page_size

    @cute.jit
    def __call__(
        self,
        k: cute.Tensor,
        cache: cute.Tensor,
        slots: cute.Tensor,
        norm_weight: cute.Tensor | None,
        positions: cute.Tensor | None,
        cos: cute.Tensor | None,
        sin: cute.Tensor | None,
        eps: Float32,
        floor: Float32,
        stream: cuda.CUstream,
    ):
        per_block = THREADS // LANES
        self.kernel(k, cache, slots, norm_weight, positions, cos, sin, eps, floor).launch(
            grid=[(k.shape[0] + per_block - 1) // per_block, 1, 1], block=[THREADS, 1, 1], use_pdl=True, stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        k: cute.Tensor,
        cache: cute.Tensor,
        slots: cute.Tensor,
        norm_weight: cute.Tensor | None,
        positions: cute.Tensor | None,
        cos: cute.Tensor | None,
        sin: cute.Tensor | None,
        eps: Float32,
        floor: Float32,
    ):
        rows, page_size = self.rows, self.page_size
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = thread % LANES
        index = block * (THREADS // LANES) + thread // LANES
        token = Int64(cutlass.min(index, k.shape[0] - 1))

        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        row = rows.load(k.iterator + token * k.stride[0], lane)
        slot = Int64(slots[token])
        writes = (index < k.shape[0]) & (slot >= 0) & (slot < Int64(cache.shape[0]) * page_size)
        if cutlass.const_expr(norm_weight is not None):
            row = rows.norm(row, rows.load_norm(norm_weight.iterator, lane), eps)
        if cutlass.const_expr(cos is not None):
            at = token
            if cutlass.const_expr(positions is not None):
                at = Int64(0)  # of padding, positions may be anything
                if writes:
                    at = ptx.load_index(positions.iterator + token * positions.stride[0])
            angles = rows.load_angles(cos.iterator + at * cos.stride[0], sin.iterator + at * sin.stride[0], lane)
            row = rows.rotate(row, angles, lane)
        if cutlass.const_expr(rows.hadamard):
            row = rows.transform(row, lane)
        packed, scale = rows.quantise(row, lane, floor)

        if writes:
            width = rows.d * 4 // rows.values
            page = cache.iterator + (slot // page_size) * cache.stride[0]
            place = slot % page_size
            for chunk in cutlass.range_constexpr(rows.chunks):
                offset = (rows.span * chunk + CHUNK * lane) * 4 // rows.values
                ptx.store(page + (place * width + offset), packed[chunk])
            if lane == 0:
                ptx.store(page + (page_size * width + place * SCALE_BYTES), [scale])


def build(
    rows: FP8Rows | MXFP4Rows,
    page_size: int,
    slots: torch.dtype,
    norm_weight: torch.dtype | None,
    positions: torch.dtype | None,
    angles: torch.dtype | None,
    arch: str = "",
    options: str = "",
):
    """A compiled :class:`Keys`, which is called with its tensors, the norm's epsilon and the floor.

    Args:
        rows: the format, with its options; without RoPE its ``rope`` is 0.
        page_size: tokens a page.
        slots: dtype of the slots.
        norm_weight, positions, angles: dtypes of the norm's weight, the positions, and cos and sin; None without any.
        arch, options: for the compiler.
    """
    tokens, table = launch.symbol(), launch.symbol()
    table = tokens if positions is None else table
    tables = [None, None]
    if angles is not None:
        tables = [launch.tensor(angles, table, rows.rope // 2, row=4, align=4 * angles.itemsize) for _ in range(2)]
    return launch.compiled(
        Keys(rows, page_size),
        launch.tensor(torch.bfloat16, tokens, rows.d, row=8, align=16),
        launch.tensor(torch.uint8, launch.symbol(), launch.symbol(), row=8, align=8),
        launch.strided(slots, tokens),
        None if norm_weight is None else launch.tensor(norm_weight, rows.d, align=16),
        None if positions is None else launch.strided(positions, tokens),
        *tables,
        Float32(0.0),
        Float32(0.0),
        arch=arch,
        options=options,
    )


_kernels: dict[tuple, object] = {}


def _store(
    options: tuple,
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None,
    positions: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm_eps: float,
    floor: float,
    page_size: int,
) -> None:
    tokens, d = k.shape
    if tokens == 0:
        return
    key = (
        options,
        d,
        page_size,
        slots.dtype,
        None if norm_weight is None else norm_weight.dtype,
        None if positions is None else positions.dtype,
        None if cos is None else (cos.dtype, cos.shape[1]),
        k.device,
    )
    kernel = _kernels.get(key)
    if kernel is None:
        *dtypes, angles, device = key[3:]
        rows = rows_of(options, d, 0 if angles is None else 2 * angles[1], launch.capability(device))
        kernel = _kernels[key] = build(rows, page_size, *dtypes, None if angles is None else angles[0])
    kernel(k, cache, slots, norm_weight, positions, cos, sin, norm_eps, floor)


def indexer_k_store_fp8(
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    hadamard: bool = False,
    amax_floor: float = 1e-4,
    power_of_two_scale: bool = True,
    page_size: int = 64,
) -> None:
    """As the operator ``dsv4::indexer_k_store_fp8``."""
    options = ("fp8", hadamard, power_of_two_scale)
    _store(options, k, cache, slots, norm_weight, positions, cos, sin, norm_eps, amax_floor, page_size)


def indexer_k_store_mxfp4(
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    hadamard: bool = False,
    amax_floor: float = 6 * 2.0**-126,
    ties: str = "even",
    page_size: int = 64,
) -> None:
    """As the operator ``dsv4::indexer_k_store_mxfp4``."""
    options = ("mxfp4", hadamard, ties)
    _store(options, k, cache, slots, norm_weight, positions, cos, sin, norm_eps, amax_floor, page_size)
