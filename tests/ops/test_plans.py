"""What is remembered of a call, and for which calls."""

from __future__ import annotations

import pytest
import torch

from dsv4_fusion.ops import _plans

OPTIONS = {"eps": 1e-6, "implementation": None}


def tensors() -> tuple:
    return torch.ones(4, 8), None, torch.ones(8, dtype=torch.bfloat16), torch.zeros(64)[:16]


@pytest.fixture
def plans() -> _plans.Plans:
    found = _plans.Plans()
    assert found.find(tensors(), OPTIONS) is None
    found.keep(tensors(), OPTIONS, "kept")
    return found


def test_other_values_are_like_it(plans):
    args = tensors()
    args[0].mul_(3)
    assert plans.find(args, dict(OPTIONS)) == "kept"


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, lambda x: torch.ones(5, 8)),
        (0, lambda x: x.double()),
        (0, lambda x: torch.ones(8, 4).t()),
        (0, lambda x: x.to("meta")),
        (0, lambda x: torch.nn.Parameter(x)),
        (0, lambda x: None),
        (0, lambda x: torch.ones(33)[1:].view(4, 8)),  # not at a multiple of 16 bytes
        (1, lambda x: torch.ones(8)),
        (1, lambda x: 1.0),
        (2, lambda x: torch.ones(9, dtype=torch.bfloat16)),
        (2, lambda x: x.requires_grad_()),
        (3, lambda x: torch.zeros(64)[:32:2]),
    ],
)
def test_another_tensor_is_not(plans, index, change):
    args = list(tensors())
    args[index] = change(args[index])
    assert plans.find(tuple(args), OPTIONS) is None
    plans.keep(tuple(args), OPTIONS, "another")
    assert plans.find(tensors(), OPTIONS) == "kept"


def test_another_option_or_mode_is_not(plans):
    assert plans.find(tensors(), {**OPTIONS, "eps": 1e-5}) is None
    assert plans.find(tensors(), {"eps": 1e-6}) is None
    assert plans.find(tensors()[:3], OPTIONS) is None
    with torch.no_grad():
        assert plans.find(tensors(), OPTIONS) is None
    with torch.inference_mode():
        assert plans.find(tensors(), OPTIONS) is None


def test_values_between_tensors_are_compared():
    plans = _plans.Plans()
    plans.keep((torch.ones(2), 3), {}, "three")
    assert plans.find((torch.ones(2), 3), {}) == "three"
    assert plans.find((torch.ones(2), 4), {}) is None


def test_a_tensor_of_another_class_is_never_remembered():
    class Labelled(torch.Tensor):
        pass

    plans, args = _plans.Plans(), (torch.ones(2).as_subclass(Labelled),)
    plans.keep(args, {}, "kept")
    assert plans.find(args, {}) is None


def test_the_latest_among_like_ones_come_first(plans, monkeypatch):
    monkeypatch.setattr(_plans, "ALIKE", 2)
    for rows in (3, 5, 7):  # the first tensor, which the key holds, stays
        plans.keep((torch.ones(4, 8), torch.ones(rows)), {}, rows)
    found = [plans.find((torch.ones(4, 8), torch.ones(rows)), {}) for rows in (3, 5, 7, 5)]
    assert found == [None, 5, 7, 5]


def test_no_more_are_kept_than_allowed(plans, monkeypatch):
    monkeypatch.setattr(_plans, "REMEMBERED", 3)
    for rows in (5, 6):
        plans.keep((torch.ones(rows),), {}, rows)
    assert plans.find(tensors(), OPTIONS) == "kept"
    plans.keep((torch.ones(7),), {}, 7)
    assert plans.find(tensors(), OPTIONS) is None and plans.find((torch.ones(7),), {}) == 7
