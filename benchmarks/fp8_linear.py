"""FP8 linear layers against ``torch._scaled_mm``, Inductor, bf16, dequantised weights, and the floor.

``scaled_mm_fp8`` is the product of codes that are there; ``fp8_linear`` begins with the bf16 activation. Graph replay
(warm L2) up to 1,024 tokens, single launches with L2 flushed at 4,096. The floor of a product is the larger of its
bytes' time and its multiplications' at twice the measured bf16 rate. ``--tiles`` times every tile of a kernel.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from benchmarks import _harness
from dsv4_fusion import ops

SHAPES = ((1536, 4096), (4096, 4096), (32768, 1024), (4096, 8192))  # N, K
TOKENS = (1, 16, 64, 256, 1024, 4096)
SCALINGS = ("token", "block")
IMPLEMENTATIONS = ("cutedsl", "triton")
WALL_TOKENS = (1, 64)
bf16 = torch.bfloat16


def inputs(m: int, n: int, k: int, scaling: str) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(m)
    x = torch.randn(m, k, device="cuda", generator=generator).bfloat16()
    w = (torch.randn(n, k, device="cuda", generator=generator) * k**-0.5).bfloat16()
    if scaling == "token":
        wq, w_scale = ops.quantize_fp8(w)
    else:
        parts = w.float().view(n // 128, 128, k // 128, 128)
        w_scale = parts.abs().amax((1, 3)) / 448
        wq = (parts / w_scale[:, None, :, None]).view(n, k).to(torch.float8_e4m3fn)
    xq, x_scale = ops.quantize_fp8(x, scaling=scaling)
    return {"x": x, "w": w, "xq": xq, "wq": wq, "x_scale": x_scale, "w_scale": w_scale, "bias": None}


def dequantised(t: dict[str, Any]) -> torch.Tensor:
    scale = t["w_scale"]
    if scale.shape[1] > 1:
        n, k = t["wq"].shape
        parts = t["wq"].to(bf16).view(n // 128, 128, k // 128, 128) * scale.to(bf16)[:, None, :, None]
        return F.linear(t["x"], parts.view(n, k))
    return F.linear(t["x"], t["wq"].to(bf16) * scale.to(bf16))


def torch_scaled_mm(t: dict[str, Any]) -> torch.Tensor:
    return torch._scaled_mm(t["xq"], t["wq"].t(), t["x_scale"], t["w_scale"].t(), out_dtype=bf16)


def inductor_linear(x: torch.Tensor, wq: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Per-token quantisation in torch, and ``_scaled_mm``: what torchao's graph is without a pass."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-4) / 448
    xq = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return torch._scaled_mm(xq, wq.t(), scale, w_scale.t(), out_dtype=bf16)


def floor(m: int, n: int, k: int, copy: float, tflops: float, bf16_input: bool) -> float:
    moved = m * k * (2 if bf16_input else 1) + n * k + 2 * m * n
    return max(moved / copy * 1e-6, 2 * m * n * k / (2 * tflops) * 1e-6)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    result.add_argument("--shapes", type=int, nargs="+", help="N K, N K, …", default=sum(SHAPES, ()))
    result.add_argument("--scalings", nargs="+", choices=SCALINGS, default=SCALINGS)
    result.add_argument("--no-inductor", action="store_true")
    result.add_argument("--tiles", choices=IMPLEMENTATIONS, help="time this kernel's tiles, and nothing else")
    result.add_argument("--out", help="the JSON file to write; default: benchmarks/results/<gpu>/<date>-…")
    return result


def timer(m: int) -> str:
    return "graph" if m <= 1024 else "flush"


def measure(arguments: argparse.Namespace, rows: list[dict]) -> None:
    copy, tflops = _harness.copy_tb_s(), _harness.matmul_tflops()
    print(f"copy {copy:.2f} TB/s, bf16 {tflops:.0f} TFLOP/s\n{'work':14} {'impl':20} {'scaling':7} N, K, M, us")
    compiled = torch.compile(inductor_linear, dynamic=True) if not arguments.no_inductor else None
    skipped: set[str] = set()

    def add(work: str, impl: str, call: Callable[[], object] | float, at: tuple, by: str | None = None) -> None:
        n, k, m, scaling = at
        if isinstance(call, float):
            us = call
        else:
            call()
            us = getattr(_harness, by or timer(m))(call)
        rows.append({"work": work, "impl": impl, "timer": by or timer(m), "us": round(us, 2)})
        rows[-1] |= {"M": m, "N": n, "K": k, "scaling": scaling}
        print(f"{work:14} {impl:20} {scaling:7} {n}, {k}, {m}, {by or timer(m)} {us:.2f}", flush=True)

    for n, k in zip(arguments.shapes[::2], arguments.shapes[1::2], strict=True):
        for scaling in arguments.scalings:
            for m in arguments.tokens:
                t, at = inputs(m, n, k, scaling), (n, k, m, scaling)
                product = [t[name] for name in ("xq", "wq", "x_scale", "w_scale")]
                linear = [t[name] for name in ("x", "wq", "w_scale")]
                add("scaled_mm_fp8", "floor", floor(m, n, k, copy, tflops, False), at)
                add("fp8_linear", "floor", floor(m, n, k, copy, tflops, True), at)
                for implementation in (None, "triton"):  # the best one, and what stands in for it elsewhere
                    label = "ours" if implementation is None else f"ours ({implementation})"
                    option = {"implementation": implementation}
                    if label in skipped:
                        continue
                    try:
                        add("scaled_mm_fp8", label, lambda: ops.scaled_mm_fp8(*product, **option), at)
                        add("fp8_linear", label, lambda: ops.fp8_linear(*linear, **option), at)
                        if m in WALL_TOKENS:
                            add("fp8_linear", label, lambda: ops.fp8_linear(*linear, **option), at, "wall")
                    except ValueError as error:
                        print(f"skipped: {error}")
                        skipped.add(label)
                add("quantize_fp8", "ours", lambda: ops.quantize_fp8(t["x"], scaling=scaling), at)
                if scaling == "token":
                    add("scaled_mm_fp8", "torch._scaled_mm", lambda: torch_scaled_mm(t), at)
                    if compiled is not None:
                        add("fp8_linear", "inductor", lambda: compiled(*linear), at)
                add("fp8_linear", "bf16 linear", lambda: F.linear(t["x"], t["w"]), at)
                add("fp8_linear", "dequantise + bf16", lambda: dequantised(t), at)


def tiles(arguments: argparse.Namespace) -> None:
    """Every tile of a kernel's table."""
    module = importlib.import_module(f"dsv4_fusion.ops.{arguments.tiles}.fp8_linear")
    name = "tile" if arguments.tiles == "triton" else "tile_of"
    original = getattr(module, name)
    for n, k in zip(arguments.shapes[::2], arguments.shapes[1::2], strict=True):
        for scaling, m in itertools.product(arguments.scalings, arguments.tokens):
            t, found = inputs(m, n, k, scaling), []
            product = [t[key] for key in ("xq", "wq", "x_scale", "w_scale")]
            for chosen in module.TILES.values() if arguments.tiles == "triton" else module.table():
                setattr(module, name, lambda *_, chosen=chosen: chosen)
                us = getattr(_harness, timer(m))(lambda: module.scaled_mm_fp8(*product))
                found.append((us, str(chosen)))
            setattr(module, name, original)
            print(n, k, m, scaling, *(f"{us:.2f} {tile}" for us, tile in sorted(found)[:6]), sep="\n   ", flush=True)


def main() -> None:
    arguments = parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    if arguments.tiles:
        return tiles(arguments)
    rows: list[dict] = []
    try:
        with torch.no_grad():
            measure(arguments, rows)
    finally:  # an interrupted run keeps what it has
        _harness.write(rows, "fp8_linear", arguments.out)


if __name__ == "__main__":
    main()
