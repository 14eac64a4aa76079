"""What all tests share: those marked ``gpu`` are skipped where there is no CUDA device."""

import gc
import logging

import pytest
import torch

from benchmarks import _harness

# pytest puts its handlers on loggers that don't propagate, and a handler on this one turns Dynamo's structured trace
# on: thousands of records a compilation, printed under every failure.
logging.getLogger("torch.__trace").propagate = True
_harness.resolve_math()
gc.set_threshold(50_000, 20, 100)  # graphs are millions of objects that live: a fifth of the time went into looking


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
