"""Linear layers with FP8 weights: found in each form with the operator's numbers, and only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4_fusion import ops
from dsv4_fusion.options import FusionOptions
from dsv4_fusion.report import Report
from examples import deepseek
from examples.deepseek import Config, Linear, round_fp8

K, N = 256, 384


def run(function: Callable, *args, asked: bool = True, moving: bool = False) -> tuple[Report, object]:
    """The report of one graph, and what the graph computes after the pass; ``moving``: the tokens are symbols."""
    from dsv4_fusion.backend import _compile

    reports: list[Report] = []
    options = FusionOptions(reference=True, fp8_linear="batch_invariant" if asked else None)

    def backend(gm, inputs):
        return _compile(gm, inputs, options, {}, reports.append, run_graph=True)

    if moving:
        for dimension in range(args[0].dim() - 1):
            torch._dynamo.mark_dynamic(args[0], dimension)
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    torch._dynamo.reset()
    (report,) = reports
    return report, result


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def blocks() -> tuple[Tensor, Tensor]:
    parts = random(N, K, seed=1).float().view(N // 128, 128, K // 128, 128)
    scale = parts.abs().amax((1, 3)) / 448
    return (parts / scale[:, None, :, None]).view(N, K).to(torch.float8_e4m3fn), scale


def quantised(scaling: str) -> tuple[Tensor, Tensor]:
    return blocks() if scaling == "block" else ops.quantize_fp8(random(N, K, seed=1), scaling=scaling)


# Dequantised weights


def repeated(wq: Tensor, scale: Tensor) -> Tensor:
    return (wq.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)).bfloat16()


def cut(wq: Tensor, scale: Tensor) -> Tensor:
    wide = scale.repeat_interleave(128, 0)[: wq.shape[0]].repeat_interleave(128, 1)[:, : wq.shape[1]]
    return (wq.float() * wide).bfloat16()


def viewed(wq: Tensor, scale: Tensor) -> Tensor:
    parts = wq.float().view(N // 128, 128, K // 128, 128) * scale[:, None, :, None]
    return parts.view(N, K).bfloat16()


def viewed_in_bf16(wq: Tensor, scale: Tensor) -> Tensor:
    parts = wq.bfloat16().view(N // 128, 128, K // 128, 128) * scale.bfloat16()[:, None, :, None]
    return parts.view(N, K)


def wide(wq: Tensor, scale: Tensor) -> Tensor:
    return (wq.float() * scale).bfloat16()


def narrow(wq: Tensor, scale: Tensor) -> Tensor:
    return wq.bfloat16() * scale.bfloat16()


FORMS = [
    ("token", wide),
    ("token", narrow),
    ("tensor", wide),
    ("tensor", narrow),
    ("block", repeated),
    ("block", cut),
    ("block", viewed),
    ("block", viewed_in_bf16),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scaling", "dequantise"), FORMS)
def test_dequantised_weights(scaling, dequantise, bias):
    x, b, (wq, scale) = random(2, 24, K), random(N, seed=2) if bias else None, quantised(scaling)

    def eager(*tensors):  # in one graph: most of a compilation is not for the layer
        *inputs, wq, scale, b = tensors
        return [F.linear(each, dequantise(wq, scale), b) for each in inputs]

    inputs = x, x[0].clone(), x[:1, :1].clone()
    exact = eager(*inputs, wq, scale, b)
    report, results = run(eager, *inputs, wq, scale, b, moving=True)
    assert report.counts == {"fp8_linear": 3} and not report.near_misses, report
    for each, got, expected in zip(inputs, results, exact, strict=True):
        assert torch.equal(got, ops.fp8_linear(each, wq, scale, b))
        expected = expected.float()
        assert 0 < (got.float() - expected).norm() < 0.04 * expected.norm()  # the activation has 3 bits now
    report, (got,) = run(eager, x, wq, scale, b, asked=False)
    assert not report.counts and not report.near_misses, report
    assert torch.equal(got, exact[0])


def test_a_scalar_and_scales_kept_in_bf16():
    x, (wq, scale) = random(24, K), quantised("tensor")
    report, got = run(lambda x, wq, s: F.linear(x, wide(wq, s)), x, wq, scale[0])
    assert report.counts == {"fp8_linear": 1} and torch.equal(got, ops.fp8_linear(x, wq, scale))
    wq, scale = quantised("token")
    report, got = run(lambda x, wq, s: F.linear(x, wq.bfloat16() * s), x, wq, scale.bfloat16())
    assert report.counts == {"fp8_linear": 1} and torch.equal(got, ops.fp8_linear(x, wq, scale.bfloat16().float()))


def by_input(wq: Tensor, scale: Tensor) -> Tensor:
    """Scales of the inputs, not of the outputs."""
    return (wq.float() * scale[:K].t()).bfloat16()


def blocks_of(size: int) -> Callable[[Tensor, Tensor], Tensor]:
    def dequantise(wq: Tensor, scale: Tensor) -> Tensor:
        fine = scale.repeat_interleave(128 // size, 0).repeat_interleave(128 // size, 1)
        return (wq.float() * fine.repeat_interleave(size, 0).repeat_interleave(size, 1)).bfloat16()

    return dequantise


NEAR_MISSES = {
    "scales of the inputs": ("token", lambda x, wq, s: F.linear(x, by_input(wq, s))),
    "blocks of 64": ("block", lambda x, wq, s: F.linear(x, blocks_of(64)(wq, s))),
    "an offset": ("token", lambda x, wq, s: F.linear(x, (wq.float() * s + 1).bfloat16())),
    "divided by the scale": ("token", lambda x, wq, s: F.linear(x, (wq.float() / s).bfloat16())),
    "the weight transposed": ("token", lambda x, wq, s: x[..., :1] @ wide(wq, s)[:1]),
    "the weight used elsewhere": ("token", lambda x, wq, s: (F.linear(x, wide(wq, s)), wide(wq, s))),
    "an activation rounded in groups of 64": ("block", lambda x, wq, s: F.linear(round_fp8(x, 64), cut(wq, s))),
    "an activation with another largest code": ("block", lambda x, wq, s: F.linear(to_240(x), cut(wq, s))),
    "fp32": ("token", lambda x, wq, s: F.linear(x.float(), wq.float() * s)),
}


def to_240(x: Tensor) -> Tensor:
    rows = x.float().unflatten(-1, (-1, 128))
    scale = deepseek.ceil_power_of_two(rows.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 240.0)
    return ((rows / scale).clamp(-240.0, 240.0).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_nearly_matches_is_left_alone(name):
    scaling, function = NEAR_MISSES[name]
    tensors = random(2, 24, K), *quantised(scaling)
    if name == "the weight used elsewhere":
        function = shared
    report, got = run(function, *tensors)
    assert not report.counts, report
    expected = function(*tensors)
    for left, right in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, expected)), strict=True):
        assert torch.equal(left, right)


def shared(x, wq, s):
    weight = wide(wq, s)
    return F.linear(x, weight), weight


def test_an_activation_that_is_rounded_otherwise_is_named():
    report, _ = run(NEAR_MISSES["an activation rounded in groups of 64"][1], random(2, 24, K), *blocks())
    (miss,) = report.near_misses
    assert "expected 128 among its arguments, found 64" in miss.reason
    report, _ = run(lambda x, wq, s: F.linear(to_fp8(x), wide(wq, s)), random(2, 24, K), *quantised("token"))
    (miss,) = report.near_misses
    assert "the activation is rounded to FP8 already" in miss.reason


def to_fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).bfloat16()


def test_sizes_that_the_operator_does_not_take():
    x, (wq, scale) = random(24, K), ops.quantize_fp8(random(40, K))
    report, _ = run(lambda x, wq, s: F.linear(x, wide(wq, s)), x, wq, scale)
    assert not report.counts
    assert "N must be a positive multiple of 16, got 40" in report.near_misses[0].reason


# DeepSeek's form


@pytest.mark.parametrize("shape", [(2, 24, K), (1, 1, K), (24, K)])
def test_deepseek_keeps_the_numbers(shape):
    linear = Linear(K, N, Config.tiny())
    x = random(*shape)
    report, got = run(linear, x)
    assert report.counts == {"fp8_linear": 1} and not report.near_misses, report
    expected = ops.fp8_linear(x, linear.weight, linear.scale, scale_rounding="power_of_two")
    assert torch.equal(got, expected)
    assert (got.float() - linear(x).float()).norm() <= 2**-9 * got.float().norm()  # other sums, the same products
    report, _ = run(linear, x, asked=False)
    assert not report.counts and not report.near_misses


def test_deepseeks_model():
    """All projections but the grouped one of the output, whose weight is cut in groups."""
    net = deepseek.model(
        Config.tiny(compress_ratios=(4,), n_routed_experts=2, hc_sinkhorn_iters=1, index_hadamard=False)
    )
    layers = [name for name, module in net.named_modules() if isinstance(module, Linear)]
    ids = torch.randint(0, 128, (1, 16), generator=torch.Generator().manual_seed(1))
    report, _ = run(net, ids)
    found = [site.path for site in report.sites if site.fusion == "fp8_linear"]
    assert sorted(found) == sorted(name for name in layers if not name.endswith("wo_a")), report
    assert not report.near_misses, report


# torchao


@pytest.fixture
def quantize(monkeypatch):
    """torchao's dynamic FP8 per row; it refuses to quantise for a GPU that is not there."""
    pytest.importorskip("torchao")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quant_api, quantize_

    if hasattr(quant_api, "_check_hardware_support"):
        monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())

    def apply(module: nn.Module, filter_fn=None) -> nn.Module:
        quantize_(module, config, filter_fn)
        return module

    return apply


def rows_have_scales() -> bool:
    (xq, x_scale), (wq, w_scale) = ops.quantize_fp8(random(16, K)), quantised("token")
    try:
        torch._scaled_mm(xq, wq.t(), x_scale, w_scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("bias", [False, True])
def test_torchao(quantize, bias):
    linear = quantize(nn.Sequential(nn.Linear(K, N, bias=bias).bfloat16().requires_grad_(False)))
    weight = linear[0].weight
    inputs = random(2, 24, K), random(24, K), random(1, 1, K)
    report, results = run(lambda *inputs: [linear(x) for x in inputs], *inputs, moving=True)
    assert report.counts == {"fp8_linear": 3} and not report.near_misses, report
    for x, got in zip(inputs, results, strict=True):
        expected = ops.fp8_linear(
            x, weight.qdata, weight.scale, linear[0].bias, scale_rounding="input", amax_floor=1e-30
        )
        assert torch.equal(got, expected)
    if not rows_have_scales():
        pytest.skip("this PyTorch multiplies with one scale a matrix on the CPU: torchao's own product does not run")
    for x, got in zip(inputs, results, strict=True):
        plain = linear(x).float()
        assert (got.float() - plain).norm() <= 2**-8 * plain.norm()
    report, _ = run(linear, random(2, 24, K), asked=False)
    assert not report.counts and not report.near_misses


def test_scaled_mm_alone():
    """Whoever quantises: the codes are taken as they are."""
    (xq, x_scale), (wq, w_scale) = ops.quantize_fp8(random(24, K)), quantised("token")

    def product(xq, wq, x_scale, w_scale):
        return torch._scaled_mm(xq, wq.t(), x_scale, w_scale.t(), out_dtype=torch.bfloat16)

    report, got = run(product, xq, wq, x_scale, w_scale)
    assert report.counts == {"scaled_mm_fp8": 1}, report
    assert torch.equal(got, ops.scaled_mm_fp8(xq, wq, x_scale, w_scale))


def test_torchao_on_hugging_faces_model(quantize):
    pytest.importorskip("transformers.models.deepseek_v4")
    from examples.model import model

    net = model("tiny", 1, torch.bfloat16, hc_sinkhorn_iters=1)
    names = []

    def chosen(module: nn.Module, name: str) -> bool:
        plain = type(module) is nn.Linear and not module.weight.shape[0] % 16 and not module.weight.shape[1] % 16
        names.extend([name] if plain and "lm_head" not in name else [])
        return bool(names) and names[-1] == name

    quantize(net, chosen)
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    report, _ = run(lambda ids: net(ids, use_cache=False).logits, ids)
    assert len(names) > 4 and report.counts["fp8_linear"] == len(names), (names, report)
    assert "scaled_mm_fp8" not in report.counts
    assert report.counts["hc_pre"] == 1
