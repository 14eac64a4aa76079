"""The operators, for direct calls; importing this registers them under ``torch.ops.dsv4``."""

from .hyper_connection import hc_head, hc_post, hc_post_head, hc_post_pre, hc_pre
from .indexer import indexer_q_fp8, indexer_q_mxfp4
from .indexer_cache import indexer_cache_bytes, indexer_k_load, indexer_k_store_fp8, indexer_k_store_mxfp4

__all__ = [
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
]
