"""Registration of the ``dsv4::`` operators: schema, reference, fake, implementations, and the choice of one.

Every operator goes through :func:`define`. It uses ``torch.library.Library`` directly: a call costs about 5 µs on the
CPU, against 22 µs through ``torch.library.custom_op``. The price is that nothing checks aliasing or autograd for us;
``tests/ops`` runs ``torch.library.opcheck`` on every operator, and :func:`refuse_grad` stands in for autograd.

A launch-bound user pays for every microsecond here, so the checks and the choice of an implementation are remembered
for the shapes, dtypes, strides and options that they were made for; a call that nothing traces skips the dispatcher.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from ._plans import Plans

logger = logging.getLogger("dsv4_fusion")

NAMESPACE = "dsv4"
REFERENCE = "reference"
INSTALL_LINE = "pip install 'dsv4_fusion[cuda]'"
COMPILERS = {  # implementation: modules it needs
    "triton": ("triton",),
    "tilelang": ("tilelang",),
    "cutedsl": ("cutlass", "tvm_ffi"),
}
_library = torch.library.Library(NAMESPACE, "DEF")
operators: dict[str, tuple[Implementation, ...]] = {}  # by name: its GPU implementations, best first
_preparers: dict[Any, Callable[..., None]] = {}  # an operator's overload: begins to compile its kernels
_prepared: list[Callable[[], None]] = []
_rehearsals: dict[Any, Future] = {}  # what has begun of these, by what is called


@dataclass(frozen=True)
class Implementation:
    """One GPU implementation of an operator.

    Attributes:
        name: the kernel language, a key of COMPILERS, and what callers pass as ``implementation=``.
        entry: ``"module:function"``; imported at the first launch. The function takes the operator's arguments
            without ``implementation`` and returns what the operator returns; the current device is that of the first
            argument. It may have two attributes that take the same arguments: ``bind`` returns a quicker function of
            the tensors alone, for calls with the same metadata and options; ``prepare`` begins to compile what a call
            with any number of tokens would need, and reads no more than metadata (the tensors may be fake). Without
            that a call with zeros takes its place, in a thread.
        limits: called with the operator's arguments; returns why this implementation cannot take them, or None. It
            may depend on shapes, dtypes, strides, devices, options, and addresses modulo 16; not on contents.
        capability: the smallest CUDA compute capability it runs on.
    """

    name: str
    entry: str
    limits: Callable[..., str | None] | None = None
    capability: tuple[int, int] = (8, 0)

    def load(self) -> Callable[..., Any]:
        module, function = self.entry.split(":")
        return getattr(importlib.import_module(module), function)

    def unavailable(self, device: torch.device) -> str | None:
        """Why this implementation cannot run on ``device`` at all, or None."""
        for module in COMPILERS[self.name]:
            if importlib.util.find_spec(module) is None:
                needs = "" if module == self.name else f": it needs {module}"
                return f"{self.name} is not installed{needs} ({INSTALL_LINE})"
        if device.type == "cpu" and not (self.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"{self.name} kernels run on CUDA devices, got a tensor on cpu"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < self.capability:
            need, got = self.capability, torch.cuda.get_device_capability(device)
            return f"{self.name} needs compute capability {need[0]}.{need[1]}, this device has {got[0]}.{got[1]}"
        return None


def expect(condition: Any, message: Callable[[], str]) -> None:
    """Raise ``ValueError(message())`` unless ``condition`` holds; symbolic conditions become guards."""
    if condition is True:
        return
    torch._check_value(condition, message)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def refuse_grad(tensors: Sequence[torch.Tensor | None]) -> None:
    """Raise if autograd would record this call: no operator here has a backward."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("an input requires grad, and there is no backward: use torch.no_grad(), or detach the input")


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # size, stride, dtype
_empty_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # what Inductor's own code calls


def layout(size: tuple[int, ...], dtype: torch.dtype) -> Layout:
    """Of a contiguous tensor."""
    return size, tuple(math.prod(size[axis + 1 :]) for axis in range(len(size))), dtype


def new(tensor: Layout, device: torch.device) -> torch.Tensor:
    """A tensor without values, on the current CUDA device or the CPU: 1 µs, where ``torch.empty`` takes 3.

    Where PyTorch is asked for determinism it is PyTorch's own, which fills it then.
    """
    size, stride, dtype = tensor
    if _empty_cuda is None or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return torch.empty_strided(size, stride, dtype=dtype, device=device)
    return _empty_cuda(size, stride, dtype)


def several(tensors: Sequence[Layout], device: torch.device) -> list[torch.Tensor]:
    """:func:`new` for each of them."""
    if _empty_cuda is None or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return [new(tensor, device) for tensor in tensors]
    return [_empty_cuda(*tensor) for tensor in tensors]


@functools.cache
def compiling() -> ThreadPoolExecutor:
    """Threads in which kernels compile: the compilers are C++ and other processes, and run side by side."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="dsv4-compile")


def prepare(operator: Any, *args: Any, **kwargs: Any) -> None:
    """Say that ``operator`` will be called with such arguments.

    The first call of any operator then begins to compile all of their kernels, side by side. Not earlier: a graph is
    traced and compiled meanwhile, and compilers in other threads of the same process, which take Python's lock
    thousands of times, delayed that by more than they need themselves.

    Args:
        operator: an overload of ``torch.ops.dsv4``; any other is none of ours, and nothing happens.
        args, kwargs: its arguments; tensors may be fake.
    """
    if operator in _preparers:
        _prepared.append(functools.partial(_preparers[operator], *args, **kwargs))


def _begin_prepared() -> None:
    """Begin what was prepared, and wait for what has to run for that."""
    while _prepared:
        with contextlib.suppress(Exception):  # it is raised again by the call itself
            _prepared.pop()()
    while _rehearsals:
        wait([_rehearsals.popitem()[1]])


def number(value: Any) -> Any:
    """An argument, or the value that a symbolic one had when the graph was traced."""
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value


def rehearse(key: Any, device: torch.device, run: Callable[[], None]) -> None:
    """``run`` kernels in a thread and on a stream of its own, so that they are compiled; the same ``key`` runs once."""

    def aside() -> None:
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
            run()
            torch.cuda.current_stream().synchronize()

    _begin(key, aside)


def _begin(key: Any, run: Callable[[], None]) -> None:
    """In a thread; not while a CUDA graph is captured, which memory for a kernel's arguments would break."""
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if key not in _rehearsals and not captured:
        _rehearsals[key] = compiling().submit(run)


def _rehearse(load: Callable[[], Callable[..., Any]], args: tuple, kwargs: dict[str, Any]) -> None:
    """Begin to compile what a kernel's function will launch: by its ``prepare``, or by a call with zeros."""
    device = args[0].device

    def metadata(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return number(value)
        return tuple(number(n) for n in value.shape), tuple(number(n) for n in value.stride()), value.dtype

    def zeros(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        return (
            torch.zeros(max(span, 0) * dtype.itemsize, dtype=torch.uint8, device=device)
            .view(dtype)
            .as_strided(size, stride)
        )

    given, options = [metadata(arg) for arg in args], {name: metadata(value) for name, value in kwargs.items()}

    def call() -> None:
        load()(*[zeros(*value) if isinstance(value, tuple) else value for value in given], **options)

    def run() -> None:
        function = load()
        if hasattr(function, "prepare"):
            function.prepare(*args, **kwargs)
        else:
            rehearse(("call", key), device, call)

    key = repr((load, given, options, device))
    _begin(("prepare", key), run)


def _intercepted() -> bool:
    """Whether something traces or transforms this call, and the dispatcher has to see it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def declare_to_inductor() -> None:
    """Tell Inductor that it calls the operators as they are, which it would find out by itself at its first sight of
    each. PyTorch 2.11 then prints all that the arguments are computed from, for a log that nobody reads: tens of
    seconds in a real model.
    """
    from torch._inductor.lowering import constrain_to_fx_strides, lowerings, make_fallback

    for name in operators:
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        if overload not in lowerings:
            make_fallback(overload, constrain_to_fx_strides)


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None],
    implementations: Sequence[Implementation] = (),
) -> Callable[..., Any]:
    """Register ``dsv4::<schema>`` and return what the public function calls.

    The schema's last argument has to be ``str? implementation=None``.

    Args:
        schema: the operator's schema without its namespace.
        reference: plain PyTorch; the implementation on the CPU, and the oracle of the tests.
        fake: shapes, dtypes and exact strides of the outputs; imports no kernel.
        check: raises ValueError on wrong arguments; runs in the real and in the fake call. The operator's name is
            put before its message. It may depend on what ``limits`` may depend on, and on ``requires_grad``.
        implementations: GPU implementations, best first.
    """
    name = schema.partition("(")[0]
    operators[name] = tuple(implementations)
    table = {implementation.name: implementation for implementation in implementations}
    plans = Plans()
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))

    def checked(args: tuple, kwargs: dict) -> None:
        try:
            check(*args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{NAMESPACE}::{name}: {error}") from None

    @functools.cache
    def automatic(device: torch.device) -> list[Implementation]:
        usable = []
        for candidate in implementations:
            reason = candidate.unavailable(device)
            if reason is None:
                usable.append(candidate)
            else:
                _say_once(f"{reason}; the next implementation is used")
        return usable

    def choose(implementation: str | None, device: torch.device, args: tuple, kwargs: dict) -> Implementation | None:
        """The implementation for a call; None for the reference."""
        if implementation is None:
            if device.type == "cpu":
                return None
            reason = "no implementation is usable on this device"
            for candidate in automatic(device):
                reason = candidate.limits(*args, **kwargs) if candidate.limits else None
                if reason is None:
                    return candidate
                _say_once(f"{reason}; the next implementation is used")
            _say_once(f"{NAMESPACE}::{name} runs its PyTorch reference, which is slow: {reason}")
            return None
        if implementation == REFERENCE:
            return None
        expect(
            implementation in table,
            lambda: (
                f"{NAMESPACE}::{name} has no implementation {implementation!r}; it has {', '.join([*table, REFERENCE])}"
            ),
        )
        asked = table[implementation]
        reason = asked.unavailable(device) or (asked.limits(*args, **kwargs) if asked.limits else None)
        if reason is not None:
            raise ValueError(f"{NAMESPACE}::{name} was asked for implementation {implementation!r}: {reason}")
        return asked

    def real(*args: Any, **kwargs: Any) -> Any:
        launch = plans.find(args, kwargs)
        if launch is None:
            launch = first(*args, **kwargs)
            plans.keep(args, kwargs, launch)
        return launch(*args)

    def first(*args: Any, implementation: str | None = None, **kwargs: Any) -> Callable[..., Any]:
        """What to call with arguments like ``args``, for these options."""
        checked(args, kwargs)
        _begin_prepared()
        chosen = choose(implementation, args[0].device, args, kwargs)
        function = chosen.load() if chosen else reference
        if chosen is None or args[0].device.type != "cuda":
            return functools.partial(function, **kwargs)
        index = args[0].device.index
        with torch.cuda.device(index):
            if hasattr(function, "bind"):
                function = function.bind(*args, **kwargs)
            else:
                function = functools.partial(function, **kwargs)

        def launch(*args: Any) -> Any:
            if torch._C._cuda_getDevice() == index:
                return function(*args)
            with torch.cuda.device(index):
                return function(*args)

        return launch

    def abstract(*args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        checked(args, kwargs)
        return fake(*args, **kwargs)

    def preparing(*args: Any, implementation: str | None = None, **kwargs: Any) -> None:
        if args[0].device.type == "cuda":  # a graph may be looked at without a GPU
            chosen = choose(implementation, args[0].device, args, kwargs)
            if chosen is not None and "!" not in schema:  # what writes into its arguments is not called for nothing
                _rehearse(chosen.load, args, kwargs)

    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", abstract, lib=_library)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    _preparers[overload] = preparing

    def call(*args: Any, **kwargs: Any) -> Any:
        return overload(*args, **kwargs) if _intercepted() else real(*args, **kwargs)

    return call
