"""Hugging Face's choice of keys becomes one operator; what nearly is that choice does not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4_fusion.options import FusionOptions
from dsv4_fusion.report import Report

modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

DIM, LORA, HEADS = 48, 24, 4


@pytest.fixture(autouse=True)
def constant_floats():
    """PyTorch makes symbols of a dynamic graph's floats, and when it gives up on them it traces everything again."""
    with torch._dynamo.config.patch(specialize_float=True):
        yield


def run(
    function: Callable, *args, dynamic: bool | None = None, compressor: bool = False, **options
) -> tuple[Report, Tensor]:
    """The report of one graph, and what the graph computes after the pass, without code generation.

    The keys' compressor is fused only where asked for: it rounds less than eager, and the choice is of other keys then.
    """
    from dsv4_fusion.backend import _compile
    from dsv4_fusion.passes import _manager
    from dsv4_fusion.passes import compressor as compressors

    reports: list[Report] = []

    def backend(gm, inputs):
        return _compile(gm, inputs, FusionOptions(reference=True, **options), {}, reports.append, run_graph=True)

    searched = [each for each in _manager.COMPUTATIONS if compressor or each not in compressors.COMPUTATIONS]
    torch._dynamo.reset()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_manager, "COMPUTATIONS", tuple(searched))
        result = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    torch._dynamo.reset()
    (report,) = reports
    return report, result


@functools.cache
def indexer(d: int = 64, top_k: int = 6) -> nn.Module:
    from examples.model import SIZES

    sizes = {"hidden_size": DIM, "q_lora_rank": LORA, "index_head_dim": d, "index_n_heads": HEADS, "index_topk": top_k}
    config = modeling.DeepseekV4Config(num_hidden_layers=1, **SIZES["tiny"] | sizes)
    torch.manual_seed(0)
    net = modeling.DeepseekV4Indexer(config).bfloat16().requires_grad_(False)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def inputs(batch: int, length: int, rows: int = 1, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(batch + length)
    hidden, lora = torch.randn(batch, length, DIM).bfloat16(), torch.randn(batch, length, LORA).bfloat16()
    return hidden, lora, (torch.arange(length) + first).expand(rows, -1)


def scores_of(net: nn.Module, given: tuple, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The eager fp32 scores and those in float64, −inf where a query sees nothing."""
    found = []

    def scored(q: Tensor, compressed: Tensor, hidden: Tensor) -> Tensor:
        weights = net.scorer.weights_proj(hidden).double() * net.scorer.weights_scaling * net.scorer.softmax_scale
        product = torch.einsum("bshd,btd->bsht", q.double(), compressed.double()).relu()
        found[:] = net.scorer(q, compressed, hidden), (product * weights.unsqueeze(-1)).sum(2)
        return found[0]

    stand_in = copy.copy(net)
    stand_in._modules = {name: module for name, module in net._modules.items() if name != "scorer"}
    object.__setattr__(stand_in, "scorer", scored)
    modeling.DeepseekV4Indexer.forward(stand_in, *given, k, 0)
    seen = torch.arange(found[0].shape[-1]) < ((given[2] + 1) // net.compress_rate).unsqueeze(-1)
    return tuple(value.masked_fill(~seen, -torch.inf) for value in found[:2])


def assert_same_choice(ours: Tensor, eager: Tensor, net: nn.Module, given: tuple) -> None:
    """The same sets, but for scores that differ by no more than fp32's rounding; and −1 in the same places."""
    assert ours.shape == eager.shape and ours.dtype == eager.dtype
    assert torch.equal(ours < 0, eager < 0)
    _, exact = scores_of(net, given)
    padded = F.pad(exact, (0, 1))  # the last column stands for −1
    best_ours, best_eager = (padded.gather(-1, chosen % padded.shape[-1]) for chosen in (ours, eager))
    torch.testing.assert_close(best_ours, best_eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("batch", "rows", "length"), [(1, 1, 40), (2, 1, 40), (2, 2, 33), (2, 1, 8), (1, 1, 4), (2, 1, 20)]
)
def test_the_choice_is_one_operator(batch, rows, length, d):
    """More entries than are chosen, as many, fewer, one."""
    net, given = indexer(d), inputs(batch, length, rows)
    report, ours = run(lambda *tensors: net(*tensors, None, 0), *given)
    assert report.counts == {"indexer_topk": 1}, report
    assert not report.near_misses and not report.left_alone
    assert_same_choice(ours, net(*given, None, 0), net, given)


def test_beside_the_keys_compressor():
    net, given = indexer(), inputs(2, 40)
    report, ours = run(lambda *tensors: net(*tensors, None, 0), *given, compressor=True)
    assert report.counts == {"indexer_topk": 1, "compress_csa": 1}, report
    assert not report.near_misses and not report.left_alone, report
    assert torch.equal(ours < 0, net(*given, None, 0) < 0)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 1), (3, 3)])
def test_dynamic_shapes(batch, rows):
    net, given = indexer(), inputs(batch, 40, rows)
    report, ours = run(lambda *tensors: net(*tensors, None, 0), *given, dynamic=True)
    assert report.counts == {"indexer_topk": 1}, report
    assert_same_choice(ours, net(*given, None, 0), net, given)


class Cache:
    """A cache's layer with keys already in it, as far as the indexer uses one."""

    def __init__(self, k: Tensor) -> None:
        self.k, self.layers = k, [self]

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        return kv[:, :0], gate[:, :0], 0

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        return torch.cat([self.k, compressed], 1)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_decode_with_a_cache(batch, dynamic):
    net, (hidden, lora, positions) = indexer(), inputs(batch, 1, batch, 90)
    k = torch.randn(batch, 22, 64).bfloat16()

    def step(hidden, lora, positions, k):
        return net(hidden, lora, positions, Cache(k), 0)

    report, ours = run(step, hidden, lora, positions, k, dynamic=dynamic)
    assert report.counts == {"indexer_topk": 1}, report
    eager = step(hidden, lora, positions, k)
    assert ours.shape == eager.shape and torch.equal(ours.sort().values, eager.sort().values)


@functools.cache
def nodes_of_the_plain_site(batch: int) -> int:
    net = indexer(128)
    report, _ = run(lambda *tensors: net(*tensors, None, 0), *inputs(batch, 96))
    return report.sites[0].nodes


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("format", ["fp8", "fp4"])
def test_quantised_where_asked_for(format, batch):
    """RoPE is part of the operator then; most of the choice stays."""
    net, given = indexer(128), inputs(batch, 96)
    report, ours = run(lambda *tensors: net(*tensors, None, 0), *given, indexer=format)
    assert report.counts == {"indexer_topk": 1}, report
    assert report.sites[0].nodes > nodes_of_the_plain_site(batch) + 10
    eager = net(*given, None, 0)
    assert torch.equal(ours < 0, eager < 0)
    same = (ours.unsqueeze(-1) == eager.unsqueeze(-2)).any(-1)[eager >= 0].float().mean()
    assert same > (0.93 if format == "fp8" else 0.8), same
    assert not torch.equal(ours, eager)


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="option indexer: got 'int4', expected None or one of fp8, fp4"):
        FusionOptions(indexer="int4")


def test_fp32_is_left_alone():
    net, given = indexer(), inputs(2, 40)
    wide = copy.deepcopy(net).float()
    report, _ = run(lambda *tensors: wide(*tensors, None, 0), *(t.float() for t in given[:2]), given[2])
    assert not report.sites and len(report.left_alone) == 1
    assert "indexer_topk takes bf16 heads" in report.left_alone[0].reason


# Near misses


def tail(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    positions: Tensor,
    *,
    add: int = 1,
    compare: Callable = torch.ge,
    fill: float = float("-inf"),
    sentinel: int = -1,
    largest: bool = True,
    order: bool = True,
    keep: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """The choice again from rotated queries [B, H, S, d], with parts to exchange."""
    q = torch.cat([q[..., :32], q[..., 32:] * 2], -1).transpose(1, 2)
    scores = F.relu(torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1))) * 64**-0.5
    scores = (scores * (weights.float() * HEADS**-0.5).unsqueeze(-1)).sum(2)
    closed = (positions + add) // 4
    future = compare(torch.arange(k.shape[1], device=q.device).view(1, 1, -1), closed.unsqueeze(-1))
    masked = scores.masked_fill(future, fill)
    best = masked.topk(6, dim=-1, largest=largest, sorted=order).indices
    chosen = torch.where(best >= closed.unsqueeze(-1), torch.full_like(best, sentinel), best)
    kept = {"scores": scores, "masked": masked, "closed": closed, "best": best}.get(keep)
    return chosen if kept is None else (chosen, kept * 2)


def tail_inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k = torch.randn(2, HEADS, 40, 64).bfloat16(), torch.randn(2, 10, 64).bfloat16()
    return q, k, torch.randn(2, 40, HEADS).bfloat16(), torch.arange(40).expand(2, -1)


def test_the_exchangeable_form_matches_unchanged():
    report, ours = run(lambda *tensors: tail(*tensors), *tail_inputs())
    assert report.counts == {"indexer_topk": 1}, report
    eager = tail(*tail_inputs())
    assert torch.equal(ours < 0, eager < 0)
    scores = tail(*tail_inputs(), keep="scores")[1]
    best_ours, best_eager = (scores.gather(-1, chosen.clamp(min=0)) for chosen in (ours, eager))
    torch.testing.assert_close(best_ours, best_eager, rtol=1e-5, atol=1e-5)  # relu makes exact ties of 0


NEAR_MISSES = {
    "positions that count from one": ({"add": 2}, "expected 1 among its arguments, found 2"),
    "the open window is seen": ({"compare": torch.gt}, "expected aten.ge.Tensor"),
    "a finite fill": ({"fill": -1e9}, "expected -inf among its arguments, found -1000000000.0"),
    "another sentinel": ({"sentinel": -2}, "expected -1 among its arguments, found -2"),
    "the smallest scores": ({"largest": False}, "expected"),
    "in any order": ({"order": False}, "expected"),
    "scores used elsewhere": ({"keep": "scores"}, "is used outside the pattern too"),
    "masked scores used elsewhere": ({"keep": "masked"}, "is used outside the pattern too"),
    "the limit used elsewhere": ({"keep": "closed"}, "is used outside the pattern too"),
    "the raw choice used elsewhere": ({"keep": "best"}, "is used outside the pattern too"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_nearly_matches_is_left_alone_and_explained(name):
    changes, reason = NEAR_MISSES[name]
    report, got = run(lambda *tensors: tail(*tensors, **changes), *tail_inputs())
    assert not report.counts, report
    (miss,) = report.near_misses
    assert miss.fusion == "indexer_topk" and reason in miss.reason, miss
    expected = tail(*tail_inputs(), **changes)
    got, expected = ((value,) if isinstance(value, Tensor) else value for value in (got, expected))
    assert all(torch.equal(ours, eager) for ours, eager in zip(got, expected, strict=True))


def test_what_a_replacement_is_made_of_is_no_site(monkeypatch):
    """The keys are quantised in front of the operator, in the form of what would be a site in a model's own code."""
    from dsv4_fusion.passes import _manager
    from dsv4_fusion.passes.indexer import _amax_unplaced

    graphs, replace = [], _manager._replace

    def kept(graph, match, replacement):
        graphs.append(graph)
        return replace(graph, match, replacement)

    monkeypatch.setattr(_manager, "_replace", kept)
    net = indexer()
    report, _ = run(lambda *tensors: net(*tensors, None, 0), *inputs(2, 40), indexer="fp8")
    assert report.counts == {"indexer_topk": 1} and not report.near_misses, report
    largest = graphs[0].find_nodes(op="call_function", target=torch.ops.aten.amax.default)
    assert any(map(_amax_unplaced, largest)), "nothing there would be taken for a site"
