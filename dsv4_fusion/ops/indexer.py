"""The queries of DeepSeek-V4's sparse-attention indexer: RoPE, optional Hadamard, quantisation, folded weights.

Shapes: T tokens, H indexer heads, d head dim (64 or 128), R rotated dims (even, the last R of d), P rows of a table.
The arithmetic, its order and its sources: ``_indexer.py``. The keys: ``indexer_cache.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._indexer import (
    FLOATS,
    MXFP4_FLOOR,
    check_dim,
    check_quantiser,
    check_rope,
    check_tensor,
    cutedsl_limits,
    cutedsl_unaligned,
    hadamard_ref,
    quantise_fp8_ref,
    quantise_mxfp4_ref,
    rope_rows,
    rotate_ref,
)
from ._library import Implementation, define, expect, refuse_grad

# References


def _prepared(q: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, hadamard: bool) -> Tensor:
    cos, sin = rope_rows(positions, cos, sin)
    q = rotate_ref(q, cos.unsqueeze(1), sin.unsqueeze(1))
    return hadamard_ref(q) if hadamard else q


def indexer_q_fp8_ref(
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    *,
    hadamard: bool = False,
    amax_floor: float = 1e-4,
    power_of_two_scale: bool = True,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch form of :func:`indexer_q_fp8`."""
    _, heads, d = q.shape
    quantised, scale = quantise_fp8_ref(_prepared(q, positions, cos, sin, hadamard), amax_floor, power_of_two_scale)
    return quantised, weights.float() * scale * d**-0.5 * heads**-0.5


def indexer_q_mxfp4_ref(
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    *,
    hadamard: bool = False,
    amax_floor: float = MXFP4_FLOOR,
    ties: str = "even",
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch form of :func:`indexer_q_mxfp4`."""
    _, heads, d = q.shape
    packed, scale = quantise_mxfp4_ref(_prepared(q, positions, cos, sin, hadamard), amax_floor, ties)
    return packed, scale, weights.float() * d**-0.5 * heads**-0.5


def indexer_q_fp8_out_ref(
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    q_fp8: Tensor,
    weights_out: Tensor,
    **options: Any,
) -> None:
    """Plain PyTorch form of :func:`indexer_q_fp8` with ``out``."""
    for out, result in zip(
        (q_fp8, weights_out), indexer_q_fp8_ref(q, positions, cos, sin, weights, **options), strict=True
    ):
        out.copy_(result)


def indexer_q_mxfp4_out_ref(
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    q_packed: Tensor,
    q_scale: Tensor,
    weights_out: Tensor,
    **options: Any,
) -> None:
    """Plain PyTorch form of :func:`indexer_q_mxfp4` with ``out``."""
    for out, result in zip(
        (q_packed, q_scale, weights_out),
        indexer_q_mxfp4_ref(q, positions, cos, sin, weights, **options),
        strict=True,
    ):
        out.copy_(result)


# Checks, in the real call and in the fake one


def _check_q(q: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, weights: Tensor, *outs: Tensor) -> None:
    if q.dim() != 3:
        raise ValueError(f"q must have shape [T, H, d], got {list(q.shape)}")
    (tokens, heads, d), device = q.shape, q.device
    check_dim(d)
    if heads < 1:
        raise ValueError(f"q holds no head: shape {list(q.shape)}")
    check_tensor("q", q, (tokens, heads, d), (torch.bfloat16,), device)
    check_rope(tokens, d, positions, cos, sin, device)
    check_tensor("weights", weights, (tokens, heads), FLOATS, device)
    refuse_grad([q, cos, sin, weights, *outs])


def _check_out(label: str, tensor: Tensor, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_tensor(label, tensor, shape, (dtype,), device)
    expect(tensor.is_contiguous(), lambda: f"{label} must be contiguous, got strides {list(tensor.stride())}")


def _check_fp8(
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    *outs: Tensor,
    **options: Any,
) -> None:
    _check_q(q, positions, cos, sin, weights, *outs)
    check_quantiser(False, **options)
    if outs:
        _check_out("q_fp8", outs[0], tuple(q.shape), torch.float8_e4m3fn, q.device)
        _check_out("weights_out", outs[1], tuple(weights.shape), torch.float32, q.device)


def _check_mxfp4(
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    *outs: Tensor,
    **options: Any,
) -> None:
    _check_q(q, positions, cos, sin, weights, *outs)
    check_quantiser(True, **options)
    if outs:
        tokens, heads, d = q.shape
        _check_out("q_packed", outs[0], (tokens, heads, d // 2), torch.uint8, q.device)
        _check_out("q_scale", outs[1], (tokens, heads), torch.int32, q.device)
        _check_out("weights_out", outs[2], (tokens, heads), torch.float32, q.device)


# Fakes: every output is contiguous


def _fake_fp8(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=torch.float8_e4m3fn), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake_mxfp4(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, d = q.shape
    return (
        q.new_empty([tokens, heads, d // 2], dtype=torch.uint8),
        q.new_empty([tokens, heads], dtype=torch.int32),
        q.new_empty([tokens, heads], dtype=torch.float32),
    )


def fake_nothing(*_: Any, **__: Any) -> None:
    """Of operators that write into their arguments."""


# Operators


def _cutedsl_limits(
    q: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, weights: Tensor, *outs: Tensor, **_: Any
) -> str | None:
    return cutedsl_limits(q, cos, sin) or (cutedsl_unaligned(*outs) if outs else None)


def _kernels(function: str) -> list[Implementation]:
    """Best first: CuTe DSL reaches the speed of memory, Triton runs wherever there is a GPU."""
    return [
        Implementation("cutedsl", f"dsv4_fusion.ops.cutedsl.indexer:{function}", _cutedsl_limits, capability=(9, 0)),
        Implementation("triton", f"dsv4_fusion.ops.triton.indexer:{function}"),
    ]


_INPUTS = "Tensor q, Tensor? positions, Tensor cos, Tensor sin, Tensor weights"
_FP8 = "bool hadamard=False, float amax_floor=1e-4, bool power_of_two_scale=True, str? implementation=None"
_MXFP4 = f'bool hadamard=False, float amax_floor={MXFP4_FLOOR!r}, str ties="even", str? implementation=None'

_indexer_q_fp8 = define(
    f"indexer_q_fp8({_INPUTS}, *, {_FP8}) -> (Tensor q_fp8, Tensor weights_out)",
    reference=indexer_q_fp8_ref,
    fake=_fake_fp8,
    check=_check_fp8,
    implementations=_kernels("indexer_q_fp8"),
)
_indexer_q_fp8_out = define(
    f"indexer_q_fp8_out({_INPUTS}, Tensor(a!) q_fp8, Tensor(b!) weights_out, *, {_FP8}) -> ()",
    reference=indexer_q_fp8_out_ref,
    fake=fake_nothing,
    check=_check_fp8,
    implementations=_kernels("indexer_q_fp8_out"),
)
_indexer_q_mxfp4 = define(
    f"indexer_q_mxfp4({_INPUTS}, *, {_MXFP4}) -> (Tensor q_packed, Tensor q_scale, Tensor weights_out)",
    reference=indexer_q_mxfp4_ref,
    fake=_fake_mxfp4,
    check=_check_mxfp4,
    implementations=_kernels("indexer_q_mxfp4"),
)
_indexer_q_mxfp4_out = define(
    f"indexer_q_mxfp4_out({_INPUTS}, Tensor(a!) q_packed, Tensor(b!) q_scale, Tensor(c!) weights_out, *, {_MXFP4})"
    " -> ()",
    reference=indexer_q_mxfp4_out_ref,
    fake=fake_nothing,
    check=_check_mxfp4,
    implementations=_kernels("indexer_q_mxfp4_out"),
)


def indexer_q_fp8(
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    *,
    hadamard: bool = False,
    amax_floor: float = 1e-4,
    power_of_two_scale: bool = True,
    implementation: str | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The indexer's queries in FP8, and the heads' weights with every scale of the score folded in.

    A row's scale is ``s = 2^ceil(log2(max(max|row|, amax_floor) / 448))``; it is not returned but folded:
    ``weights_out = ((weights · s) · d^-1/2) · H^-1/2``. Values are ``row / s``, clamped to ±448 and rounded to nearest
    even. A row that holds a NaN or an infinity after RoPE and Hadamard is all NaN (bytes 0x7F), and so is its weight.

    Args:
        q: [T, H, d] bf16; d is 64 or 128 and contiguous, the other strides are free.
        positions: [T] int32 or int64, rows of cos and sin, which are not checked on a GPU; or None: row t is token t.
        cos, sin: [P, R / 2], or [T, R / 2] without positions; fp32 or bf16; one value for each pair of rotated dims.
        weights: [T, H] fp32 or bf16.
        hadamard: transform the rows; the keys have to be transformed as well.
        amax_floor: what the largest magnitude of a row is at least taken for; not below 448 · 2^-126.
        power_of_two_scale: False takes the quotient itself as the scale.
        implementation: "cutedsl", "triton", "reference", or None for the best one usable.
        out: q_fp8 and weights_out to write into, contiguous and of the shapes and dtypes below.

    Returns:
        q_fp8 [T, H, d] float8_e4m3fn and weights_out [T, H] fp32, both contiguous; ``out`` if it was given.

    Raises:
        ValueError: wrong shape, dtype, device, stride or option; an input that requires grad; an implementation asked
            for by name that cannot run here.
    """
    options: dict[str, Any] = {
        "hadamard": hadamard,
        "amax_floor": amax_floor,
        "power_of_two_scale": power_of_two_scale,
        "implementation": implementation,
    }
    if out is None:
        return _indexer_q_fp8(q, positions, cos, sin, weights, **options)
    q_fp8, weights_out = out
    _indexer_q_fp8_out(q, positions, cos, sin, weights, q_fp8, weights_out, **options)
    return out


def indexer_q_mxfp4(
    q: Tensor,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    *,
    hadamard: bool = False,
    amax_floor: float = MXFP4_FLOOR,
    ties: str = "even",
    implementation: str | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The indexer's queries in MXFP4: E2M1 values in blocks of 32 with a UE8M0 scale each.

    A block's scale is ``2^ceil(log2(max(max|block|, amax_floor) / 6))``, stored as the exponent + 127, and not folded
    into the weights: ``weights_out = (weights · d^-1/2) · H^-1/2``. A zero keeps its sign. A block that holds a NaN or
    an infinity after RoPE and Hadamard gets the scale byte 255 (NaN) and codes 0; its weight stays.

    Args:
        q, positions, cos, sin, weights, hadamard, implementation: as in :func:`indexer_q_fp8`.
        amax_floor: what the largest magnitude of a block is at least taken for; not below 6 · 2^-126.
        ties: where a value between two codes goes: "even", to the code that is even; "zero", to the smaller one.
        out: q_packed, q_scale and weights_out to write into, contiguous and of the shapes and dtypes below.

    Returns:
        q_packed [T, H, d / 2] uint8, the even dim in the low nibble; q_scale [T, H] int32, byte i (little-endian) being
        the scale of dims 32 i to 32 i + 31, unused bytes zero; weights_out [T, H] fp32; all
        contiguous; ``out`` if it was given.

    Raises:
        ValueError: as :func:`indexer_q_fp8`.
    """
    options: dict[str, Any] = {
        "hadamard": hadamard,
        "amax_floor": amax_floor,
        "ties": ties,
        "implementation": implementation,
    }
    if out is None:
        return _indexer_q_mxfp4(q, positions, cos, sin, weights, **options)
    q_packed, q_scale, weights_out = out
    _indexer_q_mxfp4_out(q, positions, cos, sin, weights, q_packed, q_scale, weights_out, **options)
    return out
