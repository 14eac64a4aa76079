"""What ``explain`` need not do: its graph is looked at and never run, so some of a compilation's work is idle.

Nothing here changes the graph that is traced. It rests on private parts of torch.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts


class _Outputs(PropagateUnbackedSymInts):
    """AOTAutograd's interpreter; where nothing is traced, it computes no more than the outputs' aliases.

    AOTAutograd runs a graph once before it traces it, an eighth of all of explain's time, only to learn which inputs
    are written to and which outputs share memory. What Dynamo has computed already tells that as well: a result with
    memory of its own stands for all that it was computed from.
    """

    def run(self, *args: Any, **keywords: Any) -> Any:
        if get_proxy_mode() is None and not torch.is_grad_enabled() and not keywords and _plain(self.module.graph):
            keywords = {"initial_env": _known(self.module.graph), **keywords}
            keywords["initial_env"].update(zip(self.graph.find_nodes(op="placeholder"), args, strict=True))
        return super().run(*args, **keywords)


def _value(node: Node) -> FakeTensor | None:
    value = node.meta.get("example_value")
    return value if type(value) is FakeTensor else None


def _plain(graph: Graph) -> bool:
    """Whether no input is written to, and every result is of an ordinary operator."""
    for node in graph.nodes:
        value = _value(node)
        if node.op in ("placeholder", "get_attr") and value is not None and (value.is_inference() or value._version):
            return False
        if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module":
            return False
        if "unbacked_bindings" in node.meta:
            return False
    return True


def _known(graph: Graph) -> dict[Node, Tensor | None]:
    """What need not be computed: results with memory of their own, as functional tensors, or None if nothing asks."""
    from torch._functorch._aot_autograd.functional_utils import to_fun

    known: dict[Node, Tensor | None] = {}
    asked = set(graph.output_node().all_input_nodes)
    for node in reversed(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        value = _value(node)
        if value is not None and node not in asked:
            known[node] = None
        elif (
            value is not None
            and not value.requires_grad
            and _storage(value)
            not in {_storage(source) for source in map(_value, node.all_input_nodes) if source is not None}
        ):
            known[node] = to_fun(value)
        else:
            asked.update(node.all_input_nodes)
    return known


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def without_values(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """What stands for the compiled graph: the graph as it was, or on the meta device new tensors of its results."""
    results = gm.graph.output_node().args[0]
    values = [_value(result) if isinstance(result, Node) else None for result in results]
    if any(value is None or value.device.type != "meta" or not _static(value) for value in values):
        return gm.forward

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        if any(isinstance(given, Tensor) and given.device.type != "meta" for given in inputs):
            return gm(*inputs)
        return tuple(
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta") for value in values
        )

    return run


def _static(value: Tensor) -> bool:
    return all(type(size) is int for size in (*value.shape, *value.stride()))


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Trace, inside, without work that ``explain`` has no use for, and without looking for garbage."""
    from torch._functorch._aot_autograd import graph_capture_wrappers

    usual, collecting = graph_capture_wrappers.PropagateUnbackedSymInts, gc.isenabled()
    graph_capture_wrappers.PropagateUnbackedSymInts = _Outputs
    gc.disable()
    try:
        yield
    finally:
        graph_capture_wrappers.PropagateUnbackedSymInts = usual
        if collecting:
            gc.enable()
