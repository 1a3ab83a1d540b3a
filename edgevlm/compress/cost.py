"""What a model costs: parameters and multiply-adds of the fusion, by formula."""

from edgevlm.artifacts import FusionConfig
from edgevlm.models.geometry import box_numbers


def head_parameters(hidden: int, head_dim: int) -> int:
    """Query, key, value with biases, and the output's columns, of one attention head."""
    return 4 * hidden * head_dim + 3 * head_dim


def neuron_parameters(hidden: int) -> int:
    """One FFN neuron: a row in, its bias, a column out."""
    return 2 * hidden + 1


def prunable_parameters(config: FusionConfig) -> int:
    """Parameters that gates can remove: heads and neurons (biases of the outputs and norms stay)."""
    heads = sum(config.layer_heads) * head_parameters(config.hidden, config.head_dim)
    return heads + sum(config.layer_ffn) * neuron_parameters(config.hidden)


def fusion_macs(config: FusionConfig, num_words: int, num_regions: int, num_keep: int, region_dim: int) -> int:
    """Multiply-adds of one answer program: projection of the regions and all layers; norms and softmax not counted."""
    total = num_regions * (region_dim + box_numbers(config)) * config.hidden
    num_words += len(config.parts)
    tokens = num_words + num_regions
    for i, (heads, ffn) in enumerate(zip(config.layer_heads, config.layer_ffn, strict=True)):
        inner = heads * config.head_dim
        total += 4 * tokens * config.hidden * inner + 2 * tokens * tokens * inner + 2 * tokens * config.hidden * ffn
        if i == config.trim_after:
            tokens = num_words + num_keep
    return total
