"""Box features that let a small fusion see single pixels: place within a part of the image, and distance to its edges.

Six numbers per box (corners and size) are enough for a large network; one of 0.4 M parameters does not learn from them
whether an item touches a wall. Everything here is a fixed function of the box: no parameters, plain operators. Ours.
"""

import math

import torch
from torch import Tensor, nn

from edgevlm.artifacts import FusionConfig

CENTRE_WAVES = (1.0, 2.0, 4.0, 8.0)
"""Periods of a centre's Fourier features, per part."""
EDGE_WAVES = (4.0, 8.0)
"""Of an edge's: fine, so that attention can match the edges of neighbours."""


def box_numbers(config: FusionConfig) -> int:
    """How many numbers describe a box."""
    if config.box_encoding == "plain":
        return 6
    waves = 2 * 2 * len(CENTRE_WAVES) + 2 * 4 * len(EDGE_WAVES)
    return max(1, len(config.parts)) + 4 + 4 + 2 + 2 * (config.box_bins + 1) + waves


class BoxGeometry(nn.Module):
    """Normalised corners (B, N, 4) -> (B, N, F): which part the box's centre is in, and where in it.

    Per part of size 1: gaps to the four edges, and exp(-gap / `edge_scale`), which is 1 where the box touches; size;
    the centre in soft bins and in waves; the edges in finer waves. A box outside all parts has zeros.
    """

    parts_P4: Tensor
    bins: Tensor

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.edge_scale, self.num_bins = config.edge_scale, config.box_bins
        parts = torch.tensor(config.parts or ((0.0, 0.0, 1.0, 1.0),))
        self.register_buffer("parts_P4", parts, persistent=False)
        self.register_buffer("bins", torch.arange(config.box_bins + 1) / config.box_bins, persistent=False)

    def forward(self, boxes_norm_BN4: Tensor) -> Tensor:
        low_BN2, high_BN2 = boxes_norm_BN4[..., :2], boxes_norm_BN4[..., 2:]
        centre_BN12 = (0.5 * (low_BN2 + high_BN2)).unsqueeze(2)
        start_P2, end_P2 = self.parts_P4[:, :2], self.parts_P4[:, 2:]
        inside_BNP2 = (centre_BN12 >= start_P2).to(low_BN2.dtype) * (centre_BN12 <= end_P2).to(low_BN2.dtype)
        inside_BNP = inside_BNP2[..., 0] * inside_BNP2[..., 1]
        # Of the part that the box is in: a product with a one-hot row picks it.
        start_BN2, size_BN2 = torch.matmul(inside_BNP, start_P2), torch.matmul(inside_BNP, end_P2 - start_P2)
        scale_BN2 = 1.0 / size_BN2.clamp(min=1e-3)
        known_BN1 = inside_BNP.sum(-1, keepdim=True)
        low, high = (low_BN2 - start_BN2) * scale_BN2 * known_BN1, (high_BN2 - start_BN2) * scale_BN2 * known_BN1
        gaps = torch.cat([low, 1.0 - high], dim=-1).clamp(min=0.0)
        centre = 0.5 * (low + high)
        bins = torch.exp(-(((centre.unsqueeze(-1) - self.bins) * self.num_bins) ** 2)).flatten(2)
        numbers = [inside_BNP, gaps, torch.exp(-gaps / self.edge_scale), high - low, bins]
        corners = torch.cat([low, high], dim=-1)
        for values, waves in ((centre, CENTRE_WAVES), (corners, EDGE_WAVES)):
            for wave in waves:
                angle = values * (2 * math.pi * wave)
                numbers += [torch.sin(angle), torch.cos(angle)]
        return torch.cat(numbers, dim=-1) * known_BN1
