"""mHC operators: the references against a loop of their own, checks, fakes, and every kernel against float64."""

from __future__ import annotations

import contextlib
import logging
import math

import pytest
import torch

from dsv4_fusion import ops
from dsv4_fusion.ops import _library

HC = 4
OPS = ("hc_pre", "hc_post", "hc_post_pre", "hc_head", "hc_post_head")
FORMS = (*OPS, "hc_pre of one stream")  # that stands for all: the operator's name, then what is special


def arguments(
    name: str,
    lead: tuple[int, ...] = (3,),
    hidden: int = 64,
    hc: int = HC,
    dtype: torch.dtype = torch.float32,
    norm: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """Random inputs of one operator, of the size that trained weights give."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    mix = hc if "head" in name else (2 + hc) * hc
    every = {
        "output": normal(*lead, hidden).to(dtype),
        "hidden_streams": normal(*lead, 1 if "one stream" in name else hc, hidden).to(dtype),
        "post": normal(*lead, hc).sigmoid() * 2,
        "comb": normal(*lead, hc, hc).softmax(-1),
        "fn": normal(mix, hc * hidden) * (hc * hidden) ** -0.5,
        "base": normal(mix),
        "scale": torch.tensor([2.0, 0.02, 0.25])[: 1 if "head" in name else 3],
        "norm_weight": normal(hidden) + 1 if norm else None,
    }
    wanted = [] if name == "hc_post" else ["hidden_streams", "fn", "base", "scale", "norm_weight"]
    wanted += ["output", "hidden_streams", "post", "comb"] if "post" in name else []
    return {key: value.to(device) if value is not None else None for key, value in every.items() if key in wanted}


def outputs(name: str, tensors: dict, **options) -> tuple[torch.Tensor, ...]:
    result = getattr(ops, name.split()[0])(**tensors, **options)
    return result if isinstance(result, tuple) else (result,)


def widened(tensors: dict) -> dict:
    return {key: value.double() if value is not None else None for key, value in tensors.items()}


def distance(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


# The references, against arithmetic written out number by number


def written_out(output, streams, post, comb, fn, base, scale, weight, iters, rms_eps, hc_eps, norm_eps):
    """One token's boundary, in Python floats; the streams after the post, then post, comb and collapsed."""
    hc, hidden = len(streams), len(streams[0])
    new = [
        [post[k] * output[d] + sum(comb[j][k] * streams[j][d] for j in range(hc)) for d in range(hidden)]
        for k in range(hc)
    ]
    flat = [value for stream in new for value in stream]
    root = math.sqrt(sum(value * value for value in flat) / len(flat) + rms_eps)
    mixes = [sum(w * value for w, value in zip(row, flat, strict=True)) / root for row in fn]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    pre = [sigmoid(mixes[k] * scale[0] + base[k]) + hc_eps for k in range(hc)]
    new_post = [2 * sigmoid(mixes[hc + k] * scale[1] + base[hc + k]) for k in range(hc)]
    cells = [mixes[2 * hc + i] * scale[2] + base[2 * hc + i] for i in range(hc * hc)]
    rows = [[math.exp(value) for value in cells[i * hc : (i + 1) * hc]] for i in range(hc)]
    matrix = [[value / sum(row) + hc_eps for value in row] for row in rows]
    for turn in range(2 * iters - 1):
        if turn % 2 == 0:
            sums = [sum(matrix[i][j] for i in range(hc)) + hc_eps for j in range(hc)]
            matrix = [[matrix[i][j] / sums[j] for j in range(hc)] for i in range(hc)]
        else:
            matrix = [[value / (sum(row) + hc_eps) for value in row] for row in matrix]
    collapsed = [sum(pre[k] * new[k][d] for k in range(hc)) for d in range(hidden)]
    if weight is not None:
        norm = math.sqrt(sum(value * value for value in collapsed) / hidden + norm_eps)
        collapsed = [w * value / norm for w, value in zip(weight, collapsed, strict=True)]
    return new, new_post, matrix, collapsed


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("hc", "iters"), [(2, 1), (4, 3), (3, 20)])
def test_reference_is_the_mathematics(hc, iters, norm):
    tensors = widened(arguments("hc_post_pre", (2,), 8, hc, norm=norm))
    eps = {"rms_eps": 0.3, "hc_eps": 0.02, "norm_eps": 0.1}  # large, so that a misplaced one shows
    got = ops.hc_post_pre(**tensors, sinkhorn_iters=iters, **eps)
    for token in range(2):
        own = [tensors[key][token].tolist() for key in ("output", "hidden_streams", "post", "comb")]
        shared = [tensors[key].tolist() if tensors[key] is not None else None for key in list(tensors)[4:]]
        expected = written_out(*own, *shared, iters, **eps)
        for value, want in zip(got, expected, strict=True):
            torch.testing.assert_close(value[token], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_joined_references_are_their_parts():
    tensors = arguments("hc_post_pre", (2, 3), dtype=torch.bfloat16)
    post = {key: tensors[key] for key in ("output", "hidden_streams", "post", "comb")}
    pre = {key: tensors[key] for key in ("fn", "base", "scale", "norm_weight")}
    streams = ops.hc_post(**post)
    for got, expected in zip(ops.hc_post_pre(**tensors), (streams, *ops.hc_pre(streams, **pre)), strict=True):
        assert torch.equal(got, expected)
    head = {key: value for key, value in arguments("hc_post_head", (2, 3), dtype=torch.bfloat16).items()}
    weights = {key: head[key] for key in ("fn", "base", "scale", "norm_weight")}
    assert torch.equal(ops.hc_post_head(**head), ops.hc_head(ops.hc_post(**{k: head[k] for k in post}), **weights))


def test_one_stream_stands_for_all():
    tensors = arguments("hc_pre of one stream", (2, 3), dtype=torch.bfloat16)
    same = tensors | {"hidden_streams": tensors["hidden_streams"].expand(2, 3, HC, 64).contiguous()}
    for got, expected in zip(ops.hc_pre(**tensors), ops.hc_pre(**same), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=r"dsv4::hc_pre: fn must have shape \[24, 256\], got \[23, 256\]"):
        ops.hc_pre(**tensors | {"fn": tensors["fn"][1:]})
    head = arguments("hc_head", (2, 3))
    with pytest.raises(ValueError, match=r"dsv4::hc_head: fn must have shape \[1, 64\], got \[4, 256\]"):
        ops.hc_head(**head | {"hidden_streams": head["hidden_streams"][..., :1, :]})


def test_comb_is_doubly_stochastic():
    _, comb, _ = ops.hc_pre(**arguments("hc_pre", (50,)))
    assert (comb > 0).all()
    for dim in (-1, -2):
        torch.testing.assert_close(comb.sum(dim), torch.ones(50, HC), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 0, 3)])
def test_shapes(name, lead):
    tensors = arguments(name, lead, dtype=torch.bfloat16)
    expected = {
        "streams": ([*lead, HC, 64], torch.bfloat16),
        "post": ([*lead, HC], torch.float32),
        "comb": ([*lead, HC, HC], torch.float32),
        "collapsed": ([*lead, 64], torch.bfloat16),
    }
    kinds = {
        "hc_pre": ("post", "comb", "collapsed"),
        "hc_post": ("streams",),
        "hc_post_pre": ("streams", "post", "comb", "collapsed"),
    }
    for got, kind in zip(outputs(name, tensors), kinds.get(name.split()[0], ("collapsed",)), strict=True):
        assert (list(got.shape), got.dtype) == expected[kind]
        assert got.is_contiguous()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype):
    overload = getattr(torch.ops.dsv4, name.split()[0]).default
    tensors = arguments(name, (2, 3), dtype=dtype)
    results = torch.library.opcheck(overload, (), tensors)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


# Bad input


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("hc_pre", "hidden_streams", lambda x: x[0, 0], "hidden_streams must be .*got shape"),
        ("hc_pre", "hidden_streams", lambda x: x.int(), "hidden_streams must be .*got torch.int32"),
        ("hc_pre", "hidden_streams", lambda x: x[..., :0], "no hidden dimension"),
        ("hc_pre", "fn", lambda x: x[:, 1:], r"fn must have shape \[24, 256\], got \[24, 255\]"),
        ("hc_pre", "fn", lambda x: x[:23], r"fn must have shape \[24, 256\], got \[23, 256\]"),
        ("hc_pre", "fn", lambda x: x.to("meta"), "fn is on meta, hidden_streams on cpu"),
        ("hc_pre", "base", lambda x: x[None], r"base must have shape \[24\], got \[1, 24\]"),
        ("hc_pre", "base", lambda x: x.long(), "base must be floating point, got torch.int64"),
        ("hc_pre", "scale", lambda x: x[:1], r"scale must have shape \[3\], got \[1\]"),
        ("hc_pre", "norm_weight", lambda x: x[1:], r"norm_weight must have shape \[64\], got \[63\]"),
        ("hc_post", "output", lambda x: x[1:], r"output must have shape \[3, 64\], got \[2, 64\]"),
        ("hc_post", "output", lambda x: x.bfloat16(), "output is torch.bfloat16, hidden_streams torch.float32"),
        ("hc_post", "post", lambda x: x[:, 1:], r"post must have shape \[3, 4\], got \[3, 3\]"),
        ("hc_post", "comb", lambda x: x[..., 1:], r"comb must have shape \[3, 4, 4\], got \[3, 4, 3\]"),
        ("hc_head", "fn", lambda x: x[1:], r"fn must have shape \[4, 256\], got \[3, 256\]"),
        ("hc_head", "scale", lambda x: x[0], r"scale must have shape \[1\], got \[\]"),
    ],
)
def test_bad_tensors(name, key, change, message):
    tensors = arguments(name)
    tensors[key] = change(tensors[key])
    with pytest.raises(ValueError, match=rf"dsv4::{name}: .*{message}"):
        outputs(name, tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rms_eps": -1e-6}, "rms_eps must be a positive, finite number, got -1e-06"),
        ({"hc_eps": 0.0}, "hc_eps must be .*got 0.0"),
        ({"norm_eps": math.nan}, "norm_eps must be .*got nan"),
        ({"norm_eps": math.inf}, "norm_eps must be .*got inf"),
        ({"sinkhorn_iters": 0}, "sinkhorn_iters must be at least 1, got 0"),
        ({"implementation": "cuda"}, "has no implementation 'cuda'; it has .*triton.*reference"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ops.hc_pre(**arguments("hc_pre"), **options)


@pytest.mark.parametrize("name", OPS)
def test_grad_is_refused(name):
    tensors = arguments(name)
    tensors["hidden_streams"].requires_grad_()
    with pytest.raises(ValueError, match=f"dsv4::{name}: an input requires grad.*no_grad"):
        outputs(name, tensors)
    with torch.no_grad():
        assert all(torch.isfinite(value).all() for value in outputs(name, tensors))


# Choice of an implementation


def test_a_missing_compiler_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'triton': triton is not installed \(pip install 'dsv4_fusion\[cuda\]'\)"):
        ops.hc_pre(**arguments("hc_pre"), implementation="triton")


def test_a_kernel_asked_for_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="triton kernels run on CUDA devices, got a tensor on cpu"):
        ops.hc_pre(**arguments("hc_pre"), implementation="triton")


def test_the_next_implementation_is_taken_and_said_once(monkeypatch, caplog):
    """On a GPU whose compilers are missing. The GPU is feigned: no kernel is launched."""

    class OnGpu:
        device = torch.device("cuda", 0)
        dtype = torch.float32
        shape = (1, HC, 64)

    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)
    overloads = []
    monkeypatch.setattr(_library, "_preparers", {})
    monkeypatch.setattr(_library, "operators", {})
    monkeypatch.setattr(_library._library, "define", lambda *a, **k: None)
    monkeypatch.setattr(_library._library, "impl", lambda name, function, key: overloads.append(function))
    monkeypatch.setattr(torch.library, "register_fake", lambda *a, **k: None)
    triton = _library.Implementation("triton", "nowhere:nothing")
    _library.define(
        "hc_pre(Tensor x, *, str? implementation=None) -> Tensor",
        reference=lambda x: "reference",
        fake=lambda x: x,
        check=lambda x: None,
        implementations=[triton],
    )
    (real,) = overloads
    _library._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="dsv4_fusion"):
        assert [real(OnGpu()) for _ in range(3)] == ["reference"] * 3
    said = [record.message for record in caplog.records]
    assert sum("triton is not installed" in message for message in said) == 1
    assert sum("runs its PyTorch reference, which is slow" in message for message in said) == 1
    with pytest.raises(ValueError, match="pip install"):
        real(OnGpu(), implementation="triton")


# Calls: what is remembered of them, and what is prepared


def test_a_remembered_call_still_refuses_what_requires_grad():
    given = arguments("hc_pre")
    with torch.no_grad():
        ops.hc_pre(**given)
        ops.hc_pre(**given | {"fn": given["fn"].clone().requires_grad_()})
    ops.hc_pre(**given)
    with pytest.raises(ValueError, match="requires grad"):
        ops.hc_pre(**given | {"fn": given["fn"].clone().requires_grad_()})


def test_a_remembered_call_still_checks_shapes_dtypes_and_options():
    given = arguments("hc_pre")
    ops.hc_pre(**given)
    for wrong in ({"base": given["base"][1:]}, {"scale": given["scale"].long()}, {"hc_eps": 0.0}):
        with pytest.raises(ValueError, match="dsv4::hc_pre"):
            ops.hc_pre(**given | wrong)


def test_a_call_that_something_intercepts_goes_through_the_dispatcher():
    given = arguments("hc_pre")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ops.hc_pre(**{k: v if v is None else mode.from_tensor(v) for k, v in given.items()})
    assert all(isinstance(value, torch._subclasses.FakeTensor) for value in fake)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda: ops.hc_pre(**given))().graph
    assert any(node.target is torch.ops.dsv4.hc_pre.default for node in graph.nodes)


def test_what_was_prepared_begins_to_compile_with_the_first_call(monkeypatch):
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(1, device="cuda:0")
    prepared = []

    class Kernel:
        def prepare(self, x, *, eps):
            prepared.append((x, eps))

    monkeypatch.setattr(_library, "_preparers", {})
    monkeypatch.setattr(_library, "operators", {})
    monkeypatch.setattr(_library._library, "define", lambda *a, **k: None)
    monkeypatch.setattr(_library._library, "impl", lambda *a: None)
    monkeypatch.setattr(torch.library, "register_fake", lambda *a, **k: None)
    monkeypatch.setattr(_library.Implementation, "load", lambda self: Kernel() if self.name == "triton" else None)
    monkeypatch.setattr(_library.Implementation, "unavailable", lambda self, device: None)
    call = _library.define(
        "hc_pre(Tensor x, *, float eps, str? implementation=None) -> Tensor",
        reference=lambda x, eps: x,
        fake=lambda x: x,
        check=lambda x, eps: None,
        implementations=[
            _library.Implementation("tilelang", "", limits=lambda x, eps: "too wide"),
            _library.Implementation("triton", ""),
        ],
    )
    monkeypatch.setattr(_library, "_prepared", [])
    _library.prepare(torch.ops.dsv4.hc_pre.default, x, eps=1.0)
    _library.prepare(torch.ops.dsv4.hc_pre.default, torch.empty(1, device="meta"), eps=1.0)  # nothing will be launched
    _library.prepare(torch.ops.dsv4.hc_pre.default, None, eps=1.0)  # fails when its own call does
    _library.prepare(torch.ops.aten.relu.default, x)
    assert not prepared
    call(torch.ones(1), eps=2.0, implementation="reference")
    assert prepared == [(x, 1.0)] and not _library._prepared


@pytest.mark.gpu
def test_what_was_rehearsed_compiles_nothing_more():
    triton = pytest.importorskip("triton")
    shapes = {"kv": (1, 256, 64), "gate": (1, 256, 64), "bias": (128, 64), "norm": (64,)}
    shapes |= {"cos": (256, 8), "sin": (256, 8)}
    with torch._subclasses.FakeTensorMode():
        fake = [torch.empty(shape, device="cuda") for shape in shapes.values()]
    _library.prepare(torch.ops.dsv4.compress_hca.default, *fake, norm_eps=1e-6)
    ops.hc_post(**arguments("hc_post", (3,), 64, device="cuda"), implementation="triton")
    compiled, hook = [], triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(kwargs["fn"].name)
    try:
        ops.compress_hca(*[torch.randn(shape, device="cuda") for shape in shapes.values()])
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert not compiled


# Kernels on the GPU

TOKENS = (1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 128, 129, 192, 256, 257, 1000, 4096, 16384)
KERNELS = ("triton", "tilelang")


@pytest.fixture(params=KERNELS)
def implementation(request):
    for module in _library.COMPILERS[request.param]:
        pytest.importorskip(module)
    return request.param


@contextlib.contextmanager
def poisoned():
    """Every tensor that is made without values in here, outputs and workspaces alike, is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_poison():
    with poisoned():
        like = torch.ones(2)
        made = [torch.empty(2), torch.empty_like(like), like.new_empty(2), torch.empty_strided((2,), (1,))]
    assert all(tensor.isnan().all() for tensor in made)


def check_against_float64(name: str, tensors: dict, implementation: str) -> None:
    truth = outputs(name, widened(tensors), implementation="reference")
    reference = outputs(name, tensors, implementation="reference")
    with poisoned():
        results = outputs(name, tensors, implementation=implementation)
    for got, plain, expected in zip(results, reference, truth, strict=True):
        assert got.isfinite().all()
        assert got.dtype == plain.dtype and got.shape == plain.shape and got.is_contiguous()
        assert distance(got, expected) <= 1.05 * distance(plain, expected) + 2e-7  # 2e-7: two fp32 roundings


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 7168])
@pytest.mark.parametrize("norm", [True, False])
def test_post_pre_at_every_token_count(implementation, hidden, norm):
    for tokens in TOKENS if hidden == 4096 or norm else (1, 65, 257):
        tensors = arguments("hc_post_pre", (tokens,), hidden, dtype=torch.bfloat16, norm=norm, device="cuda")
        check_against_float64("hc_post_pre", tensors, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("hc", "hidden"), [(4, 4096), (2, 192), (8, 1024), (4, 7168)])
def test_every_operator(implementation, name, dtype, hc, hidden):
    for tokens in (1, 33, 300):
        tensors = arguments(name, (tokens,), hidden, hc, dtype, device="cuda")
        if implementation == "tilelang" and dtype != torch.bfloat16:
            with pytest.raises(ValueError, match=f"the tilelang kernels do not take {dtype} streams"):
                outputs(name, tensors, implementation=implementation)
            continue
        check_against_float64(name, tensors, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 7168])
@pytest.mark.parametrize("name", FORMS)
def test_a_row_has_the_same_bits_in_every_batch(implementation, name, hidden):
    needle = arguments(name, (1,), hidden, dtype=torch.bfloat16, device="cuda", seed=1)
    alone = outputs(name, needle, implementation=implementation)
    per_token = ("output", "hidden_streams", "post", "comb")
    for tokens in TOKENS[1:]:
        batch = arguments(name, (tokens,), hidden, dtype=torch.bfloat16, device="cuda", seed=2) | {
            key: value for key, value in needle.items() if key not in per_token
        }
        places = sorted({0, tokens // 2, tokens - 1})
        for key in per_token:
            if key in batch:
                batch[key][places] = needle[key]
        for got, expected in zip(outputs(name, batch, implementation=implementation), alone, strict=True):
            for place in places:
                assert torch.equal(got[place], expected[0]), (tokens, place)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_cuda_graph_replay_sees_new_inputs(implementation, tokens):
    tensors = arguments("hc_post_pre", (tokens,), 4096, dtype=torch.bfloat16, device="cuda")
    outputs("hc_post_pre", tensors, implementation=implementation)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = outputs("hc_post_pre", tensors, implementation=implementation)
    fresh = arguments("hc_post_pre", (tokens,), 4096, dtype=torch.bfloat16, device="cuda", seed=9)
    for key, value in tensors.items():
        value.copy_(fresh[key])
    for result in results:
        result.fill_(math.nan)
    captured.replay()
    for got, expected in zip(results, outputs("hc_post_pre", fresh, implementation=implementation), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
def test_two_streams_at_once(implementation):
    sets = [arguments("hc_post_pre", (200,), 4096, dtype=torch.bfloat16, device="cuda", seed=s) for s in (0, 1)]
    alone = [outputs("hc_post_pre", tensors, implementation=implementation) for tensors in sets]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sets]
    results = [[], []]
    for _ in range(20):
        for stream, tensors, kept in zip(streams, sets, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(outputs("hc_post_pre", tensors, implementation=implementation))
    torch.cuda.synchronize()
    for expected, kept in zip(alone, results, strict=True):
        for got in kept:
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_a_device_that_is_not_the_current_one(implementation):
    given = arguments("hc_post_pre", (20,), 4096, dtype=torch.bfloat16, device="cuda:1")
    here = outputs("hc_post_pre", {key: value.to("cuda:0") for key, value in given.items()})
    assert torch.cuda.current_device() == 0
    for got, expected in zip(outputs("hc_post_pre", given, implementation=implementation), here, strict=True):
        assert got.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
        torch.testing.assert_close(got.to("cuda:0"), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_strided_inputs(implementation, name):
    tensors = arguments(name, (40,), 4096, dtype=torch.bfloat16, device="cuda")
    strided = {
        key: torch.stack([value, value], -1)[..., 0] if value is not None else None for key, value in tensors.items()
    }
    assert not strided["hidden_streams"].is_contiguous()
    got = outputs(name, strided, implementation=implementation)
    for value, expected in zip(got, outputs(name, tensors, implementation=implementation), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_no_tokens_on_the_gpu(implementation, name):
    results = outputs(
        name, arguments(name, (0,), 4096, dtype=torch.bfloat16, device="cuda"), implementation=implementation
    )
    assert all(value.numel() == 0 for value in results)
