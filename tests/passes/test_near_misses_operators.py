"""Near misses of the indexer, the compressor and the FP8 layers: each form broken once in each way, the whole report.

Every kind occurs with every form. What cannot be broken: a site is found by its anchor, so where another operator
stands in the place of that (a relu, an amax, ``_scaled_mm``, the conversion of a weight), there is no site; nor is a
converted weight one that no matrix product uses.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

pytest.importorskip("transformers.models.deepseek_v4")

from dsv4_fusion import ops
from tests.passes import test_compressor as compressor
from tests.passes import test_fp8_linear as fp8
from tests.passes import test_indexer as indexer
from tests.passes import test_indexer_scores as scores
from tests.passes.breaking import (
    argument,
    capture,
    check_source,
    fused,
    nth,
    of_dtype,
    of_shape,
    sentence,
    target,
    used_outside,
)

aten, convert = torch.ops.aten, torch.ops.prims.convert_element_type.default


class Inside(nn.Module):
    """Gives a module a path."""

    def __init__(self, inner: nn.Module, *more: object) -> None:
        super().__init__()
        self.inner, self.more = inner, more

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs, *self.more)


def torchao(x: Tensor, wq: Tensor, w_scale: Tensor) -> Tensor:
    """What its dynamic quantisation of rows leaves in a graph."""
    scale = (x.view(x.shape).abs().amax([x.dim() - 1], True) / 448.0).reshape([*x.shape[:-1], 1]).to(torch.float32)
    codes = (x.to(torch.float32) / scale).clamp(min=-448.0, max=448.0).to(torch.float8_e4m3fn)
    rows, row_scale = codes.reshape(-1, x.shape[-1]), scale.unsqueeze(-1).reshape(-1, 1)
    return scaled_mm(rows, wq, row_scale, w_scale)


def scaled_mm(xq: Tensor, wq: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    return torch._scaled_mm(xq, wq.t(), x_scale, w_scale.t(), out_dtype=torch.bfloat16)


def linear(x: Tensor, wq: Tensor, w_scale: Tensor) -> Tensor:
    return F.linear(x, fp8.wide(wq, w_scale))


def blocks(x: Tensor, wq: Tensor, w_scale: Tensor) -> Tensor:
    return F.linear(x, fp8.cut(wq, w_scale))


@functools.cache
def graph_of(form: str) -> Graph:
    x = fp8.random(2, 24, fp8.K)
    if form == "indexer_topk":
        return capture(Inside(scores.indexer(), None, 0), *scores.inputs(2, 40))
    if form in ("compress_csa", "compress_hca"):
        return capture(compressor.Compress(2 if form == "compress_csa" else 3), *compressor.inputs(41))
    if form in ("compress_csa, DeepSeek's", "compress_hca, DeepSeek's"):
        module, given = compressor.deepseek_compressor(4 if "csa" in form else 16)
        return capture(Inside(module), *given)
    if form in ("indexer_q_mxfp4", "indexer_q_fp8, DeepSeek's"):
        module, given = indexer.indexer(index_format="mxfp4" if "mxfp4" in form else "fp8")
        return capture(Inside(indexer.Score(module)), *given)
    if form == "indexer_q_fp8":
        return capture(indexer.unfused, *indexer.arguments())
    if form == "fp8_linear, DeepSeek's":
        return capture(Inside(fp8.Linear(fp8.K, fp8.N, fp8.Config.tiny())), x)
    (xq, x_scale), (wq, w_scale) = ops.quantize_fp8(x[0]), fp8.quantised("block" if "blocks" in form else "token")
    if form == "scaled_mm_fp8":
        return capture(scaled_mm, xq, wq, x_scale, w_scale)
    return capture({"torchao": torchao, "dequantised": linear, "blocks": blocks}[form.split(", ")[1]], x, wq, w_scale)


def options(form: str) -> dict[str, str]:
    return {"fp8_linear": "batch_invariant"} if form.startswith(("fp8", "scaled")) else {}


HUGGING_FACE = "deepseek_v4/modeling_deepseek_v4.py"
BROKEN = {
    # form, what differs: (module, target, index, change, path, the sentence, the source's file, in its line)
    ("indexer_topk", "operator"): (
        "inner.scorer", aten.mul.Tensor, 2, target(aten.div.Tensor), "inner.scorer",
        "expected aten.mul.Tensor of aten.mul.Tensor (#), found aten.div.Tensor (#)",
        HUGGING_FACE, "scores = F.relu(scores) * self.softmax_s",
    ),
    ("indexer_topk", "dtype"): (
        "inner.scorer", convert, 0, argument(1, torch.float16), "inner.scorer",
        "prims.convert_element_type.default (#): expected torch.float32 among its arguments, found torch.float16",
        HUGGING_FACE, "scores = torch.matmul(q.float(), compres",
    ),
    ("indexer_topk", "shape"): (
        "inner.scorer", convert, 2, of_shape(0, 2, 40, 4, 1), "inner.scorer",
        "weights has shape [2, 40, 4, 1], expected [B, S, 4]",
        HUGGING_FACE, "weights = self.weights_proj(hidden_state",
    ),
    ("indexer_topk", "constant"): (
        "inner.scorer", aten.sum.dim_IntList, 0, argument(1, [1]), "inner.scorer",
        "aten.sum.dim_IntList (#): expected 2 among its arguments, found 1",
        HUGGING_FACE, "return (scores * weights.unsqueeze(-1)).",
    ),
    ("indexer_topk", "extra user"): (
        "inner.scorer", aten.sum.dim_IntList, 0, used_outside, "inner.scorer",
        "aten.sum.dim_IntList (#) is used outside the pattern too, by aten.neg.default (#)",
        HUGGING_FACE, "return (scores * weights.unsqueeze(-1)).",
    ),
    ("indexer_topk", "the product"): (
        "inner.scorer", aten.bmm.default, 0, target(aten.mm.default), "inner.scorer",
        "expected aten.bmm.default, found aten.mm.default (#)",
        HUGGING_FACE, "scores = torch.matmul(q.float(), compres",
    ),
    ("indexer_topk", "the limit"): (
        "inner", aten.div.Tensor_mode, 0, target(aten.remainder.Scalar), "inner.scorer",
        "expected aten.div.Tensor_mode, found aten.remainder.Scalar (#)",
        HUGGING_FACE, "causal_threshold = (position_ids + 1) //",
    ),
    ("indexer_topk", "the top-k"): (
        "inner", aten.topk.default, 0, target(aten.kthvalue.default), "inner.scorer",
        "expected aten.topk.default of aten.where.self (#), found aten.kthvalue.default (#)",
        HUGGING_FACE, "index_scores = index_scores.masked_fill(",
    ),
    ("compress_csa", "operator"): (
        "compressor", aten.add.Tensor, 0, target(aten.sub.Tensor), "compressor",
        "expected aten.add.Tensor, found aten.sub.Tensor (#)",
        HUGGING_FACE, "chunk_gate = chunk_gate.view(batch, n_wi",
    ),
    ("compress_csa", "dtype"): (
        "compressor", convert, 1, argument(1, torch.float16), "compressor",
        "prims.convert_element_type.default (#): expected torch.bfloat16 among its arguments, found torch.float16",
        HUGGING_FACE, "(new_kv * new_gate.softmax(dim=2, dtype=",
    ),
    ("compress_csa", "shape"): (
        "compressor", aten.add.Tensor, 0, of_shape(1, 1, 16, 32), "compressor",
        "position_bias has shape [1, 16, 32], expected [4, 64]",
        HUGGING_FACE, "(new_kv * new_gate.softmax(dim=2, dtype=",
    ),
    ("compress_csa", "constant"): (
        "compressor", aten.amax.default, 0, argument(1, [3]), "compressor",
        "aten.amax.default (#): expected 2 among its arguments, found 3",
        HUGGING_FACE, "(new_kv * new_gate.softmax(dim=2, dtype=",
    ),
    ("compress_csa", "extra user"): (
        "compressor", aten.mul.Tensor, 0, used_outside, "compressor",
        "aten.mul.Tensor (#) is used outside the pattern too, by aten.neg.default (#)",
        HUGGING_FACE, "(new_kv * new_gate.softmax(dim=2, dtype=",
    ),
    ("compress_csa", "the sum"): (
        "compressor", aten.sum.dim_IntList, 1, target(aten.mean.dim), "compressor",
        "expected aten.sum.dim_IntList of aten.mul.Tensor (#), found aten.mean.dim (#)",
        HUGGING_FACE, "(new_kv * new_gate.softmax(dim=2, dtype=",
    ),
    ("compress_csa", "the joining"): (
        "compressor", aten.cat.default, 1, target(aten.stack.default), "compressor",
        "expected aten.cat.default of aten.slice.Tensor (#), found aten.stack.default (#)",
        HUGGING_FACE, "nope, rope = x[..., :-rope_dim], x[...,",
    ),
    ("compress_csa", "the weights"): (
        "compressor", aten.div.Tensor, 0, target(aten.mul.Tensor), "compressor",
        "expected aten.div.Tensor of aten.exp.default (#), found aten.sum.dim_IntList (#), aten.mul.Tensor (#)",
        HUGGING_FACE, "(new_kv * new_gate.softmax(dim=2, dtype=",
    ),
    ("compress_hca", "operator"): (
        "compressor", aten.add.Tensor, 0, target(aten.sub.Tensor), "compressor",
        "expected aten.add.Tensor, found aten.sub.Tensor (#)",
        HUGGING_FACE, "chunk_gate = chunk_gate.view(batch, n_wi",
    ),
    ("compress_hca", "dtype"): (
        "compressor", convert, 1, argument(1, torch.float16), "compressor",
        "prims.convert_element_type.default (#): expected torch.bfloat16 among its arguments, found torch.float16",
        HUGGING_FACE, "(chunk_kv * chunk_gate.softmax(dim=2, dt",
    ),
    ("compress_hca", "shape"): (
        "compressor", aten.add.Tensor, 0, of_shape(1, 1, 16, 32), "compressor",
        "position_bias has shape [1, 16, 32], expected [16, 32]",
        HUGGING_FACE, "(chunk_kv * chunk_gate.softmax(dim=2, dt",
    ),
    ("compress_hca", "constant"): (
        "compressor", aten.amax.default, 0, argument(1, [3]), "compressor",
        "aten.amax.default (#): expected 2 among its arguments, found 3",
        HUGGING_FACE, "(chunk_kv * chunk_gate.softmax(dim=2, dt",
    ),
    ("compress_hca", "extra user"): (
        "compressor", aten.mul.Tensor, 0, used_outside, "compressor",
        "aten.mul.Tensor (#) is used outside the pattern too, by aten.neg.default (#)",
        HUGGING_FACE, "(chunk_kv * chunk_gate.softmax(dim=2, dt",
    ),
    ("compress_hca", "the sum"): (
        "compressor", aten.sum.dim_IntList, 1, target(aten.mean.dim), "compressor",
        "expected aten.sum.dim_IntList of aten.mul.Tensor (#), found aten.mean.dim (#)",
        HUGGING_FACE, "(chunk_kv * chunk_gate.softmax(dim=2, dt",
    ),
    ("compress_hca", "the joining"): (
        "compressor", aten.cat.default, 1, target(aten.stack.default), "compressor",
        "expected aten.cat.default of aten.slice.Tensor (#), found aten.stack.default (#)",
        HUGGING_FACE, "nope, rope = x[..., :-rope_dim], x[...,",
    ),
    ("compress_hca", "the weights"): (
        "compressor", aten.div.Tensor, 0, target(aten.mul.Tensor), "compressor",
        "expected aten.div.Tensor of aten.exp.default (#), found aten.sum.dim_IntList (#), aten.mul.Tensor (#)",
        HUGGING_FACE, "(chunk_kv * chunk_gate.softmax(dim=2, dt",
    ),
    ("compress_csa, DeepSeek's", "operator"): (
        "inner", aten.add.Tensor, 0, target(aten.sub.Tensor), "inner",
        "expected aten.add.Tensor, found aten.sub.Tensor (#)",
        "examples/deepseek.py", "gate = F.linear(wide, self.wgate).unflat",
    ),
    ("compress_csa, DeepSeek's", "dtype"): (
        "inner", convert, 1, argument(1, torch.float16), "inner",
        "prims.convert_element_type.default (#): expected torch.bfloat16 among its arguments, found torch.float16",
        "examples/deepseek.py", "entries = self.norm((kv * gate.softmax(2",
    ),
    ("compress_csa, DeepSeek's", "shape"): (
        "inner", aten.add.Tensor, 0, of_shape(1, 1, 16, 128), "inner",
        "position_bias has shape [1, 16, 128], expected [4, 256]",
        "examples/deepseek.py", "entries = self.norm((kv * gate.softmax(2",
    ),
    ("compress_csa, DeepSeek's", "constant"): (
        "inner", aten.amax.default, 0, argument(1, [1]), "inner",
        "aten.amax.default (#): expected 2 among its arguments, found 1",
        "examples/deepseek.py", "entries = self.norm((kv * gate.softmax(2",
    ),
    ("compress_csa, DeepSeek's", "extra user"): (
        "inner", aten.mul.Tensor, 0, used_outside, "inner",
        "aten.mul.Tensor (#) is used outside the pattern too, by aten.neg.default (#)",
        "examples/deepseek.py", "entries = self.norm((kv * gate.softmax(2",
    ),
    ("compress_csa, DeepSeek's", "the pairs"): (
        "inner", aten.view_as_complex.default, 0, target(aten.view_as_real.default), "inner",
        "expected aten.view_as_complex.default of aten.view.default (#), found aten.view_as_real.default (#)",
        "examples/deepseek.py", "pairs = torch.view_as_complex(x.float().",
    ),
    ("compress_hca, DeepSeek's", "operator"): (
        "inner", aten.add.Tensor, 0, target(aten.sub.Tensor), "inner",
        "expected aten.add.Tensor, found aten.sub.Tensor (#)",
        "examples/deepseek.py", "gate = F.linear(wide, self.wgate).unflat",
    ),
    ("compress_hca, DeepSeek's", "dtype"): (
        "inner", convert, 1, argument(1, torch.float16), "inner",
        "prims.convert_element_type.default (#): expected torch.bfloat16 among its arguments, found torch.float16",
        "examples/deepseek.py", "entries = self.norm((kv * gate.softmax(2",
    ),
    ("compress_hca, DeepSeek's", "shape"): (
        "inner", aten.add.Tensor, 0, of_shape(1, 1, 16, 128), "inner",
        "position_bias has shape [1, 16, 128], expected [16, 128]",
        "examples/deepseek.py", "entries = self.norm((kv * gate.softmax(2",
    ),
    ("compress_hca, DeepSeek's", "constant"): (
        "inner", aten.amax.default, 0, argument(1, [1]), "inner",
        "aten.amax.default (#): expected 2 among its arguments, found 1",
        "examples/deepseek.py", "entries = self.norm((kv * gate.softmax(2",
    ),
    ("compress_hca, DeepSeek's", "extra user"): (
        "inner", aten.mul.Tensor, 0, used_outside, "inner",
        "aten.mul.Tensor (#) is used outside the pattern too, by aten.neg.default (#)",
        "examples/deepseek.py", "entries = self.norm((kv * gate.softmax(2",
    ),
    ("compress_hca, DeepSeek's", "the pairs"): (
        "inner", aten.view_as_complex.default, 0, target(aten.view_as_real.default), "inner",
        "expected aten.view_as_complex.default of aten.view.default (#), found aten.view_as_real.default (#)",
        "examples/deepseek.py", "pairs = torch.view_as_complex(x.float().",
    ),
    ("compress_csa, DeepSeek's", "the windows"): (
        "inner", aten.cat.default, 1, target(aten.stack.default), "inner",
        "expected aten.cat.default, found aten.stack.default (#)",
        "examples/deepseek.py", "return torch.cat((previous, x[..., self.",
    ),
    ("indexer_q_mxfp4", "operator"): (
        "inner", aten.round.default, 0, target(aten.floor.default), "inner",
        "expected aten.round.default, found aten.floor.default (#)",
        "examples/deepseek.py", "return ((wide / step).round() * step * s",
    ),
    ("indexer_q_mxfp4", "dtype"): (
        "inner", convert, 4, argument(1, torch.float16), "inner",
        "prims.convert_element_type.default (#): expected torch.float32 among its arguments, found torch.float16",
        "examples/deepseek.py", "wide = x.float().unflatten(-1, (-1, bloc",
    ),
    ("indexer_q_mxfp4", "shape"): (
        "inner", aten.mul.Tensor, 5, of_shape(0, 2, 24, 4, 1), "inner",
        "weights has shape [2, 24, 4, 1], expected [B, S, 4]",
        "passes/test_indexer.py", "weights = own.weights_proj(x) * (own.sof",
    ),
    ("indexer_q_mxfp4", "constant"): (
        "inner", aten.div.Tensor, 0, argument(1, 7.0), "inner",
        "aten.div.Tensor (#): expected 6.0 among its arguments, found 7.0",
        "examples/deepseek.py", "scale = ceil_power_of_two(wide.abs().ama",
    ),
    ("indexer_q_mxfp4", "extra user"): (
        "inner", aten.bmm.default, 0, used_outside, "inner",
        "aten.bmm.default (#) is used outside the pattern too, by aten.neg.default (#)",
        "passes/test_indexer.py", "product = torch.einsum(\"bshd,btd->bsht\",",
    ),
    ("indexer_q_mxfp4", "the product"): (
        "inner", aten.bmm.default, 0, target(aten.mm.default), "inner",
        "expected aten.bmm.default, found aten.mm.default (#)",
        "passes/test_indexer.py", "product = torch.einsum(\"bshd,btd->bsht\",",
    ),
    ("indexer_q_fp8, DeepSeek's", "operator"): (
        "inner", aten.abs.default, 0, target(aten.neg.default), "inner",
        "expected aten.abs.default, found aten.neg.default (#)",
        "examples/deepseek.py", "scale = ceil_power_of_two(wide.abs().ama",
    ),
    ("indexer_q_fp8, DeepSeek's", "dtype"): (
        "inner", convert, 5, argument(1, torch.float16), "inner",
        "prims.convert_element_type.default (#): expected torch.float8_e4m3fn among its arguments, found torch.float16",
        "examples/deepseek.py", "codes = (wide / scale).clamp(-448.0, 448",
    ),
    ("indexer_q_fp8, DeepSeek's", "constant"): (
        "inner", aten.clamp_max.default, 0, argument(1, 240.0), "inner",
        "aten.clamp_max.default (#): expected 448.0 among its arguments, found 240.0",
        "examples/deepseek.py", "codes = (wide / scale).clamp(-448.0, 448",
    ),
    ("indexer_q_fp8, DeepSeek's", "shape"): (
        "inner", aten.mul.Tensor, 4, of_shape(0, 2, 24, 4, 1), "inner",
        "weights has shape [2, 24, 4, 1], expected [B, S, 4]",
        "passes/test_indexer.py", "weights = own.weights_proj(x) * (own.sof",
    ),
    ("indexer_q_fp8, DeepSeek's", "extra user"): (
        "inner", aten.relu.default, 0, used_outside, "inner",
        "aten.relu.default (#) is used outside the pattern too, by aten.neg.default (#)",
        "passes/test_indexer.py", "product = torch.einsum(\"bshd,btd->bsht\",",
    ),
    ("indexer_q_fp8", "operator"): (
        "", aten.abs.default, 0, target(aten.neg.default), "",
        "expected aten.abs.default, found aten.neg.default (#)",
        "passes/test_indexer.py", "amax = q.abs().amax(-1).float()",
    ),
    ("indexer_q_fp8", "dtype"): (
        "", convert, 2, argument(1, torch.float16), "",
        "prims.convert_element_type.default (#): expected torch.float32 among its arguments, found torch.float16",
        "passes/test_indexer.py", "amax = q.abs().amax(-1).float()",
    ),
    ("indexer_q_fp8", "shape"): (
        "", aten.slice.Tensor, 0, of_shape(0, 9, 4, 128, 1), "",
        "q has shape [9, 4, 128, 1], expected [S, 4, 128]",
        "passes/test_indexer.py", "amax = q.abs().amax(-1).float()",
    ),
    ("indexer_q_fp8", "constant"): (
        "", aten.clamp_max.default, 0, argument(1, 240.0), "",
        "aten.clamp_max.default (#): expected 448.0 among its arguments, found 240.0",
        "passes/test_indexer.py", "codes = (q.float() * ((254 - exponent) <",
    ),
    ("indexer_q_fp8", "extra user"): (
        "", aten.clamp_max.default, 0, used_outside, "",
        "aten.clamp_max.default (#) is used outside the pattern too, by aten.neg.default (#)",
        "passes/test_indexer.py", "codes = (q.float() * ((254 - exponent) <",
    ),
    ("indexer_q_fp8", "the joining"): (
        "", aten.cat.default, 1, target(aten.stack.default), "",
        "expected aten.cat.default, found aten.stack.default (#)",
        "ops/_indexer.py", "return torch.cat([x[..., :plain], rotate",
    ),
    ("fp8_linear, dequantised", "operator"): (
        "", aten.mul.Tensor, 0, target(aten.div.Tensor), "",
        "expected aten.mul.Tensor of prims.convert_element_type.default (#), found aten.div.Tensor (#)",
        "passes/test_fp8_linear.py", "return (wq.float() * scale).bfloat16()",
    ),
    ("fp8_linear, dequantised", "dtype"): (
        "", convert, 0, argument(1, torch.float16), "",
        "prims.convert_element_type.default (#): expected torch.float32 among its arguments, found torch.float16",
        "passes/test_fp8_linear.py", "return (wq.float() * scale).bfloat16()",
    ),
    ("fp8_linear, dequantised", "dtype of the weight"): (
        "", convert, 0, of_dtype(0, torch.float8_e5m2), "",
        "wq is torch.float8_e5m2, expected torch.float8_e4m3fn",
        "passes/test_fp8_linear.py", "return (wq.float() * scale).bfloat16()",
    ),
    ("fp8_linear, dequantised", "shape"): (
        "", aten.mul.Tensor, 0, of_shape(1, 384, 1, 1), "",
        "w_scale has shape [384, 1, 1], expected [E, 1]",
        "passes/test_fp8_linear.py", "return (wq.float() * scale).bfloat16()",
    ),
    ("fp8_linear, dequantised", "constant"): (
        "", aten.permute.default, 0, argument(1, [0, 1]), "",
        "aten.permute.default (#): expected 1 among its arguments, found 0",
        "passes/test_near_misses_operators.py", "return F.linear(x, fp8.wide(wq, w_scale)",
    ),
    ("fp8_linear, dequantised", "extra user"): (
        "", aten.permute.default, 0, used_outside, "",
        "aten.permute.default (#) is used outside the pattern too, by aten.neg.default (#)",
        "passes/test_near_misses_operators.py", "return F.linear(x, fp8.wide(wq, w_scale)",
    ),
    ("fp8_linear, blocks", "operator"): (
        "", aten.mul.Tensor, 0, target(aten.div.Tensor), "",
        "expected aten.mul.Tensor of prims.convert_element_type.default (#), found aten.div.Tensor (#)",
        "passes/test_fp8_linear.py", "return (wq.float() * wide).bfloat16()",
    ),
    ("fp8_linear, blocks", "dtype"): (
        "", convert, 1, argument(1, torch.float16), "",
        "prims.convert_element_type.default (#): expected torch.bfloat16 among its arguments, found torch.float16",
        "passes/test_fp8_linear.py", "return (wq.float() * wide).bfloat16()",
    ),
    ("fp8_linear, blocks", "shape"): (
        "", aten.unsqueeze.default, 0, of_shape(0, 3, 2, 1), "",
        "w_scale has shape [3, 2, 1], expected [E, D]",
        "passes/test_fp8_linear.py", "return (wq.float() * wide).bfloat16()",
    ),
    ("fp8_linear, blocks", "constant"): (
        "", aten.slice.Tensor, 0, argument(3, 256), "",
        "aten.slice.Tensor (#): expected 384 among its arguments, found 256",
        "passes/test_fp8_linear.py", "wide = scale.repeat_interleave(128, 0)[:",
    ),
    ("fp8_linear, blocks", "extra user"): (
        "", aten.mul.Tensor, 0, used_outside, "",
        "aten.mul.Tensor (#) is used outside the pattern too, by aten.neg.default (#)",
        "passes/test_fp8_linear.py", "return (wq.float() * wide).bfloat16()",
    ),
    ("fp8_linear, DeepSeek's", "operator"): (
        "inner", aten.mul.Tensor, 1, target(aten.div.Tensor), "inner",
        "expected aten.mul.Tensor of prims.convert_element_type.default (#), found aten.div.Tensor (#)",
        "examples/deepseek.py", "return (self.weight.float() * scale).to(",
    ),
    ("fp8_linear, DeepSeek's", "dtype"): (
        "inner", convert, 3, argument(1, torch.float16), "inner",
        "prims.convert_element_type.default (#): expected torch.bfloat16 among its arguments, found torch.float16",
        "examples/deepseek.py", "return (codes.float() * scale).flatten(-",
    ),
    ("fp8_linear, DeepSeek's", "shape"): (
        "inner", aten.unsqueeze.default, 0, of_shape(0, 3, 2, 1), "inner",
        "w_scale has shape [3, 2, 1], expected [E, D]",
        "examples/deepseek.py", "return (self.weight.float() * scale).to(",
    ),
    ("fp8_linear, DeepSeek's", "constant"): (
        "inner", aten.clamp_max.default, 0, argument(1, 240.0), "inner",
        "aten.clamp_max.default (#): expected 448.0 among its arguments, found 240.0",
        "examples/deepseek.py", "codes = (wide / scale).clamp(-448.0, 448",
    ),
    ("fp8_linear, DeepSeek's", "extra user"): (
        "inner", aten.mul.Tensor, 0, used_outside, "inner",
        "aten.mul.Tensor (#) is used outside the pattern too, by aten.neg.default (#)",
        "examples/deepseek.py", "return (codes.float() * scale).flatten(-",
    ),
    ("fp8_linear, torchao", "operator"): (
        "", aten.div.Tensor, 1, target(aten.mul.Tensor), "",
        "expected aten.div.Tensor, found aten.mul.Tensor (#)",
        "passes/test_near_misses_operators.py", "codes = (x.to(torch.float32) / scale).cl",
    ),
    ("fp8_linear, torchao", "dtype"): (
        "", convert, 2, argument(1, torch.float16), "",
        "prims.convert_element_type.default (#): expected torch.float8_e4m3fn among its arguments, found torch.float16",
        "passes/test_near_misses_operators.py", "codes = (x.to(torch.float32) / scale).cl",
    ),
    ("fp8_linear, torchao", "shape"): (
        "", aten.view.default, 0, of_shape(0, 48, 256), "",
        "x has shape [48, 256], expected [B, S, D]",
        "passes/test_near_misses_operators.py", "return torch._scaled_mm(xq, wq.t(), x_sc",
    ),
    ("fp8_linear, torchao", "constant"): (
        "", aten.clamp_max.default, 0, argument(1, 240.0), "",
        "aten.clamp_max.default (#): expected 448.0 among its arguments, found 240.0",
        "passes/test_near_misses_operators.py", "codes = (x.to(torch.float32) / scale).cl",
    ),
    ("fp8_linear, torchao", "extra user"): (
        "", aten.clamp_max.default, 0, used_outside, "",
        "aten.clamp_max.default (#) is used outside the pattern too, by aten.neg.default (#)",
        "passes/test_near_misses_operators.py", "codes = (x.to(torch.float32) / scale).cl",
    ),
    ("scaled_mm_fp8", "operator"): (
        "", aten.permute.default, 0, target(aten.view.default), "",
        "expected aten.permute.default, found aten.view.default (#)",
        "passes/test_near_misses_operators.py", "return torch._scaled_mm(xq, wq.t(), x_sc",
    ),
    ("scaled_mm_fp8", "dtype"): (
        "", aten._scaled_mm.default, 0, of_dtype(2, torch.bfloat16), "",
        "x_scale is torch.bfloat16, expected torch.float32",
        "passes/test_near_misses_operators.py", "return torch._scaled_mm(xq, wq.t(), x_sc",
    ),
    ("scaled_mm_fp8", "shape"): (
        "", aten._scaled_mm.default, 0, of_shape(2, 24), "",
        "x_scale has shape [24], expected [B, 1]",
        "passes/test_near_misses_operators.py", "return torch._scaled_mm(xq, wq.t(), x_sc",
    ),
    ("scaled_mm_fp8", "constant"): (
        "", aten.permute.default, 0, argument(1, [0, 1]), "",
        "aten.permute.default (#): expected 1 among its arguments, found 0",
        "passes/test_near_misses_operators.py", "return torch._scaled_mm(xq, wq.t(), x_sc",
    ),
    ("scaled_mm_fp8", "extra user"): (
        "", aten.permute.default, 0, used_outside, "",
        "aten.permute.default (#) is used outside the pattern too, by aten.neg.default (#)",
        "passes/test_near_misses_operators.py", "return torch._scaled_mm(xq, wq.t(), x_sc",
    ),
    ("scaled_mm_fp8", "no dtype"): (
        "", aten._scaled_mm.default, 0, argument(6, None), "",
        "aten._scaled_mm.default (#): expected torch.bfloat16 among its arguments, found None",
        "passes/test_near_misses_operators.py", "return torch._scaled_mm(xq, wq.t(), x_sc",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("form", "kind"), BROKEN, ids=map(" - ".join, BROKEN))
def test_one_difference_is_named(form, kind):
    module, kind_of_node, index, change, path, expected, file, code = BROKEN[form, kind]
    graph = copy.deepcopy(graph_of(form))
    whole = fused(copy.deepcopy(graph), **options(form))
    assert not whole.near_misses
    change(nth(graph, kind_of_node, index, module))
    report, fusion = fused(graph, **options(form)), form.split(", ")[0]
    assert report.counts[fusion] == whole.counts[fusion] - 1, report
    (miss,) = report.near_misses
    assert (miss.path, miss.fusion) == (path, fusion)
    assert sentence(miss) == expected
    check_source(miss, file, code)
    assert f"  {path or '(no module)'}: {fusion}: {miss.reason}\n    {miss.source}" in str(report)


# No false alarms; that whole models have none is asserted in test_model_hf.py and test_fp8_linear.py


class Attention(nn.Module):
    """Heads of as many tokens as the indexer has dims, a softmax, a relu, the best experts: another model."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(64, 192), nn.Linear(64, 128), nn.Linear(128, 64)
        self.router = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(torch.ones(64, 64).triu(1).bool(), float("-inf"))
        linear_attention = (q.softmax(2) * v).sum(2)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) + linear_attention.flatten(1).unsqueeze(1)
        x = F.rms_norm(x, (64,))
        weight, best = (self.router(x).relu() + 0.5).topk(2, -1)
        kept = F.relu((q.float() @ k.transpose(-1, -2).float()) * 0.25).sum(1).topk(4, -1).indices
        return x + self.down(self.up(x).relu()) * weight.sum(-1, True), best, kept


def weights_and_values(x: Tensor, wq: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """FP8 values that are no weights of linear layers: a cache of attention's keys, an activation rounded here."""
    keys = wq.view(3, 128, 256).bfloat16() * 0.5
    rounded = x.to(torch.float8_e4m3fn).bfloat16()
    return x[:1].expand(3, -1, -1) @ keys.transpose(1, 2), rounded @ x[0].t(), wq.float().sum() * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_model_is_nearly_nothing(dtype):
    torch.manual_seed(0)
    graph = capture(Attention().to(dtype).requires_grad_(False), torch.randn(2, 64, 64, dtype=dtype))
    report = fused(graph, fp8_linear="batch_invariant")
    assert not report.counts and not report.near_misses and not report.left_alone, report


def test_other_fp8_values_are_nearly_nothing():
    graph = capture(weights_and_values, fp8.random(2, 24, fp8.K), *fp8.quantised("token"))
    report = fused(graph, fp8_linear="batch_invariant")
    assert not report.counts and not report.near_misses, report
