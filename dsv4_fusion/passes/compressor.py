"""The compressor: gates and their bias, softmax, weighted sum, RMSNorm and RoPE become one operator.

Two forms are known. Hugging Face's model is traced through its own ``forward``, with a stand-in for the cache; windows
that overlap are put together there by writes into slices, which are part of the pattern, and what a cache keeps of the
last window is computed beside the operator. DeepSeek's inference code is written down in ``_deepseek.py``; where it
rounds the entry to FP8 and back, the operator does.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops
from ..ops._compressor import BLOCK
from ._deepseek import compress, round_nope
from ._pattern import SIZES, Computation, Fusion, Trace, number

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_FAR = 64  # nodes looked at around a site
_NEAR = 16  # and for what stands next to it
_SCALARS = {"norm_eps": 0.0537}


class Windows(NamedTuple):
    """What a trace fixes. ``overlap`` is None without a second series; "kept" with a cache, "carried" into a window."""

    d: int
    ratio: int
    rope: int
    overlap: str | None
    single: bool  # one window: nothing is shifted
    dtype: torch.dtype = torch.bfloat16
    bias_dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    entry_dtype: torch.dtype = torch.bfloat16  # in DeepSeek's form

    def tensors(self) -> dict[str, Tensor]:
        """Those that both forms have."""
        windows = 1 if self.single else SIZES["S"]
        width = self.d if self.overlap is None else 2 * self.d
        return {
            "kv": torch.empty(SIZES["B"], windows * self.ratio, width, dtype=self.dtype),
            "gate": torch.empty(SIZES["B"], windows * self.ratio, width, dtype=self.dtype),
            "position_bias": torch.empty(self.ratio, width, dtype=self.bias_dtype),
            "norm_weight": torch.empty(self.d, dtype=self.weight_dtype),
        }


# Hugging Face's model


def _modeling() -> ModuleType | None:
    return sys.modules.get("transformers.models.deepseek_v4.modeling_deepseek_v4")


class _Done(Exception):
    """Ends a ``forward`` where the entries are known."""


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    norm = SimpleNamespace(weight=weight, variance_epsilon=_SCALARS["norm_eps"])
    return _modeling().DeepseekV4RMSNorm.forward(norm, x)


def _hugging_face(structure: Windows) -> Trace:
    tensors = structure.tensors()
    windows = 1 if structure.single else SIZES["S"]
    normed = _rms_norm(torch.empty(1, structure.d, dtype=structure.dtype), tensors["norm_weight"])
    for key in ("cos", "sin"):
        tensors[key] = torch.empty(SIZES["B"], windows, structure.rope // 2, dtype=normed.dtype)
    if structure.overlap == "carried":
        for key in ("overlap_kv", "overlap_gate"):
            tensors[key] = torch.empty(SIZES["B"], structure.ratio, structure.d, dtype=structure.dtype)
        tensors["overlap_gate"] = tensors["overlap_gate"].to(torch.promote_types(structure.dtype, structure.bias_dtype))

    def function(kv, gate, position_bias, norm_weight, cos, sin, overlap_kv=None, overlap_gate=None):
        values: dict[str, Tensor] = {}

        def keep(name, chunk_kv, chunk_gate, head_dim):
            if structure.overlap != "none":
                state = SimpleNamespace(overlap_kv={name: overlap_kv}, overlap_gate={name: overlap_gate})
                _modeling().DeepseekV4CSACache.update_overlap_state(state, name, chunk_kv, chunk_gate, head_dim)
                values.update(kept_kv=state.overlap_kv[name], kept_gate=state.overlap_gate[name])
            return overlap_kv, overlap_gate

        def done(name, compressed):
            values["entries"] = compressed
            raise _Done

        cache = SimpleNamespace(
            store_compression_weights=lambda name, kv, gate: (kv, gate, 0),
            update_overlap_state=keep,
            update_compressor_states=done,
        )
        compressor = SimpleNamespace(
            compress_rate=structure.ratio,
            head_dim=structure.d,
            rope_layer_type="compress",
            kv_proj=lambda hidden: kv,
            gate_proj=lambda hidden: gate,
            position_bias=position_bias,
            kv_norm=lambda pooled: _rms_norm(pooled, norm_weight),
            rotary_emb=lambda *_, **__: (cos, sin),
        )
        kind = "HCA" if structure.overlap is None else "CSA"
        forward = getattr(_modeling(), f"DeepseekV4{kind}Compressor").forward
        try:
            forward(compressor, kv, None, None, SimpleNamespace(layers=[cache]), 0)
        except _Done:
            return values
        raise RuntimeError("the compressor's forward did not hand its entries to the cache")

    constants = {} if normed.dtype == structure.dtype else {"dtype": normed.dtype}
    return Trace(function, tensors, _SCALARS, frozenset(), constants)


def _with_rows(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``operator`` for cos and sin of any strides; those of transformers 5.17 are transposed."""

    def replacement(kv, gate, position_bias, norm_weight, cos, sin, *rest, **options):
        angles = cos.contiguous(), sin.contiguous()
        return operator(kv, gate, position_bias, norm_weight, *angles, *rest, **options)

    return replacement


_CSA, _HCA = _with_rows(ops.compress_csa), _with_rows(ops.compress_hca)


def _keeping(kv: Tensor, gate: Tensor, position_bias: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The operator, and what the cache keeps of the last window: the first series, the gates with their bias."""
    ratio, d = position_bias.shape[0], rest[0].shape[0]
    entries = _CSA(kv, gate, position_bias, *rest, **options)
    return entries, kv[:, -ratio:, :d].clone(), gate[:, -ratio:, :d] + position_bias[:, :d]


def _around(node: Node, step: Callable[[Node], Any], wanted: Callable[[Node], bool], far: int = _FAR) -> Node | None:
    """The nearest node that is wanted, going from ``node`` by ``step``."""
    level, seen = [node], {node}
    while level and len(seen) < far:
        for at in level:
            if wanted(at):
                return at
        level = list(dict.fromkeys(other for at in level for other in step(at) if other not in seen))
        seen.update(level)
    return None


def _sources(node: Node) -> list[Node]:
    return node.all_input_nodes


def _users(node: Node) -> list[Node]:
    return list(node.users)


def _shape(node: Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _rows(node: Node) -> int | None:
    """How many rows the windows [B, W, rows, d] have.

    Where S is symbolic, PyTorch may write S // (S // 4) for the 4 that the sequence was divided by: the view has it.
    """
    for _ in range(_NEAR):
        shape = _shape(node)
        if len(shape) != 4:
            return None
        if (rows := number(shape[2])) is not None:
            return rows
        if node.target is aten.view.default:
            return number(node.args[1][2])
        if node.target is aten.cat.default and node.args[1] == 2:
            parts = [_rows(part) for part in node.args[0]]
            return None if None in parts else sum(parts)
        node = next((source for source in node.all_input_nodes if len(_shape(source)) == 4), node)
    return None


def _windows(node: Node) -> tuple[int, int] | None:
    """Rows and dims, if ``node`` is the largest gate of the windows of [B, W, rows, d].

    Over another dimension it is one if what it weighs is summed over the rows all the same.
    """
    shape = _shape(node.args[0])
    rows, d = (_rows(node.args[0]), number(shape[3])) if len(shape) == 4 else (None, None)
    if rows is None or d is None:
        return None

    def pooled(at: Node) -> bool:
        if at.target is not aten.sum.dim_IntList or list(at.args[1]) != [2]:
            return False
        summed = at.args[0]
        return len(_shape(summed)) == 4 and len(_shape(at)) == 3 and (_rows(summed), number(_shape(at)[2])) == (rows, d)

    return (rows, d) if list(node.args[1]) == [2] or _around(node, _users, pooled) is not None else None


def _rotated(node: Node, d: int) -> tuple[bool, int] | None:
    """How many dims of the entries are turned, and whether as complex numbers.

    Where neither their joining nor their pairs are found, the slice of the last dims tells.
    """

    def tail(at: Node) -> bool:
        return at.target is aten.slice.Tensor and isinstance(at.args[2], int) and at.args[2] < 0

    turned = _around(node, _users, lambda at: getattr(at.meta.get("val"), "dtype", None) == torch.complex64)
    joined = _around(node, _users, lambda at: at.target is aten.cat.default and number(_shape(at)[-1]) == d)
    last = _around(node, _users, tail)
    if turned is not None:
        rope = 2 * (number(_shape(turned)[-1]) or 0)
    elif joined is not None and isinstance(joined.args[0][-1], Node):
        rope = number(_shape(joined.args[0][-1])[-1]) or 0
    else:
        rope = -last.args[2] if last is not None else 0
    return (turned is not None, rope) if 2 <= rope < d else None


def _hugging_face_sites(overlap: bool, node: Node) -> Iterator[Windows]:
    """``node`` is the largest gate of each window and dim. What the site lacks is guessed: the matcher says it."""
    if _modeling() is None or (found := _windows(node)) is None:
        return
    rows, d = found
    scattered = _around(
        node, _sources, lambda at: at.target in (aten.slice_scatter.default, aten.select_scatter.default)
    )
    if overlap != (scattered is not None) or (overlap and rows % 2):
        return
    if (rotated := _rotated(node, d)) is None or rotated[0]:
        return
    far = _FAR if overlap else _NEAR
    added = _around(node, _sources, lambda at: at.target is aten.add.Tensor and len(_shape(at)) == 4, far)
    gate = added.args[0] if added is not None else node.args[0].all_input_nodes[0]
    dtype = gate.meta["val"].dtype
    mode = None
    if overlap:
        kept = added is not None and any(user.target is aten.select.int for user in added.users)
        carried = scattered.target is aten.select_scatter.default
        mode = "carried" if carried else "kept" if kept else "none"
    single = statically_known_true(node.meta["val"].shape[1] == 1)
    bias_dtype = added.meta["val"].dtype if added is not None else dtype
    for weight_dtype in dict.fromkeys((dtype, torch.float32)):
        yield Windows(d, rows // (1 + overlap), rotated[1], mode, single, dtype, bias_dtype, weight_dtype)


# DeepSeek's inference code


def _deepseek(structure: Windows) -> Trace:
    tensors = structure.tensors()
    windows = 1 if structure.single else SIZES["S"]
    tensors["table"] = torch.empty(windows, structure.rope // 2, dtype=torch.complex64)

    def function(kv, gate, position_bias, norm_weight, table):
        rotated = compress(
            kv,
            gate,
            position_bias,
            norm_weight,
            table,
            _SCALARS["norm_eps"],
            structure.overlap is not None,
            structure.entry_dtype,
        )
        whole = (structure.d - structure.rope) % BLOCK == 0
        return {"rotated": rotated, "entries": round_nope(rotated, structure.rope) if whole else rotated}

    return Trace(function, tensors, _SCALARS, frozenset(), {"dtype": structure.entry_dtype})


def _deepseek_sites(overlap: bool, node: Node) -> Iterator[Windows]:
    """``node`` is the largest gate of each window and dim, in fp32."""
    if (found := _windows(node)) is None or (overlap and found[0] % 2):
        return
    rows, d = found
    joined = node.args[0].target is aten.cat.default
    padded = joined or _around(node, _sources, lambda at: at.target is aten.constant_pad_nd.default, _NEAR) is not None
    if padded != overlap or (rotated := _rotated(node, d)) is None or not rotated[0]:
        return
    rope = rotated[1]
    single = statically_known_true(node.meta["val"].shape[1] == 1)
    fp32 = torch.float32
    mode = "none" if overlap else None
    for dtype in (torch.bfloat16, fp32):
        yield Windows(d, rows // (1 + overlap), rope, mode, single, fp32, fp32, fp32, dtype)


_PADDING = (aten.constant_pad_nd.default, aten.slice_scatter.default, aten.select_scatter.default)


def _unplaced(overlap: bool, node: Node) -> str | None:
    """Why ``node`` is no site, if it is the largest gate of a pooling by operators: softmax, weighted sum, RMSNorm."""
    if overlap != (_around(node, _sources, lambda at: at.target in _PADDING) is not None):
        return None
    at, steps = node, [aten.sub.Tensor, aten.exp.default, aten.div.Tensor, aten.mul.Tensor, aten.sum.dim_IntList]
    steps += [aten.pow.Tensor_Scalar, aten.mean.dim]
    while steps:
        step = next((user for user in at.users if user.target is steps[0]), None)
        if step is not None:
            at, steps = step, steps[1:]
            continue
        at = next((user for user in at.users if user.target is _CAST), None)
        if at is None:
            return None
    gates = f"the gates' shape is {list(_shape(node.args[0]))}"
    found = _windows(node)
    if found is None:
        return f"{gates}, expected [B, windows, rows, d] with known rows and d"
    if overlap and found[0] % 2:
        return f"{gates}, expected an even number of rows, of two series"
    rotated = _rotated(node, found[1])
    if rotated is None:
        return "no rotation of the last dims of its entries was found"
    return f"its entries are rotated as {'complex numbers' if rotated[0] else 'pairs'}, in a form that is not known"


def _complex(operator: Callable[..., Tensor], rounded: bool) -> Callable[..., Tensor]:
    """``operator`` for angles as complex numbers [W, R / 2], shared by the batch."""

    def replacement(kv, gate, position_bias, norm_weight, table, **options):
        angles = torch.view_as_real(table).unsqueeze(0).expand(kv.shape[0], -1, -1, -1)
        cos, sin = angles[..., 0].contiguous(), angles[..., 1].contiguous()
        return operator(kv, gate, position_bias, norm_weight, cos, sin, round_nope=rounded, **options)

    return replacement


# Fusions, the largest first

_ROWS = ("kv", "gate", "position_bias", "norm_weight")
_INPUTS = (*_ROWS, "cos", "sin")
_KEPT = ("entries", "kept_kv", "kept_gate")

COMPRESS_CSA = {
    "none": (Fusion("compress_csa", _INPUTS, ("entries",), _CSA),),
    "kept": (Fusion("compress_csa", _INPUTS, _KEPT, _keeping),),
    "carried": (Fusion("compress_csa", (*_INPUTS, "overlap_kv", "overlap_gate"), _KEPT, _keeping),),
}
COMPRESS_HCA = (Fusion("compress_hca", _INPUTS, ("entries",), _HCA),)
DEEPSEEK = {
    name: tuple(
        Fusion(name, (*_ROWS, "table"), (out,), _complex(operator, out == "entries")) for out in ("entries", "rotated")
    )
    for name, operator in (("compress_csa", ops.compress_csa), ("compress_hca", ops.compress_hca))
}


def _in_mode(mode: str, node: Node) -> Iterator[Windows]:
    return (structure for structure in _hugging_face_sites(True, node) if structure.overlap == mode)


COMPUTATIONS = (
    *(
        Computation(aten.amax.default, functools.partial(_in_mode, mode), _hugging_face, COMPRESS_CSA[mode])
        for mode in COMPRESS_CSA
    ),
    Computation(aten.amax.default, functools.partial(_hugging_face_sites, False), _hugging_face, COMPRESS_HCA),
    *(
        Computation(
            aten.amax.default,
            functools.partial(_deepseek_sites, overlap),
            _deepseek,
            DEEPSEEK[name],
            functools.partial(_unplaced, overlap),
        )
        for name, overlap in (("compress_csa", True), ("compress_hca", False))
    ),
)
