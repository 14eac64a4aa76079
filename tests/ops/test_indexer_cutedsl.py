"""The CuTe DSL kernels of the indexer without a GPU: every variant is compiled for sm_90a, and the arithmetic of rows,
which is Python over single instructions, runs on NumPy arrays of lanes in place of registers."""

from __future__ import annotations

import itertools
import re
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv4_fusion.ops._indexer import (
    MXFP4_FLOOR,
    hadamard_ref,
    quantise_fp8_ref,
    quantise_mxfp4_ref,
    rms_norm_ref,
    rotate_ref,
)

pytest.importorskip("cutlass")
pytest.importorskip("tvm_ffi")
pytest.importorskip("triton")  # its wheel has the disassembler

import triton

from dsv4_fusion.ops.cutedsl import formats, indexer, indexer_cache, rows

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LANES = [8, 4]
FLOATS = (torch.float32, torch.bfloat16)


# Instructions on NumPy: a word is uint32 [N, lanes] (or one number), a real float32 of the same shape


def _words(x):
    return np.asarray(x).astype(np.int64).astype(np.uint32)


def _wide(pair):
    """The two halves of pairs as fp32."""
    pair = _words(pair)
    return (pair << np.uint32(16)).view(np.float32), (pair & np.uint32(0xFFFF0000)).view(np.float32)


def _narrow(low, high):
    """Two float64 or fp32 arrays rounded to pairs of bf16; NaN to PTX's canonical one."""
    halves = [torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy() for x in (low, high)]
    halves = [half.view(np.uint16).astype(np.uint32) for half in halves]
    low, high = (np.where(np.isnan(x), np.uint32(0x7FFF), half) for x, half in zip((low, high), halves, strict=True))
    return low | high << np.uint32(16)


def _pairwise(operation):
    def on_pairs(*operands):
        words = [np.uint32(x << 16 | x) if isinstance(x, int) else x for x in operands]
        words = np.broadcast_arrays(*words)
        halves = [[half.astype(np.float64) for half in _wide(np.ascontiguousarray(word))] for word in words]
        return _narrow(*(operation(*half) for half in zip(*halves, strict=True)))

    return on_pairs


def _permute(a, b, selector):
    both = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.shape(both), np.uint32)
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = (both >> np.uint64(8 * (nibble & 7)) & np.uint64(255)).astype(np.uint32)
        if nibble & 8:
            byte = (byte >> np.uint32(7)) * np.uint32(255)
        out |= byte << np.uint32(8 * place)
    return out


def _integers_max(a, b):
    a, b = np.broadcast_arrays(_words(a), _words(b))
    low, high = (np.maximum(a >> shift & np.uint32(0xFFFF), b >> shift & np.uint32(0xFFFF)) for shift in (0, 16))
    return low | high << np.uint32(16)


def _pair_of(a, half):
    a = _words(a) >> np.uint32(16 * half) & np.uint32(0xFFFF)
    return a | a << np.uint32(16)


def _multiply_add(a, b, c):
    return (np.asarray(a).astype(np.uint64) * np.uint64(b % 2**32) + np.asarray(c).astype(np.uint64)).astype(np.uint32)


def _e4m3(*values):
    limited = [np.clip(x, -448, 448) for x in values]
    as_bytes = [
        torch.from_numpy(np.ascontiguousarray(x)).to(torch.float8_e4m3fn).view(torch.uint8).numpy() for x in limited
    ]
    as_bytes = [np.where(np.isnan(x), 0x7F, byte).astype(np.uint32) for x, byte in zip(values, as_bytes, strict=True)]
    return as_bytes[0] | as_bytes[1] << np.uint32(8) | as_bytes[2] << np.uint32(16) | as_bytes[3] << np.uint32(24)


def _across(value, distance):
    return value[:, np.arange(value.shape[1]) ^ distance]


@pytest.fixture
def on_numpy(monkeypatch):
    """Replace what the rows are made of; overflow and NaN are meant."""
    instructions = types.SimpleNamespace(
        bits=lambda x: np.asarray(x, np.float32).view(np.uint32),
        real=lambda x: _words(x).view(np.float32),
        add=np.add,
        sub=np.subtract,
        mul=np.multiply,
        fma=lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),  # here b is ±1
        div=np.divide,
        sqrt=np.sqrt,
        maximum=np.fmax,
        select=np.where,
        multiply_add=_multiply_add,
        unpack=_wide,
        pack_bf16=_narrow,
        pack_e4m3=_e4m3,
        both=lambda half: half << 16 | half,
        pair_abs=_pairwise(np.abs),
        pair_of=_pair_of,
        pair_max=_pairwise(np.maximum),
        pair_min=_pairwise(np.minimum),
        pair_max_abs=_pairwise(lambda a, b: np.maximum(abs(a), abs(b)) * np.sign(a) * np.sign(b)),
        integers_max=_integers_max,
        pair_mul=_pairwise(np.multiply),
        pair_fma=_pairwise(lambda a, b, c: a * b + c),
        permute=_permute,
    )
    for module in (rows, formats):
        monkeypatch.setattr(module, "ptx", instructions)
        monkeypatch.setattr(module, "across", _across)
        monkeypatch.setattr(module, "Uint32", _words)
        monkeypatch.setattr(module, "Float32", np.float32)
    with np.errstate(all="ignore"):
        yield


def _lane(lanes: int) -> np.ndarray:
    return np.arange(lanes, dtype=np.int32)


def _scatter(x: torch.Tensor, lanes: int) -> list[list[np.ndarray]]:
    """bf16 [N, d] as the words of every chunk."""
    words = x.contiguous().view(torch.int32).numpy().view(np.uint32).reshape(len(x), -1, lanes, 4)
    return [[words[:, chunk, :, i] for i in range(4)] for chunk in range(words.shape[1])]


def _gather(words: list[list[np.ndarray]]) -> torch.Tensor:
    """The words of every chunk as bytes [N, …]."""
    joined = np.stack([np.stack(chunk, -1) for chunk in words], 1)
    return torch.from_numpy(np.ascontiguousarray(joined).view(np.uint8).reshape(len(joined), -1))


def _angles(rows_: rows.Rows, cos: torch.Tensor, sin: torch.Tensor) -> list:
    """fp32 [N, R / 2] as the cosines and sines of every chunk; anything where nothing is rotated."""
    plain = (rows_.d - rows_.rope) // 2
    full = [torch.cat([torch.full((len(x), plain), torch.nan), x], 1).numpy() for x in (cos, sin)]
    full = [x.reshape(len(x), rows_.chunks, rows_.lanes, 4) for x in full]
    return [
        None if rows_._plain(chunk) == rows_.span else [[x[:, chunk, :, i] for i in range(4)] for x in full]
        for chunk in range(rows_.chunks)
    ]


def _inputs(d: int, seed: int = 0) -> torch.Tensor:
    """bf16 rows: of many magnitudes, every value on and beside ties and powers of two, zeros, NaN, infinities."""
    torch.manual_seed(seed)
    random = torch.randn(256, d) * torch.exp2(torch.randint(-130, 125, (256, 1)))
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, d)
    grid = torch.arange(-(2**8), 2**8).div(2**6).bfloat16().repeat(2).view(-1, d)
    near = torch.ones(512, 1) * torch.arange(0, d) / d
    near[:, 0] = (torch.arange(512) * 2.0**-7 + 4).float()  # amax in every step from 4 to 8
    special = torch.randn(8, d)
    for row, value in enumerate([torch.nan, torch.inf, -torch.inf, -torch.nan, 0.0, -0.0]):
        special[row, (37 * row) % d] = value
    special[4:6] *= 0
    return torch.cat([random.bfloat16(), every, grid, near.bfloat16(), special.bfloat16()])


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("floor", [448 * 2.0**-126, 1e-4, 3.5, 3.5 + 2.0**-22])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_fp8(on_numpy, d, floor, power_of_two, lanes):
    x = _inputs(d)
    kernel = formats.FP8Rows(d, 0, False, power_of_two, lanes)
    packed, scale = kernel.quantise(_scatter(x, lanes), _lane(lanes), np.float32(floor))
    values, want = quantise_fp8_ref(x, floor, power_of_two)
    assert torch.equal(_gather(packed), values.view(torch.uint8))
    for lane in range(lanes):
        assert torch.equal(torch.from_numpy(scale[:, lane].view(np.int32).copy()), want.view(torch.int32))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("floor", [MXFP4_FLOOR, 1e-4, 3.0, 3.0 + 2.0**-22])
@pytest.mark.parametrize("ties", ["even", "zero"])
def test_mxfp4(on_numpy, d, floor, ties, lanes):
    x = _inputs(d)
    kernel = formats.MXFP4Rows(d, 0, False, ties == "even", convert=False, lanes=lanes)
    packed, scale = kernel.quantise(_scatter(x, lanes), _lane(lanes), np.float32(floor))
    values, want = quantise_mxfp4_ref(x, floor, ties)
    assert torch.equal(_gather(packed), values)
    for lane in range(4):
        assert torch.equal(torch.from_numpy(_words(scale[:, lane]).view(np.int32)), want)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("ties", ["even", "zero"])
def test_mxfp4_of_every_value_under_an_amax(on_numpy, ties, lanes):
    """All bf16 values down to 2^-6 of amax, which are more than those that round to a code other than 0."""
    every = torch.arange(2**15).to(torch.int16).view(torch.bfloat16)
    blocks = []
    for exponent, mantissa in itertools.product((-124, -3, 126), (*range(0, 128, 21), 63, 64, 65)):
        amax = torch.tensor(2.0**exponent * (1 + mantissa / 128)).bfloat16()
        under = every[(every <= amax) & (every > amax * 2.0**-6)]
        under = torch.cat([under, -under])
        under = torch.cat([under, amax.expand(-len(under) % 30)]).view(-1, 30)
        blocks.append(torch.cat([under, amax.expand(len(under), 1), -amax.expand(len(under), 1)], 1))
    x = torch.cat(blocks)
    x = x[: len(x) // 4 * 4].view(-1, 128)
    kernel = formats.MXFP4Rows(128, 0, False, ties == "even", convert=False, lanes=lanes)
    packed, scale = kernel.quantise(_scatter(x, lanes), _lane(lanes), np.float32(MXFP4_FLOOR))
    values, want = quantise_mxfp4_ref(x, MXFP4_FLOOR, ties)
    assert torch.equal(_gather(packed), values)
    assert torch.equal(torch.from_numpy(_words(scale[:, 0]).view(np.int32)), want)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("d", "rope"), [(128, 64), (128, 128), (128, 16), (128, 96), (64, 64), (64, 32)])
def test_rope(on_numpy, d, rope, lanes):
    x = _inputs(d)[:256]
    angle = torch.rand(256, rope // 2) * 6
    cos, sin = angle.cos(), angle.sin()
    kernel = rows.Rows(d, rope, False, lanes)
    got = _gather(kernel.rotate(_scatter(x, lanes), _angles(kernel, cos, sin), _lane(lanes)))
    assert torch.equal(got, rotate_ref(x, cos, sin).view(torch.uint8))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("d", [64, 128])
def test_hadamard(on_numpy, d, lanes):
    x = torch.randn(256, d).bfloat16()
    got = rows.Rows(d, 0, True, lanes).transform(_scatter(x, lanes), _lane(lanes))
    assert torch.equal(_gather(got), hadamard_ref(x).view(torch.uint8))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("d", [64, 128])
def test_norm(on_numpy, d, lanes):
    x, weight, kernel = torch.randn(256, d).bfloat16(), torch.rand(d), rows.Rows(d, 0, False, lanes)
    factors = weight.numpy().reshape(1, -1, lanes, 8)
    factors = [[factors[:, chunk, :, i] for i in range(8)] for chunk in range(kernel.chunks)]
    got = kernel.norm(_scatter(x, lanes), factors, np.float32(1e-6))
    assert torch.equal(_gather(got), rms_norm_ref(x, weight, 1e-6).view(torch.uint8))


# Compilation


def _formats(d: int, rope: int, hadamard: bool, lanes: int = rows.LANES) -> list[rows.Rows]:
    return [
        formats.FP8Rows(d, rope, hadamard, power_of_two=True, lanes=lanes),
        formats.FP8Rows(d, rope, hadamard, power_of_two=False, lanes=lanes),
        formats.MXFP4Rows(d, rope, hadamard, ties_to_even=True, convert=False, lanes=lanes),
        formats.MXFP4Rows(d, rope, hadamard, ties_to_even=False, convert=False, lanes=lanes),
    ]


def _compile(folder, build, *arguments, arch: str = "sm_90a") -> None:
    """Compile, and assert that nothing was spilled to memory."""
    build(*arguments, arch=arch, options=f"--keep-cubin --dump-dir {folder}")
    (cubin,) = folder.glob("*.cubin")
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize(
    ("d", "rope", "heads", "positions", "angles", "weights", "count", "dense"),
    [
        (128, 64, 64, torch.int64, *FLOATS, 0, True),
        (128, 64, 64, torch.int64, *FLOATS, 8192, True),
        (128, 64, 64, torch.int64, *FLOATS, 32768, True),
        (128, 64, 64, torch.int64, *FLOATS, 262144, True),
        (128, 96, 64, torch.int32, *FLOATS, 262144, False),
        (128, 64, 5, torch.int64, *FLOATS, 0, False),
        (64, 48, 6, None, torch.bfloat16, torch.float32, 8192, True),
        (64, 48, 6, None, torch.bfloat16, torch.float32, 8192, False),
    ],
)
def test_queries_compile(tmp_path, d, rope, heads, positions, angles, weights, count, dense, form, hadamard):
    lanes, coarsening = indexer.share(form >= 2, heads, hadamard, count)
    kernel = _formats(d, rope, hadamard, lanes)[form]
    _compile(tmp_path, indexer.build, kernel, heads, positions, angles, weights, coarsening, dense)


@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize(
    ("d", "rope", "slots", "norm", "positions", "angles", "hadamard"),
    [
        (128, 64, torch.int64, torch.bfloat16, torch.int64, torch.float32, True),
        (128, 0, torch.int32, None, None, None, False),
        (64, 64, torch.int32, torch.float32, None, torch.bfloat16, False),
    ],
)
def test_keys_compile(tmp_path, d, rope, slots, norm, positions, angles, hadamard, form):
    kernel = _formats(d, rope, hadamard)[form]
    _compile(tmp_path, indexer_cache.build, kernel, 64, slots, norm, positions, angles)


@pytest.mark.parametrize("lanes", LANES)
def test_the_convert_instruction_compiles(tmp_path, lanes):
    kernel = formats.MXFP4Rows(128, 64, False, ties_to_even=True, convert=True, lanes=lanes)
    _compile(tmp_path, indexer.build, kernel, 64, torch.int64, *FLOATS, 1, True, arch="sm_100a")


# Which kernel a call gets


def test_what_a_thread_has():
    for mxfp4, hadamard in itertools.product((False, True), repeat=2):
        assert indexer.share(mxfp4, 5, hadamard, 0) == (8, 1)  # no more than one head divides five
        assert len(indexer.shares(mxfp4, 64, hadamard)) == (4 if mxfp4 and not hadamard else 2)
        for count, *own in indexer.shares(mxfp4, 64, hadamard):
            assert indexer.share(mxfp4, 64, hadamard, count) == tuple(own)
    assert indexer.share(False, 64, False, 8191) == (8, 1) and indexer.share(False, 64, False, 8192) == (8, 4)
    assert indexer.share(False, 6, False, 8192) == (8, 2)
    assert indexer.share(True, 64, False, 8191) == (8, 1) and indexer.share(True, 64, False, 8192) == (8, 2)
    assert indexer.share(True, 64, False, 32768) == (4, 1) and indexer.share(True, 64, False, 10**6) == (8, 4)
    assert indexer.share(True, 64, True, 8192) == (4, 1)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _queries(tokens: int, heads: int = 64) -> dict[str, torch.Tensor]:
    table = {name: _meta(4096, 32, dtype=torch.float32) for name in ("cos", "sin")}
    positions = _meta(tokens, dtype=torch.int64)
    return {"q": _meta(tokens, heads, 128), "positions": positions, **table, "weights": _meta(tokens, heads)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda x: _meta(64, 9, 128).transpose(0, 1)),
        ("q", lambda x: _meta(9, 128, 128)[:, :64]),
        ("q", lambda x: _meta(2**25, 64, 128)[::2]),  # its rows are far apart
        ("positions", lambda x: _meta(18, dtype=torch.int64)[::2]),
        ("cos", lambda x: _meta(4096, 64, dtype=torch.float32)[:, :32]),
        ("sin", lambda x: _meta(4096, 64, dtype=torch.float32)[:, 32:]),
        ("weights", lambda x: _meta(9, 128)[:, :64]),
    ],
)
def test_dense_inputs(name, change):
    given = _queries(9)
    assert indexer._dense(**given) and indexer._dense(**given | {"positions": None})
    assert not indexer._dense(**given | {name: change(given[name])})


def test_strides_of_single_rows_and_heads_count():
    """A kernel with constant strides is called with just these."""
    given = _queries(1, 1)
    assert indexer._dense(**given)
    for name, changed in (("q", _meta(1, 2, 128)[:, :1]), ("q", _meta(3, 1, 256)[:1, :, :128])):
        assert changed.is_contiguous() and not indexer._dense(**given | {name: changed})


def test_more_rows_than_32_bits_count_are_not_dense():
    assert indexer._dense(**_queries(2**22 - 1)) and not indexer._dense(**_queries(2**22))
