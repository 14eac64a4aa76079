"""Triton's interpreter, for the scripts that compare interpreted kernels: in less time, and with the hardware's fma."""

from __future__ import annotations

import numpy as np


def patch_once_a_launch() -> None:
    """Call it before the first launch.

    A launch puts the interpreter's functions into ``triton.language``; every call of a jitted function does so again,
    in vain, and that takes a third of the time.
    """
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_patch_lang_tensor", "GridExecutor")):
        return  # another release, as slow as it is
    _patch_index(interpreter)
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        if function not in patched:
            patched.add(function)
            return patch(function)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


def _patch_index(interpreter) -> None:
    """Let a tensor be a loop's bound, as in Triton 3.7: 3.6 makes a number of an array [1], which NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = with_index


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a · b + c of fp32 numbers, rounded once: the product is exact in float64, the sum is rounded to odd there."""
    with np.errstate(all="ignore"):
        product, c = np.float64(a) * np.float64(b), np.float64(c)
        total = np.asarray(product + c)
        back = total - product
        lost = (product - (total - back)) + (c - back)
        bits = total.view(np.int64)
        even = (np.abs(lost) > 0) & (bits & 1 == 0)
        bits = bits + np.where((lost > 0) == (total > 0), 1, -1) * even
        return bits.view(np.float64).astype(np.float32)


def patch_fma() -> None:
    """Round fp32 ``tl.fma`` once, as GPUs do; the interpreter rounds the product too. Call it before any launch."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    as_it_was = builder.create_fma

    def create_fma(self, x, y, z):
        if z.data.dtype != np.float32:
            return as_it_was(self, x, y, z)
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    builder.create_fma = create_fma
