"""The indexer's key cache: its bytes, the fused store against its steps, reading back, and kernels by bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dsv4_fusion import ops
from dsv4_fusion.ops import _indexer, _library
from tests.ops.test_indexer import ROWS, TOKENS, assert_same_bits, on_gpu, special_rows

STORES = ("indexer_k_store_fp8", "indexer_k_store_mxfp4")
FUSED = ("norm_weight", "positions", "cos", "sin")


def arguments(
    format: str,
    tokens: int = 20,
    d: int = 128,
    rope: int = 64,
    page_size: int = 64,
    padding: int = 16,
    fused: tuple[str, ...] = (),
    table: torch.dtype = torch.float32,
    integers: torch.dtype = torch.int64,
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """Keys, some of them special rows, with every seventh skipped; a cache full of 0xA5, its pages padded."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(tokens, d, generator=generator)
    k = (k * torch.exp2(torch.randint(-30, 12, (tokens, 1), generator=generator).float())).bfloat16()
    cases = special_rows(d)[: tokens // 2]
    k[: len(cases)] = cases
    pages = tokens // page_size + 2
    slots = torch.randperm(pages * page_size, generator=generator)[:tokens]
    slots[3::7] = -1
    angles = 7 * torch.randn(ROWS, rope // 2, generator=generator)
    angles[0] = 0
    positions = torch.randint(0, ROWS, (tokens,), generator=generator)
    positions[::2] = 0
    positions[3::7] = 1 << 30  # skipped
    rows = slice(None) if "positions" in fused else positions.clamp(max=1)
    found = {
        "k": k,
        "cache": torch.full((pages, ops.indexer_cache_bytes(page_size, format, d) + padding), 0xA5, dtype=torch.uint8),
        "slots": slots.to(integers),
        "norm_weight": torch.randn(d, generator=generator),
        "positions": positions.to(integers),
        "cos": angles.cos().to(table)[rows],
        "sin": angles.sin().to(table)[rows],
    }
    return {key: value for key, value in found.items() if key not in FUSED or key in fused}


def store(name: str, tensors: dict, **options) -> torch.Tensor:
    """The cache after a store into a copy of it."""
    cache = tensors["cache"].clone()
    getattr(ops, name)(**{**tensors, "cache": cache}, **options)
    return cache


# Layout


def test_bytes_of_a_page():
    assert ops.indexer_cache_bytes(64, "fp8") == 64 * 132
    assert ops.indexer_cache_bytes(64, "mxfp4") == 64 * 68
    assert ops.indexer_cache_bytes(1, "fp8", 64) == 68
    assert ops.indexer_cache_bytes(256, "mxfp4", head_dim=64) == 256 * 36


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((48, "fp8"), "page_size must be a power of two, got 48"),
        ((0, "fp8"), "page_size must be a power of two, got 0"),
        ((64, "fp4"), "format must be 'fp8' or 'mxfp4', got 'fp4'"),
        ((64, "fp8", 96), "the head dim must be 64 or 128, got 96"),
    ],
)
def test_bad_layout(given, message):
    with pytest.raises(ValueError, match=message):
        ops.indexer_cache_bytes(*given)


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", STORES)
def test_where_every_byte_goes(name, d, page_size):
    """Byte by byte into a dictionary; all that no slot owns stays as it was."""
    format = name.rpartition("_")[2]
    tensors = arguments(format, 20, d, page_size=page_size)
    expected = tensors["cache"].tolist()
    width = d if format == "fp8" else d // 2
    if format == "fp8":
        values, scales = _indexer.quantise_fp8_ref(tensors["k"])
    else:
        values, scales = _indexer.quantise_mxfp4_ref(tensors["k"])
    values, scales = values.view(torch.uint8).tolist(), scales.unsqueeze(1).view(torch.uint8).tolist()
    for token, slot in enumerate(tensors["slots"].tolist()):
        if slot >= 0:
            page, row = expected[slot // page_size], slot % page_size
            page[row * width : (row + 1) * width] = values[token]
            page[page_size * width + 4 * row : page_size * width + 4 * row + 4] = scales[token]
    assert store(name, tensors, page_size=page_size).tolist() == expected


def test_nan_scale_has_the_bits_said():
    tensors = arguments("fp8", 2)
    tensors["k"][0, 0] = math.inf
    tensors["slots"] = torch.tensor([0, 1])
    cache = store("indexer_k_store_fp8", tensors)
    assert cache[0, 64 * 128 : 64 * 128 + 4].tolist() == [0, 0, 0xC0, 0x7F]
    assert set(cache[0, :128].tolist()) == {0x7F}


# The fused form


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("name", STORES)
def test_the_fused_store_is_its_steps(name, hadamard):
    tensors = arguments(name.rpartition("_")[2], 40, fused=FUSED)
    kept = tensors["slots"] >= 0
    k = _indexer.rms_norm_ref(tensors["k"][kept], tensors["norm_weight"], 1e-3)
    cos, sin = (tensors[key][tensors["positions"][kept]] for key in ("cos", "sin"))
    k = _indexer.rotate_ref(k, cos, sin)
    k = _indexer.hadamard_ref(k) if hadamard else k
    steps = {"k": k, "cache": tensors["cache"], "slots": tensors["slots"][kept]}
    assert torch.equal(store(name, tensors, norm_eps=1e-3, hadamard=hadamard), store(name, steps))


def test_the_norms_root_is_rounded_once():
    """Against float64. PyTorch's own fp32 sqrt on the CPU fails this."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 128, generator=generator).bfloat16()
    x = (x * torch.exp2(torch.randint(-4, 8, (2000, 1), generator=generator).float())).bfloat16()
    total = x.float() * x.float()
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    mean = total * (1 / 128) + 1e-6
    root = torch.tensor([[math.sqrt(value)] for value in mean.flatten().tolist()], dtype=torch.float64).float()
    expected = (x.float() * (torch.ones_like(root) / root)).bfloat16()
    assert torch.equal(_indexer.rms_norm_ref(x, torch.ones(128), 1e-6), expected)


def test_norm_is_the_mathematics():
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(128, generator=torch.Generator().manual_seed(1))
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 0.01).rsqrt() * weight.double()
    got = _indexer.rms_norm_ref(x, weight, 0.01)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8 + 2**-20, atol=0)


# Reading back


@pytest.mark.parametrize("page_size", [4, 64])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", STORES)
def test_round_trip(name, d, page_size):
    format = name.rpartition("_")[2]
    k = torch.randn(100, d, generator=torch.Generator().manual_seed(0)).bfloat16()
    pages = 120 // page_size + 2
    cache = torch.full((pages, ops.indexer_cache_bytes(page_size, format, d) + 32), 0xA5, dtype=torch.uint8)
    table = torch.randperm(pages)[: -(-100 // page_size)]
    slots = table.repeat_interleave(page_size)[:100] * page_size + torch.arange(100) % page_size
    getattr(ops, name)(k, cache, slots, page_size=page_size)
    options = {"format": format, "head_dim": d, "page_size": page_size}
    tables, lengths = torch.stack([table, table]), torch.tensor([100, 37])
    back = ops.indexer_k_load(cache, tables, lengths, **options)
    assert back.shape == (2, len(table) * page_size, d) and back.dtype == torch.bfloat16
    if format == "fp8":
        values, scales = _indexer.quantise_fp8_ref(k)
        error = scales.unsqueeze(-1) * 16  # half of the largest step
        exact = values.float() * scales.unsqueeze(-1)
    else:
        packed, scales = _indexer.quantise_mxfp4_ref(k)
        scales = scales.unsqueeze(1).view(torch.uint8)[:, : d // 32]
        error = torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
        exact = _indexer.dequantise_mxfp4_ref(packed, scales).float()
    assert torch.equal(back[0, :100].float(), exact)
    assert ((back[0, :100].float() - k.float()).abs() <= error).all()
    assert torch.equal(back[1, :37], back[0, :37])
    assert not back[0, 100:].any() and not back[1, 37:].any()
    shorter = ops.indexer_k_load(cache, tables, lengths.clamp(max=90).int(), **options, max_length=90)
    assert torch.equal(shorter[0], back[0, :90])


def test_what_scale_bytes_mean():
    """Page size 1, all codes; scales 2^-127, which is subnormal, 2^-126, 1 and NaN."""
    codes = torch.tensor([low | high << 4 for low, high in itertools.product(range(8), repeat=2)], dtype=torch.uint8)
    scale = torch.tensor([0, 1, 127, 255], dtype=torch.uint8)
    cache = torch.cat([codes, scale])[None]
    (back,) = ops.indexer_k_load(
        cache, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64), format="mxfp4", page_size=1
    )
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    plain = torch.cartesian_prod(values, values).flatten()
    for block, power in enumerate((2.0**-127, 2.0**-126, 1.0)):
        part = slice(32 * block, 32 * block + 32)
        assert torch.equal(back[0, part], (plain[part] * power).bfloat16())
    assert back[0, 96:].isnan().all()


def test_pages_beyond_a_length_are_not_looked_at():
    cache = torch.zeros(1, ops.indexer_cache_bytes(64, "fp8"), dtype=torch.uint8)
    table, lengths = torch.tensor([[0, -1], [99, 99]]), torch.tensor([64, 0])
    assert not ops.indexer_k_load(cache, table, lengths, format="fp8").any()
    with pytest.raises(ValueError, match=r"block_table must hold pages in \[0, 1\) up to each length"):
        ops.indexer_k_load(cache, table, lengths + 1, format="fp8")


# Registration and bad input


@pytest.mark.parametrize("fused", [(), FUSED])
@pytest.mark.parametrize("name", STORES)
def test_opcheck_of_stores(name, fused):
    tensors = arguments(name.rpartition("_")[2], 9, fused=fused)
    if fused:
        tensors["positions"].clamp_(max=ROWS - 1)
    results = torch.library.opcheck(getattr(torch.ops.dsv4, name).default, (), tensors)
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("options", [{}, {"max_length": 70}])
def test_opcheck_of_load(options):
    cache = torch.randint(0, 127, (3, ops.indexer_cache_bytes(64, "fp8")), dtype=torch.uint8)
    given = (cache, torch.tensor([[0, 2]]), torch.tensor([70]))
    results = torch.library.opcheck(torch.ops.dsv4.indexer_k_load.default, given, {"format": "fp8", **options})
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


def test_store_and_load_in_one_compiled_graph():
    """The store is seen by the load after it, and by the caller; one graph serves every token count."""

    def step(k, cache, slots, table, lengths):
        ops.indexer_k_store_fp8(k, cache, slots)
        return ops.indexer_k_load(cache, table, lengths, format="fp8") + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for tokens in (5, 20, 40):
        tensors = arguments("fp8", tokens)
        tensors["slots"] = torch.arange(tokens)
        cache = tensors["cache"].clone()
        table, lengths = torch.tensor([[0]]), torch.tensor([tokens])
        got = compiled(tensors["k"], cache, tensors["slots"], table, lengths)
        expected = store("indexer_k_store_fp8", tensors)
        assert torch.equal(cache, expected)
        assert_same_bits([got], [ops.indexer_k_load(expected, table, lengths, format="fp8") + 1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("k", lambda x: x[0], r"k must have shape \[T, d\], got \[128\]"),
        ("k", lambda x: x.float(), "k must be bfloat16, got float32"),
        ("k", lambda x: x[:, :32], "the head dim must be 64 or 128, got 32"),
        ("cache", lambda x: x.view(torch.int8), "cache must be uint8, got int8"),
        ("cache", lambda x: x[0], r"cache must have shape \[any, any\], got \[8464\]"),
        ("cache", lambda x: x[:, :8444], "a page of 64 fp8 tokens takes 8448 bytes, cache has 8444 a page"),
        ("cache", lambda x: x[:, 2:], "begin at multiples of 4 bytes, got page stride 8464 and storage offset 2"),
        ("cache", lambda x: x.flatten()[:16902].view(2, 8451), "multiples of 4 bytes, got page stride 8451"),
        ("slots", lambda x: x[1:], r"slots must have shape \[20\], got \[19\]"),
        ("slots", lambda x: x.short(), "slots must be int32 or int64, got int16"),
        ("slots", lambda x: x - 2, r"slots must be in \[-1, 128\), got -3 to"),
        ("slots", lambda x: x + 128, r"slots must be in \[-1, 128\), got 127 to"),
        ("norm_weight", lambda x: x[1:], r"norm_weight must have shape \[128\], got \[127\]"),
        ("norm_weight", lambda x: x.double(), "norm_weight must be float32 or bfloat16, got float64"),
        ("cos", lambda x: None, "RoPE takes cos and sin, and positions if these are a table; got positions, sin alone"),
        ("sin", lambda x: None, "got positions, cos alone"),
        ("positions", lambda x: None, r"cos must have shape \[20, any\], got \[50, 32\]"),
    ],
)
def test_bad_tensors(key, change, message):
    tensors = arguments("fp8", fused=FUSED)
    tensors[key] = change(tensors[key])
    with pytest.raises(ValueError, match=message):
        ops.indexer_k_store_fp8(**tensors)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("indexer_k_store_fp8", {"norm_eps": 0.0}, "norm_eps must be a positive, finite number, got 0.0"),
        ("indexer_k_store_fp8", {"amax_floor": 0.0}, "amax_floor must be finite and at least 5.266e-36"),
        ("indexer_k_store_fp8", {"page_size": 3}, "page_size must be a power of two, got 3"),
        ("indexer_k_store_mxfp4", {"ties": "away"}, "ties must be 'even' or 'zero', got 'away'"),
        ("indexer_k_store_mxfp4", {"implementation": "cuda"}, "no implementation 'cuda'; it has cutedsl, triton"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=f"dsv4::{name}.*{message}"):
        getattr(ops, name)(**arguments(name.rpartition("_")[2]), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fp4"}, "format must be 'fp8' or 'mxfp4', got 'fp4'"),
        ({"block_table": torch.zeros(2, dtype=torch.int64)}, r"block_table must have shape \[any, any\], got \[2\]"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths must have shape \[1\], got \[3\]"),
        ({"lengths": torch.tensor([129])}, "lengths must be at most 128, got 129"),
        ({"max_length": 129}, "max_length must be from 0 to 128, which the block table's pages hold, got 129"),
        ({"head_dim": 256}, "the head dim must be 64 or 128, got 256"),
    ],
)
def test_bad_load(change, message):
    given = {
        "cache": torch.zeros(2, ops.indexer_cache_bytes(64, "fp8"), dtype=torch.uint8),
        "block_table": torch.tensor([[0, 1]]),
        "lengths": torch.tensor([100]),
        "format": "fp8",
    }
    with pytest.raises(ValueError, match=message):
        ops.indexer_k_load(**{**given, **change})


def test_grad_is_refused():
    tensors = arguments("fp8", fused=FUSED)
    tensors["norm_weight"].requires_grad_()
    with pytest.raises(ValueError, match=r"dsv4::indexer_k_store_fp8: an input requires grad.*no_grad"):
        ops.indexer_k_store_fp8(**tensors)


# Kernels on the GPU


@pytest.fixture(params=["cutedsl", "triton"])
def implementation(request):
    for module in _library.COMPILERS[request.param]:
        pytest.importorskip(module)
    return request.param


def check_store(name: str, tensors: dict, implementation: str, **options) -> None:
    expected = store(name, tensors, **options)
    got = store(name, on_gpu(tensors), **options, implementation=implementation)
    assert_same_bits([got], [expected], options)  # the whole cache: padding and free slots too


FORMS = ((), ("norm_weight",), ("cos", "sin"), FUSED)


@pytest.mark.gpu
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("fused", FORMS, ids=lambda names: "+".join(names) or "plain")
@pytest.mark.parametrize("name", STORES)
def test_bits_at_every_token_count(implementation, name, fused, hadamard):
    format = name.rpartition("_")[2]
    for tokens, table in zip(TOKENS, itertools.cycle((torch.float32, torch.bfloat16)), strict=False):
        tensors = arguments(format, tokens, fused=fused, table=table, integers=(torch.int64, torch.int32)[tokens % 2])
        check_store(name, tensors, implementation, hadamard=hadamard)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [0, 8, 48])
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("name", STORES)
def test_other_pages(implementation, name, page_size, padding):
    format = name.rpartition("_")[2]
    option = {"power_of_two_scale": False} if format == "fp8" else {"ties": "zero"}
    for d, rope in ((128, 64), (64, 64), (128, 16), (64, 32)):
        unaligned = implementation == "cutedsl" and ops.indexer_cache_bytes(page_size, format, d) % 8
        tensors = arguments(format, 300, d, rope, page_size, padding + unaligned, FUSED)
        check_store(name, tensors, implementation, page_size=page_size, hadamard=True, **option)


@pytest.mark.gpu
@pytest.mark.parametrize("name", STORES)
def test_slots_outside_the_cache_are_skipped_on_a_gpu(implementation, name):
    tensors = arguments(name.rpartition("_")[2], 50, fused=FUSED)
    expected = store(name, tensors)
    gone = tensors["slots"] == -1
    tensors["slots"][gone] = torch.tensor([-2, 2 * 64, -(2**40), 2**40, 2**31, -1, 129, -64])[: gone.sum()]
    assert_same_bits([store(name, on_gpu(tensors), implementation=implementation)], [expected])


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_load_on_the_gpu(format, d, page_size):
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    size = ops.indexer_cache_bytes(page_size, format, d) + 8
    cache = torch.randint(0, 256, (40, size), dtype=torch.uint8, generator=generator)  # every code, every scale
    table = torch.randint(0, 40, (5, 6), generator=generator)
    lengths = torch.tensor([0, 1, 6 * page_size, 3 * page_size, 2 * page_size])
    for length in (None, 6 * page_size):
        options = {"format": format, "head_dim": d, "page_size": page_size, "max_length": length}
        expected = ops.indexer_k_load(cache, table, lengths, **options)
        got = ops.indexer_k_load(cache.cuda(), table.cuda(), lengths.int().cuda(), **options)
        assert_same_bits([got], [expected])


@pytest.mark.gpu
@pytest.mark.parametrize("name", STORES)
def test_cuda_graph_replay_sees_new_inputs(implementation, name):
    format = name.rpartition("_")[2]
    tensors = on_gpu(arguments(format, 100, fused=FUSED))
    getattr(ops, name)(**tensors, implementation=implementation)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        getattr(ops, name)(**tensors, implementation=implementation)
    fresh = arguments(format, 100, fused=FUSED, seed=9)
    for key, value in tensors.items():
        value.copy_(fresh[key])
    captured.replay()
    assert_same_bits([tensors["cache"]], [store(name, fresh)])
