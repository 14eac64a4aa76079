"""The indexer's query operators: the references against arithmetic of their own, checks, fakes, and kernels by bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dsv4_fusion import ops
from dsv4_fusion.ops import _indexer, _library

OPS = ("indexer_q_fp8", "indexer_q_mxfp4")
TOKENS = (0, 1, 7, 32, 257, 512, 513, 4096)
ROWS = 50  # of the tables of cos and sin
FP8_CODES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()  # the finite ones, by code
FP4_CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def special_rows(d: int) -> torch.Tensor:
    """Rows where rounding is decided: exact ties, subnormals, amax about powers of two, zeros, ±inf, NaN."""
    ramp = torch.linspace(-1, 1, d)
    rows = [torch.zeros(d), -torch.zeros(d), torch.full((d,), 1e-40), torch.full((d,), -9e-41), 1e-6 * ramp]
    for largest in (1.0, 448.0, 6.0, 1.75 * 2**-9, 2.0**-100, 2.0**120):
        for ulp in (1 - 2**-8, 1.0, 1 + 2**-7):
            rows.append(ramp * largest * ulp)
            rows[-1][-1] = largest * ulp
    steps = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])  # E2M1's ties, at scale 1
    rows.append(torch.cat([steps, -steps]).repeat(d // 16))
    ties = torch.tensor([17.0, 19.0, 21.0, 2.0**-10, 3 * 2.0**-10, 5 * 2.0**-10, 15 * 2.0**-10, 448.0])  # e4m3's
    rows.append(torch.cat([ties, -ties]).repeat(d // 16))
    for value, index in itertools.product((math.nan, math.inf, -math.inf), (0, 37, d - 1)):
        rows.append(ramp.clone())
        rows[-1][index] = value
    rows.append(torch.full((d,), 3.38e38))  # a transform of these is infinite
    return torch.stack(rows).bfloat16()


def arguments(
    tokens: int = 5,
    heads: int = 4,
    d: int = 128,
    rope: int = 64,
    table: torch.dtype = torch.float32,
    positions: torch.dtype | None = torch.int64,
    weights: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
    special: bool = True,
) -> dict[str, torch.Tensor | None]:
    """Random queries of many sizes; in every second token the first heads are special rows, which are not rotated."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads, d, generator=generator)
    q = (q * torch.exp2(torch.randint(-30, 12, (tokens, heads, 1), generator=generator).float())).bfloat16()
    rows = ROWS if positions is not None else tokens
    angles = 7 * torch.randn(rows, rope // 2, generator=generator)
    chosen = torch.randint(1, ROWS, (tokens,), generator=generator)
    if special and tokens:
        flat, cases = q.view(-1, d), special_rows(d)
        count = min(flat.shape[0] // 2, len(cases))
        where = torch.randperm(flat.shape[0], generator=generator)[:count]
        flat[where] = cases[torch.randperm(len(cases), generator=generator)[:count]]
        angles[0] = 0
        chosen[::2] = 0
    found = {
        "q": q,
        "positions": chosen.to(positions) if positions is not None else None,
        "cos": angles.cos().to(table),
        "sin": angles.sin().to(table),
        "weights": torch.randn(tokens, heads, generator=generator).to(weights),
    }
    return {key: None if value is None else value.to(device) for key, value in found.items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, those of every NaN being the same where it is a number and no code."""
    tensor = tensor.cpu()
    if tensor.dtype in (torch.float32, torch.bfloat16):
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.contiguous().view(torch.uint8)


def assert_same_bits(results, expected, context: object = "") -> None:
    for index, (got, want) in enumerate(zip(results, expected, strict=True)):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.is_contiguous()
        wrong = (bits(got) != bits(want)).sum().item() if got.numel() else 0
        assert wrong == 0, f"output {index}: {wrong} bytes of {bits(want).numel()} differ {context}"


# The references, against arithmetic of another form


def test_rotation_is_the_product_of_complex_numbers():
    generator = torch.Generator().manual_seed(0)
    for d, rope in ((128, 64), (64, 64), (128, 16), (64, 2)):
        x = torch.randn(20, d, generator=generator).bfloat16()
        angle = torch.randn(20, rope // 2, generator=generator)
        got = _indexer.rotate_ref(x, angle.cos(), angle.sin())
        turned = torch.view_as_complex(x[:, d - rope :].double().unflatten(-1, (-1, 2)))
        turned = turned * torch.polar(torch.ones_like(angle).double(), angle.double())
        exact = torch.view_as_real(turned).flatten(-2)
        assert torch.equal(got[:, : d - rope], x[:, : d - rope])
        # half a unit of bf16's last place, and fp32's error where the two products cancel
        torch.testing.assert_close(got[:, d - rope :].double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("d", [64, 128])
def test_hadamard_is_the_matrix_in_natural_order(d):
    sign = torch.tensor([[1 - 2 * ((i & j).bit_count() % 2) for j in range(d)] for i in range(d)]).double()
    got = _indexer.hadamard_ref(torch.eye(d).bfloat16())
    assert torch.equal(got, (sign * d**-0.5).bfloat16())
    x = torch.randint(-100, 100, (30, d), generator=torch.Generator().manual_seed(0)).double()  # sums are exact
    torch.testing.assert_close(_indexer.hadamard_ref(x.bfloat16()).double(), x @ sign * d**-0.5, rtol=2**-8, atol=0)


def nearest(value: float, codes: list[float], ties: str = "even") -> int:
    """The code, without its sign, whose value is nearest to |value|; by trying all."""
    distance = [abs(abs(value) - code) for code in codes]
    best = [index for index, far in enumerate(distance) if far == min(distance)]
    return best[0] if len(best) == 1 or ties == "zero" else next(index for index in best if index % 2 == 0)


def smallest_power(value: float) -> float:
    """The smallest power of two that is no less than a positive value."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - 1 if fraction == 0.5 else exponent)


def negative(value: float) -> bool:
    return math.copysign(1.0, value) < 0


@pytest.mark.parametrize("d", [64, 128])
def test_fp8_by_trying_every_code(d):
    rows = torch.cat([special_rows(d), arguments(8, d=d, special=False)["q"].flatten(0, 1)])
    quantised, scales = _indexer.quantise_fp8_ref(rows)
    for row, codes, scale in zip(rows.tolist(), quantised.view(torch.uint8).tolist(), scales.tolist(), strict=True):
        if not all(map(math.isfinite, row)):
            assert math.isnan(scale) and set(codes) == {0x7F}
            continue
        floor = torch.tensor(1e-4).item()
        expected = smallest_power(max(floor, *map(abs, row)) / 448)
        assert scale == expected
        assert codes == [nearest(value / expected, FP8_CODES) | negative(value) << 7 for value in row]


def test_fp8_with_the_quotient_as_scale():
    rows = special_rows(128)
    quantised, scales = _indexer.quantise_fp8_ref(rows, 1e-4, power_of_two_scale=False)
    finite = rows.isfinite().all(-1)
    amax = rows.abs().amax(-1).double().clamp(min=1e-4)
    torch.testing.assert_close(scales[finite].double(), amax[finite] / 448, rtol=2**-23, atol=0)
    assert scales[~finite].isnan().all()
    back = quantised[finite].double() * scales[finite].double().unsqueeze(-1)
    error = (back - rows[finite].double()).abs() / scales[finite].double().unsqueeze(-1)
    assert (error <= 16.001).all()  # half of the largest step, 32
    largest = quantised[finite].float().abs().amax(-1)
    assert torch.equal(largest == 448, rows[finite].abs().amax(-1) >= 1e-4)


@pytest.mark.parametrize("ties", ["even", "zero"])
@pytest.mark.parametrize("d", [64, 128])
def test_mxfp4_by_trying_every_code(d, ties):
    rows = torch.cat([special_rows(d), arguments(8, d=d, special=False)["q"].flatten(0, 1)])
    packed, scales = _indexer.quantise_mxfp4_ref(rows, ties=ties)
    for row, codes, scale in zip(rows.tolist(), packed.tolist(), scales.tolist(), strict=True):
        exponents = (scale & 0xFFFFFFFF).to_bytes(4, "little")
        assert not any(exponents[d // 32 :])
        codes = [nibble for byte in codes for nibble in (byte & 15, byte >> 4)]
        for block in range(d // 32):
            values, got = (x[32 * block : 32 * block + 32] for x in (row, codes))
            if not all(map(math.isfinite, values)):
                assert exponents[block] == 255 and set(got) == {0}
                continue
            power = smallest_power(max(6 * 2.0**-126, *map(abs, values)) / 6)
            assert 2.0 ** (exponents[block] - 127) == power
            assert got == [nearest(value / power, FP4_CODES, ties) | negative(value) << 3 for value in values]


@pytest.mark.parametrize(("ties", "expected"), [("even", [0, 2, 2, 4, 4, 6, 6, 7]), ("zero", [0, 1, 2, 3, 4, 5, 6, 7])])
def test_ties_written_out(ties, expected):
    row = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(8).bfloat16()
    packed, scale = _indexer.quantise_mxfp4_ref(row[None], ties=ties)
    assert packed[0, :4].tolist() == [low | high << 4 for low, high in zip(expected[::2], expected[1::2], strict=True)]
    assert scale.item() == 127 << 8 | 127


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_weights_are_folded(d, hadamard):
    tensors = arguments(6, 3, d, special=False)
    _, folded = ops.indexer_q_fp8(**tensors, hadamard=hadamard)
    packed, scale, plain = ops.indexer_q_mxfp4(**tensors, hadamard=hadamard)
    q = _indexer.rotate_ref(tensors["q"], *(tensors[key][tensors["positions"]][:, None] for key in ("cos", "sin")))
    q = _indexer.hadamard_ref(q) if hadamard else q
    scales = torch.tensor([smallest_power(max(1e-4, amax) / 448) for amax in q.abs().amax(-1).flatten().tolist()])
    exact = tensors["weights"].double() * (d * 3) ** -0.5
    torch.testing.assert_close(plain.double(), exact, rtol=2**-22, atol=0)
    torch.testing.assert_close(folded.double(), exact * scales.view(6, 3), rtol=2**-22, atol=0)
    exponents = scale.unsqueeze(-1).view(torch.uint8)[..., : d // 32]
    error = (_indexer.dequantise_mxfp4_ref(packed, exponents) - q).abs().unflatten(-1, (-1, 32)).amax(-1)
    assert (error <= torch.exp2(exponents.float() - 127)).all()  # half of the largest step, 2


def test_nan_weights_of_rows_that_are_not_finite():
    tensors = arguments(2, 2, special=False)
    tensors["q"][1, 0, 5] = math.inf
    q_fp8, folded = ops.indexer_q_fp8(**tensors)
    assert folded.isnan().tolist() == [[False, False], [True, False]]
    assert (q_fp8.view(torch.uint8)[1, 0] == 0x7F).all()
    _, scale, plain = ops.indexer_q_mxfp4(**tensors)
    assert plain.isfinite().all()
    assert ((scale & 0xFF) == 0xFF).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("name", OPS)
def test_gathered_angles_and_strides(name):
    tensors = arguments(9, 4, weights=torch.float32)
    expected = getattr(ops, name)(**tensors)
    gathered = {key: tensors[key][tensors["positions"]] for key in ("cos", "sin")} | {"positions": None}
    assert_same_bits(getattr(ops, name)(**{**tensors, **gathered}), expected)
    both = torch.cat([tensors["cos"], tensors["sin"]], 1)
    strided = dict(zip(("cos", "sin"), both.chunk(2, 1), strict=True)) | {"positions": tensors["positions"].int()}
    strided["q"] = torch.cat([tensors["q"]] * 2, 1)[:, :4].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided["q"].is_contiguous()
    assert_same_bits(getattr(ops, name)(**{**tensors, **strided}), expected)


# Shapes, registration, out


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 257])
@pytest.mark.parametrize("d", [64, 128])
def test_shapes_and_out(name, tokens, d):
    tensors = arguments(tokens, 3, d)
    results = getattr(ops, name)(**tensors)
    shapes = {
        "indexer_q_fp8": [((tokens, 3, d), torch.float8_e4m3fn), ((tokens, 3), torch.float32)],
        "indexer_q_mxfp4": [
            ((tokens, 3, d // 2), torch.uint8),
            ((tokens, 3), torch.int32),
            ((tokens, 3), torch.float32),
        ],
    }
    assert [(tuple(value.shape), value.dtype) for value in results] == shapes[name]
    out = tuple(torch.empty_like(value) for value in results)
    assert getattr(ops, name)(**tensors, out=out) is out
    assert_same_bits(out, results)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, hadamard):
    tensors = arguments(3, 2, special=False)
    overload = getattr(torch.ops.dsv4, name).default
    results = torch.library.opcheck(overload, (), {**tensors, "hadamard": hadamard})
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}
    out = [value.clone() for value in overload(**tensors)]
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "indexer_q_mxfp4":  # torch cannot compare float8 arguments with what they were
        tests.append("test_schema")
    overload = getattr(torch.ops.dsv4, f"{name}_out").default
    results = torch.library.opcheck(overload, (*tensors.values(), *out), {"hadamard": hadamard}, test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPS)
def test_inputs_stay_as_they_are(name):
    tensors = arguments(4)
    before = {key: value.clone() for key, value in tensors.items()}
    getattr(ops, name)(**tensors, out=tuple(torch.empty_like(value) for value in getattr(ops, name)(**tensors)))
    assert_same_bits(tensors.values(), before.values())


# Bad input


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("q", lambda x: x[0], r"q must have shape \[T, H, d\], got \[4, 128\]"),
        ("q", lambda x: x[..., :96], "the head dim must be 64 or 128, got 96"),
        ("q", lambda x: x[:, :0], "q holds no head"),
        ("q", lambda x: x.float(), "q must be bfloat16, got float32"),
        (
            "q",
            lambda x: torch.stack([x, x], -1)[..., 0],
            r"last dimension of q must be contiguous, got strides \[1024, 256, 2\]",
        ),
        ("positions", lambda x: x[1:], r"positions must have shape \[5\], got \[4\]"),
        ("positions", lambda x: x.float(), "positions must be int32 or int64, got float32"),
        ("positions", lambda x: x + 50, r"positions must be in \[0, 50\), the rows of cos and sin, got 5\d to \d+"),
        ("positions", lambda x: x - 50, r"positions must be in \[0, 50\)"),
        ("positions", lambda x: None, r"cos must have shape \[5, any\], got \[50, 32\]"),
        ("cos", lambda x: x[..., None], r"cos must have shape \[any, any\], got \[50, 32, 1\]"),
        ("cos", lambda x: x.half(), "cos must be float32 or bfloat16, got float16"),
        ("cos", lambda x: x.bfloat16(), "sin must be bfloat16, got float32"),
        ("cos", lambda x: x.to("meta"), "cos is on meta, expected cpu"),
        ("cos", lambda x: x[:, 1:], r"sin must have shape \[50, 31\], got \[50, 32\]"),
        ("sin", lambda x: x[1:], r"sin must have shape \[50, 32\], got \[49, 32\]"),
        ("weights", lambda x: x[:, 1:], r"weights must have shape \[5, 4\], got \[5, 3\]"),
        ("weights", lambda x: x.half(), "weights must be float32 or bfloat16, got float16"),
    ],
)
def test_bad_tensors(name, key, change, message):
    tensors = arguments()
    tensors[key] = change(tensors[key])
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(**tensors)


def test_too_many_rotated_dims():
    tensors = arguments(d=64)
    tensors |= {key: torch.cat([tensors[key]] * 2, 1) for key in ("cos", "sin")}
    with pytest.raises(ValueError, match="one value a pair, from 1 to 32 for head dim 64, got 64"):
        ops.indexer_q_fp8(**tensors)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("indexer_q_fp8", {"amax_floor": 0.0}, "amax_floor must be finite and at least 5.266e-36 .*got 0.0"),
        ("indexer_q_fp8", {"amax_floor": math.inf}, "amax_floor must be finite .*got inf"),
        ("indexer_q_fp8", {"amax_floor": math.nan}, "amax_floor must be finite .*got nan"),
        ("indexer_q_mxfp4", {"amax_floor": 1e-39}, "amax_floor must be finite and at least 7.053e-38"),
        ("indexer_q_mxfp4", {"ties": "up"}, "ties must be 'even' or 'zero', got 'up'"),
        ("indexer_q_fp8", {"implementation": "cuda"}, "no implementation 'cuda'; it has cutedsl, triton, reference"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(**arguments(), **options)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[1:], r"q_packed must have shape \[5, 4, 64\], got \[4, 4, 64\]"),
        (0, lambda x: x.view(torch.int8), "q_packed must be uint8, got int8"),
        (1, lambda x: x.long(), "q_scale must be int32, got int64"),
        (2, lambda x: x.bfloat16(), "weights_out must be float32, got bfloat16"),
        (2, lambda x: torch.cat([x, x], 1)[:, :4], r"weights_out must be contiguous, got strides \[8, 1\]"),
    ],
)
def test_bad_out(index, change, message):
    tensors = arguments()
    out = list(ops.indexer_q_mxfp4(**tensors))
    out[index] = change(out[index])
    with pytest.raises(ValueError, match=f"dsv4::indexer_q_mxfp4_out: {message}"):
        ops.indexer_q_mxfp4(**tensors, out=tuple(out))


@pytest.mark.parametrize("name", OPS)
def test_grad_is_refused(name):
    tensors = arguments(weights=torch.float32)
    tensors["weights"].requires_grad_()
    with pytest.raises(ValueError, match=f"dsv4::{name}: an input requires grad.*no_grad"):
        getattr(ops, name)(**tensors)
    with torch.no_grad():
        getattr(ops, name)(**tensors)


# Kernels on the GPU


@pytest.fixture(params=["cutedsl", "triton"])
def implementation(request):
    for module in _library.COMPILERS[request.param]:
        pytest.importorskip(module)
    return request.param


OPTIONS = {
    "indexer_q_fp8": ({}, {"power_of_two_scale": False}, {"amax_floor": 2.0**-80}),
    "indexer_q_mxfp4": ({}, {"ties": "zero"}, {"amax_floor": 1e-4}),
}


def on_gpu(tensors: dict) -> dict:
    return {key: None if value is None else value.cuda() for key, value in tensors.items()}


def poisoned(results) -> tuple[torch.Tensor, ...]:
    """Tensors of the results' shapes, with bytes that no kernel is expected to write everywhere."""
    return tuple(torch.full_like(x.view(torch.uint8), 0xA5).view(x.dtype) for x in results)


@pytest.mark.gpu
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_bits_at_every_token_count(implementation, name, table, hadamard):
    for tokens, positions in zip(TOKENS, itertools.cycle((torch.int64, None, torch.int32)), strict=False):
        heads = 64 if tokens > 7 else 16  # of rows on all sides of the counts from which a thread does other shares
        tensors = arguments(tokens, heads, 128, 64, table, positions)
        expected = getattr(ops, name)(**tensors, hadamard=hadamard)
        out = poisoned(on_gpu(dict(enumerate(expected))).values())
        options = {"hadamard": hadamard, "implementation": implementation}
        getattr(ops, name)(**on_gpu(tensors), **options, out=out)
        assert_same_bits(out, expected, f"in out, T {tokens}")
        assert_same_bits(getattr(ops, name)(**on_gpu(tensors), **options), expected, f"T {tokens}")


@pytest.mark.gpu
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("heads", "d", "rope"), [(64, 64, 64), (1, 128, 128), (13, 128, 16), (40, 64, 32), (128, 128, 64)]
)
def test_other_sizes_and_options(implementation, name, heads, d, rope, hadamard):
    for tokens, option in itertools.product((3, 700), OPTIONS[name]):
        tensors = arguments(tokens, heads, d, rope, weights=torch.float32)
        expected = getattr(ops, name)(**tensors, **option, hadamard=hadamard)
        results = getattr(ops, name)(**on_gpu(tensors), **option, hadamard=hadamard, implementation=implementation)
        assert_same_bits(results, expected, (tokens, option))


@pytest.mark.gpu
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 1100])
@pytest.mark.parametrize("name", OPS)
def test_strides_on_the_gpu(implementation, name, tokens, hadamard):
    tensors = arguments(tokens, 8)
    expected = getattr(ops, name)(**tensors, hadamard=hadamard)
    tensors = on_gpu(tensors)
    both = torch.cat([tensors["cos"], tensors["sin"]], 1)
    tensors["cos"], tensors["sin"] = both.chunk(2, 1)
    tensors["q"] = tensors["q"].transpose(0, 1).contiguous().transpose(0, 1)
    tensors["weights"] = torch.cat([tensors["weights"]] * 2, 1)[:, :8]
    results = getattr(ops, name)(**tensors, hadamard=hadamard, implementation=implementation)
    assert_same_bits(results, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1000])
@pytest.mark.parametrize("name", OPS)
def test_cuda_graph_replay_sees_new_inputs(implementation, name, tokens):
    tensors = on_gpu(arguments(tokens, 64))
    getattr(ops, name)(**tensors, implementation=implementation)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = getattr(ops, name)(**tensors, implementation=implementation)
    fresh = arguments(tokens, 64, seed=9)
    for key, value in tensors.items():
        value.copy_(fresh[key])
    for result in results:
        result.view(torch.uint8).fill_(0xA5)
    captured.replay()
    assert_same_bits(results, getattr(ops, name)(**fresh))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_two_streams_at_once(implementation, name):
    sets = [arguments(300, 64, seed=seed) for seed in (0, 1)]
    expected = [getattr(ops, name)(**tensors) for tensors in sets]
    sets = [on_gpu(tensors) for tensors in sets]
    getattr(ops, name)(**sets[0], implementation=implementation)
    torch.cuda.synchronize()
    streams, kept = [torch.cuda.Stream() for _ in sets], [[], []]
    for _ in range(10):
        for stream, tensors, results in zip(streams, sets, kept, strict=True):
            with torch.cuda.stream(stream):
                results.append(getattr(ops, name)(**tensors, implementation=implementation))
    torch.cuda.synchronize()
    for want, results in zip(expected, kept, strict=True):
        for got in results:
            assert_same_bits(got, want)
