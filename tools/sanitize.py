"""One small launch of every kernel, for NVIDIA's compute-sanitizer:

compute-sanitizer --tool memcheck --report-api-errors no python tools/sanitize.py triton|tilelang|cutedsl
compute-sanitizer --tool racecheck python tools/sanitize.py triton|tilelang|cutedsl
compute-sanitizer --tool racecheck --racecheck-memcpy-async no python tools/sanitize.py cutedsl compressor_cutedsl

The last because racecheck does not follow cp.async.mbarrier.arrive, by which the compressor waits for its copies.

Further arguments choose parts, by the names of the functions below, since all together take minutes.

API errors are left out because cuda-python, which CuTe DSL imports, asks the driver for functions that it lacks.
"""

import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else a write past a tensor can land in memory the pool holds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dsv4_fusion import ops
from tests.ops import test_compressor as entries
from tests.ops import test_compressor_cache as pages
from tests.ops import test_fp8_linear as linear
from tests.ops import test_hyper_connection as hyper_connection
from tests.ops import test_indexer as queries
from tests.ops import test_indexer_cache as keys
from tests.ops import test_indexer_scores as scores
from tests.ops.test_indexer import on_gpu

implementation = sys.argv[1] if len(sys.argv) > 1 else "triton"


def hyper_connections() -> None:
    for name in hyper_connection.FORMS:
        for tokens in (1, 17, 301):
            hidden = 4096 if tokens == 17 else 192
            given = hyper_connection.arguments(name, (tokens,), hidden, dtype=torch.bfloat16, device="cuda")
            results = hyper_connection.outputs(name, given, implementation=implementation)
            torch.cuda.synchronize()
            assert all(result.isfinite().all() for result in results)
            print(name, tokens, flush=True)


def indexer() -> None:
    for tokens in (1, 7, 301):
        for name in queries.OPS:
            for heads, d, hadamard in ((64, 128, True), (5, 64, False)):
                given = queries.on_gpu(queries.arguments(tokens, heads, d, 64 if d == 128 else 32))
                getattr(ops, name)(**given, hadamard=hadamard, implementation=implementation)
                torch.cuda.synchronize()
                print(name, tokens, heads, d, flush=True)
        for name in keys.STORES:
            for fused in ((), keys.FUSED):
                given = queries.on_gpu(keys.arguments(name.rpartition("_")[2], tokens, fused=fused))
                getattr(ops, name)(**given, hadamard=bool(fused), implementation=implementation)
                torch.cuda.synchronize()
                print(name, tokens, fused, flush=True)


def fp8_linear() -> None:
    for m, n, k in ((1, 16, 16), (65, 1040, 272), (300, 2064, 400)):
        for scaling in linear.SCALINGS:
            given = [tensor.cuda() for tensor in linear.problem(m, n, k, scaling)]
            ops.scaled_mm_fp8(*given, implementation=implementation)
            x = torch.randn(m, k, device="cuda").bfloat16()
            options = {"scaling": scaling, "batch_invariant": scaling != "tensor"}
            ops.fp8_linear(x, given[1], given[3], given[4], **options, implementation=implementation)
            torch.cuda.synchronize()
            print("fp8_linear", scaling, m, n, k, flush=True)


def indexer_scores() -> None:
    for format in scores.FORMATS:
        for some, length in ((0, 10), (1, 1), (7, 333), (40, 1030)):
            for range in scores.RANGES:
                given = scores.arguments(format, some, 64, length=length, range=range)
                scores.check(given, device="cuda", implementation=implementation)
            torch.cuda.synchronize()
            print("indexer_scores, indexer_topk", format, some, length, flush=True)
        for some in (1, 4) if format != "bf16" else ():
            tensors, _ = scores.paged(format, 3, some, 64)
            given = on_gpu({**tensors, "block_table": tensors["block_table"] - 3})  # some outside the cache
            given["lengths"] += 100  # beyond the table
            ops.indexer_scores_paged(**given, implementation=implementation)
            ops.indexer_topk_paged(**given, top_k=40, implementation=implementation)
            ops.indexer_scores_paged(**given, max_length=131, dtype=torch.bfloat16, implementation=implementation)
            torch.cuda.synchronize()
            print("indexer_scores_paged, indexer_topk_paged", format, some, flush=True)


def compressor() -> None:
    for name in entries.OPS:
        for case in entries.CASES:
            entries.check(name, case, "triton", on_gpu)
            torch.cuda.synchronize()
            print(name, case, flush=True)
    for name in pages.INSERTS:
        long = [(pages.in_long_pieces, pages.LONG), (pages.all_but_one, pages.LONG)]
        for split, changes in [(pages.in_pieces, case) for case in pages.KERNEL_CASES] + long:
            pages.check(name, split, "triton", on_gpu, **changes)
            torch.cuda.synchronize()
            print(name, split.__name__, changes, flush=True)
    cache = torch.randint(0, 256, (9, ops.kv_cache_bytes(4, 128)), dtype=torch.uint8, device="cuda")
    table = torch.arange(-2, 13, device="cuda").view(3, 5)  # some outside the cache
    lengths = torch.tensor([0, 7, 20], device="cuda")
    ops.kv_load(cache, table, lengths, head_dim=128, page_size=4, implementation="triton")
    torch.cuda.synchronize()
    print("kv_load", flush=True)


def compressor_cutedsl() -> None:
    cases = [(name, pages.in_pieces, case) for name in pages.INSERTS for case in pages.KERNEL_CASES[:3]]
    cases += [("compress_hca_insert", split, pages.LONG) for split in (pages.in_long_pieces, pages.all_but_one)]
    for name, split, changes in cases:
        pages.check(name, split, "cutedsl", on_gpu, **changes)
        torch.cuda.synchronize()
        print(name, split.__name__, changes, flush=True)


PARTS = {
    "triton": (hyper_connections, compressor, indexer, fp8_linear, indexer_scores),
    "tilelang": (hyper_connections,),
    "cutedsl": (compressor_cutedsl, indexer, fp8_linear, indexer_scores),
}
for part in PARTS[implementation]:
    if len(sys.argv) < 3 or part.__name__ in sys.argv[2:]:
        part()
print(f"{implementation}: all launched")
