"""The indexer's scores of keys in pages in CuTe DSL: which kernel, and its launch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .._library import compiling, layout, new, number
from . import scores_paged
from .indexer_scores import _processors, _rows


@functools.cache
def _begin(*key):
    return compiling().submit(scores_paged.build, *key)


def _key(q: Tensor, table: Tensor, lengths: Tensor, page_size: int, result: torch.dtype | None) -> tuple:
    """What a kernel is compiled for."""
    d = q.shape[-1] * (1 if q.dtype == torch.float8_e4m3fn else 2)
    indices = table.dtype, lengths.dtype
    return q.shape[2], d, q.dtype, number(q.shape[1]), page_size, indices, lengths.dim() == 2, result or torch.float32


def paged_into(out, q, cache, weights, block_table, lengths, q_scale, length: int, page_size: int) -> None:
    """As the function of this name in Triton."""
    if out.numel() == 0:
        return
    kernel = _begin(*_key(q, block_table, lengths, page_size, out.dtype)).result()
    scales = None if q_scale is None else q_scale.reshape(-1)
    kernel(
        _rows(q)(q), scales, cache, weights.reshape(-1), block_table, lengths, out[..., :length],
        _processors(q.device),
    )  # fmt: skip


class Paged:
    """``dsv4::indexer_scores_paged``, called as its public function without ``implementation``."""

    def __call__(self, *tensors, **options) -> Tensor:
        return self.bind(*tensors, **options)(*tensors)

    def prepare(self, q, cache, weights, block_table, lengths, *_, page_size=64, dtype=None, **__) -> None:
        """Begin to compile what any number of sequences will need; the tensors may be fake."""
        _begin(*_key(q, block_table, lengths, page_size, dtype))

    def bind(
        self, q, cache, weights, block_table, lengths, q_scale=None,
        *, page_size=64, max_length=None, dtype=None, **_,
    ) -> Callable[..., Tensor]:  # fmt: skip
        """A function that does this for tensors with the same metadata."""
        length = block_table.shape[1] * page_size if max_length is None else max_length
        result, device = layout((*q.shape[:2], length), dtype or torch.float32), q.device
        if 0 in result[0]:
            return lambda *_, **__: new(result, device)
        kernel, processors = _begin(*_key(q, block_table, lengths, page_size, dtype)).result(), _processors(device)
        rows = _rows(q)

        def launch(q, cache, weights, block_table, lengths, q_scale=None, **_) -> Tensor:
            out = new(result, device)
            scales = None if q_scale is None else q_scale.reshape(-1)
            kernel(rows(q), scales, cache, weights.reshape(-1), block_table, lengths, out, processors)
            return out

        return launch


indexer_scores_paged = Paged()


class Best:
    """``dsv4::indexer_topk_paged`` in the same way."""

    def __call__(self, *tensors, **options) -> Tensor:
        from ..triton.indexer_scores import best_paged

        return best_paged(paged_into, *tensors, **options)

    def prepare(self, q, cache, weights, block_table, *tensors, top_k, page_size=64, max_length=None, dtype=None, **_):
        from ..triton.indexer_select import begin

        indexer_scores_paged.prepare(q, cache, weights, block_table, *tensors, page_size=page_size)
        length = block_table.shape[1] * page_size if max_length is None else max_length
        begin(q.device, number(length), top_k, dtype or torch.int64)


indexer_topk_paged = Best()
