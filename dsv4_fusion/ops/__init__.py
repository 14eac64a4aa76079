"""The operators, for direct calls; importing this registers them under ``torch.ops.dsv4``."""

from .compressor import compress_csa, compress_hca
from .compressor_cache import compress_csa_insert, compress_hca_insert, kv_cache_bytes, kv_load
from .fp8_linear import fp8_linear, quantize_fp8, scaled_mm_fp8
from .hyper_connection import hc_head, hc_post, hc_post_head, hc_post_pre, hc_pre
from .indexer import indexer_q_fp8, indexer_q_mxfp4
from .indexer_cache import indexer_cache_bytes, indexer_k_load, indexer_k_store_fp8, indexer_k_store_mxfp4
from .indexer_scores import indexer_scores, indexer_topk
from .indexer_scores_paged import indexer_scores_paged, indexer_topk_paged

__all__ = [
    "compress_csa",
    "compress_csa_insert",
    "compress_hca",
    "compress_hca_insert",
    "fp8_linear",
    "hc_head",
    "hc_post",
    "hc_post_head",
    "hc_post_pre",
    "hc_pre",
    "indexer_cache_bytes",
    "indexer_k_load",
    "indexer_k_store_fp8",
    "indexer_k_store_mxfp4",
    "indexer_q_fp8",
    "indexer_q_mxfp4",
    "indexer_scores",
    "indexer_scores_paged",
    "indexer_topk",
    "indexer_topk_paged",
    "kv_cache_bytes",
    "kv_load",
    "quantize_fp8",
    "scaled_mm_fp8",
]
