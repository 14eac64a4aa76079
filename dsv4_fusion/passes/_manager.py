"""The one graph pass that Inductor runs: find every site, rewrite it, report it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from ..ops._library import prepare
from ..options import FusionOptions
from ..report import NearMiss, Report, Site
from . import compressor, fp8_linear, hyper_connection, indexer, indexer_scores, indexer_scores_deepseek
from ._dump import Dump
from ._pattern import NEAR, Computation, Failure, Fusion, Match, Pattern, cut, find
from ._picture import Picture
from ._tidy import tidy

logger = logging.getLogger("dsv4_fusion")

COMPUTATIONS: tuple[Computation, ...] = (
    *hyper_connection.COMPUTATIONS,
    *indexer_scores.COMPUTATIONS,
    *compressor.COMPUTATIONS,
    *indexer_scores_deepseek.COMPUTATIONS,
    *indexer.COMPUTATIONS,
)
_APART = 8  # how many nodes back a joined fusion's other part is looked for


class FusionError(RuntimeError):
    """``strict`` was asked for and a graph has too few fused sites; or a graph contradicts itself."""


class FusionPass(CustomGraphPass):
    """Rewrites an inference graph to the ``dsv4`` operators.

    Args:
        options: what to do.
        on_report: called with the report of every graph.
        before: the user's own ``joint_custom_pre_pass``, run first: a pass, a list of them, or None.
        rewrite: True rewrites on every device, None on CUDA, and on the CPU if ``options.reference``.
        draw: keep in the report what its HTML form draws.
    """

    def __init__(
        self,
        options: FusionOptions,
        on_report: Callable[[Report], None],
        before: Any = None,
        rewrite: bool | None = None,
        draw: bool = False,
    ) -> None:
        self.options = options
        self.on_report = on_report
        self.before: list[Any] = before if isinstance(before, list) else [before] if before is not None else []
        self.rewrite = rewrite
        self.draw = draw

    def __call__(self, graph: Graph) -> None:
        for own in self.before:
            own(graph)
        dump, patterns = Dump(self.options.dump_folder), list[Pattern]()
        dump.before(graph)
        report, started = Report(nodes_before=len(graph.nodes), graphs=1), time.thread_time()
        if any(node.name.startswith("tangents") for node in graph.find_nodes(op="placeholder")):
            report.notes.append("a training graph was left alone: the operators have no backward; use torch.no_grad()")
        else:
            patterns = self.fuse(graph, report)
        report.nodes_after, report.seconds = len(graph.nodes), time.thread_time() - started
        dump.after(graph, report, patterns)
        self.on_report(report)
        wanted = int(self.options.strict)
        if len(report.sites) < wanted:
            raise FusionError(f"strict: {wanted} fused sites wanted in this graph, found {len(report.sites)}\n{report}")

    def uuid(self) -> Any:
        """Inductor's cache key: sources, versions, options, and the user's own pass."""
        if not all(isinstance(own, CustomGraphPass) and own.uuid() is not None for own in self.before):
            return None  # no key for the user's pass: Inductor then does not cache
        if self.options.dump_folder is not None:
            return None  # code out of a cache would leave no dump
        before = tuple(own.uuid() for own in self.before)
        return (_source_hash(), _versions(), repr(self.options), self.rewrite, before)

    def fuse(self, graph: Graph, report: Report) -> list[Pattern]:
        """Rewrite the graph, fill the report; return the patterns that matched or nearly did."""
        tidy(graph)
        picture = Picture(graph, _module_path, _source_line) if self.draw else None
        patterns: list[Pattern] = []
        claimed: set[Node] = set()
        traced: dict[Any, Graph | str] = {}  # operators' calls
        failures: list[Failure] = []
        joints = _Joints()
        order = {node: index for index, node in enumerate(graph.nodes)}
        sites: list[tuple[int, Site]] = []
        asked = fp8_linear.COMPUTATIONS if self.options.fp8_linear is not None else ()
        for computation in (*COMPUTATIONS, *asked):
            for anchor in graph.find_nodes(op="call_function", target=computation.anchor):
                if anchor in claimed or anchor not in order or "val" not in anchor.meta:
                    continue  # not in order: a replacement's own, as the quantiser of the keys
                result = self.first_match(computation, anchor, claimed, traced)
                if isinstance(result, Failure):
                    failures.append(result)
                    patterns += [result.pattern] if result.pattern and result.share >= NEAR else []
                if not isinstance(result, tuple):
                    continue
                match, replacement = result
                patterns.append(match.pattern)
                for failure in failures:  # a larger fusion that nearly matched, of which this is a part
                    failure.part |= failure.anchor is anchor and failure.nodes > match.nodes
                path, name = _module_path(anchor), match.fusion.name
                if match.fusion.left_alone is not None:
                    entry = NearMiss(path, name, match.fusion.left_alone, _source_line(anchor))
                    report.left_alone.append(entry)
                    if picture:
                        picture.left_alone(entry, match)
                    continue
                rewrite = self.rewrites(anchor)
                site = Site(path, name, f"dsv4::{name}", len(match.nodes), rewrite)
                sites.append((order[anchor], site))
                if picture:
                    picture.site(site, match, replacement[0])
                claimed |= match.nodes
                outputs = _replace(graph, match, replacement) if rewrite else match.outputs
                joints.add(match, path, outputs)
                if picture:
                    picture.replaced(match, outputs)
        report.sites += [site for _, site in sorted(sites, key=lambda entry: entry[0])]
        misses = _near_misses(failures, claimed)
        report.near_misses += [miss for miss, _ in misses] + joints.near_misses()
        if picture:
            for miss, failure in misses:
                picture.miss(miss, failure)
            report.drawings.append(picture.finish(graph))
        if report.sites and not all(site.rewritten for site in report.sites):
            report.notes.append("on the CPU matches are left to Inductor; options={'reference': True} rewrites them")
        if (contradiction := indexer.contradiction(graph)) is not None:
            raise FusionError(contradiction)
        return patterns

    def rewrites(self, anchor: Node) -> bool:
        if self.rewrite is not None:
            return self.rewrite
        value = anchor.meta["val"]
        value = value[0] if isinstance(value, list | tuple) else value  # of top-k
        return value.device.type == "cuda" or self.options.reference

    def first_match(
        self, computation: Computation, anchor: Node, claimed: set[Node], traced: dict[Any, Graph | str]
    ) -> tuple[Match, Any] | Failure | None:
        """The largest fusion that matches and whose operator takes it, or None where there is no site.

        Where none matches: the failure of the smallest that came near, since nothing fuses until that is mended.
        """
        failures: list[Failure] = []
        for structure in computation.structures(anchor):
            nearest: Failure | None = None
            for fusion in computation.fusions:
                result: Match | Failure = find(cut(computation, structure, fusion), anchor, claimed)
                if isinstance(result, Match):
                    reason = fusion.refuse(result) if fusion.refuse else None
                    if reason is None and fusion.left_alone is not None:
                        return result, None
                    if fusion.simplify is not None:
                        result.inputs = fusion.simplify(result.inputs)
                    replacement = reason or _replacement(result, self.options, traced)
                    if not isinstance(replacement, str):
                        return result, replacement
                    result = Failure(fusion, result.nodes, 1.0, replacement, anchor, result.pattern)
                if nearest is None or result.share >= min(NEAR, nearest.share):
                    nearest = result
            failures += [nearest] if nearest is not None else []
        if not failures and computation.unplaced is not None and (reason := computation.unplaced(anchor)) is not None:
            return Failure(computation.fusions[0], {anchor}, 1.0, reason, anchor, None, anchor)
        return max(failures, key=lambda failure: failure.share, default=None)


def _replacement(match: Match, options: FusionOptions, traced: dict[Any, Graph | str]) -> Any:
    """The operator's call traced on the match's own inputs, or the reason why it cannot stand for the match.

    A model's layers are alike: ``traced`` keeps one trace for all matches of a graph whose inputs have the same
    metadata, and only the fakes run again.
    """
    values = [node.meta["val"] for node in match.inputs]
    fake_mode = next(value.fake_mode for value in values if hasattr(value, "fake_mode"))

    keywords = {name: getattr(options, name) for name in (*match.fusion.options, "implementation")}

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = match.fusion.replacement(*tensors, **match.scalars, **match.constants, **keywords)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    key = _call_key(match, values)
    graph = traced.get(key) if key is not None else None
    with torch.no_grad(), enable_python_dispatcher(), fake_mode:
        if graph is None:
            try:
                graph = make_fx(call, select_decomp_table())(*values).graph
            except ValueError as error:  # the operator's own check
                graph = str(error)
            if key is not None:
                traced[key] = graph
        elif isinstance(graph, Graph):
            graph = _called_again(graph, values)
    if isinstance(graph, str):
        return graph
    for name, old, new in zip(match.fusion.outputs, match.outputs, graph.output_node().args[0], strict=True):
        got, expected = new.meta["val"], old.meta["val"]
        if got.dtype != expected.dtype:
            return f"{name} is {expected.dtype} in the graph, the operator returns {got.dtype}"
        if not _same_layout(got, expected):
            return (
                f"{name} has shape {list(expected.shape)} and stride {list(expected.stride())} in the graph, "
                f"the operator returns {list(got.shape)} and {list(got.stride())}"
            )
    outside = [user for output in match.outputs for user in output.users if user not in match.nodes]
    if not outside:
        return "none of its results is used"
    first = min(outside)  # nodes compare by their place in the graph
    late = next((node for node in match.inputs if first < node), None)
    if late is not None:
        return f"{late.name} is computed after {first.name} has used an output: one operator cannot do both"
    return graph, first


def _call_key(match: Match, values: list[Any]) -> Any:
    """What the trace of the operator's call depends on; None where a size is symbolic."""
    inputs = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            return None
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        if any(type(size) is not int for size in sizes):
            return None
        first = next(index for index, other in enumerate(values) if other is value)  # one tensor may stand twice
        inputs.append((type(value), sizes, value.dtype, value.device, value.requires_grad, first))
    return match.fusion, str(sorted(match.scalars.items())), str(sorted(match.constants.items())), tuple(inputs)


def _called_again(call: Graph, values: list[torch.Tensor]) -> Graph:
    """A copy of the traced ``call`` on other tensors of the same metadata.

    Its values are fakes of its own: Inductor reads off their storages which of a graph's values alias.
    """
    again, tensors, copies = Graph(), iter(values), dict[Node, Node]()
    for node in call.nodes:
        copy = copies[node] = again.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            copy.meta["val"] = next(tensors)
        elif node.op == "call_function":
            arguments, keywords = map_arg((copy.args, copy.kwargs), lambda argument: argument.meta["val"])
            copy.meta["val"] = node.target(*arguments, **keywords)
    return again


def _same_layout(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Same shape, and same strides where a dimension is longer than 1."""
    if got.dim() != expected.dim():
        return False
    for size, want, stride, want_stride in zip(got.shape, expected.shape, got.stride(), expected.stride(), strict=True):
        if not statically_known_true(size == want):
            return False
        if not statically_known_true(want == 1) and not statically_known_true(stride == want_stride):
            return False
    return True


def _replace(graph: Graph, match: Match, replacement: tuple[Graph, Node]) -> list[Node]:
    """Put the operator's call into the graph in place of the match; return the new outputs."""
    call, before = replacement
    origin = {key: match.anchor.meta[key] for key in ("nn_module_stack", "stack_trace") if key in match.anchor.meta}
    copies = dict(zip(call.find_nodes(op="placeholder"), match.inputs, strict=True))
    with graph.inserting_before(before):
        for node in call.nodes:
            if node.op == "call_function":
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta = {**origin, "val": node.meta["val"]} if "val" in node.meta else dict(origin)
                values = map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
                prepare(node.target, *values[0], **values[1])
    outputs = [copies[node] for node in call.output_node().args[0]]
    for old, new in zip(match.outputs, outputs, strict=True):
        old.replace_all_uses_with(new)
    for node in sorted(match.nodes, reverse=True):
        graph.erase_node(node)
    return outputs


def _near_misses(failures: list[Failure], claimed: set[Node]) -> list[tuple[NearMiss, Failure]]:
    """The failures that hold most of a pattern, without those inside a nearer one.

    What would be left alone anyway comes last: what it misses tells less than what a fusion misses.
    """
    misses = []
    covered = set(claimed)
    for failure in sorted(failures, key=lambda each: (each.fusion.left_alone is not None, -len(each.nodes))):
        if failure.share >= NEAR and (failure.part or failure.anchor not in covered):
            covered |= failure.nodes
            source = failure.node is not None and _source_line(failure.node)
            path, source = _module_path(failure.anchor), source or _source_line(failure.anchor)
            misses.append((NearMiss(path, failure.fusion.name, failure.reason, source), failure))
    return misses


class _Joints:
    """Finds the parts of a joined fusion that matched apart, although one feeds the other."""

    def __init__(self) -> None:
        self.produced: dict[Node, str] = {}  # an output of a match: its fusion
        self.renamed: dict[Node, Node] = {}  # an output in the old graph: in the new one
        self.matches: list[tuple[Fusion, str, list[Node]]] = []

    def add(self, match: Match, path: str, outputs: list[Node]) -> None:
        self.produced.update((output, match.fusion.name) for output in outputs)
        self.renamed.update((old, new) for old, new in zip(match.outputs, outputs, strict=True) if old is not new)
        self.matches.append((match.fusion, path, match.inputs))

    def near_misses(self) -> list[NearMiss]:
        joined = {fusion.parts: fusion.name for fusion in _fusions() if fusion.parts}
        misses = []
        for fusion, path, inputs in self.matches:
            for (first, second), name in joined.items():
                if second == fusion.name and (between := self.between(inputs[0], first)) is not None:
                    steps = " and ".join(f"{step.target} ({step.name})" for step in between)
                    stands = f"between them stands {steps}" if between else "the joined pattern differs"
                    source = _source_line(between[0]) if between else ""
                    misses.append(NearMiss(path, name, f"{first} and {second} were fused apart: {stands}", source))
        return misses

    def between(self, node: Node, producer: str) -> list[Node] | None:
        """The nodes on the way back from ``node`` to an output of ``producer``; None if there is no way."""
        paths: list[tuple[Node, tuple[Node, ...]]] = [(node, ())]
        for _ in range(_APART):
            further: list[tuple[Node, tuple[Node, ...]]] = []
            for at, way in paths:
                at = self.renamed.get(at, at)
                if self.produced.get(at) == producer:
                    return list(reversed(way))
                if at not in self.produced and at.op == "call_function":
                    further += [(source, (*way, at)) for source in at.all_input_nodes]
            paths = further
        return None


def _fusions() -> Iterator[Fusion]:
    for computation in COMPUTATIONS:
        yield from computation.fusions


def _module_path(node: Node) -> str:
    """``L['self'].model.layers[0]`` and its relatives as ``model.layers.0``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"\._modules\['(.+?)'\]", r".\1", path)
    path = re.sub(r"\[['\"]?(.+?)['\"]?\]", r".\1", path)
    return re.sub(r"^L\.\w+\.?", "", path)


def _source_line(node: Node) -> str:
    """The innermost line of the model's source that the node comes from, as ``folder/file.py:12: code``; or empty."""
    return _innermost(node.meta.get("stack_trace") or "")


@functools.lru_cache(1024)
def _innermost(stack: str) -> str:
    frames = re.findall(r'File "(.+?)", line (\d+), in .*\n\s*(.*)', stack)
    library = str(Path(torch.__file__).parent)
    own = [frame for frame in frames if not frame[0].startswith(library)] or frames
    if not own:
        return ""
    file, line, code = own[-1]
    return f"{'/'.join(Path(file).parts[-2:])}:{line}: {code.strip()}"


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for source in sorted(package.rglob("*.py")):
        digest.update(str(source.relative_to(package)).encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _versions() -> tuple[str, ...]:
    """What the patterns and the kernels are made from."""
    found = [str(torch.__version__)]
    for name in ("transformers", "triton", "tilelang", "nvidia-cutlass-dsl"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    loaded = "transformers.models.deepseek_v4.modeling_deepseek_v4" in sys.modules
    return (*found, f"searched {loaded}")
