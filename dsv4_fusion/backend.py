"""The ways in: the torch.compile backend, the decorator, and ``explain``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar

from .options import FusionOptions, unknown_option
from .report import Report

logger = logging.getLogger("dsv4_fusion")


def backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Inductor with DeepSeek-V4's fusions applied to the graph: ``torch.compile(model, backend="dsv4_fusion")``.

    Args:
        gm, example_inputs: as torch.compile gives them.
        mode: Inductor's mode, as "reduce-overhead" or "max-autotune". torch.compile takes either ``mode`` or
            ``options``; where both are needed, give the mode as ``options={"mode": …}``.
        options: fields of :class:`FusionOptions`, "mode", and any of Inductor's own options.

    Raises:
        ValueError: an option that neither we nor Inductor know, or a wrong value of ours.
        FusionError: ``strict`` was asked for and the graph has too few fused sites.
    """
    ours, patches = _split(mode, options)
    return _compile(gm, example_inputs, ours, patches, _log_report)


def fuse(target: Any = None, /, **options: Any) -> Any:
    """Compile a model with this backend: ``@fuse`` or ``fuse(**options)`` on a module, a class, a method or a function.

    Args:
        target: an ``nn.Module`` instance (compiled in place and returned), an ``nn.Module`` class (its ``forward`` is
            compiled for every instance), a function or a forward method; absent when options are given first.
        options: options of :func:`backend`, and torch.compile's ``dynamic`` and ``fullgraph``.

    Raises:
        TypeError: the target is none of these.
        ValueError: a wrong option; raised here, not at the first call.
    """
    if target is None:
        return functools.partial(fuse, **options)
    settings = {name: options.pop(name) for name in ("dynamic", "fullgraph") if name in options}
    _split(None, options)
    compile_it = functools.partial(torch.compile, backend="dsv4_fusion", options=options or None, **settings)
    if isinstance(target, torch.nn.Module):
        target.compile(backend="dsv4_fusion", options=options or None, **settings)
        return target
    if isinstance(target, type) and issubclass(target, torch.nn.Module):
        target.forward = compile_it(target.forward)
        return target
    if callable(target) and not isinstance(target, type):
        return compile_it(target)
    raise TypeError(f"fuse takes an nn.Module, an nn.Module class or a function, got {type(target).__name__}")


def explain(
    model: Callable[..., Any],
    /,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Run ``model(*args, **kwargs)`` once and say what would be fused: no code is generated, no cache is used.

    The graphs are rewritten on every device, the CPU too, so that the report shows what a GPU would run; what runs is
    the model's own, as without us, and on the meta device nothing. Python does not collect garbage meanwhile. Dynamo is
    reset before and after: whatever was compiled in this process is compiled again at its next call.

    Args:
        model: a module or a function; it is not changed, but for what its own code writes: a cache, a buffer.
        args, kwargs: what to call it with.
        options: as in :func:`backend`; ``strict`` raises here too.
        dynamic: as in torch.compile.

    Returns:
        A :class:`Report`; print it for a table.

    Raises:
        TypeError: ``model`` cannot be called.
        ValueError: a wrong option.
        FusionError: ``strict`` was asked for, and all graphs together have too few fused sites.
    """
    return explained(model, args, kwargs, options, dynamic)


def explained(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    draw: bool = True,
) -> Report:
    """:func:`explain`; ``draw`` collects what the web page of the report draws."""
    if not callable(model):
        raise TypeError(f"explain takes an nn.Module or a function, got {type(model).__name__}")
    from ._tracing import no_collection, one_run, without_values
    from .passes._manager import FusionError

    ours, patches = _split(None, options)
    report = Report()

    def reported(found: Report) -> None:
        report.add(found)
        raise _Reported

    def tracing_backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        loose = dataclasses.replace(ours, strict=False, reference=True)
        kept = _specialize_module_floats(gm)
        given = [example_inputs[i] for i in kept]
        run: Callable[..., Any]
        try:
            with one_run():
                run = _compile(gm, given, loose, patches, reported, run_graph=True, draw=draw)
        except _Reported:
            run = without_values(gm)
        return run if len(kept) == len(example_inputs) else lambda *inputs: run(*[inputs[i] for i in kept])

    torch._dynamo.reset()
    marked = "_is_torch_compile" in vars(model) if isinstance(model, torch.nn.Module) else True
    compiled = torch.compile(model, backend=tracing_backend, dynamic=dynamic)
    if not marked:
        vars(model).pop("_is_torch_compile", None)  # PyTorch 2.13 means its wrapper, which hands attributes on
    try:
        with torch.no_grad(), _constants_of_any_device(), no_collection():
            compiled(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    if len(report.sites) < int(ours.strict):
        raise FusionError(f"strict: {int(ours.strict)} fused sites wanted, found {len(report.sites)}\n{report}")
    return report


class _Reported(Exception):
    """Ends a compilation whose report is there: what Inductor does afterwards is not looked at."""


@contextlib.contextmanager
def _constants_of_any_device() -> Iterator[None]:
    """``torch.tensor(0.0, device="meta")`` in a model is no fake tensor to PyTorch 2.11, which then refuses it."""
    from torch._subclasses.fake_tensor import fake_tensor_tls

    before = fake_tensor_tls.allow_non_fake_inputs_override
    fake_tensor_tls.allow_non_fake_inputs_override = True
    try:
        yield
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override = before


def _split(mode: str | None, options: Mapping[str, Any] | None) -> tuple[FusionOptions, dict[str, Any]]:
    """Our options, and Inductor's configuration for the rest and for the mode."""
    import torch._inductor as inductor

    ours, rest = FusionOptions.split(options)
    mode = rest.pop("mode", mode)
    known = inductor.list_options()
    for name in rest:
        if name.replace("-", "_") not in known:
            raise unknown_option(name, known)
    modes = ("default", *inductor.list_mode_options())
    if mode is not None and mode not in modes:
        raise ValueError(f"option mode: got {mode!r}, expected one of {', '.join(modes)}")
    patches = dict(inductor.list_mode_options(mode)) if mode not in (None, "default") else {}
    return ours, patches | {name.replace("-", "_"): value for name, value in rest.items()}


def _compile(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    options: FusionOptions,
    patches: dict[str, Any],
    on_report: Callable[[Report], None],
    run_graph: bool = False,
    draw: bool = True,
) -> Callable[..., Any]:
    """Inductor with our pass; ``run_graph`` runs the rewritten graph, and draws it, instead of generating code."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    from .ops._library import declare_to_inductor
    from .passes._manager import FusionPass

    declare_to_inductor()
    kept = _specialize_module_floats(gm)
    if len(kept) < len(example_inputs):
        compiled = _compile(gm, [example_inputs[i] for i in kept], options, patches, on_report, run_graph, draw)
        return lambda *inputs: compiled(*[inputs[i] for i in kept])
    before = patches.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    fusion_pass = FusionPass(options, on_report, before, rewrite=True if run_graph else None, draw=run_graph and draw)
    patches = patches | {"joint_custom_pre_pass": fusion_pass}
    if not run_graph:
        return _compile_or_read(gm, example_inputs, fusion_pass, patches, on_report)
    # What comes after our pass is not looked at; folding of constants breaks graphs of the meta device.
    patches |= {"force_disable_caches": True, "joint_graph_constant_folding": False}
    return compile_fx(gm, list(example_inputs), inner_compile=_run_graph, config_patches=patches)


def _compile_or_read(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    fusion_pass: Any,
    patches: dict[str, Any],
    on_report: Callable[[Report], None],
) -> Callable[..., Any]:
    """Inductor; where its code comes out of a cache and the pass does not run, the report of when it was compiled."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from ._cached import Table

    others = {name: value for name, value in patches.items() if value is not fusion_pass}
    off = patches.get("force_disable_caches", config.force_disable_caches)
    uuid = None if off else fusion_pass.uuid()
    table = Table(cache_dir(), gm, example_inputs, None if uuid is None else (uuid, sorted(others.items())))
    told: list[Report] = []
    fusion_pass.on_report = told.append
    try:
        compiled = compile_fx(gm, list(example_inputs), config_patches=patches)
    finally:
        for report in told:
            on_report(report)
    if told:
        table.write(told[0])
    else:
        on_report(table.read())
    return compiled


def _specialize_module_floats(gm: torch.fx.GraphModule) -> list[int]:
    """Make constants of the floats that are attributes of modules, with a guard; return the inputs that are left.

    Under ``dynamic=True`` Dynamo passes every float as a tensor, an epsilon of a norm too. Kernels take these as
    numbers, and a module's attribute does not change from call to call.
    """
    kept = []
    for index, placeholder in enumerate(gm.graph.find_nodes(op="placeholder")):
        symbol = getattr(placeholder.meta.get("example_value"), "item_memo", None)
        source = getattr(placeholder.meta.get("grapharg"), "source", None)
        items = list(placeholder.users)
        if (
            not isinstance(symbol, torch.SymFloat)
            or source is None
            or not source.guard_source.is_unspecialized_nn_module()
            or any(item.target != "item" for item in items)
        ):
            kept.append(index)
            continue
        for item in items:
            item.replace_all_uses_with(guard_scalar(symbol))
            gm.graph.erase_node(item)
        gm.graph.erase_node(placeholder)
    gm.recompile()
    return kept


def _run_graph(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    def run(inputs: list[Any]) -> Any:
        return gm(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined] # AOTAutograd then hands over its list of inputs
    return run


def _log_report(report: Report) -> None:
    logger.info("%s", report.summary())
    for site in report.sites:
        logger.debug("%s: %s: %s, %d nodes", "fused" if site.rewritten else "matched", site.path, site.op, site.nodes)
    for miss in report.near_misses:
        logger.warning("not fused: %s: %s: %s", miss.path, miss.fusion, miss.reason)
    for entry in report.left_alone:
        logger.info("left alone: %s: %s: %s", entry.path, entry.fusion, entry.reason)
    for note in report.notes:
        _once(logging.WARNING, note)
    if not (report.sites or report.near_misses or report.left_alone or report.notes):
        _once(
            logging.WARNING,
            f"a graph of {report.nodes_before} nodes holds no DeepSeek-V4 pattern; see dsv4_fusion.explain(model, ...)",
        )


@functools.cache
def _once(level: int, message: str) -> None:
    logger.log(level, "%s", message)
