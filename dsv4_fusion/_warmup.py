"""What ``python -m dsv4_fusion warmup`` does: compile every kernel that a model's fused operators can need.

The calls are read off the model itself, traced on the meta device with a number of tokens that is a large prime: what
that prime divides is a size that depends on the tokens. Then each call is made on the GPU with few tokens and with
many, in processes of its own, which leaves the compiled code in the languages' caches on disk.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from .backend import explain
from .ops import _library

TRACED = 521  # tokens; a prime that divides no size of a model
NOT_KEPT = ("cutedsl",)  # the languages whose compiled code is not kept on disk


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: every size and stride as (factor, whether it is multiplied by the number of tokens)."""

    shape: tuple[tuple[int, bool], ...]
    stride: tuple[tuple[int, bool], ...]
    dtype: torch.dtype

    def make(self, tokens: int, device: str) -> torch.Tensor:
        shape, stride = ([n * tokens if many else n for n, many in sizes] for sizes in (self.shape, self.stride))
        return torch.empty_strided(shape, stride, dtype=self.dtype, device=device).zero_()


@dataclass(frozen=True)
class Call:
    """One operator with arguments of one kind; a token count makes it a call."""

    operator: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, tokens: int, device: str) -> Any:
        args = [arg.make(tokens, device) if isinstance(arg, Tensor) else arg for arg in self.args]
        return getattr(torch.ops.dsv4, self.operator)(*args, **dict(self.kwargs))


def token_counts(largest: int) -> list[int]:
    """Token counts between which no operator changes its kernels: the powers of two, and the largest itself."""
    return sorted({largest} | {2**i for i in range(largest.bit_length())})


def calls(net: torch.nn.Module) -> list[Call]:
    """The different calls of operators in the fused model, which is on the meta device."""
    kept = list(_library._prepared)
    _library._prepared.clear()
    try:
        explain(net, torch.zeros(1, TRACED, dtype=torch.long, device="meta"), use_cache=False)
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


def _tensor(value: torch.Tensor) -> Tensor:
    def sizes(numbers: Any) -> tuple[tuple[int, bool], ...]:
        return tuple((n // TRACED, True) if n and n % TRACED == 0 else (int(n), False) for n in numbers)

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
    args = [arg.make(1, "meta") if isinstance(arg, Tensor) else arg for arg in call.args]
    kwargs = {name: value for name, value in call.kwargs if name != "implementation"}
    asked = dict(call.kwargs).get("implementation")
    if asked is not None or device.type == "cpu":
        return asked or _library.REFERENCE
    for candidate in _library.operators[call.operator]:
        if candidate.unavailable(device) is None and not (candidate.limits and candidate.limits(*args, **kwargs)):
            return candidate.name
    return _library.REFERENCE
