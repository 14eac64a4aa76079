"""Compile a Hugging Face DeepSeek-V4 with the fusions, show what was fused, and compare with eager and with Inductor.

On a GPU: V4-Flash's widths, 4 layers, 32 experts, one prompt of 4,096 tokens in bf16; milliseconds, kernels, memory,
compile time. Without one: a tiny fp32 model whose fused sites run the operators' PyTorch references.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch._inductor.utils import fresh_cache

import dsv4_fusion
from examples.model import model


def say(text: str) -> None:
    print(text, flush=True)


@torch.no_grad()
def difference(layers: int, device: str, options: dict) -> None:
    """Largest difference of the logits from eager's, in fp32, without the pass and with it."""
    net = model("tiny", layers).to(device)
    ids = torch.randint(0, net.config.vocab_size, (2, 64), device=device)
    eager = net(ids, use_cache=False).logits
    reached = {}
    for backend, chosen in (("inductor", None), ("dsv4_fusion", options)):
        say(f"compiling the fp32 model with {backend} ...")
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend, options=chosen)
        with fresh_cache():
            started = time.perf_counter()
            got = compiled(ids, use_cache=False).logits
        say(f"  {time.perf_counter() - started:.0f} s")
        reached[backend] = (got - eager).abs().max().item()
    torch._dynamo.reset()
    say(f"largest difference from eager, fp32 logits (|logits| up to {eager.abs().max():.1f}):")
    for backend, value in reached.items():
        say(f"  {backend:12} {value:.2e}")
    floor = torch.finfo(torch.float32).eps * eager.abs().max().item()
    assert reached["dsv4_fusion"] <= 2 * max(reached["inductor"], floor), "the pass changed the numbers"


def kernels(call: Callable[[], object]) -> int:
    """Number of GPU kernels that one call runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if not event.key.startswith(("Memcpy", "Memset")))


def milliseconds(call: Callable[[], object], repeats: int = 15) -> float:
    """Median time of a call on the GPU, by events."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@torch.no_grad()
def compare(work: str, net: torch.nn.Module, run: Callable[[Callable, int], Callable], parameters: dict) -> list[dict]:
    """Eager, Inductor, ours, as rows of a benchmark file; ``run(model, n)`` gives a function to be called n times."""
    rows, repeats = [], 15
    say(f"{work:12} {'ms':>8} {'kernels':>8} {'peak GiB':>9} {'compile s':>10}")
    for name, backend in (("eager", None), ("inductor", "inductor"), ("ours", "dsv4_fusion")):
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend) if backend else net
        call = run(compiled, repeats + 3)
        with fresh_cache():  # an honest compile time: Inductor's and Triton's caches are empty
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            call()
        torch.cuda.reset_peak_memory_stats()
        taken, peak = milliseconds(call, repeats), torch.cuda.max_memory_allocated() / 2**30
        count = kernels(call)
        say(f"{name:12} {taken:8.1f} {count:8} {peak:9.1f} {seconds if backend else float('nan'):10.1f}")
        row = {"impl": name, "timer": "wall", "dtype": "bfloat16", **parameters}
        rows.append({"work": work, "us": taken * 1e3, "kernels": count, "peak_gib": round(peak, 2), **row})
        if backend:
            rows.append({"work": "compile", "graph": work, "us": seconds * 1e6, **row})
    torch._dynamo.reset()
    return rows


@torch.no_grad()
def flash(layers: int, length: int) -> list[dict]:
    """V4-Flash's widths: prefill of one prompt, then one decoding step of 8 requests after 1,024 tokens."""
    net = model("flash", layers, torch.bfloat16, "cuda")
    os.environ["TILELANG_CACHE_DIR"] = tempfile.mkdtemp()  # empty, as fresh_cache makes the other compilers' caches
    torch.compile(torch.neg)(torch.ones(1, device="cuda"))  # imports and worker processes count for nobody
    parameters = {"model": "flash", "layers": layers, "experts": net.config.n_routed_experts}
    ids = torch.randint(0, net.config.vocab_size, (1, length), device="cuda")

    def prefill(compiled: Callable, times: int) -> Callable[[], object]:
        return lambda: compiled(ids, use_cache=False)

    prompts = torch.randint(0, net.config.vocab_size, (8, 1024), device="cuda")
    cache = net(prompts, use_cache=True).past_key_values

    def step(compiled: Callable, times: int) -> Callable[[], object]:
        caches = [copy.deepcopy(cache) for _ in range(times)]  # a step makes its cache longer
        return lambda: compiled(prompts[:, -1:], past_key_values=caches.pop(), use_cache=True)

    rows = compare("prefill", net, prefill, {**parameters, "B": 1, "S": length})
    return rows + compare("decode", net, step, {**parameters, "B": 8, "S": 1, "context": 1024})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="decoder layers (4 on a GPU, else 2)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the prompt on a GPU")
    parser.add_argument(
        "--part", choices=("all", "numbers", "speed"), default="all", help="on a GPU: which half to run"
    )
    parser.add_argument("--out", help="write the GPU's figures to this JSON file")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, options = ("cuda", {"strict": True}) if gpu else ("cpu", {"strict": True, "reference": True})
    layers = arguments.layers or (4 if gpu else 2)

    say(f"torch {torch.__version__} on {torch.cuda.get_device_name() if gpu else 'the CPU: fusions run as references'}")
    net = model("tiny", layers).to(device)
    say(f"matching a DeepseekV4ForCausalLM of {layers} layers ...")
    report = dsv4_fusion.explain(net, torch.randint(0, 128, (2, 64), device=device), use_cache=False)
    say(str(report))
    kinds = Counter(net.config.layer_types)
    csa, hca = kinds["compressed_sparse_attention"], kinds["heavily_compressed_attention"]
    expected = {"hc_pre": 1, "hc_post_pre": 2 * layers - 1, "hc_post_head": 1}
    expected |= {"compress_csa": 2 * csa, "compress_hca": hca}  # CSA's indexer has a compressor too
    assert report.counts == Counter(expected)
    if arguments.part != "speed":
        difference(1 if not gpu else layers, device, options)
    if gpu and arguments.part != "numbers":
        rows = flash(layers, arguments.length)
        if arguments.out:
            from benchmarks._harness import write

            write(rows, "model", arguments.out)
    say("done")


if __name__ == "__main__":
    main()
