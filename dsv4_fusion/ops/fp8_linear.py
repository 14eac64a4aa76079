"""FP8 linear layers: the quantiser, the product of quantised matrices, and both in one.

Shapes: M tokens (all leading dims together), K inputs, N outputs, G = ceil(K / 128) groups. Values are e4m3fn. A scale
is what a value is multiplied by; it belongs to the whole tensor, to a row, or to 128 values of a row (activations) and
128 x 128 values (weights):

==========  =============  ===========================
scaling     x_scale        w_scale
==========  =============  ===========================
``tensor``  [1]            [1]
``token``   [..., 1]       [N, 1], a scale per channel
``block``   [..., G]       [ceil(N / 128), G]
==========  =============  ===========================

The quantiser's block scales of an activation lie with those of a group next to each other (:func:`block_scales`): a
tile of tokens needs one group of them at a time. Products take any strides; CuTe DSL's product of blocks first copies
scales of the activation that lie otherwise, or are not fp32.

``tensor`` and ``token`` mix. Scales are fp32, or float8_e8m0fnu, which holds powers of two.

Batch invariance: what a row's result depends on is the order in which its K products are added, and that is the same
here whatever M is and wherever the row stands: 128 products at a time in the tensor core, which keeps fewer than 24
bits, then these sums in fp32, in increasing k.

Sources: DeepSeek-V3 technical report, section 3.3, for block scales and the promotion to fp32; He et al., "Defeating
Nondeterminism in LLM Inference", for batch invariance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._indexer import FP8_FLOOR, FP8_MAX
from ._library import Implementation, define, expect, refuse_grad

GROUP = 128
MULTIPLE = 16  # of N and K: what the tensor core and the copy engine take
SCALINGS = ("token", "tensor", "block")
ROUNDINGS = ("none", "power_of_two", "input")
INPUTS = (torch.bfloat16, torch.float16)
SCALES = (torch.float32, torch.float8_e8m0fnu)


# References


def quantize_fp8_ref(
    x: Tensor, *, scaling: str = "token", scale_rounding: str = "none", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch form of :func:`quantize_fp8`."""
    size = x.shape[-1]
    if scaling == "tensor":
        rows = x.reshape(1, -1)
    elif scaling == "token":
        rows = x.unsqueeze(-2)
    else:
        rows = F.pad(x, (0, -size % GROUP)).unflatten(-1, (-1, GROUP))
    amax = rows.abs().amax(-1).float() if x.numel() else x.new_zeros(rows.shape[:-1], dtype=torch.float32)
    finite = amax.isfinite()
    amax = amax.clamp(min=amax_floor)
    scale = amax / torch.full_like(amax, FP8_MAX)  # CUDA turns division by a Python number into multiplication
    if scale_rounding == "power_of_two":
        scale = (((scale.view(torch.int32) + 0x7FFFFF) >> 23) << 23).view(torch.float32)
    elif scale_rounding == "input":
        scale = scale.to(x.dtype).float()
    y = (rows.float() / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    y = torch.where(finite.unsqueeze(-1), y, torch.nan).to(torch.float8_e4m3fn)
    y = y.view(x.shape) if scaling == "tensor" else y.flatten(-2)[..., :size].contiguous()
    scale = torch.where(finite, scale, torch.nan)
    return y, block_scales(x, scale.shape).copy_(scale) if scaling == "block" else scale


def dequantize_fp8_ref(values: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values [..., K] times their scales, in any of the three scalings, rounded once to ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = scale.float().to(wide)
    if scale.dim() > 1 and scale.shape[-1] > 1:
        scale = scale.repeat_interleave(GROUP, -1)[..., : values.shape[-1]]
    if scale.dim() == 2 and values.dim() == 2 and scale.shape[0] != values.shape[0]:
        scale = scale.repeat_interleave(GROUP, 0)[: values.shape[0]]
    return (values.to(wide) * scale).to(dtype)


def scaled_mm_fp8_ref(
    xq: Tensor,
    wq: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = True,
    allow_dequantize: bool = False,
) -> Tensor:
    """Plain PyTorch form of :func:`scaled_mm_fp8`; with ``out_dtype`` float64, all of it in float64.

    Sums of e4m3 products are exact in float64 up to 2^17 of them, so they do not depend on an order.
    """
    if allow_dequantize and _lacks_fp8(xq.device):
        x, w = dequantize_fp8_ref(xq, x_scale), dequantize_fp8_ref(wq, w_scale)
        return F.linear(x, w, None if bias is None else bias.bfloat16()).to(out_dtype)
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    x, w = xq.double(), wq.double().t()
    x_scale, w_scale = x_scale.float().to(wide), w_scale.float().to(wide)
    if is_block(xq, wq, x_scale, w_scale):
        columns = w_scale.repeat_interleave(GROUP, 0)[: wq.shape[0]].t()
        total = torch.zeros(*xq.shape[:-1], wq.shape[0], dtype=wide, device=xq.device)
        for group in range(x_scale.shape[-1]):
            part = slice(group * GROUP, (group + 1) * GROUP)
            scale = x_scale[..., group : group + 1] * columns[group]
            total = total + (x[..., part] @ w[part]).to(wide) * scale
    else:
        total = (x @ w).to(wide) * x_scale * w_scale.flatten()
    if bias is not None:
        total = total + bias.to(wide)
    return total.to(out_dtype)


def fp8_linear_ref(
    x: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: str | None = None,
    scale_rounding: str = "none",
    amax_floor: float = 1e-4,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = True,
    allow_dequantize: bool = False,
) -> Tensor:
    """Plain PyTorch form of :func:`fp8_linear`."""
    scaling = scaling or default_scaling(wq, w_scale)
    xq, x_scale = quantize_fp8_ref(x, scaling=scaling, scale_rounding=scale_rounding, amax_floor=amax_floor)
    options: dict[str, Any] = {"batch_invariant": batch_invariant, "allow_dequantize": allow_dequantize}
    return scaled_mm_fp8_ref(xq, wq, x_scale, w_scale, bias, out_dtype=out_dtype or x.dtype, **options)


# What the arguments say


def block_scales(like: Tensor, shape: Sequence[Any]) -> Tensor:
    """Room for block scales [..., G] of an activation, where M of a group are contiguous, at multiples of 16 bytes."""
    *lead, _ = shape
    strides = [math.prod(lead[i + 1 :]) for i in range(len(lead))]
    return like.new_empty_strided([*shape], [*strides, -(-math.prod(lead) // 4) * 4], dtype=torch.float32)


def is_block(xq: Tensor, wq: Tensor, x_scale: Tensor, w_scale: Tensor) -> bool:
    """Whether the scales are those of blocks."""
    return x_scale.dim() == xq.dim() and w_scale.dim() == 2 and w_scale.shape[0] != wq.shape[0]


def default_scaling(wq: Tensor, w_scale: Tensor) -> str:
    """What goes with a weight: blocks with blocks, else a scale per token."""
    return "block" if w_scale.dim() == 2 and w_scale.shape[0] != wq.shape[0] else "token"


def _lacks_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)


# Checks, in the real call and in the fake one


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_dtype(label: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{label} must be {' or '.join(map(_name, dtypes))}, got {_name(tensor.dtype)}")
    if tensor.device != device:
        raise ValueError(f"{label} is on {tensor.device}, expected {device}")


def _check_rows(label: str, x: Tensor) -> None:
    """[..., K] with contiguous rows of a size that the hardware takes."""
    if x.dim() < 1:
        raise ValueError(f"{label} must have shape [..., K], got []")
    size = x.shape[-1]
    expect(
        size > 0 and size % MULTIPLE == 0,
        lambda: f"the last dimension of {label} must be a positive multiple of {MULTIPLE}, got {size}",
    )
    expect(
        x.stride(-1) == 1,
        lambda: f"the last dimension of {label} must be contiguous, got strides {list(x.stride())}",
    )


def _check_weight(wq: Tensor, size: Any, device: torch.device) -> None:
    _check_dtype("wq", wq, (torch.float8_e4m3fn,), device)
    if wq.dim() != 2:
        raise ValueError(f"wq must have shape [N, K], got {_shape(wq)}")
    rows = wq.shape[0]
    expect(rows > 0 and rows % MULTIPLE == 0, lambda: f"N must be a positive multiple of {MULTIPLE}, got {rows}")
    expect(wq.shape[1] == size, lambda: f"wq must have shape [N, {size}], as x has that K, got {_shape(wq)}")
    _check_rows("wq", wq)


def _check_w_scale(wq: Tensor, w_scale: Tensor) -> None:
    _check_dtype("w_scale", w_scale, SCALES, wq.device)
    (n, k), got = wq.shape, tuple(w_scale.shape)
    blocks = -(-n // GROUP), -(-k // GROUP)
    if got not in ((1,), (n, 1), blocks):
        raise ValueError(
            f"w_scale must have shape [1] (per tensor), [{n}, 1] (per channel) or {list(blocks)} (per block), "
            f"got {list(got)}"
        )


def _check_x_scale(xq: Tensor, wq: Tensor, x_scale: Tensor, w_scale: Tensor) -> None:
    _check_dtype("x_scale", x_scale, SCALES, xq.device)
    lead, groups = xq.shape[:-1], -(-wq.shape[1] // GROUP)
    block = default_scaling(wq, w_scale) == "block"
    wanted = f"[..., {groups}]" if block else "[1] or [..., 1]"

    def message() -> str:
        return f"x_scale must have shape {wanted} for this w_scale, got {_shape(x_scale)} for xq {_shape(xq)}"

    if not block and x_scale.dim() == 1 and xq.dim() != 1:
        expect(x_scale.shape[0] == 1, message)
        return
    expect(x_scale.dim() == xq.dim(), message)
    expect(x_scale.shape[-1] == (groups if block else 1), message)
    for got, want in zip(x_scale.shape[:-1], lead, strict=True):
        expect(got == want, message)


def _check_rest(x: Tensor, wq: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    if bias is not None:
        _check_dtype("bias", bias, (*INPUTS, torch.float32), x.device)
        if tuple(bias.shape) != (wq.shape[0],) or bias.stride(0) != 1:
            raise ValueError(
                f"bias must be contiguous and have shape [{wq.shape[0]}], got {_shape(bias)} "
                f"with strides {list(bias.stride())}"
            )
    if out_dtype not in INPUTS:
        raise ValueError(f"out_dtype must be {' or '.join(map(_name, INPUTS))}, got {_name(out_dtype)}")


def _check_device(device: torch.device, batch_invariant: bool, allow_dequantize: bool) -> None:
    if not _lacks_fp8(device):
        return
    major, minor = torch.cuda.get_device_capability(device)
    what = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no FP8 tensor cores, 8.9 has"
    if not allow_dequantize:
        raise ValueError(f"{what}: allow_dequantize=True computes in bf16 instead")
    if batch_invariant:
        raise ValueError(f"{what}, and the bf16 product used instead is not batch-invariant: ask for False")


def _check_quantize(
    x: Tensor, *, scaling: str = "token", scale_rounding: str = "none", amax_floor: float = 1e-4
) -> None:
    _check_dtype("x", x, INPUTS, x.device)
    _check_rows("x", x)
    _check_options(scaling, scale_rounding, amax_floor, x.dtype)
    refuse_grad([x])


def _check_options(scaling: str | None, scale_rounding: str, amax_floor: float, dtype: torch.dtype) -> None:
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    if scale_rounding not in ROUNDINGS:
        raise ValueError(f"scale_rounding must be one of {', '.join(ROUNDINGS)}, got {scale_rounding!r}")
    if not FP8_FLOOR <= amax_floor <= 65504:
        raise ValueError(
            f"amax_floor must be from {FP8_FLOOR:.4g} (or a scale is no normal number) to 65504, got {amax_floor}"
        )
    if scale_rounding == "input" and dtype == torch.float16 and amax_floor <= FP8_MAX * 2**-25:
        raise ValueError(
            f"with scale_rounding 'input' and float16, amax_floor must be above {FP8_MAX * 2**-25:.4g}, or a scale is "
            f"rounded to 0, got {amax_floor}"
        )


def _check_mm(
    xq: Tensor,
    wq: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = True,
    allow_dequantize: bool = False,
) -> None:
    _check_dtype("xq", xq, (torch.float8_e4m3fn,), xq.device)
    _check_rows("xq", xq)
    _check_weight(wq, xq.shape[-1], xq.device)
    _check_w_scale(wq, w_scale)
    _check_x_scale(xq, wq, x_scale, w_scale)
    _check_rest(xq, wq, bias, out_dtype)
    _check_device(xq.device, batch_invariant, allow_dequantize)
    refuse_grad([x_scale, w_scale, bias])


def _check_linear(
    x: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: str | None = None,
    scale_rounding: str = "none",
    amax_floor: float = 1e-4,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = True,
    allow_dequantize: bool = False,
) -> None:
    _check_dtype("x", x, INPUTS, x.device)
    _check_rows("x", x)
    _check_weight(wq, x.shape[-1], x.device)
    _check_w_scale(wq, w_scale)
    _check_options(scaling or "token", scale_rounding, amax_floor, x.dtype)
    of_weight = default_scaling(wq, w_scale)
    if scaling is not None and (scaling == "block") != (of_weight == "block"):
        raise ValueError(f"scaling {scaling!r} does not go with w_scale of shape {_shape(w_scale)}")
    if scaling == "tensor" and batch_invariant:
        raise ValueError(
            "scaling 'tensor' takes one scale from all tokens, so a row depends on the others: "
            "use 'token', or batch_invariant=False"
        )
    _check_rest(x, wq, bias, out_dtype or x.dtype)
    _check_device(x.device, batch_invariant, allow_dequantize)
    refuse_grad([x, w_scale, bias])


# Fakes: every output but block scales is contiguous


def _fake_quantize(x: Tensor, *, scaling: str = "token", **_: Any) -> tuple[Tensor, Tensor]:
    *lead, size = x.shape
    if scaling == "block":
        scale = block_scales(x, (*lead, -(-size // GROUP)))
    else:
        scale = x.new_empty([1] if scaling == "tensor" else [*lead, 1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale


def _fake_mm(xq: Tensor, wq: Tensor, *_: Any, out_dtype: torch.dtype = torch.bfloat16, **__: Any) -> Tensor:
    return xq.new_empty([*xq.shape[:-1], wq.shape[0]], dtype=out_dtype)


def _fake_linear(x: Tensor, wq: Tensor, *_: Any, out_dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return x.new_empty([*x.shape[:-1], wq.shape[0]], dtype=out_dtype or x.dtype)


# Operators


def _not_hopper(x: Tensor, *_: Any, **__: Any) -> str | None:
    """The kernel is made of SM90's instructions, which no later architecture has."""
    major, minor = torch.cuda.get_device_capability(x.device)
    return None if major == 9 else f"cutedsl multiplies FP8 on compute capability 9.0, this device has {major}.{minor}"


def _kernels(function: str) -> list[Implementation]:
    """Best first: CuTe DSL adds up partial sums while the tensor core goes on, Triton waits for it."""
    triton = Implementation("triton", f"dsv4_fusion.ops.triton.fp8_linear:{function}", capability=(8, 9))
    if function == "quantize_fp8":
        return [triton]
    entry = f"dsv4_fusion.ops.cutedsl.fp8_linear:{function}"
    return [Implementation("cutedsl", entry, _not_hopper, capability=(9, 0)), triton]


_QUANTISER = 'str scale_rounding="none", float amax_floor=1e-4'
_PRODUCT = "bool batch_invariant=True, bool allow_dequantize=False, str? implementation=None"

_quantize_fp8 = define(
    f'quantize_fp8(Tensor x, *, str scaling="token", {_QUANTISER}, str? implementation=None)'
    " -> (Tensor xq, Tensor x_scale)",
    reference=quantize_fp8_ref,
    fake=_fake_quantize,
    check=_check_quantize,
    implementations=_kernels("quantize_fp8"),
)
_scaled_mm_fp8 = define(
    "scaled_mm_fp8(Tensor xq, Tensor wq, Tensor x_scale, Tensor w_scale, Tensor? bias=None, *, "
    f"ScalarType out_dtype=bfloat16, {_PRODUCT}) -> Tensor",
    reference=scaled_mm_fp8_ref,
    fake=_fake_mm,
    check=_check_mm,
    implementations=_kernels("scaled_mm_fp8"),
)
_fp8_linear = define(
    "fp8_linear(Tensor x, Tensor wq, Tensor w_scale, Tensor? bias=None, *, str? scaling=None, "
    f"{_QUANTISER}, ScalarType? out_dtype=None, {_PRODUCT}) -> Tensor",
    reference=fp8_linear_ref,
    fake=_fake_linear,
    check=_check_linear,
    implementations=_kernels("fp8_linear"),
)


def quantize_fp8(
    x: Tensor,
    *,
    scaling: str = "token",
    scale_rounding: str = "none",
    amax_floor: float = 1e-4,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Values in e4m3 and their scales.

    A scale is ``max(max|x|, amax_floor) / 448`` over the values that share it; values are ``x / scale`` in fp32,
    clamped to ±448 and rounded to nearest even. Where one of them is NaN or infinite, all of them and the scale
    become NaN.

    Args:
        x: [..., K] bf16 or fp16; K is a multiple of 16 and contiguous. The last group may be shorter than 128.
        scaling: "token": a scale for each row; "tensor": one; "block": one for every 128 values of a row.
        scale_rounding: "none"; "power_of_two", up to the next one (UE8M0); "input", to x's dtype, as torchao does.
        amax_floor: what the largest magnitude is at least taken for; above 1.34e-5 with fp16 and rounding "input", or
            a scale would be 0.
        implementation: "triton", "reference", or None for the best one usable.

    Returns:
        xq [..., K] float8_e4m3fn, contiguous; x_scale fp32, [..., 1] per token, [1] per tensor, both contiguous, or
        [..., ceil(K / 128)] per block, in which those of a group are contiguous and groups lie M apart, rounded up to a
        multiple of 4: as copy engines read them, and as ``torch._scaled_mm`` and DeepGEMM expect them.

    Raises:
        ValueError: wrong shape, dtype, stride or option; an input that requires grad; an implementation asked for by
            name that cannot run here.
    """
    return _quantize_fp8(
        x, scaling=scaling, scale_rounding=scale_rounding, amax_floor=amax_floor, implementation=implementation
    )


def scaled_mm_fp8(
    xq: Tensor,
    wq: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = True,
    allow_dequantize: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """``(xq · x_scale) (wq · w_scale)^T + bias``, batch-invariant: a row's bits depend on that row alone.

    Sums are fp32 from every 128 products on; block scales multiply these partial sums, the others the total. The bias
    is added in fp32, and the result rounded once.

    Args:
        xq: [..., K] float8_e4m3fn; any number of rows, none included.
        wq: [N, K] float8_e4m3fn; N and K are multiples of 16.
        x_scale: [1], [..., 1], or [..., ceil(K / 128)] with block scales; fp32 or float8_e8m0fnu.
        w_scale: [1], [N, 1], or [ceil(N / 128), ceil(K / 128)]; fp32 or float8_e8m0fnu.
        bias: [N] bf16, fp16 or fp32.
        out_dtype: torch.bfloat16 or torch.float16.
        batch_invariant: False permits an order of summation that follows the number of rows. No kernel here has one.
        allow_dequantize: on a GPU without FP8, compute in bf16 instead of raising; needs ``batch_invariant=False``.
        implementation: "cutedsl", "triton", "reference", or None for the best one usable.

    Returns:
        [..., N] of ``out_dtype``, contiguous.

    Raises:
        ValueError: wrong shape, dtype, device or stride; an input that requires grad; a GPU without FP8; an
            implementation asked for by name that cannot run here.
    """
    return _scaled_mm_fp8(
        xq,
        wq,
        x_scale,
        w_scale,
        bias,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
        allow_dequantize=allow_dequantize,
        implementation=implementation,
    )


def fp8_linear(
    x: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: str | None = None,
    scale_rounding: str = "none",
    amax_floor: float = 1e-4,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = True,
    allow_dequantize: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """:func:`quantize_fp8` of the activation, then :func:`scaled_mm_fp8` with an FP8 weight.

    Args:
        x: [..., K] bf16 or fp16.
        wq, w_scale, bias, batch_invariant, allow_dequantize, implementation: as in :func:`scaled_mm_fp8`.
        scaling: of x; None is "block" with a weight that has block scales, else "token". "tensor" takes one scale from
            all rows, which no row is independent of: it needs ``batch_invariant=False``.
        scale_rounding, amax_floor: as in :func:`quantize_fp8`.
        out_dtype: torch.bfloat16 or torch.float16; None is x's.

    Returns:
        [..., N] of ``out_dtype``, contiguous.

    Raises:
        ValueError: as :func:`scaled_mm_fp8`; a scaling that does not go with the weight's.
    """
    return _fp8_linear(
        x,
        wq,
        w_scale,
        bias,
        scaling=scaling,
        scale_rounding=scale_rounding,
        amax_floor=amax_floor,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
        allow_dequantize=allow_dequantize,
        implementation=implementation,
    )
