"""The CuTe DSL kernels of the paged compressor against the reference, by bits, on a GPU of SM90 or later.

Caches are full of 0xA5 and states full of NaN before; what is not written has to stay so.
"""

from __future__ import annotations

import pytest
import torch

from dsv4_fusion import ops
from tests.ops import test_compressor_cache as paged
from tests.ops.test_compressor import on_gpu
from tests.ops.test_compressor_cache import INSERTS, Feed
from tests.ops.test_indexer import assert_same_bits

IMPLEMENTATION = "cutedsl"
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _needs():
    pytest.importorskip("cutlass")
    pytest.importorskip("tvm_ffi")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs SM90")


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
                getattr(feed, key)[1][ratio * 0 + row, column + (512 if ratio == 4 else 0)] = value
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
