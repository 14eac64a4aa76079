"""Manifold-constrained Hyper-Connections (mHC): the mixing of DeepSeek-V4's residual streams around a sublayer.

Shapes: ``...`` are any leading dimensions (batch and sequence, or tokens), HC is ``hc_mult`` (the number of streams),
D the hidden size, MIX = (2 + HC) · HC, ordered pre (HC) | post (HC) | comb (HC · HC, row-major).

Streams and sublayer outputs are bf16, fp16, fp32 or fp64; parameters are any of these (the checkpoints keep fp32).
All arithmetic is fp32 (fp64 for fp64 streams), with one rounding per output. The projection reads the streams after
they were rounded to their own dtype, and the norm reads the rounded collapsed stream, as the eager model does.

Source: DeepSeek-V4 technical report, section 2.2; Xie et al., "mHC: Manifold-Constrained Hyper-Connections".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import Implementation, define, expect, refuse_grad

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# References


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mixes_ref(streams: Tensor, fn: Tensor, rms_eps: float) -> Tensor:
    flat = streams.flatten(-2).to(_wide(streams.dtype))
    rsqrt = torch.rsqrt(flat.square().mean(-1, keepdim=True) + rms_eps)
    return F.linear(flat, fn.to(flat.dtype)) * rsqrt


def _collapse_ref(pre: Tensor, streams: Tensor, norm_weight: Tensor | None, norm_eps: float) -> Tensor:
    collapsed = (pre.unsqueeze(-1) * streams.to(pre.dtype)).sum(-2).to(streams.dtype)
    if norm_weight is None:
        return collapsed
    wide = collapsed.to(pre.dtype)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
    return (norm_weight.to(pre.dtype) * wide).to(streams.dtype)


def sinkhorn_ref(logits: Tensor, hc_eps: float, sinkhorn_iters: int) -> Tensor:
    """Softmax over the last dimension, then ``sinkhorn_iters`` Sinkhorn-Knopp passes; [..., HC, HC] to the same."""
    comb = torch.softmax(logits, dim=-1) + hc_eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + hc_eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + hc_eps)
    return comb


def hc_pre_ref(
    hidden_streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None = None,
    *,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch form of :func:`hc_pre`."""
    *lead, held, hidden = hidden_streams.shape
    hc = fn.shape[1] // hidden
    if held != hc:
        hidden_streams = hidden_streams.expand(*lead, hc, hidden)
    mixes = _mixes_ref(hidden_streams, fn, rms_eps)
    base, scale = base.to(mixes.dtype), scale.to(mixes.dtype)
    pre, post, comb = mixes.split([hc, hc, hc * hc], dim=-1)
    pre_base, post_base, comb_base = base.split([hc, hc, hc * hc])
    pre_scale, post_scale, comb_scale = scale.unbind(0)
    pre = torch.sigmoid(pre * pre_scale + pre_base) + hc_eps
    post = 2 * torch.sigmoid(post * post_scale + post_base)
    comb = sinkhorn_ref((comb * comb_scale + comb_base).unflatten(-1, (hc, hc)), hc_eps, sinkhorn_iters)
    return post, comb, _collapse_ref(pre, hidden_streams, norm_weight, norm_eps)


def hc_post_ref(output: Tensor, hidden_streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Plain PyTorch form of :func:`hc_post`."""
    wide = _wide(hidden_streams.dtype)
    placed = post.to(wide).unsqueeze(-1) * output.to(wide).unsqueeze(-2)
    mixed = torch.matmul(comb.to(wide).transpose(-1, -2), hidden_streams.to(wide))
    return (placed + mixed).to(hidden_streams.dtype)


def hc_post_pre_ref(
    output: Tensor,
    hidden_streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None = None,
    **options: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch form of :func:`hc_post_pre`."""
    streams = hc_post_ref(output, hidden_streams, post, comb)
    return streams, *hc_pre_ref(streams, fn, base, scale, norm_weight, **options)


def hc_head_ref(
    hidden_streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None = None,
    *,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Plain PyTorch form of :func:`hc_head`."""
    mixes = _mixes_ref(hidden_streams, fn, rms_eps)
    pre = torch.sigmoid(mixes * scale.to(mixes.dtype) + base.to(mixes.dtype)) + hc_eps
    return _collapse_ref(pre, hidden_streams, norm_weight, norm_eps)


def hc_post_head_ref(
    output: Tensor,
    hidden_streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None = None,
    **options: float,
) -> Tensor:
    """Plain PyTorch form of :func:`hc_post_head`."""
    return hc_head_ref(hc_post_ref(output, hidden_streams, post, comb), fn, base, scale, norm_weight, **options)


# Checks, in the real call and in the fake one


def _check_streams(streams: Tensor, *others: tuple[str, Tensor | None]) -> tuple:
    expect(streams.dim() >= 2, lambda: f"hidden_streams must be [..., HC, D], got shape {tuple(streams.shape)}")
    expect(
        streams.dtype in _FLOATS,
        lambda: f"hidden_streams must be bfloat16, float16, float32 or float64, got {streams.dtype}",
    )
    *lead, hc, hidden = streams.shape
    expect(hc > 0, lambda: f"hidden_streams holds no stream: shape {tuple(streams.shape)}")
    expect(hidden > 0, lambda: f"hidden_streams has no hidden dimension: shape {tuple(streams.shape)}")
    for label, tensor in others:
        if tensor is not None:
            expect(
                tensor.device == streams.device,
                lambda: f"{label} is on {tensor.device}, hidden_streams on {streams.device}",
            )
            expect(tensor.dtype in _FLOATS, lambda: f"{label} must be floating point, got {tensor.dtype}")
    refuse_grad([streams, *(tensor for _, tensor in others)])
    return lead, hc, hidden


def _check_shape(label: str, tensor: Tensor, expected: list) -> None:
    expect(
        tensor.dim() == len(expected),
        lambda: f"{label} must have shape {expected}, got {list(tensor.shape)}",
    )
    for got, want in zip(tensor.shape, expected, strict=True):
        expect(got == want, lambda: f"{label} must have shape {expected}, got {list(tensor.shape)}")


def _check_mixing(
    mix: Callable[[int], int],
    scales: int,
    hidden_streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None = None,
    *,
    sinkhorn_iters: int = 1,
    **eps: float,
) -> None:
    """Of pre and head, which differ in the number of mixes and of scales."""
    parameters = ("fn", fn), ("base", base), ("scale", scale), ("norm_weight", norm_weight)
    _, hc, hidden = _check_streams(hidden_streams, *parameters)
    if hc == 1 and scales == 3 and fn.dim() == 2 and fn.shape[0] != 3:
        hc = fn.shape[1] // hidden  # one stream stands for all of them
    _check_shape("fn", fn, [mix(hc), hc * hidden])
    _check_shape("base", base, [mix(hc)])
    _check_shape("scale", scale, [scales])
    if norm_weight is not None:
        _check_shape("norm_weight", norm_weight, [hidden])
    for label, value in eps.items():
        expect(0 < value < float("inf"), lambda: f"{label} must be a positive, finite number, got {value}")
    expect(sinkhorn_iters >= 1, lambda: f"sinkhorn_iters must be at least 1, got {sinkhorn_iters}")


_check_pre = functools.partial(_check_mixing, lambda hc: (2 + hc) * hc, 3)
_check_head = functools.partial(_check_mixing, lambda hc: hc, 1)


def _check_post(output: Tensor, hidden_streams: Tensor, post: Tensor, comb: Tensor) -> None:
    lead, hc, hidden = _check_streams(hidden_streams, ("output", output), ("post", post), ("comb", comb))
    expect(
        output.dtype == hidden_streams.dtype,
        lambda: f"output is {output.dtype}, hidden_streams {hidden_streams.dtype}; they must be the same",
    )
    _check_shape("output", output, [*lead, hidden])
    _check_shape("post", post, [*lead, hc])
    _check_shape("comb", comb, [*lead, hc, hc])


def _check_post_pre(
    output: Tensor, hidden_streams: Tensor, post: Tensor, comb: Tensor, *rest: Any, **options: Any
) -> None:
    _check_post(output, hidden_streams, post, comb)
    _check_pre(hidden_streams, *rest, **options)


def _check_post_head(
    output: Tensor, hidden_streams: Tensor, post: Tensor, comb: Tensor, *rest: Any, **options: Any
) -> None:
    _check_post(output, hidden_streams, post, comb)
    _check_head(hidden_streams, *rest, **options)


# Fakes: every output is contiguous; all shapes follow from the streams'


def _fake_collapsed(hidden_streams: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_streams.new_empty([*hidden_streams.shape[:-2], hidden_streams.shape[-1]])


def _fake_pre(hidden_streams: Tensor, fn: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    *lead, _streams, hidden = hidden_streams.shape
    hc = fn.shape[1] // hidden
    wide = _wide(hidden_streams.dtype)
    post = hidden_streams.new_empty([*lead, hc], dtype=wide)
    comb = hidden_streams.new_empty([*lead, hc, hc], dtype=wide)
    return post, comb, _fake_collapsed(hidden_streams)


def _fake_post(output: Tensor, hidden_streams: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_streams.new_empty(hidden_streams.shape)


def _fake_post_pre(
    output: Tensor, hidden_streams: Tensor, post: Tensor, comb: Tensor, fn: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    return _fake_post(output, hidden_streams), *_fake_pre(hidden_streams, fn)


def _fake_post_head(output: Tensor, hidden_streams: Tensor, *_: Any, **__: Any) -> Tensor:
    return _fake_collapsed(hidden_streams)


# Operators


def _limits(
    streams_at: int, compiler: str, dtypes: tuple[torch.dtype, ...], counts: tuple[int, ...]
) -> Callable[..., str | None]:
    """What the kernels of ``compiler`` take, where the streams are argument ``streams_at``."""

    def limits(*tensors: Tensor, **options: float) -> str | None:
        streams = tensors[streams_at]
        *_, hc, hidden = streams.shape
        if streams_at == 0:
            hc = tensors[1].shape[1] // hidden
        if streams.dtype not in dtypes:
            return f"the {compiler} kernels do not take {streams.dtype} streams"
        if hc not in counts:
            return f"the {compiler} kernels take {', '.join(map(str, counts))} streams, got {hc}"
        if compiler == "tilelang" and (hidden % 64 or hidden > 16384):
            return f"the tilelang kernels take hidden sizes that are multiples of 64 up to 16384, got {hidden}"
        return None

    return limits


def _kernels(function: str, streams_at: int) -> list[Implementation]:
    """Best first: TileLang reads bf16 streams at the speed of memory, Triton takes every dtype."""
    return [
        Implementation(
            "tilelang",
            f"dsv4_fusion.ops.tilelang.hyper_connection:{function}",
            _limits(streams_at, "tilelang", (torch.bfloat16,), (2, 4, 8)),
            capability=(9, 0),
        ),
        Implementation(
            "triton",
            f"dsv4_fusion.ops.triton.hyper_connection:{function}",
            _limits(streams_at, "triton", (torch.bfloat16, torch.float16, torch.float32), (1, 2, 4, 8)),
        ),
    ]


_PRE = "Tensor fn, Tensor base, Tensor scale, Tensor? norm_weight=None, *, float rms_eps=1e-6, float hc_eps=1e-6"
_POST = "Tensor output, Tensor hidden_streams, Tensor post, Tensor comb"
_END = "float norm_eps=1e-6, str? implementation=None"

_hc_pre = define(
    f"hc_pre(Tensor hidden_streams, {_PRE}, int sinkhorn_iters=20, {_END})"
    " -> (Tensor post, Tensor comb, Tensor collapsed)",
    reference=hc_pre_ref,
    fake=_fake_pre,
    check=_check_pre,
    implementations=_kernels("hc_pre", 0),
)
_hc_post = define(
    f"hc_post({_POST}, *, str? implementation=None) -> Tensor",
    reference=hc_post_ref,
    fake=_fake_post,
    check=_check_post,
    implementations=_kernels("hc_post", 1),
)
_hc_post_pre = define(
    f"hc_post_pre({_POST}, {_PRE}, int sinkhorn_iters=20, {_END})"
    " -> (Tensor new_streams, Tensor new_post, Tensor new_comb, Tensor collapsed)",
    reference=hc_post_pre_ref,
    fake=_fake_post_pre,
    check=_check_post_pre,
    implementations=_kernels("hc_post_pre", 1),
)
_hc_head = define(
    f"hc_head(Tensor hidden_streams, {_PRE}, {_END}) -> Tensor",
    reference=hc_head_ref,
    fake=_fake_collapsed,
    check=_check_head,
    implementations=_kernels("hc_head", 0),
)
_hc_post_head = define(
    f"hc_post_head({_POST}, {_PRE}, {_END}) -> Tensor",
    reference=hc_post_head_ref,
    fake=_fake_post_head,
    check=_check_post_head,
    implementations=_kernels("hc_post_head", 1),
)


def hc_pre(
    hidden_streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None = None,
    *,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixing weights of one sublayer, and its input collapsed from the streams.

    Args:
        hidden_streams: [..., HC, D], bf16, fp16, fp32 or fp64; or [..., 1, D] where all streams are the same, as
            before the first layer: then a quarter of the bytes and of the products do (at HC 4).
        fn: [MIX, HC · D], the projection.
        base: [MIX], added to the scaled projection.
        scale: [3], factors of the pre, post and comb parts.
        norm_weight: [D] or None; if given, the collapsed stream is RMS-normalised and multiplied by it.
        rms_eps: added to the mean square of the flattened streams.
        hc_eps: added to pre, to the softmax and to every Sinkhorn sum.
        sinkhorn_iters: Sinkhorn-Knopp passes, at least 1; the first is a column pass alone.
        norm_eps: added to the mean square of the collapsed stream.
        implementation: "tilelang", "triton", "reference", or None for the best one usable.

    Returns:
        post [..., HC] and comb [..., HC, HC] in fp32 (fp64 for fp64 streams), collapsed [..., D] in the streams'
        dtype; all contiguous. ``comb`` is doubly stochastic up to ``hc_eps`` and is used transposed.

    Raises:
        ValueError: wrong shape, dtype, device or epsilon; an input that requires grad; an implementation asked for
            by name that cannot run here.
    """
    return _hc_pre(
        hidden_streams,
        fn,
        base,
        scale,
        norm_weight,
        rms_eps=rms_eps,
        hc_eps=hc_eps,
        sinkhorn_iters=sinkhorn_iters,
        norm_eps=norm_eps,
        implementation=implementation,
    )


def hc_post(
    output: Tensor,
    hidden_streams: Tensor,
    post: Tensor,
    comb: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Put a sublayer's output back into the streams: ``new[k] = post[k] · output + Σ_j comb[j, k] · streams[j]``.

    Args:
        output: [..., D], the sublayer's output, in the streams' dtype.
        hidden_streams: [..., HC, D], the streams before the sublayer.
        post: [..., HC], from :func:`hc_pre`.
        comb: [..., HC, HC], from :func:`hc_pre`; used transposed.
        implementation: "tilelang", "triton", "reference", or None for the best one usable.

    Returns:
        The new streams, [..., HC, D], contiguous, in the streams' dtype.

    Raises:
        ValueError: as :func:`hc_pre`.
    """
    return _hc_post(output, hidden_streams, post, comb, implementation=implementation)


def hc_post_pre(
    output: Tensor,
    hidden_streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None = None,
    *,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The boundary between two sublayers: :func:`hc_post` of one, then :func:`hc_pre` of the next.

    Args:
        output, hidden_streams, post, comb: as in :func:`hc_post`.
        fn, base, scale, norm_weight, rms_eps, hc_eps, sinkhorn_iters, norm_eps: as in :func:`hc_pre`.
        implementation: "tilelang", "triton", "reference", or None for the best one usable.

    Returns:
        The new streams [..., HC, D], then post, comb and collapsed of the next sublayer as :func:`hc_pre` gives them.

    Raises:
        ValueError: as :func:`hc_pre`.
    """
    return _hc_post_pre(
        output,
        hidden_streams,
        post,
        comb,
        fn,
        base,
        scale,
        norm_weight,
        rms_eps=rms_eps,
        hc_eps=hc_eps,
        sinkhorn_iters=sinkhorn_iters,
        norm_eps=norm_eps,
        implementation=implementation,
    )


def hc_head(
    hidden_streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None = None,
    *,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    implementation: str | None = None,
) -> Tensor:
    """Collapse the streams after the last layer, with the final norm if its weight is given.

    Args:
        hidden_streams: [..., HC, D].
        fn: [HC, HC · D]; base: [HC]; scale: [1].
        norm_weight, rms_eps, hc_eps, norm_eps, implementation: as in :func:`hc_pre`.

    Returns:
        [..., D], contiguous, in the streams' dtype.

    Raises:
        ValueError: as :func:`hc_pre`.
    """
    return _hc_head(
        hidden_streams,
        fn,
        base,
        scale,
        norm_weight,
        rms_eps=rms_eps,
        hc_eps=hc_eps,
        norm_eps=norm_eps,
        implementation=implementation,
    )


def hc_post_head(
    output: Tensor,
    hidden_streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None = None,
    *,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    implementation: str | None = None,
) -> Tensor:
    """:func:`hc_post` of the last sublayer, then :func:`hc_head`; the new streams are not written.

    Args and errors are those of the two; returns [..., D], contiguous, in the streams' dtype.
    """
    return _hc_post_head(
        output,
        hidden_streams,
        post,
        comb,
        fn,
        base,
        scale,
        norm_weight,
        rms_eps=rms_eps,
        hc_eps=hc_eps,
        norm_eps=norm_eps,
        implementation=implementation,
    )
