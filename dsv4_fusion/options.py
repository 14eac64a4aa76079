"""The options of the backend, validated when they are made."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMPLEMENTATIONS = ("triton", "tilelang", "cutedsl", "reference")
FP8_LINEAR = ("batch_invariant",)
INDEXERS = ("fp8", "fp4")


@dataclass(frozen=True)
class FusionOptions:
    """Options of ``backend="dsv4_fusion"``.

    Attributes:
        strict: False; True to raise when a compiled graph has no fused site, or a number to raise when it has fewer.
        reference: rewrite on the CPU too, to the operators' PyTorch references. They are slower than Inductor's own
            CPU code, so that without this the CPU's matches are reported and left to Inductor.
        implementation: the kernels to use, by name ("triton", "tilelang", "cutedsl", "reference"); an operator that
            has none by that name, or cannot use it here, raises. None chooses the best that is usable.
        fp8_linear: "batch_invariant" replaces linear layers with FP8 weights by ``dsv4::fp8_linear``, whose results do
            not depend on the batch; activations that are not quantised yet are quantised then. None touches none.
        indexer: "fp8" or "fp4" quantises the indexer's queries and keys where the model does not, after a Hadamard
            transform of both: faster, and other keys may be chosen. None keeps the model's precision.
        dump: a folder for the graphs before and after, the matches and the patterns; None takes the environment
            variable ``DSV4_FUSION_DUMP``, and dumps nothing if that is not set either. With it Inductor's caches are
            neither read nor written, because code out of a cache was fused earlier and has nothing to dump.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """

    strict: bool | int = False
    reference: bool = False
    implementation: str | None = None
    fp8_linear: str | None = None
    indexer: str | None = None
    dump: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.strict, int) or self.strict < 0:
            raise ValueError(f"option strict: got {self.strict!r}, expected True, False or a number of sites")
        if not isinstance(self.reference, bool):
            raise ValueError(f"option reference: got {self.reference!r}, expected True or False")
        if self.implementation is not None and self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"option implementation: got {self.implementation!r}, "
                f"expected None or one of {', '.join(IMPLEMENTATIONS)}"
            )
        if self.fp8_linear is not None and self.fp8_linear not in FP8_LINEAR:
            raise ValueError(
                f"option fp8_linear: got {self.fp8_linear!r}, expected None or one of {', '.join(FP8_LINEAR)}"
            )
        if self.indexer is not None and self.indexer not in INDEXERS:
            raise ValueError(f"option indexer: got {self.indexer!r}, expected None or one of {', '.join(INDEXERS)}")
        if self.dump is not None and not (isinstance(self.dump, str | os.PathLike) and _is_folder(self.dump)):
            raise ValueError(f"option dump: got {self.dump!r}, expected None or a folder's path, a str or os.PathLike")

    @property
    def dump_folder(self) -> str | None:
        """Where to dump: the option, else the environment variable, else None."""
        return os.environ.get("DSV4_FUSION_DUMP") or None if self.dump is None else os.fspath(self.dump)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def split(cls, options: Mapping[str, Any] | None) -> tuple[FusionOptions, dict[str, Any]]:
        """Take our options out of a mapping; what is left is Inductor's."""
        rest = dict(options or {})
        ours = {name: rest.pop(name) for name in cls.names() if name in rest}
        return cls(**ours), rest


def _is_folder(path: str | os.PathLike[Any]) -> bool:
    """Whether it can be a folder's path; whether it can be written to is seen, and warned of, at the first graph."""
    text = os.fspath(path)
    return isinstance(text, str) and text != "" and "\0" not in text


def unknown_option(name: str, inductor: list[str]) -> ValueError:
    """The error for an option neither we nor Inductor know."""
    close = difflib.get_close_matches(name, [*FusionOptions.names(), *inductor], n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return ValueError(
        f"unknown option {name!r}.{hint} dsv4_fusion's options are {', '.join(FusionOptions.names())}; "
        "all others go to Inductor (torch._inductor.list_options())"
    )
