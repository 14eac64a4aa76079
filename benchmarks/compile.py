"""Time to compile a 4-layer Hugging Face model from empty caches: Inductor alone, and with the fusions.

Works without a GPU: there the fused sites become the operators' references.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch._inductor.utils import fresh_cache

import dsv4_fusion  # noqa: F401 - imported ahead of the clock
from benchmarks import _harness
from examples.model import model

LENGTH = 64


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", help="the JSON file to write; default: benchmarks/results/<gpu>/<date>-compile.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = model("tiny", arguments.layers).to(device)
    ids = torch.randint(0, net.config.vocab_size, (1, LENGTH), device=device)
    net(ids, use_cache=False)
    torch.compile(lambda x: x + 1)(ids)  # Dynamo and Inductor are imported ahead of the clock
    rows = []
    for impl, backend, options in (("inductor", "inductor", None), ("ours", "dsv4_fusion", {"reference": True})):
        torch._dynamo.reset()
        with fresh_cache():
            started = time.perf_counter()
            torch.compile(net, backend=backend, options=options)(ids, use_cache=False)
            seconds = time.perf_counter() - started
        print(f"{impl:10} {seconds:.1f} s", flush=True)
        row = {"work": "compile", "impl": impl, "timer": "wall", "us": round(seconds * 1e6), "model": "tiny"}
        rows.append(row | {"layers": arguments.layers, "dtype": "float32", "B": 1, "S": LENGTH})
    _harness.write(rows, "compile", arguments.out)


if __name__ == "__main__":
    main()
