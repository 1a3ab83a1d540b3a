"""Post-norm transformer layers with attention spelt out, so that maps can be distilled, and the masks that they read.

Masks are additive and built outside the layers (-1e4, not -inf: a fully masked row must not become NaN).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgevlm.artifacts import FusionConfig

MASKED = -1e4
MOST = 20.0
"""By how much (as a logarithm) a dropped key may be liked more than the best kept one, for its gradient."""


class Image(NamedTuple):
    """What cross-modal layers read."""

    tokens_BSD: Tensor
    mask_B11S: Tensor
    some_B: Tensor
    """0 where nothing is left to read, and so nothing is read; else 1."""
    keep_BS: Tensor | None = None
    """Masked trimming: 0 for dropped regions."""


class Heads(NamedTuple):
    """Which heads of a layer work for each row; None = all."""

    own_BH: Tensor | None = None
    image_BH: Tensor | None = None
    """Of attention to the image."""


ALL_HEADS = Heads()
"""Nothing said about them: all work."""


class Attention(nn.Module):
    """Multi-head attention to the tokens themselves or to others.

    `keep` multiplies what each key is paid before it is normalised, so that a dropped key is as if it were not there but
    has gradients; `some` multiplies what each row is paid in all; `heads` multiply the context of each head. Heads
    given as truth values are skipped, weights and all, where no row of the batch keeps them.
    """

    def __init__(self, hidden: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.query = nn.Linear(hidden, inner)
        self.key = nn.Linear(hidden, inner)
        self.value = nn.Linear(hidden, inner)
        self.output = nn.Linear(inner, hidden)

    def forward(
        self,
        x_BTD: Tensor,
        mask_B11S: Tensor,
        keep_BS: Tensor | None,
        read_BSD: Tensor | None = None,
        heads_BH: Tensor | None = None,
        some_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        read_BSD = x_BTD if read_BSD is None else read_BSD
        if heads_BH is not None and heads_BH.dtype == torch.bool:
            return self._some_heads(x_BTD, mask_B11S, keep_BS, read_BSD, heads_BH, some_B)
        q, k, v = self.query(x_BTD), self.key(read_BSD), self.value(read_BSD)
        context_BHTD, attention = self._attend(q, k, v, mask_B11S, keep_BS, self.num_heads, some_B)
        if heads_BH is not None:
            context_BHTD = context_BHTD * heads_BH[:, :, None, None]
        return self.output(context_BHTD.transpose(1, 2).flatten(2)), attention

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_B11S: Tensor,
        keep_BS: Tensor | None,
        num_heads: int,
        some_B: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)

        scores = torch.matmul(heads(q) * self.head_dim**-0.5, heads(k).transpose(-1, -2)) + mask_B11S
        attention = torch.softmax(scores, dim=-1) if keep_BS is None else _softmax_of_kept(scores, keep_BS)
        if some_B is not None:
            attention = attention * some_B[:, None, None, None]
        return torch.matmul(attention, heads(v)), attention

    def _some_heads(
        self,
        x_BTD: Tensor,
        mask_B11S: Tensor,
        keep_BS: Tensor | None,
        read_BSD: Tensor,
        heads_BH: Tensor,
        some_B: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        used = heads_BH.any(0).nonzero()[:, 0]
        if not len(used):
            zeros = x_BTD.new_zeros(len(x_BTD), self.num_heads, x_BTD.shape[1], read_BSD.shape[1])
            return self.output.bias.expand(*x_BTD.shape[:2], -1), zeros
        rows = (used[:, None] * self.head_dim + torch.arange(self.head_dim, device=used.device)).flatten()
        q, k, v = (
            nn.functional.linear(x, layer.weight[rows], layer.bias[rows])
            for layer, x in ((self.query, x_BTD), (self.key, read_BSD), (self.value, read_BSD))
        )
        context_BHTD, attention = self._attend(q, k, v, mask_B11S, keep_BS, len(used), some_B)
        context_BHTD = context_BHTD * heads_BH[:, used, None, None]
        context = context_BHTD.transpose(1, 2).flatten(2)
        return nn.functional.linear(context, self.output.weight[:, rows], self.output.bias), attention


def _softmax_of_kept(scores_BHTS: Tensor, keep_BS: Tensor) -> Tensor:
    """Softmax over the keys with keep = 1; relative to the largest of those, however much the others would be paid."""
    keep = keep_BS[:, None, None, :]
    largest = (scores_BHTS.detach() + (1.0 - keep.detach()) * MASKED).amax(-1, keepdim=True)
    paid = torch.exp((scores_BHTS - largest).clamp(max=MOST)) * keep
    return paid / paid.sum(-1, keepdim=True).clamp(min=1e-9)


class Layer(nn.Module):
    """One post-norm transformer layer; with `cross_heads`, one that also attends to an image (BERT's decoder layer)."""

    def __init__(self, config: FusionConfig, heads: int, ffn: int, cross_heads: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(config.hidden, heads, config.head_dim)
        self.attention_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        if cross_heads is not None:
            self.cross_attention = Attention(config.hidden, cross_heads, config.head_dim)
            self.cross_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.ffn_in = nn.Linear(config.hidden, ffn)
        self.ffn_out = nn.Linear(ffn, config.hidden)
        self.ffn_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        mask_B11T: Tensor,
        keep_BT: Tensor | None = None,
        image: Image | None = None,
        heads: Heads = ALL_HEADS,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens, their attention to each other, and to the image."""
        y, attention = self.attention(x_BTD, mask_B11T, keep_BT, None, heads.own_BH)
        x_BTD = self.attention_norm(x_BTD + self.dropout(y))
        looked = None
        if image is not None:
            y, looked = self.cross_attention(
                x_BTD, image.mask_B11S, image.keep_BS, image.tokens_BSD, heads.image_BH, image.some_B
            )
            x_BTD = self.cross_norm(x_BTD + self.dropout(y))
        return self.feed_forward(x_BTD), attention, looked

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """What follows attention."""
        neurons = nn.functional.gelu(self.ffn_in(x_BTD))
        return self.ffn_norm(x_BTD + self.dropout(self.ffn_out(neurons)))


def attention_mask(valid_BT: Tensor, num_caption: int | None = None) -> Tensor:
    """Additive: what is not valid is not read; with `num_caption`, nor is what a caption has still to say."""
    mask_B11T = ((1.0 - valid_BT) * MASKED)[:, None, None, :]
    if num_caption is None:
        return mask_B11T
    return mask_B11T + seq2seq_mask(num_caption, mask_B11T.shape[-1], mask_B11T)


def seq2seq_mask(num_caption: int, num_tokens: int, like: Tensor) -> Tensor:
    """Additive mask (T, T), query x key, of UniLM's sequence-to-sequence form: the caption reads itself from left to
    right and all of the context behind it; the context reads the context only.
    """
    token = torch.arange(num_tokens, device=like.device)
    hidden = (token[None, :] < num_caption) & (token[None, :] > torch.where(token < num_caption, token, -1)[:, None])
    return hidden.to(like.dtype) * MASKED
