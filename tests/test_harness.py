"""What the benchmarks share, as far as it needs no GPU."""

from __future__ import annotations

import time

from benchmarks import _harness
from dsv4_fusion.ops._library import compiling


def test_timers_wait_for_all_that_compiles():
    running = [compiling().submit(time.sleep, 0.2) for _ in range(2 * compiling()._max_workers)]
    _harness.settle()
    assert all(future.done() for future in running)
