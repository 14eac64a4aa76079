"""Recall of the indexer's choice in FP8 and MXFP4 against fp32, with and without a Hadamard transform. Runs on a CPU.

Recall@k is the share of the fp32 scores' best k that the quantised scores' best k hold, averaged over queries. Data:

- ``gaussian``: all values independent;
- ``outliers``: four dims of queries and keys are 16 times as large, as in trained models' channels;
- ``clusters``: keys lie about 64 centres with a spread of 0.3, and a query is near one of them: the best are close;
- ``low rank``: queries and keys lie in 16 of the 128 dims' directions, with noise of 0.05.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import _harness
from dsv4_fusion import ops
from dsv4_fusion.ops import _indexer

HEADS, DIM = 64, 128
DATA = ("gaussian", "outliers", "clusters", "low rank")


def draw(data: str, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, d], keys [Tk, d], both bf16, and weights [T, H]."""
    generator = torch.Generator().manual_seed(DATA.index(data))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k = normal(queries, HEADS, DIM), normal(keys, DIM)
    if data == "outliers":
        scale = torch.ones(DIM)
        scale[torch.randperm(DIM, generator=generator)[:4]] = 16
        q, k = q * scale, k * scale
    elif data == "clusters":
        centres = normal(64, DIM)
        k = centres[torch.randint(64, (keys,), generator=generator)] + 0.3 * k
        q = centres[torch.randint(64, (queries,), generator=generator)].unsqueeze(1) + 0.3 * q
    elif data == "low rank":
        basis = normal(16, DIM) / 4
        q, k = normal(queries, HEADS, 16) @ basis + 0.05 * q, normal(keys, 16) @ basis + 0.05 * k
    weights = normal(queries, HEADS).abs() if data == "clusters" else normal(queries, HEADS)
    return q.bfloat16(), k.bfloat16(), weights


def choice(q: Tensor, k: Tensor, weights: Tensor, format: str, hadamard: bool, top_k: int) -> Tensor:
    if hadamard:
        q, k = _indexer.hadamard_ref(q), _indexer.hadamard_ref(k)
    if format == "fp8":
        (q, q_scale), (k, k_scale) = _indexer.quantise_fp8_ref(q), _indexer.quantise_fp8_ref(k)
        return ops.indexer_topk(q, k, weights * q_scale, None, k_scale, top_k=top_k)
    if format == "mxfp4":
        (q, q_scale), (k, k_scale) = _indexer.quantise_mxfp4_ref(q), _indexer.quantise_mxfp4_ref(k)
        return ops.indexer_topk(q, k, weights, q_scale, k_scale, top_k=top_k)
    return ops.indexer_topk(q, k, weights, top_k=top_k)


def recall(got: Tensor, best: Tensor) -> float:
    size = int(max(got.max(), best.max())) + 1
    held = torch.zeros(len(got), size, dtype=torch.bool).scatter(1, got, True)
    return held.gather(1, best).float().mean().item()


def measure(queries: int, keys: int, top_k: int) -> list[dict]:
    """One row for every kind of data, format, and transform."""
    rows = []
    for data in DATA:
        given = draw(data, queries, keys)
        best = choice(*given, "bf16", False, top_k)
        for format in ("fp8", "mxfp4"):
            for hadamard in (False, True):
                found = recall(choice(*given, format, hadamard, top_k), best)
                rows.append({"work": "recall", "impl": format, "data": data, "hadamard": hadamard})
                rows[-1] |= {"recall": round(found, 4), "k": top_k, "T": queries, "Tk": keys}
                print(f"{data:9} {format:6} hadamard={hadamard!s:5} {found:.4f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--out", help="the JSON file to write; default: benchmarks/results/<gpu>/<date>-…")
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = measure(arguments.queries, arguments.keys, arguments.top_k)
    _harness.write(rows, "recall", arguments.out)


if __name__ == "__main__":
    main()
