"""The options of the backend, validated when they are made."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMPLEMENTATIONS = ("triton", "tilelang", "cutedsl", "reference")


@dataclass(frozen=True)
class FusionOptions:
    """Options of ``backend="dsv4_fusion"``.

    Attributes:
        strict: False; True to raise when a compiled graph has no fused site, or a number to raise when it has fewer.
        reference: rewrite on the CPU too, to the operators' PyTorch references. They are slower than Inductor's own
            CPU code, so that without this the CPU's matches are reported and left to Inductor.
        implementation: the kernels to use, by name ("triton", "tilelang", "cutedsl", "reference"); an operator that
            has none by that name, or cannot use it here, raises. None chooses the best that is usable.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """

    strict: bool | int = False
    reference: bool = False
    implementation: str | None = None

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

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def split(cls, options: Mapping[str, Any] | None) -> tuple[FusionOptions, dict[str, Any]]:
        """Take our options out of a mapping; what is left is Inductor's."""
        rest = dict(options or {})
        ours = {name: rest.pop(name) for name in cls.names() if name in rest}
        return cls(**ours), rest


def unknown_option(name: str, inductor: list[str]) -> ValueError:
    """The error for an option neither we nor Inductor know."""
    close = difflib.get_close_matches(name, [*FusionOptions.names(), *inductor], n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return ValueError(
        f"unknown option {name!r}.{hint} dsv4_fusion's options are {', '.join(FusionOptions.names())}; "
        "all others go to Inductor (torch._inductor.list_options())"
    )
