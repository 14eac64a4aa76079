"""What the tests of near misses share: a graph as the pass gets it, changes of one node in place, the report."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from dsv4_fusion.options import FusionOptions
from dsv4_fusion.passes._manager import FusionPass, _module_path
from dsv4_fusion.report import NearMiss, Report

ROOT = Path(__file__).parents[2]


class Captured(Exception):
    """In place of what a graph would compute."""


def capture(function: Callable, *inputs: Any, dynamic: bool | None = None, **keywords: Any) -> Graph:
    """The one graph of ``function`` as the pass gets it; it is not run."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass

    graphs = []

    class Capture(CustomGraphPass):
        def __call__(self, graph):
            graphs.append(copy.deepcopy(graph))

        def uuid(self):
            return None

    def inner(gm, inputs, **kwargs):
        def run(inputs):
            raise Captured

        run._boxed_call = True
        return run

    def backend(gm, given):
        patches = {"joint_custom_pre_pass": Capture(), "force_disable_caches": True}
        return compile_fx(gm, given, inner_compile=inner, config_patches=patches)

    torch._dynamo.reset()
    with torch.no_grad(), contextlib.suppress(Captured):
        torch.compile(function, backend=backend, dynamic=dynamic)(*inputs, **keywords)
    torch._dynamo.reset()
    (graph,) = graphs
    return graph


def fused(graph: Graph, rewrite: bool = False, **options: Any) -> Report:
    reports: list[Report] = []
    FusionPass(FusionOptions(**options), reports.append, rewrite=rewrite)(graph)
    return reports[0]


def nth(graph: Graph, target: Any, index: int, path: str) -> Node:
    """The ``index``-th node with this target in this module."""
    nodes = graph.find_nodes(op="call_function", target=target)
    return [node for node in nodes if _module_path(node) == path][index]


def argument(position: int, value: Any) -> Callable[[Node], None]:
    def change(node: Node) -> None:
        node.update_arg(position, value)
        if isinstance(value, torch.dtype):
            node.meta["val"] = node.meta["val"].to(value)

    return change


def target(value: Any) -> Callable[[Node], None]:
    def change(node: Node) -> None:
        node.target = value

    return change


def used_outside(node: Node) -> None:
    graph = node.graph
    with graph.inserting_after(node):
        extra = graph.call_function(torch.ops.aten.neg.default, (node,))
    extra.meta["val"] = node.meta["val"]
    output = graph.output_node()
    output.args = ((*output.args[0], extra),)


def of_shape(position: int, *shape: int) -> Callable[[Node], None]:
    """As if this argument had another shape."""

    def change(node: Node) -> None:
        source = node.args[position]
        source.meta["val"] = source.meta["val"].new_empty(shape)

    return change


def of_dtype(position: int, dtype: torch.dtype) -> Callable[[Node], None]:
    def change(node: Node) -> None:
        source = node.args[position]
        source.meta["val"] = source.meta["val"].to(dtype)

    return change


def sentence(miss: NearMiss) -> str:
    """Without the names of nodes, which depend on torch's version."""
    return re.sub(r"\((?!s\))[a-z_]+_?\d*\)", "(#)", miss.reason)


@functools.cache
def _sources() -> dict[str, list[str]]:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4

    folders = ("tests/passes", "examples", "dsv4_fusion/ops")
    paths = [
        Path(modeling_deepseek_v4.__file__),
        *(path for folder in folders for path in (ROOT / folder).glob("*.py")),
    ]
    return {"/".join(path.parts[-2:]): path.read_text().splitlines() for path in paths}


def check_source(miss: NearMiss, file: str, code: str) -> None:
    """It is a line of this file that is named, with this code in it."""
    name, line, text = re.fullmatch(r"(\S+\.py):(\d+): (.*)", miss.source).groups()
    assert name == file and code in text
    assert _sources()[name][int(line) - 1].strip() == text
