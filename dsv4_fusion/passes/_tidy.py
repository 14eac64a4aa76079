"""Writes into slices, as functionalization leaves them, brought into one form before anything is matched.

``y[..., -n:].copy_(z)`` becomes a ``slice_scatter`` of the whole tensor that ``y`` is a view of: its base is viewed
again, step by step, for the scatter, and once more after it for every later use of ``y``. How many views that makes
depends on where ``y`` came from, a linear layer or an argument. Without the repetitions it no longer does.
"""

from __future__ import annotations

from torch import Tensor, ops
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = ops.aten
_END = 2**63 - 1  # of a slice that goes to the end


def tidy(graph: Graph) -> None:
    """Remove aliases, and views that only functionalization's scatters have made; the graph computes the same."""
    for node in graph.find_nodes(op="call_function", target=aten.alias.default):
        _stand_in(node, node.args[0])
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        if _everything(node.args[2:]) and _same_shape(node, node.args[0]):
            _stand_in(node, node.args[0])
    for node in graph.find_nodes(op="call_function", target=aten.slice_scatter.default):
        if _everything(node.args[3:]) and _same_shape(node, node.args[1]):
            _stand_in(node, node.args[1])
            continue
        base, written = node.args[:2]
        if isinstance(written, Node) and written.target is aten.copy.default:
            old = written.args[0]
            if old.target is aten.slice.Tensor and _same_view(old.args[0], base):
                node.replace_input_with(base, old.args[0])
        _unwind(node, node)
    for target in (aten.alias.default, aten.slice_scatter.default, aten.view.default, aten.slice.Tensor):
        for node in reversed(graph.find_nodes(op="call_function", target=target)):
            if not node.users:
                graph.erase_node(node)


def _everything(bounds: tuple) -> bool:
    """Whether a slice from, to, by these leaves nothing out; a graph with symbolic sizes is full of them."""
    start, end, step = (*bounds, *(0, _END, 1)[len(bounds) :])
    return start in (0, None) and end in (_END, None) and step == 1


def _stand_in(node: Node, replacement: Node) -> None:
    """Let ``replacement`` stand for ``node``, but in the graph's outputs, whose aliasing is recorded elsewhere."""
    node.replace_all_uses_with(replacement, delete_user_cb=lambda user: user.op != "output")


def _unwind(scatter: Node, node: Node) -> None:
    """Views of ``scatter`` that give its own shape back become ``scatter`` itself."""
    for user in list(node.users):
        if user.target is aten.view.default:
            _unwind(scatter, user)
            if _same_shape(user, scatter):
                _stand_in(user, scatter)


def _same_view(first: Node, second: Node) -> bool:
    """Whether both are the same views of one node."""
    while first is not second:
        if first.target is not aten.view.default or second.target is not aten.view.default:
            return False
        if not _same_shape(first, second):
            return False
        first, second = first.args[0], second.args[0]
    return True


def _same_shape(first: Node, second: Node) -> bool:
    left, right = first.meta.get("val"), second.meta.get("val")
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.dim() != right.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(left.shape, right.shape, strict=True))
