"""DeepSeek's choice of keys becomes one operator, which gets the codes of the graph; what nearly is one does not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_fusion.ops._indexer import dequantise_mxfp4_ref
from dsv4_fusion.options import FusionOptions
from dsv4_fusion.passes import indexer_scores_deepseek as passes
from dsv4_fusion.passes._pattern import SIZES, cut
from dsv4_fusion.passes.indexer import Queries
from dsv4_fusion.report import Report
from examples import deepseek
from examples.deepseek import Config, Indexer, rope_table, round_mxfp4
from tests.passes.test_indexer import conjugate, rotate

TOP_K = 4


@pytest.fixture(autouse=True)
def constant_floats():
    """PyTorch makes symbols of a dynamic graph's floats, and when it gives up on them it traces everything again."""
    with torch._dynamo.config.patch(specialize_float=True):
        yield


class Calls(TorchDispatchMode):
    """What the operator was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple, dict]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.dsv4.indexer_topk.default:
            self.found.append((args, kwargs))
        return function(*args, **kwargs or {})


def run(function: Callable, *args, dynamic: bool = False) -> tuple[Report, Tensor, tuple]:
    """The report of one graph, what the graph computes after the pass, and the operator's tensors, if it is called.

    ``dynamic``: of any batch and length.
    """
    from dsv4_fusion.backend import _compile

    reports: list[Report] = []
    calls = Calls()

    def backend(gm, inputs):
        compiled = _compile(gm, inputs, FusionOptions(reference=True), {}, reports.append, run_graph=True)

        def recorded(*tensors):
            with calls:
                return compiled(*tensors)

        return recorded

    for tensor in args if dynamic else ():  # a model's widths are static
        for dim in range(2) if len(tensor) > 1 else (1,):
            torch._dynamo.mark_dynamic(tensor, dim)
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    torch._dynamo.reset()
    (report,) = reports
    return report, result, calls.found[0][0] if calls.found else ()


class Choose(nn.Module):
    """The indexer between its projections and its choice, with parts to exchange."""

    def __init__(
        self,
        config: Config,
        *,
        rotate: Callable = rotate,
        q_round: Callable | None = None,
        k_round: Callable | None = None,
        relu: Callable = F.relu,
        dim: int = 2,
        compare: Callable = torch.ge,
        fill: float = float("-inf"),
        sentinel: int = -1,
        largest: bool = True,
        order: bool = True,
        keep: str = "",
    ) -> None:
        super().__init__()
        both = functools.partial(deepseek.round_index, config=config)
        self.config, self.rotate, self.table = config, rotate, nn.Buffer(rope_table(config, compressed=True))
        self.q_round, self.k_round, self.relu, self.dim = q_round or both, k_round or both, relu, dim
        self.compare, self.fill, self.sentinel = compare, fill, sentinel
        self.largest, self.order, self.keep = largest, order, keep

    def prepared(self, q: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = q.shape[1]
        q, k = q.clone(), x[:, : length // 4 * 4 : 4].clone()
        self.rotate(q, self.table[:length])
        rotate(k, self.table[: length // 4 * 4 : 4])
        return self.q_round(q), self.k_round(k), weights * (q.shape[3] ** -0.5 * q.shape[2] ** -0.5)

    def forward(self, q: Tensor, x: Tensor, weights: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        q, k, weights = self.prepared(q, x, weights)
        product = torch.einsum("bshd,btd->bsht", q, k)
        score = (self.relu(product) * weights.unsqueeze(-1)).sum(self.dim)
        closed = torch.arange(1, q.shape[1] + 1).unsqueeze(1) // 4
        masked = score.masked_fill(self.compare(torch.arange(k.shape[1]), closed), self.fill)
        best = masked.topk(min(TOP_K, k.shape[1]), -1, largest=self.largest, sorted=self.order).indices
        chosen = torch.where(best >= closed, self.sentinel, best)
        values = {"q": q, "k": k, "product": product, "score": score, "masked": masked, "best": best}
        return (chosen, values[self.keep] * 2) if self.keep else chosen


PLAIN = {"index_hadamard": False}  # less to trace


def inputs(config: Config, batch: int = 2, length: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Projected queries, what every fourth row is a key of, weights of the heads."""
    torch.manual_seed(batch + length)
    heads, d = config.index_n_heads, config.index_head_dim
    sizes = ((heads, d), (d,), (heads,))
    return tuple(torch.randn(batch, length, *size).bfloat16() for size in sizes)


def assert_best(ours: Tensor, eager: Tensor, q: Tensor, k: Tensor, weights: Tensor) -> None:
    """Ours are the best keys by the float64 scores of these values, and eager's are no better.

    The operator adds d products, then H of these sums, in fp32: a score is off by no more than (d + H) roundings of
    2^-24 of the sum of all magnitudes; so where it takes one key for another, both being off, their scores differ by no
    more than twice that. Eager rounds every head's product and its weighted sum to bf16, and takes other keys for that.
    """
    assert ours.shape == eager.shape and ours.dtype == eager.dtype
    assert torch.equal(ours < 0, eager < 0)
    q, k, weights = q.double(), k.double(), weights.double().unsqueeze(-1)
    scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * weights).sum(2)
    sums = (torch.einsum("bshd,btd->bsht", q.abs(), k.abs()) * weights.abs()).sum(2)
    bound = 2 * (q.shape[-1] + q.shape[-2]) * 2.0**-24 * sums.amax(-1, keepdim=True)
    closed = torch.arange(1, scores.shape[1] + 1).unsqueeze(1) // 4
    visible = scores.masked_fill(torch.arange(scores.shape[-1]) >= closed, -torch.inf)
    best = visible.topk(ours.shape[-1]).values
    found, theirs = (scores.gather(-1, chosen.clamp(min=0)) for chosen in (ours, eager))
    assert ((best - found).abs() <= bound)[ours >= 0].all()
    assert (best - found)[ours >= 0].clamp(min=0).sum() <= (best - theirs)[ours >= 0].clamp(min=0).sum() + 1e-6


def exact(net: Choose, q: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as the graph rounds them, and the weights that it should multiply with."""
    rounded_q, rounded_k, _ = net.prepared(q, x, weights)
    return rounded_q, rounded_k, weights.double() * (q.shape[3] ** -0.5 * q.shape[2] ** -0.5)


def values_of(codes: Tensor, scale: Tensor | None) -> Tensor:
    """MXFP4 codes as bf16."""
    scales = scale.unsqueeze(-1).contiguous().view(torch.uint8)[..., : codes.shape[-1] // 16]
    return dequantise_mxfp4_ref(codes, scales)


FORMS = [
    {"index_format": form, "index_hadamard": transform, **sizes}
    for form, transform, sizes in [
        ("mxfp4", True, {}),
        ("mxfp4", False, {"index_n_heads": 3}),
        ("fp8", True, {"index_head_dim": 64, "rope_head_dim": 64, "index_n_heads": 1}),
    ]
]


@pytest.mark.parametrize("changes", FORMS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_codes_go_from_one_operator_to_the_other(changes):
    """And are those that the graph rounds to, of queries and of keys. No factor of the weights is refused."""
    net = Choose(Config.tiny(**changes))
    given = inputs(net.config)
    report, ours, (q, k, weights, q_scale, k_scale, *_) = run(net, *given)
    assert report.counts == {"indexer_topk": 1}, report
    assert not report.near_misses and not report.left_alone
    rounded_q, rounded_k, wanted = exact(net, *given)
    if changes["index_format"] == "mxfp4":
        assert torch.equal(values_of(q, q_scale), rounded_q) and torch.equal(values_of(k, k_scale), rounded_k)
    else:
        assert q.dtype == k.dtype == torch.float8_e4m3fn and q_scale is None
        assert torch.equal((k.float() * k_scale.unsqueeze(-1)).bfloat16(), rounded_k)
        scale = (rounded_q.float() / q.float()).nan_to_num(posinf=0).amax(-1)
        assert torch.equal(q.float() * scale.unsqueeze(-1), rounded_q.float())
        weights = weights / scale
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-6, atol=0)
    assert_best(ours, net(*given), rounded_q, rounded_k, wanted)


@pytest.mark.parametrize(("batch", "length"), [(1, 4), (2, 12), (1, 19)])
def test_other_sizes(batch, length):
    """One entry, fewer than are chosen, as many; 19 tokens leave three over."""
    net = Choose(Config.tiny(**PLAIN))
    given = inputs(net.config, batch, length)
    report, ours, tensors = run(net, *given)
    assert report.counts == {"indexer_topk": 1} and tensors[0].dtype == torch.uint8, report
    assert_best(ours, net(*given), *exact(net, *given))


class Whole(nn.Module):
    """The model's own indexer with the compressor of its keys."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.indexer = Indexer(replace(config, quantise=False), 4).requires_grad_(False)
        self.indexer.config = self.indexer.compressor.config = config  # its projection need not be quantised
        self.table = nn.Buffer(rope_table(config, compressed=True))

    def forward(self, x: Tensor, lora: Tensor) -> Tensor:
        return self.indexer(x, lora, self.table[: x.shape[1]])


def test_dynamic_shapes_beside_the_keys_compressor():
    net = Whole(Config.tiny(**PLAIN))
    x, lora = torch.randn(2, 1, 40, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    report, ours, tensors = run(net, x, lora, dynamic=True)
    assert report.counts == {"indexer_topk": 1, "compress_csa": 1}, report
    assert tensors[0].dtype == torch.uint8
    eager = net(x, lora)
    assert torch.equal(ours < 0, eager < 0)
    assert (ours == eager).float().mean() > 0.9  # the compressor rounds less than eager


def test_dynamic_shapes():
    net = Choose(Config.tiny(**PLAIN, index_format="fp8"))
    given = inputs(net.config)
    report, ours, tensors = run(net, *given, dynamic=True)
    assert report.counts == {"indexer_topk": 1} and tensors[0].dtype == torch.float8_e4m3fn, report
    assert_best(ours, net(*given), *exact(net, *given))


@pytest.mark.parametrize(("batch", "length", "dynamic"), [(1, 40, False), (2, 4, False), (2, 40, True)])
def test_what_is_not_quantised(batch, length, dynamic):
    """bf16 as the graph has it, weights included."""
    net = Choose(Config.tiny(**PLAIN, quantise=False))
    given = inputs(net.config, batch, length)
    report, ours, (q, k, weights, *_) = run(net, *given, dynamic=dynamic)
    assert report.counts == {"indexer_topk": 1} and not report.near_misses, report
    prepared = net.prepared(*given)
    assert q.dtype == k.dtype == torch.bfloat16
    assert all(torch.equal(got.bfloat16(), want) for got, want in zip((q, k, weights), prepared, strict=True))
    assert_best(ours, net(*given), *prepared)


@pytest.mark.parametrize(
    ("form", "k_round"), [("mxfp4", torch.neg), ("fp8", torch.neg), ("mxfp4", lambda k: round_mxfp4(k, 16))]
)
def test_keys_of_which_nothing_is_known(form, k_round):
    """As out of a cache: they are not rounded once more, and the queries are still one operator."""
    net = Choose(Config.tiny(**PLAIN, index_format=form), k_round=k_round)
    given = inputs(net.config)
    report, ours, (q, k, *_) = run(net, *given)
    assert report.counts == {"indexer_topk": 1} and not report.near_misses, report
    assert report.sites[0].nodes > 50
    rounded_q, kept, wanted = exact(net, *given)
    assert q.dtype == k.dtype == torch.bfloat16 and torch.equal(k, kept)
    assert form == "fp8" or torch.equal(q, rounded_q)
    assert_best(ours, net(*given), rounded_q, kept, wanted)


def test_as_many_keys_as_the_largest_model_chooses_can_be_traced():
    """1024, and up to the kernels' limit."""
    for top_k in (1024, 4096):
        structure = passes.Choice(Queries(64, 128, 0, False, False), top_k, False)
        (best,) = [
            node
            for node in cut(passes.AS_WRITTEN, structure, passes.INDEXER_TOPK[2]).nodes
            if node.target is torch.ops.aten.topk.default
        ]
        assert best.args[1] == top_k
    assert SIZES["E"] > 4096


# Near misses of the choice, whatever the queries


NEAR_MISSES = {
    "the limit is seen": ({"compare": torch.gt}, "expected aten.ge.Tensor"),
    "a finite fill": ({"fill": -1e9}, "expected -inf among its arguments, found -1000000000.0"),
    "another sentinel": ({"sentinel": -2}, "expected -1 among its arguments, found -2"),
    "the smallest scores": ({"largest": False}, "arguments has 4 items, expected 2"),
    "in any order": ({"order": False}, "arguments has 5 items, expected 2"),
    "the product used elsewhere": ({"keep": "product"}, "is used outside the pattern too"),
    "scores used elsewhere": ({"keep": "score"}, "is used outside the pattern too"),
    "masked scores used elsewhere": ({"keep": "masked"}, "is used outside the pattern too"),
    "the raw choice used elsewhere": ({"keep": "best"}, "is used outside the pattern too"),
}


def check_miss(net: Choose, given: tuple, reason: str, *, numbers: bool = True, **counts: int) -> None:
    report, got, _ = run(net, *given)
    assert report.counts == counts, report
    (miss,) = report.near_misses
    assert miss.fusion == "indexer_topk" and reason in miss.reason, miss
    got, expected = ((value,) if isinstance(value, Tensor) else value for value in (got, net(*given)))
    assert not numbers or all(torch.equal(ours, eager) for ours, eager in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_nearly_matches_is_left_alone_and_explained(name):
    changes, reason = NEAR_MISSES[name]
    net = Choose(Config.tiny(**PLAIN, quantise=False), **changes)
    check_miss(net, inputs(net.config), reason)


def test_a_sum_over_queries():
    """Over another dimension of the same length."""
    net = Choose(Config.tiny(**PLAIN, quantise=False, index_n_heads=16), dim=1)
    check_miss(net, inputs(net.config, 2, 16), "expected 2 among its arguments, found 1")


def test_no_relu():
    """Most of a choice with its quantisers is found without it; of one as it is written half, and no word is said."""
    net = Choose(Config.tiny(**PLAIN), relu=torch.neg)
    check_miss(net, inputs(net.config), "expected aten.relu.default of aten.view.default")


def test_quantised_queries_are_fused_where_the_choice_is_not():
    net = Choose(Config.tiny(**PLAIN), fill=-1e9)
    reason = "expected -inf among its arguments, found -1000000000.0"
    check_miss(net, inputs(net.config), reason, indexer_q_mxfp4=1)


# Near misses of the queries: the choice is fused as it is written, and the report says why not more


QUERIES = {
    "conjugate rotation": ({"rotate": conjugate}, "expected aten.view.default, found aten.clone.default"),
    "blocks of 16": ({"q_round": lambda x: round_mxfp4(x, 16)}, "expected 4 among its arguments, found 8"),
    "rounded queries used elsewhere": ({"keep": "q"}, "is used outside the pattern too"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_the_choice_alone_and_why_not_the_queries(name):
    changes, reason = QUERIES[name]
    net = Choose(Config.tiny(**PLAIN), **changes)
    given = inputs(net.config)
    report, ours, (q, k, *_) = run(net, *given)
    assert report.counts == {"indexer_topk": 1}, report
    (miss,) = report.near_misses
    assert miss.fusion == "indexer_topk" and reason in miss.reason, miss
    prepared = net.prepared(*given)
    assert torch.equal(q, prepared[0]) and torch.equal(k, prepared[1])
    eager = net(*given)
    assert_best(ours[0] if net.keep else ours, eager[0] if net.keep else eager, *prepared)


@pytest.mark.parametrize("of_queries", [False, True])
def test_one_side_that_is_transformed_is_refused(of_queries):
    """As it is written, too: the same numbers, which mean nothing."""
    net = Choose(Config.tiny(), **{"k_round" if of_queries else "q_round": round_mxfp4})
    sides = ("queries", "keys") if of_queries else ("keys", "queries")
    reason = f"the {sides[0]} go through a Hadamard transform and the {sides[1]} do not"
    # Inductor 2.11 drops roundings to bf16 beside a Hadamard transform, with or without these passes
    check_miss(net, inputs(net.config), reason, numbers=torch.__version__ >= (2, 12))


def test_one_side_beside_the_keys_compressor_is_refused():
    """Which is an operator by then."""
    net = Whole(Config.tiny())
    net.indexer.compressor.config = Config.tiny(**PLAIN)
    x, lora = torch.randn(2, 2, 40, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    report, _, tensors = run(net, x, lora)
    assert report.counts == {"compress_csa": 1} and not tensors, report
    assert "the queries go through a Hadamard transform and the keys do not" in report.near_misses[0].reason
