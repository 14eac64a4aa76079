"""What ``explain`` need not do: its graph is looked at and never run, so some of a compilation's work is idle.

Nothing here changes the graph that is traced. It rests on private parts of torch; where a version lacks one of them,
``explain`` does all of the work.
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


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python does not look for garbage: a graph that is traced has millions of objects, and hardly one dies."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def one_run() -> Iterator[None]:
    """AOTAutograd, inside, computes no more than the outputs' aliases where it runs a graph without tracing it.

    It does so once before it traces, an eighth of all of explain's time, only to learn which inputs are written to and
    which outputs share memory. What Dynamo has computed already tells that as well: a result with memory of its own
    stands for all that it was computed from. To be used inside a backend, because Dynamo calls one backend at a time,
    and where fake tensors may meet those of another mode: Dynamo's are.
    """
    try:
        from torch._functorch._aot_autograd import graph_capture_wrappers as wrappers
        from torch._functorch._aot_autograd.functional_utils import to_fun
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        usual = wrappers.PropagateUnbackedSymInts
    except (ImportError, AttributeError):
        yield
        return

    class Outputs(usual):  # type: ignore[misc, valid-type]  # a class that is looked up at run time
        def run(self, *args: Any, **keywords: Any) -> Any:
            graph = self.module.graph
            if get_proxy_mode() is None and not torch.is_grad_enabled() and not keywords and pure(graph):
                given = dict(zip(graph.find_nodes(op="placeholder"), args, strict=True))
                keywords = {"initial_env": _known(graph, to_fun) | given}
            return super().run(*args, **keywords)

    wrappers.PropagateUnbackedSymInts = Outputs
    try:
        yield
    finally:
        wrappers.PropagateUnbackedSymInts = usual


def without_values(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """What stands for the compiled graph: the graph as it was, or on the meta device new tensors of its results."""
    results = gm.graph.output_node().args[0]
    values = [_value(result) if isinstance(result, Node) else None for result in results]
    inputs = {_storage(value) for node in gm.graph.find_nodes(op="placeholder") if (value := _value(node)) is not None}
    if not pure(gm.graph) or any(value is None or not _plain(value) or _storage(value) in inputs for value in values):
        return gm.forward

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        if any(isinstance(given, Tensor) and given.device.type != "meta" for given in inputs):
            return gm(*inputs)
        return tuple(
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta") for value in values
        )

    return run


def pure(graph: Graph) -> bool:
    """Whether no input is written to, and every result is of an ordinary operator."""
    for node in graph.nodes:
        value = _value(node)
        if node.op in ("placeholder", "get_attr") and value is not None and (value.is_inference() or value._version):
            return False
        if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module":
            return False
        if "unbacked_bindings" in node.meta or _writes(node.target):
            return False
    return True


def _writes(target: Any) -> bool:
    """Whether it is a registered operator that writes to an argument: not all of these count the versions of it."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [name for name in target.overloads() if not name.endswith("out")]  # asked for by a keyword
        return any(getattr(target, name)._schema.is_mutable for name in overloads)
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _known(graph: Graph, to_fun: Callable[[Tensor], Any]) -> dict[Node, Any]:
    """What need not be computed: results with memory of their own, as functional tensors, or None if nothing asks."""
    known: dict[Node, Any] = {}
    asked = set(graph.output_node().all_input_nodes)
    for node in reversed(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        value = _value(node)
        if node.meta.get("example_value") is not None and node not in asked:
            known[node] = None
        elif value is not None and not value.requires_grad and _storage(value) not in _sources(node):
            known[node] = to_fun(value)
        else:
            asked.update(node.all_input_nodes)
    return known


def _sources(node: Node) -> set[int]:
    """The memory of what ``node`` is computed from; of a list of tensors, that of what the list is made from."""
    found: set[int] = set()
    for source in node.all_input_nodes:
        value = _value(source)
        found |= {_storage(value)} if value is not None else _sources(source)
    return found


def _value(node: Node) -> FakeTensor | None:
    value = node.meta.get("example_value")
    return value if type(value) is FakeTensor else None


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _plain(value: Tensor) -> bool:
    sizes = (*value.shape, *value.stride())
    return value.device.type == "meta" and all(type(size) is int for size in sizes)
