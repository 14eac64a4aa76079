"""The compressor of DeepSeek-V4's attention: keys of many tokens pooled into one entry, normalised and rotated.

Shapes: B batch, S sequence, d the entry's dims, r the ratio (tokens an entry), W = S // r windows, R rotated dims,
P rows of a table. CSA ("C4A", r = 4) pools two series: window w takes the first of window w - 1 and the second of its
own; HCA ("C128A", r = 128) has one. The paged form is ``compressor_cache.py``, the arithmetic ``_compressor.py``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ._compressor import BLOCK, entry_ref, round_nope_ref
from ._indexer import FLOATS, check_tensor
from ._library import Implementation, define, expect, refuse_grad

DTYPES = (*FLOATS, torch.float64)
MOST_ROWS = 256  # a window pools

# References


def _wide(kv: Tensor) -> torch.dtype:
    return torch.float64 if kv.dtype == torch.float64 else torch.float32


def _angles(cos: Tensor, batch: int, windows: int, ratio: int, first: int) -> Tensor:
    """The row of each window: of a table [P, R / 2], or of rows [B, W, R / 2]."""
    if cos.dim() == 3:
        return cos
    return cos[first : first + windows * ratio : ratio].expand(batch, -1, -1)


def _compress_ref(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    overlap_kv: Tensor | None,
    overlap_gate: Tensor | None,
    norm_eps: float,
    first_window_position: int,
    round_nope: bool,
    dtype: torch.dtype | None,
    overlap: bool,
) -> Tensor:
    ratio, d, wide = position_bias.shape[0], norm_weight.shape[0], _wide(kv)
    (batch, length, _), out = kv.shape, dtype or kv.dtype
    windows = length // ratio
    if windows == 0 or batch == 0:
        return kv.new_empty([batch, windows, d], dtype=out)
    kv = kv[:, : windows * ratio].to(wide).unflatten(1, (windows, ratio))
    gate = gate[:, : windows * ratio].to(wide).unflatten(1, (windows, ratio)) + position_bias.to(wide)
    if overlap:
        if overlap_kv is None or overlap_gate is None:
            overlap_kv = kv.new_zeros([batch, ratio, d])
            overlap_gate = kv.new_full([batch, ratio, d], -math.inf)
        before = torch.cat([overlap_kv.to(wide).unsqueeze(1), kv[:, :-1, :, :d]], 1)
        kv = torch.cat([before, kv[..., d:]], 2)
        before = torch.cat([overlap_gate.to(wide).unsqueeze(1), gate[:, :-1, :, :d]], 1)
        gate = torch.cat([before, gate[..., d:]], 2)
    cos, sin = (_angles(table, batch, windows, ratio, first_window_position) for table in (cos, sin))
    entries = entry_ref(kv, gate, norm_weight, cos, sin, norm_eps)
    return (round_nope_ref(entries, 2 * cos.shape[-1]) if round_nope else entries).to(out)


def compress_csa_ref(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    overlap_kv: Tensor | None = None,
    overlap_gate: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    first_window_position: int = 0,
    round_nope: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain PyTorch form of :func:`compress_csa`."""
    return _compress_ref(
        kv, gate, position_bias, norm_weight, cos, sin, overlap_kv, overlap_gate,
        norm_eps, first_window_position, round_nope, dtype, True,
    )  # fmt: skip


def compress_hca_ref(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    norm_eps: float = 1e-6,
    first_window_position: int = 0,
    round_nope: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain PyTorch form of :func:`compress_hca`."""
    return _compress_ref(
        kv, gate, position_bias, norm_weight, cos, sin, None, None,
        norm_eps, first_window_position, round_nope, dtype, False,
    )  # fmt: skip


# Checks, in the real call and in the fake one


def check_parameters(
    position_bias: Tensor, norm_weight: Tensor, norm_eps: float, overlap: bool, dtypes: Any, device: torch.device
) -> tuple[int, int]:
    """Ratio and entry dims, which the parameters fix."""
    if norm_weight.dim() != 1:
        raise ValueError(f"norm_weight must have shape [d], got {list(norm_weight.shape)}")
    d = norm_weight.shape[0]
    if d not in (16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"an entry must have a power of two of dims, from 16 to 1024, got {d}")
    check_tensor("norm_weight", norm_weight, (d,), dtypes, device)
    check_tensor("position_bias", position_bias, (None, (1 + overlap) * d), dtypes, device)
    ratio = position_bias.shape[0]
    most = MOST_ROWS // (1 + overlap)
    if not 1 <= ratio <= most:
        raise ValueError(f"position_bias must have from 1 to {most} rows, the ratio, got {ratio}")
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"norm_eps must be a positive, finite number, got {norm_eps}")
    return ratio, d


def check_angles(d: int, cos: Tensor, sin: Tensor) -> None:
    pairs = cos.shape[-1]
    if not 2 <= 2 * pairs <= d:
        raise ValueError(f"cos and sin hold one value a pair, from 1 to {d // 2} for {d} dims, got {pairs}")
    check_tensor("sin", sin, tuple(cos.shape), (cos.dtype,), cos.device)


def _check(
    overlap: bool,
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    overlap_kv: Tensor | None = None,
    overlap_gate: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    first_window_position: int = 0,
    round_nope: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    device = kv.device
    ratio, d = check_parameters(position_bias, norm_weight, norm_eps, overlap, DTYPES, device)
    if kv.dim() != 3:
        raise ValueError(f"kv must have shape [B, S, {(1 + overlap) * d}], got {list(kv.shape)}")
    check_tensor("kv", kv, (*kv.shape[:2], (1 + overlap) * d), DTYPES, device)
    check_tensor("gate", gate, tuple(kv.shape), DTYPES, device)
    batch, windows = kv.shape[0], kv.shape[1] // ratio
    if cos.dim() == 2:
        check_tensor("cos", cos, (None, None), DTYPES, device)
        expect(
            first_window_position >= 0,
            lambda: f"first_window_position must not be negative, got {first_window_position}",
        )
        rows = first_window_position + (windows - 1) * ratio
        expect(
            cos.shape[0] > rows,
            lambda: f"cos and sin must have a row for position {rows}, of the last window, got {cos.shape[0]} rows",
        )
    else:
        check_tensor("cos", cos, (batch, windows, None), DTYPES, device)
    check_angles(d, cos, sin)
    if (overlap_kv is None) != (overlap_gate is None):
        raise ValueError("overlap_kv and overlap_gate are given both or not at all")
    if overlap_kv is not None and overlap_gate is not None:
        check_tensor("overlap_kv", overlap_kv, (batch, ratio, d), DTYPES, device)
        check_tensor("overlap_gate", overlap_gate, (batch, ratio, d), DTYPES, device)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float64, got {dtype}")
    if round_nope and (kv.dtype == torch.float64 or (d - 2 * cos.shape[-1]) % BLOCK):
        plain = d - 2 * cos.shape[-1]
        raise ValueError(f"round_nope takes bf16 or fp32 and multiples of {BLOCK} plain dims, got {kv.dtype}, {plain}")
    refuse_grad([kv, gate, position_bias, norm_weight, cos, sin, overlap_kv, overlap_gate])


# Fakes


def _fake(
    kv: Tensor, gate: Tensor, position_bias: Tensor, norm_weight: Tensor, *_: Any, dtype: Any = None, **__: Any
) -> Tensor:
    windows = kv.shape[1] // position_bias.shape[0]
    return kv.new_empty([kv.shape[0], windows, norm_weight.shape[0]], dtype=dtype or kv.dtype)


# Operators


def no_float64(*tensors: Any, **options: Any) -> str | None:
    """Why the kernels cannot take a call, or None."""
    if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in tensors):
        return "the kernels compute in fp32, got a float64 tensor"
    return "the kernels compute in fp32, got dtype float64" if options.get("dtype") == torch.float64 else None


_ARGUMENTS = "Tensor kv, Tensor gate, Tensor position_bias, Tensor norm_weight, Tensor cos, Tensor sin"
_OPTIONS = (
    "float norm_eps=1e-6, SymInt first_window_position=0, bool round_nope=False, ScalarType? dtype=None, "
    "str? implementation=None"
)

_compress_csa = define(
    f"compress_csa({_ARGUMENTS}, Tensor? overlap_kv=None, Tensor? overlap_gate=None, *, {_OPTIONS}) -> Tensor",
    reference=compress_csa_ref,
    fake=_fake,
    check=functools.partial(_check, True),
    implementations=[Implementation("triton", "dsv4_fusion.ops.triton.compressor:compress_csa", no_float64)],
)
_compress_hca = define(
    f"compress_hca({_ARGUMENTS}, *, {_OPTIONS}) -> Tensor",
    reference=compress_hca_ref,
    fake=_fake,
    check=functools.partial(_check, False),
    implementations=[Implementation("triton", "dsv4_fusion.ops.triton.compressor:compress_hca", no_float64)],
)


def compress_csa(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    overlap_kv: Tensor | None = None,
    overlap_gate: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    first_window_position: int = 0,
    round_nope: bool = False,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Entries of windows that overlap: softmax of the gates, weighted sum, RMSNorm, RoPE, in fp32, rounded once.

    Tokens after the last whole window are left out.

    Args:
        kv, gate: [B, S, 2d] bf16 or fp32, the last dimension contiguous: the first d columns are the series that the
            next window pools, the last d that of the window itself.
        position_bias: [r, 2d] fp32 or bf16, added to the gates; r is the ratio.
        norm_weight: [d] fp32 or bf16; d is a power of two.
        cos, sin: fp32 or bf16, one value a pair, for the last R dims: rows of the windows, [B, W, R / 2]; or a table
            [P, R / 2], of which window w takes row ``first_window_position + r · w``.
        overlap_kv, overlap_gate: [B, r, d]: the first series of the window before, the gates with their bias; None if
            there was none.
        norm_eps: added to the mean square.
        first_window_position: the position of the first token, for a table; it begins a window.
        round_nope: round the dims that are not rotated to FP8 (e4m3fn, one power-of-two scale for 64) and back.
        dtype: of the result; None for that of ``kv``.
        implementation: "triton", "reference", or None for the best one usable.

    Returns:
        [B, S // r, d], contiguous.

    Raises:
        ValueError: wrong shape, dtype, device, stride or option; an input that requires grad; an implementation asked
            for by name that cannot run here.
    """
    return _compress_csa(
        kv, gate, position_bias, norm_weight, cos, sin, overlap_kv, overlap_gate, norm_eps=norm_eps,
        first_window_position=first_window_position, round_nope=round_nope, dtype=dtype, implementation=implementation,
    )  # fmt: skip


def compress_hca(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    norm_eps: float = 1e-6,
    first_window_position: int = 0,
    round_nope: bool = False,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Entries of windows that do not overlap; else :func:`compress_csa`.

    Args:
        kv, gate: [B, S, d] bf16 or fp32.
        position_bias: [r, d] fp32 or bf16.
        norm_weight, cos, sin, norm_eps, first_window_position, round_nope, dtype, implementation: as there.

    Returns:
        [B, S // r, d], contiguous.

    Raises:
        ValueError: as :func:`compress_csa`.
    """
    return _compress_hca(
        kv, gate, position_bias, norm_weight, cos, sin, norm_eps=norm_eps,
        first_window_position=first_window_position, round_nope=round_nope, dtype=dtype, implementation=implementation,
    )  # fmt: skip
