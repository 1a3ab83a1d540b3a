"""The region proposal head: two 1x1 convolutions per level and nothing else (MiniVLM, section 3)."""

import torch
from torch import Tensor, nn


class RPNHead(nn.Module):
    """Objectness and box deltas for each anchor; weights shared by the levels."""

    def __init__(self, channels: int, num_anchors: int) -> None:
        super().__init__()
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        for layer in (self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # pyright: ignore

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, M) and deltas (B, M, 4) in the order of `regions.anchor_grid`."""
        logits = [self.objectness(x).permute(0, 2, 3, 1).flatten(1) for x in maps]
        deltas = [self.deltas(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for x in maps]
        return torch.cat(logits, 1), torch.cat(deltas, 1)
