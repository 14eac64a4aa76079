"""The indexer's scores, and the choice by them, against Inductor on the eager form and the floor of the products.

Single launches with L2 flushed. Causal: query i of T is at position i · 4 · Tk / T, and sees a quarter as many keys;
``all``: every query sees all. The floor of the ragged scores is that of their multiplications, at the bf16 rate that
was measured in the same run, twice that for FP8 and for MXFP4, which is multiplied as FP8, halved where the mask leaves
half; that of the paged ones their bytes. Inductor runs the eager form as Hugging Face's model writes it, in fp32 on
dequantised values, where it fits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import _harness
from dsv4_fusion import ops
from dsv4_fusion.ops import _indexer

HEADS, DIM, PAGE, TOP_K = 64, 128, 64, 512
SIZES = ((4096, 1024), (4096, 8192), (8192, 32768))  # queries, keys
PAGED = ((64, 65536, 1), (64, 65536, 2), (8, 4096, 1))  # sequences, keys of each, queries of each
FORMATS = ("bf16", "fp8", "mxfp4")
INDUCTOR_BYTES = 16 * 2**30  # of the product that Inductor may materialise


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(len(shape)))


def ragged(format: str, queries: int, length: int, causal: bool) -> dict[str, torch.Tensor | None]:
    """Random inputs in the format; keyword arguments of the operators."""
    q, k = normal(queries, HEADS, DIM).bfloat16(), normal(length, DIM).bfloat16()
    found: dict[str, torch.Tensor | None] = {"q": q, "k": k, "weights": normal(queries, HEADS)}
    if format != "bf16":
        quantise = _indexer.quantise_fp8_ref if format == "fp8" else _indexer.quantise_mxfp4_ref
        (found["q"], scale), (found["k"], found["k_scale"]) = quantise(q), quantise(k)
        found["q_scale"] = scale if format == "mxfp4" else None
    if causal:
        found["positions"] = torch.arange(queries, device="cuda") * (4 * length) // queries
    return found


def paged(format: str, batch: int, length: int, queries: int) -> dict[str, torch.Tensor | None]:
    pages = batch * length // PAGE
    cache = torch.zeros(pages, ops.indexer_cache_bytes(PAGE, format, DIM), dtype=torch.uint8, device="cuda")
    table = torch.randperm(pages, device="cuda").view(batch, -1).int()
    k, slots = normal(65536, DIM).bfloat16(), torch.arange(pages * PAGE, device="cuda")
    for part in slots.split(len(k)):
        getattr(ops, f"indexer_k_store_{format}")(k[: len(part)], cache, part)
    given = ragged(format, batch * queries, 1, False)
    q, weights, scale = (
        None if given.get(key) is None else given[key].unflatten(0, (batch, queries))
        for key in ("q", "weights", "q_scale")
    )
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    return {"q": q, "weights": weights, "q_scale": scale, "cache": cache, "block_table": table, "lengths": lengths}


def eager(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    scores = torch.relu(torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(0)))
    scores = (scores * weights.unsqueeze(-1)).sum(1)
    if positions is None:
        return scores
    seen = torch.arange(k.shape[0], device=k.device) < ((positions + 1) // 4).unsqueeze(-1)
    return scores.masked_fill(~seen, float("-inf"))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    result.add_argument("--small", action="store_true", help="the first size of each only")
    result.add_argument("--no-inductor", action="store_true")
    result.add_argument("--out", help="the JSON file to write; default: benchmarks/results/<gpu>/<date>-…")
    return result


def measure(arguments: argparse.Namespace, rows: list[dict]) -> None:
    copy, rate = _harness.copy_tb_s(), _harness.matmul_tflops()
    print(f"copy {copy:.2f} TB/s, bf16 {rate:.0f} TFLOP/s")

    def add(work: str, impl: str, us: float, **sizes: object) -> None:
        rows.append({"work": work, "impl": impl, "timer": "flush", "us": round(us, 2), "H": HEADS, "d": DIM, **sizes})
        print(f"{work:21} {impl:9} {us:10.2f} {sizes}", flush=True)

    def inductor(function: Callable[..., object]) -> Callable[..., object]:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    count = 1 if arguments.small else None
    for queries, length in SIZES[:count]:
        for causal in (False, True):
            for format in arguments.formats:
                given = ragged(format, queries, length, causal)
                sizes = {"T": queries, "Tk": length, "format": format, "causal": causal}
                flop = 2 * queries * length * HEADS * DIM / (1 + causal)
                add("indexer_scores", "floor", flop / rate * 1e-6 / (1 if format == "bf16" else 2), **sizes)
                add("indexer_scores", "ours", _harness.flush(lambda g=given: ops.indexer_scores(**g)), **sizes)
                chosen = _harness.flush(lambda g=given: ops.indexer_topk(**g, top_k=TOP_K))
                add("indexer_topk", "ours", chosen, top_k=TOP_K, **sizes)
    for batch, length, queries in PAGED[:count]:
        for format in arguments.formats:
            if format == "bf16":
                continue
            given = paged(format, batch, length, queries)
            sizes = {"B": batch, "Tk": length, "next_n": queries, "format": format}
            written = batch * queries * length * 4
            add("indexer_scores_paged", "floor", (given["cache"].nbytes + written) / copy * 1e-6, **sizes)
            add("indexer_scores_paged", "ours", _harness.flush(lambda g=given: ops.indexer_scores_paged(**g)), **sizes)
            del given
    if arguments.no_inductor or "bf16" not in arguments.formats:
        return
    for queries, length in SIZES[:count]:  # last: its workers keep the CPU busy for a while
        if queries * length * HEADS * 4 > INDUCTOR_BYTES:
            continue
        for causal in (False, True):
            given = ragged("bf16", queries, length, causal)
            inputs = given["q"], given["k"], given["weights"], given.get("positions")
            sizes = {"T": queries, "Tk": length, "format": "bf16", "causal": causal}
            scores, best = inductor(eager), inductor(lambda *x: eager(*x).topk(TOP_K, -1).indices)
            add("indexer_scores", "inductor", _harness.flush(lambda f=scores, x=inputs: f(*x)), **sizes)
            add("indexer_topk", "inductor", _harness.flush(lambda f=best, x=inputs: f(*x)), top_k=TOP_K, **sizes)


def main() -> None:
    arguments = parser().parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/indexer_scores.py needs an NVIDIA GPU")
    rows: list[dict] = []
    try:
        with torch.no_grad():
            measure(arguments, rows)
    finally:  # an interrupted run keeps what it has
        _harness.write(rows, "indexer_scores", arguments.out)


if __name__ == "__main__":
    main()
