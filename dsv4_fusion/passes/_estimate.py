"""How many kernels a graph takes and how many bytes they move, by a simple picture of what Inductor does.

A view costs nothing. A matrix product, a sort, a custom operator is a kernel of its own. Pointwise operations are
computed where they are used; reductions of one shape over the same dimensions that follow from each other, as in a
softmax, share a kernel. Every kernel reads what it needs once and writes what others need once. Real schedules differ;
the numbers are for comparing a graph with its rewrite.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.fx import Node

_REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "var", "var_mean", "std", "any", "all",
    "logsumexp", "_softmax", "_log_softmax",
}  # fmt: skip
_INLINED = {  # no reductions, and computed where they are used, though nothing tags them as pointwise
    "cat", "stack", "full", "full_like", "zeros", "ones", "iota", "arange", "scalar_tensor", "empty", "embedding",
    "gather", "index", "index_select", "constant_pad_nd", "copy", "repeat", "slice_scatter", "select_scatter", "roll",
    "flip", "fill", "convert_element_type",
}  # fmt: skip
_TWO_LAUNCHES = ("hc_pre", "hc_post_pre", "hc_head", "hc_post_head", "indexer_topk", "fp8_linear")


def is_view(node: Node) -> bool:
    """Whether it only looks at memory that is there already."""
    return node.op == "call_function" and _is_view(node.target)


@functools.cache
def _is_view(target: Any) -> bool:
    if target is operator.getitem:
        return True
    schema = getattr(target, "_schema", None)
    if schema is None:
        return True  # arithmetic of sizes
    returns = schema.returns
    return not returns or any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def size(node: Node) -> int:
    """Bytes of a node's value; a symbolic size counts with its hint."""
    values = node.meta.get("val")
    values = values if isinstance(values, list | tuple) else [values]
    return sum(_numel(value) * value.itemsize for value in values if isinstance(value, torch.Tensor))


def _numel(value: torch.Tensor) -> int:
    sizes = [size if isinstance(size, int) else getattr(size.node, "hint", None) or 1 for size in value.shape]
    return math.prod(sizes)


@functools.cache
def _name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema is not None else str(target)


@functools.cache
def _inlined(target: Any) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ()) or _name(target) in _INLINED


def estimate(nodes: Iterable[Node], kept: Collection[Node] = ()) -> tuple[int, int]:
    """(kernels, bytes) of the nodes, which come in program order.

    Args:
        nodes: of one graph.
        kept: those whose values are used elsewhere; for a whole graph, what it returns.
    """
    nodes = [node for node in nodes if node.op == "call_function"]
    inside, order = set(nodes), {node: index for index, node in enumerate(nodes)}
    wanted: set[Node] = set()  # values that have to be in memory, or views of them
    stored: set[Node] = set()
    for node in reversed(nodes):
        if is_view(node):
            if node in kept or node in wanted:
                wanted.update(node.all_input_nodes[:1])
        elif not _inlined(node.target) or node in kept or node in wanted:
            stored.add(node)
            if not _inlined(node.target) and _name(node.target) not in _REDUCTIONS:
                wanted.update(node.all_input_nodes)  # code that is not generated reads memory

    sources: dict[Node, dict[Node, int]] = {}  # of every value: the memory it is computed from, and bytes of it
    kernel_of: dict[Node, Node] = {}  # a stored value: the first of its kernel
    shape: dict[Node, tuple] = {}  # a kernel: what it iterates over
    read: dict[Node, dict[Node, int]] = {}
    moved = 0
    for node in nodes:
        needs: dict[Node, int] = {}
        for at in node.all_input_nodes:
            found = {at: size(at)} if at in stored or at not in inside else sources[at]
            for memory, count in found.items():
                needs[memory] = max(needs.get(memory, 0), count)
        if is_view(node):
            needs = {memory: min(count, size(node) or count) for memory, count in needs.items()}
        sources[node] = needs
        if node not in stored:
            continue
        loop = _loop(node)
        last = max((kernel_of[at] for at in needs if at in kernel_of), key=order.__getitem__, default=None)
        kernel = last if last is not None and loop and _fits(loop, shape[last]) else node
        kernel_of[node] = kernel
        shape.setdefault(kernel, loop)
        read.setdefault(kernel, {}).update({at: n for at, n in needs.items() if kernel_of.get(at) is not kernel})
        moved += size(node)
    moved += sum(sum(counts.values()) for counts in read.values())
    return sum(_launches(kernel) for kernel in read), moved


def _loop(node: Node) -> tuple:
    """(elements, reduced dimensions or None) that a generated kernel iterates over; () for other kernels."""
    if _name(node.target) in _REDUCTIONS:
        return _numel(node.all_input_nodes[0].meta["val"]), str(node.args[1:2])
    value = node.meta.get("val")
    return (_numel(value), None) if _inlined(node.target) and isinstance(value, torch.Tensor) else ()


def _fits(loop: tuple, other: tuple) -> bool:
    return bool(other) and loop[0] == other[0] and (None in (loop[1], other[1]) or loop[1] == other[1])


def _launches(node: Node) -> int:
    return 2 if str(node.target).startswith("dsv4.") and _name(node.target) in _TWO_LAUNCHES else 1
