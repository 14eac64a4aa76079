"""Recall and errors of the indexer in FP8 and MXFP4, with and without a Hadamard transform. Runs on a CPU, too.

Recall@k is the share of the fp32 scores' best k that the quantised scores' best k hold, averaged over queries. The
error is what the arithmetic adds to quantisation: the root of the mean square of the scores' distance to those of the
same quantised numbers in float64, as a share of the root of the scores' mean square. Data:

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
from dsv4_fusion.ops.indexer_scores import indexer_scores_ref

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


def quantised(q: Tensor, k: Tensor, weights: Tensor, format: str, hadamard: bool) -> list[Tensor | None]:
    """The scores' arguments q, k, weights, q_scale, k_scale."""
    if hadamard:
        q, k = _indexer.hadamard_ref(q), _indexer.hadamard_ref(k)
    if format == "fp8":
        (q, q_scale), (k, k_scale) = _indexer.quantise_fp8_ref(q), _indexer.quantise_fp8_ref(k)
        return [q, k, weights * q_scale, None, k_scale]
    if format == "mxfp4":
        (q, q_scale), (k, k_scale) = _indexer.quantise_mxfp4_ref(q), _indexer.quantise_mxfp4_ref(k)
        return [q, k, weights, q_scale, k_scale]
    return [q, k, weights, None, None]


def error(given: list[Tensor | None], implementation: str | None) -> float:
    """Of an implementation's scores, against all in float64."""
    q, k, weights, *scales = given
    exact = indexer_scores_ref(q, k, weights.double(), *scales)
    far = ops.indexer_scores(*given, implementation=implementation).double() - exact
    return (far.norm() / exact.norm()).item()


def recall(got: Tensor, best: Tensor) -> float:
    size = int(max(got.max(), best.max())) + 1
    held = torch.zeros(len(got), size, dtype=torch.bool, device=got.device).scatter(1, got, True)
    return held.gather(1, best).float().mean().item()


def measure(queries: int, keys: int, top_k: int, device: str) -> list[dict]:
    """One row for every kind of data, format, and transform; of errors also one for MXFP4 multiplied as bf16."""
    rows: list[dict] = []

    def add(impl: str, value: str, number: float, data: str, hadamard: bool) -> None:
        rows.append({"work": value, "impl": impl, "data": data, "hadamard": hadamard, "T": queries, "Tk": keys})
        rows[-1] |= {value: number, "k": top_k} if value == "recall" else {value: number}
        print(f"{data:9} {impl:14} hadamard={hadamard!s:5} {value:6} {number:.4g}", flush=True)

    for data in DATA:
        q, k, weights = (tensor.to(device) for tensor in draw(data, queries, keys))
        best = ops.indexer_topk(q, k, weights, top_k=top_k)
        for hadamard in (False, True):
            for format in ("bf16", "fp8", "mxfp4"):
                given = quantised(q, k, weights, format, hadamard)
                if format != "bf16":
                    found = ops.indexer_topk(*given, top_k=top_k)
                    add(format, "recall", round(recall(found, best), 4), data, hadamard)
                add(format, "error", float(f"{error(given, None):.2e}"), data, hadamard)
            if device != "cpu":
                add("mxfp4 (triton)", "error", float(f"{error(given, 'triton'):.2e}"), data, hadamard)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--out", help="the JSON file to write; default: benchmarks/results/<gpu>/<date>-…")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        rows = measure(arguments.queries, arguments.keys, arguments.top_k, device)
    _harness.write(rows, "recall", arguments.out)


if __name__ == "__main__":
    main()
