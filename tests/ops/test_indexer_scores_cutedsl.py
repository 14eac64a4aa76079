"""The CuTe DSL scores: every variant compiles for sm_90a and spills no register; those of pages, against float64."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass")
pytest.importorskip("tvm_ffi")
pytest.importorskip("triton")  # its wheel has the disassembler

import triton

from dsv4_fusion import ops
from dsv4_fusion.ops.cutedsl import indexer_scores as cutedsl_scores
from dsv4_fusion.ops.cutedsl import scores as ragged_kernel
from dsv4_fusion.ops.cutedsl import scores_mxfp4, scores_pieces
from dsv4_fusion.ops.cutedsl import scores_paged as paged_kernel
from dsv4_fusion.ops.indexer_scores import best_ref
from dsv4_fusion.ops.indexer_scores_paged import _cutedsl_paged_limits
from tests.ops import test_indexer_scores as scores
from tests.ops.test_indexer import on_gpu
from tests.ops.test_indexer_scores import poisoned  # noqa: F401

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FP32, BF16, FP8, INT32, INT64 = torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int64
MXFP4 = torch.uint8
VARIANTS = [
    (64, 128, FP8, "causal", (None, INT64), FP32),
    (64, 128, BF16, "all", (None, None), FP32),
    (128, 128, BF16, "range", (INT32, INT64), BF16),
    (32, 64, FP8, "range", (None, INT32), FP32),
    (64, 128, MXFP4, "causal", (None, INT64), FP32),
    (32, 64, MXFP4, "all", (None, None), FP32),
]


@pytest.mark.parametrize("limited", [False, True])
def test_pieces_of_work_are_even(limited):
    """As long as they can be, since each has its queries loaded, or as short as they may get."""
    for queries, keys in ((1, 1), (1, 131072), (528, 8192), (600, 131072), (4096, 1024), (4096, 8192), (8192, 32768)):
        per = scores_pieces.steps(queries, keys, 64, limited, 132)
        steps, groups = -(-keys // scores_pieces.KEYS), -(-queries // 4)
        chunks = -(-steps // per)
        rounds = groups * chunks / 132
        even = math.ceil(rounds) <= scores_pieces.EVEN * rounds and (rounds >= scores_pieces.ROUNDS or not limited)
        assert 1 <= per <= steps
        assert even or per <= scores_pieces.FEWEST, (queries, keys, per)
        assert chunks == 1 or per <= steps // 2 + 1
    assert scores_pieces.steps(4096, 8192, 64, limited, 132) == 64  # every query is loaded once


PAGED = [  # heads, d, queries' dtype, queries, page size, dtypes of table and lengths, a length a query, result
    (64, 128, FP8, 1, 64, (INT32, INT32), False, FP32),
    (64, 128, MXFP4, 1, 64, (INT32, INT32), False, FP32),
    (128, 128, FP8, 4, 64, (INT32, INT64), True, FP32),
    (32, 64, MXFP4, 3, 256, (INT32, INT32), False, BF16),
]


def registers_suffice(sass: str, usage: str, groups: int) -> bool:
    """Whether ``groups`` warpgroups have the registers that all but the first wait for: else they wait for ever."""
    began = int(re.search(r"REG:(\d+)", usage).group(1))
    few, many = (int(x, 16) for x in re.findall(r"USETMAXREG\S+ (?:UP0, )?(0x[0-9a-f]+)", sass))
    return few + (groups - 1) * many <= groups * began


def sleeps(sass: str) -> bool:
    """Whether the warpgroups that multiply do: such a loop keeps the instructions around it apart, which took 7 %."""
    return "NANOSLEEP" in sass[sass.index("USETMAXREG.TRY_ALLOC") : sass.rindex("GMMA")]


def disassembled(module, variant: tuple, folder: Path, groups: int = 0) -> str:
    """The machine code; nothing of it is in local memory, and ``groups`` warpgroups, if any, share their registers."""
    module.build(*variant, arch="sm_90a", options=f"--keep-cubin --dump-dir {folder}")
    (cubin,) = folder.glob("*.cubin")
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert "STACK:0" in usage.stdout + usage.stderr
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(STL|LDL)\b", sass)
    assert groups == 0 or registers_suffice(sass, usage.stdout + usage.stderr, groups)
    return sass


@pytest.mark.parametrize("d", [64, 128])
def test_the_expansion_of_keys_compiles_for_sm90(d, tmp_path):
    """Before it reads anything it lets the scores begin, which wait for it."""
    sass = disassembled(scores_mxfp4, (d,), tmp_path)
    assert sass.index("PREEXIT") < sass.index("LDG")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_compiles_for_sm90(variant, tmp_path):
    """The tensor cores have more to do when a warpgroup begins to sum, and relu and weight are two instructions."""
    heads, d, dtype, *_ = variant
    sass = disassembled(ragged_kernel, variant, tmp_path, 1 + ragged_kernel.CONSUMERS)
    assert not sleeps(sass)
    assert sass.count("ACQBULK") == (2 if dtype == MXFP4 else 0)  # for the keys, and for their scales
    fp8 = dtype != BF16
    steps = d // (32 if fp8 else 16)
    order = re.findall(r"\b([QH]GMMA|WARPGROUP\.ARRIVE|WARPGROUP\.DEPBAR|BAR\.ARV)\b", sass)
    product = "QGMMA" if fp8 else "HGMMA"
    one = ["WARPGROUP.ARRIVE"] + [product] * steps
    terms = scores_pieces.COLUMNS * 64 // 128  # of a thread, in a stage
    if ragged_kernel.Scores(heads, d, fp8, "all").parts == 1:
        stage = [*one, "WARPGROUP.DEPBAR", "BAR.ARV", "WARPGROUP.DEPBAR"]
        stages = order.count("BAR.ARV") - 1
        assert order == ["BAR.ARV"] + stage * stages
    else:
        wait, stages = "WARPGROUP.DEPBAR", 3  # in the loop, after it, and of a piece with one stage
        assert order == one + [*one, wait] * 3 + one + one + [wait]
    doubled = len(
        re.findall(r"FADD R\d+, R\d+(?:\.reuse)?, \|R\d+(?:\.reuse)?\||FADD R\d+, \|R\d+(?:\.reuse)?\|, R\d+", sass)
    )
    assert doubled == (terms // 2 * stages if fp8 else 0)
    assert sass.count("FMNMX") + doubled == sass.count("FFMA") == terms * stages


@pytest.mark.parametrize("variant", PAGED, ids=lambda variant: "-".join(map(str, variant)))
def test_pages_compile_for_sm90(variant, tmp_path):
    """Nothing waits between products but for the last; MXFP4 is expanded by four permutations for eight codes.

    Where one product of MXFP4 is summed while the next is made, both are there twice, and once more in the beginning
    and at an end; a sum is not between the instructions of a product, which would wait for one another.
    """
    heads, d, dtype, queries, page, _, each, _ = variant
    kernel = paged_kernel.PagedScores(heads, d, dtype == FP8, queries, page, each)
    assert kernel.stages * paged_kernel.KEYS * kernel.row >= 48 * 1024
    assert kernel.stages % kernel.consumers == 0
    sass = disassembled(paged_kernel, variant, tmp_path, 1 + kernel.consumers)
    order = re.findall(r"\b(QGMMA|WARPGROUP\.ARRIVE|WARPGROUP\.DEPBAR)\b", sass)
    turn = ["WARPGROUP.ARRIVE"] + ["QGMMA"] * (d // 32) + ["WARPGROUP.DEPBAR"]
    if dtype == MXFP4:
        copies = 4 if kernel.apart else 1
        turn = turn * copies
        tables = sass.count("F2FP.SATFINITE.E4M3") // 4  # of the sizes of a code, for d / 4 codes each
        assert tables >= 2 * copies + 2
        assert 0 <= sass.count("PRMT") - tables * 4 * d // 32 <= 16
    assert order == turn * kernel.passes
    products = heads * queries * 64 // 128  # of a thread
    copies = 5 if kernel.apart else 1
    assert sass.count("FMNMX") == sass.count("FFMA") == products * copies


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 8}, "takes pages of at least 16 tokens, page_size is 8"),
        ({"cache": torch.zeros(0, 8448, dtype=torch.uint8)}, "a cache of at least one page"),
        ({"cache": torch.zeros(2, 8456, dtype=torch.uint8)}, "pages are not aligned to that, stride 8456"),
        ({"cache": torch.zeros(16909, dtype=torch.uint8)[4:16900].view(2, 8448)}, "copies 16 bytes at a time"),
    ],
)
def test_pages_that_are_left_to_triton(change, message):
    given = {"q": torch.zeros(1, 1, 64, 128, dtype=FP8), "cache": torch.zeros(2, 8448, dtype=torch.uint8)} | change
    assert message in _cutedsl_paged_limits(**given)


# On a GPU


def in_pages(page: int, *args: object, **options: object) -> tuple[dict, torch.Tensor]:
    """What that function makes, in pages of this size, with a sequence of no keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "PAGE", page)
        tensors, k = scores.paged(*args, **options)
    tensors["lengths"][1] = 0
    return tensors, k


def expected(tensors: dict, k: torch.Tensor, format: str, length: int) -> dict:
    """The same of keys that are not in pages."""
    queries = tensors["q"].shape[1]
    ends = tensors["lengths"].clamp(max=length).unsqueeze(1) - torch.arange(queries - 1, -1, -1)
    k, k_scale = scores.quantised(k[:, :length], format)
    rest = {key: tensors[key] for key in ("q", "weights", "q_scale")}
    return {**rest, "k": k, "k_scale": k_scale, "start": torch.zeros_like(ends), "end": ends}


def of_pages(tensors: dict, **options: object) -> torch.Tensor:
    return ops.indexer_scores_paged(**on_gpu(tensors), **options, implementation="cutedsl")


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 2, 3, 4])
@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_paged_on_the_gpu(poisoned, format, queries):  # noqa: F811
    sizes = [(64, 128, 64, 9), (32, 64, 16, 33), (128, 128, 256, 2), (64, 64, 32, 11), (32, 128, 128, 3)]
    for heads, d, page, pages in sizes if queries in (1, 4) else sizes[:3]:
        tensors, k = in_pages(page, format, 5, queries, heads, d, pages)
        for length in (page * pages, page * pages - 27, 65, 1):
            clamped = {**tensors, "lengths": tensors["lengths"].clamp(max=length)}
            got = of_pages(clamped, page_size=page, max_length=length)
            scores.assert_scores(got, expected(tensors, k, format, length))
        options = {"page_size": page, "implementation": "cutedsl"}
        got = of_pages(tensors, page_size=page)
        for top_k, workspace in ((7, 2**28), (page * pages + 3, 1)):
            chosen = ops.indexer_topk_paged(**on_gpu(tensors), **options, top_k=top_k, workspace=workspace)
            assert torch.equal(chosen, best_ref(got, top_k, torch.int64))
        if heads == 64:
            assert torch.equal(of_pages(tensors, page_size=page, dtype=torch.bfloat16), got.bfloat16())
            ends = expected(tensors, k, format, page * pages)["end"].long()
            each = {**tensors, "lengths": ends, "block_table": tensors["block_table"].long()}
            assert torch.equal(of_pages(each, page_size=page), got)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_paged_work_is_split_anywhere_on_the_gpu(poisoned, format):  # noqa: F811
    """Many sequences of all lengths, none, one, and a row does not depend on the others."""
    tensors, k = in_pages(64, format, 67, 1, 64, 128, 12)
    tensors["lengths"][3:40:5] = 0
    tensors["block_table"] = tensors["block_table"].clamp(max=len(tensors["cache"]) - 1)
    got = of_pages(tensors)
    scores.assert_scores(got, expected(tensors, k, format, 12 * 64))
    for part in (slice(0, 1), slice(2, 9), slice(40, 67)):
        some = {key: value if key == "cache" or value is None else value[part] for key, value in tensors.items()}
        assert torch.equal(of_pages(some), got[part])
    for place in (0, 31, 32, 66):
        one = {**tensors, "lengths": torch.zeros_like(tensors["lengths"])}
        one["lengths"][place] = tensors["lengths"][place]
        alone = torch.full_like(got, -torch.inf)
        alone[place] = got[place]
        assert torch.equal(of_pages(one), alone)
    nothing = {**tensors, "lengths": torch.zeros_like(tensors["lengths"]) - 5}
    assert (of_pages(nothing) == -torch.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("page", [64, 16])
@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_paged_outside_the_cache_is_not_seen_on_the_gpu(poisoned, format, page):  # noqa: F811
    tensors, _ = in_pages(page, format, 3, 1, 64, 128, 4)
    tensors["lengths"][:] = 4 * page
    tensors["block_table"] = torch.randperm(12).view(3, 4).int()
    whole = of_pages(tensors, page_size=page)
    bad = [(0, 1, -1), (0, 2, 14), (1, 0, 1 << 30), (1, 2, -(1 << 30))]
    for sequence, place, number in bad:
        tensors["block_table"][sequence, place] = number
        whole[sequence, :, place * page : (place + 1) * page] = -torch.inf
    assert torch.equal(of_pages(tensors, page_size=page), whole)
    tensors["lengths"] += 1000
    assert torch.equal(of_pages(tensors, page_size=page), whole)
    tensors["block_table"] = tensors["block_table"].long() | 1 << 40
    assert (of_pages(tensors, page_size=page) == -torch.inf).all()


@pytest.mark.gpu
def test_paged_scales_of_all_sizes_on_the_gpu(poisoned):  # noqa: F811
    """MXFP4 from 2^-127 to 2^125; four codes times a larger one are no bf16, and 255 is NaN."""
    tensors, k = in_pages(64, "mxfp4", 2, 1, 64, 128, 4)
    tensors["lengths"][:] = 256
    tensors["q_scale"] = torch.full_like(tensors["q_scale"], 0x60606060)
    given = expected(tensors, k, "mxfp4", 256)
    size = torch.arange(256).clamp(max=252).int() * 0x01010101
    given["k_scale"] = size.expand(2, -1).contiguous()
    for sequence, place in ((sequence, place) for sequence in range(2) for place in range(4)):
        page = tensors["cache"][tensors["block_table"][sequence, place]]
        page[64 * 64 : 64 * 68] = size[place * 64 : (place + 1) * 64].view(torch.uint8)
    scores.assert_scores(of_pages(tensors), given)
    tensors["cache"][tensors["block_table"][1, 2], 64 * 64 + 5] = 255  # of key 129
    assert of_pages(tensors).isnan().nonzero().tolist() == [[1, 0, 129]]


CODES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CODES = torch.cat([CODES, -CODES])


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
def test_mxfp4_as_bytes_on_the_gpu(poisoned, d):  # noqa: F811
    """Every code at every distance of scales: rounded to e4m3 once, and exact up to 14 powers of two apart."""
    generator = torch.Generator().manual_seed(d)
    codes = torch.randint(256, (4097, d // 2), generator=generator).to(torch.uint8)
    codes[::5, :16] &= 0x88  # zeros, whose scale does not count
    scales = torch.zeros(4097, 4, dtype=torch.uint8)
    scales[:, : d // 32] = torch.randint(100, 125, (4097, d // 32), generator=generator)
    scales[:64, : d // 32] = torch.randint(255, (64, d // 32), generator=generator)
    scales[7, 1] = 255
    got, factors = cutedsl_scores._expanded(codes.cuda(), scales.view(torch.int32).squeeze(-1).cuda())
    values = torch.stack([CODES[(codes & 15).long()], CODES[(codes >> 4).long()]], -1).view(4097, -1, 32)
    e = scales[:, : d // 32].int()
    e = torch.where((values != 0).any(-1) | (e == 255), e, 0)
    row = e.amax(1, keepdim=True)
    wide = values.double() * torch.exp2((6 + e - row).double()).unsqueeze(-1)
    expected = wide.float().to(FP8)
    exact = (expected.double() == wide).all(-1)
    assert exact[row - e <= 14].all() and not exact[row - e > 14].all()
    assert torch.equal(got.cpu().view(MXFP4), expected.flatten(1).view(MXFP4))
    assert torch.equal(factors.cpu()[row[:, 0] < 255].double(), torch.exp2((row[row < 255] - 127).double()))
    assert factors.isnan().nonzero().tolist() == [[7]]


def apart(tensors: dict, most: int, name: str) -> None:
    """Scales of the blocks of a row up to so many powers of two higher than they were."""
    generator = torch.Generator().manual_seed(most)
    scales = tensors[name].clone().unsqueeze(-1).view(MXFP4)
    blocks = tensors[name[0]].shape[-1] // 16
    scales[..., :blocks] += torch.randint(0, most + 1, (*scales.shape[:-1], blocks), generator=generator).to(MXFP4)
    tensors[name] = scales.view(INT32).squeeze(-1)


def assert_close(got: torch.Tensor, tensors: dict) -> None:
    """As exact as FP8 is, of which the tensor cores cut off."""
    value, size = scores.exact(tensors)
    seen = scores.visible(tensors)
    q, k = (
        scores._indexer.dequantise_mxfp4_ref(tensors[name], scores.bytes_of(tensors[f"{name}_scale"], tensors[name]))
        for name in ("q", "k")
    )
    allowed = 1e-5 * size + scores.cut_off(q, k, tensors["weights"])
    assert torch.equal(got.cpu() == -torch.inf, ~seen)
    error = (got.cpu().double() - value).abs()
    assert (error <= allowed.minimum(8 * scores.TENSOR_CORE * size))[seen].all()  # of many terms few lose the most
    assert error[seen].norm() <= scores.TENSOR_CORE * size[seen].norm()
    return None


@pytest.mark.gpu
@pytest.mark.parametrize("most", [2, 8, 14])
def test_mxfp4_blocks_with_scales_apart_on_the_gpu(poisoned, most):  # noqa: F811
    for d in (64, 128):
        tensors = scores.arguments("mxfp4", 65, 64, d, 777, None, "all", seed=most)
        apart(tensors, most, "q_scale")
        apart(tensors, most, "k_scale")
        assert_close(ops.indexer_scores(**on_gpu(tensors), implementation="cutedsl"), tensors)
    tensors, k = in_pages(64, "mxfp4", 2, 2, 64, 128, 4)
    apart(tensors, most, "q_scale")
    given = expected(tensors, k, "mxfp4", 256)
    apart(given, most, "k_scale")
    for place in range(4):  # of the first sequence, which has all its pages
        page = tensors["cache"][tensors["block_table"][0, place]]
        page[64 * 64 : 64 * 68] = given["k_scale"][0, place * 64 : (place + 1) * 64].view(MXFP4)
    assert_close(of_pages(tensors), given)


@pytest.mark.gpu
def test_paged_graph_replay_sees_new_lengths_on_the_gpu():
    """Work is split on the device: a captured launch goes by the lengths that there are when it is replayed."""
    tensors, _ = in_pages(64, "fp8", 40, 2, 64, 128, 6)
    tensors["block_table"] = tensors["block_table"].clamp(max=len(tensors["cache"]) - 1)
    given = on_gpu(tensors)
    ops.indexer_scores_paged(**given, implementation="cutedsl")
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = ops.indexer_scores_paged(**given, implementation="cutedsl")
    given["lengths"].copy_(tensors["lengths"].flip(0))
    captured.replay()
    assert torch.equal(got, ops.indexer_scores_paged(**given, implementation="cutedsl"))
