"""Zeroed counters for kernels whose programs count who arrives last, and who sets them to zero again.

So no launch has to clear them. Calls of one stream follow each other and share theirs. Graphs may be replayed side by
side: a call that is captured has counters of its own, for good.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

STREAM = 1 << 15  # counters of a stream
TOTAL = 1 << 20  # of a device


def _zeros(device: torch.device) -> Tensor:
    result = torch.zeros(TOTAL, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()  # once: any stream may use them
    return result


_left: dict[torch.device, Tensor] = {}  # counters that nobody has yet


def _take(device: torch.device, count: int) -> Tensor | None:
    left = _left[device]
    if left.numel() < count:
        return None
    _left[device] = left[count:]
    return left[:count]


@functools.cache
def _of_stream(device: torch.device, stream: int) -> Tensor | None:
    if device not in _left:
        # Memory that one thread allocates may belong to a graph that it prepares; that of another thread does not
        with ThreadPoolExecutor(1) as thread:
            _left[device] = thread.submit(_zeros, device).result()
    return _take(device, STREAM)


def zeroed(count: int, device: torch.device) -> Tensor:
    """At least ``count`` int32 that are zero, for a launch on the current stream that leaves them zero.

    Where there are none left, or a graph is captured before the first call, they are cleared each time.
    """
    kept = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            kept = _take(device, count) if device in _left else None
        elif count <= STREAM:
            kept = _of_stream(device, torch._C._cuda_getCurrentRawStream(device.index))
    return torch.zeros(count, dtype=torch.int32, device=device) if kept is None else kept
