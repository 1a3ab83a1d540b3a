"""Which tokens and heads an input needs: scores, and the choice by number or by threshold.

Our reconstruction of SmartTrim (its formulas are unpublished), and the baselines that it must beat. A token's score comes from
the token itself, the mean of its modality, [CLS] and the image; a head's from [CLS] and the image. What is nonlinear joins
token and text: a linear layer on their concatenation would shift all tokens alike and rank them without having read the text.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edgevlm.artifacts import FusionConfig, Rung, TrimConfig
from edgevlm.models.attention import MASKED

OPEN = 2.0
"""Logit of an untrained trimmer: training starts near full capacity."""
ALWAYS = 1e4
"""Score of a token that is never dropped; [CLS] has twice as much, and so comes first."""


@dataclass(frozen=True)
class Trim:
    """How one pass trims. Numbers count per row of the batch; those of trimming layers stand in their order.

    Either numbers are given (a rung's static budgets), or a threshold (each input keeps what it needs).
    """

    num_words: int | None = None
    """Words that are read at all, the first; None = all."""
    num_regions: int | None = None
    """Regions that are read at all, the first (best) ones; None = all."""
    words: tuple[int, ...] = ()
    """Words kept behind each trimming layer; empty = all."""
    regions: tuple[int, ...] = ()
    """Regions kept behind each trimming layer, context tokens among them; empty = all."""
    threshold: float | None = None
    """Keep tokens whose keep logit is above it."""
    head_threshold: float | None = None
    """The same for heads; None = all work."""
    temperature: float | None = None
    """Mask instead of removing, with gradients to the scores at this temperature (straight through)."""
    noise: bool = False
    """With a temperature and thresholds: draw instead of comparing (Gumbel)."""

    @property
    def masks(self) -> bool:
        """Whether tokens are masked instead of removed."""
        return self.temperature is not None


FULL = Trim()
"""Nothing is trimmed."""


def trim_of(rung: Rung) -> Trim:
    """A rung's static budgets."""
    return Trim(num_words=rung.num_words, num_regions=rung.num_regions, words=rung.words, regions=rung.regions)


class TokenTrimmer(nn.Module):
    """Keep logits (B, N) of the tokens of one modality; bottleneck of hidden / 4 with GELU."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        bottleneck = max(8, config.hidden // 4)
        self.norm = nn.LayerNorm(config.hidden)
        self.token = nn.Linear(config.hidden, bottleneck)
        self.mean = nn.Linear(config.hidden, bottleneck, bias=False)
        self.query = nn.Linear(2 * config.hidden, bottleneck)
        self.score = nn.Linear(bottleneck, 1)
        nn.init.constant_(self.score.bias, OPEN)

    def forward(self, tokens_BND: Tensor, weights_BN: Tensor, cls_BD: Tensor, image_BD: Tensor) -> Tensor:
        """`weights_BN`: 1 for the tokens that are still there, whose mean is the context of each."""
        query = self.query(torch.cat([self.norm(cls_BD), self.norm(image_BD)], dim=-1))
        mean = self.mean(self.norm(mean_of(tokens_BND, weights_BN)))
        hidden = nn.functional.gelu(self.token(self.norm(tokens_BND)) + (query + mean).unsqueeze(1))
        return self.score(hidden).squeeze(-1)


class HeadTrimmer(nn.Module):
    """Keep logits (B, H) of a layer's heads."""

    def __init__(self, config: FusionConfig, num_heads: int) -> None:
        super().__init__()
        bottleneck = max(8, config.hidden // 4)
        self.norm = nn.LayerNorm(config.hidden)
        self.query = nn.Linear(2 * config.hidden, bottleneck)
        self.score = nn.Linear(bottleneck, num_heads)
        nn.init.constant_(self.score.bias, OPEN)

    def forward(self, cls_BD: Tensor, image_BD: Tensor) -> Tensor:
        query = self.query(torch.cat([self.norm(cls_BD), self.norm(image_BD)], dim=-1))
        return self.score(nn.functional.gelu(query))


class Trimmers(nn.Module):
    """All trimmers of a fusion."""

    def __init__(self, config: FusionConfig, trim: TrimConfig) -> None:
        super().__init__()
        self.trim = trim

        def by_layer(wanted: bool) -> nn.ModuleDict:
            return nn.ModuleDict({str(i): TokenTrimmer(config) for i in trim.layers} if wanted else {})

        self.regions = by_layer(trim.policy == "learned")
        self.words = by_layer(trim.policy == "learned" and trim.words)
        self.heads = nn.ModuleDict({str(i): HeadTrimmer(config, config.layer_heads[i]) for i in trim.head_layers})
        cross = trim.head_layers if config.has_encoders else ()
        self.image_heads = nn.ModuleDict({str(i): HeadTrimmer(config, config.cross_heads[i]) for i in cross})

    def scores(
        self,
        modality: Literal["words", "regions"],
        layer: int,
        tokens_BND: Tensor,
        weights_BN: Tensor,
        cls_BD: Tensor,
        image_BD: Tensor,
        paid_BN: Tensor | None,
    ) -> Tensor:
        """How much each token is wanted behind a layer, by the policy.

        `attention` needs what each was paid, `paid_BN`; `learned` alone reads the states.
        """
        if self.trim.policy == "learned":
            trimmer = getattr(self, modality)[str(layer)]
            return trimmer(tokens_BND, weights_BN, cls_BD, image_BD)
        if self.trim.policy == "attention":
            assert paid_BN is not None
            return paid_BN
        shape = tokens_BND.shape[:2]
        if self.training:
            return torch.rand(shape, device=tokens_BND.device)
        return _scattered(shape[1], tokens_BND).expand(shape)


def mean_of(tokens_BND: Tensor, weights_BN: Tensor) -> Tensor:
    """Weighted mean over the tokens, (B, D); 0 where no token counts."""
    total = weights_BN.sum(1, keepdim=True).clamp(min=1e-6)
    return torch.matmul((weights_BN / total).unsqueeze(1), tokens_BND).squeeze(1)


def keep_by_number(scores_BN: Tensor, num_keep: int, temperature: float) -> Tensor:
    """Exactly `num_keep` ones per row in the forward pass; a sigmoid around the threshold in the backward pass."""
    values, index = torch.topk(scores_BN, num_keep, dim=1)
    hard = torch.zeros_like(scores_BN).scatter_(1, index, 1.0)
    soft = torch.sigmoid((scores_BN - values[:, -1:].detach()) / temperature)
    return hard + soft - soft.detach()


def keep_by_threshold(scores: Tensor, threshold: float, temperature: float | None, noise: bool) -> Tensor:
    """1 where the keep logit is above the threshold, else 0; with a temperature, a sigmoid in the backward pass.

    With `noise`, a draw: the difference of two Gumbel variables is logistic, so that a token is kept with the probability that
    its logit says.
    """
    logits = scores - threshold
    if noise:
        u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        logits = logits + torch.logit(u)
    hard = (logits > 0).to(scores.dtype)
    if temperature is None:
        return hard
    soft = torch.sigmoid(logits / temperature)
    return hard + soft - soft.detach()


def at_rest(scores_BN: Tensor, present_BN: Tensor) -> Tensor:
    """Scores in which what is not there comes last."""
    return scores_BN + (1.0 - present_BN) * MASKED


def _scattered(length: int, like: Tensor) -> Tensor:
    """Fixed numbers in 0..1 without order, the same in every export: multiples of the golden ratio, modulo 1."""
    ratio = (math.sqrt(5) - 1) / 2
    return torch.tensor([[(i * ratio) % 1 for i in range(1, length + 1)]], dtype=like.dtype, device=like.device)
