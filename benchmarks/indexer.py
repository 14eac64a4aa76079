"""The indexer's quantisers against Inductor on their references and the floor of their bytes.

Graph replay (warm L2) up to 1,024 tokens, single launches with L2 flushed from 4,096 on. ``wall`` is the CPU time of
one call from Python. Inductor is compiled once for a piece of work, with the token count dynamic, and once more for a
single token of the first. The key store as Inductor runs it has no skipped slots: a mask would break its graph.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import _harness
from dsv4_fusion import ops
from dsv4_fusion.ops import _indexer, indexer

HEADS, DIM, ROPE, PAGE, MAX_POSITION = 64, 128, 64, 64, 65536
TOKENS = (1, 16, 64, 256, 512, 1024, 4096, 16384)
WALL_TOKENS = (1, 64)
IMPLEMENTATIONS = ("cutedsl", "triton")
QUERIES = ("indexer_q_fp8", "indexer_q_mxfp4")
KEYS = ("indexer_k_store_fp8", "indexer_k_store_mxfp4")
PER_TOKEN = ("q", "k", "positions", "weights", "slots")


def inputs(name: str, tokens: int, norm: bool) -> dict[str, torch.Tensor]:
    """Random inputs; every key of a shuffled cache has a slot of its own."""
    generator = torch.Generator("cuda").manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    angles = normal(MAX_POSITION, ROPE // 2)
    rope = {
        "positions": torch.randint(MAX_POSITION, (tokens,), device="cuda", generator=generator),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    if name in QUERIES:
        return {"q": normal(tokens, HEADS, DIM).bfloat16(), **rope, "weights": normal(tokens, HEADS).bfloat16()}
    pages = tokens // PAGE + 16
    size = ops.indexer_cache_bytes(PAGE, name.rpartition("_")[2], DIM)
    found = {
        "k": normal(tokens, DIM).bfloat16(),
        "cache": torch.zeros(pages, size, dtype=torch.uint8, device="cuda"),
        "slots": torch.randperm(pages * PAGE, device="cuda", generator=generator)[:tokens],
    }
    return {**found, "norm_weight": normal(DIM), **rope} if norm else found


def moved(name: str, tensors: dict[str, torch.Tensor]) -> int:
    """Bytes: each input read once, of the tables a row a token; each output written once."""
    count = sum(tensors[key].nbytes for key in (*PER_TOKEN, "norm_weight") if key in tensors)
    tokens = next(iter(tensors.values())).shape[0]
    if "cos" in tensors:
        count += tokens * ROPE * tensors["cos"].element_size()
    fp8 = name.endswith("fp8")
    if name in QUERIES:
        return count + tokens * HEADS * (DIM + 4 if fp8 else DIM // 2 + 8)
    return count + tokens * (DIM + 4 if fp8 else DIM // 2 + 4)


def work(name: str, tensors: dict[str, torch.Tensor], **options: object) -> Callable[[], object]:
    op = getattr(ops, name)

    def call() -> object:
        return op(**tensors, **options)

    call()
    return call


def eager(name: str, hadamard: bool) -> Callable[..., object]:
    """What Inductor compiles: the reference, or for keys its steps without a mask."""
    if name in QUERIES:
        reference = getattr(indexer, f"{name}_ref")

        def queries(**tensors: torch.Tensor) -> object:
            return reference(**tensors, hadamard=hadamard)

        return queries

    def keys(k, cache, slots, norm_weight=None, positions=None, cos=None, sin=None):
        if norm_weight is not None:
            k = _indexer.rms_norm_ref(k, norm_weight, 1e-6)
            k = _indexer.rotate_ref(k, cos[positions], sin[positions])
        k = _indexer.hadamard_ref(k) if hadamard else k
        if name.endswith("fp8"):
            values, scales = _indexer.quantise_fp8_ref(k)
        else:
            values, scales = _indexer.quantise_mxfp4_ref(k)
        # Bytes by shifts: Inductor does not make smaller elements of larger ones
        shifts = torch.arange(0, 32, 8, device=k.device)
        values, scales = values.view(torch.uint8), (scales.view(torch.int32).unsqueeze(1) >> shifts).to(torch.uint8)
        page, row = slots.unsqueeze(1) // PAGE, slots.unsqueeze(1) % PAGE
        width = values.shape[1]
        cache[page, row * width + torch.arange(width, device=k.device)] = values
        cache[page, PAGE * width + row * 4 + torch.arange(4, device=k.device)] = scales

    return keys


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    result.add_argument("--works", nargs="+", choices=QUERIES + KEYS, default=QUERIES + KEYS)
    result.add_argument("--no-inductor", action="store_true")
    result.add_argument("--out", help="the JSON file to write; default: benchmarks/results/<gpu>/<date>-…")
    return result


def pieces(works: Iterable[str]) -> Iterable[tuple[str, bool, bool]]:
    """Name, Hadamard, norm: queries with and without Hadamard, keys as they are and with all that goes before."""
    for name in works:
        for more in (False, True):
            yield name, more, more and name in KEYS


def measure(arguments: argparse.Namespace, rows: list[dict]) -> None:
    copy = _harness.copy_tb_s()
    print(f"copy {copy:.2f} TB/s\n{'work':27} {'impl':14} {'hadamard':>8} {'T':>6} {'timer':>6} {'us':>9}")

    def add(piece: tuple[str, bool, bool], impl: str, timer: str, us: float, tokens: int) -> None:
        name, hadamard, norm = piece
        label = f"{name}_norm" if norm else name
        rows.append({"work": label, "impl": impl, "timer": timer, "us": round(us, 2), "T": tokens, "d": DIM})
        rows[-1] |= {"hadamard": hadamard, **({"H": HEADS} if name in QUERIES else {"page_size": PAGE})}
        print(f"{label:27} {impl:14} {hadamard!s:>8} {tokens:6} {timer:>6} {us:9.2f}", flush=True)

    for piece in pieces(arguments.works):
        name, hadamard, norm = piece
        skipped: set[str] = set()
        for tokens in arguments.tokens:
            tensors = inputs(name, tokens, norm)
            timer = "graph" if tokens <= 1024 else "flush"
            add(piece, "floor", timer, moved(name, tensors) / copy * 1e-6, tokens)
            for implementation in (None, *IMPLEMENTATIONS):
                if implementation in skipped:
                    continue
                label = "ours" if implementation is None else f"ours ({implementation})"
                options = {"hadamard": hadamard, "implementation": implementation}
                try:
                    call = work(name, tensors, **options)
                except ValueError as error:
                    print(f"skipped: {error}")
                    skipped.add(str(implementation))
                    continue
                add(piece, label, timer, getattr(_harness, timer)(call), tokens)
                if tokens in WALL_TOKENS:
                    add(piece, label, "wall", _harness.wall(call), tokens)
                    if name in QUERIES and implementation is None:
                        call = work(name, tensors, **options, out=call())
                        add((f"{name}_out", hadamard, norm), label, "wall", _harness.wall(call), tokens)
    for index, piece in enumerate(pieces(arguments.works) if not arguments.no_inductor else ()):
        name, hadamard, norm = piece
        if name in KEYS and not norm:
            continue
        torch._dynamo.reset()
        compiled = torch.compile(eager(name, hadamard))
        for tokens in sorted(arguments.tokens, reverse=True):
            if tokens == 1 and index:
                continue
            tensors = inputs(name, tokens, norm)
            for key in PER_TOKEN:
                if key in tensors and tokens > 1:
                    torch._dynamo.mark_dynamic(tensors[key], 0)
            if "cache" in tensors:
                torch._dynamo.mark_dynamic(tensors["cache"], 0)
            timer = "graph" if tokens <= 1024 else "flush"
            add(piece, "inductor", timer, getattr(_harness, timer)(lambda: compiled(**tensors)), tokens)


def main() -> None:
    arguments = parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    rows: list[dict] = []
    try:
        with torch.no_grad():
            measure(arguments, rows)
    finally:  # an interrupted run keeps what it has
        _harness.write(rows, "indexer", arguments.out)


if __name__ == "__main__":
    main()
