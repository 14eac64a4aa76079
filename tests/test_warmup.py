"""``warmup``: which calls it finds in a model, that they need all the kernels there are, and what it says."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers.models.deepseek_v4")

from dsv4_fusion import __main__ as cli
from dsv4_fusion import _doctor, _warmup
from dsv4_fusion.ops import _library

ROOT = Path(__file__).resolve().parent.parent
MOST = 8192
BATCHES = sorted({*range(1, 300), *range(300, MOST, 331), 511, 512, 513, 2047, 2048, 2049, MOST})


@pytest.fixture(scope="module")
def traced() -> tuple[list[_warmup.Call], list, list]:
    """The calls, and what waited to be compiled before and after they were found."""
    kinds = ["compressed_sparse_attention", "heavily_compressed_attention"]
    fields = cli.config_fields("tiny", 2) | {"layer_types": kinds, "mlp_layer_types": ["moe"] * 2}
    fields |= {"index_head_dim": 64, "hc_sinkhorn_iters": 1}
    before = list(_library._prepared)
    found = _warmup.calls(cli.meta_model(fields))
    return found, before, list(_library._prepared)


@pytest.fixture(scope="module")
def work(traced) -> list[_warmup.Call]:
    return traced[0]


def test_the_calls_of_a_model(work):
    """Of every kind of layer, and of what follows on a prompt with a cache."""
    assert [call.operator for call in work] == [
        *("hc_pre", "hc_post_pre", "hc_post_head"),
        *("indexer_topk", "compress_csa", "compress_csa", "compress_hca"),  # the indexer has a compressor of its own
        *("indexer_topk", "compress_csa", "compress_csa"),  # on more keys than tokens / 4, and with a window before
    ]
    streams = work[1].args[1]
    assert streams.shape == ((1, 0), (1, 1), (4, 0), (64, 0))
    assert streams.dtype == torch.bfloat16
    made = streams.make(7, "cpu")
    assert made.shape == (1, 7, 4, 64) and made.is_contiguous() and not made.any()
    keys, later = work[3].args[1], work[7].args[1]
    assert keys.shape == ((1, 0), (1, 4), (64, 0)) and later.shape == ((1, 0), (1, 2), (64, 0))
    assert [len(call.args) for call in work if call.operator == "compress_csa"] == [6, 6, 8, 8]
    kv, *_, cos, _ = work[6].arguments(17, "meta")  # whole windows
    assert kv.shape[1] == 32 and cos.shape[1] == 2


def test_one_layer_of_each_kind():
    class Config:
        layer_types, mlp_layer_types = ["b", "a", "b", "a", "b"], ["x", "x", "x", "y", "x"]

    assert _warmup._one_of_each(Config) == 4


def test_nothing_is_left_for_the_next_call(traced):
    """Tracing for the warm-up must not have kernels compiled by whoever calls an operator next."""
    _, before, after = traced
    assert after == before


def test_token_counts():
    assert _warmup.token_counts(1) == [1]
    assert _warmup.token_counts(8) == [1, 2, 4, 8]
    assert _warmup.token_counts(100) == [1, 2, 4, 8, 16, 32, 64, 100]


def compilations(call: _warmup.Call, counts: list[int]) -> set:
    """What Triton would compile for these token counts."""
    from tests.ops.test_compile_keys import compile_keys

    (entry,) = [each.entry for each in _library.operators[call.operator] if each.name == "triton"]
    module, _, function = entry.partition(":")
    calls = [(call.arguments(tokens, "meta"), dict(call.kwargs)) for tokens in counts]
    compiled = compile_keys(module, function, calls)
    return {(kernel, key) for kernel, keys in compiled.items() for key in keys}


def test_afterwards_no_batch_size_compiles_anything(work):
    if getattr(pytest.importorskip("triton").knobs.runtime, "interpret", False):
        pytest.skip("kernels are interpreted here")
    for call in work:
        warmed = compilations(call, _warmup.token_counts(MOST))
        assert 1 <= len(warmed) <= 6  # two launches, three variants each at most
        assert not compilations(call, BATCHES) - warmed, call.operator


def test_tilelang_compiles_for_a_model_not_for_tokens(work):
    pytest.importorskip("tilelang")
    module = importlib.import_module("dsv4_fusion.ops.tilelang.hyper_connection")
    for call in work[:3]:
        operator = getattr(module, call.operator)
        assert len({operator.key(*[arg.make(t, "meta") for arg in call.args]) for t in BATCHES}) == 1


def test_a_call_that_fails_is_told(work):
    good = _warmup.compile_call(work[0], [1, 3], "cpu")
    assert (good["operator"], good["implementation"], good["problem"]) == ("hc_pre", "reference", None)
    wrong = _warmup.Call("hc_pre", work[0].args, (("rms_eps", -1.0),))
    assert "rms_eps must be a positive" in _warmup.compile_call(wrong, [1], "cpu")["problem"]


def test_processes_and_what_they_return(work, monkeypatch):
    """As on a GPU, with the operators' references in the place of kernels."""
    results = list(_warmup.warm(work[2:3], 2, 1, lambda result: None, device="cpu"))
    assert [(result["operator"], result["problem"]) for result in results] == [("hc_post_head", None)]


# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_without_a_gpu(capsys, form):
    code = cli.main(["warmup", "--config", "tiny", *form])
    out = capsys.readouterr().out
    assert code == 1
    problem = json.loads(out)["problem"] if form else out
    assert "kernels are compiled for the GPU of this machine" in problem and _doctor.no_gpu() in problem


@pytest.mark.parametrize(("problem", "code"), [(None, 0), ("RuntimeError: ptxas", 3)])
def test_progress_table_and_exit_code(capsys, monkeypatch, work, problem, code):
    def result(operator, implementation, kept, problem=None):
        return {
            "operator": operator,
            "implementation": implementation,
            "kept": kept,
            "seconds": 2.0,
            "problem": problem,
        }

    def warm(work, largest, jobs, done):
        for made in (result("hc_pre", "tilelang", True), result("indexer_q_fp8", "cutedsl", False, problem)):
            done(made)
            yield made

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "calls", lambda net: work[:2])
    monkeypatch.setattr(cli, "warm", warm)
    arguments = ["warmup", "--config", "tiny", "--layers", "1"]
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out.startswith("hc_pre: tilelang, 2.0 s\nindexer_q_fp8: ")
    assert ("not kept on disk" in out) == (problem is None) and ("ptxas" in out) == (problem is not None)
    assert err.splitlines()[-1] == f"[{'#' * 30}] 2/2 indexer_q_fp8"
    assert cli.main([*arguments, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert [kernel["operator"] for kernel in found["kernels"]] == ["hc_pre", "indexer_q_fp8"]
    assert set(found["caches"]) == {"inductor", "triton", "tilelang"}


def test_nothing_to_compile(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "calls", lambda net: [])
    assert cli.main(["warmup", "--config", "tiny", "--layers", "1"]) == 1
    assert "nothing in this model is fused" in capsys.readouterr().out


RUN = """
import torch
from dsv4_fusion import __main__ as cli, _warmup
for call in _warmup.calls(cli.meta_model(cli.config_fields("tiny", 1))):
    for tokens in (1, 3, 17, 64, 100, 1000, 2048):
        call(tokens, "cuda")
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_on_a_gpu_another_process_compiles_nothing(tmp_path):
    folders = {f"{name}_CACHE_DIR": str(tmp_path / name) for name in ("TORCHINDUCTOR", "TRITON", "TILELANG")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | folders | {"PYTHONPATH": path}
    warmup = [sys.executable, "-m", "dsv4_fusion", "warmup", "--config", "tiny", "--layers", "1", "--tokens", "2048"]
    done = subprocess.run([*warmup, "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(kernel["kept"] for kernel in json.loads(done.stdout)["kernels"])

    def compiled() -> set[str]:
        return {str(file) for file in tmp_path.rglob("*") if file.suffix in (".cubin", ".so", ".cu")}

    before = compiled()
    assert before
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert compiled() == before
