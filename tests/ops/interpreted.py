"""Triton's interpreter, for the scripts that compare interpreted kernels: the same steps in less time."""

from __future__ import annotations


def patch_once_a_launch() -> None:
    """Call it before the first launch.

    A launch puts the interpreter's functions into ``triton.language``; every call of a jitted function does so again,
    in vain, and that takes a third of the time.
    """
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "GridExecutor")):
        return  # another release, as slow as it is
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        if function not in patched:
            patched.add(function)
            return patch(function)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh
