"""FP8 linear layers in CuTe DSL: the tile for a number of tokens, and the launch.

The quantiser before it is Triton's; the product begins while that runs, and loads its weight meanwhile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._library import compiling, layout, new
from ..fp8_linear import block_scales
from . import scaled_mm


class Tile(NamedTuple):
    """What a block computes; nothing of it changes a result."""

    rows: int
    columns: int
    cluster: tuple[int, int]
    loaded: int


FEW = (8, 16, 32)  # tokens: with no more, no more rows are loaded
PAIRS = 4, 32  # rows of 64 tokens: up to the first, and beyond the second, blocks share loads
# ns of a stage by rows and columns of a tile, with scales of rows and of blocks. Those of rows were measured on an H200
# in one round of all processors, but for two: 64 × 16 took 116, but is to be chosen before 64 × 32 where it lets twice
# as many processors load the weight; 128 × 128 took 349, but in many rounds 0.7 of what 128 × 192 take. Those of blocks
# are set, to choose what was quickest with 1,536, 4,096 and 32,768 outputs: 128 × 96 where all fit into one round but
# not into many, 64 × 128 before 128 × 64, and never 128 × 192.
STAGE = {
    (64, 16): (105, 105), (64, 32): (108, 108), (64, 64): (146, 150), (64, 128): (267, 258),
    (128, 64): (232, 280), (128, 96): (285, 330), (128, 128): (360, 350), (128, 192): (518, None),
}  # fmt: skip


@functools.cache
def tile(rows: int, outputs: int, block: bool, processors: int) -> Tile:
    """The one with which all are computed soonest, for so many rows of 64 tokens.

    Tiles below each other share loads of w in pairs, where that is most of what is loaded: with few rows, and for the
    largest tiles. With many, those beside each other share loads of x.
    """

    def time(one: tuple[int, int]) -> int:
        blocks = -(-64 * rows // one[0]) * -(-outputs // one[1])
        return -(-blocks // processors) * STAGE[one][block]

    high, columns = min((one for one in STAGE if STAGE[one][block]), key=time)
    few, many = PAIRS
    cluster = (1, 1)
    if (rows <= few and -(-64 * rows // high) % 2 == 0) or (rows > 2 and columns > 128):
        cluster = (2, 1)
    elif rows > many and (high, columns) == (128, 128):
        cluster = (1, 2)
    return Tile(high, columns, cluster, high)


def tile_of(tokens: int, outputs: int, block: bool, processors: int) -> Tile:
    """For a number of tokens."""
    found = tile(-(-tokens // 64), outputs, block, processors)
    return found._replace(loaded=next((few for few in FEW if tokens <= few), found.rows))


def table() -> list[Tile]:
    """Every tile, by itself."""
    return [Tile(high, columns, (1, 1), high) for high, columns in STAGE]


def tiles(outputs: int, block: bool, processors: int) -> set[Tile]:
    """All that a weight may need."""
    return {tile_of(tokens, outputs, block, processors) for tokens in (*FEW, *range(64, 16385, 64))}


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _unread(device: torch.device) -> Tensor:
    """What stands for a bias where there is none."""
    return torch.empty(1, device=device)


@functools.cache
def _begin(*key):
    return compiling().submit(scaled_mm.build, *key)


def _plain(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.float8_e8m0fnu else dtype


def is_block(wq: Tensor, w_scale: Tensor) -> bool:
    return w_scale.dim() == 2 and w_scale.shape[0] != wq.shape[0]


def _matrix(x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What makes of a tensor like this [..., K] the matrix [M, K] that is loaded; None if it is that already."""
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    if (rows.data_ptr() | rows.stride(0)) % 16 and rows.shape[0]:
        return lambda x: x.reshape(-1, k).clone(memory_format=torch.contiguous_format)
    return None if x.dim() == 2 else lambda x: x.reshape(-1, k)


def _by_group(scale: Tensor) -> bool:
    """Whether block scales lie as the quantiser leaves them, where the copy engine can read those of a stage."""
    rows = scale.reshape(-1, scale.shape[-1])
    apart = rows.stride(1)
    together = scale.dtype == torch.float32 and (rows.stride(0) == 1 or rows.shape[0] == 1)
    return together and apart >= rows.shape[0] and apart % 4 == 0 and rows.data_ptr() % 16 == 0


def _x_blocks(scale: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The same for block scales of x: a matrix of fp32, with the scales of a group next to each other."""
    rows = scale.reshape(-1, scale.shape[-1])
    shape, apart = tuple(rows.shape), rows.stride(1)
    if not _by_group(scale):
        return lambda scale: block_scales(scale, shape).copy_(scale.reshape(shape))
    if scale.dim() == 2 and scale.stride(0) == 1:
        return None
    return lambda scale: scale.as_strided(shape, (1, apart))  # as a view, a single row may have another stride


def _scale(scale: Tensor, block: bool, count: int) -> Callable[[Tensor], Tensor] | None:
    """The same for others: a vector with one for each of ``count`` rows, or the matrix of w's blocks."""
    byte = scale.dtype == torch.float8_e8m0fnu
    if block:
        return (lambda scale: scale.view(torch.uint8)) if byte else None

    def fix(scale: Tensor) -> Tensor:
        scale = (scale.view(torch.uint8) if byte else scale).reshape(-1)
        return scale.expand(count) if scale.shape[0] == 1 and count != 1 else scale

    return fix


class Product:
    """``dsv4::scaled_mm_fp8``, called as its public function without ``implementation``.

    Args:
        dependent: as in :class:`scaled_mm.ScaledMM`.
    """

    def __init__(self, dependent: bool = False) -> None:
        self.dependent = dependent

    def __call__(self, *tensors, **options):
        return self.bind(*tensors, **options)(*tensors)

    def key(
        self,
        one: Tile,
        wq: Tensor,
        x_scale: torch.dtype,
        w_scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple:
        """Of a program: what it is compiled for."""
        block = is_block(wq, w_scale)
        scales = torch.float32 if block else _plain(x_scale), _plain(w_scale.dtype)
        return *one, block, scales, None if bias is None else bias.dtype, dtype, self.dependent

    def prepare(self, xq, wq, x_scale, w_scale, bias=None, *, out_dtype=torch.bfloat16, **_) -> None:
        """Begin to compile what any number of tokens will need; the tensors may be fake."""
        for one in tiles(wq.shape[0], is_block(wq, w_scale), _processors(wq.device)):
            _begin(*self.key(one, wq, x_scale.dtype, w_scale, bias, out_dtype))

    def bind(self, xq, wq, x_scale, w_scale, bias=None, *, out_dtype=torch.bfloat16, **_) -> Callable[..., Tensor]:
        """A function that does this for tensors with the same metadata."""
        device, n, tokens = xq.device, wq.shape[0], math.prod(xq.shape[:-1])
        result = layout((*xq.shape[:-1], n), out_dtype)
        if tokens == 0:
            return lambda *_: new(result, device)
        block, processors = is_block(wq, w_scale), _processors(device)
        one = tile_of(tokens, n, block, processors)
        kernel = _begin(*self.key(one, wq, x_scale.dtype, w_scale, bias, out_dtype)).result()
        x_fix = _x_blocks(x_scale) if block else _scale(x_scale, False, tokens)
        fixes = (_matrix(xq), _matrix(wq), x_fix, _scale(w_scale, block, n))
        fixes = [(index, fix) for index, fix in enumerate(fixes) if fix is not None]
        flat = layout((tokens, n), out_dtype)
        lead = None if xq.dim() == 2 else result[0]
        no_bias = _unread(device)

        def launch(xq, wq, x_scale, w_scale, bias=None) -> Tensor:
            given = [xq, wq, x_scale, w_scale]
            for index, fix in fixes:
                given[index] = fix(given[index])
            out = new(flat, device)
            kernel(*given, no_bias if bias is None else bias, out, processors, 1.0)
            return out if lead is None else out.view(lead)

        return launch


scaled_mm_fp8 = Product()


class Linear:
    """``dsv4::fp8_linear``: the quantiser, and the product that begins while it runs."""

    product = Product(dependent=True)

    def __call__(self, *tensors, **options):
        return self.bind(*tensors, **options)(*tensors)

    def prepare(self, x, wq, w_scale, bias=None, *, out_dtype=None, **_) -> None:
        block, processors = is_block(wq, w_scale), _processors(wq.device)
        for one in tiles(wq.shape[0], block, processors):
            _begin(*self.product.key(one, wq, torch.float32, w_scale, bias, out_dtype or x.dtype))

    def product_of(self, wq: Tensor, scaling: str) -> Product:
        """The one that loads w early, but not what a kernel just ahead of it makes: a copy of w.

        With one scale for all of x the quantiser lets nothing begin before it has ended.
        """
        return self.product if scaling != "tensor" and _matrix(wq) is None else scaled_mm_fp8

    def bind(
        self, x, wq, w_scale, bias=None, *,
        scaling=None, scale_rounding="none", amax_floor=1e-4, out_dtype=None, **_,
    ) -> Callable[..., Tensor]:  # fmt: skip
        from ..triton.fp8_linear import quantize_fp8

        scaling = scaling or ("block" if is_block(wq, w_scale) else "token")
        product = self.product_of(wq, scaling)
        quantise = {"scaling": scaling, "scale_rounding": scale_rounding, "amax_floor": amax_floor}
        xq, x_scale = quantize_fp8(x, **quantise)
        multiply = product.bind(xq, wq, x_scale, w_scale, bias, out_dtype=out_dtype or x.dtype)

        def launch(x, wq, w_scale, bias=None) -> Tensor:
            xq, x_scale = quantize_fp8(x, **quantise)
            return multiply(xq, wq, x_scale, w_scale, bias)

        return launch


fp8_linear = Linear()
