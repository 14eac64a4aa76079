"""The paged compressor: bytes of pages and state, any split of the tokens, reading back, and kernels by bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dsv4_fusion import ops
from dsv4_fusion.ops import _compressor
from dsv4_fusion.ops.compressor_cache import record_bytes
from tests.ops.test_compressor import ROWS, on_gpu
from tests.ops.test_indexer import assert_same_bits

INSERTS = ("compress_csa_insert", "compress_hca_insert")
LENGTHS = (23, 5, 48, 1)  # tokens of each request


class Feed:
    """Requests whose tokens are given in calls of any split; a cache full of 0xA5, a state full of NaN."""

    def __init__(
        self,
        name: str,
        lengths: tuple[int, ...] = LENGTHS,
        ratio: int = 4,
        d: int = 128,
        format: str = "kv",
        page_size: int = 4,
        n: int = 4,
        spare: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        parameters: torch.dtype = torch.float32,
        hadamard: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.name, self.lengths, self.ratio, self.d, self.n = name, lengths, ratio, d, n
        self.format, self.page_size, self.hadamard, self.integers = format, page_size, hadamard, torch.int64
        self.width = (1 + ("csa" in name)) * d
        self.kv = [
            (normal(length, self.width) * torch.exp2(torch.randint(-16, 8, (length, 1), generator=generator))).to(dtype)
            for length in lengths
        ]
        self.gate = [(3 * normal(length, self.width)).to(dtype) for length in lengths]
        angles = 7 * normal(ROWS, 32)
        self.shared = {
            "position_bias": normal(ratio, self.width).to(parameters),
            "norm_weight": normal(d).to(parameters),
            "cos": angles.cos().to(parameters),
            "sin": angles.sin().to(parameters),
        }
        rows = ratio * self.width // d + spare
        pages = -(-rows // n)  # of a request
        total = pages * len(lengths) + 2
        self.table = torch.randperm(total, generator=generator)[: pages * len(lengths)].view(len(lengths), pages)
        self.state = torch.full((total, n, 2, self.width), math.nan)
        entries = [length // ratio for length in lengths]
        pages = sum(entries) // page_size + 2
        values, scales = record_bytes(format, d)
        self.cache = torch.full((pages, page_size * (values + scales) + 16), 0xA5, dtype=torch.uint8)
        self.slots = torch.randperm(pages * page_size, generator=generator)[: sum(entries)].split(entries)
        self.fed = [0] * len(lengths)
        self.skipped: set[tuple[int, int]] = set()

    def call(self, counts: list[int], padding: int = 0) -> dict[str, torch.Tensor]:
        """The arguments that give each request so many tokens more, and padding after them."""
        kv, gate, positions, requests, slots, starts = [], [], [], [], [], [0]
        for request, count in enumerate(counts):
            for position in range(self.fed[request], self.fed[request] + count):
                kv.append(self.kv[request][position])
                gate.append(self.gate[request][position])
                positions.append(position)
                requests.append(request)
                window, step = divmod(position, self.ratio)
                closes = step == self.ratio - 1 and (request, window) not in self.skipped
                slots.append(
                    int(self.slots[request][window]) if closes else (-1 if step == self.ratio - 1 else 1 << 40)
                )
            self.fed[request] += count
            starts.append(len(kv))
        for _ in range(padding):
            kv.append(torch.full_like(self.kv[0][0], math.nan))
            gate.append(kv[-1])
            positions.append(-(1 << 40))
            requests.append(-1)
            slots.append(0)
        empty = [torch.empty(0, self.width, dtype=self.kv[0].dtype)]
        return {
            "kv": torch.cat([row[None] for row in kv] or empty),
            "gate": torch.cat([row[None] for row in gate] or empty),
            "positions": torch.tensor(positions, dtype=torch.int64),
            "requests": torch.tensor(requests, dtype=self.integers),
            "starts": torch.tensor(starts, dtype=self.integers),
            "slots": torch.tensor(slots, dtype=torch.int64),
            **self.shared,
            "state": self.state,
            "state_table": self.table.to(self.integers),
            "cache": self.cache,
        }

    @property
    def options(self) -> dict:
        return {"format": self.format, "page_size": self.page_size, "hadamard": self.hadamard}

    def run(self, split: Callable[[int, int], list[int]], padding: int = 0, **options) -> None:
        """Feed everything; ``split`` gives the sizes of a request's pieces, by its number and length."""
        pieces = [split(request, length) for request, length in enumerate(self.lengths)]
        for step in range(max(map(len, pieces))):
            counts = [sizes[step] if step < len(sizes) else 0 for sizes in pieces]
            getattr(ops, self.name)(**self.call(counts, padding), **self.options, **options)

    def expected(self) -> list[list[int]]:
        """The cache's bytes, of the dense operator's entries, one by one."""
        cache = torch.full_like(self.cache, 0xA5).tolist()
        dense = getattr(ops, self.name.removesuffix("_insert"))
        for request, length in enumerate(self.lengths):
            if length < self.ratio:
                continue
            entries = dense(self.kv[request][None], self.gate[request][None], **self.shared, dtype=torch.float32)[0]
            records = _compressor.record_ref(entries, self.format, self.hadamard)
            for window, slot in enumerate(self.slots[request].tolist()):
                if (request, window) in self.skipped:
                    continue
                page, row, begin = cache[slot // self.page_size], slot % self.page_size, 0
                for part, size in zip(records, record_bytes(self.format, self.d), strict=True):
                    values = part[window].tolist()
                    page[begin + row * size : begin + row * size + len(values)] = values
                    begin += self.page_size * size
        return cache


def at_once(request: int, length: int) -> list[int]:
    return [length]


def one_by_one(request: int, length: int) -> list[int]:
    return [0] * request + [1] * length


def in_pieces(request: int, length: int) -> list[int]:
    """Pieces of 3, 1, 4, 7, 0, 2, … tokens."""
    sizes, step = [], request
    while sum(sizes) < length:
        sizes.append(min((3, 1, 4, 7, 0, 2, 12)[step % 7], length - sum(sizes)))
        step += 1
    return sizes


SPLITS = (at_once, one_by_one, in_pieces)

# Layout


def test_bytes_of_a_page():
    assert ops.kv_cache_bytes(64) == 65 * 576  # 64 · 584, rounded up
    assert ops.kv_cache_bytes(2) == 3 * 576
    assert ops.kv_cache_bytes(1, 128) == 2 * 192
    for given, message in (((3,), "page_size must be a power of two, got 3"), ((4, 64), "must be 128, 256 or 512")):
        with pytest.raises(ValueError, match=message):
            ops.kv_cache_bytes(*given)


FORMS = [("kv", 128, 1), ("kv", 512, 4), ("fp8", 128, 4), ("fp8", 64, 16), ("mxfp4", 128, 4)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("format", "d", "page_size"), FORMS)
@pytest.mark.parametrize("name", INSERTS)
def test_every_byte(name, format, d, page_size, split):
    """However the tokens come, the entries are the dense operator's; padding and other slots stay as they were."""
    feed = Feed(name, d=d, format=format, page_size=page_size, hadamard=format == "mxfp4")
    feed.skipped = {(0, 2), (2, 0)}
    feed.run(split, padding=2)
    assert feed.cache.tolist() == feed.expected()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("ratio", "n", "spare"), [(4, 4, 0), (3, 1, 2), (16, 8, 8), (1, 2, 0)])
@pytest.mark.parametrize("name", INSERTS)
def test_the_state_holds_the_last_rows(name, ratio, n, spare, split):
    feed = Feed(name, ratio=ratio, n=n, spare=spare)
    feed.run(split, padding=1)
    assert feed.cache.tolist() == feed.expected()
    expected, ring = torch.full_like(feed.state, math.nan), n * feed.table.shape[1]
    for request, length in enumerate(feed.lengths):
        for position in range(max(0, length - ring), length):
            page = feed.table[request, position // n % feed.table.shape[1]]
            expected[page, position % n, 0] = feed.kv[request][position].float()
            bias = feed.shared["position_bias"][position % ratio]
            expected[page, position % n, 1] = feed.gate[request][position].float() + bias
    assert_same_bits([feed.state], [expected])


@pytest.mark.parametrize("name", INSERTS)
def test_tokens_that_are_taken_back(name):
    """Four tokens a call, of which some are wrong and given again: as if they had never been."""
    feed = Feed(name, (40,), ratio=4, spare=4)
    right = feed.kv[0].clone()
    step = 0
    while feed.fed[0] < 40:
        before, accepted = feed.fed[0], 1 + step % 4
        count = min(4, 40 - before)
        feed.kv[0][before + accepted :] += 1
        getattr(ops, name)(**feed.call([count]), **feed.options)
        feed.kv[0].copy_(right)
        feed.fed[0] = min(before + accepted, before + count)
        step += 1
    assert feed.cache.tolist() == feed.expected()


def test_values_that_are_not_finite():
    feed = Feed("compress_hca_insert", (8,))
    feed.kv[0][1, 3] = math.nan
    feed.run(at_once)
    page, row = divmod(int(feed.slots[0][0]), 4)
    record = feed.cache[page, row * 192 : row * 192 + 192]
    assert set(record[:64].tolist()) == {0x7F}
    assert set(record[64:].view(torch.int16).tolist()) == {0x7FC0}
    assert feed.cache[page, 4 * 192 + row * 8] == 255
    assert feed.cache.tolist() == feed.expected()


# Reading back


@pytest.mark.parametrize(("d", "page_size"), [(128, 4), (512, 64), (256, 1)])
def test_round_trip(d, page_size):
    feed = Feed("compress_csa_insert", (41, 22), d=d, page_size=page_size)
    table = torch.arange(2 * (-(-10 // page_size))).flip(0).view(2, -1)
    feed.cache = torch.full((table.numel(), ops.kv_cache_bytes(page_size, d)), 0xA5, dtype=torch.uint8)
    entry = torch.arange(10)
    feed.slots = [row[entry // page_size] * page_size + entry % page_size for row in table]
    feed.run(in_pieces)
    lengths = torch.tensor([10, 5])
    options = {"head_dim": d, "page_size": page_size}
    back = ops.kv_load(feed.cache, table, lengths, **options)
    assert back.shape == (2, table.shape[1] * page_size, d) and back.dtype == torch.bfloat16
    for request, length in enumerate(lengths.tolist()):
        kv, gate = feed.kv[request][None], feed.gate[request][None]
        rounded = ops.compress_csa(kv, gate, **feed.shared, round_nope=True)[0, :length]
        assert torch.equal(back[request, :length], rounded)
        assert not back[request, length:].any()
    shorter = ops.kv_load(feed.cache, table, lengths.clamp(max=7).int(), **options, max_length=7)
    assert torch.equal(shorter[0], back[0, :7])


# Registration and bad input


@pytest.mark.parametrize("name", INSERTS)
def test_opcheck(name):
    results = torch.library.opcheck(
        getattr(torch.ops.dsv4, name).default, (), Feed(name).call([9, 0, 4, 1], 2) | {"page_size": 4}
    )
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


def test_opcheck_of_load():
    cache = torch.zeros(3, ops.kv_cache_bytes(4), dtype=torch.uint8)
    given = (cache, torch.tensor([[0, 2]]), torch.tensor([7]))
    results = torch.library.opcheck(torch.ops.dsv4.kv_load.default, given, {"page_size": 4})
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("kv", lambda x: x[:, 1:], r"kv must have shape \[10, 256\], got \[10, 255\]"),
        ("gate", lambda x: x.float(), "gate must be bfloat16, got float32"),
        ("positions", lambda x: x[1:], r"positions must have shape \[10\], got \[9\]"),
        ("positions", lambda x: x.flip(0), "the tokens of a request must have successive positions"),
        ("positions", lambda x: x - 1, "positions must not be negative, got -1"),
        ("positions", lambda x: x + 1000, r"cos and sin must have a row for position 100\d, got 640 rows"),
        ("requests", lambda x: x + 4, "requests must be below 2, the rows of state_table, got 5"),
        ("starts", lambda x: x.clamp(max=5), "starts must say where each request's tokens begin"),
        ("starts", lambda x: x[:-1], r"starts must have shape \[3\], got \[2\]"),
        ("requests", lambda x: x.float(), "requests must be int32 or int64, got float32"),
        ("state", lambda x: x.half(), "state must be float32, got float16"),
        ("state", lambda x: x[..., :128], r"state must have shape \[any, any, 2, 256\], got"),
        ("state_table", lambda x: x[:, :1], "room for the 8 rows of a window, got 4 rows a request"),
        ("state_table", lambda x: x - 90, "state_table must hold pages in"),
        ("cache", lambda x: x[:, :703], "a page of 4 kv entries takes 800 bytes, cache has 703 a page"),
        ("cache", lambda x: x[:, 4:], "pages of cache must begin at multiples of 8 bytes, got page stride 816"),
        ("slots", lambda x: torch.full_like(x, -2), r"slots must be in \[-1, 20\), got -2 to -2"),
        ("cos", lambda x: x[:, :16], r"sin must have shape \[640, 16\], got \[640, 32\]"),
    ],
)
def test_bad_tensors(key, change, message):
    tensors = Feed("compress_csa_insert", (20, 60)).call([7, 3])
    tensors["cache"] = torch.zeros(5, 816, dtype=torch.uint8)
    tensors["slots"][:] = 0
    tensors[key] = change(tensors[key])
    with pytest.raises(ValueError, match=f"dsv4::compress_csa_insert: .*{message}|{message}"):
        ops.compress_csa_insert(**tensors, page_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp4"}, "format must be 'kv', 'fp8' or 'mxfp4', got 'fp4'"),
        ({"hadamard": True}, "hadamard is for the indexer's records"),
        ({"page_size": 6}, "page_size must be a power of two, got 6"),
        ({"implementation": "cuda"}, "no implementation 'cuda'; it has cutedsl, triton, reference"),
    ],
)
def test_bad_options(options, message):
    feed = Feed("compress_hca_insert")
    with pytest.raises(ValueError, match=f"dsv4::compress_hca_insert.*{message}"):
        ops.compress_hca_insert(**feed.call([1, 1, 1, 1]), **{**feed.options, **options})


# Kernels, by bits


def check(name: str, split, implementation: str, move=lambda tensors: tensors, padding: int = 2, **changes) -> None:
    """The kernels against the reference: cache and state after every call."""
    ours, reference = Feed(name, **changes), Feed(name, **changes)
    for feed in (ours, reference):
        feed.skipped = {(0, 2), (2, 0)}
    ours.integers = torch.int32
    state, cache = move({"state": ours.state, "cache": ours.cache}).values()
    pieces = [split(request, length) for request, length in enumerate(ours.lengths)]
    for step in range(max(map(len, pieces))):
        counts = [sizes[step] if step < len(sizes) else 0 for sizes in pieces]
        given = move(ours.call(counts, padding)) | {"state": state, "cache": cache}
        getattr(ops, name)(**given, **ours.options, implementation=implementation)
        getattr(ops, name)(**reference.call(counts, padding), **reference.options)
        assert_same_bits([cache, state], [reference.cache, reference.state], (name, counts, changes))


KERNEL_CASES = [
    {"d": 512, "page_size": 4},
    {"d": 128, "format": "fp8", "page_size": 16, "hadamard": True},
    {"d": 128, "format": "mxfp4", "spare": 5},
    {"d": 256, "ratio": 3, "n": 1, "parameters": torch.bfloat16},
    {"d": 64, "format": "mxfp4", "dtype": torch.float32},
]
LONG = {"d": 512, "ratio": 128, "lengths": (300, 128, 511, 127), "n": 64}


@pytest.mark.gpu
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
@pytest.mark.parametrize("name", INSERTS)
def test_bytes_on_the_gpu(name, case, split):
    pytest.importorskip("triton")
    check(name, split, "triton", on_gpu, **case)


def in_long_pieces(request: int, length: int) -> list[int]:
    """Pieces of 100, 1, 130, 3, 256, … tokens."""
    sizes, step = [], request
    while sum(sizes) < length:
        sizes.append(min((100, 1, 130, 3, 256)[step % 5], length - sum(sizes)))
        step += 1
    return sizes


def all_but_one(request: int, length: int) -> list[int]:
    """The last token alone: its window has one row of the call, all others are in the state."""
    return [length - 1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("split", [at_once, in_long_pieces, all_but_one])
@pytest.mark.parametrize("name", INSERTS)
def test_long_windows_on_the_gpu(name, split):
    pytest.importorskip("triton")
    for spare in (0, 64, 400):
        check(name, split, "triton", on_gpu, **LONG, spare=spare)


@pytest.mark.gpu
def test_what_lies_outside_is_skipped_on_a_gpu():
    pytest.importorskip("triton")
    feed = Feed("compress_csa_insert")
    tensors = on_gpu(feed.call([8, 4, 8, 1]))
    tensors["slots"][:] = torch.tensor([1 << 40, -(1 << 40), 1 << 31, -2, 4 * len(feed.cache)], device="cuda").repeat(
        5
    )[:21]
    before = tensors["cache"].clone()
    ops.compress_csa_insert(**tensors, **feed.options, implementation="triton")
    tensors["state_table"].fill_(1 << 40)
    tensors["requests"].fill_(1 << 30)
    state = tensors["state"].clone()
    ops.compress_csa_insert(**tensors, **feed.options, implementation="triton")
    assert_same_bits([tensors["cache"], tensors["state"]], [before, state])


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "page_size"), [(128, 4), (512, 64), (256, 1)])
def test_load_on_the_gpu(d, page_size):
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    cache = torch.randint(0, 256, (40, ops.kv_cache_bytes(page_size, d)), dtype=torch.uint8, generator=generator)
    table, lengths = torch.randint(0, 40, (5, 6), generator=generator), torch.tensor([0, 1, 6, 3, 2]) * page_size
    for length in (None, 6 * page_size):
        options = {"head_dim": d, "page_size": page_size, "max_length": length}
        expected = ops.kv_load(cache, table, lengths, **options)
        got = ops.kv_load(cache.cuda(), table.cuda(), lengths.int().cuda(), **options)
        assert_same_bits([got], [expected])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "ratio"), [("compress_csa_insert", 4), ("compress_hca_insert", 128)])
def test_cuda_graph_replay_sees_new_inputs(name, ratio):
    pytest.importorskip("triton")
    sizes = {"lengths": (256, 128, 130, 300), "ratio": ratio, "d": 512}
    feed = Feed(name, **sizes)
    counts = [2, 128, 130, 128]
    feed.fed = [254, 0, 0, 128]
    feed.state.zero_()
    given = on_gpu(feed.call(counts, 3))
    getattr(ops, name)(**given, **feed.options)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        getattr(ops, name)(**given, **feed.options)
    for seed in (5, 6):
        fresh = Feed(name, **sizes, seed=seed)
        fresh.fed = [254, 0, 0, 128]
        fresh.state.zero_()
        tensors = fresh.call(counts, 3)
        for key, value in given.items():
            value.copy_(tensors[key])
        captured.replay()
        getattr(ops, name)(**tensors, **fresh.options)
        assert_same_bits([given["cache"], given["state"]], [fresh.cache, fresh.state])


@pytest.mark.gpu
def test_the_token_count_compiles_nothing():
    """One kernel serves every number of tokens, requests and pages."""
    triton = pytest.importorskip("triton")
    compiled, hook = [], triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(kwargs["fn"].name)
    try:
        for lengths in ((1,), (16,), (17, 16), (160, 1, 1), (1,) * 16, (1,) * 33):
            feed = Feed("compress_csa_insert", lengths, ratio=5, spare=len(lengths))
            ops.compress_csa_insert(**on_gpu(feed.call(list(lengths))), **feed.options, implementation="triton")
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert len(compiled) == 1, compiled
