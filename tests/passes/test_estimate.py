"""The estimate of kernels and bytes, on graphs for which both can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dsv4_fusion.passes._estimate import estimate

X, W = torch.Size([8, 16]), torch.Size([16, 32])
SIZE, OUT = 4 * X.numel(), 4 * 8 * 32


def cost(function: Callable, *shapes: torch.Size) -> tuple[int, int]:
    with FakeTensorMode():
        graph = make_fx(function, select_decomp_table())(*map(torch.empty, shapes)).graph
    return estimate(graph.nodes, graph.output_node().all_input_nodes)


@pytest.mark.parametrize(
    ("function", "shapes", "kernels", "moved"),
    [
        (lambda x: x.view(16, 8).t(), [X], 0, 0),
        (lambda x: (x + 1).exp() * 2, [X], 1, 2 * SIZE),
        (lambda x: (x + 1, x * 2), [X], 2, 4 * SIZE),
        (lambda x: x.sum(-1), [X], 1, SIZE + 4 * 8),
        (lambda x: torch.softmax(x, -1), [X], 1, 2 * SIZE + 2 * 4 * 8),  # with its row's maximum and sum
        # Reductions over different dimensions are two kernels; the sum of both is computed in the second.
        (lambda x: x.sum(-1, keepdim=True) + x.sum(0, keepdim=True), [X], 2, 3 * SIZE + 4 * (8 + 8 + 16)),
        (lambda x, w: (x @ w).relu(), [X, W], 2, SIZE + 4 * W.numel() + 3 * OUT),
        (lambda x, w: (x + 1) @ w, [X, W], 2, 3 * SIZE + 4 * W.numel() + OUT),
        (lambda x: x[:, :4] * 2, [X], 1, 2 * SIZE // 4),  # a view reads no more than itself
    ],
)
def test_by_hand(function, shapes, kernels, moved):
    assert cost(function, *shapes) == (kernels, moved)


def test_a_part_of_a_graph():
    with FakeTensorMode():
        graph = make_fx(lambda x: ((x + 1) * 2).sum(-1))(torch.empty(X)).graph
    add, mul, total = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)[0], None, None
    (mul,) = add.users
    (total,) = mul.users
    assert estimate([add, mul], [mul]) == (1, 2 * SIZE)
    assert estimate([total], [total]) == (1, SIZE + 4 * 8)
    assert estimate([add, mul, total], [total]) == (1, SIZE + 4 * 8)
