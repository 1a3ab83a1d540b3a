"""The compact fusion transformer, of post-norm BERT layers, in two forms.

* Single stream (MiniVLM, section 3): [CLS] words [SEP] regions, and every layer reads all of them.
* Two encoders (EfficientVLM, after X-VLM): regions through a vision encoder, words through a text encoder, then cross-modal
  layers on the words: self-attention, attention to the vision encoder's output, FFN.

Masks are additive and built outside the layers (-1e4, not -inf: a fully masked row must not become NaN), attention
is spelt out so that maps can be distilled. Heads and FFN widths may differ in every layer.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgevlm.artifacts import FusionConfig, TokenizerSpec
from edgevlm.models.geometry import BoxGeometry, box_numbers
from edgevlm.models.regions import take
from edgevlm.models.stacks import StackName
from edgevlm.models.trimmer import TokenTrimmer, straight_through_keep

MASKED = -1e4


@dataclass
class States:
    """What one stack of layers produced."""

    hidden_BTD: list[Tensor]
    """Its input, then each layer's output."""
    attention_BHTT: list[Tensor] = field(default_factory=list)
    cross_BHTS: list[Tensor] = field(default_factory=list)
    """Attention from words to the image's tokens; cross-modal layers only."""


@dataclass
class FusionOutput:
    """What the layers produced.

    T = tokens: words, then the parts of the image that the config names, then regions; with two encoders parts and regions
    in the vision encoder, words elsewhere.
    """

    pooled_BD: Tensor
    regions_BND: Tensor
    """Last hidden states of the region tokens that were kept; with two encoders, whose regions have not read the text, times
    the state of [CLS]."""
    looked_at_BN: Tensor
    """Attention that [CLS] pays to each region in the last layer, mean over heads; 0 for dropped regions."""
    stacks: dict[StackName, States]
    """Single stream: `fusion`. Two encoders: `vision`, `text` and `cross`."""
    trim_scores_BN: Tensor | None = None

    @property
    def hidden_BTD(self) -> list[Tensor]:  # noqa: N802  (named as the fields are)
        """Of the last stack: its first tokens are the words in both forms."""
        return list(self.stacks.values())[-1].hidden_BTD

    @property
    def attention_BHTT(self) -> list[Tensor]:  # noqa: N802
        """Of the last stack."""
        return list(self.stacks.values())[-1].attention_BHTT


class Image(NamedTuple):
    """What cross-modal layers read."""

    tokens_BSD: Tensor
    mask_B11S: Tensor
    keep_BS: Tensor
    """0 for padding and for dropped regions: where nothing is left, nothing is read."""


class Trimmed(NamedTuple):
    """Tokens whose last N are regions, after the trimming layer."""

    tokens_BTD: Tensor
    valid_BN: Tensor
    kept_BN: Tensor | None
    """Masked form: all regions are still there, and those to be kept are 1."""
    index_BK: Tensor | None
    """Gathered form: which regions are left."""
    scores_BN: Tensor


class Attention(nn.Module):
    """Multi-head attention to the tokens themselves or to others.

    `keep` multiplies the attention paid to each key and renormalises.
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
        self, x_BTD: Tensor, mask_B11S: Tensor, keep_BS: Tensor | None, read_BSD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        read_BSD = x_BTD if read_BSD is None else read_BSD
        q, k, v = heads(self.query(x_BTD)), heads(self.key(read_BSD)), heads(self.value(read_BSD))
        scores = torch.matmul(q * self.head_dim**-0.5, k.transpose(-1, -2)) + mask_B11S
        attention = torch.softmax(scores, dim=-1)
        if keep_BS is not None:
            attention = attention * keep_BS[:, None, None, :]
            attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-9)
        context = torch.matmul(attention, v)
        return self.output(context.transpose(1, 2).flatten(2)), attention


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
        self, x_BTD: Tensor, mask_B11T: Tensor, keep_BT: Tensor | None = None, image: Image | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens, their attention to each other, and to the image."""
        y, attention = self.attention(x_BTD, mask_B11T, keep_BT)
        x_BTD = self.attention_norm(x_BTD + self.dropout(y))
        looked = None
        if image is not None:
            y, looked = self.cross_attention(x_BTD, image.mask_B11S, image.keep_BS, image.tokens_BSD)
            x_BTD = self.cross_norm(x_BTD + self.dropout(y))
        return self.feed_forward(x_BTD), attention, looked

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """What follows attention."""
        neurons = nn.functional.gelu(self.ffn_in(x_BTD))
        return self.ffn_norm(x_BTD + self.dropout(self.ffn_out(neurons)))


class Fusion(nn.Module):
    """Transformer over words and regions; see the head of this file for its two forms."""

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
        if config.has_encoders:
            self.vision = _layers(config, config.vision_heads, config.vision_ffn)
            self.text = _layers(config, config.text_heads, config.text_ffn)
        self.layers = _layers(config, config.layer_heads, config.layer_ffn, config.cross_heads)
        self.trimmer = TokenTrimmer(config) if config.trim_after is not None else None
        self.pooler = nn.Linear(config.hidden, config.hidden)
        for embedding in (self.words, self.positions, self.types):
            nn.init.normal_(embedding.weight, std=0.02)
        if config.parts:
            self.parts = nn.Parameter(torch.randn(len(config.parts), config.hidden) * 0.02)
            self.part_norm = nn.LayerNorm(config.hidden, eps=1e-12)

    def embed_words(self, input_ids_BL: Tensor, num_caption: int | None = None) -> Tensor:
        """(B, L, D); words from `num_caption` on are tags and share the regions' type."""
        positions = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
        words = self.words(input_ids_BL) + self.positions(positions)
        if num_caption is None:
            words = words + self.types.weight[0]
        else:
            words = words + self.types((positions >= num_caption).long())
        return self.word_norm(words)

    def embed_image(self, features_BND: Tensor, boxes_norm_BN4: Tensor) -> Tensor:
        """The parts that the config names, then the regions: (B, P + N, D)."""
        if self.geometry is None:
            sizes = boxes_norm_BN4[..., 2:] - boxes_norm_BN4[..., :2]
            boxes = torch.cat([boxes_norm_BN4, sizes], dim=-1)
        else:
            boxes = self.geometry(boxes_norm_BN4)
        regions = self.region(torch.cat([features_BND, boxes], dim=-1)) + self.types.weight[1]
        regions = self.region_norm(regions)
        if not self.config.parts:
            return regions
        return torch.cat([self.part_norm(self.parts).expand(len(regions), -1, -1), regions], dim=1)

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
        words_BLD = self.embed_words(input_ids_BL, num_caption)
        image_BSD = self.embed_image(features_BND, boxes_norm_BN4)
        word_valid_BL = (input_ids_BL != self.pad_id).to(features_BND.dtype)
        num_hidden = (num_caption or input_ids_BL.shape[1]) if seq2seq else None
        num_keep = None if num_keep is None or num_keep >= features_BND.shape[1] else num_keep
        through = self._two_encoders if self.config.has_encoders else self._single_stream
        return through(words_BLD, image_BSD, word_valid_BL, valid_BN, num_hidden, num_keep, trim_temperature)

    def _single_stream(
        self,
        words_BLD: Tensor,
        image_BSD: Tensor,
        word_valid_BL: Tensor,
        valid_BN: Tensor,
        num_hidden: int | None,
        num_keep: int | None,
        trim_temperature: float | None,
    ) -> FusionOutput:
        length = word_valid_BL.shape[1] + len(self.config.parts)  # of what comes before the regions

        def mask_of(region_valid: Tensor) -> Tensor:
            return attention_mask(torch.cat([word_valid_BL, self.image_valid(region_valid)], dim=1), num_hidden)

        x, mask, keep, trimmed = torch.cat([words_BLD, image_BSD], dim=1), mask_of(valid_BN), None, None
        states = States([x])
        for i, layer in enumerate(self.layers):
            x, attention, _ = layer(x, mask, keep)
            states.hidden_BTD.append(x)
            states.attention_BHTT.append(attention)
            if num_keep is not None and i == self.config.trim_after:
                trimmed = self._trim(x, x[:, 0], valid_BN, num_keep, trim_temperature)
                x = trimmed.tokens_BTD
                if trimmed.kept_BN is None:
                    mask = mask_of(trimmed.valid_BN)
                else:
                    keep = torch.cat([torch.ones_like(word_valid_BL), self.image_valid(trimmed.kept_BN)], dim=1)
        looked_at = states.attention_BHTT[-1][:, :, 0, length:].mean(1)
        return self._output(x[:, 0], x[:, length:], looked_at, {"fusion": states}, trimmed, valid_BN)

    def _two_encoders(
        self,
        words_BLD: Tensor,
        image_BSD: Tensor,
        word_valid_BL: Tensor,
        valid_BN: Tensor,
        num_hidden: int | None,
        num_keep: int | None,
        trim_temperature: float | None,
    ) -> FusionOutput:
        length, image_valid = len(self.config.parts), self.image_valid(valid_BN)
        image_mask, word_mask = attention_mask(image_valid), attention_mask(word_valid_BL, num_hidden)
        vision, text = States([image_BSD]), States([words_BLD])
        for stack, layers, mask in ((vision, self.vision, image_mask), (text, self.text, word_mask)):
            for layer in layers:
                x, attention, _ = layer(stack.hidden_BTD[-1], mask)
                stack.hidden_BTD.append(x)
                stack.attention_BHTT.append(attention)
        x, trimmed = text.hidden_BTD[-1], None
        image, cross = Image(vision.hidden_BTD[-1], image_mask, image_valid), States([x])
        for i, layer in enumerate(self.layers):
            x, attention, looked = layer(x, word_mask, None, image)
            cross.hidden_BTD.append(x)
            cross.attention_BHTT.append(attention)
            cross.cross_BHTS.append(looked)
            if num_keep is not None and i == self.config.trim_after:
                trimmed = self._trim(image.tokens_BSD, x[:, 0], valid_BN, num_keep, trim_temperature)
                region_keep = trimmed.valid_BN if trimmed.kept_BN is None else trimmed.valid_BN * trimmed.kept_BN
                mask = attention_mask(self.image_valid(trimmed.valid_BN))
                image = Image(trimmed.tokens_BTD, mask, self.image_valid(region_keep))
        regions_BND = _behind(image.tokens_BSD, length) * x[:, :1]
        looked_at = _behind(cross.cross_BHTS[-1][:, :, 0].mean(1), length)
        stacks: dict[StackName, States] = {"vision": vision, "text": text, "cross": cross}
        return self._output(x[:, 0], regions_BND, looked_at, stacks, trimmed, valid_BN)

    def image_valid(self, valid_BN: Tensor) -> Tensor:
        """(B, P + N): the parts of the image always count, the regions as given."""
        num_parts = len(self.config.parts)
        if not num_parts:
            return valid_BN
        ones = torch.ones(len(valid_BN), num_parts, dtype=valid_BN.dtype, device=valid_BN.device)
        return torch.cat([ones, valid_BN], dim=1)

    def _trim(
        self, tokens_BTD: Tensor, cls_BD: Tensor, valid_BN: Tensor, num_keep: int, temperature: float | None
    ) -> Trimmed:
        """Rank the regions, which are the last of the tokens, and keep the best: gathered, or masked at a temperature."""
        assert self.trimmer is not None, "a config with trim_after has a trimmer"
        length = tokens_BTD.shape[1] - valid_BN.shape[1]
        regions = _behind(tokens_BTD, length)
        # The trimmer reads the trunk's states but does not steer them: it only ranks.
        scores = self.trimmer(regions, cls_BD) + (1.0 - valid_BN) * MASKED
        if temperature is not None:
            return Trimmed(tokens_BTD, valid_BN, straight_through_keep(scores, num_keep, temperature), None, scores)
        index = torch.topk(scores, num_keep, dim=1).indices
        kept_BKD = take(regions, index)
        tokens_BTD = torch.cat([tokens_BTD[:, :length], kept_BKD], dim=1) if length else kept_BKD
        return Trimmed(tokens_BTD, take(valid_BN, index), None, index, scores)

    def _output(
        self,
        cls_BD: Tensor,
        regions_BND: Tensor,
        looked_at: Tensor,
        stacks: dict[StackName, States],
        trimmed: Trimmed | None,
        valid_BN: Tensor,
    ) -> FusionOutput:
        if trimmed is not None and trimmed.index_BK is not None:
            at = torch.arange(valid_BN.shape[1], device=cls_BD.device)
            places = (trimmed.index_BK.unsqueeze(-1) == at).to(cls_BD.dtype)
            looked_at = torch.matmul(looked_at.unsqueeze(1), places).squeeze(1)
        pooled = torch.tanh(self.pooler(cls_BD))
        return FusionOutput(pooled, regions_BND, looked_at, stacks, trimmed.scores_BN if trimmed else None)


def _behind(x: Tensor, length: int) -> Tensor:
    """What stands behind the first `length` tokens; no empty slice, for Core ML's converter has no name for it."""
    return x[:, length:] if length else x


def _layers(
    config: FusionConfig, heads: tuple[int, ...], ffn: tuple[int, ...], cross_heads: tuple[int, ...] = ()
) -> nn.ModuleList:
    others = cross_heads or (None,) * len(heads)
    return nn.ModuleList(Layer(config, *numbers) for numbers in zip(heads, ffn, others, strict=True))


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
