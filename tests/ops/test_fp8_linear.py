"""FP8 linear layers: the quantiser against arithmetic of its own, the product against float64, and its invariance.

Run as a script with TRITON_INTERPRET=1, this file compares the interpreted kernels; a test does that in a subprocess,
because Triton reads the variable when it is imported. ``digest`` prints what two processes have to agree on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script

from dsv4_fusion import ops
from dsv4_fusion.ops import _library
from tests.ops.interpreted import patch_fma, patch_once_a_launch

module = importlib.import_module("dsv4_fusion.ops.fp8_linear")  # the package has the function under that name
SCALINGS = ("token", "tensor", "block")
CODES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # the finite ones, by code
BATCHES = (1, 2, 15, 16, 17, 32, 64, 65, 127, 128, 256, 257, 1024, 4096)
WEIGHTS = ((1024, 2048), (4608, 4096), (32768, 1024), (4096, 8192))


def weight(n: int, k: int, scaling: str, seed: int = 0, power_of_two: bool = False):
    """A quantised weight and its scales."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * k**-0.5
    if scaling != "block":
        rounding = "power_of_two" if power_of_two else "none"
        return ops.quantize_fp8(w.bfloat16(), scaling=scaling, scale_rounding=rounding)
    blocks = torch.nn.functional.pad(w, (0, -k % 128, 0, -n % 128)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale = blocks.abs().amax((1, 3)) / 448
    if power_of_two:
        scale = torch.exp2(torch.log2(scale).ceil())
    wide = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return (w / wide).to(torch.float8_e4m3fn), scale


def problem(m: int, n: int, k: int, scaling: str, bias: bool = True, e8m0: bool = False, seed: int = 1):
    """xq, wq, x_scale, w_scale, bias of a product; every row of x has a size of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.exp2(torch.randint(-6, 6, (m, 1), generator=generator))
    wq, w_scale = weight(n, k, scaling, power_of_two=e8m0)
    rounding = "power_of_two" if e8m0 else "none"
    xq, x_scale = ops.quantize_fp8(x.bfloat16(), scaling=scaling, scale_rounding=rounding)
    if e8m0:
        x_scale, w_scale = x_scale.to(torch.float8_e8m0fnu), w_scale.to(torch.float8_e8m0fnu)
    return xq, wq, x_scale, w_scale, torch.randn(n, generator=generator).bfloat16() if bias else None


def error(got: torch.Tensor, tensors) -> float:
    """The largest distance from float64, relative to the sum of the products' magnitudes.

    Out of that sum a K step of 128 loses at most 2^-13 of its own on Hopper: the tensor core keeps 14 bits or more.
    """
    xq, wq, x_scale, w_scale, bias = (None if t is None else t.cpu() for t in tensors)
    exact = module.scaled_mm_fp8_ref(xq, wq, x_scale, w_scale, bias, out_dtype=torch.float64)
    x, w = (module.dequantize_fp8_ref(*pair, dtype=torch.float64) for pair in ((xq, x_scale), (wq, w_scale)))
    size = x.abs() @ w.abs().t()
    rounding = torch.finfo(got.dtype).eps / 2 * exact.abs()
    return (((got.cpu().double() - exact).abs() - rounding).clamp(min=0) / size.clamp(min=1e-30)).max().item()


# The quantiser


def special(k: int) -> torch.Tensor:
    """Rows where rounding is decided: zeros, subnormals, largest values about powers of two, exact ties."""
    ramp = torch.linspace(-1, 1, k)
    rows = [torch.zeros(k), -torch.zeros(k), torch.full((k,), 1e-40), 1e-6 * ramp]
    for largest, ulp in itertools.product((1.0, 448.0, 2.0**-20, 2.0**14), (1 - 2**-8, 1.0, 1 + 2**-7)):
        rows.append(ramp * largest * ulp)
        rows[-1][-1] = largest * ulp
    ties = torch.tensor([17.0, 19.0, 21.0, 2.0**-10, 3 * 2.0**-10, 5 * 2.0**-10, 15 * 2.0**-10, 448.0])
    rows.append(torch.cat([ties, -ties]).repeat(k // 16))
    return torch.stack(rows)


@pytest.mark.parametrize("rounding", module.ROUNDINGS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", module.INPUTS)
def test_quantiser_takes_the_nearest_code(dtype, scaling, rounding):
    x = special(144).to(dtype)
    xq, x_scale = ops.quantize_fp8(x, scaling=scaling, scale_rounding=rounding)
    groups = {"token": 144, "block": 128, "tensor": x.numel()}[scaling]
    values = x.flatten() if scaling == "tensor" else x
    for index, part in enumerate(values.split(groups, -1)):
        amax = part.double().abs().amax(-1, keepdim=True).clamp(min=torch.tensor(1e-4).double())
        scale = (amax / 448).float()
        if rounding == "power_of_two":
            fraction, exponent = torch.frexp(scale)
            scale = torch.ldexp(torch.ones_like(scale), exponent - (fraction == 0.5).int())
        elif rounding == "input":
            scale = scale.to(dtype).float()
        got = x_scale if scaling == "tensor" else x_scale[..., index : index + 1]
        assert torch.equal(got, scale.view(got.shape))
        codes = (xq.flatten() if scaling == "tensor" else xq).split(groups, -1)[index].double()
        quotient = (part.float() / scale).double().clamp(-448, 448)
        best = (quotient.abs().unsqueeze(-1) - CODES).abs().amin(-1)
        assert torch.equal((codes - quotient).abs(), best)
        assert torch.equal(codes.signbit(), part.signbit())


def test_a_floor_whose_scale_is_rounded_to_zero_is_refused():
    x, options = torch.randn(2, 128), {"scale_rounding": "input", "amax_floor": 1e-9}
    with pytest.raises(ValueError, match=r"amax_floor must be above 1\.335e-05, or a scale is rounded to 0, got 1e-09"):
        ops.quantize_fp8(x.half(), **options)
    assert ops.quantize_fp8(x.bfloat16(), **options)[1].all()


def test_block_scales_of_a_group_are_contiguous():
    """At multiples of 16 bytes; products take them with any leading dims, and any other strides."""
    wq, w_scale = weight(48, 272, "block")
    for shape, strides in (((2, 3, 272), (3, 1, 8)), ((5, 272), (1, 8)), ((272,), (4,)), ((0, 272), (1, 0))):
        xq, x_scale = ops.quantize_fp8(torch.randn(shape).bfloat16(), scaling="block")
        assert xq.is_contiguous() and x_scale.stride() == strides and x_scale.shape == (*shape[:-1], 3)
        expected = ops.scaled_mm_fp8(xq, wq, x_scale.contiguous(), w_scale)
        assert torch.equal(ops.scaled_mm_fp8(xq, wq, x_scale, w_scale), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    x = torch.randn(3, 256).bfloat16()
    x[1, 200] = bad
    xq, x_scale = ops.quantize_fp8(x)
    assert x_scale.isnan().flatten().tolist() == [False, True, False]
    assert (xq.view(torch.uint8)[1] == 0x7F).all() and not xq[::2].float().isnan().any()
    _, x_scale = ops.quantize_fp8(x, scaling="block")
    assert x_scale.isnan().tolist() == [[False, False], [False, True], [False, False]]
    _, x_scale = ops.quantize_fp8(x, scaling="tensor")
    assert x_scale.isnan().all()
    y = ops.fp8_linear(x, *weight(32, 256, "token"))
    assert y[1].isnan().all() and y[::2].isfinite().all()


def test_zero_rows_give_zero():
    y = ops.fp8_linear(torch.zeros(2, 128).bfloat16(), *weight(32, 128, "token"), amax_floor=1e-35)
    assert torch.equal(y, torch.zeros_like(y))


# The product on the CPU


@pytest.mark.parametrize("e8m0", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_reference_against_float64(scaling, e8m0):
    for m, n, k, dtype in ((1, 16, 16, torch.bfloat16), (33, 272, 400, torch.float16), (5, 128, 1024, torch.bfloat16)):
        tensors = problem(m, n, k, scaling, e8m0=e8m0)
        got = ops.scaled_mm_fp8(*tensors, out_dtype=dtype)
        assert got.dtype == dtype and got.shape == (m, n) and got.is_contiguous()
        assert error(got, tensors) < 2**-22
        x, w = (module.dequantize_fp8_ref(*pair, dtype=torch.float64) for pair in (tensors[::2][:2], tensors[1::2][:2]))
        exact = module.scaled_mm_fp8_ref(*tensors, out_dtype=torch.float64)
        torch.testing.assert_close(exact, x @ w.t() + tensors[4].double(), rtol=1e-12, atol=1e-12)


def test_scales_of_a_tensor_and_of_rows_mix():
    xq, wq, x_scale, w_scale, bias = problem(7, 48, 160, "token")
    one = torch.tensor([0.25])
    expected = ops.scaled_mm_fp8(xq, wq, one.expand(7, 1).contiguous(), w_scale, bias)
    assert torch.equal(ops.scaled_mm_fp8(xq, wq, one, w_scale, bias), expected)
    expected = ops.scaled_mm_fp8(xq, wq, x_scale, one.expand(48, 1).contiguous(), bias)
    assert torch.equal(ops.scaled_mm_fp8(xq, wq, x_scale, one, bias), expected)


@pytest.mark.parametrize("scaling", ["token", "block"])
def test_linear_is_both_steps(scaling):
    x = torch.randn(2, 3, 272).bfloat16()
    wq, w_scale = weight(144, 272, scaling)
    for options in ({}, {"scale_rounding": "power_of_two", "amax_floor": 0.5}):
        xq, x_scale = ops.quantize_fp8(x, scaling=scaling, **options)
        expected = ops.scaled_mm_fp8(xq, wq, x_scale, w_scale)
        got = ops.fp8_linear(x, wq, w_scale, **options)
        assert got.shape == (2, 3, 144) and torch.equal(got, expected)
    assert ops.fp8_linear(x.half(), wq, w_scale).dtype == torch.float16
    assert ops.fp8_linear(x[0, 0], wq, w_scale).shape == (144,)
    assert ops.fp8_linear(x[:, :0], wq, w_scale).shape == (2, 0, 144)
    far = (
        ops.fp8_linear(x, wq, w_scale).float() - x.float() @ module.dequantize_fp8_ref(wq, w_scale).float().t()
    ).norm()
    assert far < 0.05 * x.float().norm()  # of activations of 3 bits


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_invariant(scaling, bias):
    xq, wq, x_scale, w_scale, b = problem(257, 144, 400, scaling, bias)
    whole = ops.scaled_mm_fp8(xq, wq, x_scale, w_scale, b)
    for row in (0, 100, 256):
        scale = x_scale if scaling == "tensor" else x_scale[row : row + 1]
        assert torch.equal(ops.scaled_mm_fp8(xq[row : row + 1], wq, scale, w_scale, b)[0], whole[row])


# Registration, bad input


@pytest.mark.parametrize("scaling", SCALINGS)
def test_opcheck(scaling):
    x = torch.randn(2, 3, 144).bfloat16()
    wq, w_scale = weight(32, 144, scaling)
    xq, x_scale = ops.quantize_fp8(x, scaling=scaling)
    calls = [
        (torch.ops.dsv4.quantize_fp8.default, (x,), {"scaling": scaling}),
        (torch.ops.dsv4.scaled_mm_fp8.default, (xq, wq, x_scale, w_scale), {}),
        (
            torch.ops.dsv4.fp8_linear.default,
            (x, wq, w_scale, torch.randn(32)),
            {"scaling": scaling, "batch_invariant": scaling != "tensor", "out_dtype": torch.float16},
        ),
    ]
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for overload, args, options in calls:
        if overload is torch.ops.dsv4.quantize_fp8.default:
            results = torch.library.opcheck(overload, args, options)
        else:  # torch cannot compare float8 arguments with what they were
            results = torch.library.opcheck(overload, args, options, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("xq", lambda x: x.float(), "xq must be float8_e4m3fn, got float32"),
        ("xq", lambda x: x[:, :136], "last dimension of xq must be a positive multiple of 16, got 136"),
        ("xq", lambda x: x[:, :128], r"wq must have shape \[N, 128\], as x has that K, got \[48, 144\]"),
        ("xq", lambda x: x[0, 0], r"xq must have shape \[..., K\], got \[\]"),
        ("wq", lambda x: x[:40], "N must be a positive multiple of 16, got 40"),
        ("wq", lambda x: x[None], r"wq must have shape \[N, K\], got \[1, 48, 144\]"),
        ("wq", lambda x: x.view(torch.uint8), "wq must be float8_e4m3fn, got uint8"),
        ("wq", lambda x: x.to("meta"), "wq is on meta, expected cpu"),
        ("wq", lambda x: x.t().contiguous().t(), "last dimension of wq must be contiguous"),
        ("x_scale", lambda x: x[1:], r"x_scale must have shape \[1\] or \[..., 1\] .*got \[4, 1\] for xq \[5, 144\]"),
        ("x_scale", lambda x: x.expand(-1, 2), r"x_scale must have shape \[1\] or \[..., 1\] .*got \[5, 2\]"),
        ("x_scale", lambda x: x[:, 0], r"x_scale must have shape \[1\] or \[..., 1\] .*got \[5\]"),
        ("x_scale", lambda x: x.bfloat16(), "x_scale must be float32 or float8_e8m0fnu, got bfloat16"),
        ("w_scale", lambda x: x[:, 0], r"w_scale must have shape \[1\] .*, \[48, 1\] .* or \[1, 2\] .*, got \[48\]"),
        ("w_scale", lambda x: x.t(), r"w_scale must have shape .*got \[1, 48\]"),
        ("w_scale", lambda x: x[:1].expand(1, 2), r"x_scale must have shape \[..., 2\] for this w_scale, got \[5, 1\]"),
        ("bias", lambda x: x[1:], r"bias must be contiguous and have shape \[48\], got \[47\]"),
        ("bias", lambda x: x.double(), "bias must be bfloat16 or float16 or float32, got float64"),
    ],
)
def test_bad_tensors(key, change, message):
    tensors = dict(zip(("xq", "wq", "x_scale", "w_scale", "bias"), problem(5, 48, 144, "token"), strict=True))
    tensors[key] = change(tensors[key])
    with pytest.raises(ValueError, match=f"dsv4::scaled_mm_fp8: .*{message}"):
        ops.scaled_mm_fp8(*tensors.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "row"}, "scaling must be one of token, tensor, block, got 'row'"),
        ({"scaling": "block"}, r"scaling 'block' does not go with w_scale of shape \[32, 1\]"),
        ({"scaling": "tensor"}, "takes one scale from all tokens, so a row depends on the others"),
        ({"scale_rounding": "up"}, "scale_rounding must be one of none, power_of_two, input, got 'up'"),
        ({"amax_floor": 0.0}, "amax_floor must be from 5.266e-36 .*got 0.0"),
        ({"amax_floor": math.nan}, "amax_floor must be from 5.266e-36 .*got nan"),
        ({"out_dtype": torch.float32}, "out_dtype must be bfloat16 or float16, got float32"),
        ({"implementation": "cuda"}, "no implementation 'cuda'"),
        ({"implementation": "triton"}, "asked for implementation 'triton'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ops.fp8_linear(torch.randn(2, 128).bfloat16(), *weight(32, 128, "token"), **options)


def test_float32_and_grad_are_refused():
    wq, w_scale = weight(32, 128, "token")
    with pytest.raises(ValueError, match="x must be bfloat16 or float16, got float32"):
        ops.fp8_linear(torch.randn(2, 128), wq, w_scale)
    with pytest.raises(ValueError, match="an input requires grad"):
        ops.fp8_linear(torch.randn(2, 128).bfloat16().requires_grad_(), wq, w_scale)


def test_a_device_without_fp8(monkeypatch):
    """Told by its capability; the product is then one of bf16, which is not batch-invariant."""
    monkeypatch.setattr(module, "_lacks_fp8", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A100")
    x, (wq, w_scale) = torch.randn(3, 144).bfloat16(), weight(48, 144, "block")
    with pytest.raises(ValueError, match=r"A100 \(compute capability 8.0\) has no FP8 .*allow_dequantize=True"):
        ops.fp8_linear(x, wq, w_scale)
    with pytest.raises(ValueError, match="is not batch-invariant"):
        ops.fp8_linear(x, wq, w_scale, allow_dequantize=True)
    got = ops.fp8_linear(x, wq, w_scale, allow_dequantize=True, batch_invariant=False)
    monkeypatch.undo()
    expected = ops.fp8_linear(x, wq, w_scale)
    assert 0 < (got.float() - expected.float()).norm() < 0.02 * expected.float().norm()


# Kernels


def compare(device: str) -> int:
    """Triton's kernels against the references; returns how many comparisons it were."""
    return compare_quantiser(device) + compare_product(device, "triton")


def compare_quantiser(device: str) -> int:
    count = 0
    widths = (144,) if device == "cpu" else (144, 512, 8192)
    for dtype, scaling, rounding, k in itertools.product(module.INPUTS, SCALINGS, module.ROUNDINGS, widths):
        x = torch.cat([torch.randn(3, k, generator=torch.Generator().manual_seed(0)), special(k)]).to(dtype)
        few = x[:: 5 if device == "cpu" else 1]
        for rows in (few, x[:1], x[:0], few.repeat(1, 2)[:, :k]):
            option = {"scaling": scaling, "scale_rounding": rounding}
            expected = ops.quantize_fp8(rows, **option, implementation="reference")
            got = ops.quantize_fp8(rows.to(device), **option, implementation="triton")
            for left, right in zip(got, expected, strict=True):
                assert left.shape == right.shape and left.dtype == right.dtype
                strides = [[s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] for t in (left, right)]
                if len(rows):
                    assert strides[0] == strides[1]
                    left, right = (t.cpu().contiguous().view(torch.uint8) for t in (left, right))
                    assert torch.equal(left, right), (option, k)
            count += 1
    return count


def compare_product(device: str, implementation: str) -> int:
    count = 0
    sizes = ((1, 16, 16), (3, 48, 144), (70, 144, 272)) + (() if device == "cpu" else LARGER)
    for (m, n, k), scaling, e8m0 in itertools.product(sizes, SCALINGS, (False, True)):
        tensors = problem(m, n, k, scaling, bias=m != 3, e8m0=e8m0)
        moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
        for dtype in (torch.float16,) if device == "cpu" else module.INPUTS:  # interpreted, bf16 is cut off
            got = ops.scaled_mm_fp8(*moved, out_dtype=dtype, implementation=implementation)
            assert got.shape == (m, n) and got.dtype == dtype and got.is_contiguous()
            assert error(got, tensors) < 2**-13, (m, n, k, scaling, e8m0, dtype, error(got, tensors))
            count += 1
    return count


LARGER = ((64, 1536, 4096), (65, 4096, 1024), (257, 1040, 2064), (1000, 528, 400))


def test_interpreted():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", __file__, "interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(2 * 3 * 3 * 4 + 3 * 3 * 2)


@pytest.fixture(params=["cutedsl", "triton"])
def implementation(request):
    for name in _library.COMPILERS[request.param]:
        pytest.importorskip(name)
    return request.param


@pytest.mark.gpu
def test_quantiser_on_the_gpu():
    pytest.importorskip("triton")
    assert compare_quantiser("cuda") == 2 * 3 * 3 * 3 * 4


@pytest.mark.gpu
def test_product_against_float64(implementation):
    assert compare_product("cuda", implementation) == 7 * 3 * 2 * 2


def needle(m: int, at: int, tensors, scaling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of ``m`` other rows with the needle, the last row of ``tensors``, at ``at``; and its scales."""
    xq, x_scale = tensors[0].view(torch.uint8), tensors[2]
    rows = torch.cat([xq[:at], xq[-1:], xq[at : m - 1]]).view(torch.float8_e4m3fn)
    if scaling == "tensor":
        return rows, x_scale
    return rows, torch.cat([x_scale[:at], x_scale[-1:], x_scale[at : m - 1]])


def same_everywhere(product, n: int, k: int, scaling: str, bias: bool, batches=BATCHES, device: str = "cuda") -> None:
    """Assert that a needle's result has the same bits alone, first, in the middle and last in every batch."""
    tensors = problem(max(batches) + 1, n, k, scaling, bias)
    tensors = [None if tensor is None else tensor.to(device) for tensor in tensors]
    alone = product(*needle(1, 0, tensors, scaling), tensors)[0]
    assert alone.isfinite().all() and alone.any()
    for m in batches:
        for at in sorted({0, m // 2, m - 1}):
            result = product(*needle(m, at, tensors, scaling), tensors)
            assert result.shape == (m, n)
            assert torch.equal(result[at].view(torch.int16), alone.view(torch.int16)), (m, at, n, k, scaling, bias)


def ours(rows, x_scale, tensors, implementation: str | None = None):
    _, wq, _, w_scale, bias = tensors
    return ops.scaled_mm_fp8(rows, wq, x_scale, w_scale, bias, implementation=implementation)


def split_by_batch(rows, x_scale, tensors):
    """What must fail: K is cut in as many pieces as fill the chip, which depends on the number of rows."""
    _, wq, _, w_scale, bias = tensors
    pieces, k = (4 if rows.shape[0] <= 16 else 2 if rows.shape[0] <= 64 else 1), rows.shape[1]
    total = torch.zeros(rows.shape[0], wq.shape[0], device=rows.device)
    for piece in range(pieces):
        part, sums = slice(piece * k // pieces, (piece + 1) * k // pieces), torch.zeros_like(total)
        for start in range(part.start, part.stop, 128):  # fp32 sums, as those of a kernel
            x, w = rows[:, start : start + 128].double(), wq[:, start : start + 128].double()
            sums += (x @ w.t()).float() * (1 + 2**-12)  # no sum of codes alone: these would be exact
        total += sums
    return total * x_scale * w_scale.flatten() + (0 if bias is None else bias.float())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_invariance_test_can_fail(device):
    with pytest.raises(AssertionError, match="32, 0, 256, 2048"):
        same_everywhere(split_by_batch, 256, 2048, "token", False, (1, 2, 16, 32, 64, 65), device)
    same_everywhere(ours, 256, 2048, "token", False, (1, 2, 16, 32, 64, 65), device)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
def test_a_row_does_not_see_its_batch(implementation, n, k, scaling, bias):
    same_everywhere(functools.partial(ours, implementation=implementation), n, k, scaling, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["token", "block"])
def test_linear_does_not_see_its_batch(implementation, scaling):
    wq, w_scale = (tensor.cuda() for tensor in weight(1536, 4096, scaling))
    x = torch.randn(4096, 4096, device="cuda").bfloat16()
    alone = ops.fp8_linear(x[-1:], wq, w_scale, implementation=implementation)[0]
    for m in BATCHES:
        assert torch.equal(ops.fp8_linear(x[-m:], wq, w_scale, implementation=implementation)[-1], alone), m
        assert torch.equal(ops.fp8_linear(x[-m:].flip(0), wq, w_scale, implementation=implementation)[0], alone), m


def digest(implementation: str) -> str:
    """Of products at several sizes."""
    total = hashlib.sha256()
    for (n, k), scaling, m in itertools.product(WEIGHTS[:2], SCALINGS, (1, 65, 257)):
        tensors = [tensor.cuda() for tensor in problem(m, n, k, scaling)]
        total.update(
            ops.scaled_mm_fp8(*tensors, implementation=implementation).view(torch.int16).cpu().numpy().tobytes()
        )
    return total.hexdigest()


@pytest.mark.gpu
def test_two_processes_agree(implementation):
    done = subprocess.run([sys.executable, __file__, implementation], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == digest(implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 16), (65, 1040, 272), (257, 528, 400), (300, 4112, 1040)])
def test_all_of_the_output_is_written_and_nothing_else(monkeypatch, implementation, m, n, k, scaling):
    """Outputs come from memory full of NaN, with as much behind them."""
    kernels = importlib.import_module(f"dsv4_fusion.ops.{implementation}.fp8_linear")
    tensors = [tensor.cuda() for tensor in problem(m, n, k, scaling)]
    expected = ops.scaled_mm_fp8(*tensors, implementation=implementation)
    memory = torch.full((2, m, n), math.nan, device="cuda", dtype=torch.bfloat16)
    if implementation == "cutedsl":
        monkeypatch.setattr(kernels, "new", lambda *_: memory[0])
    else:
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *_, **__: memory[0])
    got = kernels.scaled_mm_fp8(*tensors)
    monkeypatch.undo()
    assert got.data_ptr() == memory.data_ptr()
    assert torch.equal(got, expected) and got.isfinite().all() and memory[1].isnan().all()
    assert error(got, tensors) < 2**-13


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["token", "by group", "by row"])
@pytest.mark.parametrize(("rows", "columns", "cluster"), [(64, 64, (1, 1)), (64, 64, (2, 1)), (128, 128, (1, 2)),
                                                          (128, 64, (1, 1)), (128, 96, (2, 1))])  # fmt: skip
def test_tiles_end_in_any_row(monkeypatch, rows, columns, cluster, layout):
    """The last tile is loaded in pieces, by the number of its rows; the results are those of whole tiles.

    In the product alone, and in the one that loads w early.
    """
    kernels = importlib.import_module("dsv4_fusion.ops.cutedsl.fp8_linear")
    most = 4 * rows
    tensors = [tensor.cuda() for tensor in problem(most, 272, 400, "token" if layout == "token" else "block")]
    xq, wq, x_scale, w_scale, bias = tensors
    monkeypatch.setattr(kernels, "tile_of", lambda *_: kernels.Tile(64, 16, (1, 1), 64))
    expected = kernels.scaled_mm_fp8(*tensors)
    assert error(expected, tensors) < 2**-13
    monkeypatch.setattr(kernels, "tile_of", lambda *_: kernels.Tile(rows, columns, cluster, rows))
    memory = torch.empty(most, 272, device="cuda", dtype=torch.bfloat16)
    for tail in (tail for tail in (1, 8, 9, 24, 31, 32, 33, 56, 57, 64, 72, 96, 97, 127) if tail <= rows):
        for m in (tail, rows + tail, 2 * rows + tail):
            scale = x_scale[:m] if layout != "by row" else x_scale[:m].contiguous()
            monkeypatch.setattr(kernels, "new", lambda *_, m=m: memory.fill_(math.nan)[:m])
            for product in (kernels.scaled_mm_fp8, kernels.fp8_linear.product):
                got = product(xq[:m], wq, scale, w_scale, bias)
                assert torch.equal(got, expected[:m]), m
                assert memory[m:].isnan().all(), m


@pytest.mark.gpu
@pytest.mark.parametrize("e8m0", [False, True])
@pytest.mark.parametrize(("rows", "columns", "cluster"), [(64, 16, (1, 1)), (64, 128, (2, 1)), (128, 96, (1, 1)),
                                                          (128, 128, (1, 2)), (128, 192, (2, 1))])  # fmt: skip
def test_block_scales_of_any_length(monkeypatch, rows, columns, cluster, e8m0):
    """Less than a block, more than the 32 that are read at a time, and so few that tiles follow one another quickly."""
    kernels = importlib.import_module("dsv4_fusion.ops.cutedsl.fp8_linear")
    sizes = [(70, 400, k) for k in (16, 128, 256, 400, 4096, 4112, 8576)] + [(1100, 4112, k) for k in (16, 272, 400)]
    for size in sizes:
        tensors = [tensor.cuda() for tensor in problem(*size, "block", e8m0=e8m0)]
        monkeypatch.setattr(kernels, "tile_of", lambda *_: kernels.Tile(64, 32, (1, 1), 64))
        expected = kernels.scaled_mm_fp8(*tensors)
        assert error(expected, tensors) < 2**-13
        monkeypatch.setattr(kernels, "tile_of", lambda *_: kernels.Tile(rows, columns, cluster, rows))
        for _ in range(3):
            assert torch.equal(kernels.scaled_mm_fp8(*tensors), expected), size


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["token", "block"])
@pytest.mark.parametrize("m", [1, 64, 1000])
def test_cuda_graph_replay_sees_new_inputs(implementation, m, scaling):
    wq, w_scale = (tensor.cuda() for tensor in weight(528, 1040, scaling))
    x = torch.randn(m, 1040, device="cuda").bfloat16()
    ops.fp8_linear(x, wq, w_scale, implementation=implementation)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        result = ops.fp8_linear(x, wq, w_scale, implementation=implementation)
    x.normal_()
    result.fill_(math.nan)
    captured.replay()
    assert torch.equal(result, ops.fp8_linear(x, wq, w_scale, implementation=implementation))


if __name__ == "__main__":
    if sys.argv[1] == "interpreted":
        patch_once_a_launch()
        patch_fma()
        print(compare("cpu"))
    else:
        print(digest(sys.argv[1]))
