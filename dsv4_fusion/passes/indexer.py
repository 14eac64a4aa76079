"""The indexer's queries: RoPE, Hadamard, quantisation and the weights' factors, as one operator.

Three forms of it are known:

- DeepSeek's inference code, in which quantise and dequantise stand in the graph: the pattern goes from the projected
  queries to the scores, and the scores' own product, relu and sum are put back as they were. MXFP4 is dequantised,
  which is exact; FP8 is multiplied as it is, with the scales in the weights. Both are powers of two, and nothing else
  is rounded differently: the scores keep their bits.
- what engines call before a scoring kernel of theirs: the operators' own references.
- Hugging Face's model, which quantises nothing: what ``indexer_scores.py`` does not match is recognised here, and left
  alone.
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
from torch.fx.graph import Graph

from .. import ops
from ..ops.indexer import indexer_q_fp8_ref, indexer_q_mxfp4_ref
from ._deepseek import apply_rope, hadamard, index_score, round_fp8, round_mxfp4
from ._pattern import SIZES, Computation, Fusion, Match, Trace, cut, find

aten = torch.ops.aten
_DIMS = (64, 128)
_FAR = 400  # nodes looked at to find where the queries were rotated
_SCALARS = {"amax_floor": 0.0717}


class Queries(NamedTuple):
    """What a trace fixes: heads, their dims, how many of these are rotated, and how they are rounded."""

    heads: int
    d: int
    rope: int
    hadamard: bool
    mxfp4: bool
    option: Any = None  # of the quantiser: power_of_two_scale, or ties
    table_dtype: torch.dtype = torch.bfloat16
    weights_dtype: torch.dtype = torch.bfloat16
    single: tuple[bool, bool, bool] = (False, False, False)  # whether batch, sequence, entries are 1: other products
    shared_table: bool = False  # one row of angles for the whole batch

    def sizes(self) -> list[int]:
        """Batch, sequence and entries of a trace."""
        return [1 if single else SIZES[name] for single, name in zip(self.single, "BSE", strict=True)]


# DeepSeek's inference code


def _rounded(x: Tensor, structure: Queries) -> Tensor:
    x = hadamard(x) if structure.hadamard else x
    return round_mxfp4(x, **_SCALARS) if structure.mxfp4 else round_fp8(x, **_SCALARS)


def _deepseek(structure: Queries) -> Trace:
    (b, s, entries), (heads, d, rope, *_) = structure.sizes(), structure

    def function(q, table, weights, k):
        apply_rope(q[..., -rope:], table)
        weights = weights * (d**-0.5 * heads**-0.5)
        return {"score": index_score(_rounded(q, structure), k, weights)}

    tensors = {
        "q": torch.empty(b, s, heads, d, dtype=torch.bfloat16),
        "table": torch.empty(s, rope // 2, dtype=torch.complex64),
        "weights": torch.empty(b, s, heads, dtype=torch.bfloat16),
        "k": torch.empty(b, entries, d, dtype=torch.bfloat16),
    }
    return Trace(function, tensors, _SCALARS, frozenset(), {"hadamard": structure.hadamard, "mxfp4": structure.mxfp4})


def _deepseek_key(structure: Queries) -> Trace:
    """From the rotated key on."""
    b, _, entries = structure.sizes()
    tensors = {"rotated": torch.empty(b, entries, structure.d, dtype=torch.bfloat16)}
    return Trace(lambda rotated: {"k": _rounded(rotated, structure)}, tensors, _SCALARS, frozenset())


def dequantise_mxfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Packed E2M1 [T, H, d / 2] and UE8M0 bytes [T, H] as :func:`ops.indexer_q_mxfp4` returns them, to bf16 [T, H, d].

    Arithmetic alone, which Inductor fuses into whatever reads the values.
    """
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int32)
    size = (codes & 7).float()  # 0 1 2 3 4 5 6 7 stand for 0 .5 1 1.5 2 3 4 6
    size = torch.where(size < 4, size * 0.5, torch.where(size < 6, size - 2, size * 2 - 8))
    values = torch.where(codes > 7, -size, size)
    blocks = codes.shape[-1] // 32
    bytes_ = torch.stack([(scale >> 8 * block) & 255 for block in range(blocks)], -1)
    powers = (bytes_ << 23).view(torch.float32)  # 255, a block that is not finite, becomes inf, and 0 times it NaN
    return (values.unflatten(-1, (blocks, 32)) * powers.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)


def _power_of_four(number: int) -> bool:
    return number & (number - 1) == 0 and number.bit_length() % 2 == 1


def _operands(q: Tensor, table: Tensor, weights: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
    """The operator's arguments for queries [B, S, H, d], angles [S, R / 2] that are complex, and weights [B, S, H]."""
    table = torch.view_as_real(table).unsqueeze(0).expand(q.shape[0], -1, -1, -1).flatten(0, 1)
    return q.flatten(0, 1), None, table[..., 0].contiguous(), table[..., 1].contiguous(), weights.flatten(0, 1)


def _fused_score(q: Tensor, table: Tensor, weights: Tensor, k: Tensor, *, mxfp4: bool, **options: Any) -> Tensor:
    """What takes the match's place: the operator, then the scores as the model computes them."""
    heads, d = q.shape[2:]
    if not _power_of_four(d) and not _power_of_four(heads):
        raise ValueError(
            f"{heads} heads of {d} dims: the operator multiplies the weights by {d}^-1/2, then by {heads}^-1/2, the "
            "model by their product, and neither is a power of two: the weights could differ in the last bit"
        )
    if mxfp4:
        packed, scale, folded = ops.indexer_q_mxfp4(*_operands(q, table, weights), **options)
        values = dequantise_mxfp4(packed, scale)
    else:
        codes, folded = ops.indexer_q_fp8(*_operands(q, table, weights), **options)
        values = codes.to(torch.bfloat16)
    shape = q.shape[:2]
    return index_score(values.unflatten(0, shape), k, folded.to(torch.bfloat16).unflatten(0, shape))


def _score_sites(mxfp4: bool, node: Node) -> Iterator[Queries]:
    """``node`` is the relu of bf16 scores [B, S, H, E], or something near it."""
    value, product = node.meta["val"], _product(node)
    if value.dim() != 4 or value.dtype != torch.bfloat16 or not isinstance(value.shape[2], int) or product is None:
        return
    d = product.args[0].meta["val"].shape[-1]
    if d in _DIMS:
        rotated = _nearest(product.args[0], _is(aten.view_as_complex.default), _FAR)
        pairs = rotated.meta["val"].shape[-1] if rotated is not None else None
        rope = 2 * pairs if isinstance(pairs, int) else d // 2
        for hadamard in (True, False):
            yield Queries(value.shape[2], d, rope, hadamard, mxfp4, single=_single(value))


def _product(relu: Node) -> Node | None:
    """What the scores are computed by: a batched product, or what stands in its place."""

    def alike(node: Node) -> bool:
        return len(node.all_input_nodes) == 2 and _dim(node) == 3

    return _nearest(relu, _is(aten.bmm.default), 24) or _nearest(relu, alike, 12)


def _dim(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def _single(scores: Tensor) -> tuple[bool, bool, bool]:
    batch, length, _, entries = scores.shape
    return statically_known_true(batch == 1), statically_known_true(length == 1), statically_known_true(entries == 1)


def _is(target: Any) -> Callable[[Node], bool]:
    return lambda node: node.target is target


def _nearest(node: Node, wanted: Callable[[Node], bool], far: int) -> Node | None:
    """The nearest node that is wanted among ``node`` and what it is computed from."""
    level, seen = [node], {node}
    while level and len(seen) < far:
        for at in level:
            if wanted(at):
                return at
        sources = [source for at in level for source in at.all_input_nodes if source not in seen]
        level = list(dict.fromkeys(sources))  # a butterfly has each many times
        seen.update(level)
    return None


def _one_sided(match: Match) -> str | None:
    """Why queries and keys do not belong together, as far as the keys are quantised in the same graph."""
    k = match.inputs[-1]
    amax = _nearest(k, _is(aten.amax.default), 64)
    if amax is None:
        return None

    def is_rounded(hadamard: bool) -> Match | None:
        for mxfp4 in (True, False):
            structure = Queries(1, k.meta["val"].shape[-1], 0, hadamard, mxfp4)
            found = find(cut(_KEY, structure, _KEY.fusions[0]), amax, set())
            if isinstance(found, Match) and found.outputs == [k]:
                return found
        return None

    transformed = is_rounded(True) is not None
    plain = None if transformed else is_rounded(False)
    if match.constants["hadamard"] and plain is not None and _is_rotated(plain.inputs[0]):
        return "the queries go through a Hadamard transform and the keys do not: their products mean nothing"
    if not match.constants["hadamard"] and transformed:
        return "the keys go through a Hadamard transform and the queries do not: their products mean nothing"
    return None


def _is_rotated(node: Node) -> bool:
    """Whether ``node`` is a key right after RoPE, which ends in a write into its slice, or in the compressor."""
    return node.target is aten.slice_scatter.default or str(node.target).startswith("dsv4.compress_")


def contradiction(graph: Graph) -> str | None:
    """Operators in one graph of which some transform queries or keys and some do not: no score of these is right."""
    settings: dict[bool, str] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        wrapped = node.args[:1] if "auto_functionalized" in str(node.target) else (node.target,)
        if wrapped and str(wrapped[0]).startswith(("dsv4.indexer_q_", "dsv4.indexer_k_store_")):
            settings.setdefault(bool(node.kwargs.get("hadamard", False)), f"{wrapped[0]} ({node.name})")
    if len(settings) < 2:
        return None
    return (
        f"{settings[True]} is called with hadamard=True and {settings[False]} with hadamard=False in one graph: the "
        "indexer's queries and keys are transformed both or not at all, or their products mean nothing"
    )


# What engines call: the operators' references


def _engine(structure: Queries) -> Trace:
    (_, tokens, rows), (heads, d, rope, hadamard, mxfp4, option, table_dtype, weights_dtype, *_) = (
        structure.sizes(),
        structure,
    )
    chosen = {"ties": option} if mxfp4 else {"power_of_two_scale": option}
    reference = indexer_q_mxfp4_ref if mxfp4 else indexer_q_fp8_ref

    def function(q, positions, cos_table, sin_table, weights):
        cos, sin = cos_table[positions], sin_table[positions]
        *values, folded = reference(q, None, cos, sin, weights, hadamard=hadamard, **_SCALARS, **chosen)
        names = ("q_packed", "q_scale") if mxfp4 else ("q_fp8",)
        return {"cos": cos, "sin": sin, **dict(zip(names, values, strict=True)), "weights_out": folded}

    tensors = {
        "q": torch.empty(tokens, heads, d, dtype=torch.bfloat16),
        "positions": torch.empty(tokens, dtype=torch.int64),
        "cos_table": torch.empty(rows, rope // 2, dtype=table_dtype),
        "sin_table": torch.empty(rows, rope // 2, dtype=table_dtype),
        "weights": torch.empty(tokens, heads, dtype=weights_dtype),
    }
    return Trace(function, tensors, _SCALARS, frozenset(), {"hadamard": hadamard, **chosen})


def _amax_sites(mxfp4: bool, node: Node) -> Iterator[Queries]:
    """``node`` is the largest magnitude of the rows of [T, H, d], or of their blocks of 32."""
    shape = node.args[0].meta["val"].shape
    if len(shape) != 3 + mxfp4 or len(node.args) > 2 or not all(isinstance(size, int) for size in shape[1:]):
        return
    heads, d = shape[1], shape[2] * shape[3] if mxfp4 else shape[2]
    joined = _nearest(node, lambda at: at.target is aten.cat.default and at.meta["val"].dim() == 3, _FAR)
    if joined is None and node.args[0].target is aten.abs.default:  # something else stands in its place
        joined = _nearest(node, lambda at: _dim(at) == 3 and bool(at.args) and isinstance(at.args[0], list), _FAR)
    if d not in _DIMS or joined is None or not isinstance(joined.args[0][-1], Node):
        return
    hadamard = _nearest(node, lambda at: at is joined or at.target is aten.cat.default, _FAR) is not joined
    rope = joined.args[0][-1].meta["val"].shape[-1]
    if not isinstance(rope, int):
        return
    for option in ("even", "zero") if mxfp4 else (True, False):
        for table_dtype in (torch.float32, torch.bfloat16):
            for weights_dtype in (torch.bfloat16, torch.float32):
                yield Queries(heads, d, rope, hadamard, mxfp4, option, table_dtype, weights_dtype)


def _amax_unplaced(node: Node) -> str | None:
    """Why ``node`` is no site, if it is the largest magnitude of rows in which rotated dims were joined with others."""
    magnitude = node.args[0]
    joined = _nearest(node, _is(aten.cat.default), _FAR)
    if len(node.args) > 2 or magnitude.target is not aten.abs.default or joined is None:
        return None
    if not any(user.target is aten.clamp_min.default for each in (node, *node.users) for user in each.users):
        return None
    return (
        f"magnitudes of shape {list(magnitude.meta['val'].shape)} out of rows of shape "
        f"{list(joined.meta['val'].shape)}, expected [T, heads, d] with known heads and a d of 64 or 128"
    )


def _gathered(operator: Callable[..., Any]) -> Callable[..., Any]:
    """``operator`` for cos and sin that are gathered already."""
    return lambda q, cos, sin, weights, **options: operator(q, None, cos, sin, weights, **options)


# Hugging Face's model


def _modeling() -> ModuleType | None:
    return sys.modules.get("transformers.models.deepseek_v4.modeling_deepseek_v4")


def _hugging_face(structure: Queries) -> Trace:
    (b, s, entries), (heads, d, rope, *_), dtype = structure.sizes(), structure, structure.table_dtype

    def function(q, cos, sin, k, weights):
        scorer = SimpleNamespace(softmax_scale=0.0531, weights_scaling=0.0747, weights_proj=lambda hidden: hidden)
        q = _modeling().apply_rotary_pos_emb(q.transpose(1, 2), cos, sin).transpose(1, 2)
        return {"score": _modeling().DeepseekV4IndexerScorer.forward(scorer, q, k, weights)}

    rows = 1 if structure.shared_table else b
    tensors = {
        "q": torch.empty(b, s, heads, d, dtype=dtype),
        "cos": torch.empty(rows, s, rope // 2, dtype=dtype),
        "sin": torch.empty(rows, s, rope // 2, dtype=dtype),
        "k": torch.empty(b, entries, d, dtype=dtype),
        "weights": torch.empty(b, s, heads, dtype=dtype),
    }
    return Trace(function, tensors, {"softmax_scale": 0.0531, "weights_scaling": 0.0747}, frozenset())


def _rotated_queries(product: Node) -> tuple[Node, int, int] | None:
    """Of a product with queries [.., d] on its left: where those that are not rotated and those that are were joined,
    and how many there are of both and of the latter. None in another model's graph, where something else is joined."""
    joined = _nearest(product.args[0], _is(aten.cat.default), 32)
    if joined is None or not isinstance(joined.args[0][-1], Node):
        return None
    d, rope = joined.meta["val"].shape[-1], joined.args[0][-1].meta["val"].shape[-1]
    pairs = isinstance(rope, int) and rope > 0 and rope % 2 == 0
    return (joined, d, rope) if pairs and d == product.args[0].meta["val"].shape[-1] else None


def _hugging_face_sites(node: Node) -> Iterator[Queries]:
    """``node`` is the relu of fp32 scores [B, S, H, E]."""
    value, product = node.meta["val"], _nearest(node, _is(aten.bmm.default), 12)
    if _modeling() is None or product is None or value.dim() != 4 or not isinstance(value.shape[2], int):
        return
    found = _rotated_queries(product)
    if found is not None:
        joined, d, rope = found
        dtype, single = joined.meta["val"].dtype, _single(value)
        for shared in (False,) if single[0] else (True, False):  # position_ids of the model's own, or of each request
            yield Queries(value.shape[2], d, rope, False, False, None, dtype, single=single, shared_table=shared)


# Fusions

_SCORED = ("q", "table", "weights", "k")
_GATHERED = ("q", "cos", "sin", "weights")
_TABLE = ("q", "positions", "cos_table", "sin_table", "weights")
_FP8_OUT = ("q_fp8", "weights_out")
_MXFP4_OUT = ("q_packed", "q_scale", "weights_out")

INDEXER_Q_FP8 = (
    Fusion("indexer_q_fp8", _TABLE, _FP8_OUT, ops.indexer_q_fp8),
    Fusion("indexer_q_fp8", _GATHERED, _FP8_OUT, _gathered(ops.indexer_q_fp8)),
)
INDEXER_Q_MXFP4 = (
    Fusion("indexer_q_mxfp4", _TABLE, _MXFP4_OUT, ops.indexer_q_mxfp4),
    Fusion("indexer_q_mxfp4", _GATHERED, _MXFP4_OUT, _gathered(ops.indexer_q_mxfp4)),
)
DEEPSEEK = {
    name: (Fusion(name, _SCORED, ("score",), _fused_score, refuse=_one_sided),)
    for name in ("indexer_q_mxfp4", "indexer_q_fp8")
}
HUGGING_FACE = (
    Fusion(
        "indexer_q_fp8",
        ("q", "cos", "sin", "k", "weights"),
        ("score",),
        _fused_score,
        left_alone="nothing is quantised here, and indexer_topk takes bf16 heads of 64 or 128 dims, up to the choice",
    ),
)
_KEY = Computation(aten.amax.default, lambda node: (), _deepseek_key, (Fusion("key", ("rotated",), ("k",), _rounded),))

COMPUTATIONS = (
    *(
        Computation(aten.relu.default, functools.partial(_score_sites, "mxfp4" in name), _deepseek, DEEPSEEK[name])
        for name in DEEPSEEK
    ),
    Computation(aten.amax.default, functools.partial(_amax_sites, False), _engine, INDEXER_Q_FP8, _amax_unplaced),
    Computation(aten.amax.default, functools.partial(_amax_sites, True), _engine, INDEXER_Q_MXFP4),
    Computation(aten.relu.default, _hugging_face_sites, _hugging_face, HUGGING_FACE),
)
