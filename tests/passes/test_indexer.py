"""The indexer's queries: found in DeepSeek's form and in the engines', with the same bits; and what nearly matches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import dsv4_fusion
from dsv4_fusion.ops._indexer import hadamard_ref, quantise_fp8_ref, quantise_mxfp4_ref, rotate_ref
from dsv4_fusion.ops.indexer import indexer_q_fp8_ref, indexer_q_mxfp4_ref
from dsv4_fusion.options import FusionOptions
from dsv4_fusion.passes.indexer import dequantise_mxfp4
from dsv4_fusion.report import Report
from examples import deepseek
from examples.deepseek import Config, Indexer, apply_rope, hadamard, rope_table, round_fp8, round_mxfp4

LENGTH = 24


def same_bits(got: Tensor, wanted: Tensor, transformed: bool) -> None:
    """Asserts it, where PyTorch's own passes leave the roundings of such a graph as they are."""
    if transformed and torch.__version__ < (2, 12):
        pytest.skip("Inductor 2.11 drops roundings to bf16 beside a Hadamard transform, with or without these passes")
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def run(function: Callable, *args, dynamic: bool | None = None) -> tuple[Report, object]:
    """The report of one graph, and what the graph computes after the pass, without code generation.

    The keys' compressor is left as it is: it rounds less than eager, and these tests are of the queries' exact bits.
    """
    from dsv4_fusion.backend import _compile
    from dsv4_fusion.passes import _manager, compressor

    reports: list[Report] = []

    def backend(gm, inputs):
        return _compile(gm, inputs, FusionOptions(reference=True), {}, reports.append, run_graph=True)

    searched = [each for each in _manager.COMPUTATIONS if each not in compressor.COMPUTATIONS]
    torch._dynamo.reset()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_manager, "COMPUTATIONS", tuple(searched))
        result = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    torch._dynamo.reset()
    (report,) = reports
    return report, result


@functools.cache
def indexer(**changes) -> tuple[Indexer, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """An indexer alone, and inputs: hidden states, low-rank queries, RoPE table.

    Its projection is not quantised, which would only be more to compile.
    """
    config = Config.tiny(**{"quantise": False} | changes)
    torch.manual_seed(0)
    module = Indexer(config, 4).requires_grad_(False)
    x, lora = torch.randn(2, 2, LENGTH, config.dim).bfloat16()
    return module, (x, lora, rope_table(config, compressed=True)[:LENGTH])


def rotate(q: Tensor, table: Tensor) -> None:
    """As the model does it."""
    apply_rope(q[..., -2 * table.shape[1] :], table)


class Score(nn.Module):
    """An indexer up to the scores, which can be compared bit by bit, with parts to exchange."""

    def __init__(self, module: Indexer, rotate=rotate, q_round=None, k_round=None, keep: str = "") -> None:
        super().__init__()
        self.indexer, self.rotate, self.keep = module, rotate, keep
        both = functools.partial(deepseek.round_index, config=replace(module.config, quantise=True))
        self.q_round, self.k_round = q_round or both, k_round or both

    def forward(self, x: Tensor, lora: Tensor, table: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        own = self.indexer
        k = x[:, ::4, : own.head_dim].clone()
        rotate(k, table[::4])
        q = own.wq_b(lora).unflatten(-1, (own.n_heads, own.head_dim))
        self.rotate(q, table)
        rounded = self.q_round(q)
        weights = own.weights_proj(x) * (own.softmax_scale * own.n_heads**-0.5)
        product = torch.einsum("bshd,btd->bsht", rounded, self.k_round(k)).relu() * weights.unsqueeze(-1)
        kept = {"q": q, "rounded": rounded, "weights": weights, "product": product}.get(self.keep)
        return product.sum(2) if kept is None else (product.sum(2), kept * 2)


# DeepSeek's form

FORMS = [
    {"index_format": form, "index_hadamard": transform, **sizes}
    for form, transform, sizes in [
        ("mxfp4", True, {}),
        ("mxfp4", False, {"index_head_dim": 64, "rope_head_dim": 32, "index_n_heads": 3}),
        ("fp8", True, {"index_head_dim": 64, "rope_head_dim": 64, "index_n_heads": 1}),
        ("fp8", False, {"index_n_heads": 16}),
    ]
]


@pytest.mark.parametrize("changes", FORMS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_the_scores_keep_their_bits(changes):
    module, inputs = indexer(**changes)
    report, ours = run(Score(module), *inputs)
    name = f"indexer_q_{changes['index_format']}"
    assert report.counts == {name: 1}, report
    assert not report.near_misses and not report.left_alone
    same_bits(ours, Score(module)(*inputs), changes["index_hadamard"])


@pytest.mark.parametrize(("batch", "length"), [(1, LENGTH), (2, 4), (1, 4)])
def test_sizes_of_one(batch, length):
    """A batch of one, one compressed entry: einsum then makes other products."""
    module, (x, lora, table) = indexer(index_hadamard=False)
    inputs = x[:batch, :length], lora[:batch, :length], table[:length]
    report, ours = run(Score(module), *inputs)
    assert report.counts == {"indexer_q_mxfp4": 1}, report
    assert torch.equal(ours, Score(module)(*inputs))


class Model(nn.Module):
    """The RoPE table as a model has it: a buffer, whose widths are static under ``dynamic=True``."""

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score, self.table = score, nn.Buffer(rope_table(score.indexer.config, compressed=True))

    def forward(self, x: Tensor, lora: Tensor) -> Tensor:
        return self.score(x, lora, self.table[: x.shape[1]])


def test_dynamic_shapes():
    module, (x, lora, _) = indexer(index_format="fp8", index_hadamard=False)
    model = Model(Score(module))
    report, ours = run(model, x, lora, dynamic=True)
    assert report.counts == {"indexer_q_fp8": 1}, report
    assert torch.equal(ours, model(x, lora))


def test_generated_code():
    """What stands beside the operator compiles; Inductor keeps bf16 sums in fp32, so the last bit is not eager's."""
    module, inputs = indexer(index_hadamard=False)
    score = Score(module, k_round=lambda k: k)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        ours = torch.compile(score, backend="dsv4_fusion", options={"reference": True, "strict": 1})(*inputs)
    torch._dynamo.reset()
    assert (ours - score(*inputs)).norm() <= 2**-8 * ours.norm()


def rows() -> Tensor:
    """Random rows, exact ties, zeros of both signs, the ends of bf16's range, and rows that are not finite."""
    random = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    random *= torch.tensor([2.0]).pow(torch.arange(-20, 20)).unsqueeze(1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 16) * torch.tensor([1.0, -1.0] * 64)
    special = [
        torch.zeros(128),
        -torch.zeros(128),
        torch.full((128,), 3e38),
        torch.full((128,), -1e-39),
        ties,
        ties / 64,
    ]
    for value in (torch.inf, -torch.inf, torch.nan):
        special.append(torch.randn(128, generator=torch.Generator().manual_seed(1)))
        special[-1][5] = value
    return torch.cat([random, torch.stack(special).bfloat16()])


def bits(x: Tensor) -> Tensor:
    """bf16 bits, one for all NaNs."""
    return torch.where(x.isnan(), torch.tensor(torch.nan, dtype=x.dtype), x).view(torch.int16)


def test_the_model_rounds_as_the_operators_do():
    x = rows()
    assert torch.equal(hadamard(x[:40]), hadamard_ref(x[:40]))
    packed, scale = quantise_mxfp4_ref(x.unsqueeze(1))
    assert torch.equal(bits(dequantise_mxfp4(packed, scale).squeeze(1)), bits(round_mxfp4(x)))
    codes, scales = quantise_fp8_ref(x)
    finite = x.isfinite().all(-1)
    assert torch.equal((codes.float() * scales.unsqueeze(-1)).bfloat16()[finite], round_fp8(x, 128)[finite])
    table = rope_table(Config.tiny(), compressed=True)[: len(x)]
    rotated = x[finite].clone()
    apply_rope(rotated[None, :, 64:], table[finite])
    cos, sin = torch.view_as_real(table[finite]).unbind(-1)
    assert torch.equal(rotated, rotate_ref(x[finite], cos, sin))


# Near misses in DeepSeek's form


def leading(q: Tensor, table: Tensor) -> None:
    apply_rope(q[..., : 2 * table.shape[1]], table)


def half_rotation(q: Tensor, table: Tensor) -> None:
    """Pairs (i, i + R / 2) instead of (2i, 2i + 1)."""
    q = q[..., -2 * table.shape[1] :]
    first, second = q.float().chunk(2, -1)
    cos, sin = torch.view_as_real(table).view(1, table.shape[0], 1, -1, 2).unbind(-1)
    q.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))


def conjugate(q: Tensor, table: Tensor) -> None:
    apply_rope(q[..., -2 * table.shape[1] :], table, inverse=True)


def block_of(size: int) -> Callable[[Tensor], Tensor]:
    return lambda x: round_mxfp4(x, size)


def mxfp4_with(floor: float, largest: float = 6.0) -> Callable[[Tensor], Tensor]:
    """Another amax floor, or another largest magnitude."""

    def rounded(x: Tensor) -> Tensor:
        wide = x.float().unflatten(-1, (-1, 32))
        scale = deepseek.ceil_power_of_two(wide.abs().amax(-1, keepdim=True).clamp_min(floor) / largest)
        wide = wide / scale
        size = wide.abs()
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        return ((wide / step).round() * step * scale).flatten(-2).to(x.dtype)

    return rounded


def unordered(x: Tensor) -> Tensor:
    """A Hadamard transform whose last butterfly comes first."""
    wide = x.float()
    for stride in (64, 1, 2, 4, 8, 16, 32):
        low, high = wide.unflatten(-1, (-1, 2, stride)).unbind(-2)
        wide = torch.stack((low + high, low - high), -2).flatten(-3)
    return round_mxfp4((wide * 128**-0.5).to(x.dtype))


NEAR_MISSES = {
    # name: (what differs in Score, a part of the reason)
    "RoPE on the leading dims": ({"rotate": leading}, "expected -64 among its arguments, found 0"),
    "half rotation": ({"rotate": half_rotation}, "found aten.split.Tensor"),
    "conjugate rotation": ({"rotate": conjugate}, "expected aten.view.default, found aten.clone.default"),
    "blocks of 64": ({"q_round": block_of(64)}, "expected 4 among its arguments, found 2"),
    "blocks of 16": ({"q_round": block_of(16)}, "expected 4 among its arguments, found 8"),
    "the largest code 7": ({"q_round": mxfp4_with(1e-4, 7.0)}, "expected 6.0 among its arguments, found 7.0"),
    "a floor below normal scales": ({"q_round": mxfp4_with(1e-39)}, "amax_floor must be finite and at least"),
    "butterflies in another order": ({"q_round": unordered}, "expected"),
    "Hadamard on the queries alone": ({"k_round": round_mxfp4}, "the queries go through a Hadamard transform and"),
    "Hadamard on the keys alone": ({"q_round": round_mxfp4}, "the keys go through a Hadamard transform and"),
    "rotated queries used elsewhere": ({"keep": "q"}, "is used outside the pattern too"),
    "rounded queries used elsewhere": ({"keep": "rounded"}, "is used outside the pattern too"),
    "scaled weights used elsewhere": ({"keep": "weights"}, "is used outside the pattern too"),
    "product used elsewhere": ({"keep": "product"}, "is used outside the pattern too"),
}
TRANSFORMED = {
    "butterflies in another order",
    "Hadamard on the queries alone",
    "Hadamard on the keys alone",
    "rotated queries used elsewhere",
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_nearly_matches_is_left_alone_and_explained(name):
    module, inputs = indexer(index_hadamard=name in TRANSFORMED)  # which is half of the graph
    changes, reason = NEAR_MISSES[name]
    report, got = run(Score(module, **changes), *inputs)
    assert not report.counts, report
    (miss,) = report.near_misses
    assert miss.fusion == "indexer_q_mxfp4" and reason in miss.reason, miss
    same_bits(got, Score(module, **changes)(*inputs), name in TRANSFORMED)


def test_another_amax_floor_is_handed_on():
    module, (x, lora, table) = indexer(index_hadamard=False)
    score = Score(module, q_round=mxfp4_with(2.0))  # above most blocks
    report, ours = run(score, x, lora, table)
    assert report.counts == {"indexer_q_mxfp4": 1}, report
    assert torch.equal(ours, score(x, lora, table))
    assert not torch.equal(ours, Score(module)(x, lora, table))


def test_heads_whose_factor_is_no_power_of_two():
    module, inputs = indexer(index_n_heads=3, index_hadamard=False)
    report, _ = run(Score(module), *inputs)
    assert not report.counts
    assert "the weights could differ in the last bit" in report.near_misses[0].reason


# The engines' form

HEADS, TOKENS = 4, 9


def arguments(d: int = 128, table=torch.float32, weights=torch.bfloat16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(TOKENS, HEADS, d, generator=generator).bfloat16()
    cos, sin = (
        torch.view_as_real(rope_table(Config.tiny(rope_head_dim=d // 2), compressed=True)[:32]).to(table).unbind(-1)
    )
    w = torch.randn(TOKENS, HEADS, generator=generator).to(weights)
    return q, torch.arange(TOKENS) + 3, cos.contiguous(), sin.contiguous(), w


REFERENCES = {"indexer_q_fp8": indexer_q_fp8_ref, "indexer_q_mxfp4": indexer_q_mxfp4_ref}
ENGINES = [
    ("indexer_q_fp8", 128, torch.float32, torch.bfloat16, {"hadamard": True}),
    ("indexer_q_fp8", 64, torch.bfloat16, torch.float32, {"power_of_two_scale": False, "amax_floor": 0.5}),
    ("indexer_q_mxfp4", 64, torch.bfloat16, torch.float32, {"hadamard": True, "ties": "zero", "amax_floor": 0.5}),
    ("indexer_q_mxfp4", 128, torch.float32, torch.bfloat16, {}),
]


def same_bytes(ours: tuple, expected: tuple) -> None:
    for got, want in zip(ours, expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("table_inside", [True, False])
@pytest.mark.parametrize(("name", "d", "table", "weights", "options"), ENGINES)
def test_what_engines_call(name, d, table, weights, options, table_inside):
    q, positions, cos, sin, w = arguments(d, table, weights)

    def unfused(q, positions, cos, sin, w):
        return REFERENCES[name](q, None, cos[positions], sin[positions], w, **options)

    def gathered(q, cos, sin, w):
        return REFERENCES[name](q, None, cos, sin, w, **options)

    inputs = (q, positions, cos, sin, w) if table_inside else (q, cos[:TOKENS], sin[:TOKENS], w)
    function = unfused if table_inside else gathered
    report, ours = run(function, *inputs)
    assert report.counts == {name: 1}, report
    assert not report.near_misses
    same_bytes(ours, function(*inputs))
    assert report.sites[0].nodes > (85 if options.get("hadamard") else 40)


def unfused(q, positions, cos, sin, w, rotated=rotate_ref, largest=448.0, factor=HEADS**-0.5, extra=False):
    """The FP8 form again, with parts to exchange."""
    q = rotated(q, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))
    amax = q.abs().amax(-1).float()
    finite, amax = amax.isfinite(), amax.clamp(min=1e-4)
    exponent = ((amax / torch.full_like(amax, largest)).view(torch.int32) + 0x7FFFFF) >> 23
    scale = (exponent << 23).view(torch.float32)
    codes = (q.float() * ((254 - exponent) << 23).view(torch.float32).unsqueeze(-1)).clamp(-448.0, 448.0)
    codes = torch.where(finite.unsqueeze(-1), codes, torch.nan).to(torch.float8_e4m3fn)
    scale = torch.where(finite, scale, torch.nan)
    folded = w.float() * scale * q.shape[-1] ** -0.5 * factor
    return (codes, folded, scale) if extra else (codes, folded)


def rotate_leading(x, cos, sin):
    dims = 2 * cos.shape[-1]
    return torch.cat([rotate_ref(x[..., :dims], cos, sin), x[..., dims:]], -1)


def rotate_half(x, cos, sin):
    plain = x.shape[-1] - 2 * cos.shape[-1]
    first, second = x[..., plain:].float().chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([x[..., :plain], turned.to(x.dtype)], -1)


ENGINE_MISSES = {
    "RoPE on the leading dims": ({"rotated": rotate_leading}, "expected"),
    "half rotation": ({"rotated": rotate_half}, "expected"),
    "another largest code": ({"largest": 240.0}, "expected 448.0 among its arguments, found 240.0"),
    "another factor of the weights": ({"factor": 0.25}, "expected 0.5 among its arguments, found 0.25"),
    "the scale used elsewhere": ({"extra": True}, "is used outside the pattern too"),
}


@pytest.mark.parametrize("name", ENGINE_MISSES)
def test_what_engines_nearly_call(name):
    changes, reason = ENGINE_MISSES[name]
    function = functools.partial(unfused, **changes)
    report, ours = run(lambda *inputs: function(*inputs), *arguments())
    assert not report.counts, report
    (miss,) = report.near_misses
    assert miss.fusion == "indexer_q_fp8" and reason in miss.reason, miss
    same_bytes(ours, function(*arguments()))


def test_the_exchangeable_form_matches_unchanged():
    report, _ = run(lambda *inputs: unfused(*inputs), *arguments())
    assert report.counts == {"indexer_q_fp8": 1}


@torch.library.custom_op("dsv4_fusion_tests::score", mutates_args=())
def score_kernel(packed: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    return packed.float().sum(-1) + scale + weights


@score_kernel.register_fake
def _(packed: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(weights.shape)


def two_indexers(q, positions, cos, sin, w):
    first = indexer_q_mxfp4_ref(q, None, cos[positions], sin[positions], w)
    second = indexer_q_mxfp4_ref(q * 2, None, cos[positions], sin[positions], w + 1)
    return first, second


def test_weights_of_two_indexers_go_where_their_values_go():
    """Nothing else says which weights belong to which MXFP4 values."""

    def scores(*inputs):
        return [score_kernel(*parts) for parts in two_indexers(*inputs)]

    report, ours = run(scores, *arguments())
    assert report.counts == {"indexer_q_mxfp4": 2}, report
    for got, want in zip(ours, scores(*arguments()), strict=True):
        assert torch.equal(got, want)


def test_weights_that_could_be_either_indexers_are_left_alone():
    report, _ = run(two_indexers, *arguments())
    assert not report.counts, report
    assert all("found 2" in miss.reason for miss in report.near_misses) and len(report.near_misses) == 2


# Queries and keys


@pytest.mark.parametrize("of_keys", [False, True])
def test_operators_that_transform_one_side_are_refused(of_keys):
    q, positions, cos, sin, w = arguments()
    cache = torch.zeros(1, dsv4_fusion.ops.indexer_cache_bytes(64, "mxfp4"), dtype=torch.uint8)

    def step(q, positions, cos, sin, w, cache, of_queries, of_keys):
        dsv4_fusion.ops.indexer_k_store_mxfp4(q[:, 0].contiguous(), cache, positions, hadamard=of_keys)
        return dsv4_fusion.ops.indexer_q_mxfp4(q, positions, cos, sin, w, hadamard=of_queries)

    with pytest.raises(BackendCompilerFailed, match=r"FusionError: .* are transformed both or not at all"):
        run(lambda *inputs: step(*inputs, not of_keys, of_keys), q, positions, cos, sin, w, cache)
    run(lambda *inputs: step(*inputs, of_keys, of_keys), q, positions, cos, sin, w, cache)


# Hugging Face's model


@pytest.mark.parametrize(
    ("dtype", "batch", "rows"), [(torch.bfloat16, 2, 2), (torch.float32, 2, 1), (torch.bfloat16, 1, 1)]
)
def test_hugging_face_quantises_nothing(dtype, batch, rows):
    """``rows``: of the positions, which are the model's own for all requests, or each request's."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from examples.model import SIZES

    config = modeling.DeepseekV4Config(num_hidden_layers=1, **SIZES["tiny"])
    net = modeling.DeepseekV4Indexer(config).to(dtype).requires_grad_(False)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    hidden, lora = torch.randn(batch, 32, 64).to(dtype), torch.randn(batch, 32, 32).to(dtype)
    positions = torch.arange(32).expand(rows, -1)
    report, ours = run(lambda *inputs: net(*inputs, None, 0), hidden, lora, positions)
    assert not report.sites and not report.near_misses, report
    (entry,) = report.left_alone
    assert entry.fusion == "indexer_q_fp8" and "nothing is quantised here" in entry.reason
    assert "left alone:" in str(report)
    assert torch.equal(ours, net(hidden, lora, positions, None, 0))
