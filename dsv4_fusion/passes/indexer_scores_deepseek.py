"""The indexer's choice of keys in DeepSeek's inference code: scores, mask, top-k and −1, as one operator.

The scores are in bf16 there, every head's product rounded, then weighted and added; the operator multiplies the same
values, adds in fp32 and rounds nothing in between. What it multiplies depends on how much of the graph is known:

- queries and keys are both quantised in the graph: the operator gets the codes and scales of both, those of the
  queries from ``indexer_q_mxfp4`` or ``indexer_q_fp8``, which rotates and transforms them too;
- only the queries are known to be quantised, as the keys come out of a cache: both as bf16, which holds either exactly;
- nothing is quantised, or in another way: the bf16 queries, keys and weights that the graph has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from .. import ops
from ..ops._indexer import hadamard_ref, quantise_fp8_ref, quantise_mxfp4_ref
from ._deepseek import apply_rope, index_choice, index_score
from ._pattern import SIZES, Computation, Fusion, Match, Trace, cut, find
from .indexer import (
    _SCALARS,
    Queries,
    _is,
    _nearest,
    _one_sided,
    _operands,
    _rounded,
    _score_sites,
    dequantise_mxfp4,
)
from .indexer_scores import _chosen, _count, _implementation

aten = torch.ops.aten
_BEFORE = 16  # nodes looked at from the top-k back to the scores
_AFTER = 100  # and from the queries' quantiser on to the top-k
_BUTTERFLY = 10  # from there back to the end of a Hadamard transform


class Choice(NamedTuple):
    """What a trace fixes: the queries, and how many keys are chosen."""

    queries: Queries
    top_k: int | None  # None: as many as there are entries
    fewer: bool  # whether the number chosen is symbolic: top_k, or all entries if these are fewer

    def count(self) -> int:
        return SIZES["K"] if self.fewer else self.queries.sizes()[2] if self.top_k is None else self.top_k

    def constants(self) -> dict[str, Any]:
        return {"top_k": -1 if self.top_k is None else self.top_k, "fewer": self.fewer}


def _quantised(structure: Choice) -> Trace:
    queries = structure.queries
    (b, s, entries), (heads, d, rope, *_) = queries.sizes(), queries

    def function(q: Tensor, table: Tensor, weights: Tensor, key: Tensor, closed: Tensor) -> dict[str, Tensor]:
        apply_rope(q[..., -rope:], table)
        q = _rounded(q, queries)  # before the keys: the anchor is the first amax
        k = _rounded(key, queries)
        score = index_score(q, k, weights * (d**-0.5 * heads**-0.5))
        return {"k": k, "chosen": index_choice(score, closed, structure.count())}

    tensors = {
        "q": torch.empty(b, s, heads, d, dtype=torch.bfloat16),
        "table": torch.empty(s, rope // 2, dtype=torch.complex64),
        "weights": torch.empty(b, s, heads, dtype=torch.bfloat16),
        "key": torch.empty(b, entries, d, dtype=torch.bfloat16),
        "closed": torch.empty(s, 1, dtype=torch.int64),
    }
    constants = structure.constants() | {"hadamard": queries.hadamard, "mxfp4": queries.mxfp4}
    return Trace(function, tensors, _SCALARS, frozenset(), constants)


def _as_written(structure: Choice) -> Trace:
    (b, s, entries), (heads, d, *_) = structure.queries.sizes(), structure.queries

    def function(q: Tensor, k: Tensor, weights: Tensor, closed: Tensor) -> dict[str, Tensor]:
        return {"chosen": index_choice(index_score(q, k, weights), closed, structure.count())}

    tensors = {
        "q": torch.empty(b, s, heads, d, dtype=torch.bfloat16),
        "k": torch.empty(b, entries, d, dtype=torch.bfloat16),
        "weights": torch.empty(b, s, heads, dtype=torch.bfloat16),
        "closed": torch.empty(s, 1, dtype=torch.int64),
    }
    return Trace(function, tensors, {}, frozenset(), structure.constants())


# Sites


def _next(node: Node, target: Any) -> Node | None:
    """The nearest node of ``target`` that is computed from ``node``."""
    level, seen = [node], {node}
    while level and len(seen) < _AFTER:
        level = list(dict.fromkeys(user for at in level for user in at.users if user not in seen))
        seen.update(level)
        found = next((at for at in level if at.target is target), None)
        if found is not None:
            return found
    return None


def _choices(mxfp4: bool, best: Node) -> Iterator[Choice]:
    """``best`` is the top-k of what was added over the heads."""
    total = _nearest(best, _is(aten.sum.dim_IntList), _BEFORE)
    top_k, fewer = _chosen(best.args[1])
    if total is not None and (fewer or top_k is None or top_k <= SIZES["E"]):  # more cannot be traced
        for queries in _score_sites(mxfp4, total.args[0]):
            yield Choice(queries, top_k, fewer)


def _quantised_sites(node: Node) -> Iterator[Choice]:
    """``node`` is the largest magnitude of the queries' blocks, [B, S, H, blocks, block]."""
    shape = node.args[0].meta["val"].shape
    if len(shape) == 5 and all(isinstance(size, int) for size in shape[2:]):
        best = _next(node, aten.topk.default)
        likely = _nearest(node, _is(aten.cat.default), _BUTTERFLY) is not None
        found = _choices(shape[3] > 1, best) if best is not None else ()
        yield from sorted(found, key=lambda choice: choice.queries.hadamard != likely)


def _sites(node: Node) -> Iterator[Choice]:
    """``node`` is the top-k."""
    choice = next(_choices(False, node), None)
    if choice is not None:
        yield choice._replace(queries=choice.queries._replace(rope=0, hadamard=False))


def _contradicts(match: Match) -> str | None:
    """Why queries and keys do not belong together, as far as the rounding of both is known."""
    if match.constants.get("hadamard"):  # of both: the keys' is part of the match
        return None
    amax = match.anchor
    if amax.target is not aten.amax.default:  # the queries are an input
        amax = _nearest(match.inputs[0], _is(aten.amax.default), 64)
    for structure in _quantised_sites(amax) if amax is not None else ():
        found = find(cut(QUANTISED, structure, QUANTISED.fusions[1]), amax, set())
        if isinstance(found, Match):
            return _one_sided(found)
    return None


# What takes the match's place


def _queries(
    q: Tensor, table: Tensor, weights: Tensor, *, mxfp4: bool, implementation: str | None, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Codes [B, S, H, …], MXFP4's scales [B, S, H], and weights that hold all else."""
    operator = ops.indexer_q_mxfp4 if mxfp4 else ops.indexer_q_fp8
    chosen_by = implementation if implementation != "tilelang" else None
    codes, *scale, folded = operator(*_operands(q, table, weights), implementation=chosen_by, **options)
    codes, folded, *scale = (each.unflatten(0, q.shape[:2]) for each in (codes, folded, *scale))
    return codes, scale[0] if scale else None, folded


def _limit(closed: Tensor) -> Tensor:
    """[S, 1] to [1, S]: keys from here on are not seen, by any sequence of the batch."""
    return closed.squeeze(-1).unsqueeze(0)


def _codes(
    q: Tensor,
    table: Tensor,
    weights: Tensor,
    closed: Tensor,
    key: Tensor,
    *,
    mxfp4: bool,
    hadamard: bool,
    amax_floor: float,
    top_k: int,
    fewer: bool,
    implementation: str | None,
) -> Tensor:
    """Both sides as codes; ``key`` is the key before it is transformed and quantised."""
    options: dict[str, Any] = {"hadamard": hadamard, "amax_floor": amax_floor}
    codes, q_scale, folded = _queries(q, table, weights, mxfp4=mxfp4, implementation=implementation, **options)
    quantise = quantise_mxfp4_ref if mxfp4 else quantise_fp8_ref
    k, k_scale = quantise(hadamard_ref(key) if hadamard else key, amax_floor)
    return ops.indexer_topk(
        codes,
        k,
        folded,
        q_scale,
        k_scale,
        end=_limit(closed),
        top_k=_count(key, top_k, fewer),
        implementation=_implementation(implementation),
    )


def _values(
    q: Tensor,
    table: Tensor,
    weights: Tensor,
    closed: Tensor,
    k: Tensor,
    *,
    mxfp4: bool,
    top_k: int,
    fewer: bool,
    implementation: str | None,
    **options: Any,
) -> Tensor:
    """The queries' codes as bf16, times their scales, for keys of which nothing is known."""
    codes, scale, folded = _queries(q, table, weights, mxfp4=mxfp4, implementation=implementation, **options)
    q = codes.to(torch.bfloat16) if scale is None else dequantise_mxfp4(codes, scale)
    return _written(q, folded, closed, k, top_k=top_k, fewer=fewer, implementation=implementation)


def _written(
    q: Tensor, weights: Tensor, closed: Tensor, k: Tensor, *, top_k: int, fewer: bool, implementation: str | None
) -> Tensor:
    return ops.indexer_topk(
        q,
        k,
        weights.float(),
        end=_limit(closed),
        top_k=_count(k, top_k, fewer),
        implementation=_implementation(implementation),
    )


_ROTATED = ("q", "table", "weights", "closed")

INDEXER_TOPK = (
    Fusion("indexer_topk", (*_ROTATED, "key"), ("chosen",), _codes, refuse=_contradicts),
    Fusion("indexer_topk", (*_ROTATED, "k"), ("chosen",), _values, refuse=_one_sided),
    Fusion("indexer_topk", ("q", "weights", "closed", "k"), ("chosen",), _written, refuse=_contradicts),
)

# The queries and the choice have anchors of their own: where only one of them matches, the other's reason is reported.
QUANTISED = Computation(aten.amax.default, _quantised_sites, _quantised, INDEXER_TOPK[:2])
AS_WRITTEN = Computation(aten.topk.default, _sites, _as_written, INDEXER_TOPK[2:])

COMPUTATIONS = (QUANTISED, AS_WRITTEN)
