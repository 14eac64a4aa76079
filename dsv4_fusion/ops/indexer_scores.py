"""The scores of DeepSeek-V4's sparse-attention indexer, and the best keys by them, without a tensor [T, H, Tk].

Shapes: B sequences, S queries each, H heads (1 to 128), d head dim (64 or 128), Tk keys a sequence. The score of query
i and key j is ``k_scale[j] · Σ_h relu(q[i, h] · k[j]) · weights[i, h]``, products and sums in fp32; −inf where query i
does not see key j. Which keys it sees is a range [start, end), or a causal rule on its position.

====== ========================== ===================== ====================== ==================
format q                          q_scale               k                      k_scale
====== ========================== ===================== ====================== ==================
bf16   [B, S, H, d] bf16          none                  [B, Tk, d] bf16        none
fp8    [B, S, H, d] e4m3fn        none, in the weights  [B, Tk, d] e4m3fn      [B, Tk] fp32
mxfp4  [B, S, H, d / 2] uint8     [B, S, H] int32       [B, Tk, d / 2] uint8   [B, Tk] int32
====== ========================== ===================== ====================== ==================

On Hopper the CuTe DSL kernels multiply MXFP4 as FP8, and the tensor cores cut every product of FP8 to 14 bits of the
largest that it is added to: each loses less than 2^-13 of that one. MXFP4 has so few bits that nothing is lost where
the scales of a row's blocks are close, as quantisers make them of rows without outliers. Where they are far apart its
scores are as exact as FP8's: within 2^-10 of the sum of their terms' sizes. Triton's kernels multiply MXFP4 as bf16,
with sums in fp32, and cut nothing; ``implementation="triton"`` asks for them.

Queries are what :func:`~dsv4_fusion.ops.indexer_q_fp8` and ``indexer_q_mxfp4`` return; keys are quantised likewise.
Those in pages have operators of their own, in ``indexer_scores_paged.py``.
Source: DeepSeek-V3.2 and V4 technical reports ("lightning indexer") and inference code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._indexer import INTEGERS, MXFP4_BLOCK, check_dim, check_tensor, dequantise_mxfp4_ref
from ._library import Implementation, define, expect, refuse_grad

HEADS = 128  # at most
WORKSPACE = 256 * 2**20  # bytes
TOP_K = 4096  # at most, on a GPU
OUTPUTS = (torch.float32, torch.bfloat16)
_FORMATS = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8", torch.uint8: "mxfp4"}
_REF_BYTES = 64 * 2**20  # the reference's product for a few queries

# References


def _dequantised(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values in ``dtype``; MXFP4's scales are applied, FP8's are left to the caller."""
    if values.dtype != torch.uint8 or scale is None:
        return values.to(dtype)
    scales = scale.unsqueeze(-1).contiguous().view(torch.uint8)
    return dequantise_mxfp4_ref(values, scales[..., : values.shape[-1] * 2 // MXFP4_BLOCK]).to(dtype)


def limits_ref(
    q: Tensor, length: int, start: Tensor | None, end: Tensor | None, positions: Tensor | None, ratio: int
) -> Tensor | None:
    """Which keys a query sees: bool [..., S, Tk] that broadcasts, or None for all."""
    if positions is not None:
        end = (positions + 1) // ratio
    if start is None and end is None:
        return None
    key = torch.arange(length, device=q.device)
    visible = torch.ones(length, dtype=torch.bool, device=q.device)
    if start is not None:
        visible = visible & (key >= start.unsqueeze(-1))
    if end is not None:
        visible = visible & (key < end.unsqueeze(-1))
    return visible


def indexer_scores_ref(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    start: Tensor | None = None,
    end: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    ratio: int = 4,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain PyTorch form of :func:`indexer_scores`; in float64 throughout where the weights are."""
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    keys = _dequantised(k, k_scale, wide).transpose(-1, -2)
    queries, length = q.shape[-3], k.shape[-2]
    out = torch.empty([*q.shape[:-2], length], dtype=wide, device=q.device)
    row = max(1, q.shape[-2] * length * wide.itemsize * (q.shape[0] if q.dim() == 4 else 1))
    step = max(1, _REF_BYTES // row)
    for begin in range(0, queries, step):
        part = (..., slice(begin, begin + step), slice(None))
        some = _dequantised(q[(*part, slice(None))], None if q_scale is None else q_scale[part], wide)
        product = torch.matmul(some, keys.unsqueeze(-3)).relu()  # [..., step, H, Tk]
        out[part] = (product * weights[part].to(wide).unsqueeze(-1)).sum(-2)
    if k_scale is not None and k.dtype != torch.uint8:
        out = out * k_scale.unsqueeze(-2).to(wide)
    visible = limits_ref(q, length, start, end, positions, ratio)
    if visible is not None:
        out = out.masked_fill(~visible, -torch.inf)
    return out if wide == torch.float64 else out.to(dtype or torch.float32)


def best_ref(scores: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """Indices of the ``top_k`` highest of a row, of equal ones the lowest first, −1 for −inf and for padding."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    chosen = torch.where(values == -torch.inf, -1, order)[..., :top_k].to(dtype)
    missing = top_k - chosen.shape[-1]
    return torch.nn.functional.pad(chosen, (0, missing), value=-1) if missing > 0 else chosen.contiguous()


def indexer_topk_ref(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    start: Tensor | None = None,
    end: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    top_k: int,
    ratio: int = 4,
    dtype: torch.dtype | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Plain PyTorch form of :func:`indexer_topk`: all scores, then a stable sort."""
    scores = indexer_scores_ref(q, k, weights, q_scale, k_scale, start, end, positions, ratio=ratio)
    return best_ref(scores, top_k, dtype or torch.int64)


# Checks, in the real call and in the fake one


def _check_q(q: Tensor, weights: Tensor, q_scale: Tensor | None, dims: tuple[int, ...]) -> tuple[str, int]:
    """The format and the head dim."""
    if q.dim() not in dims:
        wanted = " or ".join("[B, S, H, d]" if dim == 4 else "[T, H, d]" for dim in dims)
        raise ValueError(f"q must have shape {wanted}, got {list(q.shape)}")
    if q.dtype not in _FORMATS:
        raise ValueError(f"q must be bfloat16, float8_e4m3fn or uint8 (packed MXFP4), got {str(q.dtype)[6:]}")
    format, device = _FORMATS[q.dtype], q.device
    d = q.shape[-1] * (2 if format == "mxfp4" else 1)
    check_dim(d)
    heads = q.shape[-2]
    if not 1 <= heads <= HEADS:
        raise ValueError(f"q must hold from 1 to {HEADS} heads, got shape {list(q.shape)}")
    check_tensor("q", q, tuple(q.shape), (q.dtype,), device)
    check_tensor("weights", weights, tuple(q.shape[:-1]), (torch.float32,), device)
    if (q_scale is None) != (format != "mxfp4"):
        raise ValueError(
            "MXFP4 queries (uint8) need q_scale, int32 [..., H]"
            if q_scale is None
            else f"q_scale belongs to MXFP4 queries; {format} queries take none"
        )
    if q_scale is not None:
        check_tensor("q_scale", q_scale, tuple(q.shape[:-1]), (torch.int32,), device)
    return format, d


def _check_dtype(dtype: torch.dtype | None, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype is not None and dtype not in allowed:
        raise ValueError(f"dtype must be {' or '.join(str(each)[6:] for each in allowed)}, got {str(dtype)[6:]}")


def _check_scores(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    start: Tensor | None = None,
    end: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    ratio: int = 4,
    dtype: torch.dtype | None = None,
    outputs: tuple[torch.dtype, ...] = OUTPUTS,
) -> None:
    format, _ = _check_q(q, weights, q_scale, (3, 4))
    batch, tokens, device = tuple(q.shape[:-3]), tuple(q.shape[:-2]), q.device
    if k.dim() != q.dim() - 1:
        wanted = "[B, Tk, d]" if batch else "[Tk, d]"
        raise ValueError(f"k must have shape {wanted} for q of shape {list(q.shape)}, got {list(k.shape)}")
    length = k.shape[-2]
    check_tensor("k", k, (*batch, length, q.shape[-1]), (q.dtype,), device)
    if (k_scale is None) != (format == "bf16"):
        raise ValueError(
            f"{format} keys need k_scale, [..., Tk]" if k_scale is None else "bf16 keys take no k_scale, got one"
        )
    if k_scale is not None:
        scale = torch.int32 if format == "mxfp4" else torch.float32
        check_tensor("k_scale", k_scale, (*batch, length), (scale,), device)
    if positions is not None and (start is not None or end is not None):
        raise ValueError("what a query sees is given by positions, or by start and end; got both")
    for label, limit in (("start", start), ("end", end), ("positions", positions)):
        if limit is None:
            continue
        if batch and limit.dim() == 2 and isinstance(limit.shape[0], int) and limit.shape[0] == 1:
            check_tensor(label, limit, (1, tokens[-1]), INTEGERS, device)
        else:
            check_tensor(label, limit, tokens, INTEGERS, device)
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1, got {ratio}")
    _check_dtype(dtype, outputs)
    refuse_grad([q, k, weights, k_scale])


def _check_choice(top_k: int, workspace: int) -> None:
    expect(top_k >= 0, lambda: f"top_k must be at least 0, got {top_k}")
    if workspace < 1:
        raise ValueError(f"workspace must be a positive number of bytes, got {workspace}")


def _check_topk(*args: Any, top_k: int, workspace: int = WORKSPACE, **options: Any) -> None:
    _check_scores(*args, **options, outputs=INTEGERS)
    _check_choice(top_k, workspace)


# Fakes: every output is contiguous


def _fake_scores(q: Tensor, k: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return q.new_empty([*q.shape[:-2], k.shape[-2]], dtype=dtype or torch.float32)


def _fake_topk(q: Tensor, *_: Any, top_k: int, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return q.new_empty([*q.shape[:-2], top_k], dtype=dtype or torch.int64)


# Operators


def _topk_limits(*_: Any, top_k: int, **__: Any) -> str | None:
    return f"the kernel chooses at most {TOP_K} keys, top_k is {top_k}" if top_k > TOP_K else None


def _cutedsl_limits(q: Tensor, *_: Any, top_k: int = 0, **__: Any) -> str | None:
    """The kernel is made of SM90's instructions, which no later architecture has."""
    major, minor = torch.cuda.get_device_capability(q.device)
    if major != 9:
        return f"the cutedsl kernel is for compute capability 9.0, this device has {major}.{minor}"
    if q.shape[-2] not in (32, 64, 128):
        return f"the cutedsl kernel takes 32, 64 or 128 heads, got {q.shape[-2]}"
    return _topk_limits(top_k=top_k)


def _kernels(function: str, *limits: Any) -> list[Implementation]:
    entry = f"dsv4_fusion.ops.cutedsl.indexer_scores:{function}"
    cutedsl = Implementation("cutedsl", entry, _cutedsl_limits, capability=(9, 0))
    return [cutedsl, Implementation("triton", f"{_MODULE}:{function}", *limits)]


_MODULE = "dsv4_fusion.ops.triton.indexer_scores"
_TENSORS = (
    "Tensor q, Tensor k, Tensor weights, Tensor? q_scale=None, Tensor? k_scale=None, Tensor? start=None, "
    "Tensor? end=None, Tensor? positions=None"
)
_OPTIONS = "int ratio=4, ScalarType? dtype=None"

_indexer_scores = define(
    f"indexer_scores({_TENSORS}, *, {_OPTIONS}, str? implementation=None) -> Tensor",
    reference=indexer_scores_ref,
    fake=_fake_scores,
    check=_check_scores,
    implementations=_kernels("indexer_scores"),
)
_indexer_topk = define(
    f"indexer_topk({_TENSORS}, *, SymInt top_k, {_OPTIONS}, int workspace={WORKSPACE}, str? implementation=None)"
    " -> Tensor",
    reference=indexer_topk_ref,
    fake=_fake_topk,
    check=_check_topk,
    implementations=_kernels("indexer_topk", _topk_limits),
)


def indexer_scores(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    start: Tensor | None = None,
    end: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    ratio: int = 4,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Tensor:
    """The indexer's scores of all keys for all queries: ``k_scale · Σ_heads relu(q · k) · weights``, −inf unseen.

    A query sees the keys from ``start`` to before ``end``, or, with ``positions``, those before (position + 1) //
    ratio: the compressed entries whose window has closed. Without any of these it sees all.

    Args:
        q: [B, S, H, d], or [T, H, d] for one sequence: bf16, e4m3fn, or packed MXFP4 uint8 with d / 2 in place of d;
            d is 64 or 128 and contiguous, H from 1 to 128, the other strides are free.
        k: [B, Tk, d] or [Tk, d], of the same dtype.
        weights: [B, S, H] or [T, H] fp32, with all factors of the score folded in.
        q_scale: of MXFP4: int32 like ``weights``, a UE8M0 byte for each block of 32 dims, the first one lowest.
        k_scale: of FP8: fp32 [B, Tk] or [Tk]; of MXFP4: int32, as ``q_scale``.
        start, end: [B, S], [1, S] or [T] int32 or int64; limits beyond the keys are cut to them.
        positions: like ``end``, in place of both.
        ratio: tokens a key stands for.
        dtype: of the result, fp32 or bf16; None for fp32.
        implementation: "cutedsl" (32, 64 or 128 heads, SM90), "triton", "reference", or None for the best one usable.

    Returns:
        [B, S, Tk] or [T, Tk], contiguous.

    Raises:
        ValueError: wrong shape, dtype, device, stride or option; an input that requires grad; an implementation asked
            for by name that cannot run here.
    """
    return _indexer_scores(
        q, k, weights, q_scale, k_scale, start, end, positions, ratio=ratio, dtype=dtype, implementation=implementation
    )


def indexer_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    start: Tensor | None = None,
    end: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    top_k: int,
    ratio: int = 4,
    dtype: torch.dtype | None = None,
    workspace: int = WORKSPACE,
    implementation: str | None = None,
) -> Tensor:
    """The keys with the highest scores for every query, best first; a tie goes to the lowest index.

    The scores are those of :func:`indexer_scores` in fp32; they exist for as many queries at a time as ``workspace``
    has room for, and for one at least. A score that is NaN comes first, one that is −inf is not chosen.

    Args:
        q, k, weights, q_scale, k_scale, start, end, positions, ratio: as in :func:`indexer_scores`.
        top_k: how many; it may exceed the number of keys.
        dtype: of the result, int32 or int64; None for int64.
        workspace: bytes of scores that may exist at a time.
        implementation: as there; the reference needs all scores at a time.

    Returns:
        [B, S, top_k] or [T, top_k], contiguous; −1 after the keys that the query sees.

    Raises:
        ValueError: as :func:`indexer_scores`.
    """
    return _indexer_topk(
        q,
        k,
        weights,
        q_scale,
        k_scale,
        start,
        end,
        positions,
        top_k=top_k,
        ratio=ratio,
        dtype=dtype,
        workspace=workspace,
        implementation=implementation,
    )
