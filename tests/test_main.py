"""The command line: what ``doctor`` and ``explain`` say, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsv4_fusion
from dsv4_fusion import __main__ as cli
from dsv4_fusion import _doctor
from dsv4_fusion.ops import _library


def run(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture
def h200(monkeypatch):
    """A machine with one GPU and the compilers of the test's choice."""

    def pretend(*installed: str) -> None:
        compiler = {"version": "1", "problem": None}, {"version": None, "problem": "not installed"}
        monkeypatch.setattr(_doctor, "_compiler", lambda module: compiler[module not in installed])
        monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: name in installed or None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        gpu = {"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 139.8}
        monkeypatch.setattr(_doctor, "_gpu", lambda index: gpu)

    return pretend


# doctor


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_without_a_gpu(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["gpus"] == [] and found["no_gpu"]
    assert found["versions"]["torch"] == str(torch.__version__)
    assert not any(found["languages"].values())
    assert set(found["compilers"]) == {"triton", "tilelang", "cutlass", "tvm_ffi"}
    for name, choice in found["operators"].items():
        assert choice["chosen"] == "reference"
        assert set(choice["others"]) == {entry.name for entry in _library.operators[name]}
        assert all(choice["others"].values()), name


def test_doctor_with_every_compiler(capsys, h200):
    h200("triton", "tilelang", "cutlass", "tvm_ffi")
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0
    chosen = {name: choice["chosen"] for name, choice in found["operators"].items()}
    triton = {"indexer_k_load", "quantize_fp8"}
    triton |= {name for name in _library.operators if name.startswith(("compress_", "kv_"))}
    triton -= {"compress_csa_insert", "compress_hca_insert"}
    assert chosen == {
        name: "triton" if name in triton else "tilelang" if name.startswith("hc_") else "cutedsl"
        for name in _library.operators
    }
    others = found["operators"]["hc_post_pre"]["others"]
    assert others["triton"] == "usable; tilelang comes first"
    assert "PyTorch" in others["reference"]


def test_doctor_passes_over_what_is_missing(capsys, h200):
    h200("triton", "cutlass")
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "hc_post_pre: triton\n    not tilelang: tilelang is not installed" in out
    assert "indexer_q_fp8: triton\n    not cutedsl: cutedsl is not installed: it needs tvm_ffi" in out
    assert "NVIDIA H200, compute capability 9.0" in out


def test_doctor_on_a_gpu_without_a_compiler(capsys, h200):
    h200()
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 1
    assert {choice["chosen"] for choice in json.loads(out)["operators"].values()} == {"reference"}


def test_a_compiler_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "tilelang.py").write_text("print('noise')\nraise OSError('libcuda.so.1: cannot open\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tilelang", raising=False)
    assert _doctor._compiler("tilelang")["problem"] == "cannot be imported: OSError: libcuda.so.1: cannot open"


@pytest.mark.parametrize("name", sorted(_library.operators))
def test_arguments_are_the_operators(name):
    """Their checks take what doctor asks about."""
    args, options = _doctor.arguments(name)
    getattr(torch.ops.dsv4, name)(*args, **options)
    wrong = list(args)
    wrong[0] = wrong[0].float()[..., :-1]
    with pytest.raises(ValueError, match=name):
        getattr(torch.ops.dsv4, name)(*wrong, **options)


def test_caches(monkeypatch, tmp_path):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TILELANG_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert str(_doctor.caches()["inductor"]) == default_cache_dir()
    triton = pytest.importorskip("triton")
    assert str(_doctor.caches()["triton"]) == triton.knobs.cache.dir
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "new" / "tilelang"))
    assert _doctor.caches()["tilelang"] == tmp_path / "new" / "tilelang"


def test_writable(tmp_path):
    (tmp_path / "file").touch()
    assert _doctor.writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    assert not _doctor.writable(tmp_path / "file" / "folder")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert _doctor.writable(locked / "folder") == os.access(locked, os.W_OK)  # root can always write


# explain


def test_explain_is_what_a_real_model_gives(capsys, tmp_path):
    """On the meta device as with weights on the CPU; from DeepSeek's own form of the fields, cut to one layer."""
    pytest.importorskip("transformers.models.deepseek_v4")
    file = str(tmp_path / "config.json")
    ratios = {"num_hidden_layers": 3, "compress_ratios": [4, 128, 0, 0], "num_hash_layers": 0, "hc_sinkhorn_iters": 2}
    Path(file).write_text(json.dumps(cli.TINY | ratios | {"model_type": "deepseek_v4", "torch_dtype": "bfloat16"}))
    code, out, _ = run(capsys, "explain", "--config", file, "--layers", "1", "--tokens", "32", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["config"], found["layers"], found["tokens"]) == (file, 1, 32)
    net = cli.meta_model(cli.config_fields(file, 1)).to_empty(device="cpu")
    for tensor in [*net.parameters(), *net.buffers()]:
        tensor.data.zero_()
    real = dsv4_fusion.explain(net, torch.zeros(1, 32, dtype=torch.long), use_cache=False)
    assert found["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    assert (
        found["report"]["counts"]
        == real.counts
        == {
            "hc_pre": 1,
            "hc_post_pre": 1,
            "hc_post_head": 1,
            "compress_csa": 2,
        }
    )
    assert [site["path"] for site in found["report"]["sites"]] == [site.path for site in real.sites]
    assert [entry["path"] for entry in found["report"]["left_alone"]] == [entry.path for entry in real.left_alone]
    assert len(real.left_alone) == 1  # the indexer's scores


def test_explain_tiny(capsys, monkeypatch, tmp_path):
    """A table on stdout, progress on stderr."""
    pytest.importorskip("transformers.models.deepseek_v4")
    monkeypatch.setattr(cli, "SILENT", 0.0)
    page = tmp_path / "report.html"
    code, out, err = run(capsys, "explain", "--config", "tiny", "--layers", "1", "--tokens", "8", "--html", str(page))
    assert code == 0 and out.endswith(f"written: {page}\n")
    assert "1 hc_post_head, 1 hc_post_pre, 1 hc_pre" in page.read_text()
    assert out.startswith("tiny: 1 layer, ") and "1 hc_post_head, 1 hc_post_pre, 1 hc_pre; 0 near misses" in out
    assert "tracing 1 layer: 0 s" in err and "tracing" not in out


def test_flash_is_the_published_model():
    pytest.importorskip("transformers.models.deepseek_v4")
    net = cli.meta_model(cli.config_fields("flash", None))
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e9) == 284
    kinds = net.config.layer_types
    assert len(kinds) == 43
    assert kinds[:4] == ["sliding_attention"] * 2 + ["compressed_sparse_attention", "heavily_compressed_attention"]
    assert kinds[-1] == "compressed_sparse_attention"
    layer = net.model.layers[0]
    assert layer.attn_hc.fn.dtype == torch.float32 and layer.self_attn.q_a_proj.weight.dtype == torch.bfloat16


# wrong usage


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "doctor|explain|warmup"),
        (["repair"], "repair"),
        (["doctor", "--fast"], "--fast"),
        (["explain"], "--config"),
        (["explain", "--config", "tiny", "--layers", "0"], "'0', expected a number from 1"),
        (["explain", "--config", "tiny", "--tokens", "many"], "'many', expected a number from 1"),
        (["explain", "--config", "tiny", "--html", "report.pdf"], "'report.pdf', expected a file .html"),
        (["explain", "--config", "tiny", "--html", "no/such/folder/report.html"], "in a folder that exists"),
        (["warmup"], "--config"),
        (["warmup", "--config", "pro"], "takes tiny, flash or a model's config.json; 'pro'"),
        (["explain", "--config", "pro"], "takes tiny, flash or a model's config.json; 'pro'"),
        (["explain", "--config", "{list}"], "model_type is None"),
        (["explain", "--config", "{other}"], "model_type is 'llama'"),
        (["explain", "--config", "{broken}"], "takes tiny, flash"),
        (["explain", "--config", "{short}", "--layers", "3"], "has 2"),
        (["explain", "--config", "{wrong}"], "transformers does not take this configuration"),
    ],
)
def test_wrong_usage(capsys, tmp_path, argv, words):
    files = {
        "list": "[]",
        "other": '{"model_type": "llama"}',
        "broken": "{",
        "short": '{"model_type": "deepseek_v4", "num_hidden_layers": 2}',
        "wrong": '{"model_type": "deepseek_v4", "num_hidden_layers": 1, "layer_types": ["round"]}',
    }
    for name, text in files.items():
        Path(tmp_path, name).write_text(text)
    if "{wrong}" in argv:
        pytest.importorskip("transformers.models.deepseek_v4")
    code, out, err = run(capsys, *(word.format(**{name: tmp_path / name for name in files}) for word in argv))
    assert code == 2
    assert words in err and not out


def test_no_transformers(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, "explain", "--config", "tiny")
    assert code == 2
    assert "pip install 'transformers>=5.17'" in err


def test_old_transformers(capsys, monkeypatch, tmp_path):
    (tmp_path / "transformers.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = run(capsys, "explain", "--config", "tiny")
    assert code == 2
    assert "DeepseekV4Config" in err and "pip install 'transformers>=5.17'" in err


@pytest.mark.parametrize(("command", "codes"), [("doctor", "012"), ("explain", "012"), ("warmup", "0123")])
def test_help_documents_the_exit_codes(capsys, command, codes):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert [line.split()[0] for line in out.partition("exit codes:\n")[2].splitlines()] == [*codes]


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "dsv4_fusion", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"dsv4_fusion {dsv4_fusion.__version__}"
