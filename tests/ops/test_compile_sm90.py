"""Every kernel compiles for Hopper, to machine code, on a computer without a GPU.

The public functions run on meta tensors with their launches recorded, so what is compiled is what would be launched.
A kernel language joins by an entry of COMPILE; a kernel module by a line of CASES.
"""

from __future__ import annotations

import importlib
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4_fusion.ops import hyper_connection


@dataclass
class Binary:
    kernel: str
    cubin: bytes
    stack: int | None  # bytes a thread; None where it cannot be read


@dataclass
class Case:
    """One call of a kernel module's public function; the arguments are shapes and dtypes only."""

    language: str
    module: str
    function: str
    arguments: dict[str, torch.Tensor | None]
    name: str
    patch: dict[str, Any] = field(default_factory=dict)  # attributes of the module, for what depends on the device
    spills: bool = False


def hyper_connection_cases() -> Iterator[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32

    def arguments(
        function: str, tokens: int, d: int, streams: int, dtype: torch.dtype, parameters: torch.dtype
    ) -> dict:
        def empty(*shape: int, dtype: torch.dtype = parameters) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        head = "head" in function
        mix = streams if head else (2 + streams) * streams
        post = {
            "output": empty(tokens, d, dtype=dtype),
            "hidden_streams": empty(tokens, streams, d, dtype=dtype),
            "post": empty(tokens, streams, dtype=fp32),
            "comb": empty(tokens, streams, streams, dtype=fp32),
        }
        if function == "hc_post":
            return post
        pre = {
            "fn": empty(mix, streams * d),
            "base": empty(mix),
            "scale": empty(1 if head else 3),
            "norm_weight": empty(d),
        }
        return {**(post if "post" in function else {"hidden_streams": post["hidden_streams"]}), **pre}

    common = list(itertools.product(("hc_pre", "hc_post", "hc_post_pre", "hc_head", "hc_post_head"), (1, 8192)))
    sizes = [(*pair, 4096, 4, bf16, fp32, False) for pair in common]
    sizes += [("hc_post_pre", tokens, 7168, 4, bf16, fp32, False) for tokens in (1, 8192)]
    sizes += [("hc_post_pre", 8192, 4096, 4, fp32, fp32, True), ("hc_post_pre", 8192, 4096, 4, bf16, bf16, True)]
    sizes += [("hc_post_pre", 8192, 1000, streams, torch.float16, fp32, True) for streams in (1, 2, 8)]
    for function, tokens, d, streams, dtype, parameters, spills in sizes:
        yield Case(
            "triton",
            "dsv4_fusion.ops.triton.hyper_connection",
            function,
            arguments(function, tokens, d, streams, dtype, parameters),
            f"{function}-{tokens}x{streams}x{d}-{dtype}-{parameters}".replace("torch.", ""),
            {"_has_dependent_launch": lambda device: True},
            spills,
        )


CASES = [*hyper_connection_cases()]


# Triton


class Recorder:
    """Stands for a Triton kernel: notes what it is launched with."""

    def __init__(self, kernel: Any, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def record(patch: pytest.MonkeyPatch) -> list[tuple[Any, tuple, dict]]:
    """What the Triton modules launch from now on: kernel, arguments, options."""
    from triton import JITFunction

    launches: list[tuple[Any, tuple, dict]] = []
    for module in [each for name, each in sys.modules.items() if name.startswith("dsv4_fusion.ops.triton.")]:
        for name, value in {**vars(module)}.items():
            if isinstance(value, JITFunction):
                patch.setattr(module, name, Recorder(value, launches))
    return launches


POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def stack_bytes(cubin: bytes, tools: Path, folder: Path) -> int | None:
    """What a thread spills to; the tool is part of the Triton wheel."""
    tool = tools / "cuobjdump"
    if not tool.exists():
        return None
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout
    found = re.search(r"STACK:(\d+)", text)
    return int(found[1]) if found else None


def compile_triton(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Binary]:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    if triton.knobs.runtime.interpret:
        pytest.skip("kernels are interpreted here")
    module = importlib.import_module(case.module)
    launches = record(monkeypatch)
    for name, value in case.patch.items():
        monkeypatch.setattr(module, name, value)
    getattr(module, case.function)(**case.arguments)
    monkeypatch.undo()  # the kernels call functions of the module

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    binaries = []
    for kernel, args, options in launches:
        signature, constants, attributes = {}, {}, {}
        for index, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, TensorDescriptor):
                dtype = POINTERS[value.base.dtype].removeprefix("*")
                signature[parameter.name] = f"tensordesc<{dtype}{value.block_shape}>"
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        cubin = compiled.asm["cubin"]
        binaries.append(Binary(kernel.__name__, cubin, stack_bytes(cubin, tools, folder)))
    return binaries


COMPILE = {"triton": compile_triton}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.language}-{case.name}")
def test_compiles_for_sm90(case, tmp_path, monkeypatch):
    binaries = COMPILE[case.language](case, tmp_path, monkeypatch)
    assert binaries, f"{case.function} launched no kernel"
    for binary in binaries:
        assert binary.cubin[:4] == b"\x7fELF", binary.kernel
        if binary.stack is not None and not case.spills:
            assert binary.stack == 0, f"{binary.kernel} spills {binary.stack} bytes a thread"


def test_every_operator_is_covered():
    operators = {name for name in vars(torch.ops.dsv4) if name.startswith("hc_")} | {"hc_pre", "hc_post", "hc_post_pre"}
    assert operators <= {case.function for case in CASES}
    assert hyper_connection.__name__.rpartition(".")[2] in CASES[0].module
