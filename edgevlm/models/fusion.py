"""The compact fusion transformer: [CLS] words [SEP] regions through post-norm BERT layers (MiniVLM, section 3).

Masks are additive and built outside the layers (-1e4, not -inf: a fully masked row must not become NaN), attention
is spelt out so that maps can be distilled. Heads and FFN widths may differ in every layer.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgevlm.artifacts import FusionConfig, TokenizerSpec
from edgevlm.models.geometry import BoxGeometry, box_numbers
from edgevlm.models.regions import take
from edgevlm.models.trimmer import TokenTrimmer, straight_through_keep

MASKED = -1e4


@dataclass
class FusionOutput:
    """What the layers produced; T = tokens: words, then the parts of the image that the config names, then regions."""

    pooled_BD: Tensor
    regions_BND: Tensor
    """Last hidden states of the region tokens that were kept."""
    looked_at_BN: Tensor
    """Attention that [CLS] pays to each region in the last layer, mean over heads; 0 for dropped regions."""
    hidden_BTD: list[Tensor] = field(default_factory=list)
    """Embedding output, then each layer's output."""
    attention_BHTT: list[Tensor] = field(default_factory=list)
    trim_scores_BN: Tensor | None = None


class Attention(nn.Module):
    """Multi-head self-attention; `keep` multiplies the attention paid to each key and renormalises."""

    def __init__(self, hidden: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.query = nn.Linear(hidden, inner)
        self.key = nn.Linear(hidden, inner)
        self.value = nn.Linear(hidden, inner)
        self.output = nn.Linear(inner, hidden)

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor, keep_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        q, k, v = heads(self.query(x_BTD)), heads(self.key(x_BTD)), heads(self.value(x_BTD))
        scores = torch.matmul(q * self.head_dim**-0.5, k.transpose(-1, -2)) + mask_B11T
        attention = torch.softmax(scores, dim=-1)
        if keep_BT is not None:
            attention = attention * keep_BT[:, None, None, :]
            attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-9)
        context = torch.matmul(attention, v)
        return self.output(context.transpose(1, 2).flatten(2)), attention


class Layer(nn.Module):
    """One post-norm transformer layer."""

    def __init__(self, config: FusionConfig, index: int) -> None:
        super().__init__()
        self.attention = Attention(config.hidden, config.layer_heads[index], config.head_dim)
        self.attention_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.ffn_in = nn.Linear(config.hidden, config.layer_ffn[index])
        self.ffn_out = nn.Linear(config.layer_ffn[index], config.hidden)
        self.ffn_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor, keep_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, attention = self.attention(x_BTD, mask_B11T, keep_BT)
        x_BTD = self.attention_norm(x_BTD + self.dropout(y))
        neurons = nn.functional.gelu(self.ffn_in(x_BTD))
        return self.ffn_norm(x_BTD + self.dropout(self.ffn_out(neurons))), attention


class Fusion(nn.Module):
    """Joint transformer over words and regions."""

    def __init__(self, config: FusionConfig, tokenizer: TokenizerSpec, region_dim: int) -> None:
        super().__init__()
        self.config, self.pad_id = config, tokenizer.pad_id
        self.words = nn.Embedding(tokenizer.vocab_size, config.hidden)
        self.positions = nn.Embedding(tokenizer.max_tokens, config.hidden)
        self.types = nn.Embedding(2, config.hidden)
        self.word_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.region = nn.Linear(region_dim + box_numbers(config), config.hidden)
        self.region_norm = nn.LayerNorm(config.hidden, eps=1e-5)
        self.geometry = BoxGeometry(config) if config.box_encoding == "geometry" else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(len(config.layer_heads)))
        self.trimmer = TokenTrimmer(config) if config.trim_after is not None else None
        self.pooler = nn.Linear(config.hidden, config.hidden)
        for embedding in (self.words, self.positions, self.types):
            nn.init.normal_(embedding.weight, std=0.02)
        if config.parts:
            self.parts = nn.Parameter(torch.randn(len(config.parts), config.hidden) * 0.02)
            self.part_norm = nn.LayerNorm(config.hidden, eps=1e-12)

    def embed(
        self, features_BND: Tensor, boxes_norm_BN4: Tensor, input_ids_BL: Tensor, num_caption: int | None = None
    ) -> Tensor:
        """Token embeddings, (B, L + P + N, D); words from `num_caption` on are tags and share the regions' type."""
        positions = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
        words = self.words(input_ids_BL) + self.positions(positions)
        if num_caption is None:
            words = words + self.types.weight[0]
        else:
            words = words + self.types((positions >= num_caption).long())
        if self.geometry is None:
            sizes = boxes_norm_BN4[..., 2:] - boxes_norm_BN4[..., :2]
            boxes = torch.cat([boxes_norm_BN4, sizes], dim=-1)
        else:
            boxes = self.geometry(boxes_norm_BN4)
        regions = self.region(torch.cat([features_BND, boxes], dim=-1)) + self.types.weight[1]
        tokens = [self.word_norm(words), self.region_norm(regions)]
        if self.config.parts:
            tokens.insert(1, self.part_norm(self.parts).expand(len(words), -1, -1))
        return torch.cat(tokens, dim=1)

    def forward(
        self,
        features_BND: Tensor,
        boxes_norm_BN4: Tensor,
        valid_BN: Tensor,
        input_ids_BL: Tensor,
        *,
        num_keep: int | None = None,
        trim_temperature: float | None = None,
        num_caption: int | None = None,
        seq2seq: bool = False,
    ) -> FusionOutput:
        """Fuse text and regions.

        Args:
            features_BND, boxes_norm_BN4: region features and normalised corners.
            valid_BN: 1.0 where the region counts, 0.0 where it is padding.
            input_ids_BL: token ids.
            num_keep: region tokens kept after the trimming layer; None = all.
            trim_temperature: if given, trimming masks tokens (differentiably) instead of removing them.
            num_caption: words of the caption; the other words are tags. None = all words.
            seq2seq: a caption word sees the caption up to itself, and tags and regions see no caption (for generation).
        """
        num_words, num_regions, num_parts = input_ids_BL.shape[1], features_BND.shape[1], len(self.config.parts)
        length = num_words + num_parts  # of what comes before the regions
        context_valid = (input_ids_BL != self.pad_id).to(features_BND.dtype)
        if num_parts:
            ones = torch.ones(len(features_BND), num_parts, dtype=context_valid.dtype, device=context_valid.device)
            context_valid = torch.cat([context_valid, ones], dim=1)

        def attention_mask(region_valid: Tensor) -> Tensor:
            mask_B11T = ((1.0 - torch.cat([context_valid, region_valid], dim=1)) * MASKED)[:, None, None, :]
            if not seq2seq:
                return mask_B11T
            return mask_B11T + seq2seq_mask(num_caption or num_words, mask_B11T.shape[-1], mask_B11T)

        mask = attention_mask(valid_BN)
        x = self.embed(features_BND, boxes_norm_BN4, input_ids_BL, num_caption)
        trimming = num_keep is not None and num_keep < num_regions
        kept_index, keep, trim_scores = None, None, None
        hidden, attentions = [x], []
        for i, layer in enumerate(self.layers):
            x, attention = layer(x, mask, keep)
            hidden.append(x)
            attentions.append(attention)
            if trimming and i == self.config.trim_after and self.trimmer is not None and num_keep is not None:
                # The trimmer reads the trunk's states but does not steer them: it only ranks.
                trim_scores = self.trimmer(x[:, length:], x[:, 0]) + (1.0 - valid_BN) * MASKED
                if trim_temperature is None:
                    kept_index = torch.topk(trim_scores, num_keep, dim=1).indices
                    x = torch.cat([x[:, :length], take(x[:, length:], kept_index)], dim=1)
                    mask = attention_mask(take(valid_BN, kept_index))
                else:
                    kept = straight_through_keep(trim_scores, num_keep, trim_temperature)
                    keep = torch.cat([torch.ones_like(context_valid), kept], dim=1)
        looked_at = attentions[-1][:, :, 0, length:].mean(1)
        if kept_index is not None:
            places = (kept_index.unsqueeze(-1) == torch.arange(num_regions, device=x.device)).to(x.dtype)
            looked_at = torch.matmul(looked_at.unsqueeze(1), places).squeeze(1)
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return FusionOutput(pooled, x[:, length:], looked_at, hidden, attentions, trim_scores)


def seq2seq_mask(num_caption: int, num_tokens: int, like: Tensor) -> Tensor:
    """Additive mask (T, T), query x key, of UniLM's sequence-to-sequence form: the caption reads itself from left to
    right and all of the context behind it; the context reads the context only.
    """
    token = torch.arange(num_tokens, device=like.device)
    hidden = (token[None, :] < num_caption) & (token[None, :] > torch.where(token < num_caption, token, -1)[:, None])
    return hidden.to(like.dtype) * MASKED
