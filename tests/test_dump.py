"""The dump: which files, what is in them and what is not, and that nothing about it can fail a compilation."""

from __future__ import annotations

import ast
import errno
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

pytest.importorskip("transformers.models.deepseek_v4")

from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

import dsv4_fusion
from dsv4_fusion import FusionOptions, Report, Site
from dsv4_fusion.passes import _dump
from dsv4_fusion.passes._manager import FusionPass

ROOT = Path(__file__).resolve().parent.parent
STREAMS = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0))
WEIGHT = 0.72913  # nowhere else


@pytest.fixture(autouse=True)
def first_in_the_process(monkeypatch):
    """No graph dumped and no warning given so far, no variable of the caller's."""
    monkeypatch.setattr(_dump, "_dumped", Counter())
    monkeypatch.setattr(_dump, "_failed", set())
    monkeypatch.delenv("DSV4_FUSION_DUMP", raising=False)
    torch._dynamo.reset()


@pytest.fixture
def connection() -> torch.nn.Module:
    module = DeepseekV4HyperConnection(DeepseekV4Config(hidden_size=32, hc_sinkhorn_iters=3))
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, WEIGHT)
    return module.eval()


def files(folder: Path) -> dict[str, str]:
    """The texts of a dump by name, with each hash as #."""
    return {re.sub(r"_[0-9a-f]{10}\b", "_#", path.name): path.read_text() for path in folder.iterdir()}


class Breaks(CustomGraphPass):
    """Another epsilon in one of Sinkhorn's iterations."""

    def __call__(self, graph):
        adds = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
        [add for add in adds if isinstance(add.args[1], float)][-1].update_arg(1, 2e-3)

    def uuid(self):
        return "breaks"


# What is written


def test_the_files_of_a_graph(connection, tmp_path):
    folder = tmp_path / "new" / "dump"
    report = dsv4_fusion.explain(connection, STREAMS, options={"dump": folder})
    found = files(folder)
    assert set(found) == {
        "graph_000_#.before.py",
        "graph_000_#.after.py",
        "graph_000_#.matches.json",
        "pattern_hc_pre_#.py",
    }
    assert os.listdir(tmp_path) == ["new"]
    for name, text in found.items():
        assert str(WEIGHT) not in text and str(STREAMS[0, 0, 0, 0].item())[:6] not in text
        if name.endswith(".py"):
            ast.parse(text)
    before, after = found["graph_000_#.before.py"], found["graph_000_#.after.py"]
    assert 'arg0_1: "f32[2, 3, 4, 32][384, 128, 32, 1]cpu"' in before  # shape, stride, device
    assert "modeling_deepseek_v4.py:" in before and "code: comb = torch.softmax(" in before
    assert "aten.exp" in before and "dsv4.hc_pre" not in before
    assert "torch.ops.dsv4.hc_pre.default(" in after and "aten.exp" not in after
    table = json.loads(found["graph_000_#.matches.json"])
    assert {name: table[name] for name in report.as_dict()} == report.as_dict()
    for name in [f"{table['graph']}.before.py", *(f"{pattern}.py" for pattern in table["patterns"])]:
        assert (folder / name).is_file()
    pattern = found["pattern_hc_pre_#.py"]
    assert "hc_eps = 0.0319: any number" in pattern and "norm_eps" not in pattern
    assert 'new_streams: "f32[1009, 1013, 4, 1021]' in pattern and "aten.exp" in pattern


def test_the_pattern_of_a_near_miss(connection, tmp_path):
    options = {"dump": tmp_path, "joint_custom_pre_pass": Breaks()}
    (miss,) = dsv4_fusion.explain(connection, STREAMS, options=options).near_misses
    found = files(tmp_path)
    table = json.loads(found["graph_000_#.matches.json"])
    assert table["near_misses"][0]["reason"] == miss.reason and not table["sites"]
    assert [name for name in found if name.startswith("pattern")] == ["pattern_hc_pre_#.py"]
    assert "0.002" in found["graph_000_#.before.py"]  # after the user's own pass
    assert "aten.exp" in found["graph_000_#.after.py"]


def test_graphs_are_counted_and_named_by_their_structure(connection, tmp_path, monkeypatch):
    def names(streams: torch.Tensor) -> list[str]:
        dsv4_fusion.explain(connection, streams, options={"dump": tmp_path})
        return sorted(path.name.split(".")[0] for path in tmp_path.glob("*.json"))

    (first,) = names(STREAMS)
    same = names(STREAMS)
    assert [name.rpartition("_")[0] for name in same] == ["graph_000", "graph_001"]
    assert same[0] == first and same[1].endswith(first[-10:])
    monkeypatch.setattr(_dump, "_dumped", Counter())  # as in another run
    assert names(STREAMS) == same
    assert not names(STREAMS[:1])[-1].endswith(first[-10:])  # another shape


def test_the_variable_and_the_option(connection, tmp_path, monkeypatch):
    monkeypatch.setenv("DSV4_FUSION_DUMP", str(tmp_path / "variable"))
    dsv4_fusion.explain(connection, STREAMS)
    dsv4_fusion.explain(connection, STREAMS, options={"dump": str(tmp_path / "option")})
    assert len(files(tmp_path / "variable")) == len(files(tmp_path / "option")) == 4
    monkeypatch.setenv("DSV4_FUSION_DUMP", "")
    assert FusionOptions().dump_folder is None


class Bytes(os.PathLike):
    def __fspath__(self):
        return b"dump"


@pytest.mark.parametrize("folder", ["", True, 3, b"dump", "a\0b", Bytes()])
def test_what_is_no_folder_is_refused(folder):
    with pytest.raises(ValueError, match=r"option dump: got .*expected None or a folder"):
        FusionOptions(dump=folder)


def test_a_training_graph_and_a_strict_failure_are_dumped_too(connection, tmp_path):
    net = torch.nn.Linear(2, 2)
    options = {"dump": tmp_path, "strict": True}
    with pytest.raises(Exception, match="strict: 1 fused sites"), torch.no_grad():
        torch.compile(net, backend="dsv4_fusion", options=options)(torch.ones(1, 2))
    with pytest.raises(Exception, match="strict: 1 fused sites"):
        torch.compile(connection, backend="dsv4_fusion", options=options)(STREAMS)
    found = files(tmp_path)
    assert json.loads(found["graph_000_#.matches.json"])["counts"] == {}
    assert "training" in json.loads(found["graph_001_#.matches.json"])["notes"][0]
    assert len(found) == 6


def test_the_report_as_a_dict():
    report = Report([Site("layers.0", "hc_pre", "dsv4::hc_pre", 58, True)], nodes_before=63, nodes_after=9, graphs=1)
    told = json.loads(json.dumps(report.as_dict()))
    assert told["counts"] == {"hc_pre": 1} and told["nodes_after"] == 9 and told["seconds"] == 0.0
    assert told["sites"] == [
        {"path": "layers.0", "fusion": "hc_pre", "op": "dsv4::hc_pre", "nodes": 58, "rewritten": True}
    ]


# What goes wrong


def full_disk(path, *args, **kwargs):
    file = open(path, *args, **kwargs)  # noqa: SIM115
    file.write("half")
    file.close()
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(graph):
    raise RuntimeError("no text for this graph")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("open", full_disk, "OSError.*No space left"), ("readable", broken, "RuntimeError: no text for this graph")],
)
def test_what_goes_wrong_is_one_warning(name, value, reason, connection, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_dump, name, value, raising=False)
    for _ in range(2):
        assert dsv4_fusion.explain(connection, STREAMS, options={"dump": tmp_path}).counts == {"hc_pre": 1}
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.search(f"no dump to {re.escape(str(tmp_path))}, compiling goes on: {reason}", warning)
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_made(connection, tmp_path, caplog):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert dsv4_fusion.explain(connection, STREAMS, options={"dump": folder}).counts == {"hc_pre": 1}
    assert len([record for record in caplog.records if "no dump to" in record.getMessage()]) == 2  # one a folder
    assert (tmp_path / "file").read_text() == "kept"


def test_a_link_in_the_folder_is_not_followed(connection, tmp_path):
    folder, outside = tmp_path / "dump", tmp_path / "outside"
    dsv4_fusion.explain(connection, STREAMS, options={"dump": folder})
    outside.write_text("kept")
    (pattern,) = folder.glob("pattern*")
    pattern.unlink()
    pattern.symlink_to(outside)
    dsv4_fusion.explain(connection, STREAMS, options={"dump": folder})
    assert outside.read_text() == "kept" and not pattern.is_symlink()


# Caches, logs and the trace


def test_a_dump_is_never_hidden_by_a_cache(tmp_path):
    def hits(**options) -> int:
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            torch.compile(torch.sin, backend="dsv4_fusion", options={"reference": True, **options})(STREAMS)
        return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]

    with fresh_cache():
        assert hits(dump=tmp_path) == 0
        assert hits() == 0  # nothing was written to it either
        assert hits() > 0
        assert hits(dump=tmp_path) == 0
    assert len(files(tmp_path)) == 6
    assert FusionPass(FusionOptions(dump=tmp_path), print).uuid() is None
    assert FusionPass(FusionOptions(), print).uuid() is not None


OTHER_PROCESS = """
import dsv4_fusion  # before torch: TORCH_LOGS imports it from within torch
import torch
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection
net = DeepseekV4HyperConnection(DeepseekV4Config(hidden_size=32, hc_sinkhorn_iters=3)).eval()
with torch.no_grad():
    torch.compile(net, backend="dsv4_fusion", options={"reference": True})(torch.zeros(2, 3, 4, 32))
"""


def test_logs_trace_and_names_of_another_process(connection, tmp_path):
    dsv4_fusion.explain(connection, STREAMS, options={"dump": tmp_path / "here"})
    environment = os.environ | {
        "DSV4_FUSION_DUMP": str(tmp_path / "there"),
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TORCH_LOGS": "+dsv4_fusion",
        "TORCH_TRACE": str(tmp_path / "trace"),
    }
    command = [sys.executable, "-c", OTHER_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 hc_pre; 0 near misses" in done.stderr and "dsv4::hc_pre, 58 nodes" in done.stderr
    assert sorted(os.listdir(tmp_path / "here")) == sorted(os.listdir(tmp_path / "there"))

    (trace,) = (tmp_path / "trace").iterdir()
    artefacts = re.findall(r'"artifact": \{"name": "dsv4_fusion_(\w+)", "encoding": "(\w+)"\}', trace.read_text())
    (pattern,) = (path.stem for path in (tmp_path / "there").glob("pattern*"))
    expected = [("before", "string"), ("after", "string"), ("matches", "json"), (pattern, "string")]
    assert artefacts == expected
    assert "torch.ops.dsv4.hc_pre.default(" in trace.read_text()
