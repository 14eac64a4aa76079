"""Near misses: each pattern broken once in each way, and the whole sentence, the module and the source line of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx import Graph

pytest.importorskip("transformers.models.deepseek_v4")

from tests.passes import test_indexer as indexer
from tests.passes.breaking import (
    argument,
    check_source,
    fused,
    of_dtype,
    of_shape,
    sentence,
    target,
    used_outside,
)
from tests.passes.test_hyper_connection import BOUNDARY, LAYER, at, captured, scaled

aten, convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
HEAD, MODEL = "model.hc_head", "deepseek_v4/modeling_deepseek_v4.py"
HC_POST_HEAD = {"hc_pre": 1, "hc_post_pre": 1, "hc_post": 1}
HC_PRE = {"hc_pre": 1, "hc_post": 1, "hc_post_head": 1}
HC_POST = {"hc_pre": 2, "hc_post_head": 1}


BROKEN = {
    # fusion, what differs: (what still matches, target, index, module, change, the sentence, in the source line)
    ("hc_pre", "operator"): (
        HC_PRE, aten.sigmoid.default, 0, BOUNDARY, target(aten.tanh.default),
        "expected aten.sigmoid.default of aten.add.Tensor (#), found aten.tanh.default (#)", "torch.sigmoid(pre_w",
    ),
    ("hc_pre", "dtype"): (
        HC_PRE, convert, -1, BOUNDARY, argument(1, torch.float16),
        "prims.convert_element_type.default (#): expected torch.bfloat16 among its arguments, found torch.float16",
        "collapsed = ",
    ),
    ("hc_pre", "shape"): (
        HC_PRE, aten.unbind.int, 0, BOUNDARY, of_shape(0, 3, 1), "scale has shape [3, 1], expected [3]", "",
    ),
    ("hc_pre", "constant"): (
        HC_PRE, aten.add.Tensor, 9, BOUNDARY, argument(1, 1e-5),
        "aten.add.Tensor (#): hc_eps is 1e-05 here and 1e-06 elsewhere", "comb.sum(dim=-2, keepdim=True)",
    ),
    ("hc_pre", "dimension"): (
        HC_PRE, aten.sum.dim_IntList, 1, BOUNDARY, argument(1, [-1]),
        "aten.sum.dim_IntList (#): expected -2 among its arguments, found -1", "comb.sum(dim=-2, keepdim=True)",
    ),
    ("hc_pre", "extra user"): (
        HC_PRE, aten.mm.default, 0, BOUNDARY, used_outside,
        "aten.mm.default (#) is used outside the pattern too, by aten.neg.default (#)", "F.linear(",
    ),
    ("hc_post", "operator"): (
        HC_POST, aten.add.Tensor, 0, LAYER, target(aten.sub.Tensor),
        "expected aten.add.Tensor of aten.view.default (#), found aten.sub.Tensor (#)", "post.to(dtype)",
    ),
    ("hc_post", "dtype"): (
        HC_POST, convert, 0, LAYER, argument(1, torch.float16),
        "prims.convert_element_type.default (#): expected torch.bfloat16 among its arguments, found torch.float16",
        "post.to(dtype)",
    ),
    ("hc_post", "shape"): (
        HC_POST, aten.unsqueeze.default, 1, LAYER, of_shape(0, 2, 32, 1, 64),
        "output has shape [2, 32, 1, 64], expected [B, S, D]", "",
    ),
    ("hc_post", "constant"): (
        HC_POST, aten.permute.default, 0, LAYER, argument(1, [0, 1, 2, 3]),
        "aten.permute.default (#): expected 3 among its arguments, found 2", "transpose(-1, -2)",
    ),
    ("hc_post", "extra user"): (
        HC_POST, aten.bmm.default, 0, LAYER, used_outside,
        "aten.bmm.default (#) is used outside the pattern too, by aten.neg.default (#)", "torch.matmul(",
    ),
    ("hc_head", "operator"): (
        HC_POST_HEAD, aten.mul.Tensor, -1, HEAD, target(aten.div.Tensor),
        "expected aten.mul.Tensor of aten.unsqueeze.default (#), found aten.div.Tensor (#)", "",
    ),
    ("hc_head", "dtype"): (
        HC_POST_HEAD, aten.permute.default, 0, HEAD, of_dtype(0, torch.int32),
        "fn is torch.int32, expected a floating dtype", "",
    ),
    ("hc_head", "shape"): (
        HC_POST_HEAD, aten.mul.Tensor, -2, HEAD, of_shape(1, 1, 1), "scale has shape [1, 1], expected [1]", "",
    ),
    ("hc_head", "constant"): (
        HC_POST_HEAD, aten.sum.dim_IntList, -1, HEAD, argument(1, [1]),
        "aten.sum.dim_IntList (#): expected 2 among its arguments, found 1", "",
    ),
    ("hc_head", "extra user"): (
        HC_POST_HEAD, aten.mm.default, 0, HEAD, used_outside,
        "aten.mm.default (#) is used outside the pattern too, by aten.neg.default (#)", "F.linear(",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fusion", "kind"), BROKEN, ids=map("-".join, BROKEN))
def test_one_difference_is_named(fusion, kind):
    counts, kind_of_node, index, path, change, expected, code = BROKEN[fusion, kind]
    graph: Graph = copy.deepcopy(captured())
    change(at(graph, kind_of_node, index, path))
    report = fused(graph)
    assert report.counts == counts, report
    (miss,) = report.near_misses
    assert (miss.path, miss.fusion) == (path, fusion)
    assert sentence(miss) == expected
    check_source(miss, MODEL, code)
    assert f"  {path}: {fusion}: {miss.reason}\n    {miss.source}" in str(report)


def test_what_stands_between_two_parts_is_named():
    graph = copy.deepcopy(captured())
    scaled(at(graph, aten.add.Tensor, 0, LAYER))
    (miss,) = fused(graph).near_misses
    assert (miss.path, miss.fusion) == (BOUNDARY, "hc_post_pre")
    assert sentence(miss) == "hc_post and hc_pre were fused apart: between them stands aten.mul.Tensor (#)"
    check_source(miss, MODEL, "post.to(dtype)")


QUERIES = {
    # what differs: (name in test_indexer, the sentence, the source line)
    "operator": (
        "half rotation",
        "expected aten.view.default of prims.convert_element_type.default (#), found aten.split.Tensor (#)",
        "passes/test_indexer.py", "first, second = q.float().chunk(2, -1)",
    ),
    "shape": (
        "blocks of 64", "aten.view.default (#): expected 4 among its arguments, found 2",
        "examples/deepseek.py", "wide = x.float().unflatten(-1, (-1, block))",
    ),
    "constant": (
        "the largest code 7", "aten.div.Tensor (#): expected 6.0 among its arguments, found 7.0",
        "passes/test_indexer.py", "clamp_min(floor) / largest)",
    ),
    "extra user": (
        "scaled weights used elsewhere",
        "aten.mul.Tensor (#) is used outside the pattern too, by aten.mul.Tensor (#)",
        "passes/test_indexer.py", "weights = own.weights_proj(x) * (own.softmax_scale * own.n_heads**-0.5)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUERIES)
def test_one_difference_in_the_queries_is_named(kind):
    name, expected, file, code = QUERIES[kind]
    module, inputs = indexer.indexer()
    report, _ = indexer.run(indexer.Score(module, **indexer.NEAR_MISSES[name][0]), *inputs)
    (miss,) = report.near_misses
    assert sentence(miss) == expected
    assert miss.source.startswith(file) and miss.source.endswith(code)
