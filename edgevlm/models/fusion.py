"""The compact fusion transformer, of post-norm BERT layers, in two forms.

* Single stream (MiniVLM, section 3): [CLS] words [SEP] regions, and every layer reads all of them.
* Two encoders (EfficientVLM, after X-VLM): regions through a vision encoder, words through a text encoder, then cross-modal
  layers on the words: self-attention, attention to the vision encoder's output, FFN.

Heads and FFN widths may differ in every layer. Behind some layers tokens may be trimmed (`trimmer.py`, `tokens.py`).
"""

import torch
from torch import Tensor, nn

from edgevlm.artifacts import FusionConfig, TokenizerSpec
from edgevlm.models.attention import ALL_HEADS, Heads, Image, Layer, attention_mask
from edgevlm.models.geometry import BoxGeometry, box_numbers
from edgevlm.models.stream import FusionOutput, States, Stream, Trimming
from edgevlm.models.tokens import Tokens, compact, keep_number, mask_above, mask_number, pair_up
from edgevlm.models.trimmer import ALWAYS, FULL, Trim, Trimmers, keep_by_threshold, mean_of


class Fusion(nn.Module):
    """Transformer over words and regions; see the head of this file for its two forms."""

    def __init__(self, config: FusionConfig, tokenizer: TokenizerSpec, region_dim: int) -> None:
        super().__init__()
        self.config, self.pad_id, self.sep_id = config, tokenizer.pad_id, tokenizer.sep_id
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
        self.trimmers = Trimmers(config, config.trim) if config.trim is not None else None
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
        trim: Trim = FULL,
        num_caption: int | None = None,
        seq2seq: bool = False,
    ) -> FusionOutput:
        """Fuse text and regions.

        Args:
            features_BND, boxes_norm_BN4: region features and normalised corners.
            valid_BN: 1.0 where the region counts, 0.0 where it is padding.
            input_ids_BL: token ids.
            trim: what is read and kept; needs a config with trimming layers where it is not `FULL`.
            num_caption: words of the caption; the other words are tags. None = all words.
            seq2seq: a caption word sees the caption up to itself, and tags and regions see no caption (for generation).
        """
        stream = self.begin(features_BND, boxes_norm_BN4, valid_BN, input_ids_BL, trim, num_caption, seq2seq)
        for i in range(len(self.layers)):
            self.step(stream, i, trim)
        return self.end(stream)

    def begin(
        self,
        features_BND: Tensor,
        boxes_norm_BN4: Tensor,
        valid_BN: Tensor,
        input_ids_BL: Tensor,
        trim: Trim = FULL,
        num_caption: int | None = None,
        seq2seq: bool = False,
    ) -> Stream:
        """Embed words and regions; with two encoders, encode both."""
        num_regions = valid_BN.shape[1]
        if trim.num_words is not None and trim.num_words < input_ids_BL.shape[1]:
            input_ids_BL = input_ids_BL[:, : trim.num_words]
        if trim.num_regions is not None and trim.num_regions < num_regions:
            features_BND, boxes_norm_BN4 = features_BND[:, : trim.num_regions], boxes_norm_BN4[:, : trim.num_regions]
            valid_BN = valid_BN[:, : trim.num_regions]
        words_BLD = self.embed_words(input_ids_BL, num_caption)
        image_BSD = self.embed_image(features_BND, boxes_norm_BN4)
        word_valid_BL = (input_ids_BL != self.pad_id).to(features_BND.dtype)
        num_hidden = (num_caption or input_ids_BL.shape[1]) if seq2seq else None
        always_BL = None
        if trim.words or trim.threshold is not None:
            always_BL = (input_ids_BL == self.sep_id).to(features_BND.dtype) * ALWAYS
            always_BL = always_BL + ALWAYS * 2 * _first(always_BL)
        num_parts = len(self.config.parts)
        stream = Stream(
            words=Tokens(words_BLD, word_valid_BL, always_BL),
            regions=Tokens(_behind(image_BSD, num_parts), valid_BN),
            parts_BPD=image_BSD[:, :num_parts] if num_parts else None,
            num_regions=num_regions,
            num_hidden=num_hidden,
            stacks={"fusion": States([])},
        )
        if not self.config.has_encoders:
            stream.x_BTD = torch.cat([words_BLD, image_BSD], dim=1)
            stream.stacks["fusion"].hidden_BTD.append(stream.x_BTD)
        else:
            image_mask = attention_mask(self.image_valid(valid_BN))
            word_mask = attention_mask(word_valid_BL, num_hidden)
            vision, text = States([image_BSD]), States([words_BLD])
            for stack, layers, mask in ((vision, self.vision, image_mask), (text, self.text, word_mask)):
                for layer in layers:
                    x, attention, _ = layer(stack.hidden_BTD[-1], mask)
                    stack.hidden_BTD.append(x)
                    stack.attention_BHTT.append(attention)
            stream.x_BTD = text.hidden_BTD[-1]
            stream.stacks = {"vision": vision, "text": text, "cross": States([stream.x_BTD])}
            self._split_image(stream, vision.hidden_BTD[-1])
        self._set_masks(stream)
        return stream

    def step(self, stream: Stream, i: int, trim: Trim) -> None:
        """Layer `i` and, where the config says so, trimming behind it; changes `stream`."""
        x_BTD, states = stream.x_BTD, list(stream.stacks.values())[-1]
        heads = self._heads(stream, i, trim)
        y_BTD, attention, looked = self.layers[i](x_BTD, stream.mask_B11T, stream.keep_BT, stream.image, heads)
        if stream.keep_BT is not None:  # what was dropped stays as it is
            y_BTD = x_BTD + stream.keep_BT.unsqueeze(-1) * (y_BTD - x_BTD)
        stream.x_BTD = y_BTD
        states.hidden_BTD.append(y_BTD)
        states.attention_BHTT.append(attention)
        if looked is not None:
            states.cross_BHTS.append(looked)
        if self.config.trim is not None and i in self.config.trim.layers:
            self._trim(stream, i, trim)

    def end(self, stream: Stream) -> FusionOutput:
        """What the heads read."""
        length = stream.words.present_BN.shape[1]
        num_parts = len(self.config.parts)
        states = list(stream.stacks.values())[-1]
        cls_BD = stream.x_BTD[:, 0]
        if self.config.has_encoders:
            regions_BND = stream.regions.x_BND * stream.x_BTD[:, :1]
            looked_at = _behind(states.cross_BHTS[-1][:, :, 0].mean(1), num_parts)
        else:
            regions_BND = stream.x_BTD[:, length + num_parts :]
            looked_at = states.attention_BHTT[-1][:, :, 0, length + num_parts :].mean(1)
        looked_at = stream.regions.back(looked_at)
        if (missing := stream.num_regions - looked_at.shape[1]) > 0:
            looked_at = torch.nn.functional.pad(looked_at, (0, missing))
        pooled = torch.tanh(self.pooler(cls_BD))
        return FusionOutput(pooled, regions_BND, looked_at, stream.stacks, stream.trimmings, stream.heads)

    def image_valid(self, valid_BN: Tensor) -> Tensor:
        """(B, P + N): the parts of the image always count, the regions as given."""
        num_parts = len(self.config.parts)
        if not num_parts:
            return valid_BN
        ones = torch.ones(len(valid_BN), num_parts, dtype=valid_BN.dtype, device=valid_BN.device)
        return torch.cat([ones, valid_BN], dim=1)

    def _set_masks(self, stream: Stream) -> None:
        """What the next layers read of words and image."""
        words, regions = stream.words, stream.regions
        if self.config.has_encoders:
            image_mask = self._sized(stream, attention_mask(self.image_valid(regions.present_BN)))
            stream.mask_B11T, stream.keep_BT = attention_mask(words.present_BN, stream.num_hidden), words.keep_BN
            tokens_BSD = regions.x_BND
            if stream.parts_BPD is not None:
                tokens_BSD = torch.cat([stream.parts_BPD, tokens_BSD], dim=1)
            keep_BS = None if regions.keep_BN is None else self.image_valid(regions.keep_BN)
            some_B = self.image_valid(regions.weights_BN).amax(1)
            stream.image = Image(tokens_BSD, image_mask, some_B, keep_BS)
            return
        valid_BT = torch.cat([words.present_BN, self.image_valid(regions.present_BN)], dim=1)
        stream.mask_B11T = self._sized(stream, attention_mask(valid_BT, stream.num_hidden))
        if words.keep_BN is None and regions.keep_BN is None:
            stream.keep_BT = None
        else:
            kept = (torch.ones_like(t.present_BN) if t.keep_BN is None else t.keep_BN for t in (words, regions))
            word_keep, region_keep = kept
            stream.keep_BT = torch.cat([word_keep, self.image_valid(region_keep)], dim=1)

    def _sized(self, stream: Stream, mask_BQTS: Tensor) -> Tensor:
        """A token that stands for several is read like several (ToMe's proportional attention)."""
        sizes_BN = stream.regions.sizes_BN
        if sizes_BN is None:
            return mask_BQTS
        before = mask_BQTS.shape[-1] - sizes_BN.shape[1]
        return mask_BQTS + torch.nn.functional.pad(torch.log(sizes_BN), (before, 0))[:, None, None, :]

    def _split_image(self, stream: Stream, image_BSD: Tensor) -> None:
        num_parts = len(self.config.parts)
        stream.parts_BPD = image_BSD[:, :num_parts] if num_parts else None
        stream.regions = stream.regions._replace(x_BND=_behind(image_BSD, num_parts))

    def _refresh(self, stream: Stream) -> None:
        """Bring the states of words and regions up to date."""
        if self.config.has_encoders:
            stream.words = stream.words._replace(x_BND=stream.x_BTD)
            return
        length = stream.words.present_BN.shape[1]
        stream.words = stream.words._replace(x_BND=stream.x_BTD[:, :length])
        self._split_image(stream, stream.x_BTD[:, length:])

    def _image_mean(self, stream: Stream) -> Tensor:
        regions = stream.regions
        if stream.parts_BPD is None:
            return mean_of(regions.x_BND, regions.weights_BN)
        return mean_of(torch.cat([stream.parts_BPD, regions.x_BND], dim=1), self.image_valid(regions.weights_BN))

    def _heads(self, stream: Stream, i: int, trim: Trim) -> Heads:
        """Which heads layer `i` needs for each row."""
        config = self.config.trim
        if trim.head_threshold is None or config is None or i not in config.head_layers:
            return ALL_HEADS
        assert self.trimmers is not None, "a config with trimming layers has trimmers"
        self._refresh(stream)
        query = stream.x_BTD[:, 0], self._image_mean(stream)

        def chosen(trimmer: nn.Module) -> Tensor:
            keep = keep_by_threshold(trimmer(*query), trim.head_threshold or 0.0, trim.temperature, trim.noise)
            return keep if trim.masks else keep > 0

        cross = chosen(self.trimmers.image_heads[str(i)]) if self.config.has_encoders else None
        stream.heads[i] = Heads(chosen(self.trimmers.heads[str(i)]), cross)
        return stream.heads[i]

    def _trim(self, stream: Stream, i: int, trim: Trim) -> None:
        """Drop or merge tokens behind layer `i`."""
        config, trimmers = self.config.trim, self.trimmers
        assert config is not None and trimmers is not None
        place = config.layers.index(i)
        num_words = trim.words[place] if trim.words and config.words else None
        num_regions = trim.regions[place] if trim.regions else None
        adaptive = trim.threshold is not None
        if num_words is not None and num_words >= stream.words.present_BN.shape[1]:
            num_words = None
        if num_regions is not None and num_regions >= stream.regions.present_BN.shape[1]:
            num_regions = None
        if not adaptive and num_words is None and num_regions is None:
            return
        self._refresh(stream)
        cls_BD, words, regions, scores_BN = stream.x_BTD[:, 0], stream.words, stream.regions, None
        image_BD = self._image_mean(stream) if config.policy == "learned" else cls_BD
        paid_BL, paid_BN = self._paid(stream) if config.policy == "attention" else (None, None)
        if num_words is not None or (adaptive and config.words):
            scores_BL = trimmers.scores("words", i, words.x_BND, words.weights_BN, cls_BD, image_BD, paid_BL)
            assert words.always_BN is not None
            words = _choose(words, scores_BL + words.always_BN, num_words, 0, trim)
        if config.policy == "similarity" and num_regions is not None:
            assert not trim.masks, "pairs are gathered"
            regions = pair_up(regions, num_regions)
        elif num_regions is not None or adaptive:
            read = regions.x_BND, regions.weights_BN, cls_BD, image_BD, paid_BN
            scores_BN = trimmers.scores("regions", i, *read)
            regions = _choose(regions, scores_BN, num_regions, config.context, trim)
        stream.words, stream.regions = words, regions
        stream.trimmings.append(Trimming(i, cls_BD, words.weights_BN, regions.weights_BN, scores_BN))
        self.resume(stream)

    def resume(self, stream: Stream) -> None:
        """Let the next layer work on the words and regions of the stream as they are now."""
        if self.config.has_encoders:
            stream.x_BTD = stream.words.x_BND
        else:
            parts = () if stream.parts_BPD is None else (stream.parts_BPD,)
            stream.x_BTD = torch.cat([stream.words.x_BND, *parts, stream.regions.x_BND], dim=1)
        self._set_masks(stream)

    def _paid(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Attention that the layer before paid to each word, and to each region by the words: mean over heads and readers."""
        states = list(stream.stacks.values())[-1]
        length, num_parts = stream.words.present_BN.shape[1], len(self.config.parts)
        own_BTT = states.attention_BHTT[-1].mean(1)
        readers_BL = stream.words.weights_BN
        of_words_BT = mean_of(own_BTT[:, :length], readers_BL)
        if self.config.has_encoders:
            return of_words_BT, _behind(mean_of(states.cross_BHTS[-1].mean(1), readers_BL), num_parts)
        return of_words_BT[:, :length], of_words_BT[:, length + num_parts :]


def _choose(tokens: Tokens, scores_BN: Tensor, number: int | None, num_context: int, trim: Trim) -> Tokens:
    """Fixed numbers or a threshold, masked or gathered."""
    if number is not None:
        if trim.temperature is None:
            return keep_number(tokens, scores_BN, number, num_context)
        return mask_number(tokens, scores_BN, number, num_context, trim.temperature)
    assert trim.threshold is not None
    chosen = mask_above(tokens, scores_BN, trim.threshold, num_context, trim.temperature, trim.noise)
    return chosen if trim.masks else compact(chosen)


def _first(like_BN: Tensor) -> Tensor:
    """1 for the first token."""
    places = torch.arange(like_BN.shape[1], device=like_BN.device)
    return (places == 0).to(like_BN.dtype)


def _behind(x: Tensor, length: int) -> Tensor:
    """What stands behind the first `length` tokens; no empty slice, for Core ML's converter has no name for it."""
    return x[:, length:] if length else x


def _layers(
    config: FusionConfig, heads: tuple[int, ...], ffn: tuple[int, ...], cross_heads: tuple[int, ...] = ()
) -> nn.ModuleList:
    others = cross_heads or (None,) * len(heads)
    return nn.ModuleList(Layer(config, *numbers) for numbers in zip(heads, ffn, others, strict=True))
