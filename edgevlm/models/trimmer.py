"""The token trimmer: scores region tokens by what the text asks for. Our reconstruction of SmartTrim's idea."""

import torch
from torch import Tensor, nn

from edgevlm.artifacts import FusionConfig


class TokenTrimmer(nn.Module):
    """Scores (B, N) for region tokens from the token itself and the [CLS] token, which has read the text.

    Bottleneck of hidden / 4 with GELU. SmartTrim's own sizes and formulas are unpublished.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        bottleneck = max(8, config.hidden // 4)
        self.region = nn.Linear(config.hidden, bottleneck)
        self.query = nn.Linear(config.hidden, bottleneck)
        self.score = nn.Linear(bottleneck, 1)

    def forward(self, regions_BND: Tensor, cls_BD: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.region(regions_BND) + self.query(cls_BD).unsqueeze(1))
        return self.score(hidden).squeeze(-1)


def straight_through_keep(scores_BN: Tensor, num_keep: int, temperature: float) -> Tensor:
    """Exactly `num_keep` ones per row in the forward pass; a sigmoid around the threshold in the backward pass."""
    threshold = torch.topk(scores_BN, num_keep, dim=1).values[:, -1:].detach()
    hard = torch.zeros_like(scores_BN).scatter_(1, torch.topk(scores_BN, num_keep, dim=1).indices, 1.0)
    soft = torch.sigmoid((scores_BN - threshold) / temperature)
    return hard + soft - soft.detach()
