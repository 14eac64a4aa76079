"""The TileLang kernels of mHC: compiled for Hopper anywhere; on a GPU what test_hyper_connection.py does not cover."""

import re
import shutil
import subprocess

import pytest
import torch

from dsv4_fusion.ops import hyper_connection as ops

tilelang = pytest.importorskip("tilelang")
from dsv4_fusion.ops.tilelang import hyper_connection as kernels  # noqa: E402

TOKENS = (1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 128, 129, 192, 256, 1000, 4096)


# Without a GPU


PROGRAMS = [  # every operator; both variants where the two launches are largest and smallest
    (4096, 4, 4, True, "pre", True, False),
    (4096, 4, 4, True, "pre", True, True),
    (4096, 4, 4, False, "pre", False, False),
    (4096, 1, 4, False, "pre", True, False),
    (4096, 1, 4, False, "pre", True, True),
    (4096, 4, 4, True, "", False, False),
    (4096, 4, 4, True, "", False, True),
    (4096, 4, 4, True, "head", True, True),
    (4096, 4, 4, False, "head", True, False),
    (7168, 4, 4, True, "pre", True, False),
    (7168, 4, 4, True, "pre", True, True),
    (192, 8, 8, True, "pre", True, True),
]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_compiles_for_hopper_without_spills(tmp_path):
    """In one file: nvcc takes longer to read the headers than to compile a program."""
    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    passes = {getattr(name, "value", name): value for name, value in kernels.PASS_CONFIGS.items()}
    launches, sources = {}, []
    for index, key in enumerate(PROGRAMS):
        program = kernels._program(*key).with_attr("global_symbol", f"program_{index}")
        with target, tilelang.tvm.transform.PassContext(opt_level=3, config=passes):
            sources.append(tilelang.lower(program, target=target).kernel_source)
        mixes = key[4]
        assert sources[-1].count("tl::mma_sync") == (3 if mixes else 0), key
        assert ("cudaGridDependencySynchronize" in sources[-1]) == bool(mixes), key
        launches |= {f"program_{index}_kernel{suffix}": key for suffix in (("", "_1") if mixes else ("",))}
    (tmp_path / "kernels.cu").write_text("\n".join(sources))
    command = [
        *("nvcc", "-cubin", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"),
        *(f"-I{path}" for path in (tilelang.env.TILELANG_TEMPLATE_PATH, tilelang.env.CUTLASS_INCLUDE_DIR)),
        *("-DTL_ENABLE_L2_PREFETCH=1", "-o", str(tmp_path / "kernels.cubin"), str(tmp_path / "kernels.cu")),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    spills = re.findall(r"Function properties for (\w+)\n.* (\d+) bytes spill stores", result.stderr)
    assert sorted(name for name, _ in spills) == sorted(launches)
    for name, stored in spills:
        allowed = 64 if launches[name][2] == 8 else 0  # 8 streams fill the registers; no model has them yet
        assert int(stored) <= allowed, (launches[name], name, stored)


# On a GPU


def make(tokens, hidden, hc=4, head=False, seed=0):
    """Realistic weights: fn ~ K^-½, and scales as the checkpoints have them."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    mix = hc if head else (2 + hc) * hc
    scale = torch.tensor([2.0] if head else [2.0, 0.02, 0.25], device="cuda")
    placing = (
        normal(tokens, hidden).bfloat16(),
        normal(tokens, hc, hidden).bfloat16(),
        2 * torch.sigmoid(normal(tokens, hc)),
        ops.sinkhorn_ref(normal(tokens, hc, hc), 1e-6, 20),
    )
    parameters = (normal(mix, hc * hidden) * (hc * hidden) ** -0.5, normal(mix) * 0.5, scale, 1 + 0.1 * normal(hidden))
    return placing, parameters


def double(tensors):
    return [tensor.double() for tensor in tensors]


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check_pre(results, streams, parameters):
    """post and comb as accurate as fp32; collapsed within the two roundings to bf16 that the operator makes."""
    want = ops.hc_pre_ref(streams.double(), *double(parameters))
    for got, expected, bound in zip(results, want, (1e-6, 1e-6, 4e-3), strict=True):
        assert got.shape == expected.shape
        assert got.is_contiguous()
        assert error(got, expected) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("hc", [2, 4, 8])
@pytest.mark.parametrize("hidden", [64, 192, 4096, 5120, 7168, 16384])
def test_matches_float64(hidden, hc):
    for tokens in (1, 17, 600):
        (output, streams, post, comb), parameters = make(tokens, hidden, hc)
        new, *results = kernels.hc_post_pre(output, streams, post, comb, *parameters)
        assert error(new, ops.hc_post_ref(*double((output, streams, post, comb)))) < 2e-3
        check_pre(results, new, parameters)
        check_pre(kernels.hc_pre(streams, *parameters), streams, parameters)
        assert torch.equal(kernels.hc_post(output, streams, post, comb), new)
        _, head = make(tokens, hidden, hc, head=True)
        want = ops.hc_head_ref(new.double(), *double(head))
        assert error(kernels.hc_post_head(output, streams, post, comb, *head), want) < 4e-3
        assert error(kernels.hc_head(new, *head), want) < 4e-3
        assert error(kernels.hc_head(new, *head[:3]), ops.hc_head_ref(new.double(), *double(head[:3]))) < 4e-3


@pytest.mark.gpu
def test_every_element_is_written(monkeypatch):
    """Outputs and workspace are poisoned before the launch."""
    made = []

    several = kernels.several

    def poisoned(layouts, device):
        tensors = several(layouts, device)
        made.extend(tensor.fill_(float("nan")) for tensor in tensors)
        return tensors

    monkeypatch.setattr(kernels, "several", poisoned)
    for tokens in (1, 33, 700):
        made.clear()
        placing, parameters = make(tokens, 4096)
        for result in kernels.hc_post_pre(*placing, *parameters):
            assert torch.isfinite(result).all()
        assert len(made) == 5


def variant_rows(function, hidden):
    """Where a row's results differ from those it has in the largest batch: (tokens, first row)."""
    (*placing,), parameters = make(max(TOKENS), hidden)
    whole = function(*placing, *parameters)
    return [
        (tokens, first)
        for tokens in TOKENS
        for first in {0, 3, max(TOKENS) - tokens}
        if first + tokens <= max(TOKENS)
        and not all(
            torch.equal(part, full[first : first + tokens])
            for part, full in zip(
                function(*(t[first : first + tokens] for t in placing), *parameters), whole, strict=True
            )
        )
    ]


@pytest.mark.gpu
def test_the_invariance_test_sees_a_split_that_follows_the_batch():
    def following(output, streams, post, comb, fn, base, scale, norm_weight):
        flat = streams.flatten(-2).float()
        splits = 8 if len(flat) < 64 else 2
        parts = zip(flat.chunk(splits, -1), fn.chunk(splits, -1), strict=True)
        mixes = torch.stack([(x.unsqueeze(-2) * w).sum(-1) for x, w in parts]).sum(0)
        return [mixes]

    assert variant_rows(following, 512)


@pytest.mark.gpu
def test_no_tokens_odd_strides_and_leading_dimensions():
    placing, parameters = make(0, 64)
    assert [tuple(t.shape) for t in kernels.hc_post_pre(*placing, *parameters)] == [
        (0, 4, 64), (0, 4), (0, 4, 4), (0, 64),
    ]  # fmt: skip
    (output, streams, post, comb), (fn, base, scale, weight) = make(24, 192)
    want = kernels.hc_post_pre(output, streams, post, comb, fn, base, scale, weight)
    split = [t.unflatten(0, (4, 6)) for t in (output, streams, post, comb)]
    for got, expected in zip(kernels.hc_post_pre(*split, fn, base, scale, weight), want, strict=True):
        assert torch.equal(got, expected.unflatten(0, (4, 6)))
    strided = [torch.stack((t, t), -1)[..., 0] for t in (output, streams, post, comb, fn, base, scale, weight)]
    assert not strided[1].is_contiguous()
    shifted = torch.cat((streams.flatten()[:1], streams.flatten()))[1:].view_as(streams)
    assert shifted.data_ptr() % 16
    for changed in (strided, [output, shifted, post, comb, fn, base, scale, weight]):
        for got, expected in zip(kernels.hc_post_pre(*changed), want, strict=True):
            assert torch.equal(got, expected)
    lowered = [t.bfloat16() for t in (fn, base, scale, weight)]
    for got, expected in zip(
        kernels.hc_post_pre(output, streams, post, comb, *lowered),
        kernels.hc_post_pre(output, streams, post, comb, *(t.float() for t in lowered)),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.gpu
def test_two_compiles_serve_all_token_counts():
    kernels._compiled.clear()
    placing, parameters = make(4096, 192)
    for tokens in TOKENS:
        kernels.hc_post_pre(*(t[:tokens] for t in placing), *parameters)
    assert list(kernels._compiled) == [(192, 4, 4, True, "pre", True, wide) for wide in (False, True)]
