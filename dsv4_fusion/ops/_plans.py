"""What was found out for a call, remembered for calls with the same metadata.

A launch-bound user pays for every microsecond before a launch. Comparing metadata in Python takes longer than the rest
of a call, so it is left to the guards that Dynamo's compiled code begins with: one call in C++ compares the dtypes,
devices, shapes, strides and dispatch keys of all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards

ALIGNMENT = 16  # bytes: the longest load of a kernel
REMEMBERED = 4096  # plans, an operator
ALIKE = 64  # of them with the same key, among which guards choose
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_data_ptr, _is_grad_enabled = torch.Tensor.data_ptr, torch.is_grad_enabled


class _Form:
    """Of a call: which of its positional arguments are tensors; and the plans for calls of this form."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.known = not any(issubclass(kind, torch.Tensor) and kind not in _TENSORS for kind in kinds)
        self.tensors = [i for i, kind in enumerate(kinds) if kind in _TENSORS]
        self.others = [i for i, kind in enumerate(kinds) if kind not in (*_TENSORS, type(None))]
        self.plans: dict[tuple, list[tuple[TensorGuards, Any]]] = {}


class Plans:
    """Of one operator: ``find`` a plan for a call, or ``keep`` one for calls like it.

    Calls are alike if nothing differs but the values in tensors and their addresses modulo :data:`ALIGNMENT`. Those
    with a tensor of a kind whose metadata does not tell all are like no other.
    """

    def __init__(self) -> None:
        self._forms: dict[tuple[type, ...], _Form] = {}
        self._count = 0

    def _key(self, form: _Form, tensors: Sequence[torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> tuple:
        """What is compared before the guards."""
        places: Any = 0
        for place in map(_data_ptr, tensors):
            places |= place
        places %= ALIGNMENT
        if places:  # rare: which of them
            places = tuple([tensor.data_ptr() % ALIGNMENT for tensor in tensors])
        if form.others:
            kwargs = {**kwargs, "": tuple([args[i] for i in form.others])}
        return (tensors[0].shape if tensors else None, places, _is_grad_enabled(), *kwargs.items())

    def find(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What was kept for a call like this one, or None."""
        form = self._forms.get(tuple(map(type, args)))
        if form is None:
            return None
        tensors = args if len(form.tensors) == len(args) else [args[i] for i in form.tensors]
        alike = form.plans.get(self._key(form, tensors, args, kwargs), ())
        for index, (guards, plan) in enumerate(alike):
            if guards.check(*tensors):
                if index:  # it will be asked for again
                    alike.insert(0, alike.pop(index))
                return plan
        return None

    def keep(self, args: tuple, kwargs: dict[str, Any], plan: Any) -> None:
        """``plan`` for calls like this one."""
        kinds = tuple(map(type, args))
        form = self._forms.setdefault(kinds, _Form(kinds))
        if not form.known:
            return
        if self._count >= REMEMBERED:
            self._forms = {kinds: _Form(kinds)}
            self._count, form = 0, self._forms[kinds]
        tensors = [args[i] for i in form.tensors]
        shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
        alike = form.plans.setdefault(self._key(form, tensors, args, kwargs), [])
        alike.insert(0, (guards, plan))
        self._count += 1 - len(alike[ALIKE:])
        del alike[ALIKE:]
