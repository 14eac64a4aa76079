"""What the indexer's operators share: the arithmetic of a row, and the checks of its arguments.

A row is the d values of one head of one token, d being 64 or 128. Every step rounds where the eager model does, and in
one fixed order, so that all implementations give the same bits:

1. RoPE on the interleaved pairs (2i, 2i + 1) of the last R dims, in fp32: each product is rounded, then the sum; then
   bf16. The other dims are left as they are.
2. Hadamard, if asked for: the d-point transform in natural (Sylvester) order, butterflies in fp32 with strides
   1, 2, 4, …, one multiplication by d^-1/2 at the end, then bf16. On queries and keys alike, or on neither.
3. Quantisation. FP8 is e4m3fn with one scale a row, MXFP4 is E2M1 with one UE8M0 scale for 32 values.

Source: DeepSeek-V4 technical report and inference code; OCP Microscaling Formats (MX) v1.0 for E2M1 and UE8M0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import expect

FP8_MAX = 448.0  # the largest e4m3fn
FP4_MAX = 6.0  # the largest E2M1
MXFP4_BLOCK = 32
MXFP4_FLOOR = FP4_MAX * 2.0**-126  # below these the scale would not be a normal fp32 number
FP8_FLOOR = FP8_MAX * 2.0**-126
BF16_MAX = torch.finfo(torch.bfloat16).max
TIES = ("even", "zero")
FLOATS = (torch.float32, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


# References


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension, a power of two, in fp32 and rounded once to x's dtype.

    The squares are added as a tree, neighbours first. ``1 / sqrt`` is two rounded operations: rsqrt differs by device,
    and so does PyTorch's fp32 sqrt, which on the CPU can be the second nearest; the one through float64 is the nearest.
    """
    wide = x.float()
    total = wide * wide
    while total.shape[-1] > 1:
        even, odd = total.unflatten(-1, (-1, 2)).unbind(-1)
        total = even + odd
    root = torch.sqrt((total * (1 / x.shape[-1]) + eps).double()).float()  # of a power of two: a division, exactly
    return (wide * (torch.ones_like(root) / root) * weight.float()).to(x.dtype)


def rotate_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of the last ``2 * cos.shape[-1]`` dims of ``x``; cos and sin broadcast over the dims before the last."""
    plain = x.shape[-1] - 2 * cos.shape[-1]
    cos, sin = cos.float(), sin.float()
    even, odd = x[..., plain:].float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return torch.cat([x[..., :plain], rotated.flatten(-2).to(x.dtype)], -1)


def hadamard_ref(x: Tensor) -> Tensor:
    """Orthonormal Hadamard transform of the last dimension, a power of two, in natural order."""
    size, y = x.shape[-1], x.float()
    stride = 1
    while stride < size:
        a, b = y.unflatten(-1, (size // (2 * stride), 2, stride)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        stride *= 2
    return (y * size**-0.5).to(x.dtype)


def _amax(x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """max(max |x|, floor) over the last dimension in fp32, and whether all of these values are finite."""
    amax = x.abs().amax(-1).float()
    return amax.clamp(min=floor), amax.isfinite()


def _divided(amax: Tensor, largest: float) -> Tensor:
    return amax / torch.full_like(amax, largest)  # CUDA turns division by a Python number into multiplication


def _exponent(scale: Tensor) -> Tensor:
    """The biased exponent of the smallest power of two that is no less than ``scale``, positive and finite."""
    return (scale.view(torch.int32) + 0x7FFFFF) >> 23


def _power(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) for biased exponents from 1 to 254."""
    return (exponent << 23).view(torch.float32)


def quantise_fp8_ref(x: Tensor, amax_floor: float = 1e-4, power_of_two_scale: bool = True) -> tuple[Tensor, Tensor]:
    """bf16 [..., d] to e4m3fn [..., d] and fp32 scales [...]; a row that is not finite becomes NaN, scale included."""
    amax, finite = _amax(x, amax_floor)
    scale = _divided(amax, FP8_MAX)
    if power_of_two_scale:
        exponent = _exponent(scale)
        scale = _power(exponent)
        y = x.float() * _power(254 - exponent).unsqueeze(-1)
    else:
        y = x.float() / scale.unsqueeze(-1)
    y = torch.where(finite.unsqueeze(-1), y.clamp(-FP8_MAX, FP8_MAX), torch.nan)
    return y.to(torch.float8_e4m3fn), torch.where(finite, scale, torch.nan)


def quantise_mxfp4_ref(x: Tensor, amax_floor: float = MXFP4_FLOOR, ties: str = "even") -> tuple[Tensor, Tensor]:
    """bf16 [..., d] to packed E2M1 uint8 [..., d / 2] and, in an int32 [...], the UE8M0 bytes of the blocks of 32.

    A block that is not finite has codes 0 and scale byte 255, which is UE8M0's NaN.
    """
    x = x.unflatten(-1, (-1, MXFP4_BLOCK))
    amax, finite = _amax(x, amax_floor)
    exponent = _exponent(_divided(amax, FP4_MAX))
    y = (x.float() * _power(254 - exponent).unsqueeze(-1)).abs()
    code = torch.signbit(x).to(torch.int32) << 3
    # Where a value falls between two codes, the one with an even last bit is every second one.
    for index, middle in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code = code + (y >= middle if ties == "even" and index % 2 else y > middle)
    code = torch.where(finite.unsqueeze(-1), code, 0).flatten(-2)
    exponent = torch.where(finite, exponent, 255)
    scale = exponent[..., 0]
    for block in range(1, exponent.shape[-1]):
        scale = scale | exponent[..., block] << 8 * block
    return (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8), scale


def dequantise_fp8_ref(values: Tensor, scale: Tensor) -> Tensor:
    """e4m3fn [..., d] times fp32 [...], as bf16."""
    return (values.float() * scale.unsqueeze(-1)).bfloat16()


def dequantise_mxfp4_ref(packed: Tensor, scale: Tensor) -> Tensor:
    """Packed E2M1 uint8 [..., d / 2] and UE8M0 bytes [..., d / 32] to bf16 [..., d]; exact but for subnormals."""
    code = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=packed.device)
    values = torch.cat([positive, -positive])[code]
    exponent = scale.int()
    power = torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)  # 2^-127 is subnormal
    power = torch.where(exponent == 255, torch.nan, power)
    return (values.unflatten(-1, (-1, MXFP4_BLOCK)) * power.unsqueeze(-1)).flatten(-2).bfloat16()


def rope_rows(positions: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of cos and sin that belong to the tokens."""
    if positions is None:
        return cos, sin
    if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
        low, high = int(positions.min()), int(positions.max())
        expect(
            low >= 0 and high < cos.shape[0],
            lambda: f"positions must be in [0, {cos.shape[0]}), the rows of cos and sin, got {low} to {high}",
        )
    return cos[positions], sin[positions]


# Checks, in the real call and in the fake one. What is right is found out with few calls: these run at every launch.


def check_tensor(
    label: str, tensor: Tensor, shape: tuple[Any, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Shape (None: any size), dtype and device of one argument, and that its last dimension is contiguous."""
    if tensor.shape == shape and tensor.dtype in dtypes and tensor.device == device and tensor.stride(-1) == 1:
        return
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    expect(tensor.dim() == len(shape), lambda: f"{label} must have shape {wanted}, got {list(tensor.shape)}")
    for got, want in zip(tensor.shape, shape, strict=True):
        if want is not None:
            expect(got == want, lambda: f"{label} must have shape {wanted}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{label} must be {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{label} is on {tensor.device}, expected {device}")
    if tensor.stride(-1) != 1:
        expect(
            tensor.shape[-1] == 1,
            lambda: f"the last dimension of {label} must be contiguous, got strides {list(tensor.stride())}",
        )


def check_dim(d: int) -> None:
    if d != 128 and d != 64:
        raise ValueError(f"the head dim must be 64 or 128, got {d}")


def check_rope(tokens: int, d: int, positions: Tensor | None, cos: Tensor, sin: Tensor, device: torch.device) -> None:
    """cos and sin of ``tokens`` rows, or a table of any number of rows and ``positions`` into it."""
    if cos.dim() != 2 or positions is None:
        check_tensor("cos", cos, (None if positions is not None else tokens, None), FLOATS, device)
    rows, pairs = cos.shape
    check_tensor("cos", cos, (rows, pairs), FLOATS, device)
    check_tensor("sin", sin, (rows, pairs), (cos.dtype,), device)
    if not 2 <= 2 * pairs <= d:
        raise ValueError(f"cos and sin hold one value a pair, from 1 to {d // 2} for head dim {d}, got {pairs}")
    if positions is not None:
        check_tensor("positions", positions, (tokens,), INTEGERS, device)


def check_quantiser(mxfp4: bool, amax_floor: float | None = None, ties: str = "even", **_: Any) -> None:
    """The options of either quantiser."""
    if amax_floor is not None:
        least = MXFP4_FLOOR if mxfp4 else FP8_FLOOR
        if not least <= amax_floor <= BF16_MAX:
            raise ValueError(
                f"amax_floor must be finite and at least {least:.4g} (or the scale is no normal number), "
                f"got {amax_floor}"
            )
    if ties not in TIES:
        raise ValueError(f"ties must be 'even' or 'zero', got {ties!r}")


# What the CuTe DSL kernels take


def cutedsl_limits(rows: Tensor, cos: Tensor | None, sin: Tensor | None) -> str | None:
    """They read eight values at a time, and four angles."""
    if (rows.stride(0) | rows.stride(-2)) % 8 or rows.data_ptr() % 16:
        return f"the cutedsl kernels read 16 bytes at a time: rows are not aligned to that, strides {rows.stride()}"
    if cos is not None and sin is not None:
        if cos.shape[1] % 8:
            return f"the cutedsl kernels rotate multiples of 16 dims, got {2 * cos.shape[1]}"
        if (cos.stride(0) | sin.stride(0)) % 4 or (cos.data_ptr() | sin.data_ptr()) % 16:
            return "the cutedsl kernels read 16 bytes at a time: cos or sin is not aligned to that"
    return None


def cutedsl_unaligned(*whole: Tensor) -> str | None:
    """Of contiguous tensors."""
    if any(tensor.data_ptr() % 16 for tensor in whole):
        return "the cutedsl kernels read and write 16 bytes at a time: an argument is not aligned to that"
    return None
