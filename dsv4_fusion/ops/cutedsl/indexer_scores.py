"""The indexer's scores in CuTe DSL: which kernel, and its launch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .._library import compiling, layout, new, number
from . import scores, scores_mxfp4, scores_pieces


@functools.cache
def _begin(*key):
    return compiling().submit(scores.build, *key)


def _key(q, q_scale, start, end, positions, result: torch.dtype | None) -> tuple:
    """What a kernel is compiled for."""
    d = q.shape[-1] * (1 if q_scale is None else 2)
    ends = end if positions is None else positions
    limits = "causal" if positions is not None else "all" if start is None and end is None else "range"
    indices = tuple(None if limit is None else limit.dtype for limit in (start, ends))
    return q.shape[-2], d, q.dtype, limits, indices, result or torch.float32


@functools.cache
def _begin_expansion(d: int):
    return compiling().submit(scores_mxfp4.build, d)


def _expanded(k: Tensor, k_scale: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4 keys as e4m3 with a scale, once, where blocks would do it for every few queries."""
    d, count = 2 * k.shape[-1], k_scale.numel()
    workspace = k.new_empty(count * (d + 4), dtype=torch.uint8)
    values, factors = workspace[: count * d].view(torch.float8_e4m3fn), workspace[count * d :].view(torch.float32)
    _begin_expansion(d).result()(_rows(k)(k), k_scale.reshape(-1), values.view(-1, d), factors)
    return values.view(*k.shape[:-1], d), factors.view(k_scale.shape)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes of a tensor like this [..., d] a matrix with rows at multiples of 16 bytes."""
    d = tensor.shape[-1]
    rows = tensor.reshape(-1, d)
    if (rows.data_ptr() | rows.stride(0) * rows.element_size()) % 16 or rows.stride(1) != 1:
        return lambda tensor: tensor.reshape(-1, d).clone(memory_format=torch.contiguous_format)
    return lambda tensor: tensor.reshape(-1, d)


def _column(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """The same for a matrix of one column, whose second would begin at a multiple of 16 bytes."""
    count = tensor.numel()
    shape = (count, 1), (1, -(-count // 4) * 4)
    if not tensor.is_contiguous() or tensor.data_ptr() % 16:
        return lambda tensor: tensor.clone(memory_format=torch.contiguous_format).as_strided(*shape)
    return lambda tensor: tensor.as_strided(*shape)


def scores_into(out, q, k, weights, q_scale, k_scale, start, end, causal, ratio) -> None:
    """As the function of this name in Triton."""
    if out.numel() == 0:
        return
    limits = (start, None, end) if causal else (start, end, None)
    kernel, processors = _begin(*_key(q, q_scale, *limits, out.dtype)).result(), _processors(q.device)
    per = scores_pieces.steps(q.shape[1], k.shape[1], q.shape[2], start is not None or end is not None, processors)
    if q_scale is not None:
        k, k_scale = _expanded(k, k_scale)
    for b in range(q.shape[0]):
        own = [None if limit is None else limit[b if limit.shape[0] == q.shape[0] else 0] for limit in (start, end)]
        tensors = [make(tensor[b])(tensor[b]) for make, tensor in ((_rows, q), (_rows, k), (_column, weights))]
        scales = [None if scale is None else scale[b].reshape(-1) for scale in (q_scale, k_scale)]
        kernel(*tensors, *scales, *own, out[b][:, : k.shape[1]], ratio, per, processors)


class Ragged:
    """``dsv4::indexer_scores``, called as its public function without ``implementation``."""

    def __call__(self, *tensors, **options) -> Tensor:
        return self.bind(*tensors, **options)(*tensors)

    def prepare(self, q, k, weights, q_scale=None, k_scale=None, start=None, end=None, positions=None,
                *, dtype=None, **_) -> None:  # fmt: skip
        """Begin to compile what any number of tokens will need; the tensors may be fake."""
        _begin(*_key(q, q_scale, start, end, positions, dtype))
        if q_scale is not None:
            _begin_expansion(2 * q.shape[-1])

    def bind(
        self, q, k, weights, q_scale=None, k_scale=None, start=None, end=None, positions=None,
        *, ratio=4, dtype=None, **_,
    ) -> Callable[..., Tensor]:  # fmt: skip
        """A function that does this for tensors with the same metadata."""
        from ..triton.indexer_scores import batched, ragged

        device, causal = q.device, positions is not None
        result = layout((*q.shape[:-2], k.shape[-2]), dtype or torch.float32)
        if 0 in result[0]:
            return lambda *_: new(result, device)
        if q.dim() == 4 or q_scale is not None:

            def several(q, k, weights, q_scale=None, k_scale=None, start=None, end=None, positions=None) -> Tensor:
                out = new(result, device)
                tensors = ragged(q, k, weights, q_scale, k_scale, start, end, positions)
                scores_into(batched(out, 3), *tensors, causal, ratio)
                return out

            return several

        kernel, processors = _begin(*_key(q, None, start, end, positions, dtype)).result(), _processors(device)
        limited = not (start is None and end is None and positions is None)
        per = scores_pieces.steps(q.shape[0], k.shape[0], q.shape[1], limited, processors)
        q_rows, k_rows, column = _rows(q), _rows(k), _column(weights)

        def launch(q, k, weights, q_scale=None, k_scale=None, start=None, end=None, positions=None) -> Tensor:
            out = new(result, device)
            ends = positions if causal else end
            kernel(q_rows(q), k_rows(k), column(weights), None, k_scale, start, ends, out, ratio, per, processors)
            return out

        return launch


indexer_scores = Ragged()


class Best:
    """``dsv4::indexer_topk`` in the same way."""

    def __call__(self, *tensors, **options) -> Tensor:
        from ..triton.indexer_scores import best

        return best(scores_into, *tensors, **options)

    def prepare(self, q, k, *tensors, top_k, dtype=None, **_) -> None:
        from ..triton.indexer_select import begin

        indexer_scores.prepare(q, k, *tensors)
        begin(q.device, number(k.shape[-2]), top_k, dtype or torch.int64)


indexer_topk = Best()
