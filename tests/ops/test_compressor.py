"""The dense compressor: its reference against a loop in float64 and the eager dialects, checks, kernels by bits."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from dsv4_fusion import ops
from dsv4_fusion.ops import _compressor, _library
from tests.ops.test_indexer import assert_same_bits

OPS = ("compress_csa", "compress_hca")
ROWS = 640  # of a table of cos and sin


def arguments(
    name: str,
    batch: int = 2,
    length: int = 19,
    d: int = 128,
    ratio: int = 4,
    rope: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    parameters: torch.dtype = torch.float32,
    table: bool = True,
    overlap: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """Random rows of many sizes; rows of cos and sin for the windows, or tables; carried overlap if asked for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width = (2 if name.startswith("compress_csa") else 1) * d
    kv = normal(batch, length, width) * torch.exp2(torch.randint(-12, 12, (batch, length, 1), generator=generator))
    gate = normal(batch, length, width) * 4
    if length > 2:
        gate[:, length // 2] -= 200  # exponentials below the smallest normal number
    angles = 7 * (normal(ROWS, rope // 2) if table else normal(batch, length // ratio, rope // 2))
    found = {
        "kv": kv.to(dtype),
        "gate": gate.to(dtype),
        "position_bias": normal(ratio, width).to(parameters),
        "norm_weight": normal(d).to(parameters),
        "cos": angles.cos().to(parameters),
        "sin": angles.sin().to(parameters),
    }
    if overlap:
        found |= {"overlap_kv": normal(batch, ratio, d).to(dtype), "overlap_gate": normal(batch, ratio, d).float()}
    return found


def on_gpu(tensors: dict) -> dict:
    return {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in tensors.items()}


def doubled(tensors: dict) -> dict:
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}


def by_a_loop(name: str, tensors: dict, first: int = 0, eps: float = 1e-6) -> torch.Tensor:
    """The mathematics, entry by entry and dim by dim, in Python's floats."""
    kv, gate, bias = (tensors[key].double() for key in ("kv", "gate", "position_bias"))
    (ratio, width), d = bias.shape, tensors["norm_weight"].shape[0]
    batch, windows, overlap = kv.shape[0], kv.shape[1] // ratio, width > d
    out = torch.empty(batch, windows, d, dtype=torch.float64)
    for b in range(batch):
        for w in range(windows):
            rows = []
            for j in range(ratio) if overlap else ():
                if w > 0:
                    token = (w - 1) * ratio + j
                    rows.append((kv[b, token, :d], gate[b, token, :d] + bias[j, :d]))
                elif "overlap_kv" in tensors:
                    rows.append((tensors["overlap_kv"][b, j].double(), tensors["overlap_gate"][b, j].double()))
            for j in range(ratio):
                token = w * ratio + j
                rows.append((kv[b, token, width - d :], gate[b, token, width - d :] + bias[j, width - d :]))
            pooled = []
            for i in range(d):
                gates = [float(row[1][i]) for row in rows]
                weights = [math.exp(value - max(gates)) for value in gates]
                pooled.append(
                    sum(p * float(row[0][i]) for p, row in zip(weights, rows, strict=True)) / math.fsum(weights)
                )
            root = math.sqrt(sum(x * x for x in pooled) / d + eps)
            x = [value / root * float(tensors["norm_weight"][i]) for i, value in enumerate(pooled)]
            at = (first + w * ratio,) if tensors["cos"].dim() == 2 else (b, w)
            cos, sin = (tensors[key][at].double().tolist() for key in ("cos", "sin"))
            begin = d - 2 * len(cos)
            for i, (c, s) in enumerate(zip(cos, sin, strict=True)):
                even, odd = x[begin + 2 * i], x[begin + 2 * i + 1]
                x[begin + 2 * i], x[begin + 2 * i + 1] = even * c - odd * s, odd * c + even * s
            out[b, w] = torch.tensor(x, dtype=torch.float64)
    return out


# The reference


@pytest.mark.parametrize(
    ("name", "ratio", "overlap", "table"),
    [
        ("compress_csa", 4, False, True),
        ("compress_csa", 4, True, True),
        ("compress_csa", 3, True, False),
        ("compress_hca", 16, False, True),
        ("compress_hca", 5, False, False),
        ("compress_hca", 1, False, True),
    ],
)
def test_reference_is_the_mathematics(name, ratio, overlap, table):
    tensors = arguments(name, 2, 3 * ratio + 1, 32, ratio, 16, overlap=overlap, table=table)
    first = {"first_window_position": 7 * ratio} if table else {}
    exact = by_a_loop(name, tensors, 7 * ratio)
    got = getattr(ops, name)(**doubled(tensors), **first)
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    rounded = getattr(ops, name)(**tensors, **first)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=2e-6 * exact.abs().max().item())


def test_exponential():
    """How far from float64; 1 at 0, 0 at -inf, NaN at NaN."""
    x = torch.cat([-torch.logspace(-8, 1.93, 200_000), torch.linspace(-87, 0, 200_000), torch.linspace(-2, 0, 200_000)])
    exact, got = x.double().exp(), _compressor.exp_ref(x).double()
    error = (got - exact).abs()
    assert error.max() < 1.3e-7
    assert (error / exact)[exact > 2**-20].max() < 3.5e-7
    assert (error / exact).max() < 1.4e-6
    ends = _compressor.exp_ref(torch.tensor([0.0, -0.0, -87.1, -math.inf, math.nan]))
    assert ends[:4].tolist() == [1.0, 1.0, 0.0, 0.0] and ends[4].isnan()


def test_fused_multiply_and_add_rounds_once():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3000, generator=generator)
    c = torch.randn(3000, generator=generator).sign() * torch.rand(3000, generator=generator).add(1) * 8
    # Almost half a unit of c, which is odd: in float64 it is a half
    a[:1000], b[:1000] = 2**-12 * (1 + 2**-23), 2**-12 * (1 - 2**-23)
    c[:1000] = (1 + 2**-23 * (1 + 2 * torch.arange(1000))) * c[:1000].sign()
    got, twice = _compressor.fma_ref(a, b, c), (a.double() * b + c).float()
    assert (got != twice).sum() > 900
    neighbours = [torch.nextafter(got, torch.full_like(got, end)).tolist() for end in (-math.inf, math.inf)]
    for x, y, z, rounded, *others in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), *neighbours, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert all(abs(exact - Fraction(rounded)) <= abs(exact - Fraction(other)) for other in others)


def hugging_face(kv, gate, position_bias, norm_weight, cos, sin) -> torch.Tensor:
    """Pooling as Hugging Face writes it, CSA without cache."""
    batch, length, width = kv.shape
    ratio, d = position_bias.shape[0], width // 2
    windows = length // ratio
    kv = kv.view(batch, windows, ratio, width)
    gate = gate.view(batch, windows, ratio, width) + position_bias
    new_kv = kv.new_zeros((batch, windows, 2 * ratio, d))
    new_gate = gate.new_full((batch, windows, 2 * ratio, d), -math.inf)
    new_kv[:, :, ratio:], new_gate[:, :, ratio:] = kv[..., d:], gate[..., d:]
    new_kv[:, 1:, :ratio], new_gate[:, 1:, :ratio] = kv[:, :-1, :, :d], gate[:, :-1, :, :d]
    pooled = (new_kv * new_gate.softmax(2, dtype=torch.float32).to(new_kv.dtype)).sum(2)
    wide = pooled.float()
    normed = (norm_weight * (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt())).to(kv.dtype)
    return rotate(normed, cos.bfloat16(), sin.bfloat16())


def deepseek(kv, gate, position_bias, norm_weight, cos, sin) -> torch.Tensor:
    """Pooling as DeepSeek writes it: fp32 to the pooled value."""
    width = kv.shape[2]
    ratio, d = position_bias.shape[0], width // 2
    kv, gate = kv.unflatten(1, (-1, ratio)), gate.unflatten(1, (-1, ratio)) + position_bias
    pad = torch.nn.functional.pad
    kv = torch.cat((pad(kv[:, :-1, :, :d], (0, 0, 0, 0, 1, 0)), kv[..., d:]), 2)
    gate = torch.cat((pad(gate[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=-math.inf), gate[..., d:]), 2)
    wide = (kv * gate.softmax(2)).sum(2).bfloat16().float()
    normed = (norm_weight * (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt())).bfloat16()
    return rotate(normed, cos, sin)


def rotate(x, cos, sin) -> torch.Tensor:
    plain = x.shape[-1] - 2 * cos.shape[-1]
    even, odd = x[..., plain:].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((x[..., :plain], turned.to(x.dtype)), -1)


@pytest.mark.parametrize(("eager", "dtype"), [(hugging_face, torch.bfloat16), (deepseek, torch.float32)])
def test_no_farther_from_float64_than_eager(eager, dtype):
    tensors = arguments("compress_csa", 2, 400, dtype=dtype, table=False)
    if eager is hugging_face:
        tensors["cos"], tensors["sin"] = tensors["cos"].bfloat16(), tensors["sin"].bfloat16()
    exact = ops.compress_csa(**doubled(tensors))
    ours = (ops.compress_csa(**tensors, dtype=torch.bfloat16).double() - exact).abs()
    theirs = (eager(**tensors).double() - exact).abs()
    assert ours.max() <= theirs.max() and ours.mean() <= theirs.mean()


@pytest.mark.parametrize("name", OPS)
def test_any_split_gives_the_same_bits(name):
    """Windows apart, with the overlap carried, are the windows of the whole."""
    tensors = arguments(name, 2, 40, d=64)
    whole = getattr(ops, name)(**tensors)
    for cut in (4, 12, 36):
        first, rest = (
            {**tensors, "kv": tensors["kv"][:, part], "gate": tensors["gate"][:, part]}
            for part in (slice(cut), slice(cut, None))
        )
        if name == "compress_csa":
            last = slice(cut - 4, cut)
            rest["overlap_kv"] = tensors["kv"][:, last, :64]
            rest["overlap_gate"] = tensors["gate"][:, last, :64].float() + tensors["position_bias"][:, :64]
        parts = [getattr(ops, name)(**first), getattr(ops, name)(**rest, first_window_position=cut)]
        assert_same_bits([torch.cat(parts, 1)], [whole])


def test_round_nope():
    tensors = arguments("compress_hca", 2, 64, d=256, rope=64)
    plain = ops.compress_hca(**tensors, dtype=torch.float32)
    got = ops.compress_hca(**tensors, round_nope=True)
    blocks = plain[..., :-64].unflatten(-1, (-1, 64))
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)))
    expected = ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    assert torch.equal(got, torch.cat([expected, plain[..., -64:]], -1).bfloat16())


# Registration and bad input


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("length", [3, 19])
def test_opcheck(name, length):
    for table, overlap in ((True, False), (False, name == "compress_csa")):
        tensors = arguments(name, 2, length, 32, rope=16, table=table, overlap=overlap)
        results = torch.library.opcheck(getattr(torch.ops.dsv4, name).default, (), tensors)
        assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPS)
def test_one_graph_for_every_length(name):
    operator = getattr(ops, name)
    compiled = torch.compile(lambda **given: operator(**given) + 1, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for length in (9, 18, 40):
        tensors = arguments(name, 2, length, 32, rope=16)
        assert_same_bits([compiled(**tensors)], [operator(**tensors) + 1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("kv", lambda x: x[0], r"kv must have shape \[B, S, 256\], got \[19, 256\]"),
        ("kv", lambda x: x.half(), "kv must be float32 or bfloat16 or float64, got float16"),
        ("gate", lambda x: x[:, 1:], r"gate must have shape \[2, 19, 256\], got \[2, 18, 256\]"),
        ("gate", lambda x: x.mT.contiguous().mT, "the last dimension of gate must be contiguous"),
        ("position_bias", lambda x: x[:, 1:], r"position_bias must have shape \[any, 256\], got \[4, 255\]"),
        ("position_bias", lambda x: x[:0], "position_bias must have from 1 to 128 rows, the ratio, got 0"),
        ("norm_weight", lambda x: x[:96], "an entry must have a power of two of dims, from 16 to 1024, got 96"),
        ("cos", lambda x: x[:12], r"a row for position 12, of the last window, got 12 rows"),
        ("cos", lambda x: x[None, :, :].expand(2, -1, -1), r"cos must have shape \[2, 4, any\], got \[2, 640, 32\]"),
        ("sin", lambda x: x[:, 1:], r"sin must have shape \[640, 32\], got \[640, 31\]"),
        ("overlap_kv", lambda x: torch.zeros(2, 4, 128), "overlap_kv and overlap_gate are given both or not at all"),
    ],
)
def test_bad_tensors(key, change, message):
    tensors = arguments("compress_csa")
    tensors[key] = change(tensors.get(key))
    with pytest.raises(ValueError, match=f"dsv4::compress_csa: .*{message}"):
        ops.compress_csa(**tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_eps": math.inf}, "norm_eps must be a positive, finite number, got inf"),
        ({"first_window_position": -4}, "first_window_position must not be negative, got -4"),
        ({"first_window_position": 640}, "a row for position 652, of the last window, got 640 rows"),
        ({"dtype": torch.int8}, "dtype must be float32, bfloat16 or float64, got torch.int8"),
        ({"implementation": "cuda"}, "no implementation 'cuda'; it has triton, reference"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"dsv4::compress_hca.*{message}"):
        ops.compress_hca(**arguments("compress_hca"), **options)


def test_grad_is_refused():
    tensors = arguments("compress_csa")
    tensors["norm_weight"].requires_grad_()
    with pytest.raises(ValueError, match=r"dsv4::compress_csa: an input requires grad"):
        ops.compress_csa(**tensors)


# Kernels, by bits: on a GPU here, interpreted in test_compressor_triton.py

CASES = [
    # batch, length, d, ratio, rope, dtype, parameters, table, overlap
    (1, 0, 128, 4, 64, torch.bfloat16, torch.float32, True, False),
    (2, 3, 128, 4, 64, torch.bfloat16, torch.float32, True, False),
    (2, 19, 128, 4, 64, torch.bfloat16, torch.float32, False, True),
    (1, 45, 512, 4, 64, torch.bfloat16, torch.bfloat16, True, True),
    (3, 26, 64, 3, 32, torch.float32, torch.float32, False, False),
    (1, 40, 32, 16, 16, torch.float32, torch.float32, True, True),
    (2, 257, 512, 128, 64, torch.bfloat16, torch.float32, True, False),
    (1, 300, 256, 100, 2, torch.float32, torch.bfloat16, False, False),
]


def check(name: str, case: tuple, implementation: str, move=lambda tensors: tensors, **options) -> None:
    *sizes, overlap = case
    tensors = arguments(name, *sizes, overlap=overlap and name == "compress_csa")
    expected = getattr(ops, name)(**tensors, **options)
    got = getattr(ops, name)(**move(tensors), **options, implementation=implementation)
    assert_same_bits([got], [expected], (name, case, options))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_bits_on_the_gpu(name, case):
    pytest.importorskip("triton")
    first = {"first_window_position": 300} if case[7] else {}
    check(name, case, "triton", on_gpu, **first)
    check(name, case, "triton", on_gpu, **first, dtype=torch.float32)
    if (case[2] - case[4]) % 64 == 0:
        check(name, case, "triton", on_gpu, **first, round_nope=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_values_that_are_not_finite(name):
    pytest.importorskip("triton")
    for key, value in (("kv", math.nan), ("kv", math.inf), ("gate", math.nan), ("gate", math.inf), ("gate", -math.inf)):
        tensors = arguments(name, 2, 40)
        tensors[key][1, 9, 70] = value
        for round_nope in (False, True):
            expected = getattr(ops, name)(**tensors, round_nope=round_nope)
            got = getattr(ops, name)(**on_gpu(tensors), round_nope=round_nope, implementation="triton")
            assert_same_bits([got], [expected], (key, value))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "ratio"), [("compress_csa", 4), ("compress_hca", 128)])
def test_a_row_is_the_same_in_every_batch(name, ratio):
    pytest.importorskip("triton")
    tensors = on_gpu(arguments(name, 9, 5 * ratio, 512, ratio))
    whole = getattr(ops, name)(**tensors, implementation="triton")
    alone = {key: value[4:5] if value.dim() == 3 else value for key, value in tensors.items()}
    for _ in range(3):
        assert_same_bits([getattr(ops, name)(**alone, implementation="triton")], [whole[4:5]])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "ratio"), [("compress_csa", 4), ("compress_hca", 128)])
def test_cuda_graph_replay_sees_new_inputs(name, ratio):
    pytest.importorskip("triton")
    tensors = on_gpu(arguments(name, 2, 2 * ratio, 512, ratio))
    getattr(ops, name)(**tensors)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = getattr(ops, name)(**tensors)
    for seed in (5, 6):
        fresh = arguments(name, 2, 2 * ratio, 512, ratio, seed=seed)
        for key, value in tensors.items():
            value.copy_(fresh[key])
        got.fill_(math.nan)
        captured.replay()
        assert_same_bits([got], [getattr(ops, name)(**fresh)])


def test_kernels_take_no_float64():
    assert "float64" in _library.operators["compress_csa"][0].limits(torch.zeros(1, dtype=torch.float64))
