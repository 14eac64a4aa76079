"""Do two checkouts compute the same bits, and which is quicker?

    python tools/compare.py ../other                 # every operator, at awkward sizes and at those of a benchmark
    python tools/compare.py ../other scores linear   # some
    python tools/compare.py ../other --small         # awkward sizes only

Each checkout runs the same seeded inputs in a process of its own; outputs are compared by their digests. Times, on a
GPU, are medians of single launches with the L2 cache flushed. Exits with 1 where bits differ or a case fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

OPERATORS = ("streams", "queries", "scores", "pages", "linear", "compressor")
HERE = Path(__file__).resolve().parent.parent


def cases(device: str, small: bool) -> Iterator[tuple[str, str, Callable[[], list]]]:
    """Operator, case, and what makes the outputs; of inputs that depend on nothing but the case."""
    import torch

    from dsv4_fusion import ops

    def make(seed: int):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        def below(limit: int, *shape: int) -> torch.Tensor:
            return torch.randint(limit, shape, device=device, generator=generator)

        return normal, below

    def streams(tokens: int, hidden: int) -> Callable[[], list]:
        normal, _ = make(tokens)
        mix = 24
        given = [
            normal(tokens, hidden).bfloat16(), normal(tokens, 4, hidden).bfloat16(), normal(tokens, 4).sigmoid(),
            normal(tokens, 4, 4).softmax(-1), normal(mix, 4 * hidden) * (4 * hidden) ** -0.5, normal(mix),
            torch.tensor([2.0, 0.02, 0.25], device=device), normal(hidden),
        ]  # fmt: skip
        return lambda: list(ops.hc_post_pre(*given))

    def queries(tokens: int, format: str, hadamard: bool) -> Callable[[], list]:
        normal, below = make(tokens)
        size = torch.exp2(below(40, tokens, 64, 1) - 20.0)
        given = [
            (normal(tokens, 64, 128) * size).bfloat16(), below(99, tokens), normal(99, 32), normal(99, 32),
            normal(tokens, 64).bfloat16(),
        ]  # fmt: skip
        return lambda: list(getattr(ops, f"indexer_q_{format}")(*given, hadamard=hadamard))

    def quantised(normal, below, format: str, *shape: int) -> tuple:
        if format == "bf16":
            return normal(*shape).bfloat16(), None
        if format == "fp8":
            return (normal(*shape) * 50).to(torch.float8_e4m3fn), normal(*shape[:-1]).abs()
        codes = below(256, *shape[:-1], shape[-1] // 2).to(torch.uint8)
        scales = (below(7, *shape[:-1], shape[-1] // 32) + 122).to(torch.uint8)
        return codes, scales.view(torch.int32).squeeze(-1)

    def scores(queries: int, keys: int, format: str, limits: str) -> Callable[[], list]:
        normal, below = make(queries + keys)
        q, q_scale = quantised(normal, below, format, queries, 64, 128)
        k, k_scale = quantised(normal, below, format, keys, 128)
        given = {"q": q, "k": k, "weights": normal(queries, 64), "k_scale": k_scale}
        given["q_scale"] = q_scale if format == "mxfp4" else None
        if limits == "causal":
            given["positions"] = torch.arange(queries, device=device) * (4 * keys) // queries
        if limits == "range":
            given["start"] = below(keys, queries)
            given["end"] = given["start"] + below(keys, queries)
        return lambda: [ops.indexer_scores(**given)]

    def pages(batch: int, keys: int, each: int, format: str) -> Callable[[], list]:
        normal, below = make(batch + keys)
        q, q_scale = quantised(normal, below, format, batch, each, 64, 128)
        count = -(-keys // 64)
        cache = torch.zeros(batch * count, ops.indexer_cache_bytes(64, format), dtype=torch.uint8, device=device)
        slots = torch.arange(batch * count * 64, device=device)
        getattr(ops, f"indexer_k_store_{format}")(normal(len(slots), 128).bfloat16(), cache, slots)
        given = {
            "q": q, "weights": normal(batch, each, 64), "q_scale": q_scale if format == "mxfp4" else None,
            "cache": cache, "block_table": normal(batch * count).argsort().view(batch, count).int(),
            "lengths": (keys - below(min(keys, 70), batch)).int(),
        }  # fmt: skip
        return lambda: [cache, ops.indexer_scores_paged(**given)]

    def linear(tokens: int, n: int, k: int, scaling: str) -> Callable[[], list]:
        normal, _ = make(tokens + n)
        x, wq = normal(tokens, k).bfloat16(), (normal(n, k) * 50).to(torch.float8_e4m3fn)
        w_scale = normal(*((n, 1) if scaling == "token" else (-(-n // 128), -(-k // 128)))).abs() + 0.1
        xq, x_scale = ops.quantize_fp8(x, scaling=scaling)
        return lambda: [ops.scaled_mm_fp8(xq, wq, x_scale, w_scale), ops.fp8_linear(x, wq, w_scale)]

    def compressor(name: str, lengths: list[int], begins: list[int]) -> Callable[[], list]:
        normal, _ = make(sum(lengths))
        ratio, parts = {"csa": (4, 2), "hca": (128, 1)}[name]
        width, requests = parts * 512, len(lengths)
        positions = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, lengths, strict=True)])
        owners = torch.arange(requests).repeat_interleave(torch.tensor(lengths))
        closing = (positions + 1) % ratio == 0
        slots = torch.where(closing, closing.cumsum(0) - 1, -1)
        state = normal(requests, parts * ratio, 2, width)
        cache = torch.zeros(len(positions) // 64 + 1, ops.kv_cache_bytes(64), dtype=torch.uint8, device=device)
        angles = normal(int(positions.max()) + 1, 32)
        given = [
            normal(len(positions), width), normal(len(positions), width), normal(ratio, width), normal(512), positions,
            owners.int(), torch.tensor([0, *lengths]).cumsum(0).int(), angles.cos(), angles.sin(), state,
            torch.arange(requests).int().unsqueeze(1), cache, slots,
        ]  # fmt: skip
        given = [tensor.to(device) for tensor in given]
        fresh = given[9].clone()

        def run() -> list:
            given[9].copy_(fresh)
            getattr(ops, f"compress_{name}_insert")(*given)
            return [given[9], given[11]]

        return run

    sizes = (1, 7, 65) if device == "cpu" else (1, 7, 65, 300, 1000)
    large = not small and device != "cpu"
    for hidden in (4096, 7168) if device != "cpu" else (192,):
        for tokens in (*sizes, *((1024, 4096) if large else ())):
            yield "streams", f"{tokens} × {hidden}", streams(tokens, hidden)
    for format in ("fp8", "mxfp4"):
        for hadamard in (False, True):
            for tokens in (*sizes, *((1024, 4096, 16384) if large else ())):
                yield "queries", f"{format} {tokens}{' Hadamard' * hadamard}", queries(tokens, format, hadamard)
    for format in ("bf16", "fp8", "mxfp4"):
        for limits in ("all", "causal", "range"):
            for count, keys in ((1, 3), (7, 130), (65, 777)) if device == "cpu" else ((1, 3), (7, 130), (600, 5000)):
                yield "scores", f"{format} {limits} {count} × {keys}", scores(count, keys, format, limits)
            for keys in (1024, 8192) if large and limits != "range" else ():
                yield "scores", f"{format} {limits} 4096 × {keys}", scores(4096, keys, format, limits)
    for format in ("fp8", "mxfp4"):
        for batch, keys, each in ((3, 130, 1), (5, 700, 2), (2, 64, 4), *(((64, 65536, 1),) if large else ())):
            yield "pages", f"{format} {batch} × {keys} × {each}", pages(batch, keys, each, format)
    for scaling in ("token", "block"):
        for tokens in sizes if device != "cpu" else (1, 7):
            yield "linear", f"{scaling} {tokens} (400, 272)", linear(tokens, 400, 272, scaling)
        for tokens in (1, 64, 1024, 4096) if large else ():
            yield "linear", f"{scaling} {tokens} (4096, 4096)", linear(tokens, 4096, 4096, scaling)
    for name, begins in (("csa", (0, 5, 103, 7)), ("hca", (0, 127, 1000, 511))):
        for lengths in ([1, 1, 1, 1], [3, 9, 1, 130]):
            yield "compressor", f"{name} {lengths}", compressor(name, lengths, list(begins))


def work(arguments: argparse.Namespace) -> None:
    """In a process of a checkout: a line of JSON for every case."""
    import torch

    sys.path.insert(1, str(HERE))  # behind the checkout: what it lacks
    from benchmarks import _harness

    device = "cuda" if torch.cuda.is_available() else "cpu"
    _harness.resolve_math()
    with torch.no_grad():
        for operator, case, run in cases(device, arguments.small):
            if arguments.operators and operator not in arguments.operators:
                continue
            digest = hashlib.sha256()
            for tensor in run():
                digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
            us = _harness.flush(run) if device == "cuda" else None
            line = {"operator": operator, "case": case, "digest": digest.hexdigest()[:12], "us": us}
            print("CASE", json.dumps(line), flush=True)


def measured(checkout: Path, arguments: argparse.Namespace) -> tuple[dict[tuple[str, str], dict], bool]:
    """What a checkout's process says, and whether it came to its end."""
    command = [sys.executable, __file__, str(checkout), *arguments.operators, "--work"]
    command += ["--small"] if arguments.small else []
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=checkout, stdout=subprocess.PIPE, text=True
    )
    found = {}
    for line in process.stdout:
        if line.startswith("CASE "):
            row = json.loads(line[5:])
            found[row["operator"], row["case"]] = row
            if sys.stderr.isatty():
                print(f"\r{checkout}: {len(found)} cases", end="", file=sys.stderr, flush=True)
    print(f"\r{checkout}: {len(found)} cases", file=sys.stderr)
    if process.wait():
        print(f"{checkout}: ended with {process.returncode} after {len(found)} cases", file=sys.stderr)
    return found, process.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the other checkout of this project")
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"of {', '.join(OPERATORS)}; default: all")
    parser.add_argument("--small", action="store_true", help="awkward sizes only, none of a benchmark")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        sys.path.insert(0, str(arguments.checkout))
        work(arguments)
        return 0
    for name in set(arguments.operators) - set(OPERATORS):
        parser.error(f"no operator {name!r}; there are {', '.join(OPERATORS)}")
    other = arguments.checkout.resolve()
    if not (other / "dsv4_fusion" / "__init__.py").exists():
        parser.error(f"{other} is no checkout of this project: it has no dsv4_fusion/__init__.py")
    (before, ended), (after, ended_too) = measured(other, arguments), measured(HERE, arguments)
    different = 0
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        same = bool(old and new) and old["digest"] == new["digest"]
        different += not same
        says = "same" if same else "DIFFERENT" if old and new else f"MISSING {'there' if new else 'here'}"
        times = [f"{row['us']:10.2f}" if row and row["us"] else " " * 10 for row in (old, new)]
        print(f"{key[0]:11} {key[1]:34} {says:14} {' '.join(times)}")
    print(f"{len(after)} cases, {different} not the same")
    return int(different > 0 or not (ended and ended_too))


if __name__ == "__main__":
    sys.exit(main())
