"""Near misses: the model's own graph, broken in one place. Nothing may match there, and the report says why."""

from __future__ import annotations

import copy
import functools
import operator

import pytest
import torch
from torch.fx import Graph, Node

pytest.importorskip("transformers.models.deepseek_v4")

from examples.model import model
from tests.passes.breaking import argument, capture, fused, target, used_outside

aten = torch.ops.aten
BOUNDARY = "model.layers.0.ffn_hc"
WHOLE = {"hc_pre": 1, "hc_post_pre": 1, "hc_post_head": 1}


@functools.cache
def captured() -> Graph:
    """The graph of a one-layer bf16 model as the pass gets it."""
    return capture(model("tiny", 1, torch.bfloat16), torch.randint(0, 128, (2, 32)), use_cache=False)


def at(graph: Graph, target, index: int = 0, path: str = BOUNDARY) -> Node:
    """The ``index``-th node with this target in this module."""
    nodes = [
        node
        for node in graph.find_nodes(op="call_function", target=target)
        if node.meta.get("nn_module_stack") and list(node.meta["nn_module_stack"].values())[-1][0].endswith(path)
    ]
    return nodes[index]


def scaled(node: Node) -> None:
    """Something stands between the node and all its users."""
    with node.graph.inserting_after(node):
        mask = node.graph.call_function(aten.mul.Tensor, (node, 0.5))
    mask.meta = dict(node.meta)
    node.replace_all_uses_with(mask, delete_user_cb=lambda user: user is not mask)


def reshaped(shape):
    def change(node: Node) -> None:
        node.meta["val"] = node.meta["val"].new_empty(shape)

    return change


INPUT_NORM = BOUNDARY + ".input_norm"
LAYER = "model.layers.0"
NEAR_MISSES = {
    # name: (target, index, module, change, a part of the reason)
    "rms_eps negative": (aten.add.Tensor, 0, INPUT_NORM, argument(1, -1e-6), "rms_eps"),
    "hc_eps negative in pre alone": (aten.add.Tensor, 1, BOUNDARY, argument(1, -1e-6), "hc_eps"),
    "another eps in one Sinkhorn pass": (aten.add.Tensor, 9, BOUNDARY, argument(1, 1e-5), "hc_eps is"),
    "eps infinite": (aten.add.Tensor, 0, INPUT_NORM, argument(1, float("inf")), "rms_eps"),
    "Sinkhorn begins with rows": (aten.sum.dim_IntList, 1, BOUNDARY, argument(1, [-1]), "expected -2"),
    "a later column pass over rows": (aten.sum.dim_IntList, 5, BOUNDARY, argument(1, [-1]), "expected -2"),
    "softmax over columns": (aten.amax.default, 0, BOUNDARY, argument(1, [-2]), "expected -1"),
    "post without its factor 2": (aten.mul.Tensor, 2, BOUNDARY, argument(1, 1), "expected 2"),
    "cube for square": (aten.pow.Tensor_Scalar, 0, INPUT_NORM, argument(1, 3), "expected 2"),
    "tanh for sigmoid": (aten.sigmoid.default, 0, BOUNDARY, target(aten.tanh.default), "expected aten.sigmoid"),
    "wrong stream count in base": (aten.split_with_sizes.default, 1, BOUNDARY, argument(1, [4, 8, 12]), "found 8"),
    "parts in another order": (operator.getitem, 0, BOUNDARY, argument(1, 1), "expected"),
    "collapsed over tokens": (aten.sum.dim_IntList, -1, BOUNDARY, argument(1, [1]), "expected 2"),
    "collapsed to another dtype": (
        torch.ops.prims.convert_element_type.default,
        -1,
        BOUNDARY,
        argument(1, torch.float16),
        "torch.bfloat16",
    ),
    "projection not transposed": (
        aten.permute.default,
        0,
        BOUNDARY,
        argument(1, [0, 1]),
        "expected 1 among its arguments, found 0",
    ),
    "mixes used elsewhere": (aten.mm.default, 0, BOUNDARY, used_outside, "is used outside the pattern too"),
    "Sinkhorn's middle used elsewhere": (aten.div.Tensor, 7, BOUNDARY, used_outside, "is used outside the pattern too"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_broken_boundary_is_not_fused_and_explained(name):
    graph = copy.deepcopy(captured())
    kind, index, path, change, reason = NEAR_MISSES[name]
    change(at(graph, kind, index, path))
    report = fused(graph)
    assert report.counts == {"hc_pre": 1, "hc_post": 1, "hc_post_head": 1}, report  # the first pre, the posts
    (miss,) = report.near_misses
    assert (miss.path, miss.fusion) == (BOUNDARY, "hc_pre")
    assert reason in miss.reason, miss.reason


POST_MISSES = {
    "comb not transposed": (
        aten.permute.default,
        0,
        argument(1, [0, 1, 2, 3]),
        "expected 3 among its arguments, found 2",
    ),
    "streams subtracted": (aten.add.Tensor, 0, target(aten.sub.Tensor), "expected aten.add.Tensor"),
    "output broadcast over the wrong dimension": (aten.unsqueeze.default, 1, argument(1, -1), "expected -2"),
    "product used elsewhere": (aten.bmm.default, 0, used_outside, "is used outside the pattern too"),
    "post rounded to another dtype": (
        torch.ops.prims.convert_element_type.default,
        0,
        argument(1, torch.float16),
        "torch.bfloat16",
    ),
}


@pytest.mark.parametrize("name", POST_MISSES)
def test_a_broken_post_leaves_the_pre_fused(name):
    graph = copy.deepcopy(captured())
    kind, index, change, reason = POST_MISSES[name]
    change(at(graph, kind, index, LAYER))
    report = fused(graph)
    assert report.counts == {"hc_pre": 2, "hc_post_head": 1}, report
    (miss,) = report.near_misses
    assert (miss.path, miss.fusion) == (LAYER, "hc_post")
    assert reason in miss.reason, miss.reason


def test_the_unbroken_graph_fuses_everywhere():
    graph = copy.deepcopy(captured())
    report = fused(graph, rewrite=True)
    assert report.counts == WHOLE, report
    assert not report.near_misses
    graph.lint()
    ops = [str(node.target) for node in graph.nodes if str(node.target).startswith("dsv4.")]
    assert ops == ["dsv4.hc_pre.default", "dsv4.hc_post_pre.default", "dsv4.hc_post_head.default"]
    assert not graph.find_nodes(op="call_function", target=aten.amax.default)[1:]  # attention's softmax alone is left


def test_alike_sites_keep_constants_and_fakes_of_their_own():
    """One trace of the operator's call serves all sites of the same metadata, not those of another epsilon."""
    net = model("tiny", 2, torch.bfloat16, hc_sinkhorn_iters=1)
    graph = capture(net, torch.randint(0, 128, (2, 32)), use_cache=False)
    at(graph, aten.add.Tensor, 0, "model.layers.1.ffn_hc.input_norm").update_arg(1, 1e-5)
    report = fused(graph, rewrite=True)
    assert report.counts["hc_post_pre"] == 3, report
    graph.lint()
    sites = graph.find_nodes(op="call_function", target=torch.ops.dsv4.hc_post_pre.default)
    assert [site.kwargs.get("rms_eps", 1e-6) for site in sites] == [1e-6, 1e-6, 1e-5]
    values = [value for site in sites for value in site.meta["val"]]
    assert len({value.untyped_storage()._cdata for value in values}) == len(values) == 12
    for site in sites:
        for output in site.users:
            index = output.args[1]
            assert output.meta["val"].untyped_storage()._cdata == site.meta["val"][index].untyped_storage()._cdata


def streams_of_the_first_pre(graph: Graph) -> int:
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.dsv4.hc_pre.default)
    return node.args[0].meta["val"].shape[-2]


def test_the_first_pre_reads_one_embedding_for_all_streams():
    graph = copy.deepcopy(captured())
    assert fused(graph, rewrite=True).counts == WHOLE
    assert streams_of_the_first_pre(graph) == 1
    (clone,) = graph.find_nodes(op="call_function", target=aten.clone.default)[:1]
    assert list(clone.meta["val"].shape[2:]) == [4, 64]  # the next post reads all streams


def masked(expand: Node) -> None:
    (clone,) = expand.users
    scaled(clone)


def of_streams_that_differ(expand: Node) -> None:
    """The dimension was there before: nothing says that its entries are the same."""
    first = next(node for node in expand.graph.nodes if node.op == "placeholder")
    with expand.graph.inserting_after(first):
        other = expand.graph.placeholder("other")
    other.meta["val"] = expand.meta["val"].new_empty(expand.meta["val"].shape)
    expand.update_arg(0, other)


@pytest.mark.parametrize("change", [masked, of_streams_that_differ])
def test_streams_not_proven_the_same_are_all_read(change):
    graph = copy.deepcopy(captured())
    change(
        next(
            node
            for node in graph.find_nodes(op="call_function", target=aten.expand.default)
            if node.meta["val"].dim() == 4 and list(node.meta["val"].shape[2:]) == [4, 64]
        )
    )
    report = fused(graph, rewrite=True)
    assert report.counts == WHOLE and not report.near_misses, report
    assert streams_of_the_first_pre(graph) == 4


def test_a_mask_between_post_and_pre():
    """Both parts fuse, apart; that they are apart is said."""
    graph = copy.deepcopy(captured())
    scaled(at(graph, aten.add.Tensor, 0, LAYER))
    for rewrite in (False, True):
        report = fused(copy.deepcopy(graph), rewrite)
        assert report.counts == {"hc_pre": 2, "hc_post": 1, "hc_post_head": 1}, report
        (miss,) = report.near_misses
        assert (miss.path, miss.fusion) == (BOUNDARY, "hc_post_pre")
        assert "between them stands aten.mul.Tensor" in miss.reason


def test_the_collapsed_stream_used_elsewhere_keeps_its_norm_out():
    graph = copy.deepcopy(captured())
    used_outside(at(graph, torch.ops.prims.convert_element_type.default, -1))
    whole = {site.path: site.nodes for site in fused(copy.deepcopy(captured())).sites}
    report = fused(graph)
    assert report.counts == WHOLE, report
    norm = {site.path: site.nodes for site in report.sites}
    assert norm[BOUNDARY] < whole[BOUNDARY]


@pytest.mark.parametrize(
    ("placeholder_of", "index", "shape", "label"),
    [
        (aten.split_with_sizes.default, 1, [2, 32, 24], "base"),
        (aten.unbind.int, 0, [3, 1], "scale"),
    ],
)
def test_parameters_of_another_shape(placeholder_of, index, shape, label):
    graph = copy.deepcopy(captured())
    reshaped(shape)(at(graph, placeholder_of, index).args[0])
    report = fused(graph)
    assert report.counts["hc_post_pre"] == 0
    (miss,) = report.near_misses
    assert miss.path == BOUNDARY and f"{label} has shape {shape}" in miss.reason


def test_integer_parameters():
    graph = copy.deepcopy(captured())
    scale = at(graph, aten.unbind.int).args[0]
    scale.meta["val"] = scale.meta["val"].to(torch.int32)
    report = fused(graph)
    assert report.counts["hc_post_pre"] == 0
    assert "expected a floating dtype" in report.near_misses[0].reason


def test_an_input_computed_from_an_output():
    """The norm's weight depends on the new streams: one operator cannot give both."""
    graph = copy.deepcopy(captured())
    streams = at(graph, aten.add.Tensor, 0, LAYER)
    path = "model.layers.0.post_attention_layernorm"
    product = at(graph, aten.mul.Tensor, -1, path)
    weight = next(node for node in product.all_input_nodes if node.op == "placeholder")
    with graph.inserting_before(product):
        total = graph.call_function(aten.sum.dim_IntList, (streams, [0, 1, 2]))
        total.meta["val"] = streams.meta["val"].sum([0, 1, 2])
        tied = graph.call_function(aten.mul.Tensor, (weight, total))
        tied.meta["val"] = weight.meta["val"] * total.meta["val"]
    product.replace_input_with(weight, tied)
    report = fused(graph, rewrite=True)
    graph.lint()
    assert report.counts == WHOLE, report  # without its norm
    assert str(next(n for n in graph.nodes if n.target is aten.mul.Tensor and tied in n.all_input_nodes)) == str(
        product
    )
