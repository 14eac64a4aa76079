"""The compressor on paged caches, and dense, against Inductor on the reference and the floor of its bytes.

``C4A`` overlaps windows of 4 tokens, ``C128A`` has windows of 128; entries have 512 dims. ``prefill`` is one request of
T tokens from position 0; ``decode`` is T requests with one token each, which closes its window; ``mixed`` is a prefill
of T tokens and 64 such requests. ``dense`` is the prefill without state and pages, the only form Inductor has.
Graph replay (warm L2) up to 1,024 tokens, single launches with L2 flushed from 4,096 on.
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
from dsv4_fusion.ops import compressor

DIM, ROPE, PAGE, MAX_POSITION, DECODING = 512, 64, 64, 65536, 64
TOKENS = (1, 16, 128, 1024, 4096)
WALL_TOKENS = (1, 128)
RATIOS = {"compress_csa": 4, "compress_hca": 128}
FORMS = ("prefill", "decode", "mixed", "dense")


def series(name: str) -> int:
    return 2 if name == "compress_csa" else 1


def shared(name: str, tokens: int) -> tuple[dict[str, torch.Tensor], Callable[..., torch.Tensor]]:
    generator = torch.Generator("cuda").manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    angles, width = normal(MAX_POSITION, ROPE // 2), series(name) * DIM
    found = {
        "position_bias": normal(RATIOS[name], width),
        "norm_weight": normal(DIM),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    return found, normal


def dense(name: str, tokens: int) -> dict[str, torch.Tensor]:
    found, normal = shared(name, tokens)
    rows = [normal(1, tokens, series(name) * DIM).bfloat16() for _ in range(2)]
    return {"kv": rows[0], "gate": rows[1], **found}


def paged(name: str, form: str, tokens: int) -> dict[str, torch.Tensor]:
    """Requests of one chunk each, with pages of their own, in a shuffled order."""
    ratio, width = RATIOS[name], series(name) * DIM
    found, normal = shared(name, tokens)
    chunks = [(0, tokens)] if form != "decode" else []
    chunks += [(ratio * 63 + ratio - 1, 1)] * {"prefill": 0, "decode": tokens, "mixed": DECODING}[form]
    positions = torch.cat([torch.arange(begin, begin + count) for begin, count in chunks])
    requests = torch.arange(len(chunks)).repeat_interleave(torch.tensor([count for _, count in chunks]))
    starts = torch.tensor([0, *(count for _, count in chunks)]).cumsum(0)
    rows, ring = len(positions), series(name) * ratio
    closing = (positions + 1) % ratio == 0
    pages = int(closing.sum()) // PAGE + 2
    slots = torch.full((rows,), -1)
    slots[closing] = torch.randperm(pages * PAGE)[: int(closing.sum())]
    state = torch.zeros(len(chunks), ring, 2, width, device="cuda").normal_()
    found |= {
        "kv": normal(rows, width).bfloat16(),
        "gate": normal(rows, width).bfloat16(),
        "positions": positions.cuda(),
        "requests": requests.int().cuda(),
        "starts": starts.int().cuda(),
        "state": state,
        "state_table": torch.randperm(len(chunks)).int().unsqueeze(1).cuda(),
        "cache": torch.zeros(pages, ops.kv_cache_bytes(PAGE), dtype=torch.uint8, device="cuda"),
        "slots": slots.cuda(),
    }
    return found


def moved(name: str, form: str, tensors: dict[str, torch.Tensor]) -> int:
    """Bytes: rows read once, those of the state too; what is kept of them, and entries, written once."""
    ratio, width = RATIOS[name], series(name) * DIM
    count = tensors["kv"].nbytes + tensors["gate"].nbytes + tensors["position_bias"].nbytes
    if form == "dense":
        return count + tensors["kv"].shape[1] // ratio * DIM * 2
    entries = int((tensors["slots"] >= 0).sum())
    lengths = tensors["starts"].diff()
    alone = int((lengths == 1).sum()) if form != "prefill" else 0
    pooled = (series(name) * ratio - 1) * DIM * 8  # fp32 values and gates, of one series a row
    kept = int(lengths.clamp(max=series(name) * ratio).sum()) * width * 8
    return count + alone * pooled + kept + entries * 584


def work(name: str, form: str, tensors: dict[str, torch.Tensor]) -> Callable[[], object]:
    operator = getattr(ops, name if form == "dense" else f"{name}_insert")

    def call() -> object:
        return operator(**tensors)

    call()
    return call


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    result.add_argument("--works", nargs="+", choices=RATIOS, default=tuple(RATIOS))
    result.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    result.add_argument("--no-inductor", action="store_true")
    result.add_argument("--out", help="the JSON file to write; default: benchmarks/results/<gpu>/<date>-…")
    return result


def measure(arguments: argparse.Namespace, rows: list[dict]) -> None:
    copy = _harness.copy_tb_s()
    print(f"copy {copy:.2f} TB/s\n{'work':14} {'form':8} {'impl':14} {'T':>6} {'timer':>6} {'us':>9}")

    def add(name: str, form: str, impl: str, timer: str, us: float, tokens: int) -> None:
        label = name if form == "dense" else f"{name}_insert"
        rows.append({"work": label, "impl": impl, "timer": timer, "us": round(us, 2), "T": tokens})
        rows[-1] |= {"form": form, "ratio": RATIOS[name], "d": DIM}
        print(f"{name:14} {form:8} {impl:14} {tokens:6} {timer:>6} {us:9.2f}", flush=True)

    for name in arguments.works:
        for form in arguments.forms:
            for tokens in arguments.tokens:
                tensors = dense(name, tokens) if form == "dense" else paged(name, form, tokens)
                timer = "graph" if tokens <= 1024 else "flush"
                add(name, form, "floor", timer, moved(name, form, tensors) / copy * 1e-6, tokens)
                call = work(name, form, tensors)
                add(name, form, "ours", timer, getattr(_harness, timer)(call), tokens)
                if tokens in WALL_TOKENS:
                    add(name, form, "ours", "wall", _harness.wall(call), tokens)
                del tensors
        if arguments.no_inductor or "dense" not in arguments.forms:
            continue
        torch._dynamo.reset()
        compiled = torch.compile(getattr(compressor, f"{name}_ref"), dynamic=True)
        for tokens in sorted(arguments.tokens, reverse=True):
            if tokens >= RATIOS[name]:
                tensors = dense(name, tokens)
                timer = "graph" if tokens <= 1024 else "flush"
                us = getattr(_harness, timer)(lambda: compiled(**tensors))
                add(name, "dense", "inductor", timer, us, tokens)


def main() -> None:
    arguments = parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    rows: list[dict] = []
    try:
        with torch.no_grad():
            measure(arguments, rows)
    finally:  # an interrupted run keeps what it has
        _harness.write(rows, "compressor", arguments.out)


if __name__ == "__main__":
    main()
