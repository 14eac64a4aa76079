"""The three ways in, their options, what they say, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch._inductor.custom_graph_pass import CustomGraphPass

pytest.importorskip("transformers.models.deepseek_v4")

from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

import dsv4_fusion
from dsv4_fusion import FusionOptions, NearMiss, Report, Site, backend
from dsv4_fusion._cached import Table
from dsv4_fusion.passes._manager import FusionError

CONFIG = DeepseekV4Config(hidden_size=32, num_hidden_layers=1, hc_sinkhorn_iters=3)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No compiled code from an earlier test: on a cache hit the pass does not run."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def connection() -> torch.nn.Module:
    """One Hyper-Connection: the smallest module with a fusion in it."""
    torch.manual_seed(0)
    module = DeepseekV4HyperConnection(CONFIG)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


STREAMS = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reports(monkeypatch) -> list:
    """Every report the backend makes."""
    made = []
    monkeypatch.setattr(sys.modules["dsv4_fusion.backend"], "_log_report", made.append)
    return made


def same(got, expected) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


# Ways in


def test_by_name(connection, reports):
    compiled = torch.compile(connection, backend="dsv4_fusion", options={"reference": True})
    with torch.no_grad():
        assert same(compiled(STREAMS), connection(STREAMS))
    assert [report.counts for report in reports] == [{"hc_pre": 1}]
    assert reports[0].sites[0].rewritten
    assert reports[0].nodes_after < reports[0].nodes_before / 5


def test_fuse_instance(connection, reports):
    expected = connection(STREAMS)
    fused = dsv4_fusion.fuse(connection, reference=True, strict=True)
    assert fused is connection
    with torch.no_grad():
        assert same(fused(STREAMS), expected)
    assert reports[0].counts == {"hc_pre": 1}


def test_fuse_class(connection, reports):
    @dsv4_fusion.fuse(reference=True)
    class Fused(DeepseekV4HyperConnection):
        pass

    fused = Fused(CONFIG).eval()
    fused.load_state_dict(connection.state_dict())
    with torch.no_grad():
        assert same(fused(STREAMS), connection(STREAMS))
    assert reports[0].counts == {"hc_pre": 1}


def test_fuse_forward_method_and_function(connection, reports):
    class Fused(DeepseekV4HyperConnection):
        @dsv4_fusion.fuse(reference=True)
        def forward(self, streams):
            return super().forward(streams)

    fused = Fused(CONFIG).eval()
    fused.load_state_dict(connection.state_dict())

    @dsv4_fusion.fuse(reference=True, fullgraph=True)
    def function(streams):
        return connection(streams)

    with torch.no_grad():
        expected = connection(STREAMS)
        assert same(fused(STREAMS), expected)
        assert same(function(STREAMS), expected)
    assert [report.counts for report in reports] == [{"hc_pre": 1}] * 2


@pytest.mark.parametrize("target", [3, "model", int])
def test_fuse_refuses_what_is_no_model(target):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        dsv4_fusion.fuse(target)
    if not callable(target):
        with pytest.raises(TypeError, match=r"nn\.Module"):
            dsv4_fusion.explain(target)


def test_explain_prints_a_table_and_leaves_the_module_alone(connection):
    report = dsv4_fusion.explain(connection, STREAMS)
    text = str(report)
    assert "dsv4::hc_pre" in text and "1 hc_pre" in text and f"{report.nodes_before} -> {report.nodes_after}" in text
    assert report.counts["hc_post_pre"] == 0
    assert connection._compiled_call_impl is None


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strcit": True}, "unknown option 'strcit'.*strict.*reference.*implementation"),
        ({"max_autotun": True}, "max_autotune"),
        ({"strict": "yes"}, "strict: got 'yes'"),
        ({"strict": -1}, "strict: got -1"),
        ({"reference": 1}, "reference: got 1"),
        ({"implementation": "cuda"}, "implementation: got 'cuda', expected .*triton"),
        ({"mode": "fast"}, "mode: got 'fast', expected one of .*reduce-overhead"),
    ],
)
def test_wrong_options(options, message, connection):
    with pytest.raises(ValueError, match=message):
        dsv4_fusion.fuse(connection, **options)
    with pytest.raises(Exception, match=message), torch.no_grad():
        torch.compile(lambda x: x + 1, backend="dsv4_fusion", options=options)(STREAMS)


def inductor_patches(monkeypatch, **kwargs) -> dict:
    """What reaches Inductor's configuration."""
    seen = {}

    def compile_fx(gm, inputs, config_patches=None, **_):
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch.compile(lambda x: x + 1, backend="dsv4_fusion", **kwargs)(STREAMS)
    return seen


def test_mode_and_other_options_reach_inductor(monkeypatch):
    assert inductor_patches(monkeypatch, mode="reduce-overhead")["triton.cudagraphs"] is True
    torch._dynamo.reset()
    both = {"mode": "max-autotune", "epilogue-fusion": False, "strict": False}
    patches = inductor_patches(monkeypatch, options=both)
    assert patches["max_autotune"] is True
    assert patches["epilogue_fusion"] is False
    assert "strict" not in patches and "mode" not in patches


class Counting(CustomGraphPass):
    calls = 0

    def __call__(self, graph):
        Counting.calls += 1

    def uuid(self):
        return "counting"


def test_inductor_need_not_find_out_that_it_calls_the_operators_as_they_are(connection):
    from torch._inductor.lowering import lowerings

    connection.hc_sinkhorn_iters = 1
    with torch.no_grad():
        torch.compile(connection, backend="dsv4_fusion")(STREAMS)
    operators = [getattr(torch.ops.dsv4, name).default for name in dsv4_fusion.ops._library.operators]
    assert operators and all(operator in lowerings for operator in operators)


def test_the_users_own_pass_runs_too(connection, reports):
    Counting.calls = 0
    options = {"reference": True, "joint_custom_pre_pass": Counting()}
    with torch.no_grad():
        torch.compile(connection, backend="dsv4_fusion", options=options)(STREAMS + 1)
    assert Counting.calls == 1
    assert reports[0].counts == {"hc_pre": 1}


def test_implementation_by_name_that_cannot_run_here(connection):
    options = {"reference": True, "implementation": "triton"}
    with pytest.raises(ValueError, match="triton"), torch.no_grad():
        torch.compile(connection, backend="dsv4_fusion", options=options)(STREAMS)


# What is left alone


def test_on_the_cpu_matches_are_reported_and_left_to_inductor(connection, reports):
    with torch.no_grad():
        assert same(torch.compile(connection, backend="dsv4_fusion")(STREAMS), connection(STREAMS))
    assert reports[0].counts == {"hc_pre": 1}
    assert not reports[0].sites[0].rewritten
    assert reports[0].nodes_before == reports[0].nodes_after
    assert any("reference" in note for note in reports[0].notes)


def test_a_model_that_is_no_deepseek_v4(reports):
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Softmax(-1)).eval()
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.allclose(torch.compile(net, backend="dsv4_fusion")(x), net(x), atol=1e-6)
        assert not reports[0].sites and not reports[0].near_misses
        torch._dynamo.reset()
        with pytest.raises(Exception, match="strict: 1 fused sites wanted in this graph, found 0"):
            torch.compile(net, backend="dsv4_fusion", options={"strict": True})(x)
    with pytest.raises(FusionError, match="strict: 2 fused sites wanted, found 0"):
        dsv4_fusion.explain(net, x, options={"strict": 2})
    assert "nothing matched" in str(dsv4_fusion.explain(net, x))


def test_strict_counts(connection):
    assert dsv4_fusion.explain(connection, STREAMS, options={"strict": 1}).counts == {"hc_pre": 1}
    with pytest.raises(FusionError, match="strict: 2 fused sites wanted, found 1"):
        dsv4_fusion.explain(connection, STREAMS, options={"strict": 2})


def test_training_is_left_alone_and_says_so(connection, reports):
    connection.hc_sinkhorn_iters = 2
    compiled = torch.compile(connection, backend="dsv4_fusion", options={"reference": True})
    got, expected = compiled(STREAMS), connection(STREAMS)
    assert same(got, expected)
    assert not reports[0].sites
    assert any("training" in note and "no_grad" in note for note in reports[0].notes)
    sum(part.sum() for part in got).backward()
    assert connection.fn.grad.isfinite().all()


def test_nothing_is_silent(caplog, connection):
    backend_module = sys.modules["dsv4_fusion.backend"]
    backend_module._once.cache_clear()
    with caplog.at_level(logging.INFO, logger="dsv4_fusion"):
        for _ in range(2):
            torch._dynamo.reset()
            dsv4_fusion.backend(torch.fx.symbolic_trace(lambda x: x + 1), [STREAMS])(STREAMS)
    nothing = [record for record in caplog.records if "no DeepSeek-V4 pattern" in record.message]
    assert len(nothing) == 1


def test_an_input_that_requires_grad_is_refused_by_the_operator(connection):
    with pytest.raises(ValueError, match="dsv4::hc_pre: an input requires grad"):
        dsv4_fusion.ops.hc_pre(STREAMS, connection.fn, connection.base, connection.scale)


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        FusionOptions().strict = True
    assert callable(backend)


# Caches

CACHED = """
import json, pathlib, sys
import torch
import torch._inductor.utils
import dsv4_fusion
from torch._dynamo.utils import counters
from examples.deepseek import Config, HyperConnection, hc_pre
reports = []
sys.modules["dsv4_fusion.backend"]._log_report = reports.append
net = HyperConnection(Config.tiny(dim=32, hc_sinkhorn_iters=3)).requires_grad_(False)
for step in sys.argv[2:]:
    if step == "lost":
        (table,) = pathlib.Path(sys.argv[1], "dsv4_fusion").iterdir()
        table.unlink()
        continue
    if step.endswith(".py"):
        manager = sys.modules["dsv4_fusion.passes._manager"]
        manager.__file__ = step
        manager._source_hash.cache_clear()
        continue
    counters.clear()
    torch._dynamo.reset()
    compiled = torch.compile(hc_pre, backend="dsv4_fusion", options={"reference": True, "strict": int(step)})
    with torch.no_grad():
        compiled(net, torch.zeros(2, 3, 4, 32))
    report = reports.pop()
    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    print(json.dumps([hits, report.cached, report.as_dict()]))
"""


def cached_run(cache: Path, *steps: str) -> list[list]:
    """In a process of its own, for each compile with ``strict=<step>``: cache hits, whether the report is of then, it.

    The step "lost" removes the kept reports; from a step that is a file on, the package's sources are those around it.
    """
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": prepend(ROOT)}
    command = [sys.executable, "-c", CACHED, str(cache), *steps]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def prepend(package: Path) -> str:
    return os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_another_process_hits_the_cache_and_a_change_misses_it(tmp_path):
    """What is hit reports what was fused in it; where that is lost, how to get it."""
    cache, manager = tmp_path / "cache", Path("passes", "_manager.py")
    for folder in ("copied", "changed"):
        shutil.copytree(ROOT / "dsv4_fusion", tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "changed" / "passes" / "_pattern.py").open("a") as source:
        source.write("# a change\n")
    sources = [str(tmp_path / folder / manager) for folder in ("copied", "changed")]
    ((hits, cached, table),) = cached_run(cache, "0")
    assert not hits and not cached and table["counts"] == {"hc_pre": 1}
    same, lost, option, copied, changed = cached_run(cache, "0", "lost", "0", "1", sources[0], "0", sources[1], "0")
    hits, cached, again = same
    assert hits and cached and again == table | {"cached": True}
    hits, cached, unknown = lost
    assert hits and cached and not unknown["sites"]
    (note,) = unknown["notes"]
    assert "out of Inductor's cache" in note and "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1" in note
    assert option[:2] == [0, False]
    assert copied[0] and copied[1]
    assert changed[:2] == [0, False]


@pytest.mark.parametrize(
    "broken", ["", "[]", "{}", '{"sites": 3}', '{"sites": [{}], "near_misses": [], "left_alone": []}']
)
def test_a_broken_table_is_as_none(tmp_path, broken):
    table = Table(str(tmp_path), torch.fx.symbolic_trace(lambda x: x + 1), [STREAMS], "settings")
    report = Report([Site("layers.0", "hc_pre", "dsv4::hc_pre", 58, True)], [NearMiss("a", "b", "c", "d")], graphs=1)
    table.write(report)
    assert table.read() == dataclasses.replace(report, cached=True)
    table.file.write_text(broken)
    assert table.read().cached and "out of Inductor's cache" in table.read().notes[0]


def test_a_table_is_of_one_graph_its_inputs_and_settings(tmp_path):
    def name(gm, x, settings):
        return Table(str(tmp_path), gm, [x], settings).file.name

    plus, minus = (torch.fx.symbolic_trace(function) for function in (lambda x: x + 1, lambda x: x - 1))
    names = [
        name(plus, STREAMS, "a"),
        name(minus, STREAMS, "a"),
        name(plus, STREAMS[:1], "a"),
        name(plus, STREAMS, "b"),
    ]
    assert len(set(names)) == 4
    assert name(plus, STREAMS + 1, "a") == names[0]


def test_the_log_says_that_a_report_is_from_the_cache(connection, caplog):
    with torch._inductor.config.patch(force_disable_caches=False), torch._inductor.utils.fresh_cache(), torch.no_grad():
        for from_cache in (False, True):
            caplog.clear()
            torch._dynamo.reset()
            with caplog.at_level(logging.DEBUG, logger="dsv4_fusion"):
                torch.compile(connection, backend="dsv4_fusion", options={"reference": True})(STREAMS)
            (summary,) = [entry.message for entry in caplog.records if "near misses" in entry.message]
            assert summary.startswith("1 hc_pre; 0 near misses")
            assert summary.endswith("from Inductor's cache") == from_cache
            assert any(entry.message.startswith("fused: : dsv4::hc_pre") for entry in caplog.records)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    table = Table(str(tmp_path / "file"), gm, [STREAMS], "settings")
    table.write(Report())
    assert table.read().notes
    assert Table(str(tmp_path), gm, [STREAMS], None).file is None
