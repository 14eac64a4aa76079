"""DeepSeek's inference code, as far as something is searched for: it is no package, so its form is written down here.

``examples/deepseek.py`` is a whole model in this form. B batch, S sequence, HC streams, H heads, d their dims.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.hyper_connection import sinkhorn_ref

# Hyper-Connections: projected first, then divided by the root mean square; fp32 from one cast to the next


def _mixes(wide: Tensor, fn: Tensor, rms_eps: float) -> Tensor:
    return F.linear(wide, fn) * torch.rsqrt(wide.square().mean(-1, keepdim=True) + rms_eps)


def _collapse(pre: Tensor, wide: Tensor, streams: Tensor) -> Tensor:
    return (pre.unsqueeze(-1) * wide.view(streams.shape)).sum(2).to(streams.dtype)


def hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, rms_eps: float, hc_eps: float, sinkhorn_iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    hc, wide = streams.shape[2], streams.flatten(2).float()
    sizes = [hc, hc, hc * hc]
    pre, post, comb = _mixes(wide, fn, rms_eps).split(sizes, -1)
    pre_base, post_base, comb_base = base.split(sizes)
    pre_scale, post_scale, comb_scale = scale.unbind(0)
    pre = torch.sigmoid(pre * pre_scale + pre_base) + hc_eps
    post = 2 * torch.sigmoid(post * post_scale + post_base)
    comb = sinkhorn_ref((comb * comb_scale + comb_base).unflatten(-1, (hc, hc)), hc_eps, sinkhorn_iters)
    return post, comb, _collapse(pre, wide, streams)


def hc_post(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = (comb.unsqueeze(-1) * streams.unsqueeze(-2)).sum(2)
    return (post.unsqueeze(-1) * output.unsqueeze(-2) + mixed).to(streams.dtype)


def hc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, rms_eps: float, hc_eps: float) -> Tensor:
    wide = streams.flatten(2).float()
    pre = torch.sigmoid(_mixes(wide, fn, rms_eps) * scale + base) + hc_eps
    return _collapse(pre, wide, streams)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * wide).to(x.dtype)


# The compressor


def compress(
    kv: Tensor, gate: Tensor, position_bias: Tensor, norm_weight: Tensor, table: Tensor, eps: float, overlap: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    ratio, d = position_bias.shape[0], norm_weight.shape[0]
    count = kv.shape[1] // ratio
    kv, gate = kv.unflatten(1, (count, ratio)), gate.unflatten(1, (count, ratio)) + position_bias

    def windows(x: Tensor, fill: float) -> Tensor:
        previous = F.pad(x[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=fill)
        return torch.cat((previous, x[..., d:]), 2)

    if overlap:
        kv, gate = windows(kv, 0.0), windows(gate, float("-inf"))
    entries = rms_norm((kv * gate.softmax(2)).sum(2).to(dtype), norm_weight, eps)
    apply_rope(entries[..., -2 * table.shape[-1] :], table)
    return entries


def round_nope(entries: Tensor, rope: int) -> Tensor:
    entries = entries.clone()
    plain = entries[..., :-rope]
    wide, scale = _scaled(plain, 64, 448.0, 1e-4)
    codes = wide.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    entries[..., :-rope] = (codes.float() * scale).flatten(-2).to(entries.dtype)
    return entries


# The indexer


def apply_rope(x: Tensor, table: Tensor) -> None:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    table = table.view(1, table.shape[0], *[1] * (x.dim() - 3), table.shape[1])
    x.copy_(torch.view_as_real(pairs * table).flatten(-2))


def hadamard(x: Tensor) -> Tensor:
    size, wide = x.shape[-1], x.float()
    for stride in (2**i for i in range(size.bit_length() - 1)):
        low, high = wide.unflatten(-1, (-1, 2, stride)).unbind(-2)
        wide = torch.stack((low + high, low - high), -2).flatten(-3)
    return (wide * size**-0.5).to(x.dtype)


def _scaled(x: Tensor, block: int, largest: float, amax_floor: float) -> tuple[Tensor, Tensor]:
    """Blocks of ``x`` divided by power-of-two scales, and these."""
    wide = x.float().unflatten(-1, (-1, block))
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(amax_floor) / largest
    scale = (((scale.view(torch.int32) + 0x7FFFFF) >> 23) << 23).view(torch.float32)
    return wide / scale, scale


def round_fp8(x: Tensor, amax_floor: float) -> Tensor:
    return round_fp8_groups(x, x.shape[-1], amax_floor)


def round_fp8_groups(x: Tensor, group: int, amax_floor: float) -> Tensor:
    """What the activation of a linear layer goes through."""
    wide, scale = _scaled(x, group, 448.0, amax_floor)
    codes = wide.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(-2).to(x.dtype)


def round_mxfp4(x: Tensor, amax_floor: float) -> Tensor:
    wide, scale = _scaled(x, 32, 6.0, amax_floor)
    size = wide.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((wide / step).round() * step * scale).flatten(-2).to(x.dtype)


def index_score(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    return (torch.einsum("bshd,btd->bsht", q, k).relu() * weights.unsqueeze(-1)).sum(2)


def index_choice(score: Tensor, closed: Tensor, top_k: int) -> Tensor:
    score = score.masked_fill(torch.arange(score.shape[-1], device=score.device) >= closed, float("-inf"))
    chosen = score.topk(top_k, -1).indices
    return torch.where(chosen >= closed, -1, chosen)
