"""What ``python -m dsv4_fusion warmup`` does: compile every kernel that a model's fused operators can need.

The calls are read off the model itself, one layer of each kind, traced on the meta device: a prompt, and what follows
on it with a cache. The number of tokens there has a large prime in it, and what that divides is a size that depends on
the tokens. Then each call is made on the GPU with few tokens and with many, in processes of its own, which leaves the
compiled code in the languages' caches on disk.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from .backend import explained
from .ops import _library

PRIME = 521  # divides no size of a model
TRACED = 128 * PRIME  # tokens: windows come out even
NOT_KEPT = ("cutedsl",)  # the languages whose compiled code is not kept on disk


@dataclass(frozen=True)
class Tensor:
    """A tensor argument. A size or stride is (n, 0), a constant, or (n, m): n for every m tokens."""

    shape: tuple[tuple[int, int], ...]
    stride: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    def make(self, tokens: int, device: str) -> torch.Tensor:
        shape, stride = ([n * tokens // m if m else n for n, m in sizes] for sizes in (self.shape, self.stride))
        return torch.empty_strided(shape, stride, dtype=self.dtype, device=device).zero_()


@dataclass(frozen=True)
class Call:
    """One operator with arguments of one kind; a token count makes it a call."""

    operator: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def arguments(self, tokens: int, device: str) -> list[Any]:
        """For so many tokens, or the few more that make whole windows."""
        tensors = [arg for arg in self.args if isinstance(arg, Tensor)]
        window = math.lcm(*(m for tensor in tensors for _, m in tensor.shape if m))
        tokens = -(-tokens // window) * window
        return [arg.make(tokens, device) if isinstance(arg, Tensor) else arg for arg in self.args]

    def __call__(self, tokens: int, device: str) -> Any:
        return getattr(torch.ops.dsv4, self.operator)(*self.arguments(tokens, device), **dict(self.kwargs))


def token_counts(largest: int) -> list[int]:
    """Token counts between which no operator changes its kernels: the powers of two, and the largest itself."""
    return sorted({largest} | {2**i for i in range(largest.bit_length())})


def calls(net: torch.nn.Module) -> list[Call]:
    """The different calls of operators in the fused model, which is on the meta device and loses layers."""
    net.model.layers = net.model.layers[: _one_of_each(net.config)]
    prompt = torch.zeros(1, TRACED, dtype=torch.long, device="meta")
    kept = list(_library._prepared)
    _library._prepared.clear()
    try:
        explained(net, (prompt,), {"use_cache": False}, draw=False)
        with torch.no_grad():
            cache = net(prompt, use_cache=True).past_key_values
        explained(net, (prompt,), {"past_key_values": cache, "use_cache": True}, draw=False)
        found = list(_library._prepared)
    finally:
        _library._prepared[:] = kept
    names = {preparer: overload for overload, preparer in _library._preparers.items()}
    made: dict[Call, None] = {}
    entry: Any  # a functools.partial
    for entry in found:
        operator = names[entry.func]._schema.name.partition("::")[2]
        args = tuple(_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in entry.args)
        made[Call(operator, args, tuple(sorted(entry.keywords.items())))] = None
    return list(made)


def _one_of_each(config: Any) -> int:
    """How many of the first layers hold every kind of layer."""
    kinds = list(zip(config.layer_types, config.mlp_layer_types, strict=True))
    return max(kinds.index(kind) + 1 for kind in set(kinds))


def _tensor(value: torch.Tensor) -> Tensor:
    def sizes(numbers: Any) -> tuple[tuple[int, int], ...]:
        parts = [Fraction(int(n), TRACED) if n and n % PRIME == 0 else int(n) for n in numbers]
        return tuple((n.numerator, n.denominator) if isinstance(n, Fraction) else (n, 0) for n in parts)

    return Tensor(sizes(value.shape), sizes(value.stride()), value.dtype)


def warm(
    work: list[Call], largest: int, jobs: int, done: Callable[[dict[str, Any]], None], device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """Compile, ``jobs`` calls at a time; yields what became of each as it is ready, after ``done`` has had it."""
    counts = token_counts(largest)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(min(jobs, len(work)) or 1, mp_context=context, initializer=_quiet) as pool:
        for future in as_completed([pool.submit(compile_call, call, counts, device) for call in work]):
            result = future.result()
            done(result)
            yield result


def _quiet() -> None:
    """What compilers print goes to stderr: the command's own output may be JSON."""
    os.dup2(2, 1)


def compile_call(call: Call, counts: list[int], device: str = "cuda") -> dict[str, Any]:
    """Make the call with every token count; says which implementation it got, how long it took, and what went wrong."""
    started, problem = time.monotonic(), None
    try:
        for tokens in counts:
            call(tokens, device)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # a compiler's own kinds
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    implementation = chosen(call, torch.device(device))
    return {
        "operator": call.operator,
        "implementation": implementation,
        "kept": implementation not in NOT_KEPT,
        "seconds": round(time.monotonic() - started, 1),
        "problem": problem,
    }


def chosen(call: Call, device: torch.device) -> str:
    """The implementation that the call gets on the device."""
    args = call.arguments(1, "meta")
    kwargs = {name: value for name, value in call.kwargs if name != "implementation"}
    asked = dict(call.kwargs).get("implementation")
    if asked is not None or device.type == "cpu":
        return asked or _library.REFERENCE
    for candidate in _library.operators[call.operator]:
        if candidate.unavailable(device) is None and not (candidate.limits and candidate.limits(*args, **kwargs)):
            return candidate.name
    return _library.REFERENCE
