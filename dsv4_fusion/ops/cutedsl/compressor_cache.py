"""The paged compressor in CuTe DSL: the kernel for a window's length, and the launch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .._library import compiling
from . import launch


def build(
    d: int, ratio: int, overlap: bool, n: int, rope: int, dtype: torch.dtype, bias: torch.dtype, weight: torch.dtype,
    angle: torch.dtype, integers: tuple[torch.dtype, ...], format: str, hadamard: bool, page_size: int,
    arch: str = "", options: str = "",
):  # fmt: skip
    """A compiled kernel, called with the operator's tensors, the norm's epsilon and the number of clusters.

    Args:
        d, ratio: of an entry.
        overlap: whether windows do.
        n: rows of a page of the state.
        rope: rotated dims.
        dtype, bias, weight, angle: of kv and gate, position_bias, norm_weight, cos and sin.
        integers: of positions, requests, starts, state_table and slots.
        format, hadamard, page_size: the operator's.
        arch, options: for the compiler.
    """
    from cutlass import Float32, Int32

    from .compressor_long import Long
    from .compressor_short import Short

    series = 1 + overlap
    if series * ratio <= 8:
        kernel = Short(d, ratio, series, n, rope, dtype, angle, format, hadamard, page_size)
    else:
        kernel = Long(d, ratio, series, n, rope, dtype, angle, page_size)
    tokens, requests, table = launch.symbol(), launch.symbol(), launch.symbol()
    width, chunk = series * d, 16 // dtype.itemsize
    rows = [launch.tensor(dtype, tokens, width, row=chunk, align=16) for _ in range(2)]
    angles = [launch.tensor(angle, table, rope // 2, row=16 // angle.itemsize, align=16) for _ in range(2)]
    pages = 8 if format == "kv" else 4
    return launch.compiled(
        kernel,
        *rows,
        launch.tensor(bias, ratio, width, row=4, align=4 * bias.itemsize),
        launch.tensor(weight, d, align=4 * weight.itemsize),
        launch.strided(integers[0], tokens),
        launch.strided(integers[1], tokens),
        launch.strided(integers[2], launch.symbol()),
        *angles,
        launch.tensor(torch.float32, launch.symbol(), n, 2, width, row=4, align=16),
        launch.strided(integers[3], requests, launch.symbol()),
        launch.tensor(torch.uint8, launch.symbol(), launch.symbol(), row=pages, align=pages),
        launch.strided(integers[4], tokens),
        Float32(0.0),
        Int32(0),
        arch=arch,
        options=options,
    )


@functools.cache
def _begin(*key):
    return compiling().submit(build, *key)


@functools.cache
def _clusters(device: torch.device, size: int) -> int:
    """As many as run at once, one block a multiprocessor."""
    if size == 1:
        return torch.cuda.get_device_properties(device).multi_processor_count
    from cutlass.utils import HardwareInfo

    return HardwareInfo(device.index or 0).get_max_active_clusters(size)


class Insert:
    """``dsv4::compress_csa_insert`` or ``compress_hca_insert``, called as its function without ``implementation``.

    Args:
        overlap: whether windows do.
    """

    def __init__(self, overlap: bool) -> None:
        self.overlap = overlap

    def __call__(self, *tensors, **options) -> None:
        return self.bind(*tensors, **options)(*tensors, **options)

    def key(
        self, kv, gate, position_bias, norm_weight, positions, requests, starts, cos, sin, state, state_table, cache,
        slots, *, format="kv", hadamard=False, page_size=64, **_,
    ) -> tuple:  # fmt: skip
        """What a kernel is compiled for."""
        integers = tuple(tensor.dtype for tensor in (positions, requests, starts, state_table, slots))
        return (
            norm_weight.shape[0], position_bias.shape[0], self.overlap, state.shape[1], 2 * cos.shape[1], kv.dtype,
            position_bias.dtype, norm_weight.dtype, cos.dtype, integers, format, hadamard, page_size,
        )  # fmt: skip

    def prepare(self, *tensors, **options) -> None:
        """Begin to compile what any number of tokens will need; the tensors may be fake."""
        _begin(*self.key(*tensors, **options))

    def bind(self, *tensors, norm_eps=1e-6, **options) -> Callable[..., None]:
        """A function that does this for tensors with the same metadata."""
        key = self.key(*tensors, **options)
        kv, table, (d, ratio) = tensors[0], tensors[10], key[:2]
        tokens = kv.shape[0]
        if tokens == 0:
            return lambda *_, **__: None
        kernel = _begin(*key).result()
        size = 1 if (1 + self.overlap) * ratio <= 8 else d // 64
        units, saves = table.shape[0] + -(-tokens // ratio), -(-tokens // (3 * size))
        clusters = max(1, min(_clusters(kv.device, size), units + saves))

        def launch(*tensors, **_) -> None:
            kernel(*tensors, norm_eps, clusters)

        return launch


compress_csa_insert = Insert(True)
compress_hca_insert = Insert(False)
