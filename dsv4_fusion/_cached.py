"""The match tables of graphs whose code Inductor keeps in its cache, beside it: on a hit no pass runs.

A table is found by what the code depends on: Dynamo's graph, its inputs' layouts, and the pass's own cache key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .report import Report

UNKNOWN = (
    "the code is out of Inductor's cache and nothing tells what was fused in it: run with "
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 to compile and match again, or see dsv4_fusion.explain(model, ...)"
)


class Table:
    """Where the report of one graph is kept.

    Args:
        folder: Inductor's cache.
        gm, example_inputs: as the backend gets them.
        settings: all else that the compiled code depends on, with stable reprs; None if it is not cached.
    """

    def __init__(
        self, folder: str, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: Any | None
    ) -> None:
        self.file = (
            None if settings is None else Path(folder, "dsv4_fusion", f"{_key(gm, example_inputs, settings)}.json")
        )

    def write(self, report: Report) -> None:
        """Keep it; a cache that cannot be written is no error."""
        if self.file is None:
            return
        part = self.file.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(report.as_dict()), encoding="utf-8")
            part.replace(self.file)

    def read(self) -> Report:
        """The report of when the code was compiled; one that says that there is none."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            if self.file is not None:
                report = Report.from_dict(json.loads(self.file.read_text(encoding="utf-8")))
                report.cached = True
                return report
        return Report(graphs=1, cached=True, notes=[UNKNOWN])


def _key(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: Any) -> str:
    codes = [module.code for module in gm.modules() if isinstance(module, torch.fx.GraphModule)]
    held = [(name, _layout(tensor)) for name, tensor in [*gm.named_parameters(), *gm.named_buffers()]]
    layouts = [_layout(value) for value in example_inputs]
    told = (codes, held, layouts, torch.is_grad_enabled(), settings)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _layout(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__, str(value)
    stride = value.stride() if value.layout is torch.strided else ()
    return str(value.dtype), str(tuple(value.shape)), str(tuple(stride)), str(value.device), value.requires_grad
