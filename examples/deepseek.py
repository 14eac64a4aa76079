"""DeepSeek-V4's prefill as DeepSeek's own inference code writes it: eager, plain PyTorch, one file.

The mathematics is that of ``transformers.models.deepseek_v4``; the rounding is not. Here the Hyper-Connections stay in
fp32 between one cast in and one cast out, RoPE is a product of complex numbers written back into the slice, the
projections are FP8 with block scales, the keys are rounded to FP8, and the indexer's queries and keys go through a
Hadamard transform and are rounded to MXFP4. Rounding is written as ordinary tensor code, quantise and dequantise, so
that the model runs anywhere and torch.compile sees one graph of it.

B is batch, S sequence, D ``dim``, HC streams, H heads, d a head's dims, R its rotated dims (the last ones), T the
compressed entries, S // ratio. There is no cache: ``Transformer(config)(tokens)`` gives the logits of a whole prompt.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 128  # of the FP8 projections: weights 128 x 128, activations 1 x 128


@dataclass(frozen=True)
class Config:
    """Sizes. The defaults are tiny, and what an attention layer is follows from its compression ratio.

    Attributes:
        compress_ratios: one a layer. 0: the sliding window alone; 4: and compressed entries that overlap, the best
            ``index_topk`` of which an indexer chooses; another: and compressed entries without overlap, all of them.
        index_format: what the indexer's queries and keys are rounded to, "mxfp4" or "fp8".
        index_hadamard: whether they go through a Hadamard transform before.
        quantise: False leaves out every rounding to FP8 and MXFP4.
        dtype: of activations, embedding and unquantised projections.
    """

    vocab_size: int = 128
    dim: int = 128
    compress_ratios: tuple[int, ...] = (0, 4, 16)
    n_heads: int = 4
    head_dim: int = 128
    rope_head_dim: int = 64
    q_lora_rank: int = 128
    o_groups: int = 2
    o_lora_rank: int = 64
    window_size: int = 16
    index_n_heads: int = 4
    index_head_dim: int = 128
    index_topk: int = 4
    index_format: str = "mxfp4"
    index_hadamard: bool = True
    moe_inter_dim: int = 128
    n_routed_experts: int = 4
    n_activated_experts: int = 2
    route_scale: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    norm_eps: float = 1e-6
    max_seq_len: int = 512
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_factor: float = 1.0  # YaRN, in the layers that compress; 1 is plain RoPE
    original_seq_len: int = 65536
    quantise: bool = True
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def tiny(cls, **changes) -> Config:
        """Three layers, one of each kind: a second on a CPU."""
        return replace(cls(), **changes)

    @classmethod
    def flash(cls, **changes) -> Config:
        """V4-Flash's widths; four layers, 32 experts and a small vocabulary."""
        sizes = {"vocab_size": 4096, "dim": 4096, "compress_ratios": (0, 0, 4, 128), "n_heads": 64, "head_dim": 512}
        sizes |= {"q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024, "window_size": 128, "index_n_heads": 64}
        sizes |= {"index_topk": 512, "moe_inter_dim": 2048, "n_routed_experts": 32, "n_activated_experts": 6}
        return replace(cls(), **sizes | {"max_seq_len": 16384, "rope_factor": 16.0} | changes)


# Rounding


def ceil_power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two that is not below ``x``, for positive normal fp32: its exponent, rounded up."""
    return (((x.view(torch.int32) + 0x7FFFFF) >> 23) << 23).view(torch.float32)


def round_fp8(x: Tensor, block: int) -> Tensor:
    """``x`` rounded to e4m3 with one power-of-two scale for every ``block`` values of the last dimension."""
    wide = x.float().unflatten(-1, (-1, block))
    scale = ceil_power_of_two(wide.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448.0)
    codes = (wide / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(-2).to(x.dtype)


def round_mxfp4(x: Tensor, block: int = 32) -> Tensor:
    """``x`` rounded to e2m1, ties to even, with one power-of-two scale for every 32 values of the last dimension."""
    wide = x.float().unflatten(-1, (-1, block))
    scale = ceil_power_of_two(wide.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0**-126) / 6.0)
    wide = wide / scale
    size = wide.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))  # 0 .5 1 1.5 | 2 3 | 4 6
    return ((wide / step).round() * step * scale).flatten(-2).to(x.dtype)


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of the last dimension, in Sylvester's order."""
    n, wide = x.shape[-1], x.float()
    for stride in (2**i for i in range(n.bit_length() - 1)):
        low, high = wide.unflatten(-1, (-1, 2, stride)).unbind(-2)
        wide = torch.stack((low + high, low - high), -2).flatten(-3)
    return (wide * n**-0.5).to(x.dtype)


def round_index(x: Tensor, config: Config) -> Tensor:
    """What both sides of the indexer's product go through."""
    if config.index_hadamard:
        x = hadamard(x)
    if not config.quantise:
        return x
    return round_mxfp4(x) if config.index_format == "mxfp4" else round_fp8(x, x.shape[-1])


# RoPE


def rope_table(config: Config, compressed: bool) -> Tensor:
    """cos + i sin of every position and pair, complex64 [max_seq_len, R / 2]."""
    dims, theta = config.rope_head_dim, config.compress_rope_theta if compressed else config.rope_theta
    frequencies = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    if compressed and config.rope_factor != 1.0:  # YaRN: slow pairs are stretched, fast ones kept, a ramp between

        def pair(turns: float) -> float:
            return dims * math.log(config.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(pair(32.0)), 0), min(math.ceil(pair(1.0)), dims - 1)
        kept = 1 - ((torch.arange(dims // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        frequencies = frequencies / config.rope_factor * (1 - kept) + frequencies * kept
    angles = torch.outer(torch.arange(config.max_seq_len), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, table: Tensor, inverse: bool = False) -> None:
    """Rotate the pairs (2i, 2i + 1) of ``x`` [B, S, R] or [B, S, H, R] in place; ``table`` is [S, R / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    table = table.conj() if inverse else table
    table = table.view(1, table.shape[0], *[1] * (x.dim() - 3), table.shape[1])
    x.copy_(torch.view_as_real(pairs * table).flatten(-2))


# Layers


class Linear(nn.Module):
    """A projection [..., K] to [..., N] without bias: e4m3 weights and activations, with power-of-two block scales.

    Codes times a power of two are exact in bf16, so the product of the dequantised blocks rounds only where the
    tensor cores' sums do.
    """

    def __init__(self, inputs: int, outputs: int, config: Config) -> None:
        super().__init__()
        self.quantise, self.dtype = config.quantise, config.dtype
        weight = torch.randn(outputs, inputs) * inputs**-0.5
        if self.quantise:
            grid = -(-outputs // BLOCK), BLOCK, -(-inputs // BLOCK), BLOCK
            padded = F.pad(weight, (0, -inputs % BLOCK, 0, -outputs % BLOCK)).view(grid)
            scale = ceil_power_of_two(padded.abs().amax((1, 3), keepdim=True).clamp_min(1e-4) / 448.0)
            codes = (padded / scale).view(grid[0] * BLOCK, -1)[:outputs, :inputs]
            weight = codes.contiguous().to(torch.float8_e4m3fn)
            self.scale = nn.Buffer(scale.squeeze((1, 3)))
        else:
            weight = weight.to(self.dtype)
        self.weight = nn.Buffer(weight)

    def dequantised(self) -> Tensor:
        """The weight in the model's dtype."""
        if not self.quantise:
            return self.weight
        outputs, inputs = self.weight.shape
        scale = self.scale.repeat_interleave(BLOCK, 0)[:outputs].repeat_interleave(BLOCK, 1)[:, :inputs]
        return (self.weight.float() * scale).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(round_fp8(x, BLOCK) if self.quantise else x, self.dequantised())


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim).uniform_(0.5, 1.5)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


class Compressor(nn.Module):
    """[B, S, D] to one entry [B, T, d] for every ``ratio`` tokens, pooled by gates; fp32 up to the pooled value."""

    def __init__(self, config: Config, ratio: int, head_dim: int, indexer: bool) -> None:
        super().__init__()
        self.config, self.ratio, self.head_dim, self.indexer = config, ratio, head_dim, indexer
        self.overlap = ratio == 4
        width = (1 + self.overlap) * head_dim
        self.wkv = nn.Parameter(torch.randn(width, config.dim) * config.dim**-0.5)
        self.wgate = nn.Parameter(torch.randn(width, config.dim) * config.dim**-0.5)
        self.ape = nn.Parameter(torch.randn(ratio, width) * 0.5)
        self.norm = RMSNorm(head_dim, config.norm_eps)

    def windows(self, x: Tensor, fill: float) -> Tensor:
        """[B, T, ratio, 2d] to [B, T, 2 ratio, d]: the previous window's first half above this one's second half."""
        previous = F.pad(x[:, :-1, :, : self.head_dim], (0, 0, 0, 0, 1, 0), value=fill)
        return torch.cat((previous, x[..., self.head_dim :]), 2)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        count, rope = x.shape[1] // self.ratio, self.config.rope_head_dim
        wide = x[:, : count * self.ratio].float()
        kv = F.linear(wide, self.wkv).unflatten(1, (count, self.ratio))
        gate = F.linear(wide, self.wgate).unflatten(1, (count, self.ratio)) + self.ape
        if self.overlap:
            kv, gate = self.windows(kv, 0.0), self.windows(gate, float("-inf"))
        entries = self.norm((kv * gate.softmax(2)).sum(2).to(x.dtype))
        apply_rope(entries[..., -rope:], table[: count * self.ratio : self.ratio])
        if self.indexer:
            return round_index(entries, self.config)
        return round_nope(entries, self.config)


def round_nope(kv: Tensor, config: Config) -> Tensor:
    """The key's leading dims in FP8, in groups of 64; the rotated ones keep their dtype."""
    if config.quantise:
        kv[..., : -config.rope_head_dim] = round_fp8(kv[..., : -config.rope_head_dim], 64)
    return kv


class Indexer(nn.Module):
    """Chooses ``index_topk`` compressed entries for every token: [B, S, k], -1 where fewer are in its past."""

    def __init__(self, config: Config, ratio: int) -> None:
        super().__init__()
        self.config, self.ratio = config, ratio
        self.n_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.n_heads * self.head_dim, config)
        self.weights_proj = nn.Linear(config.dim, self.n_heads, bias=False, dtype=config.dtype)
        self.compressor = Compressor(config, ratio, self.head_dim, indexer=True)
        self.softmax_scale = self.head_dim**-0.5

    def forward(self, x: Tensor, q_lora: Tensor, table: Tensor) -> Tensor:
        length, count = x.shape[1], x.shape[1] // self.ratio
        q = self.wq_b(q_lora).unflatten(-1, (self.n_heads, self.head_dim))
        apply_rope(q[..., -self.config.rope_head_dim :], table)
        q = round_index(q, self.config)
        k = self.compressor(x, table)
        weights = self.weights_proj(x) * (self.softmax_scale * self.n_heads**-0.5)
        score = torch.einsum("bshd,btd->bsht", q, k)
        score = (score.relu() * weights.unsqueeze(-1)).sum(2)
        closed = torch.arange(1, length + 1, device=x.device).unsqueeze(1) // self.ratio  # entries in a token's past
        score = score.masked_fill(torch.arange(count, device=x.device) >= closed, float("-inf"))
        chosen = score.topk(min(self.config.index_topk, count), -1).indices
        return torch.where(chosen >= closed, -1, chosen)


class Attention(nn.Module):
    """One key per token, which is also the value, for all heads: a sliding window, and compressed entries."""

    def __init__(self, config: Config, ratio: int) -> None:
        super().__init__()
        self.config, self.ratio = config, ratio
        width = config.n_heads * config.head_dim
        self.wq_a = Linear(config.dim, config.q_lora_rank, config)
        self.q_norm = RMSNorm(config.q_lora_rank, config.norm_eps)
        self.wq_b = Linear(config.q_lora_rank, width, config)
        self.wkv = Linear(config.dim, config.head_dim, config)
        self.kv_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.wo_a = Linear(width // config.o_groups, config.o_groups * config.o_lora_rank, config)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, config.dim, config)
        self.sink = nn.Parameter(torch.randn(config.n_heads) * 0.5)
        self.compressor = Compressor(config, ratio, config.head_dim, indexer=False) if ratio else None
        self.indexer = Indexer(config, ratio) if ratio == 4 else None

    def visible(self, x: Tensor, q_lora: Tensor, table: Tensor) -> Tensor:
        """Which keys a token sees, [B or 1, S, S + T]: the window's tokens, then compressed entries."""
        length = x.shape[1]
        at = torch.arange(length, device=x.device)
        behind = at.unsqueeze(1) - at
        window = ((behind >= 0) & (behind < self.config.window_size)).unsqueeze(0)
        if not self.ratio:
            return window
        count = length // self.ratio
        if self.indexer is None:
            entries = (torch.arange(count, device=x.device) < (at + 1).unsqueeze(1) // self.ratio).unsqueeze(0)
        else:
            chosen = self.indexer(x, q_lora, table)  # -1 goes to a column that is cut off again
            entries = torch.zeros(x.shape[0], length, count + 1, dtype=torch.bool, device=x.device)
            entries = entries.scatter(-1, torch.where(chosen < 0, count, chosen), True)[..., :count]
        return torch.cat((window.expand(entries.shape[0], -1, -1), entries), -1)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        config, rope = self.config, self.config.rope_head_dim
        q_lora = self.q_norm(self.wq_a(x))
        q = self.wq_b(q_lora).unflatten(-1, (config.n_heads, config.head_dim))
        wide = q.float()
        q = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + config.norm_eps)).to(x.dtype)
        apply_rope(q[..., -rope:], table)
        kv = self.kv_norm(self.wkv(x))
        apply_rope(kv[..., -rope:], table)
        kv = round_nope(kv, config)
        if self.compressor is not None:
            kv = torch.cat((kv, self.compressor(x, table)), 1)
        out = attend(q, kv, self.visible(x, q_lora, table), self.sink)
        apply_rope(out[..., -rope:], table, inverse=True)  # the values were rotated with the keys
        out = out.flatten(2).unflatten(-1, (config.o_groups, -1))
        wo_a = self.wo_a.dequantised().unflatten(0, (config.o_groups, config.o_lora_rank))
        return self.wo_b(torch.einsum("bsgd,grd->bsgr", out, wo_a).flatten(2))


def attend(q: Tensor, kv: Tensor, visible: Tensor, sink: Tensor) -> Tensor:
    """Softmax attention of q [B, S, H, d] to kv [B, T, d] with one more logit a head that has no value."""
    logits = torch.einsum("bshd,btd->bhst", q, kv).float() * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~visible.unsqueeze(1), float("-inf"))
    sink = sink.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    weights = torch.cat((logits, sink), -1).softmax(-1)[..., :-1]
    return torch.einsum("bhst,btd->bshd", weights.to(q.dtype), kv)


class Expert(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        self.w1 = Linear(config.dim, config.moe_inter_dim, config)
        self.w2 = Linear(config.moe_inter_dim, config.dim, config)
        self.w3 = Linear(config.dim, config.moe_inter_dim, config)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        gate = self.w1(x).float().clamp(max=self.limit)
        inner = F.silu(gate) * self.w3(x).float().clamp(-self.limit, self.limit)
        return self.w2((inner if weight is None else inner * weight).to(x.dtype))


class MoE(nn.Module):
    """Every expert sees every token, with weight 0 where it was not chosen: wasteful, and one graph."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Parameter(torch.randn(config.n_routed_experts, config.dim) * config.dim**-0.5)
        self.bias = nn.Parameter(torch.randn(config.n_routed_experts) * 0.1)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.n_routed_experts))
        self.shared_experts = Expert(config)

    def route(self, x: Tensor) -> Tensor:
        """[B, S, experts], fp32: the weights of the chosen ones, 0 for the others."""
        scores = F.softplus(F.linear(x.float(), self.gate)).sqrt()
        chosen = (scores + self.bias).topk(self.config.n_activated_experts, -1).indices  # the bias only chooses
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * self.config.route_scale
        return torch.zeros_like(scores).scatter(-1, chosen, weights)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.route(x)
        total = torch.zeros_like(x, dtype=torch.float32)
        for index, expert in enumerate(self.experts):
            total = total + expert(x, weights[..., index : index + 1])
        return (total + self.shared_experts(x)).to(x.dtype)


# Hyper-Connections


class HyperConnection(nn.Module):
    """The parameters that mix the streams around one sublayer, or before the head: fp32."""

    def __init__(self, config: Config, head: bool = False) -> None:
        super().__init__()
        self.config, streams = config, config.hc_mult
        mixes = streams if head else (2 + streams) * streams
        self.fn = nn.Parameter(torch.randn(mixes, streams * config.dim) * (streams * config.dim) ** -0.5)
        self.base = nn.Parameter(torch.randn(mixes) * 0.5)
        self.scale = nn.Parameter(torch.tensor([2.0] if head else [2.0, 0.02, 0.25]))

    def mixes(self, wide: Tensor) -> Tensor:
        """[B, S, HC D], fp32, to [B, S, MIX]: projected first, then divided by the root mean square."""
        return F.linear(wide, self.fn) * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.norm_eps)


def hc_pre(connection: HyperConnection, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [B, S, HC, D] to a sublayer's input [B, S, D], and the fp32 weights of :func:`hc_post`."""
    config, streams = connection.config, connection.config.hc_mult
    wide = x.flatten(2).float()
    sizes = [streams, streams, streams * streams]
    pre, post, comb = connection.mixes(wide).split(sizes, -1)
    pre_base, post_base, comb_base = connection.base.split(sizes)
    pre_scale, post_scale, comb_scale = connection.scale.unbind(0)
    pre = torch.sigmoid(pre * pre_scale + pre_base) + config.hc_eps
    post = 2 * torch.sigmoid(post * post_scale + post_base)
    comb = (comb * comb_scale + comb_base).unflatten(-1, (streams, streams))
    comb = comb.softmax(-1) + config.hc_eps
    comb = comb / (comb.sum(-2, keepdim=True) + config.hc_eps)
    for _ in range(config.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + config.hc_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + config.hc_eps)
    return (pre.unsqueeze(-1) * wide.view(x.shape)).sum(2).to(x.dtype), post, comb


def hc_post(output: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """A sublayer's output [B, S, D] into the streams [B, S, HC, D]; ``comb`` is summed over its first index."""
    mixed = (comb.unsqueeze(-1) * x.unsqueeze(-2)).sum(2)
    return (post.unsqueeze(-1) * output.unsqueeze(-2) + mixed).to(x.dtype)


def hc_head(connection: HyperConnection, x: Tensor) -> Tensor:
    """The streams after the last layer, [B, S, HC, D], to [B, S, D]."""
    wide = x.flatten(2).float()
    pre = torch.sigmoid(connection.mixes(wide) * connection.scale + connection.base) + connection.config.hc_eps
    return (pre.unsqueeze(-1) * wide.view(x.shape)).sum(2).to(x.dtype)


# The model


class Layer(nn.Module):
    def __init__(self, config: Config, ratio: int) -> None:
        super().__init__()
        self.attn, self.ffn = Attention(config, ratio), MoE(config)
        self.attn_norm, self.ffn_norm = (RMSNorm(config.dim, config.norm_eps) for _ in range(2))
        self.attn_hc, self.ffn_hc = (HyperConnection(config) for _ in range(2))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        inner, post, comb = hc_pre(self.attn_hc, x)
        x = hc_post(self.attn(self.attn_norm(inner), table), x, post, comb)
        inner, post, comb = hc_pre(self.ffn_hc, x)
        return hc_post(self.ffn(self.ffn_norm(inner)), x, post, comb)


class Transformer(nn.Module):
    """Tokens [B, S] to fp32 logits [B, S, vocab_size]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim, dtype=config.dtype)
        self.layers = nn.ModuleList(Layer(config, ratio) for ratio in config.compress_ratios)
        self.hc_head = HyperConnection(config, head=True)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Parameter(torch.randn(config.vocab_size, config.dim) * config.dim**-0.5)
        self.rope = nn.Buffer(rope_table(config, compressed=False))
        self.compressed_rope = nn.Buffer(rope_table(config, compressed=True))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
        for layer, ratio in zip(self.layers, self.config.compress_ratios, strict=True):
            table = self.compressed_rope if ratio else self.rope
            x = layer(x, table[: tokens.shape[1]])
        return F.linear(self.norm(hc_head(self.hc_head, x)).float(), self.head)


def model(config: Config, device: str = "cpu", seed: int = 0) -> Transformer:
    """A model with random weights, for inference."""
    torch.manual_seed(seed)
    with torch.device(device):
        return Transformer(config).requires_grad_(False).eval()


def main() -> None:
    import dsv4_fusion

    config = Config.tiny()
    tokens = torch.randint(0, config.vocab_size, (2, 64))
    report = dsv4_fusion.explain(model(config), tokens)
    print(report)
    boundaries = 2 * len(config.compress_ratios) - 1
    assert report.graphs == 1 and not report.near_misses
    expected = {"hc_pre": 1, "hc_post_pre": boundaries, "hc_post_head": 1, "indexer_topk": 1}
    assert report.counts == expected | {"compress_csa": 2, "compress_hca": 1}


if __name__ == "__main__":
    main()
