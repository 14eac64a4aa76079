"""Hyper-Connections as DeepSeek's inference code and the operators' references write them; near misses of these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dsv4_fusion
from dsv4_fusion.ops.hyper_connection import hc_head_ref, hc_post_head_ref, hc_post_pre_ref, hc_post_ref, hc_pre_ref
from examples import deepseek
from examples.deepseek import Config, HyperConnection, RMSNorm

CONFIG = Config.tiny(dim=32, hc_sinkhorn_iters=3)
PRE, HEAD = (HyperConnection(CONFIG, head=head).requires_grad_(False) for head in (False, True))
NORM = RMSNorm(32, 1e-5).requires_grad_(False)


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 32), (2, 3, 4, 32), (2, 3, 4), (2, 3, 4, 4)
    output, streams, post, comb = (torch.randn(shape, generator=generator) for shape in shapes)
    return output.to(dtype), streams.to(dtype), post, comb


def boundary(output, x, post, comb):
    streams = deepseek.hc_post(output, x, post, comb)
    inner, post, comb = deepseek.hc_pre(PRE, streams)
    return streams, post, comb, NORM(inner)


FORMS = {
    "hc_pre": (
        lambda output, x, post, comb: deepseek.hc_pre(PRE, x),
        lambda output, x, post, comb: hc_pre_ref(x, PRE.fn, PRE.base, PRE.scale, NORM.weight, sinkhorn_iters=7),
    ),
    "hc_post": (deepseek.hc_post, hc_post_ref),
    "hc_post_pre": (boundary, lambda *x: hc_post_pre_ref(*x, PRE.fn, PRE.base, PRE.scale, NORM.weight, norm_eps=1e-3)),
    "hc_head": (
        lambda output, x, post, comb: NORM(deepseek.hc_head(HEAD, x)),
        lambda output, x, post, comb: hc_head_ref(x, HEAD.fn, HEAD.base, HEAD.scale),
    ),
    "hc_post_head": (
        lambda *x: deepseek.hc_head(HEAD, deepseek.hc_post(*x)),
        lambda *x: hc_post_head_ref(*x, HEAD.fn, HEAD.base, HEAD.scale, NORM.weight),
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", [0, 1], ids=["deepseek", "reference"])
@pytest.mark.parametrize("name", FORMS)
def test_both_forms_are_fused(name, form, dtype):
    function = FORMS[name][form]
    report = dsv4_fusion.explain(lambda *x: function(*x), *inputs(dtype))
    assert report.counts == {name: 1}, report
    assert not report.near_misses, report


def test_the_captured_numbers_are_the_models():
    """The epsilons differ from each other and from the defaults; fp32 shows them."""
    config = Config.tiny(dim=32, hc_sinkhorn_iters=3, hc_eps=0.03, norm_eps=0.2)
    pre = HyperConnection(config).requires_grad_(False)

    def function(output, x, post, comb):
        streams = deepseek.hc_post(output, x, post, comb)
        return streams, *deepseek.hc_pre(pre, streams)

    torch._dynamo.reset()
    options = {"reference": True, "strict": 1}
    with torch.no_grad():
        ours = torch.compile(function, backend="dsv4_fusion", options=options)(*inputs(torch.float32))
    torch._dynamo.reset()
    for got, expected in zip(ours, function(*inputs(torch.float32)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def not_transposed(output, x, post, comb):
    return deepseek.hc_post(output, x, post, comb.transpose(-1, -2))


def over_the_second_index(output, x, post, comb):
    mixed = (comb.unsqueeze(-1) * x.unsqueeze(-2)).sum(3)
    return (post.unsqueeze(-1) * output.unsqueeze(-2) + mixed).to(x.dtype)


def mixed_elsewhere(output, x, post, comb):
    mixed = (comb.unsqueeze(-1) * x.unsqueeze(-2)).sum(2)
    return (post.unsqueeze(-1) * output.unsqueeze(-2) + mixed).to(x.dtype), mixed


def subtracted(output, x, post, comb):
    mixed = (comb.unsqueeze(-1) * x.unsqueeze(-2)).sum(2)
    return (post.unsqueeze(-1) * output.unsqueeze(-2) - mixed).to(x.dtype)


def rounded_first(output, x, post, comb):
    mixed = (comb.unsqueeze(-1) * x.unsqueeze(-2)).sum(2).to(x.dtype)
    return (post.unsqueeze(-1) * output.unsqueeze(-2) + mixed).to(x.dtype)


POSTS = {  # None: less than what counts as near is left of the pattern
    "summed over the second index": (over_the_second_index, None),
    "sum used elsewhere": (mixed_elsewhere, "is used outside the pattern too"),
    "streams subtracted": (subtracted, "found aten.sub.Tensor"),
    "sum rounded before it is added": (rounded_first, None),
}


@pytest.mark.parametrize("name", POSTS)
def test_a_post_that_nearly_matches(name):
    function, reason = POSTS[name]
    report = dsv4_fusion.explain(lambda *x: function(*x), *inputs())
    assert not report.counts, report
    if reason is None:
        assert not report.near_misses, report
    else:
        assert reason in report.near_misses[0].reason, report


def test_a_transposed_comb_is_another_input():
    """What is transposed before it comes in is no part of the pattern, and stays."""
    report = dsv4_fusion.explain(not_transposed, *inputs())
    assert report.counts == {"hc_post": 1}, report


def pre_with(rms=lambda wide: wide.square().mean(-1, keepdim=True), factor=2, rows=-1, keep=False):
    def function(output, x, post, comb):
        wide = x.flatten(2).float()
        mixes = torch.nn.functional.linear(wide, PRE.fn) * torch.rsqrt(rms(wide) + 1e-6)
        pre, post, comb = mixes.split([4, 4, 16], -1)
        bases, scales = PRE.base.split([4, 4, 16]), PRE.scale.unbind(0)
        pre = torch.sigmoid(pre * scales[0] + bases[0]) + 1e-6
        post = factor * torch.sigmoid(post * scales[1] + bases[1])
        comb = (comb * scales[2] + bases[2]).unflatten(-1, (4, 4)).softmax(-1) + 1e-6
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(rows, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
        result = post, comb, (pre.unsqueeze(-1) * wide.view(x.shape)).sum(2).to(x.dtype)
        return (*result, mixes) if keep else result

    return function


PRES = {
    "largest magnitude for mean square": ({"rms": lambda wide: wide.abs().amax(-1, keepdim=True)}, "expected"),
    "post without its factor 2": ({"factor": 1}, "expected"),
    "columns for rows": ({"rows": -2}, "expected -1 among its arguments, found -2"),
    "mixes used elsewhere": ({"keep": True}, "is used outside the pattern too"),
}


@pytest.mark.parametrize("name", PRES)
def test_a_pre_that_nearly_matches(name):
    changes, reason = PRES[name]
    report = dsv4_fusion.explain(pre_with(**changes), *inputs())
    assert not report.counts, report
    (miss,) = report.near_misses
    assert miss.fusion == "hc_pre" and reason in miss.reason, miss


def test_the_exchangeable_pre_matches_unchanged():
    assert dsv4_fusion.explain(pre_with(), *inputs()).counts == {"hc_pre": 1}
