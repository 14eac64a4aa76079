"""What the pass saw and did, as files: for ``options={"dump": folder}``, and for torch's structured trace.

Of every graph: ``graph_<index>_<hash>.before.py``, ``.after.py`` and ``.matches.json``; of every pattern that matched
or nearly did: ``pattern_<fusion>_<hash>.py``. The index counts the graphs a process dumps into one folder and the hash
is of the graph's structure, so that two runs of one program write the same names, and so do the ranks of one job.
The files hold code, shapes and lines of the model's source, never a tensor's values.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from textwrap import indent
from typing import Any

import torch
from torch._logging import trace_structured
from torch.fx import Graph, GraphModule, Node

from ..report import Report
from ._pattern import SIZES, Pattern

logger = logging.getLogger("dsv4_fusion")

_dumped: Counter[str | None] = Counter()  # graphs, by folder
_failed: set[str | None] = set()  # folders that the warning has been given for


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """``method`` where its result is wanted; what goes wrong is a warning, because no dump may fail a compilation."""

    @wraps(method)
    def guarded(self: Dump, *args: Any) -> None:
        try:
            if self.wanted:
                method(self, *args)
        except Exception as error:
            self.warn(error)

    return guarded


class Dump:
    """The artefacts of one graph. Nothing raises: the first failure of a process is a warning, for each folder.

    Args:
        folder: where the files go, made if it is not there; None: to torch's structured trace alone, if that is on.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = None if folder is None else os.path.abspath(folder)
        self.wanted = folder is not None or bool(logging.getLogger("torch.__trace").handlers)
        self.name = ""

    @_harmless
    def before(self, graph: Graph) -> None:
        """The graph that the fusions are searched in; it gives the files their name."""
        index = _dumped[self.folder]
        _dumped[self.folder] += 1
        self.name = f"graph_{index:03}_{_fingerprint(graph)}"
        self.put("before", f"{self.name}.before.py", readable(graph))

    @_harmless
    def after(self, graph: Graph, report: Report, patterns: Iterable[Pattern]) -> None:
        """The rewritten graph, the match table, and the patterns that matched or nearly did."""
        self.put("after", f"{self.name}.after.py", readable(graph))
        codes = dict(sorted(map(_pattern, {id(pattern): pattern for pattern in patterns}.values())))
        table = {"graph": self.name} | report.as_dict() | {"patterns": list(codes)}
        self.put("matches", f"{self.name}.matches.json", json.dumps(table, indent=1) + "\n", "json")
        for name, code in codes.items():
            self.put(name, f"{name}.py", code)

    def put(self, artefact: str, file: str, text: str, encoding: str = "string") -> None:
        metadata = {"name": f"dsv4_fusion_{artefact}", "encoding": encoding}
        trace_structured("artifact", metadata_fn=lambda: metadata, payload_fn=lambda: text)
        if self.folder is not None:
            try:
                _write(self.folder, file, text)
            except OSError as error:  # the trace gets the rest all the same
                self.warn(error)

    def warn(self, error: Exception) -> None:
        if self.folder not in _failed:
            _failed.add(self.folder)
            place = "torch's structured trace" if self.folder is None else self.folder
            logger.warning("no dump to %s, compiling goes on: %s: %s", place, type(error).__name__, error)


def readable(graph: Graph) -> str:
    """The graph as Python, with shapes, strides, devices and the lines of the source it comes from."""
    owner = graph.owning_module
    if isinstance(owner, GraphModule) and owner.graph is graph:  # prints the bodies of its control flow too
        code = owner.print_readable(print_output=False, include_stride=True, include_device=True)
    else:
        code = graph.python_code("self", verbose=True, include_stride=True, include_device=True).src
        code = "class Graph(torch.nn.Module):\n" + indent(code.strip("\n"), "    ")
    code = re.sub(r"^class \S+\(", "class Graph(", code)  # AOTAutograd's modules are called <lambda>
    return code.strip("\n") + "\n"


def _pattern(pattern: Pattern) -> tuple[str, str]:
    """A pattern's name, and its code under comments that say which of its numbers and dtypes stand for any."""
    graph, anchor = _pattern_graph(pattern)
    code = readable(graph)
    fusion, trace = pattern.fusion, pattern.trace
    lines = [
        f"{fusion.name}: from {', '.join(fusion.inputs)} to {', '.join(fusion.outputs)}",
        f"the search begins at {anchor.name}",
        f"{', '.join(f'{name} = {prime}' for name, prime in SIZES.items())}: any size, and products of them likewise",
    ]
    scalars = [f"{name} = {value}" for name, value in trace.scalars.items() if repr(value) in code]
    lines += [f"{', '.join(scalars)}: any number"] if scalars else []
    parameters = [name for name in fusion.inputs if name in trace.parameters]
    lines += [f"of any floating dtype: {', '.join(parameters)}"] if parameters else []
    return f"pattern_{fusion.name}_{_fingerprint(graph)}", "".join(f"# {line}\n" for line in lines) + code


def _pattern_graph(pattern: Pattern) -> tuple[Graph, Node]:
    """The cut as a graph of its own, with the names of its inputs; and its anchor."""
    graph, copies = Graph(), {}
    for node, name in pattern.inputs.items():
        copies[node] = graph.placeholder(name)
        copies[node].meta = dict(node.meta)
    for node in pattern.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in pattern.outputs))
    GraphModule(torch.nn.Module(), graph)  # becomes its owner
    return graph, copies[pattern.anchor]


def _fingerprint(graph: Graph) -> str:
    """A hash of the operators, their arguments, and the inputs' layouts; not of source lines, which have paths."""
    inputs = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    layouts = [
        (value.dtype, tuple(value.shape), value.stride(), value.device.type)
        if isinstance(value, torch.Tensor) and value.layout is torch.strided
        else type(value).__name__
        for value in inputs
    ]
    return hashlib.sha256(f"{graph.python_code('self').src}{layouts}".encode()).hexdigest()[:10]


def _write(folder: str, name: str, text: str) -> None:
    """A whole file or none: ranks write the same names, and a reader may be looking."""
    os.makedirs(folder, exist_ok=True)
    part = os.path.join(folder, f".{name}.{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.replace(part, os.path.join(folder, name))
    except OSError:
        if os.path.lexists(part):
            os.unlink(part)
        raise
