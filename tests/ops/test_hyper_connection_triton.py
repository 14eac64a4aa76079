"""The Triton kernels of mHC: interpreted on the CPU, and on a GPU what test_hyper_connection.py does not cover.

Run as a script with TRITON_INTERPRET=1, this file compares the interpreted kernels and prints the errors as JSON; a
test does that in one subprocess, because Triton reads the variable when it is imported.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script

from dsv4_fusion import ops
from dsv4_fusion.ops import hyper_connection as hc
from tests.ops.interpreted import patch_once_a_launch

PRE, POST, POST_PRE, HEAD, POST_HEAD = NAMES = ("hc_pre", "hc_post", "hc_post_pre", "hc_head", "hc_post_head")
REFERENCES = {name: getattr(hc, f"{name}_ref") for name in NAMES}
PER_TOKEN = ("output", "hidden_streams", "post", "comb")
SHARED = ("fn", "base", "scale", "norm_weight")
ARGUMENTS = {PRE: PER_TOKEN[1:2] + SHARED, POST: PER_TOKEN, POST_PRE: PER_TOKEN + SHARED}
ARGUMENTS |= {HEAD: ARGUMENTS[PRE], POST_HEAD: ARGUMENTS[POST_PRE]}


def make_inputs(
    name: str,
    lead: tuple[int, ...],
    d: int,
    streams: int = 4,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype = torch.float32,
    norm: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, torch.Tensor | None]:
    """Inputs as a model has them: a projection of size 1 / √K, and mixes that are scaled far, hardly and a little."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    mix = streams if "head" in name else (2 + streams) * streams
    scale = torch.tensor([2.0, 0.02, 0.25][: 1 if "head" in name else 3], device=device)
    inputs = {
        "output": normal(*lead, d).to(dtype),
        "hidden_streams": normal(*lead, streams, d).to(dtype),
        "post": 2 * torch.sigmoid(normal(*lead, streams)),
        "comb": torch.softmax(normal(*lead, streams, streams), -1),
        "fn": (normal(mix, streams * d) / math.sqrt(streams * d)).to(parameters),
        "base": normal(mix).to(parameters),
        "scale": scale.to(parameters),
        "norm_weight": (1 + 0.1 * normal(d)).to(parameters) if norm else None,
    }
    return {key: inputs[key] for key in ARGUMENTS[name]}


def as_list(result: torch.Tensor | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def run(name: str, inputs: dict) -> list[torch.Tensor]:
    return as_list(getattr(ops, name)(**inputs, implementation="triton"))


def errors(name: str, inputs: dict, outputs: list[torch.Tensor]) -> list[dict[str, float]]:
    """For each output, how far it and the reference in the inputs' own precision are from float64.

    What follows from rounded streams is judged on the streams as they were rounded: a tie may fall either way.
    """
    if name == POST_PRE:
        after = {"hidden_streams": outputs[0], **{key: inputs[key] for key in SHARED}}
        before = {key: inputs[key] for key in PER_TOKEN}
        return errors(POST, before, outputs[:1]) + errors(PRE, after, outputs[1:])
    plain = as_list(REFERENCES[name](**inputs))
    if name == POST_HEAD:
        name = HEAD
        streams = hc.hc_post_ref(*(inputs[key] for key in PER_TOKEN))
        inputs = {"hidden_streams": streams, **{key: inputs[key] for key in SHARED}}
    exact = REFERENCES[name](**{key: None if value is None else value.double() for key, value in inputs.items()})
    found = []
    for output, ours, best in zip(outputs, plain, as_list(exact), strict=True):
        assert (output.shape, output.dtype) == (ours.shape, ours.dtype)
        assert output.is_contiguous()
        norm, largest = best.norm(), best.abs().max()
        found.append(
            {
                "norm": ((output - best).norm() / norm).item(),
                "norm of reference": ((ours - best).norm() / norm).item(),
                "largest": ((output - best).abs().max() / largest).item(),
                "largest of reference": ((ours - best).abs().max() / largest).item(),
            }
        )
    return found


def assert_exact(found: list[dict[str, float]], slack: float = 2**-22) -> None:
    """No larger than the rounding of the reference; the slack is two bits of fp32, where that rounding is luck."""
    for index, error in enumerate(found):
        for key in ("norm", "largest"):
            assert error[key] <= 1.05 * error[f"{key} of reference"] + slack, (index, key, error)


# Interpreted

CASES = {
    "fp32": {"lead": (3,), "d": 64},
    "bf16, odd T, tail of D": {"lead": (7,), "d": 72, "dtype": torch.bfloat16},
    "two tiles of tokens": {"lead": (33,), "d": 8, "dtype": torch.bfloat16},
    "D 96, no norm": {"lead": (2,), "d": 96, "dtype": torch.bfloat16, "norm": False},
    "bf16 parameters": {"lead": (2,), "d": 64, "dtype": torch.bfloat16, "parameters": torch.bfloat16},
    "fp16": {"lead": (2,), "d": 64, "dtype": torch.float16, "parameters": torch.float16},
    "2 streams": {"lead": (3,), "d": 64, "streams": 2, "dtype": torch.bfloat16},
    "8 streams": {"lead": (1,), "d": 40, "streams": 8},
    "1 stream": {"lead": (1, 2), "d": 64, "streams": 1, "dtype": torch.bfloat16, "norm": False},
    "two groups of slices": {"lead": (1,), "d": 32 * 17, "dtype": torch.bfloat16},
}
EVERY = ("fp32", "bf16, odd T, tail of D")  # for every operator
MANY = ("bf16, odd T, tail of D", "8 streams", "two groups of slices")  # again, as if there were many tokens


def run_interpreted() -> dict[str, list]:
    from dsv4_fusion.ops.triton import hyper_connection as kernels

    found = {}
    for few, cases in ((kernels.FEW_TOKENS, list(CASES)), (0, MANY)):
        kernels.FEW_TOKENS = few
        for case, name in itertools.product(cases, NAMES):
            if case not in EVERY and name not in (POST_PRE, POST_HEAD):  # these two hold the parts of the others
                continue
            inputs = make_inputs(name, **CASES[case])
            found[f"{name}: {case}{'' if few else ' (many)'}"] = errors(name, inputs, run(name, inputs))
    for name in NAMES:
        assert all(output.numel() == 0 for output in run(name, make_inputs(name, (2, 0), 64)))
    return found


def test_interpreted():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * (len(CASES) + len(MANY)) + 3 * (len(EVERY) + 1)
    for case, errors_of_outputs in found.items():
        try:
            assert_exact(errors_of_outputs)
        except AssertionError as error:
            raise AssertionError(case) from error


# On a GPU

TOKENS = (0, 1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 128, 129, 256, 257, 511, 512, 513, 1000, 4096, 16384)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        {"dtype": torch.float32},
        {"dtype": torch.float16},
        {"dtype": torch.float16, "parameters": torch.float16},
        {"dtype": torch.bfloat16, "parameters": torch.bfloat16},
        {"dtype": torch.bfloat16, "parameters": torch.float64},
        {"dtype": torch.bfloat16, "streams": 1},
        {"dtype": torch.bfloat16, "streams": 2},
        {"dtype": torch.bfloat16, "streams": 8},
        {"dtype": torch.float32, "streams": 8},
        {"dtype": torch.bfloat16, "d": 8},
        {"dtype": torch.bfloat16, "d": 1000},
    ],
    ids=str,
)
def test_other_sizes_and_dtypes(case):
    for name, tokens in itertools.product(NAMES, (3, 700)):
        inputs = make_inputs(name, (tokens,), device="cuda", **{"d": 1024, **case})
        assert_exact(errors(name, inputs, run(name, inputs)))


@pytest.mark.gpu
def test_bf16_post_and_comb():
    inputs = make_inputs(POST_PRE, (5,), 4096, dtype=torch.bfloat16, device="cuda")
    inputs |= {key: inputs[key].bfloat16() for key in ("post", "comb")}
    assert_exact(errors(POST_PRE, inputs, run(POST_PRE, inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [{"dtype": torch.float32}, {"dtype": torch.float16}, {"streams": 8}, {"streams": 2}])
def test_batch_invariance_of_other_kernels(case):
    case = {"dtype": torch.bfloat16, **case}
    for name in NAMES:
        batch = make_inputs(name, (1200,), 1032, device="cuda", **case)
        outputs = run(name, batch)
        for first, last in ((0, 1), (1199, 1200), (600, 800)):
            part = {key: value if key in SHARED else value[first:last] for key, value in batch.items()}
            for output, expected in zip(run(name, part), outputs, strict=True):
                assert torch.equal(output, expected[first:last])


@pytest.mark.gpu
def test_the_token_count_compiles_nothing():
    """Two pairs of kernels serve every token count: few and many."""
    triton = pytest.importorskip("triton")
    compiled, hook = [], triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(kwargs["fn"].name)
    try:
        for tokens in TOKENS:
            run(POST_PRE, make_inputs(POST_PRE, (tokens,), 520, dtype=torch.bfloat16, device="cuda"))
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert len(compiled) == 4, compiled


if __name__ == "__main__":
    patch_once_a_launch()
    print(json.dumps(run_interpreted()))
