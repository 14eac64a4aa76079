"""The command line: ``python -m dsv4_fusion doctor``, ``explain`` and ``warmup``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__
from ._doctor import caches, diagnose, no_gpu
from ._warmup import Call, calls, warm
from .backend import explained

DOCTOR = "what is installed, which implementation every operator gets here and why not the others, and the caches"
DOCTOR_CODES = """exit codes:
  0  the kernels of at least one language (triton, tilelang, cutedsl) are usable on a GPU
  1  there is no GPU, or no compiler that is usable on it
  2  wrong usage"""
EXPLAIN = "what would be fused in Hugging Face's DeepSeek-V4, without weights: it is traced on the meta device"
EXPLAIN_CODES = """exit codes:
  0  something is fused
  1  nothing is fused
  2  wrong usage, a configuration that cannot be read, or no transformers"""
WARMUP = (
    "compile the kernels of every operator that Hugging Face's DeepSeek-V4 of this configuration is fused to, side by "
    "side, into the caches on disk; afterwards no number of tokens up to the given one compiles any of them"
)
WARMUP_CODES = """exit codes:
  0  everything is compiled
  1  there is no GPU to compile for, or nothing in the model is fused
  2  wrong usage, a configuration that cannot be read, or no transformers
  3  a kernel could not be compiled"""
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 32,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 8,
    "sliding_window": 16,
    "max_position_embeddings": 512,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
}
LAYERS = {"tiny": 4, "flash": 43}
SILENT = 3.0  # seconds without a word before progress is shown


class UsageError(Exception):
    """Something that the caller has to mend; the message says what."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None for the process's own.

    Returns:
        The exit code.

    Raises:
        SystemExit: with 0 after ``--help`` and ``--version``, with 2 after wrong usage.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dsv4_fusion", description="DeepSeek-V4's fusions: see each command's --help"
    )
    parser.add_argument("--version", action="version", version=f"dsv4_fusion {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="doctor|explain|warmup")
    form = argparse.RawDescriptionHelpFormatter

    doctor = commands.add_parser("doctor", help=DOCTOR, description=DOCTOR, epilog=DOCTOR_CODES, formatter_class=form)
    doctor.set_defaults(run=_doctor)
    explainer = commands.add_parser(
        "explain", help=EXPLAIN, description=EXPLAIN, epilog=EXPLAIN_CODES, formatter_class=form
    )
    explainer.set_defaults(run=_explain)
    explainer.add_argument(
        "--tokens", type=_positive, default=512, metavar="N", help="tokens of the one sequence (default: %(default)s)"
    )
    explainer.add_argument(
        "--html", type=_html_file, metavar="FILE.html", help="write the report with a picture of every layer, too"
    )
    warmup = commands.add_parser("warmup", help=WARMUP, description=WARMUP, epilog=WARMUP_CODES, formatter_class=form)
    warmup.set_defaults(run=_warmup)
    warmup.add_argument(
        "--tokens", type=_positive, default=8192, metavar="N", help="most tokens of one step (default: %(default)s)"
    )
    warmup.add_argument(
        "--jobs",
        type=_positive,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that compile (default: %(default)s)",
    )
    for command in (explainer, warmup):
        command.add_argument(
            "--config",
            required=True,
            metavar="tiny|flash|FILE.json",
            help="FILE: a model's config.json; its quantisation is left out",
        )
        command.add_argument("--layers", type=_positive, metavar="N", help="the first N layers (default: all)")
    for command in (doctor, explainer, warmup):
        command.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    try:
        with _collecting_rarely():
            return arguments.run(arguments)
    except UsageError as error:
        print(f"python -m dsv4_fusion {arguments.command}: error: {error}", file=sys.stderr)
        return 2


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 1")
    return int(text)


def _html_file(text: str) -> Path:
    file = Path(text)
    if file.suffix != ".html" or not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file .html in a folder that exists")
    return file


# doctor


def _doctor(arguments: argparse.Namespace) -> int:
    found = diagnose()
    print(json.dumps(found, indent=2) if arguments.json else _doctor_text(found))
    return 0 if any(found["languages"].values()) else 1


def _doctor_text(found: dict[str, Any]) -> str:
    versions = {name: version or "none" for name, version in found["versions"].items()}
    gpus = [
        f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB" for gpu in found["gpus"]
    ] or [f"none: {found['no_gpu']}"]
    compilers = {
        module: ", ".join(filter(None, (entry["version"], entry["problem"])))
        for module, entry in found["compilers"].items()
    }
    caches = {
        owner: entry["folder"] + ("" if entry["writable"] else "  (cannot be written)")
        for owner, entry in found["caches"].items()
    }
    lines = _table("versions", versions) + _table("GPUs", {str(index): gpu for index, gpu in enumerate(gpus)})
    lines += _table("compilers", compilers)
    on = "GPU 0" if found["gpus"] else "the CPU"
    lines.append(f"operators, bf16 at V4-Flash's sizes on {on}")
    for name, choice in found["operators"].items():
        lines.append(f"  {name}: {choice['chosen']}")
        lines += [f"    not {other}: {reason}" for other, reason in choice["others"].items()]
    return "\n".join(lines + _table("caches", caches))


def _table(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [title, *(f"  {name.ljust(width)}  {value}" for name, value in rows.items())]


# explain


def _explain(arguments: argparse.Namespace) -> int:
    fields = config_fields(arguments.config, arguments.layers)
    net = meta_model(fields)
    layers = net.config.num_hidden_layers
    parameters = sum(parameter.numel() for parameter in net.parameters())
    size = "1 layer" if layers == 1 else f"{layers} layers"
    with _progress(f"tracing {size}"):
        tokens = torch.zeros(1, arguments.tokens, dtype=torch.long, device="meta")
        report = explained(net, (tokens,), {"use_cache": False}, draw=arguments.html is not None)
    if arguments.html is not None:
        try:
            report.save(arguments.html)
        except OSError as error:
            raise UsageError(f"--html {arguments.html}: {error}") from None
    if arguments.json:
        facts = {"config": arguments.config, "layers": layers, "tokens": arguments.tokens, "parameters": parameters}
        print(json.dumps(facts | {"report": report.as_dict()}, indent=2))
    else:
        print(f"{arguments.config}: {size}, {parameters:,} parameters, prefill of 1 x {arguments.tokens} tokens")
        print(report)
        if arguments.html is not None:
            print(f"written: {arguments.html}")
    return 0 if report.sites else 1


def config_fields(config: str, layers: int | None) -> dict[str, Any]:
    """The fields of a ``DeepseekV4Config``.

    Args:
        config: "tiny", "flash", or the path of a model's ``config.json``.
        layers: keep the first so many layers; None keeps all.

    Raises:
        UsageError: the file cannot be read or is of another model, or it has fewer layers.
    """
    if config in LAYERS:
        layers = layers or LAYERS[config]
        # V4-Flash's own order; DeepseekV4Config's default is V4-Pro's, whose first two layers are HCA.
        kinds = ["sliding_attention"] * 2
        kinds += ["compressed_sparse_attention", "heavily_compressed_attention"] * (layers // 2)
        sizes = TINY if config == "tiny" else {}  # all other defaults are V4-Flash's
        return {**sizes, "num_hidden_layers": layers, "layer_types": kinds[:layers]}
    try:
        fields = json.loads(Path(config).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--config takes tiny, flash or a model's config.json; {config!r}: {error}") from None
    if not isinstance(fields, dict) or fields.get("model_type") != "deepseek_v4":
        kind = fields.get("model_type") if isinstance(fields, dict) else None
        raise UsageError(f"{config} is not the configuration of a deepseek_v4 model: model_type is {kind!r}")
    if layers is None:
        return fields
    has = fields.get("num_hidden_layers", LAYERS["flash"])
    if layers > has:
        raise UsageError(f"--layers {layers}: {config} has {has}")
    shorter = {name: fields[name][:layers] for name in ("layer_types", "mlp_layer_types") if fields.get(name)}
    return fields | shorter | {"num_hidden_layers": layers}


def meta_model(fields: dict[str, Any]) -> torch.nn.Module:
    """Hugging Face's model on the meta device, bf16 but for what its checkpoints keep in fp32.

    Raises:
        UsageError: transformers is missing or too old, or does not take the configuration.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("explain needs transformers, which is not installed: pip install 'transformers>=5.17'")
    try:
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    except ImportError as error:
        raise UsageError(f"transformers has no DeepSeek-V4 ({error}): pip install 'transformers>=5.17'") from None
    try:
        config = DeepseekV4Config.from_dict(fields)
        with torch.device("meta"):
            net = DeepseekV4ForCausalLM(config).eval()
    except Exception as error:  # transformers' validation raises many kinds
        raise UsageError(f"transformers does not take this configuration: {type(error).__name__}: {error}") from None
    keep = set(getattr(net, "_keep_in_fp32_modules_strict", None) or ())
    hidden = torch.empty(1, config.hidden_size, dtype=torch.bfloat16, device="meta")
    if net.model.norm(hidden).dtype != torch.bfloat16:  # transformers 5.17: no linear layer takes that
        keep = {name for name in keep if "norm" not in name}
    for name, parameter in net.named_parameters():
        if not keep.intersection(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return net


# warmup


def _warmup(arguments: argparse.Namespace) -> int:
    fields = config_fields(arguments.config, arguments.layers)
    problem = None if torch.cuda.is_available() else f"kernels are compiled for the GPU of this machine: {no_gpu()}"
    work, results = list[Call](), list[dict[str, Any]]()
    if problem is None:
        with _progress("tracing"):
            work = calls(meta_model(fields))
        problem = None if work else "nothing in this model is fused: see python -m dsv4_fusion explain"
    if problem is None:
        bar = _Bar(len(work))
        results = list(warm(work, arguments.tokens, arguments.jobs, bar.step))
    if arguments.json:
        facts = {"config": arguments.config, "tokens": arguments.tokens, "problem": problem, "kernels": results}
        print(json.dumps(facts | {"caches": {owner: str(folder) for owner, folder in caches().items()}}, indent=2))
    elif problem is not None:
        print(f"nothing is compiled: {problem}")
    else:
        for result in results:
            kept = "" if result["kept"] else ", not kept on disk: every process compiles it again"
            state = result["problem"] or f"{result['implementation']}, {result['seconds']} s{kept}"
            print(f"{result['operator']}: {state}")
    if problem is not None:
        return 1
    return 3 if any(result["problem"] for result in results) else 0


class _Bar:
    """Progress on stderr: a bar on a terminal, else a line a step."""

    def __init__(self, total: int) -> None:
        self.total, self.count, self.terminal = total, 0, sys.stderr.isatty()
        self.show("compiling")

    def step(self, result: dict[str, Any]) -> None:
        self.count += 1
        self.show(result["operator"])

    def show(self, what: str) -> None:
        full = 30 * self.count // self.total
        end = "\n" if not self.terminal or self.count == self.total else ""
        start = "\r\x1b[K" if self.terminal else ""
        bar = "#" * full + "-" * (30 - full)
        print(f"{start}[{bar}] {self.count}/{self.total} {what}", end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Python looks for garbage less often: a graph that is traced has millions of objects, and hardly one dies."""
    usual = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """The time taken, on stderr, as soon as it is more than a few seconds."""
    started, done = time.monotonic(), threading.Event()
    end = "\r" if sys.stderr.isatty() else "\n"

    def show() -> None:
        wait = SILENT
        while not done.wait(wait):
            print(f"{what}: {time.monotonic() - started:.0f} s", end=end, file=sys.stderr, flush=True)
            wait = 1.0 if end == "\r" else 10.0

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if end == "\r":
            print(" " * (len(what) + 12), end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
