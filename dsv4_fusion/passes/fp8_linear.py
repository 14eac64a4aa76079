"""Linear layers whose weight is FP8: what is matched, and which operator takes its place. Only where it is asked for.

Three forms of a graph:

1. torchao's dynamic FP8: quantisation of the rows, then ``aten._scaled_mm``; or ``_scaled_mm`` alone.
2. An FP8 weight that is dequantised before an ordinary product, with scales per channel, per tensor, or per block of
   128 x 128. The activation is quantised then, which the graph did not do.
3. DeepSeek's inference code: the activation is rounded to FP8 in groups of 128 and the weight dequantised by blocks.

M is the tokens, K the inputs (``D`` in a trace), N the outputs (``E``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops
from ._deepseek import round_fp8_groups
from ._pattern import SIZES, Computation, Fusion, Match, Trace

aten, prims = torch.ops.aten, torch.ops.prims
B, S, K, N = SIZES["B"], SIZES["S"], SIZES["D"], SIZES["E"]
FP8 = torch.float8_e4m3fn
_FP8 = (FP8, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
GROUP = 128
_FLOOR = {"amax_floor": 0.000107}
_TORCHAO_FLOOR = 448 * 2.0**-126  # torchao has none, and makes NaN of a row of zeros


# torchao


class Scaled(NamedTuple):
    """A product by ``_scaled_mm``, of ``dims`` dimensions before the quantisation."""

    bias: bool
    dtype: torch.dtype  # of the activation
    dims: int
    out_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    fast: bool
    single: bool  # one token, whose scale torchao takes for one of a tensor


def _torchao(structure: Scaled) -> Trace:
    """As torchao 0.13 to 0.18 quantises a row: its scale is rounded to the activation's dtype."""
    lead = ((1, 1) if structure.single else (B, S))[: structure.dims - 1]

    def function(x: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
        scale = x.view(x.shape).abs().amax([x.dim() - 1], True) / 448.0
        scale = scale.reshape([*lead, 1]).to(torch.float32)
        codes = (x.to(torch.float32) / scale).clamp(min=-448.0, max=448.0).to(FP8)
        xq = codes.reshape(-1, K)
        x_scale = scale.reshape(1, 1) if structure.single else scale.unsqueeze(-1).reshape(-1, 1)
        product = aten._scaled_mm(xq, wq.t(), x_scale, w_scale.t(), bias, None, structure.out_dtype, structure.fast)
        return {"xq": xq, "x_scale": x_scale, "product": product}

    tensors = {
        "x": torch.empty(*lead, K, dtype=structure.dtype),
        "wq": torch.empty(N, K, dtype=FP8),
        "w_scale": torch.empty(N, 1),
    }
    if structure.bias:
        tensors["bias"] = torch.empty(N, dtype=structure.bias_dtype)
    return Trace(function, tensors, {}, frozenset(), {"out_dtype": structure.out_dtype})  # type: ignore[dict-item]


def _torchao_sites(bias: bool, all_dims: tuple[int, ...], node: Node) -> Iterator[Scaled]:
    args = dict(enumerate(node.args))
    given = args.get(4, node.kwargs.get("bias"))
    out_dtype = args.get(6, node.kwargs.get("out_dtype"))
    if (given is not None) is not bias:
        return
    if not isinstance(out_dtype, torch.dtype):  # the matcher says what is expected
        out_dtype = torch.bfloat16
    bias_dtype = given.meta["val"].dtype if isinstance(given, Node) else None
    single = statically_known_true(node.meta["val"].shape[0] == 1)
    for dtype in (out_dtype, *({torch.bfloat16, torch.float16} - {out_dtype})):
        for dims in all_dims:
            yield Scaled(bias, dtype, dims, out_dtype, bias_dtype, bool(args.get(7, False)), single)


def _scaled_mm(xq, wq, x_scale, w_scale, bias=None, *, out_dtype, implementation):
    return ops.scaled_mm_fp8(xq, wq, x_scale, w_scale, bias, out_dtype=out_dtype, implementation=implementation)


def _torchao_linear(x, wq, w_scale, bias=None, *, out_dtype, implementation):
    out = ops.fp8_linear(
        x, wq, w_scale, bias,
        scale_rounding="input", amax_floor=_TORCHAO_FLOOR, out_dtype=out_dtype, implementation=implementation,
    )  # fmt: skip
    return out.reshape(-1, wq.shape[0])


# Dequantised weights


# Scales of blocks repeated to the size of the weight and cut to it, not cut, or a view of it in four dimensions.
_BLOCKS = ("repeat", "whole", "blocks")


class Dequantised(NamedTuple):
    """How a weight becomes one of ``dtype``, and what is multiplied by it."""

    bias: bool
    scaling: str  # scalar, tensor ([1]), tensor2 ([1, 1]), channel, or one of _BLOCKS
    wide: bool  # the product with the scale is fp32, and rounded
    dtype: torch.dtype
    scale: torch.dtype  # of the scale as it is stored
    dims: int = 0  # of an activation that is rounded to FP8 here; 0: as it comes
    bias_dtype: torch.dtype | None = None


def _of_weight(structure: Dequantised, wq: Tensor, w_scale: Tensor) -> Tensor:
    scaling, wide, dtype = structure.scaling, structure.wide, structure.dtype
    values = wq.to(torch.float32 if wide else dtype)
    scale = w_scale if wide else w_scale.to(dtype)
    if scaling == "repeat":
        scale = scale.repeat_interleave(GROUP, 0)[: wq.shape[0]].repeat_interleave(GROUP, 1)[:, : wq.shape[1]]
    elif scaling == "whole":
        scale = scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    elif scaling == "blocks":
        values = values.view(N, GROUP, K, GROUP)
        return (values * scale[:, None, :, None]).view(wq.shape).to(dtype)
    return (values * scale).to(dtype)


def _dequantised(structure: Dequantised) -> Trace:
    block, dtype = structure.scaling in _BLOCKS, structure.dtype
    n, k = (GROUP * N, GROUP * K) if block else (N, K)
    scales = {"scalar": (), "tensor": (1,), "tensor2": (1, 1), "channel": (N, 1)} | dict.fromkeys(_BLOCKS, (N, K))

    def function(x: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
        weight = _of_weight(structure, wq, w_scale)  # first: its conversion is the anchor
        rows = round_fp8_groups(x, GROUP, **_FLOOR) if structure.dims else x
        rows = rows.flatten(0, 1) if structure.dims == 3 else rows
        product = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        return {"product": product}

    def activation() -> Tensor:
        return torch.empty(*(B, S)[: structure.dims - 1], k) if structure.dims else torch.empty(S, k)

    tensors = {
        "x": activation().to(dtype),
        "wq": torch.empty(n, k, dtype=FP8),
        "w_scale": torch.empty(scales[structure.scaling], dtype=structure.scale),
    }
    if structure.bias:
        tensors["bias"] = torch.empty(n, dtype=structure.bias_dtype)
    return Trace(function, tensors, _FLOOR if structure.dims else {}, frozenset())


def _product(node: Node) -> Node | None:
    """The matrix product that a dequantised weight goes into."""
    level = [node]
    for _ in range(8):
        level = [user for at in level for user in at.users]
        for user in level:
            if user.target in (aten.mm.default, aten.addmm.default):
                return user
    return None


def _factor(node: Node, product: Node) -> Node | None:
    """What the weight is multiplied by on its way to the product."""
    level = [node]
    for _ in range(3):
        for user in (user for at in level for user in at.users if user is not product):
            if len(user.all_input_nodes) == 2:
                return next((source for source in user.all_input_nodes if source not in level), None)
        level = [user for at in level for user in at.users]
    return None


def _dequantised_sites(bias: bool, rounded: bool, node: Node) -> Iterator[Dequantised]:
    """``node`` converts a weight from FP8.

    An activation that was rounded to FP8, and what is multiplied by no matrix product, are no linear layers. What
    differs beyond that the matcher says: the structure is guessed where it is not known.
    """
    source = node.args[0]
    if source.meta["val"].dtype not in _FP8 or source.meta["val"].dim() == 0 or len(source.users) > 8:
        return
    if source.target is prims.convert_element_type.default or (product := _product(node)) is None:
        return
    if (product.target is aten.addmm.default) is not bias:
        return
    dtype = product.meta["val"].dtype
    if dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.bfloat16
    wide = node.args[1] != dtype
    factor, n = _factor(node, product), source.meta["val"].shape[0]
    shape = factor.meta["val"].shape if factor is not None else ()
    if len(shape) < 2:
        forms: tuple[str, ...] = (("scalar", "tensor")[len(shape)],)
    elif len(shape) == 3 or (len(shape) == 2 and shape[1] == 1):
        forms = ("channel",) if shape[0] == n else ("tensor2",)
    else:
        forms = ("blocks",) if len(shape) == 4 else ("repeat", "whole")
    bias_dtype = product.args[0].meta["val"].dtype if bias else None
    for scaling in forms:
        if not rounded:
            for scale in (torch.float32,) if wide else (torch.float32, dtype):
                yield Dequantised(bias, scaling, wide, dtype, scale, 0, bias_dtype)
        elif scaling in _BLOCKS:
            for dims in (3, 2):
                yield Dequantised(bias, scaling, wide, dtype, torch.float32, dims, bias_dtype)


def _rounded_already(match: Match) -> str | None:
    """Why the activation must not be quantised: it was, in a form that is not known here."""
    level = [match.inputs[0]]
    for _ in range(8):
        level = [source for at in level for source in at.all_input_nodes]
        if any(getattr(at.meta.get("val"), "dtype", None) == FP8 for at in level):
            return "the activation is rounded to FP8 already, in a form that has no fusion"
    return None


def _weight_only(x, wq, w_scale, bias=None, *, implementation):
    scale = w_scale.float()
    scale = scale.view(1) if scale.numel() == 1 else scale
    return ops.fp8_linear(x, wq, scale, bias, implementation=implementation)


def _deepseek(x, wq, w_scale, bias=None, *, amax_floor, implementation):
    out = ops.fp8_linear(
        x, wq, w_scale, bias, scale_rounding="power_of_two", amax_floor=amax_floor, implementation=implementation
    )
    return out.reshape(-1, wq.shape[0])


# Fusions


def _computations() -> Iterator[Computation]:
    for bias in (False, True):
        more: Any = ("bias",) if bias else ()
        out = ("product",)
        yield Computation(
            aten._scaled_mm.default,
            functools.partial(_torchao_sites, bias, (3, 2)),
            _torchao,
            (Fusion("fp8_linear", ("x", "wq", "w_scale", *more), out, _torchao_linear),),
        )
        yield Computation(
            aten._scaled_mm.default,
            functools.partial(_torchao_sites, bias, (2,)),
            _torchao,
            (Fusion("scaled_mm_fp8", ("xq", "wq", "x_scale", "w_scale", *more), out, _scaled_mm),),
        )
        for rounded, replacement, refuse in ((True, _deepseek, None), (False, _weight_only, _rounded_already)):
            yield Computation(
                prims.convert_element_type.default,
                functools.partial(_dequantised_sites, bias, rounded),
                _dequantised,
                (Fusion("fp8_linear", ("x", "wq", "w_scale", *more), out, replacement, refuse=refuse),),
            )


COMPUTATIONS = tuple(_computations())
