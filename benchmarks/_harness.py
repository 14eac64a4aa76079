"""What every benchmark shares: timers, ceilings measured in the same run, and the one file format."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dsv4_fusion.ops._library import compiling

RESULTS = Path(__file__).resolve().parent / "results"
OF_MKL = (
    *(torch.acos, torch.asin, torch.atan, torch.cos, torch.erf, torch.erfc, torch.erfinv, torch.exp, torch.expm1),
    *(torch.log, torch.log10, torch.log1p, torch.log2, torch.sin, torch.sqrt, torch.tan, torch.tanh),
)
PACKAGES = (
    *("torch", "triton", "tilelang", "nvidia-cutlass-dsl", "apache-tvm-ffi", "transformers"),
    *("tile-kernels", "liger-kernel"),
)


def resolve_math() -> None:
    """Call PyTorch's functions of MKL once, on a CPU, with one number.

    MKL chooses its code in a function's first call; if threads make that together, one of them may run code with errors
    of 1e-4 (pytorch/pytorch#188792). So numbers that are compared, of any process, come after this.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for function in OF_MKL:
            function(one)


def settle() -> None:
    """Wait until no kernel compiles in the background, which would take the CPU's time from launches."""
    pool = compiling()
    threads = pool._max_workers
    all_idle = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_idle.wait)
    all_idle.wait(timeout=600)


def _events(call: Callable[[], object], before: Callable[[], object] = lambda: None, repeats: int = 30) -> float:
    """Median µs of single launches, by events; ``before`` runs ahead of each, outside the time."""
    times = []
    for _ in range(repeats):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times) * 1e3


def graph(call: Callable[[], object], calls: int = 20) -> float:
    """µs a call in the replay of a CUDA graph of ``calls`` calls; the L2 cache is warm."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    settle()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(calls):
            call()
    captured.replay()
    return _events(captured.replay) / calls


def flush(call: Callable[[], object]) -> float:
    """µs of single launches with the L2 cache flushed before each."""
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def before() -> None:
        cache.zero_()
        torch.cuda._sleep(500_000)  # the launches are queued by the time it ends, on a busy CPU too: they stay out

    for _ in range(3):
        call()
    settle()
    return _events(call, before)


def wall(call: Callable[[], object], calls: int = 200) -> float:
    """µs of CPU time a call takes from Python, the GPU not waited for."""
    for _ in range(10):
        call()
    settle()
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls // 10):
            call()
        times.append((time.perf_counter() - started) / (calls // 10))
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def copy_tb_s() -> float:
    """Bandwidth of a device-to-device copy of 2 GiB, read and written bytes counted, in TB/s."""
    source = torch.empty(2**31, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / _events(lambda: target.copy_(source), repeats=10) * 1e-6


def matmul_tflops() -> float:
    """Rate of an 8192³ bf16 product on random data, in TFLOP/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * 8192**3 / _events(lambda: a @ b, repeats=10) * 1e-6


def _commit() -> str:
    if named := os.environ.get("DSV4_COMMIT"):  # where the sources are a copy
        return named
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"cuda": torch.version.cuda or "-"}


def write(rows: list[dict], what: str, out: str | None = None) -> Path:
    """Write rows to ``out``, or to results/<gpu>/<date>-<what>.json (``cpu`` without one); returns the path."""
    on_gpu = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if on_gpu else "CPU"
    date = datetime.date.today().isoformat()
    path = Path(out) if out else RESULTS / gpu.split()[-1].lower() / f"{date}-{what}.json"
    content = {
        "gpu": gpu,
        "date": date,
        "commit": _commit(),
        "versions": _versions(),
        "copy_tb_s": round(copy_tb_s(), 3) if on_gpu else None,
        "matmul_tflops": round(matmul_tflops(), 1) if on_gpu else None,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")
    return path
