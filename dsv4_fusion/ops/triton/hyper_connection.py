"""mHC in Triton: two launches for pre and head, with or without the post before them; one for post alone.

``project`` reads the streams once and leaves partial sums in a workspace. ``finish`` adds them up, and then some
programs compute post and comb for many tokens while the others collapse and normalise one token each.

Batch invariance: partials are added in an order that D alone decides. A slice of D (BLOCK_D columns of all streams) is
summed on its own; GROUP slices are added one after the other, then the groups. Few tokens: a program does one slice and
``finish`` adds both levels. Many tokens: a program does a whole group. The dot's shape is the same in both, and
floating-point contraction is off: where a fused multiply-add is meant, it is written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from .hc_finish import finish
from .hc_project import place, project

GROUP = 8  # slices of D that are added before the groups are
ROWS = 64  # rows of every dot: what one warpgroup's matrix instruction takes
FEW_TOKENS = 256  # up to here a program does one slice of 32 tokens, above a group of slices of 64 tokens
MIX_TOKENS = 4  # tokens whose Sinkhorn iterations share a program


@dataclass(frozen=True)
class _Plan:
    """What the kernels are compiled for. The token count enters by one bit."""

    n: int  # columns of the workspace: the mixes, and four for the sum of squares
    tokens: int
    block_d: int
    steps: int  # slices that a program of project adds up
    options: dict
    parts: int  # partials that a token is left with
    group: int  # how many of them finish adds before the groups
    groups: int  # a power of two
    row: int
    row_options: dict


def _has_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _plan(hc: int, d: int, mix: int, dtype: torch.dtype, few: bool, device: torch.device) -> _Plan:
    block_d = 32 if hc <= 4 else 16
    tokens, steps, group, warps = (32, 1, GROUP, 4) if few else (64, GROUP, 1, 8)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    if not few and hc <= 4 and dtype == torch.bfloat16:
        options["maxnreg"] = 128  # two programs a multiprocessor
    row = triton.next_power_of_2(d)
    row_options = {"num_warps": min(16, max(4, row * hc * dtype.itemsize // 8192)), "enable_fp_fusion": False}
    if _has_dependent_launch(device):
        row_options["launch_pdl"] = True  # finish starts while project drains, and waits for it
    return _Plan(
        n=max(16, triton.next_power_of_2(mix + 4)),
        tokens=tokens,
        block_d=block_d,
        steps=steps,
        options=options,
        parts=triton.cdiv(d, block_d * steps),
        group=group,
        groups=triton.next_power_of_2(triton.cdiv(d, block_d * GROUP)),
        row=row,
        row_options=row_options,
    )


def _fused(output, streams, post, comb, fn, base, scale, weight, rms_eps, hc_eps, iters, norm_eps, *, store=False):
    """Both launches. Returns (new streams, post, comb, collapsed), None where there is none; iters 0 is the head."""
    *lead, hc, d = streams.shape
    mix = fn.shape[0]
    tokens = streams.numel() // (hc * d)
    streams, fn, base, scale = streams.contiguous(), fn.contiguous(), base.contiguous(), scale.contiguous()
    mixed = output is not None
    if mixed:
        output, post, comb = output.contiguous(), post.contiguous(), comb.contiguous()
    if weight is not None:
        weight = weight.contiguous()
    new = torch.empty_like(streams) if store else None
    collapsed = streams.new_empty([*lead, d])
    new_post = new_comb = None
    if iters > 0:
        new_post = streams.new_empty([*lead, hc], dtype=torch.float32)
        new_comb = streams.new_empty([*lead, hc, hc], dtype=torch.float32)
    if tokens == 0:
        return new, new_post, new_comb, collapsed
    plan = _plan(hc, d, mix, streams.dtype, tokens <= FEW_TOKENS, streams.device)
    work = streams.new_empty([plan.parts, tokens, plan.n], dtype=torch.float32)
    pdl = "launch_pdl" in plan.row_options
    project[(plan.parts * triton.cdiv(tokens, plan.tokens),)](
        output, streams, post, comb, new, fn, work, tokens,
        d, hc, mix, plan.n, mixed, store, plan.tokens, ROWS, plan.block_d, plan.steps, pdl,
        **plan.options,
    )  # fmt: skip
    again = mixed and not store  # the new streams were not written: finish mixes them once more
    finish[(triton.cdiv(tokens, MIX_TOKENS) * (MIX_TOKENS + 1),)](
        output if again else None, new if store else streams, post if again else None, comb if again else None,
        base, scale, weight, work, new_post, new_comb, collapsed, tokens, rms_eps, hc_eps, norm_eps,
        d, hc, mix, plan.n, plan.parts, plan.group, plan.groups, iters, MIX_TOKENS, plan.row, again,
        weight is not None, pdl, **plan.row_options,
    )  # fmt: skip
    return new, new_post, new_comb, collapsed


def hc_pre(
    hidden_streams, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20, norm_eps=1e-6
):
    """Inputs that are not contiguous are copied, here and below."""
    *lead, _, d = hidden_streams.shape
    hidden_streams = hidden_streams.expand(*lead, fn.shape[1] // d, d)
    return _fused(
        None, hidden_streams, None, None, fn, base, scale, norm_weight, rms_eps, hc_eps, sinkhorn_iters, norm_eps
    )[1:]


def hc_post(output, hidden_streams, post, comb):
    output, hidden_streams = output.contiguous(), hidden_streams.contiguous()
    new = torch.empty_like(hidden_streams)
    if new.numel() == 0:
        return new
    *_, hc, d = hidden_streams.shape
    block = min(1024, triton.next_power_of_2(d))
    place[(output.numel() // d * triton.cdiv(d, block),)](
        output, hidden_streams, post.contiguous(), comb.contiguous(), new, output.numel() // d, d, hc, block,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return new


def hc_post_pre(
    output, hidden_streams, post, comb, fn, base, scale, norm_weight=None,
    *, rms_eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20, norm_eps=1e-6,
):  # fmt: skip
    return _fused(
        output, hidden_streams, post, comb, fn, base, scale, norm_weight, rms_eps, hc_eps, sinkhorn_iters, norm_eps,
        store=True,
    )  # fmt: skip


def hc_head(hidden_streams, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, norm_eps=1e-6):
    return _fused(None, hidden_streams, None, None, fn, base, scale, norm_weight, rms_eps, hc_eps, 0, norm_eps)[3]


def hc_post_head(
    output, hidden_streams, post, comb, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, norm_eps=1e-6
):
    return _fused(output, hidden_streams, post, comb, fn, base, scale, norm_weight, rms_eps, hc_eps, 0, norm_eps)[3]
