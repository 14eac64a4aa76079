"""What a report draws of a graph: its nodes layer by layer, and which of them a fusion covers or nearly does.

Collected for :func:`dsv4_fusion.explain` alone. It holds operators, shapes and lines of the model's source; no values.
Layers of the same structure are kept once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from ..report import NearMiss, Site
from ._estimate import estimate
from ._pattern import Failure, Match

_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")
BEFORE, AFTER = "(before the layers)", "(after the layers)"


class Picture:
    """One graph, taken before it is rewritten.

    Args:
        graph: as the fusions are searched in it.
        path_of: the path of the module that a node stands in.
        source_of: the line of the model's source that a node comes from.
    """

    def __init__(self, graph: Graph, path_of: Any, source_of: Any) -> None:
        self.path_of, self.source_of = path_of, source_of
        self.nodes = [node for node in graph.nodes if node.op == "call_function"]
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.inputs = {node: list(node.all_input_nodes) for node in self.nodes}
        self.code = {node: code(node) for node in self.nodes}
        self.told = {node: (str(node.target), _constants(node), _type(node.meta.get("val"))) for node in self.nodes}
        self.paths = {node: path_of(node) for node in self.nodes}
        self.cost = estimate(self.nodes, graph.output_node().all_input_nodes)
        self.marks: list[dict[str, Any]] = []
        self.mark_of: dict[Node, int] = {}
        self.codes: dict[str, int] = {}
        self.sources: dict[str, int] = {}
        self.old: dict[Node, Node] = {}  # an output of an operator put in: what it took the place of

    def site(self, site: Site, match: Match, call: Graph) -> None:
        """A site that is fused, or would be on a GPU; ``call`` as the operator's traced call."""
        names = self.inputs_of(match)
        outputs: Any = call.output_node().args[0]
        named = dict(zip(call.find_nodes(op="placeholder"), match.fusion.inputs, strict=True))
        before, after = estimate(self.ordered(match.nodes), match.outputs), estimate(call.nodes, outputs)
        self.mark(
            "fused",
            site.path,
            site.fusion,
            match.nodes,
            source=self.source_of(match.anchor),
            op=site.op,
            cost=[*before, *after],
            before=self.text(self.ordered(match.nodes), names, match.outputs, match.fusion.outputs),
            after=self.text(call.nodes, named, list(outputs), match.fusion.outputs),
        )

    def miss(self, miss: NearMiss, failure: Failure) -> None:
        """A near miss; the names in its code are the graph's own, because the reason speaks of them."""
        nodes = set(failure.nodes)
        if failure.node is not None and failure.node in self.code:
            nodes.add(failure.node)
        self.mark(
            "near",
            miss.path,
            miss.fusion,
            nodes,
            source=miss.source,
            reason=miss.reason,
            before=self.keep("\n".join(self.code[node] for node in self.ordered(nodes))),
            differs=failure.node.name if failure.node is not None else "",
        )

    def left_alone(self, entry: NearMiss, match: Match) -> None:
        names = self.inputs_of(match)
        before = self.text(self.ordered(match.nodes), names, match.outputs, match.fusion.outputs)
        source = self.source_of(match.anchor)
        self.mark("left", entry.path, entry.fusion, match.nodes, source=source, reason=entry.reason, before=before)

    def replaced(self, match: Match, outputs: list[Node]) -> None:
        """The site's outputs have become these."""
        self.old.update(zip(outputs, match.outputs, strict=True))

    def inputs_of(self, match: Match) -> dict[Node, str]:
        nodes = [self.old.get(node, node) for node in match.inputs]
        return dict(zip(nodes, match.fusion.inputs, strict=True))

    def mark(self, kind: str, path: str, fusion: str, nodes: Iterable[Node], **rest: Any) -> None:
        index, free = len(self.marks), [node for node in nodes if node not in self.mark_of]
        self.mark_of.update(dict.fromkeys(free, index))
        self.marks.append({"kind": kind, "path": path, "fusion": fusion, "nodes": len(list(nodes)), **rest})

    def ordered(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(set(nodes), key=self.order.__getitem__)

    def text(self, nodes: Iterable[Node], names: dict[Node, str], outputs: Any, output_names: Iterable[str]) -> int:
        """Code in names of its own, the same for every site of one structure."""
        names, taken = dict(names), set(names.values())
        names.update({node: name for node, name in zip(outputs, output_names, strict=True) if node not in names})
        taken.update(names.values())
        lines = []
        for node in nodes:
            if node.op != "call_function":
                continue
            base, count = re.sub(r"_\d+$", "", node.name), 0
            while node not in names:
                name = f"{base}_{count}" if count else base
                count += 1
                if name not in taken:
                    names[node] = name
                    taken.add(name)
            lines.append(self.code.get(node) or code(node))
            around = [node, *(self.inputs.get(node) or node.all_input_nodes)]
            given = {at.name: names[at] for at in around if at in names}
            lines[-1] = re.sub(r"\b[A-Za-z_]\w*\b(?!\.|\()", lambda word: given.get(word[0], word[0]), lines[-1])
        lines.append(f"return {', '.join(output_names)}")
        return self.keep("\n".join(lines))

    def keep(self, text: str) -> int:
        return self.codes.setdefault(text, len(self.codes))

    def finish(self, graph: Graph) -> dict[str, Any]:
        """The drawing, once ``graph`` is rewritten."""
        after = estimate(graph.nodes, graph.output_node().all_input_nodes)
        templates: dict[Any, int] = {}
        kept: list[dict[str, Any]] = []
        layers = []
        for path, nodes in self.layers().items():
            slots: dict[int, int] = {}
            key, drawn = self.template(path, nodes, slots)
            if key not in templates:
                templates[key] = len(kept)
                kept.append({"of": path, "nodes": drawn})
            layers.append({"path": path, "template": templates[key], "marks": list(slots)})
        return {
            "layers": layers,
            "templates": kept,
            "marks": self.marks,
            "codes": list(self.codes),
            "sources": list(self.sources),
            "cost": [*self.cost, *after],
        }

    def layers(self) -> dict[str, list[Node]]:
        """The nodes by the layer they stand in; those of no layer as what comes before the first, and after it."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            layer = _LAYER.match(self.paths[node])
            path = layer[0] if layer else (AFTER if any(name != BEFORE for name in found) else BEFORE)
            found.setdefault(path, []).append(node)
        if list(found) == [BEFORE]:
            return {"(whole graph)": found[BEFORE]}
        order = [BEFORE, *(path for path in found if path not in (BEFORE, AFTER)), AFTER]
        return {path: found[path] for path in order if path in found}

    def template(self, path: str, nodes: list[Node], slots: dict[int, int]) -> tuple[Any, list[list[Any]]]:
        """What two layers share if they are drawn alike, and the rows to draw; fills in which slot has which mark.

        A row: name, code, source, module below the layer, inputs as indices in the layer (of another: -1), slot or -1.
        """
        index = {node: number for number, node in enumerate(nodes)}
        key: list[Any] = []
        rows: list[list[Any]] = []
        for node in nodes:
            mark = self.mark_of.get(node, -1)
            slot = slots.setdefault(mark, len(slots)) if mark >= 0 else -1
            inputs = [index.get(at, -1) for at in self.inputs[node] if at in self.code]
            module = self.paths[node].removeprefix(path).lstrip(".")
            source = self.sources.setdefault(self.source_of(node), len(self.sources))
            rows.append([node.name, self.code[node], source, module, inputs, slot])
            shown = self.marks[mark] if mark >= 0 else {}
            here = node.name == shown.get("differs")
            key.append((*self.told[node], source, module, tuple(inputs), slot))
            key.append((shown.get("kind"), shown.get("fusion"), here))
        return tuple(key), rows


def _constants(node: Node) -> str:
    """Its arguments without the nodes among them."""
    values: list[Any] = []
    torch.fx.node.map_aggregate((node.args, node.kwargs), values.append)
    return str([value for value in values if not isinstance(value, Node)])


def code(node: Node) -> str:
    """A node as a line of Python with its result's dtype and shape."""
    plain = type(node.target).__module__ == "builtins"  # operator.getitem and its like
    target = getattr(node.target, "__name__", "") if plain else str(node.target)
    arguments = [repr(argument) for argument in node.args]
    arguments += [f"{name}={value!r}" for name, value in node.kwargs.items()]
    text = ", ".join(arguments).replace("torch.", "").replace(str(sys.maxsize), "maxsize")
    return f"{node.name}: {_type(node.meta.get('val'))} = {target}({text})"


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = torch.utils._dtype_abbrs.dtype_abbrs.get(value.dtype, str(value.dtype))
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_type, value))})"
    return type(value).__name__
