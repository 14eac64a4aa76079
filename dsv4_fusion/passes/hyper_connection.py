"""mHC: ``hc_pre``, ``hc_post`` and the head, apart and joined at the boundaries between sublayers.

The search functions are Hugging Face's own ``forward`` methods, run on stand-ins for ``self``: nothing of the model is
retyped, and the patterns follow the transformers version that is installed. DeepSeek's inference code cannot be
imported: its form is written down here, and the operators' own references are a third.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops
from ..ops.hyper_connection import hc_head_ref, hc_post_ref, hc_pre_ref
from ._deepseek import hc_head, hc_post, hc_pre, rms_norm
from ._pattern import SIZES, Computation, Fusion, Trace

aten = torch.ops.aten
_MOST_STREAMS = 16
_FAR = 64  # nodes looked at to find a site's streams
_SCALARS = {"rms_eps": 0.0713, "hc_eps": 0.0319, "norm_eps": 0.0537}
_WEIGHTS = ("fn", "base", "scale")
_PARAMETERS = frozenset({*_WEIGHTS, "norm_weight"})


class Structure(NamedTuple):
    """What a trace fixes: the streams' dtype, their number, the Sinkhorn iterations, whose code it is."""

    dtype: torch.dtype
    hc: int
    sinkhorn_iters: int = 1
    dialect: str = "hugging_face"


def _modeling() -> ModuleType | None:
    """Hugging Face's model, which the process that built one has imported already."""
    return sys.modules.get("transformers.models.deepseek_v4.modeling_deepseek_v4")


def _structures(
    anchor: Node, hc: int, sinkhorn_iters: int = 1, dialects: tuple[str, ...] = ("deepseek", "reference")
) -> Iterator[Structure]:
    dtype = _streams_dtype(anchor, hc)
    if _modeling() is not None:
        yield Structure(dtype, hc, sinkhorn_iters)
    for dialect in dialects:
        yield Structure(dtype, hc, sinkhorn_iters, dialect)


def _streams_dtype(anchor: Node, hc: int) -> torch.dtype:
    streams = _streams(anchor, hc)
    return torch.bfloat16 if streams is None else streams.meta["val"].dtype


def _streams(anchor: Node, hc: int) -> Node | None:
    """The nearest [B, S, HC, D] from which ``anchor`` is computed."""
    level, seen = [anchor], set()
    while level:
        for node in level:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[2] == hc and value.shape[3] > hc:
                return node
        seen.update(level)
        level = [source for node in level for source in node.all_input_nodes if source not in seen]
        if len(seen) > _FAR:
            break
    return None


# Sites: where a pattern may begin


def _only_user(node: Node, target: Any) -> Node | None:
    return next((user for user in node.users if user.target is target), None)


def _sinkhorn_sites(node: Node) -> Iterator[Structure]:
    """``node`` is the exponential of a softmax over small square matrices that a chain of sum, add, div follows."""
    shape = node.meta["val"].shape
    if len(shape) < 3 or not isinstance(shape[-1], int) or shape[-1] != shape[-2] or shape[-1] > _MOST_STREAMS:
        return
    softmax = _only_user(node, aten.div.Tensor)
    current = softmax and _only_user(softmax, aten.add.Tensor)
    passes = 0
    while current is not None:
        total = _only_user(current, aten.sum.dim_IntList)
        shifted = total and _only_user(total, aten.add.Tensor)
        current = shifted and _only_user(shifted, aten.div.Tensor)
        passes += current is not None
    if passes:
        yield from _structures(node, shape[-1], (passes + 1) // 2)  # a column pass, then rows and columns


def _post_sites(node: Node) -> Iterator[Structure]:
    """``node`` is a batched product with small square matrices on the left."""
    shape = node.args[0].meta["val"].shape
    if all(isinstance(size, int) for size in shape[-2:]) and shape[-1] == shape[-2] <= _MOST_STREAMS:
        yield from _structures(node, shape[-1], dialects=("reference",))


def _post_sum_sites(node: Node) -> Iterator[Structure]:
    """``node`` is the sum over the first of two stream dimensions of [B, S, HC, HC, D]."""
    shape = node.args[0].meta["val"].shape
    if len(shape) != 5 or node.args[1] != [2] or not all(isinstance(size, int) for size in shape[2:4]):
        return  # a symbolic size that is compared would become a guard
    if shape[2] == shape[3] <= _MOST_STREAMS:
        yield Structure(_streams_dtype(node.args[0], shape[2]), shape[2], dialect="deepseek")


def _head_sites(node: Node) -> Iterator[Structure]:
    """``node`` is the sigmoid of a few gates a token, plus an epsilon, spread over the hidden dimension."""
    hc = node.meta["val"].shape[-1]
    shifted = _only_user(node, aten.add.Tensor)
    if (
        isinstance(hc, int)
        and hc <= _MOST_STREAMS
        and shifted is not None
        and _only_user(shifted, aten.unsqueeze.default)
    ):
        yield from _structures(node, hc)


# Traces


def _tensors(structure: Structure, mix: int, scales: int) -> dict[str, torch.Tensor]:
    (b, s, d, *_), hc = SIZES.values(), structure.hc
    return {
        "output": torch.empty(b, s, d, dtype=structure.dtype),
        "hidden_streams": torch.empty(b, s, hc, d, dtype=structure.dtype),
        "post": torch.empty(b, s, hc),
        "comb": torch.empty(b, s, hc, hc),
        "fn": torch.empty(mix, hc * d),
        "base": torch.empty(mix),
        "scale": torch.empty(scales),
        "norm_weight": torch.empty(d),
    }


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = SimpleNamespace(weight=weight, variance_epsilon=_SCALARS["norm_eps"])
    return _modeling().DeepseekV4RMSNorm.forward(norm, x)


def _unweighted_norm(x: torch.Tensor) -> torch.Tensor:
    return _modeling().DeepseekV4UnweightedRMSNorm.forward(SimpleNamespace(eps=_SCALARS["rms_eps"]), x)


def _post(ffn_hc: Any, output, hidden_streams, post, comb) -> None:
    """Run a decoder layer whose sublayers are stand-ins; ``ffn_hc`` is called with the streams after the first."""
    layer = SimpleNamespace(
        attn_hc=lambda streams: (post, comb, output),
        input_layernorm=lambda collapsed: collapsed,
        self_attn=lambda hidden, **_: (output, None),
        ffn_hc=ffn_hc,
        post_attention_layernorm=lambda collapsed: collapsed,
        mlp=lambda hidden, **_: output,
    )
    inspect.unwrap(_modeling().DeepseekV4DecoderLayer.forward)(layer, hidden_streams)


class _Dialect(NamedTuple):
    """Code that is no model of Hugging Face's."""

    pre: Callable[..., tuple[Tensor, Tensor, Tensor]]
    post: Callable[..., Tensor]
    head: Callable[..., Tensor]


_EPS = {"rms_eps": _SCALARS["rms_eps"], "hc_eps": _SCALARS["hc_eps"]}
_DIALECTS = {
    "deepseek": _Dialect(partial(hc_pre, **_EPS), hc_post, partial(hc_head, **_EPS)),
    "reference": _Dialect(partial(hc_pre_ref, **_EPS), hc_post_ref, partial(hc_head_ref, **_EPS)),
}


def _pre(structure: Structure, streams, fn, base, scale, norm_weight) -> dict[str, Tensor]:
    """A sublayer's input out of the streams."""
    if structure.dialect in _DIALECTS:
        pre = _DIALECTS[structure.dialect].pre
        post, comb, collapsed = pre(streams, fn, base, scale, sinkhorn_iters=structure.sinkhorn_iters)
        normed = rms_norm(collapsed, norm_weight, _SCALARS["norm_eps"])
    else:
        connection = SimpleNamespace(
            hc_mult=structure.hc,
            hc_sinkhorn_iters=structure.sinkhorn_iters,
            hc_eps=_SCALARS["hc_eps"],
            input_norm=_unweighted_norm,
            fn=fn,
            base=base,
            scale=scale,
        )
        post, comb, collapsed = _modeling().DeepseekV4HyperConnection.forward(connection, streams)
        normed = _rms_norm(collapsed, norm_weight)
    return {"new_streams": streams, "new_post": post, "new_comb": comb, "collapsed": collapsed, "normed": normed}


def _boundary(structure: Structure) -> Trace:
    """A sublayer's output into the streams, then the next sublayer's input out of them."""

    def function(output, hidden_streams, post, comb, **parameters):
        if structure.dialect in _DIALECTS:
            streams = _DIALECTS[structure.dialect].post(output, hidden_streams, post, comb)
            return _pre(structure, streams, **parameters)
        values = {}

        def ffn_hc(streams):
            values.update(_pre(structure, streams, **parameters))
            return values["new_post"], values["new_comb"], values["collapsed"]

        _post(ffn_hc, output, hidden_streams, post, comb)
        return values

    constants = {"sinkhorn_iters": structure.sinkhorn_iters}
    tensors = _tensors(structure, (2 + structure.hc) * structure.hc, 3)
    return Trace(function, tensors, _SCALARS, _PARAMETERS, constants)


def _end(structure: Structure) -> Trace:
    """The last sublayer's output into the streams, then the head that collapses them, then the final norm."""

    def function(output, hidden_streams, post, comb, fn, base, scale, norm_weight):
        if structure.dialect in _DIALECTS:
            dialect = _DIALECTS[structure.dialect]
            streams = dialect.post(output, hidden_streams, post, comb)
            collapsed = dialect.head(streams, fn, base, scale)
            normed = rms_norm(collapsed, norm_weight, _SCALARS["norm_eps"])
            return {"new_streams": streams, "collapsed": collapsed, "normed": normed}
        values = {}

        def record(streams):
            values["new_streams"] = streams
            return post, comb, output

        _post(record, output, hidden_streams, post, comb)
        head = SimpleNamespace(
            input_norm=_unweighted_norm, eps=_SCALARS["hc_eps"], hc_fn=fn, hc_base=base, hc_scale=scale
        )
        collapsed = _modeling().DeepseekV4HyperHead.forward(head, values["new_streams"])
        return values | {"collapsed": collapsed, "normed": _rms_norm(collapsed, norm_weight)}

    return Trace(function, _tensors(structure, structure.hc, 1), _SCALARS, _PARAMETERS)


# Fusions: the cuts, largest first

_POST = ("output", "hidden_streams", "post", "comb")
_PRE_OUT = ("new_post", "new_comb")


def _one_for_all(inputs: list[Node]) -> list[Node]:
    """hc_pre's inputs; in place of streams that the graph makes by copying one, that one."""
    streams, *weights = inputs
    while streams.target is aten.clone.default:
        streams = streams.args[0]
    if streams.target in (aten.expand.default, aten.repeat.default):
        one = streams.args[0]
        shape, copied = one.meta["val"].shape, streams.meta["val"].shape
        same = len(shape) == len(copied) and shape[-2] == 1 and statically_known_true(shape[-1] == copied[-1])
        if same and all(statically_known_true(a == b) for a, b in zip(shape[:-2], copied[:-2], strict=True)):
            return [one, *weights]
    return inputs


HC_POST_PRE = tuple(
    Fusion(
        "hc_post_pre",
        (*_POST, *_WEIGHTS, *norm),
        ("new_streams", *_PRE_OUT, out),
        ops.hc_post_pre,
        parts=("hc_post", "hc_pre"),
    )
    for norm, out in ((("norm_weight",), "normed"), ((), "collapsed"))
)
HC_PRE = tuple(
    Fusion("hc_pre", ("new_streams", *_WEIGHTS, *norm), (*_PRE_OUT, out), ops.hc_pre, simplify=_one_for_all)
    for norm, out in ((("norm_weight",), "normed"), ((), "collapsed"))
)
HC_POST_HEAD = tuple(
    Fusion("hc_post_head", (*_POST, *_WEIGHTS, *norm), (out,), ops.hc_post_head, parts=("hc_post", "hc_head"))
    for norm, out in ((("norm_weight",), "normed"), ((), "collapsed"))
)
HC_HEAD = tuple(
    Fusion("hc_head", ("new_streams", *_WEIGHTS, *norm), (out,), ops.hc_head)
    for norm, out in ((("norm_weight",), "normed"), ((), "collapsed"))
)
HC_POST = (Fusion("hc_post", _POST, ("new_streams",), ops.hc_post),)

COMPUTATIONS = (
    Computation(aten.exp.default, _sinkhorn_sites, _boundary, (*HC_POST_PRE, *HC_PRE)),
    Computation(aten.sigmoid.default, _head_sites, _end, (*HC_POST_HEAD, *HC_HEAD)),
    Computation(aten.bmm.default, _post_sites, _end, HC_POST),
    Computation(aten.sum.dim_IntList, _post_sum_sites, _end, HC_POST),
)
