"""A Hugging Face DeepSeek-V4 with random weights: a tiny one, or one with V4-Flash's widths and fewer layers."""

from __future__ import annotations

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4_fusion.__main__ import TINY

LAYER_TYPES = (
    "sliding_attention",
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
SIZES = {
    "tiny": TINY,
    "flash": {"vocab_size": 4096, "n_routed_experts": 32},  # the published widths, less vocabulary and fewer experts
}


def model(
    size: str = "tiny", layers: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes
) -> DeepseekV4ForCausalLM:
    """A model in evaluation mode; attention alternates as in V4: sliding, sliding, CSA, HCA.

    Args:
        size: "tiny" or "flash".
        layers: number of decoder layers.
        dtype: of all weights.
        device: where the weights are made.
        changes: fields of DeepseekV4Config to change.
    """
    types = [LAYER_TYPES[index % len(LAYER_TYPES)] for index in range(layers)]
    fields = {"num_hidden_layers": layers, "layer_types": types, "mlp_layer_types": ["moe"] * layers}
    config = DeepseekV4Config(**SIZES[size] | fields | changes)
    torch.manual_seed(0)
    with torch.device("meta"):
        result = DeepseekV4ForCausalLM(config)
    result = result.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for name, tensor in [*result.named_parameters(), *result.named_buffers()]:
            if "rotary_emb" not in name:
                _fill(name, tensor)
        for module in result.modules():
            if "inv_freq" in " ".join(name for name, _ in module.named_buffers(recurse=False)):
                result._init_weights(module)
    return result


def _fill(name: str, tensor: torch.Tensor) -> None:
    """Random values of the size that trained weights have, so that no path is trivial."""
    leaf = name.rpartition(".")[2]
    if not tensor.is_floating_point():
        tensor.zero_()
    elif leaf in ("scale", "hc_scale"):
        tensor.copy_(torch.tensor([2.0, 0.02, 0.25])[: tensor.numel()])
    elif "norm" in name or leaf == "bias":
        tensor.uniform_(0.5, 1.5)
    elif tensor.dim() < 2:
        tensor.normal_(std=0.5)
    else:
        tensor.normal_(std=tensor.shape[-1] ** -0.5)
