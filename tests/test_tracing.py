"""What ``explain`` leaves out: it changes no graph, can be done without, and everything is as it was afterwards."""

from __future__ import annotations

import gc
import types

import pytest
import torch
import torch._inductor.config
from torch._functorch import _aot_autograd
from torch._functorch._aot_autograd import graph_capture_wrappers
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import fake_tensor_tls

import dsv4_fusion
from dsv4_fusion import _tracing

NAME = "PropagateUnbackedSymInts"


@pytest.fixture(autouse=True)
def as_before():
    """Nothing of torch's is changed afterwards, and Python looks for garbage again."""

    def state():
        settings = torch._inductor.config.get_config_copy()
        return getattr(graph_capture_wrappers, NAME), fake_tensor_tls.allow_non_fake_inputs_override, settings

    before = state()
    assert gc.isenabled()
    yield
    assert gc.isenabled()
    assert state() == before


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The names of what AOTAutograd computes before it traces."""
    names: list[str] = []

    class Counting(getattr(graph_capture_wrappers, NAME)):
        def run_node(self, node):
            if node.op.startswith("call") and _tracing_is_off():
                names.append(node.name)
            return super().run_node(node)

    with monkeypatch.context() as patch:
        patch.setattr(graph_capture_wrappers, NAME, Counting)
        yield names


def _tracing_is_off() -> bool:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is None


def without(monkeypatch) -> None:
    """As in a version of torch that has no such class there."""
    monkeypatch.setattr(_aot_autograd, "graph_capture_wrappers", types.ModuleType("empty"))


class Graphs(CustomGraphPass):
    """Keeps the text of the graphs as the pass gets them."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, graph):
        values = [(node.name, node.meta.get("val")) for node in graph.nodes]
        self.texts.append(f"{graph}\n{[(name, str(value)) for name, value in values]}")

    def uuid(self):
        return None


def graphs(function, *inputs, **keywords) -> list[str]:
    kept = Graphs()
    dsv4_fusion.explain(function, *inputs, options={"joint_custom_pre_pass": kept}, **keywords)
    return kept.texts


def chain(x, y):
    return (x.sin() @ y).cos().sum(-1)


def writes(x, y):
    x.mul_(2)
    return x @ y


def writes_inside(x, y):
    z = x.clone()
    z[1] = y[0]
    z.add_(1)
    return z, z.t()


def writes_beside(x, y):
    z = x @ y
    z[0].zero_()
    return z.sin()


def aliases(x, y):
    z = x.sin()
    return x.t(), z.view(-1), z[1:], y.split(2)[1], torch.stack(z.unbind(0))


def turned(x, y):
    x.t_()
    return x @ y


def sizes(x, y):
    return x.sin().shape[0], (x @ y).flatten().size(0), x + y


def random(x, y):
    return torch.nn.functional.dropout(x, 0.5) @ y


def two(x, y):
    z = x.exp() @ y
    torch._dynamo.graph_break()
    return z.t().exp() @ x


FUNCTIONS = [chain, writes, writes_inside, writes_beside, aliases, turned, sizes, random, two]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_graphs_are_the_same(monkeypatch, function, device, dynamic):
    def inputs():
        return [torch.arange(16.0, device=device).view(4, 4) / 16, torch.ones(4, 4, device=device)]

    found = graphs(function, *inputs(), dynamic=dynamic)
    without(monkeypatch)
    assert found == graphs(function, *inputs(), dynamic=dynamic)
    assert len(found) == (2 if function is two else 1)


def test_an_operator_that_writes_and_counts_no_version():
    """The run finds it out; Dynamo's values do not tell."""
    library = torch.library.Library("dsv4_test", "FRAGMENT")

    def put(x):
        x.zero_()

    library.define("put(Tensor(a!) x) -> ()")
    library.impl("put", put, "CompositeExplicitAutograd")

    def function(x):
        y = x.clone()
        torch.ops.dsv4_test.put(x)
        return y + 1

    x = torch.ones(4)
    (text,) = graphs(function, x)
    assert "copy_" in text and not x.any()
    library._destroy()


def test_a_view_out_of_a_list_is_no_memory_of_its_own():
    def function(y):
        return y.split(2)[1], y.sin().split(2)[1], y.cos()

    graph = torch.fx.symbolic_trace(function).graph
    with torch._subclasses.FakeTensorMode():
        env: dict = {node: torch.ones(4, 4) for node in graph.find_nodes(op="placeholder")}
        for node in graph.nodes:
            if node.op.startswith("call"):
                args = torch.fx.node.map_arg(node.args, env.__getitem__)
                called = node.target if node.op == "call_function" else getattr(torch.Tensor, node.target)
                env[node] = called(*args)
            if node in env:
                node.meta["example_value"] = env[node]
    assert _tracing.pure(graph)
    known = {node.name for node in _tracing._known(graph, lambda value: value)}
    assert known == {"sin", "cos"}
    sin = next(node for node in graph.nodes if node.name == "sin")
    sin.target, sin.op = torch.ops.aten.sin_.default, "call_function"
    assert not _tracing.pure(graph)
    sin.target = torch.ops.aten.sin
    assert _tracing.pure(graph)
    sin.target = torch.ops.aten.sin_
    assert not _tracing.pure(graph)


def test_nothing_is_computed_where_nothing_asks(computed):
    dsv4_fusion.explain(chain, torch.ones(4, 4), torch.ones(4, 4))
    assert not computed
    dsv4_fusion.explain(aliases, torch.ones(4, 4), torch.ones(4, 4))
    assert computed and not any("sin" in name or "stack" in name for name in computed), computed


def test_a_torch_without_the_class(monkeypatch, computed):
    """The slower way gives the same."""
    with_it = dsv4_fusion.explain(chain, torch.ones(4, 4), torch.ones(4, 4))
    assert not computed
    without(monkeypatch)
    report = dsv4_fusion.explain(chain, torch.ones(4, 4), torch.ones(4, 4))
    assert len(computed) == 4
    report.seconds = with_it.seconds
    assert report == with_it and report.nodes_before


def test_a_compilation_afterwards_computes_everything(computed):
    dsv4_fusion.explain(chain, torch.ones(4, 4), torch.ones(4, 4))
    assert not computed
    with torch.no_grad():
        torch.compile(chain, backend="aot_eager")(torch.ones(4, 4), torch.ones(4, 4))
    assert len(computed) == 4
    torch._dynamo.reset()


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("where", ["in the model", "in the pass"])
def test_an_exception_leaves_everything_as_it_was(where, collecting):
    seen = []

    def fail(*given):
        seen.append((gc.isenabled(), getattr(graph_capture_wrappers, NAME)))
        raise ArithmeticError("in the middle")

    class Failing(Graphs):
        def __call__(self, graph):
            fail()

    def model(x):
        y = x.sin()
        torch._dynamo.graph_break()
        if where == "in the model":
            raise ArithmeticError("in the middle")
        return y

    options = {"joint_custom_pre_pass": Failing()} if where == "in the pass" else None
    usual = getattr(graph_capture_wrappers, NAME)
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(Exception, match="in the middle"):
            dsv4_fusion.explain(model, torch.ones(4), options=options)
        assert gc.isenabled() is collecting
    finally:
        gc.enable()
    assert getattr(graph_capture_wrappers, NAME) is usual and torch.is_grad_enabled()
    if where == "in the pass":
        assert seen[0][0] is False and seen[0][1] is not usual  # it was changed, and garbage was left
    with torch.no_grad():
        assert torch.equal(torch.compile(torch.sin, backend="aot_eager")(torch.ones(4)), torch.ones(4).sin())
    torch._dynamo.reset()


class Scaled(torch.nn.Module):
    """A float of a module is an input of Dynamo's dynamic graph, and none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.25
        self.weight = torch.nn.Parameter(torch.ones(4, 4))
        self.register_buffer("offset", torch.arange(4.0))

    def forward(self, x, results):
        results.append((x * self.scale) @ self.weight + self.offset)
        torch._dynamo.graph_break()
        results.append(results[0].sin())
        return results[1]


@pytest.mark.parametrize("dynamic", [None, True])
def test_on_real_tensors_the_model_runs_as_it_is(dynamic):
    """What it computes is what it computes without us, and it is left as it was."""
    module, plain, got = Scaled(), [], []
    state, attributes = {name: tensor.clone() for name, tensor in module.state_dict().items()}, set(vars(module))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    report = dsv4_fusion.explain(module, x, got, dynamic=dynamic)
    with torch.no_grad():
        module(x, plain)
    assert report.graphs == 2
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    assert module.training and set(vars(module)) == attributes and module._compiled_call_impl is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_on_the_meta_device_nothing_runs(monkeypatch):
    """Only the results' shapes and strides are made."""
    graph = torch.fx.symbolic_trace(chain)
    with torch._subclasses.FakeTensorMode():
        values = {"x": torch.ones(3, 4, device="meta"), "y": torch.ones(4, 5, device="meta")}
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                node.meta["example_value"] = values[node.name]
            elif node.op == "output":
                node.args = ((node.args[0],),)
        node.args[0][0].meta["example_value"] = torch.ones(6, 2, device="meta").t()
    graph.recompile()
    monkeypatch.setattr(graph, "forward", None)
    (result,) = _tracing.without_values(graph)(torch.ones(3, 4, device="meta"), torch.ones(4, 5, device="meta"))
    assert result.shape == (2, 6) and result.stride() == (1, 2) and result.device.type == "meta"
