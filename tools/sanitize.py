"""One small launch of every kernel, for NVIDIA's compute-sanitizer:

compute-sanitizer --tool memcheck python tools/sanitize.py triton
compute-sanitizer --tool racecheck python tools/sanitize.py triton
"""

import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else a write past a tensor can land in memory the pool holds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tests.ops.test_hyper_connection import FORMS, arguments, outputs

implementation = sys.argv[1] if len(sys.argv) > 1 else "triton"
for name in FORMS:
    for tokens in (1, 17, 301):
        tensors = arguments(name, (tokens,), 4096 if tokens == 17 else 192, dtype=torch.bfloat16, device="cuda")
        results = outputs(name, tensors, implementation=implementation)
        torch.cuda.synchronize()
        assert all(result.isfinite().all() for result in results)
        print(name, tokens, flush=True)
