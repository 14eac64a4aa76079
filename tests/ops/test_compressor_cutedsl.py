"""The CuTe DSL kernels of the paged compressor against the reference, by bits, on a GPU of SM90 or later.

Caches are full of 0xA5 and states full of NaN before; what is not written has to stay so.
"""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from dsv4_fusion import ops
from dsv4_fusion.ops import _compressor
from dsv4_fusion.ops._indexer import hadamard_ref, quantise_fp8_ref, quantise_mxfp4_ref
from dsv4_fusion.ops.compressor_cache import _cutedsl_limits
from tests.ops import test_compressor_cache as paged
from tests.ops import test_indexer_cutedsl as numpy_ptx  # skips all of this where there is no CuTe DSL
from tests.ops.interpreted import fma
from tests.ops.test_compressor import on_gpu
from tests.ops.test_compressor_cache import INSERTS, Feed
from tests.ops.test_compressor_compile_sm90 import cute_arguments
from tests.ops.test_indexer import assert_same_bits

from dsv4_fusion.ops.cutedsl import compressor_cache, compressor_row, compressor_short  # isort: skip

IMPLEMENTATION = "cutedsl"
BF16, FP32 = torch.bfloat16, torch.float32


def speculative(request: int, length: int) -> list[int]:
    """Pieces of 4, 2, 3, 1, … tokens."""
    sizes, step = [], request
    while sum(sizes) < length:
        sizes.append(min((4, 2, 3, 1)[step % 4], length - sum(sizes)))
        step += 1
    return sizes


def chunks(request: int, length: int) -> list[int]:
    """Some tokens, then all others at once: the second call reads rows that it writes."""
    return [min(length, 5 + 2 * request), max(0, length - 5 - 2 * request)]


SHORT = [
    {"d": 512, "page_size": 4},
    {"d": 512, "page_size": 64, "dtype": FP32, "n": 8},
    {"d": 512, "page_size": 1, "parameters": BF16, "n": 1, "spare": 3},
    {"d": 256, "n": 3, "spare": 1, "parameters": BF16},
    {"d": 256, "n": 2, "dtype": FP32, "parameters": BF16, "spare": 8},
    {"d": 128, "n": 16, "spare": 24},
    {"d": 128, "format": "fp8", "page_size": 16, "hadamard": True},
    {"d": 128, "format": "fp8", "n": 2, "dtype": FP32},
    {"d": 128, "format": "mxfp4", "spare": 5},
    {"d": 128, "format": "mxfp4", "page_size": 64, "hadamard": True, "n": 8, "parameters": BF16},
]
SPLITS = (*paged.SPLITS, speculative, chunks)


@pytest.mark.gpu
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", SHORT, ids=str)
@pytest.mark.parametrize("name", INSERTS)
def test_short_windows(name, case, split):
    paged.check(name, split, IMPLEMENTATION, on_gpu, **case)


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [2, 4])
def test_windows_of_four_rows(ratio):
    name = "compress_csa_insert" if ratio == 2 else "compress_hca_insert"
    paged.check(name, speculative, IMPLEMENTATION, on_gpu, ratio=ratio, n=2, d=128, format="fp8")


LONG = [
    {"n": 128},
    {"n": 64, "spare": 64},
    {"n": 16, "spare": 400, "parameters": BF16},
    {"n": 12, "spare": 7, "dtype": FP32},
    {"n": 1, "d": 128, "page_size": 1},
    {"n": 256, "d": 256, "dtype": FP32, "parameters": BF16},
]
LENGTHS = (300, 128, 511, 127)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [paged.at_once, paged.in_long_pieces, paged.all_but_one, chunks])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_windows(case, split):
    paged.check(
        "compress_hca_insert", split, IMPLEMENTATION, on_gpu, **{"d": 512, "ratio": 128, "lengths": LENGTHS, **case}
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", INSERTS)
@pytest.mark.parametrize("ratio", [32, 64])
def test_windows_of_other_lengths(name, ratio):
    long = {"d": 512, "ratio": ratio, "lengths": (200, 64, 131), "n": 16}
    for split in (paged.in_long_pieces, paged.all_but_one):
        paged.check(name, split, IMPLEMENTATION, on_gpu, **long)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "ratio"), [("compress_csa_insert", 4), ("compress_hca_insert", 128)])
def test_more_requests_than_run_at_once(name, ratio):
    """Every stage is filled several times; a third of the requests close no window, some are skipped."""
    count = 1100 if ratio == 4 else 150
    lengths = tuple(2 * ratio + (0, 1, ratio - 1)[request % 3] for request in range(count))
    case = {"lengths": lengths, "ratio": ratio, "d": 512, "n": ratio}
    paged.check(name, lambda _, length: [length - ratio, 1, ratio - 1], IMPLEMENTATION, on_gpu, **case)


def outside(name: str, ratio: int) -> tuple[Feed, dict]:
    feed = Feed(name, tuple(2 * ratio + i for i in range(6)), ratio=ratio, d=512, n=ratio)
    feed.state.normal_(generator=torch.Generator().manual_seed(1))
    feed.fed = [ratio] * 6
    return feed, on_gpu(feed.call([ratio, ratio, ratio - 1, ratio + 2, 1, ratio]))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "ratio"), [("compress_csa_insert", 4), ("compress_hca_insert", 128)])
def test_what_lies_outside_is_skipped(name, ratio):
    feed, tensors = outside(name, ratio)
    bad = torch.tensor([1 << 40, -(1 << 40), 1 << 31, -2, 4 * len(feed.cache)], device="cuda")
    tensors["slots"][:] = bad.repeat(1000)[: len(tensors["slots"])]
    before = tensors["cache"].clone()
    getattr(ops, name)(**tensors, **feed.options, implementation=IMPLEMENTATION)
    assert_same_bits([tensors["cache"]], [before])
    state = tensors["state"].clone()
    for key, value in (("state_table", 1 << 40), ("requests", 1 << 30), ("requests", 1 << 40)):
        changed = tensors | {key: torch.full_like(tensors[key].long(), value)}
        changed["kv"] = tensors["kv"] + 1
        if key == "requests":
            changed["slots"] = torch.zeros_like(tensors["slots"])
        getattr(ops, name)(**changed, **feed.options, implementation=IMPLEMENTATION)
        assert_same_bits([tensors["cache"], tensors["state"]], [before, state], key)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "ratio"), [("compress_csa_insert", 4), ("compress_hca_insert", 128)])
def test_some_pages_of_the_state_are_outside(name, ratio):
    """Their rows count as missing, as in Triton's kernel."""
    feed, tensors = outside(name, ratio)
    tensors["state_table"][1, 0], tensors["state_table"][3, -1] = -1, 1 << 30
    results = []
    for implementation in (IMPLEMENTATION, "triton"):
        own = tensors | {key: tensors[key].clone() for key in ("cache", "state")}
        getattr(ops, name)(**own, **feed.options, implementation=implementation)
        results.append([own["cache"], own["state"]])
    assert_same_bits(*results)


@pytest.mark.gpu
def test_values_that_are_not_finite():
    for name, ratio in (("compress_csa_insert", 4), ("compress_hca_insert", 128)):
        for key, row, column, value in (
            ("kv", 1, 3, torch.nan),
            ("kv", 2, 500, torch.inf),
            ("gate", 3, 70, torch.nan),
            ("gate", 0, 511, -torch.inf),
            ("gate", 0, 0, torch.inf),
        ):
            ours, reference = (Feed(name, (ratio, 2 * ratio), ratio=ratio, d=512, n=ratio) for _ in range(2))
            for feed in (ours, reference):
                getattr(feed, key)[1][row, column + (512 if ratio == 4 else 0)] = value
            state, cache = ours.state.cuda(), ours.cache.cuda()
            given = on_gpu(ours.call([ratio, 2 * ratio])) | {"state": state, "cache": cache}
            getattr(ops, name)(**given, **ours.options, implementation=IMPLEMENTATION)
            getattr(ops, name)(**reference.call([ratio, 2 * ratio]), **reference.options)
            assert_same_bits([cache, state], [reference.cache, reference.state], (name, key, value))


@pytest.mark.gpu
@pytest.mark.parametrize("name", INSERTS)
def test_no_tokens_and_no_requests(name):
    feed = Feed(name, d=512)
    for given in (feed.call([0, 0, 0, 0]), feed.call([0, 0, 0, 0], 3)):
        before = [given["cache"].clone(), given["state"].clone()]
        tensors = on_gpu(given)
        getattr(ops, name)(**tensors, **feed.options, implementation=IMPLEMENTATION)
        assert_same_bits([tensors["cache"], tensors["state"]], before)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "ratio"), [("compress_csa_insert", 4), ("compress_hca_insert", 128)])
def test_the_same_call_again_and_again(name, ratio):
    """A race would not be the same each time."""
    feed = Feed(name, (2 * ratio + 3, 3 * ratio, ratio, 2 * ratio) * 40, ratio=ratio, d=512, n=ratio)
    feed.state.normal_(generator=torch.Generator().manual_seed(1))
    feed.fed = [ratio + 1, ratio + 2, ratio - 1, 2 * ratio - 1] * 40
    tensors = on_gpu(feed.call([ratio + 2, 2 * ratio - 2, 1, 1] * 40, 3))
    expected = None
    for _ in range(30):
        own = tensors | {key: tensors[key].clone() for key in ("cache", "state")}
        getattr(ops, name)(**own, **feed.options, implementation=IMPLEMENTATION)
        found = [own["cache"], own["state"]]
        expected = expected or found
        assert_same_bits(found, expected)
    getattr(ops, name)(**tensors, **feed.options, implementation="triton")
    assert_same_bits([tensors["cache"], tensors["state"]], expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "change"),
    [
        ({"d": 64, "format": "fp8"}, lambda tensors: tensors),
        ({"d": 512, "ratio": 3}, lambda tensors: tensors),
        ({"d": 512}, lambda tensors: tensors | {"kv": torch.cat([tensors["kv"]] * 2, 1)[:, 4:1028]}),
    ],
)
def test_what_it_cannot_take_is_refused_and_triton_takes_it(changes, change):
    feed = Feed("compress_csa_insert", **changes)
    tensors = change(on_gpu(feed.call([8, 5, 8, 1])))
    with pytest.raises(ValueError, match="the cutedsl kernels"):
        ops.compress_csa_insert(**tensors, **feed.options, implementation=IMPLEMENTATION)
    ops.compress_csa_insert(**tensors, **feed.options)


# Without a GPU: the arithmetic on registers, with NumPy arrays of lanes in their place

LANES = np.arange(32, dtype=np.int32)


def run_exponential(x: np.ndarray, count: int) -> np.ndarray:
    """The PTX of ``count`` exponentials, each instruction rounded."""
    values = {f"{{$r{i}}}": part for i, part in enumerate(np.split(x, count))}

    def value(name: str):
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16)).view(np.float32)
        return values[name] if name in values else np.uint32(int(name, 0))

    for line in compressor_row._exponential(count).strip("{} ").split(";"):
        operation, _, rest = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        to, *given = rest.replace(" ", "").split(",")
        given = [value(name) for name in given]
        kind = operation.partition(".")[0]
        if kind == "mov":
            result = given[0]
            if operation.endswith("b32"):
                result = result.view(np.uint32 if to[0] in "ep" else np.float32)
        elif kind == "fma":
            result = fma(*given)
        elif kind == "neg":
            result = -given[0]
        elif kind == "selp":
            result = np.where(given[2], given[0], given[1])
        else:
            act = {"mul": np.multiply, "add": np.add, "sub": np.subtract, "shl": np.left_shift, "setp": np.less}[kind]
            result = act(given[0], given[1])
        values[to] = result
    return np.concatenate([values[f"{{$w{i}}}"] for i in range(count)])


@pytest.mark.parametrize("count", [1, compressor_short.TOGETHER])
def test_the_exponential(count):
    torch.manual_seed(0)
    x = torch.cat([-torch.rand(100000) * 100, -torch.rand(100000), torch.linspace(-88, -86, 4096)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, -torch.inf, -87.0, -1e-45, -3.0, -1.0, -2.0])])
    with np.errstate(all="ignore"):
        got = torch.from_numpy(run_exponential(x.numpy(), count))
    assert_same_bits([got], [_compressor.exp_ref(x)])


@pytest.fixture
def on_numpy(monkeypatch):
    words = numpy_ptx._words
    instructions = types.SimpleNamespace(
        bits=lambda x: np.ascontiguousarray(x, np.float32).view(np.uint32),
        real=lambda x: np.ascontiguousarray(words(x)).view(np.float32),
        add=np.add,
        sub=np.subtract,
        mul=np.multiply,
        fma=lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),  # here b is ±1
        div=np.divide,
        sqrt=np.sqrt,
        maximum=np.fmax,
        select=np.where,
        unpack=numpy_ptx._wide,
        pack_bf16=numpy_ptx._narrow,
        pack_e4m3=lambda *values: numpy_ptx._e4m3(*np.broadcast_arrays(*values)),
    )
    monkeypatch.setattr(compressor_row, "ptx", instructions)
    monkeypatch.setattr(compressor_row, "across", lambda value, distance: value[:, LANES ^ distance])
    monkeypatch.setattr(compressor_row, "Uint32", words)
    monkeypatch.setattr(compressor_row, "Float32", np.float32)
    with np.errstate(all="ignore"):
        yield


def inputs(d: int) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(300, d) * torch.exp2(torch.randint(-130, 120, (300, 1)))
    x[:50] = torch.randn(50, d)
    x[50:90] = 1.75 * torch.exp2(torch.arange(-20.0, 20)).unsqueeze(1) * torch.randn(40, d).clamp(-1, 1).sign()
    for row, special in enumerate((torch.nan, torch.inf, -torch.inf, -torch.nan, 0.0, -0.0)):
        x[100 + row, 7 * row] = special
    x[104:106] *= 0
    return x


def scatter(x: torch.Tensor, columns: int) -> list[np.ndarray]:
    """[N, 32 columns] as the columns of every lane."""
    parts = x.view(len(x), 32, columns).numpy()
    return [np.ascontiguousarray(parts[:, :, i]) for i in range(columns)]


def gather(words: np.ndarray, bytes_: int) -> torch.Tensor:
    """The lowest bytes of every lane's word."""
    split = np.ascontiguousarray(words.astype(np.uint32)).view(np.uint8).reshape(*words.shape, 4)[..., :bytes_]
    return torch.from_numpy(np.ascontiguousarray(split).reshape(len(words), -1))


@pytest.mark.parametrize("columns", [2, 4])
def test_blocks_in_fp8(on_numpy, columns):
    x = inputs(32 * columns)
    codes, exponent = compressor_row.to_fp8(scatter(x, columns), 64 // columns)
    want, scale = _compressor.scaled_ref(x)
    assert torch.equal(gather(codes, columns), want.view(torch.uint8))
    assert torch.equal(torch.from_numpy(exponent[:, :: 64 // columns].astype(np.int32)), scale)


def test_rows_in_fp8_and_mxfp4(on_numpy):
    x = inputs(128).bfloat16().float()
    codes, exponent = compressor_row.to_fp8(scatter(x, 4), 32)
    want, scale = quantise_fp8_ref(x.bfloat16())
    assert torch.equal(gather(codes, 4), want.view(torch.uint8))
    bits = compressor_row.scale_bits(exponent)[:, 0].astype(np.uint32).view(np.int32)
    assert torch.equal(torch.from_numpy(bits), scale.view(torch.int32))
    codes, exponent = compressor_row.to_mxfp4(scatter(x, 4), 8)
    want, scale = quantise_mxfp4_ref(x.bfloat16())
    assert torch.equal(gather(codes, 2), want)
    blocks = exponent[:, ::8].astype(np.uint8)
    assert torch.equal(torch.from_numpy(np.ascontiguousarray(blocks).view(np.int32)[:, 0]), scale)


def test_hadamard(on_numpy):
    x = torch.randn(100, 128).bfloat16()
    got = compressor_row.hadamard(scatter(x.float(), 4), LANES)
    assert torch.equal(torch.from_numpy(np.stack(got, -1)).flatten(1), hadamard_ref(x).float())


@pytest.mark.parametrize("columns", [2, 4])
def test_norm_and_rope(on_numpy, columns):
    d = 32 * columns
    x, weight, angle = torch.randn(100, d), torch.rand(1, d), torch.rand(100, d // 4) * 6
    mine = scatter(x, columns)
    factors = scatter(weight, columns)
    got = compressor_row.norm(mine, compressor_row.squares(mine), factors, d, np.float32(1e-6))
    full = torch.cat([torch.zeros_like(angle), angle], 1)  # the second half of the dims is rotated
    cos, sin = (scatter(table, columns // 2) for table in (full.cos(), full.sin()))
    got = compressor_row.rotate(got, cos, sin, columns * LANES >= d // 2)
    want = _compressor.rotate_ref(_compressor.norm_ref(x, weight[0], 1e-6), angle.cos(), angle.sin())
    assert_same_bits([torch.from_numpy(np.stack(got, -1)).flatten(1)], [want])


def test_bf16_has_one_nan(on_numpy):
    x = inputs(128)
    words = compressor_row.bf16_words(scatter(x, 2 * 2))
    got = torch.from_numpy(np.stack([word.astype(np.uint32) for word in words], -1).view(np.int16)).flatten(1)
    assert torch.equal(got, torch.where(x.isnan(), 0x7FC0, x.bfloat16().view(torch.int16)).short())


def test_limits():
    given = cute_arguments(512, 4, True, 8)
    assert _cutedsl_limits(True, **given) is None
    for change, message in (
        ({"kv": given["kv"][:, 4:]}, "kv, gate or position_bias is not aligned"),
        ({"cos": given["cos"][:, :24]}, None),
        ({"cos": given["cos"][:, :12]}, "multiples of 16 dims, got 24"),
        ({"norm_weight": torch.zeros(1024)}, "entries of other sizes, got 1024 dims"),
        ({"position_bias": torch.zeros(3, 1024)}, "got 6 rows"),
        ({"format": "fp8"}, "fp8 entries of other sizes, got 512 dims"),
        ({"state": torch.zeros(50 * 2048 * 8 + 1)[1:].view(50, 8, 2, 1024)}, "an argument is not aligned"),
    ):
        reason = _cutedsl_limits(True, **{**given, **change})
        assert reason is None if message is None else message in reason, (change.keys(), reason)


@pytest.mark.parametrize(("overlap", "ratio"), [(True, 4), (False, 128)])
def test_one_kernel_for_any_number_of_tokens(overlap, ratio):
    operator = compressor_cache.Insert(overlap)
    keys = set()
    for tokens, requests in ((1, 1), (2, 2), (15, 3), (16, 16), (4096, 1), (4097, 5)):
        given = cute_arguments(512, ratio, overlap, ratio, tokens=tokens, requests=requests)
        keys.add(operator.key(*given.values()))
    assert len(keys) == 1
