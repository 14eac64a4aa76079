"""mHC operators against Inductor on the same work, TileKernels and Liger where installed, and the floor of their bytes.

Graph replay (warm L2) up to 1,024 tokens, single launches with L2 flushed from 4,096 on. ``wall`` is the CPU time of
one call from Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from benchmarks import _harness
from dsv4_fusion import ops

HC, ITERS, EPS = 4, 20, 1e-6
TOKENS = (1, 8, 16, 32, 128, 1024, 4096, 8192, 16384)
INDUCTOR_TOKENS = (1, 16, 128, 1024, 4096, 8192)  # each is a compilation of some seconds
PEER_TOKENS = (1, 1024, 4096)  # and some of the peers compile for each
IMPLEMENTATIONS = ("triton", "tilelang")


def inputs(tokens: int, hidden: int) -> dict[str, torch.Tensor]:
    """Random inputs of the size that trained weights give."""
    generator = torch.Generator("cuda").manual_seed(tokens)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator) * std

    return {
        "output": normal(tokens, hidden).bfloat16(),
        "hidden_streams": normal(tokens, HC, hidden).bfloat16(),
        "post": normal(tokens, HC).sigmoid() * 2,
        "comb": normal(tokens, HC, HC).softmax(-1),
        "fn": normal((2 + HC) * HC, HC * hidden, std=(HC * hidden) ** -0.5),
        "base": normal((2 + HC) * HC),
        "scale": torch.tensor([2.0, 0.02, 0.25], device="cuda"),
        "norm_weight": normal(hidden) + 1,
    }


def eager(output, hidden_streams, post, comb, fn, base, scale, norm_weight):
    """The boundary in Hugging Face's arithmetic."""
    dtype = output.dtype
    placed = post.to(dtype).unsqueeze(-1) * output.unsqueeze(-2)
    streams = placed + torch.matmul(comb.to(dtype).transpose(-1, -2), hidden_streams)
    flat = streams.flatten(-2).float()
    flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    pre, post, comb = F.linear(flat, fn).split([HC, HC, HC * HC], dim=-1)
    pre_base, post_base, comb_base = base.split([HC, HC, HC * HC])
    pre = torch.sigmoid(pre * scale[0] + pre_base) + EPS
    post = 2 * torch.sigmoid(post * scale[1] + post_base)
    comb = torch.softmax((comb * scale[2] + comb_base).unflatten(-1, (HC, HC)), dim=-1) + EPS
    comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    for _ in range(ITERS - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + EPS)
        comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    collapsed = (pre.unsqueeze(-1) * streams).sum(-2).to(dtype).float()
    normed = norm_weight * (collapsed * torch.rsqrt(collapsed.square().mean(-1, keepdim=True) + EPS))
    return streams, post, comb, normed.to(dtype)


def work(name: str, tensors: dict[str, torch.Tensor], implementation: str | None):
    """A call of one operator, and the bytes it has to move (each input read once, each output written once)."""
    t = dict(tensors)
    if "post" not in name:
        for key in ("output", "post", "comb"):
            del t[key]
    if name == "hc_post":
        t = {key: t[key] for key in ("output", "hidden_streams", "post", "comb")}
    if "head" in name:
        t |= {"fn": t["fn"][:HC], "base": t["base"][:HC], "scale": t["scale"][:1]}
    op = getattr(ops, name)

    def call() -> object:
        return op(**t, implementation=implementation)

    results = call()
    results = results if isinstance(results, tuple) else (results,)
    return call, sum(x.numel() * x.element_size() for x in [*t.values(), *results])


def tile_kernels(t: dict[str, torch.Tensor]) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """TileKernels: the new streams and the collapsed one; it has no norm, and its products are TF32."""
    if importlib.util.find_spec("tilelang.utils.target") is None:  # TileLang 0.1.15 has moved what 1.0.0 imports
        sys.modules["tilelang.utils.target"] = importlib.import_module("tilelang.backend.target")
    from tile_kernels.modeling.mhc.functional import mhc_post, mhc_pre

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        placing = (t["output"][None], t["hidden_streams"][None], t["post"][None, ..., None], t["comb"][None])
        streams = mhc_post(*placing)[0]
        options = {"norm_eps": EPS, "pre_eps": EPS, "sinkhorn_eps": EPS, "sinkhorn_repeat": ITERS}
        collapsed, _ = mhc_pre(streams, t["fn"], t["scale"], t["base"], post_mult_value=2.0, **options)
        return streams, collapsed

    return call


def liger(t: dict[str, torch.Tensor]) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Liger: the same; its matrix is the transpose of ours, and no norm either."""
    from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res, liger_mhc_pre

    phi, scales = t["fn"].t().contiguous().bfloat16(), t["scale"].unbind(0)
    comb = t["comb"].transpose(-1, -2).contiguous()
    options = {"tmax": ITERS, "rms_eps": EPS, "pre_eps": EPS, "sinkhorn_eps": EPS, "post_mult": 2.0}

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        streams = liger_mhc_post_res(t["hidden_streams"], t["output"], t["post"], comb)
        pre, _, _ = liger_mhc_coeffs(streams, phi, t["base"], *scales, **options)
        return streams, liger_mhc_pre(streams, pre)

    return call


PEERS = {"tile-kernels": tile_kernels, "liger-kernel": liger}


def peer(name: str, tensors: dict[str, torch.Tensor]) -> Callable[[], object]:
    """A peer's post and pre, once its results were found right."""
    call = PEERS[name](tensors)
    without_norm = {key: value for key, value in tensors.items() if key != "norm_weight"}
    streams, _, _, collapsed = ops.hc_post_pre(**without_norm, implementation="reference")
    for what, got, want in zip(("streams", "collapsed"), call(), (streams, collapsed), strict=True):
        distance = ((got.float() - want.float()).norm() / want.float().norm()).item()
        if not distance < 0.02:
            raise ValueError(f"{name}'s {what} are {distance:.1e} from ours")
    return call


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    result.add_argument("--widths", type=int, nargs="+", default=(4096, 7168))
    result.add_argument("--no-inductor", action="store_true")
    result.add_argument("--seconds", type=float, default=150, help="after that, no other competitor is begun")
    result.add_argument("--out", help="the JSON file to write; default: benchmarks/results/<gpu>/<date>-…")
    return result


def measure(arguments: argparse.Namespace, rows: list[dict], save: Callable[[], object]) -> None:
    """Ours, then Inductor, then the peers; ``save`` is called before each that could break the process or the GPU."""
    begun = time.monotonic()
    copy = _harness.copy_tb_s()
    print(
        f"copy {copy:.2f} TB/s\n{'work':20} {'impl':16} {'D':>5} {'T':>6} {'timer':>6} {'us':>9} {'at s':>5}",
        flush=True,
    )

    def add(name: str, impl: str, timer: str, us: float, hidden: int, tokens: int) -> None:
        rows.append({"work": name, "impl": impl, "timer": timer, "us": round(us, 2), "T": tokens, "D": hidden})
        rows[-1] |= {"hc_mult": HC, "dtype": "bfloat16"}
        at = time.monotonic() - begun
        print(f"{name:20} {impl:16} {hidden:5} {tokens:6} {timer:>6} {us:9.2f} {at:5.0f}", flush=True)

    def late(what: str) -> bool:
        if time.monotonic() - begun < arguments.seconds:
            return False
        print(f"skipped: {what}: {arguments.seconds:.0f} s are over", flush=True)
        return True

    for hidden, tokens in itertools.product(arguments.widths, arguments.tokens):
        tensors = inputs(tokens, hidden)
        timer = "graph" if tokens <= 1024 else "flush"
        timed = getattr(_harness, timer)
        names = ("hc_post_pre",)
        if tokens in (1, 128, 4096):
            names = ("hc_post_pre", "hc_pre", "hc_post", "hc_head", "hc_post_head")
        for name in names:
            label = name if name == "hc_post" else f"{name}_norm"
            call, moved = work(name, tensors, None)
            add(label, "ours", timer, timed(call), hidden, tokens)
            add(label, "floor", timer, moved / copy * 1e-6, hidden, tokens)
            if name == "hc_post_pre" and tokens in (1, 128):
                add(label, "ours", "wall", _harness.wall(call), hidden, tokens)
            if name == "hc_post_pre":
                for implementation in IMPLEMENTATIONS:
                    try:
                        call, _ = work(name, tensors, implementation)
                    except ValueError as error:
                        if tokens == arguments.tokens[0]:
                            print(f"skipped: {error}")
                        continue
                    add(label, f"ours ({implementation})", timer, timed(call), hidden, tokens)
    save()
    for hidden in arguments.widths if not arguments.no_inductor else ():
        for tokens in (count for count in arguments.tokens if count in INDUCTOR_TOKENS):
            if late(f"inductor, D {hidden}, T {tokens}"):
                break
            try:
                tensors = inputs(tokens, hidden)
                timer = "graph" if tokens <= 1024 else "flush"
                torch._dynamo.reset()
                compiled = torch.compile(eager, dynamic=False)
                us = getattr(_harness, timer)(lambda: compiled(**tensors))
                add("hc_post_pre_norm", "inductor", timer, us, hidden, tokens)
            except Exception as error:  # one graph that Inductor cannot compile is no reason to stop
                print(f"skipped: inductor, D {hidden}, T {tokens}: {type(error).__name__}: {error}", flush=True)
    for name in PEERS:
        save()
        try:
            for hidden, tokens in itertools.product(arguments.widths, arguments.tokens):
                if tokens in PEER_TOKENS:
                    if late(f"{name}, D {hidden}, T {tokens}"):
                        break
                    timer = "graph" if tokens <= 1024 else "flush"
                    us = getattr(_harness, timer)(peer(name, inputs(tokens, hidden)))
                    add("hc_post_pre", name, timer, us, hidden, tokens)
        except Exception as error:  # a peer that is missing, or cannot do it, is no reason to stop
            print(f"skipped: {name}: {type(error).__name__}: {error}", flush=True)


def main() -> None:
    arguments = parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    rows: list[dict] = []

    def save() -> None:
        _harness.write(rows, "hyper_connection", arguments.out)

    try:
        with torch.no_grad():
            measure(arguments, rows, save)
    finally:  # an interrupted run keeps what it has
        save()


if __name__ == "__main__":
    main()
