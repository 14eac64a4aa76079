"""The indexer's choice of keys: scores, causal mask, top-k and the −1 of what is not visible, as one operator.

Hugging Face's model computes the scores in fp32 from bf16 queries and keys, for all heads at a time. The operator
multiplies the same bf16 values, adds in fp32, and never has more than one number for a query and a key. Where the user
asks for it (``options={"indexer": "fp8"}`` or ``"fp4"``), queries and keys are quantised first, each after a Hadamard
transform; RoPE then is part of the queries' operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops
from ..ops._indexer import hadamard_ref, quantise_fp8_ref, quantise_mxfp4_ref
from ._pattern import SIZES, Computation, Fusion, Trace, number
from .indexer import _modeling, _nearest, _product, _rotated_queries, _single

aten = torch.ops.aten
_FAR = 12  # nodes from the relu to the top-k, and from there to the limit
_RATIO = 4  # the model's, where the graph does not say
_DIVISIONS = (aten.div.Tensor_mode, aten.floor_divide.default)
_SCALARS = {"softmax_scale": 0.0531, "weights_scaling": 0.0747}


class Choice(NamedTuple):
    """What a trace fixes: heads, their dims, how many of these are rotated, and how many keys are chosen."""

    heads: int
    d: int
    rope: int
    ratio: int
    top_k: int | None  # None: as many as there are entries
    fewer: bool  # whether the number chosen is symbolic: top_k, or all entries if these are fewer
    single: tuple[bool, bool, bool]  # whether batch, sequence, entries are 1: other products
    shared: bool  # one row of positions and of angles for the whole batch


class _Smallest(int):
    """Smaller than any other number, in ``min`` of the traced code."""

    def __gt__(self, other: object) -> bool:
        return False

    def __lt__(self, other: object) -> bool:
        return True


def _hugging_face(structure: Choice) -> Trace:
    b, s, entries = (1 if single else SIZES[name] for single, name in zip(structure.single, "BSE", strict=True))
    heads, d, rope, ratio, top_k, fewer, *_ = structure
    modeling = _modeling()

    def function(
        projected: Tensor, cos: Tensor, sin: Tensor, k: Tensor, weights: Tensor, positions: Tensor
    ) -> dict[str, Tensor]:
        found = {}
        scorer = SimpleNamespace(**_SCALARS, weights_proj=lambda hidden: hidden)

        def scored(q: Tensor, compressed: Tensor, hidden: Tensor) -> Tensor:
            found["rotated"] = q
            return modeling.DeepseekV4IndexerScorer.forward(scorer, q, compressed, hidden)

        none = weights[:, :0]  # no window closes: the keys are those of the cache
        cache = SimpleNamespace(
            store_compression_weights=lambda name, kv, gate: (none, none, 0),
            update_compressor_states=lambda name, compressed: k,
        )
        indexer = SimpleNamespace(
            compress_rate=ratio,
            num_heads=heads,
            head_dim=d,
            index_topk=entries + 1 if top_k is None else _Smallest(SIZES["K"] if fewer else top_k),
            rope_layer_type="compress",
            kv_proj=lambda hidden: hidden,
            gate_proj=lambda hidden: hidden,
            q_b_proj=lambda residual: residual,
            rotary_emb=lambda *args, **kwargs: (cos, sin),
            scorer=scored,
        )
        layers = SimpleNamespace(layers=[cache])
        chosen = modeling.DeepseekV4Indexer.forward(indexer, weights, projected, positions, layers, 0)
        return {**found, "chosen": chosen}

    rows = 1 if structure.shared else b
    bf16 = torch.bfloat16
    tensors = {
        "projected": torch.empty(b, s, heads * d, dtype=bf16),
        "cos": torch.empty(rows, s, rope // 2, dtype=bf16),
        "sin": torch.empty(rows, s, rope // 2, dtype=bf16),
        "k": torch.empty(b, entries, d, dtype=bf16),
        "weights": torch.empty(b, s, heads, dtype=bf16),
        "positions": torch.empty(rows, s, dtype=torch.int64),
    }
    constants = {"ratio": ratio, "top_k": -1 if top_k is None else top_k, "fewer": fewer}
    return Trace(function, tensors, _SCALARS, frozenset(), constants)


def _nearest_user(node: Node, target: Any) -> Node | None:
    """The nearest node of ``target`` that is computed from ``node``."""
    level, seen = [node], {node}
    for _ in range(_FAR):
        level = [user for at in level for user in at.users if user not in seen]
        seen.update(level)
        found = next((at for at in level if at.target is target), None)
        if found is not None:
            return found
    return None


def _sites(node: Node) -> Iterator[Choice]:
    """``node`` is the relu of fp32 scores [B, S, H, E].

    Where the top-k or the division is missing, something stands in its place: the matcher says what.
    """
    value, product = node.meta["val"], _product(node)
    if _modeling() is None or product is None or value.dim() != 4 or not isinstance(value.shape[2], int):
        return
    found, best = _rotated_queries(product), _nearest_user(node, aten.topk.default)
    masked = best or _nearest_user(node, aten.where.self)
    if found is None or masked is None:
        return
    joined, d, rope = found
    if d not in (64, 128) or joined.meta["val"].dtype != torch.bfloat16:  # recognised in indexer.py, and left alone
        return
    divided = _nearest(masked, lambda at: at.target in _DIVISIONS, 64)
    compared = divided or _nearest(masked, lambda at: at.target is aten.ge.Tensor, 64)
    if compared is None:
        return
    ratio = divided.args[1] if divided is not None else _RATIO
    top_k, fewer = _chosen(best.args[1]) if best is not None else (None, False)
    if isinstance(ratio, int) and ratio > 0:
        single = _single(value)
        shared = not single[0] and statically_known_true(compared.meta["val"].shape[0] == 1)
        yield Choice(value.shape[2], d, rope, ratio, top_k, fewer, single, shared)


def _chosen(k: Any) -> tuple[int | None, bool]:
    """``top_k`` and ``fewer`` of an argument of top-k."""
    value = k.meta["val"] if isinstance(k, Node) else k
    if (known := number(value)) is not None:
        return known, False
    numbers = [int(part) for part in value.node.expr.args if part.is_Integer]
    if value.node.expr.func.__name__ == "Min" and len(numbers) == 1:
        return numbers[0], True
    return None, False


# What takes the match's place


def _implementation(name: str | None) -> str | None:
    """The operator has one kernel: asked for another language's, it is that one still."""
    return name if name in ("triton", "reference") else None


def _count(k: Tensor, top_k: int, fewer: bool) -> int:
    if top_k < 0:
        return k.shape[1]
    return torch.sym_min(top_k, k.shape[1]) if fewer else top_k


def _topk(
    rotated: Tensor,
    k: Tensor,
    weights: Tensor,
    positions: Tensor,
    *,
    softmax_scale: float,
    weights_scaling: float,
    ratio: int,
    top_k: int,
    fewer: bool,
    indexer: str | None,
    implementation: str | None,
) -> Tensor:
    """At the precision written, bf16 queries and keys; or quantised, where RoPE is not part of the match."""
    folded, q_scale, k_scale = weights.float() * (softmax_scale * weights_scaling), None, None
    if indexer is not None:
        quantise = quantise_fp8_ref if indexer == "fp8" else quantise_mxfp4_ref
        (rotated, q_scale), (k, k_scale) = quantise(hadamard_ref(rotated)), quantise(hadamard_ref(k))
        if indexer == "fp8":
            folded, q_scale = folded * q_scale, None
    return ops.indexer_topk(
        rotated,
        k,
        folded,
        q_scale,
        k_scale,
        positions=positions,
        top_k=_count(k, top_k, fewer),
        ratio=ratio,
        implementation=_implementation(implementation),
    )


def _quantised_topk(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    weights: Tensor,
    positions: Tensor,
    *,
    softmax_scale: float,
    weights_scaling: float,
    ratio: int,
    top_k: int,
    fewer: bool,
    indexer: str | None,
    implementation: str | None,
) -> Tensor:
    """Both sides in FP8 or MXFP4, after a Hadamard transform of both."""
    if indexer is None:
        raise ValueError("quantisation was not asked for")
    (batch, length, width), d = projected.shape, k.shape[-1]
    q = projected.reshape(batch * length, width // d, d)
    cos, sin = (  # 5.17's are transposed
        each.expand(batch, -1, -1).reshape(batch * length, each.shape[-1]).contiguous() for each in (cos, sin)
    )
    arguments = q, None, cos, sin, weights.reshape(batch * length, -1)
    k, chosen_by = hadamard_ref(k), {"implementation": implementation if implementation != "tilelang" else None}
    if indexer == "fp8":
        codes, folded = ops.indexer_q_fp8(*arguments, hadamard=True, **chosen_by)
        q_scale = None
        k_codes, k_scale = quantise_fp8_ref(k)
    else:
        codes, q_scale, folded = ops.indexer_q_mxfp4(*arguments, hadamard=True, **chosen_by)
        q_scale = q_scale.unflatten(0, (batch, length))
        k_codes, k_scale = quantise_mxfp4_ref(k)
    factor = softmax_scale * weights_scaling * (d * (width // d)) ** 0.5
    if abs(factor - 1) > 1e-9:  # the operator has the usual factors
        folded = folded * factor
    return ops.indexer_topk(
        codes.unflatten(0, (batch, length)),
        k_codes,
        folded.unflatten(0, (batch, length)),
        q_scale,
        k_scale,
        positions=positions,
        top_k=_count(k, top_k, fewer),
        ratio=ratio,
        implementation=_implementation(implementation),
    )


INDEXER_TOPK = (
    Fusion(
        "indexer_topk",
        ("projected", "cos", "sin", "k", "weights", "positions"),
        ("chosen",),
        _quantised_topk,
        options=("indexer",),
    ),
    Fusion("indexer_topk", ("rotated", "k", "weights", "positions"), ("chosen",), _topk, options=("indexer",)),
)

COMPUTATIONS = (Computation(aten.relu.default, _sites, _hugging_face, INDEXER_TOPK),)
