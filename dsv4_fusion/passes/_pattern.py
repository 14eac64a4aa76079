"""Eager code traced into patterns, and the exact matching of a pattern in a graph.

A :class:`Computation` is traced once per structure (stream count, dtype, iterations…) with the decompositions Inductor
uses, on fake tensors whose free sizes are large primes. Every integer in the trace then says which sizes it stands
for: 4084 is 4·D when D is 1021, while -1 or 24 is a literal. So one static trace, ten times cheaper than a symbolic
one, matches static and dynamic graphs, and a dimension, a shape or a constant that differs is a mismatch. Inductor's
own matcher has to ignore all integers to do that, and would take a sum over the wrong dimension of a square matrix.

Fusions are cut from the trace: a :class:`Fusion` names the values where it begins and ends.

Matching begins at the anchor, a target that is rare in the graph, and grows along arguments and users. It goes on after
a mismatch, so that a site that holds most of the pattern can be reported with the first thing that differs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._tidy import tidy

SIZES = {"B": 1009, "S": 1013, "D": 1021, "E": 5003, "K": 997}  # E: no fewer keys than a top-k takes
NEAR = 0.6  # a site that holds this share of a pattern's nodes is worth a word when it does not match


@dataclass(frozen=True)
class Fusion:
    """One rewrite, cut from a computation.

    Attributes:
        name: the operator's name, also the name in reports.
        inputs: the names of the values where the cut begins; the arguments of ``replacement``, in order.
        outputs: the names of the values where it ends; what ``replacement`` returns, in order.
        replacement: called with the inputs, the captured scalars, the structure's ``constants`` and
            ``implementation`` as keywords; calls the operator.
        simplify: called with the inputs found; returns those to use instead, which the graph proves to be as good.
        parts: the fusions this one joins; when they match apart although one feeds the other, that is reported.
        refuse: looks at a match beyond its own nodes; returns why it must not be fused, or None.
        left_alone: set on what is recognised and not rewritten yet: why; the report has it, and nothing is replaced.
        options: the names of the user's options that ``replacement`` takes too.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    replacement: Callable[..., Any]
    parts: tuple[str, ...] = ()
    simplify: Callable[[list[Node]], list[Node]] | None = None
    refuse: Callable[[Match], str | None] | None = None
    left_alone: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trace:
    """What a computation's ``trace`` returns, to be run under a fake mode.

    Attributes:
        function: takes the tensors by name, returns a dict of named values.
        tensors: the inputs, by name.
        scalars: floats that are captured from the graph, by name; the values must be unique in the trace.
        parameters: names of inputs that may have any floating dtype; the others must have the dtype they have here.
        constants: integers that the structure fixes and the replacement needs.
    """

    function: Callable[..., Mapping[str, torch.Tensor]]
    tensors: Mapping[str, torch.Tensor]
    scalars: Mapping[str, float]
    parameters: frozenset[str]
    constants: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Computation:
    """A piece of the model from which fusions are cut.

    Attributes:
        anchor: the operator that marks a possible site.
        structures: yields the structures a site may have, likeliest first; nothing if the node is no site.
        trace: from a structure to what is to be traced.
        fusions: the cuts, largest first.
        unplaced: asked of a node of which ``structures`` made nothing: why, where it stands in a site all the same by
            the operators around it; None where it is no site. A site of an unknown structure is reported by this alone.
    """

    anchor: torch._ops.OpOverload
    structures: Callable[[Node], Iterable[Hashable]]
    trace: Callable[[Any], Trace]
    fusions: tuple[Fusion, ...]
    unplaced: Callable[[Node], str | None] | None = None


@dataclass(frozen=True)
class _Traced:
    graph: Graph
    values: dict[str, Node]
    trace: Trace


@dataclass(frozen=True)
class Pattern:
    fusion: Fusion
    nodes: tuple[Node, ...]  # in program order, without the inputs
    inputs: dict[Node, str]
    outputs: tuple[Node, ...]
    anchor: Node
    trace: Trace


@dataclass
class Match:
    fusion: Fusion
    nodes: set[Node]  # the graph's nodes the match covers
    inputs: list[Node]
    outputs: list[Node]
    scalars: dict[str, float]
    constants: Mapping[str, int]
    anchor: Node
    pattern: Pattern


@dataclass
class Failure:
    fusion: Fusion
    nodes: set[Node]
    share: float  # of the pattern's nodes found
    reason: str
    anchor: Node
    pattern: Pattern | None  # None where the structure is unknown
    node: Node | None = None  # the graph's node that differs, or has an extra user
    part: bool = False  # whether a part of it was fused


@functools.cache
def _traced(trace: Callable[[Any], Trace], structure: Hashable) -> _Traced:
    from torch._inductor.decomposition import select_decomp_table

    with torch.no_grad(), enable_python_dispatcher(), FakeTensorMode(allow_non_fake_inputs=True):
        told = trace(structure)
        names: list[str] = []

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values = told.function(**dict(zip(told.tensors, tensors, strict=True)))
            names.extend(values)
            return tuple(values.values())

        functional = torch.func.functionalize(run)
        graph = make_fx(functional, select_decomp_table())(*told.tensors.values()).graph
    tidy(graph)
    graph.eliminate_dead_code()
    inputs = dict(zip(told.tensors, graph.find_nodes(op="placeholder"), strict=True))
    outputs = dict(zip(names, graph.output_node().args[0], strict=True))
    return _Traced(graph, inputs | outputs, told)


@functools.cache
def cut(computation: Computation, structure: Hashable, fusion: Fusion) -> Pattern:
    """The pattern of ``fusion``: the nodes of the computation's trace between its inputs and its outputs."""
    traced = _traced(computation.trace, structure)
    inputs = {traced.values[name]: name for name in fusion.inputs}
    outputs = tuple(traced.values[name] for name in fusion.outputs)
    inside: set[Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in inputs and node not in inside:
            inside.add(node)
            stack.extend(node.all_input_nodes)
    nodes = tuple(node for node in traced.graph.nodes if node in inside)
    anchor = next(node for node in nodes if node.target is computation.anchor)
    return Pattern(fusion, nodes, inputs, outputs, anchor, traced.trace)


def find(pattern: Pattern, anchor: Node, claimed: set[Node]) -> Match | Failure:
    """Match ``pattern`` at ``anchor``; nodes in ``claimed`` belong to another match already."""
    return _Matcher(pattern, anchor, claimed).run()


def _size(value: int) -> tuple[int, tuple[str, ...]]:
    """An integer of a trace as (literal factor, names of the sizes it is a product of)."""
    names = []
    for name, prime in SIZES.items():
        while value and value % prime == 0:
            value //= prime
            names.append(name)
    return value, tuple(names)


def number(size: Any) -> int | None:
    """A size as the integer that it is, or None: guards can make one of a size that is still written as a symbol."""
    if isinstance(size, torch.SymInt):
        return size.node.maybe_as_int()
    return size if isinstance(size, int) else None


def _value(argument: Any) -> Any:
    """An argument of a graph's node as a number, where it is one."""
    value = argument.meta.get("val", argument) if isinstance(argument, Node) else argument
    known = number(value) if isinstance(value, torch.SymInt) else None
    return value if known is None else known


def _operator(node: Node) -> str:
    return "getitem" if node.target is operator.getitem else str(node.target)


def _text(thing: Any) -> str:
    if isinstance(thing, Node):
        return f"{_operator(thing)} ({thing.name})" if thing.op == "call_function" else f"{thing.op} {thing.name}"
    return str(thing)


class _Matcher:
    def __init__(self, pattern: Pattern, anchor: Node, claimed: set[Node]) -> None:
        self.pattern = pattern
        self.anchor = anchor
        self.claimed = claimed
        self.order = {node: index for index, node in enumerate(pattern.nodes)}
        self.found: dict[Node, Node] = {}  # of the pattern: of the graph
        self.presumed: set[Node] = set()  # those of the pattern in whose place another operator was found
        self.scalars: dict[str, float] = {}
        self.sizes: list[tuple[Node, str, int, Any]] = []  # compared once the sizes are known from the inputs
        self.failures: list[tuple[int, str, Any]] = []  # order in the pattern, reason, the graph's node
        self.names = {value: name for name, value in pattern.trace.scalars.items()}

    def run(self) -> Match | Failure:
        self.bind(self.pattern.anchor, self.anchor)
        while self.grow() or self.join():
            pass
        same = [node for node in self.pattern.nodes if node in self.found and node not in self.presumed]
        covered = {self.found[node] for node in same}
        share = len(same) / len(self.pattern.nodes)
        if not self.failures and share == 1:
            self.check_inputs()
            self.check_users(covered)
        if self.failures or share < 1:
            apart = (0, "the pattern is not connected", None)
            _, reason, node = min(self.failures, key=lambda failure: failure[0], default=apart)
            node = node if isinstance(node, Node) else None
            return Failure(self.pattern.fusion, covered, share, reason, self.anchor, self.pattern, node)
        inputs = {name: self.found[node] for node, name in self.pattern.inputs.items()}
        return Match(
            self.pattern.fusion,
            covered,
            [inputs[name] for name in self.pattern.fusion.inputs],
            [self.found[node] for node in self.pattern.outputs],
            self.scalars,
            self.pattern.trace.constants,
            self.anchor,
            self.pattern,
        )

    def fail(self, expected: Node, reason: str, node: Any = None) -> None:
        self.failures.append((self.order.get(expected, -1), reason, self.found.get(expected) if node is None else node))

    def bind(self, expected: Node, node: Any) -> None:
        """``expected`` is ``node``: compare the two, then their arguments."""
        stack = [(expected, node)]
        while stack:
            expected, node = stack.pop()
            if expected in self.found:
                if self.found[expected] is not node:
                    self.fail(expected, f"expected {_text(self.found[expected])} again, found {_text(node)}", node)
                continue
            if not isinstance(node, Node):
                self.fail(expected, f"expected {_text(expected)}, found the constant {node}")
                continue
            if expected in self.pattern.inputs:
                self.found[expected] = node
                continue
            if node.op != "call_function" or node.target is not expected.target:
                self.fail(expected, f"expected {_operator(expected)}, found {_text(node)}", node)
                stack.extend(self.presume(expected, node))
                continue
            if node in self.claimed:
                self.fail(expected, f"{_text(node)} belongs to another fusion already", node)
                continue
            self.found[expected] = node
            stack.extend(self.arguments(expected, node))

    def arguments(self, expected: Node, node: Node) -> list[tuple[Node, Any]]:
        """Compare the constants of two nodes; return the pairs of arguments that are nodes in the pattern."""
        pairs: list[tuple[Node, Any]] = []

        def compare(want: Any, got: Any, where: str) -> None:
            if isinstance(want, Node):
                pairs.append((want, got))
            elif isinstance(want, list | tuple) and isinstance(got, list | tuple):
                if len(want) != len(got):
                    reason = f"{_text(node)}: {where} has {len(got)} items, expected {len(want)}"
                    self.fail(expected, reason, node)
                for left, right in zip(want, got, strict=False):
                    compare(left, right, where)
            elif (reason := self.constant(expected, want, _value(got), where)) is not None:
                self.fail(expected, f"{_text(node)}: {reason}", node)

        compare(expected.args, node.args, "arguments")
        for key in expected.kwargs.keys() | node.kwargs.keys():
            compare(expected.kwargs.get(key), node.kwargs.get(key), key)
        return pairs

    def constant(self, expected: Node, want: Any, got: Any, where: str) -> str | None:
        if isinstance(want, float) and want in self.names:
            name = self.names[want]
            if isinstance(got, bool) or not isinstance(got, int | float):
                return f"{name} must be a number, found {got}"
            if self.scalars.setdefault(name, float(got)) != float(got):
                return f"{name} is {got} here and {self.scalars[name]} elsewhere"
            return None
        if isinstance(want, int) and not isinstance(want, bool) and _size(want)[1]:
            self.sizes.append((expected, where, want, got))
            return None
        if isinstance(got, torch.device):  # one device for all inputs: the operator's own check
            return None
        same = type(want) is type(got) and (want == got or (want != want and got != got))  # NaN is NaN
        return None if same else f"expected {want} among its {where}, found {got}"

    def grow(self) -> bool:
        """Bind nodes of the pattern that use a node already found; False when nothing was added."""
        before = len(self.found)
        for expected in self.pattern.nodes:
            if expected in self.found or any(index == self.order[expected] for index, *_ in self.failures):
                continue
            known = next(
                (a for a in expected.all_input_nodes if a in self.found and a not in self.pattern.inputs), None
            )
            if known is None:
                continue
            users = [user for user in self.found[known].users if user.target is expected.target]
            fitting = [user for user in users if self.fits(expected, user)]
            if fitting:
                self.bind(expected, fitting[0])
            elif users:
                self.bind(expected, users[0])  # records what differs
            else:
                got = ", ".join(_text(user) for user in self.found[known].users)
                at = self.found[known]
                self.fail(expected, f"expected {_operator(expected)} of {_text(at)}, found {got or 'no user'}", at)
                for user in at.users:
                    for want, node in self.presume(expected, user):
                        self.bind(want, node)
                if expected not in self.found:
                    self.skip(expected, known)
        return len(self.found) > before

    def presume(self, expected: Node, node: Node) -> list[tuple[Node, Node]]:
        """What is compared further where only the operator differs: the same arguments; else nothing.

        A pattern that is a chain would otherwise end at the first difference, and the site would hold too little of it.
        """
        pairs = list(zip(expected.all_input_nodes, node.all_input_nodes, strict=False))
        if node.op != "call_function" or expected in self.found or node in self.claimed or node in self.found.values():
            return []
        if len(expected.all_input_nodes) != len(node.all_input_nodes) or not self.same_arguments(pairs):
            return []
        if not self.same_users(expected, node):
            return []
        self.found[expected] = node
        self.presumed.add(expected)
        return pairs

    def skip(self, expected: Node, known: Node) -> None:
        """Go on beyond a node that is missing, or before which another one stands."""
        at = self.found[known]
        inner = expected not in self.pattern.outputs
        if inner and known in expected.args and self.same_users(expected, at):
            self.found[expected] = at
            self.presumed.add(expected)
            return
        beyond = [node for user in at.users for node in user.users if node.target is expected.target]
        free = [node for node in beyond if node not in self.claimed and node not in self.found.values()]
        if len(set(free)) == 1 and self.same_users(expected, free[0]):
            self.found[expected] = free[0]
            self.presumed.add(expected)

    def same_users(self, expected: Node, node: Node) -> bool:
        """Whether the operators that use ``expected`` in the pattern use ``node`` in the graph."""
        wanted = {user.target for user in expected.users if user in self.order}
        return wanted <= {user.target for user in node.users}

    def same_arguments(self, pairs: Iterable[tuple[Node, Any]]) -> bool:
        """Whether these pairs are those found already, or inputs, or at least of the same operators."""
        return all(
            got is self.found[want]
            if want in self.found
            else want in self.pattern.inputs or (isinstance(got, Node) and got.target is want.target)
            for want, got in pairs
        )

    def join(self) -> bool:
        """Bind an output that only a common user connects with those found, as values and their weights."""
        found = [self.found[node] for node in self.pattern.outputs if node in self.found]
        users = {user for node in found for user in node.users}
        for expected in self.pattern.outputs if found else ():
            if expected in self.found or any(index == self.order[expected] for index, *_ in self.failures):
                continue
            beside = {node for user in users for node in user.all_input_nodes if node.target is expected.target}
            fitting = [node for node in beside if self.fits(expected, node)]
            if len(fitting) == 1:
                self.bind(expected, fitting[0])
                return True
            self.fail(
                expected, f"expected one {_operator(expected)} beside {_text(found[0])}, found {len(fitting)}", found[0]
            )
        return False

    def fits(self, expected: Node, node: Node) -> bool:
        """Whether binding would find nothing wrong in this node and in its arguments that are found already."""
        saved = self.failures, dict(self.scalars), list(self.sizes)
        self.failures = []
        pairs = self.arguments(expected, node)
        fine = not self.failures and node not in self.claimed and node not in self.found.values()
        self.failures, self.scalars, self.sizes = saved
        return fine and self.same_arguments(pairs)

    def check_inputs(self) -> None:
        """Shapes and dtypes of the inputs; binds the sizes, then compares every integer that names them."""
        bound: dict[str, Any] = {}

        def expected_size(value: int) -> Any:
            factor, names = _size(value)
            for name in names:
                factor = factor * bound.get(name, 0)
            return factor

        def shape(tensor: torch.Tensor) -> str:
            sizes = [_size(size) for size in tensor.shape]
            products = [
                "·".join([*([str(factor)] if factor != 1 or not names else []), *names]) for factor, names in sizes
            ]
            return f"[{', '.join(products)}]"

        for expected, name in self.pattern.inputs.items():
            want, got = expected.meta["val"], self.found[expected].meta.get("val")
            if not isinstance(got, torch.Tensor):
                return self.fail(expected, f"{name} is no tensor: {_text(self.found[expected])}")
            if name not in self.pattern.trace.parameters and got.dtype != want.dtype:
                return self.fail(expected, f"{name} is {got.dtype}, expected {want.dtype}")
            if not got.dtype.is_floating_point and want.dtype.is_floating_point:
                return self.fail(expected, f"{name} is {got.dtype}, expected a floating dtype")
            if got.dim() != want.dim():
                return self.fail(expected, f"{name} has shape {list(got.shape)}, expected {shape(want)}")
            for size, actual in zip(want.shape, got.shape, strict=True):
                factor, names = _size(size)
                if factor == 1 and len(names) == 1:
                    bound.setdefault(names[0], actual)
        for _, _, value, actual in self.sizes:  # a size that no input has is what it is where it first occurs
            factor, names = _size(value)
            if factor == 1 and len(names) == 1 and not isinstance(actual, Node):
                bound.setdefault(names[0], actual)
        for expected, name in self.pattern.inputs.items():
            want, got = expected.meta["val"], self.found[expected].meta["val"]
            for size, actual in zip(want.shape, got.shape, strict=True):
                if not statically_known_true(expected_size(size) == actual):
                    return self.fail(expected, f"{name} has shape {list(got.shape)}, expected {shape(want)}")
        for expected, where, size, actual in self.sizes:
            if isinstance(actual, Node) or not statically_known_true(expected_size(size) == actual):
                node = self.found.get(expected)
                return self.fail(
                    expected, f"{_text(node)}: expected {expected_size(size)} among its {where}, found {actual}"
                )
        return None

    def check_users(self, covered: set[Node]) -> None:
        outputs = {self.found[node] for node in self.pattern.outputs}
        for expected in self.pattern.nodes:
            node = self.found[expected]
            for user in node.users:
                if node not in outputs and user not in covered:
                    self.fail(expected, f"{_text(node)} is used outside the pattern too, by {_text(user)}")
