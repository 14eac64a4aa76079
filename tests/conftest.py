"""What all tests share: those marked ``gpu`` are skipped where there is no CUDA device."""

import logging

import pytest
import torch

# pytest puts its handlers on loggers that don't propagate, and a handler on this one turns Dynamo's structured trace
# on: thousands of records a compilation, printed under every failure.
logging.getLogger("torch.__trace").propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
