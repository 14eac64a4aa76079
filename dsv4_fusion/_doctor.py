"""What ``python -m dsv4_fusion doctor`` finds: the installation, the operators' implementations, the caches."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .ops import indexer_cache_bytes, kv_cache_bytes
from .ops._library import COMPILERS, REFERENCE, operators

DISTRIBUTIONS = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"}  # named otherwise than their module
TOKENS = 8  # no choice depends on it


def diagnose() -> dict[str, Any]:
    """Everything that ``doctor`` prints, as JSON-serialisable values.

    Returns:
        ``versions``; ``gpus``, and ``no_gpu``, why there is none, or None; ``compilers`` by module: ``version``, and
        ``problem`` or None; ``languages``: whether each kernel language is usable on the first GPU; ``operators`` by
        name: ``chosen``, and ``others`` with the reason why not; ``caches`` by owner: ``folder`` and ``writable``.
    """
    compilers = {module: _compiler(module) for modules in COMPILERS.values() for module in modules}
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    found = {name: _choice(name, device) for name in operators}
    return {
        "versions": {
            "dsv4_fusion": _version("dsv4_fusion"),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "transformers": _version("transformers"),
        },
        "gpus": gpus,
        "no_gpu": None if gpus else no_gpu(),
        "compilers": compilers,
        "languages": {
            language: bool(gpus)
            and all(compilers[module]["problem"] is None for module in modules)
            and any(i.name == language and i.unavailable(device) is None for table in operators.values() for i in table)
            for language, modules in COMPILERS.items()
        },
        "operators": found,
        "caches": {owner: {"folder": str(folder), "writable": writable(folder)} for owner, folder in caches().items()},
    }


def caches() -> dict[str, Path]:
    """The folders in which compiled code is kept, whether they exist yet or not."""
    home = Path.home()
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # a container's user without an entry in passwd
        user = f"uid_{os.getuid()}"
    folders = {
        "inductor": os.environ.get("TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir(), f"torchinductor_{user}")),
        "triton": os.environ.get("TRITON_CACHE_DIR", Path(os.environ.get("TRITON_HOME", home), ".triton", "cache")),
        "tilelang": os.environ.get("TILELANG_CACHE_DIR", home / ".tilelang" / "cache"),
    }
    return {owner: Path(folder).absolute() for owner, folder in folders.items()}


def writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, or the folder itself where it does not exist; nothing is made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def arguments(name: str) -> tuple[tuple, dict[str, Any]]:
    """Arguments of an operator at V4-Flash's sizes, bf16 and on the meta device.

    Raises:
        KeyError: there is no such operator.
    """
    hidden, hc, heads, dim, rotated = 4096, 4, 64, 128, 64

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def bf16(*shape: int) -> torch.Tensor:
        return new(*shape, dtype=torch.bfloat16)

    def integers(*shape: int) -> torch.Tensor:
        return new(*shape, dtype=torch.int64)

    def mixing(mixes: int, scales: int) -> tuple:
        return new(mixes, hc * hidden), new(mixes), new(scales), new(hidden)

    def cache(format: str) -> torch.Tensor:
        return new(TOKENS, indexer_cache_bytes(64, format, dim), dtype=torch.uint8)

    streams = bf16(TOKENS, hc, hidden)
    post = (bf16(TOKENS, hidden), streams, new(TOKENS, hc), new(TOKENS, hc, hc))
    pre, head = mixing((2 + hc) * hc, 3), mixing(hc, 1)
    rope = (integers(TOKENS), new(TOKENS, rotated // 2), new(TOKENS, rotated // 2))
    q = (bf16(TOKENS, heads, dim), *rope, bf16(TOKENS, heads))
    fp8 = (new(TOKENS, heads, dim, dtype=torch.float8_e4m3fn), new(TOKENS, heads))
    mxfp4 = (
        new(TOKENS, heads, dim // 2, dtype=torch.uint8),
        new(TOKENS, heads, dtype=torch.int32),
        new(TOKENS, heads),
    )
    key = (integers(TOKENS), bf16(dim), *rope)
    activation, weight = (new(rows, hidden, dtype=torch.float8_e4m3fn) for rows in (TOKENS, hidden))
    load = {"format": "fp8", "head_dim": dim, "page_size": 64}
    scored = (bf16(TOKENS, heads, dim), bf16(TOKENS, dim), new(TOKENS, heads))
    pages = (fp8[0].unsqueeze(1), cache("fp8"), fp8[1].unsqueeze(1), integers(TOKENS, 1), integers(TOKENS))
    wide, prompt = 512, 128

    def compressor(ratio: int, width: int) -> tuple:
        angles = new(prompt, rotated // 2)
        return bf16(1, prompt, width), bf16(1, prompt, width), new(ratio, width), new(wide), angles, angles

    def paged(ratio: int, width: int) -> tuple:
        rows = bf16(TOKENS, width)
        state = (new(TOKENS, 2 * ratio, 2, width), integers(TOKENS, 1))
        pages = new(TOKENS, kv_cache_bytes(64), dtype=torch.uint8)
        tokens = (integers(TOKENS), integers(TOKENS), integers(TOKENS + 1))
        return rows, rows, new(ratio, width), new(wide), *tokens, *rope[1:], *state, pages, integers(TOKENS)

    table: dict[str, tuple[tuple, dict[str, Any]]] = {
        "hc_pre": ((streams, *pre), {}),
        "hc_post": (post, {}),
        "hc_post_pre": ((*post, *pre), {}),
        "hc_head": ((streams, *head), {}),
        "hc_post_head": ((*post, *head), {}),
        "indexer_q_fp8": (q, {}),
        "indexer_q_fp8_out": ((*q, *fp8), {}),
        "indexer_q_mxfp4": (q, {}),
        "indexer_q_mxfp4_out": ((*q, *mxfp4), {}),
        "indexer_k_store_fp8": ((bf16(TOKENS, dim), cache("fp8"), *key), {}),
        "indexer_k_store_mxfp4": ((bf16(TOKENS, dim), cache("mxfp4"), *key), {}),
        "quantize_fp8": ((bf16(TOKENS, hidden),), {}),
        "scaled_mm_fp8": ((activation, weight, new(TOKENS, 1), new(hidden, 1)), {}),
        "fp8_linear": ((bf16(TOKENS, hidden), weight, new(hidden, 1)), {}),
        "compress_csa": (compressor(4, 2 * wide), {}),
        "compress_hca": (compressor(128, wide), {}),
        "compress_csa_insert": (paged(4, 2 * wide), {}),
        "compress_hca_insert": (paged(128, wide), {}),
        "kv_load": ((new(TOKENS, kv_cache_bytes(64), dtype=torch.uint8), integers(1, 1), integers(1)), {}),
        "indexer_k_load": ((cache("fp8"), integers(1, 1), integers(1)), load),
        "indexer_scores": (scored, {}),
        "indexer_scores_paged": (pages, {}),
        "indexer_topk": (scored, {"top_k": 512}),
        "indexer_topk_paged": (pages, {"top_k": 512}),
    }
    return table[name]


def _choice(name: str, device: torch.device) -> dict[str, Any]:
    args, options = arguments(name)
    others: dict[str, str] = {}
    chosen = REFERENCE
    for candidate in operators[name]:
        reason = candidate.unavailable(device) or (candidate.limits(*args, **options) if candidate.limits else None)
        if reason is None and device.type == "cpu":
            reason = "runs on the CPU only where it is asked for by name"
        if reason is None and chosen == REFERENCE:
            chosen = candidate.name
        else:
            others[candidate.name] = reason or f"usable; {chosen} comes first"
    if chosen != REFERENCE:
        others[REFERENCE] = f"plain PyTorch, which is slower than {chosen}"
    return {"chosen": chosen, "others": others}


def _compiler(module: str) -> dict[str, str | None]:
    """Imported, not only looked for: a compiler that is installed and does not load is the harder case to find."""
    if importlib.util.find_spec(module) is None:
        return {"version": None, "problem": "not installed"}
    version, problem = _version(DISTRIBUTIONS.get(module, module)), None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(module)
    except Exception as error:  # whatever a compiler raises while it loads its libraries
        problem = f"cannot be imported: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return {"version": version, "problem": problem}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def no_gpu() -> str:
    """Why there is no GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return "torch finds no CUDA device: see nvidia-smi, and CUDA_VISIBLE_DEVICES"
