"""The model in DeepSeek's dialect: one graph, exact counts, and its unrounded mathematics against Hugging Face's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import dsv4_fusion
from dsv4_fusion.options import FusionOptions
from dsv4_fusion.report import Report
from examples import deepseek
from examples.deepseek import Config, HyperConnection, apply_rope, hc_head, hc_post, hc_pre, model, rope_table

# Two layers, one with an indexer, and little of what only takes time to compile.
SMALL = {"compress_ratios": (4, 16), "n_routed_experts": 2, "hc_sinkhorn_iters": 4}
COUNTS = {"hc_pre": 1, "hc_post_pre": 3, "hc_post_head": 1, "indexer_topk": 1}
COUNTS |= {"compress_csa": 2, "compress_hca": 1}


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_tiny_model_runs():
    net, ids = model(Config.tiny()), tokens(2, 40)
    logits = net(ids)
    assert logits.shape == (2, 40, 128) and logits.dtype == torch.float32
    assert logits.isfinite().all() and 0.5 < logits.std() < 2
    assert torch.equal(logits, net(ids))
    assert torch.equal(logits, model(Config.tiny())(ids))
    assert not torch.equal(logits, model(Config.tiny(quantise=False))(ids))


def test_every_token_sees_its_past_alone():
    """In fp32: on the CPU a bf16 product rounds by its size."""
    net, ids = model(Config.tiny(quantise=False, dtype=torch.float32)), tokens(1, 40)
    torch.testing.assert_close(net(ids)[:, :23], net(ids[:, :23]), rtol=1e-4, atol=1e-4)


def test_flash_has_the_published_widths():
    config = Config.flash()
    assert (config.dim, config.n_heads, config.head_dim, config.rope_head_dim) == (4096, 64, 512, 64)
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (64, 128, 512)
    with torch.device("meta"):
        assert len(deepseek.Transformer(Config.flash(rope_factor=1.0)).layers) == 4
    assert rope_table(config, compressed=True).abs().allclose(torch.ones(1))


def fused(net: torch.nn.Module, ids: torch.Tensor) -> tuple[Report, torch.Tensor, torch.Tensor]:
    """The report of one graph, and the logits of eager and of the rewritten graph."""
    from dsv4_fusion.backend import _compile

    reports: list[Report] = []

    def backend(gm, inputs):
        return _compile(gm, inputs, FusionOptions(reference=True), {}, reports.append, run_graph=True)

    torch._dynamo.reset()
    with torch.no_grad():
        ours = torch.compile(net, backend=backend, fullgraph=True)(ids)
        torch._dynamo.reset()
        plain = net(ids)
    (report,) = reports
    return report, plain, ours


def test_one_graph_in_which_everything_is_fused():
    report, plain, ours = fused(model(Config.tiny(**SMALL)), tokens(1, 32))
    assert report.counts == COUNTS, report
    assert report.graphs == 1 and not report.near_misses and not report.left_alone, report
    paths = [site.path for site in report.sites]
    assert paths[0] == "layers.0" and paths.count("layers.0.attn.indexer") == 1
    compressors = [site.path for site in report.sites if site.fusion.startswith("compress_")]
    assert sorted(compressors) == [
        "layers.0.attn.compressor",
        "layers.0.attn.indexer.compressor",
        "layers.1.attn.compressor",
    ]
    assert report.nodes_before - report.nodes_after > 400
    assert (
        0 < (ours - plain).norm() < 0.1 * plain.norm()
    )  # FP8 codes flip; exact comparisons are those of fp32 and sites


def test_the_numbers_do_not_change_in_fp32():
    """No rounding in between that could flip: what is left is the order of sums."""
    net = model(Config.tiny(**SMALL, quantise=False, dtype=torch.float32))
    report, plain, ours = fused(net, tokens(2, 32))
    assert report.counts == {name: count for name, count in COUNTS.items() if name != "indexer_topk"}, report
    assert 0 < (ours - plain).abs().max() < 1e-5 * plain.abs().max()


def test_any_batch_and_length():
    """Both symbolic: everything is fused as in a static graph, and the compiled model takes other numbers of them."""
    from dsv4_fusion.backend import _compile

    config = Config.tiny(**SMALL | {"n_routed_experts": 1, "hc_sinkhorn_iters": 2}, n_activated_experts=1)
    net = model(replace(config, quantise=False, dtype=torch.float32))
    reports: list[Report] = []

    def backend(gm, inputs):
        patches = {"pattern_matcher": False}  # Inductor's own patterns come after ours, and take time
        return _compile(gm, inputs, FusionOptions(reference=True), patches, reports.append, run_graph=True, draw=False)

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        for batch, length in ((2, 48), (3, 64), (5, 32)):
            ids = tokens(batch, length)
            plain, ours = net(ids), compiled(ids)
            assert 0 < (ours - plain).abs().max() < 1e-5 * plain.abs().max()
    torch._dynamo.reset()
    (report,) = reports  # one graph for all of them
    assert report.counts == {name: count for name, count in COUNTS.items() if name != "indexer_topk"}, report
    assert not report.near_misses and not report.left_alone and not report.notes, report


# Hyper-Connections and RoPE


def test_hyper_connections_are_the_operators():
    config = Config.tiny()
    torch.manual_seed(0)
    pre, head = HyperConnection(config), HyperConnection(config, head=True)
    for module in (pre, head):
        module.requires_grad_(False)
    x, y = torch.randn(2, 3, 4, config.dim).bfloat16(), torch.randn(2, 3, config.dim).bfloat16()
    inner, post, comb = hc_pre(pre, x)
    expected_post, expected_comb, expected = dsv4_fusion.ops.hc_pre(x.double(), pre.fn, pre.base, pre.scale)
    torch.testing.assert_close(post.double(), expected_post, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(comb.double(), expected_comb, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inner.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(
        hc_post(y, x, post, comb).double(),
        dsv4_fusion.ops.hc_post(y.double(), x.double(), expected_post, expected_comb),
        rtol=2**-8,
        atol=1e-5,
    )
    expected = dsv4_fusion.ops.hc_head(x.double(), head.fn, head.base, head.scale)
    torch.testing.assert_close(hc_head(head, x).double(), expected, rtol=2**-8, atol=1e-6)


def test_rope_turns_pairs_and_back():
    table = rope_table(Config.tiny(), compressed=False)[:9]
    x = torch.randn(2, 9, 3, 64)
    turned = x.clone()
    apply_rope(turned, table)
    angle = torch.angle(table.to(torch.complex128))[None, :, None]
    even, odd = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    expected = torch.stack((even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()), -1)
    torch.testing.assert_close(turned.double(), expected.flatten(-2), rtol=1e-5, atol=1e-5)
    apply_rope(turned, table, inverse=True)
    torch.testing.assert_close(turned, x, rtol=1e-5, atol=1e-5)


# Hugging Face's model with the same weights


def of_hugging_face(config: Config):
    """Hugging Face's model of these sizes, fp32, with the weights of ``model(config)``."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 16: "heavily_compressed_attention"}
    rope = config.rope_head_dim / config.head_dim
    theirs = modeling.DeepseekV4ForCausalLM(
        modeling.DeepseekV4Config(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_hidden_layers=len(config.compress_ratios),
            layer_types=[kinds[ratio] for ratio in config.compress_ratios],
            mlp_layer_types=["moe"] * len(config.compress_ratios),
            compress_rates={kinds[4]: 4, kinds[16]: 16},
            num_attention_heads=config.n_heads,
            head_dim=config.head_dim,
            partial_rotary_factor=rope,
            q_lora_rank=config.q_lora_rank,
            o_groups=config.o_groups,
            o_lora_rank=config.o_lora_rank,
            sliding_window=config.window_size,
            index_n_heads=config.index_n_heads,
            index_head_dim=config.index_head_dim,
            index_topk=config.index_topk,
            moe_intermediate_size=config.moe_inter_dim,
            n_routed_experts=config.n_routed_experts,
            num_experts_per_tok=config.n_activated_experts,
            routed_scaling_factor=config.route_scale,
            swiglu_limit=config.swiglu_limit,
            max_position_embeddings=config.max_seq_len,
        )
    ).eval()
    theirs.load_state_dict(renamed(model(config).state_dict()), strict=False)
    return theirs.requires_grad_(False)


NAMES = [  # ours, theirs; in this order
    (".attn.indexer.compressor.", ".self_attn.compressor.indexer."),
    (".attn.indexer.weights_proj.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (".attn.indexer.wq_b.", ".self_attn.compressor.indexer.q_b_proj."),
    (".attn.compressor.", ".self_attn.compressor."),
    (".wkv", ".kv_proj"),
    (".wgate", ".gate_proj"),
    (".ape", ".position_bias"),
    (".compressor.norm.", ".compressor.kv_norm."),
    (".indexer.norm.", ".indexer.kv_norm."),
    (".attn.sink", ".self_attn.sinks"),
    (".attn.q_norm.", ".self_attn.q_a_norm."),
    (".attn.wq_a.", ".self_attn.q_a_proj."),
    (".attn.wq_b.", ".self_attn.q_b_proj."),
    (".attn.wo_a.", ".self_attn.o_a_proj."),
    (".attn.wo_b.", ".self_attn.o_b_proj."),
    (".attn.", ".self_attn."),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".ffn.gate", ".mlp.gate.weight"),
    (".ffn.bias", ".mlp.gate.e_score_correction_bias"),
    (".ffn.shared_experts.w1", ".mlp.shared_experts.gate_proj"),
    (".ffn.shared_experts.w2", ".mlp.shared_experts.down_proj"),
    (".ffn.shared_experts.w3", ".mlp.shared_experts.up_proj"),
    ("hc_head.", "hc_head.hc_"),
    ("embed.", "embed_tokens."),
]


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {name: tensor for name, tensor in state.items() if "rope" not in name}
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    result = {"lm_head.weight": state.pop("head")}
    for name, tensor in state.items():
        if ".ffn.experts." in name:
            layer, _, rest = name.partition(".ffn.experts.")
            index, matrix, _ = rest.split(".")
            experts.setdefault(layer, {})[int(index), matrix] = tensor
            continue
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        if name.endswith((".kv_proj", ".gate_proj")):
            name += ".weight"
        result["model." + name] = tensor
    for layer, matrices in experts.items():
        count = len(matrices) // 3
        up = [torch.cat((matrices[i, "w1"], matrices[i, "w3"])) for i in range(count)]
        result[f"model.{layer}.mlp.experts.gate_up_proj"] = torch.stack(up)
        result[f"model.{layer}.mlp.experts.down_proj"] = torch.stack([matrices[i, "w2"] for i in range(count)])
    return result


def test_without_rounding_it_is_hugging_faces_model():
    config = Config.tiny(quantise=False, dtype=torch.float32)
    theirs = of_hugging_face(config)
    missing = theirs.load_state_dict(renamed(copy.deepcopy(model(config)).state_dict()), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    ids = tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(config)(ids), theirs(ids, use_cache=False).logits, rtol=1e-3, atol=1e-4)
