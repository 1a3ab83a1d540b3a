"""Pre-training: masked words and tags, and whether the text belongs to the image (MiniVLM, section 3; OSCAR+).

Text is [CLS] caption [SEP] and padding up to a fixed place, then tags [SEP] and padding: B texts of L places, of which
the first `num_caption` are the caption's. Two passes per step: words are guessed from a masked text that belongs to
its image; matching reads a whole text of which the tags, or where asked for the caption, may be another image's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm.artifacts import TokenizerSpec
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM

NO_TARGET = -100
"""In the targets of places that are not masked; PyTorch's cross-entropy leaves these out."""
SHOWN_AS_MASK, SHOWN_AS_ANOTHER = 0.8, 0.1
"""Of the chosen words; the rest is shown unchanged (BERT)."""


class PretrainBatch(NamedTuple):
    """One step's inputs (B, L, N as in RegionSplit)."""

    regions: Regions
    masked_ids: Tensor
    """(B, L): the image's own text, words of it masked."""
    targets: Tensor
    """(B, L) int64: the word at a chosen place, `NO_TARGET` elsewhere."""
    match_ids: Tensor
    """(B, L): nothing masked; of some rows the tags or the caption are another image's."""
    fits: Tensor
    """(B,) int64: 1 where the text of `match_ids` belongs to the image."""


def mask_words(
    ids_BL: Tensor, tokenizer: TokenizerSpec, generator: torch.Generator, *, share: float = 0.15, most: int = 5
) -> tuple[Tensor, Tensor]:
    """Hide words of each text, tags included: of the chosen ones 80 % as [MASK], 10 % as any other piece, 10 % not at all.

    Args:
        ids_BL: texts.
        tokenizer: its special tokens are never chosen and never shown instead of a word.
        generator: decides everything; the same state gives the same plan.
        share: of a text's words that are chosen, rounded, at least one.
        most: chosen words per text at most.

    Returns:
        Ids as shown (B, L), and targets (B, L) int64 with `NO_TARGET` at places that were not chosen.
    """
    special = torch.tensor(special_ids(tokenizer))
    words_BL = ~torch.isin(ids_BL, special.to(ids_BL.dtype))
    number_B1 = (words_BL.sum(1, keepdim=True) * share).round().clamp(1, most)
    draws_BL = torch.rand(ids_BL.shape, generator=generator)
    rank_BL = draws_BL.masked_fill(~words_BL, 2.0).argsort(1).argsort(1)
    chosen_BL = words_BL & (rank_BL < number_B1)
    ordinary = torch.ones(tokenizer.vocab_size, dtype=torch.bool).index_fill(0, special, False).nonzero().squeeze(1)
    others_BL = ordinary[torch.randint(len(ordinary), ids_BL.shape, generator=generator)].to(ids_BL.dtype)
    kind_BL = torch.rand(ids_BL.shape, generator=generator)
    as_other_BL = chosen_BL & (kind_BL >= SHOWN_AS_MASK) & (kind_BL < SHOWN_AS_MASK + SHOWN_AS_ANOTHER)
    shown_BL = torch.where(as_other_BL, others_BL, ids_BL)
    shown_BL = shown_BL.masked_fill(chosen_BL & (kind_BL < SHOWN_AS_MASK), tokenizer.mask_id)
    return shown_BL, ids_BL.long().masked_fill(~chosen_BL, NO_TARGET)


def special_ids(tokenizer: TokenizerSpec) -> list[int]:
    """Ids that are no words."""
    return [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]


def other_captions(image_C: Tensor, rows_B: Tensor, generator: torch.Generator) -> Tensor:
    """For each caption of the batch one of another image, every such caption equally likely; (B,).

    Args:
        image_C: image of each caption of the split, rising: captions of one image stand together.
        rows_B: captions of the batch; the split has at least two images.
        generator: decides the choice.
    """
    first_B = torch.searchsorted(image_C, image_C[rows_B])
    count_B = torch.searchsorted(image_C, image_C[rows_B], right=True) - first_B
    draw_B = torch.rand(rows_B.shape, generator=generator, dtype=torch.float64)
    index_B = (draw_B * (len(image_C) - count_B)).long()
    return index_B + count_B * (index_B >= first_B)


def mix_texts(
    own: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    generator: torch.Generator,
    *,
    replaced_tags: float = 0.5,
    replaced_captions: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Texts for matching: some with another image's tags (OSCAR's contrastive loss), some with another's caption.

    Args:
        own: captions (B, Lc) and tags (B, Lt) of the images.
        other: the same of other images, row by row.
        generator: decides which rows change.
        replaced_tags, replaced_captions: probability of either; never both in one row.

    Returns:
        Ids (B, Lc + Lt), and (B,) int64: 1 where the text belongs to the image. What is replaced by the very same
        words still belongs (ours: two images often have the same few tags).
    """
    (caption_BL, tags_BT), (other_caption_BL, other_tags_BT) = own, other
    draw_B1 = torch.rand(len(caption_BL), 1, generator=generator)
    take_tags_B1 = draw_B1 < replaced_tags
    take_caption_B1 = ~take_tags_B1 & (draw_B1 < replaced_tags + replaced_captions)
    ids_BL = torch.cat([caption_BL, tags_BT], dim=1)
    mixed_BL = torch.cat(
        [
            torch.where(take_caption_B1, other_caption_BL, caption_BL),
            torch.where(take_tags_B1, other_tags_BT, tags_BT),
        ],
        dim=1,
    )
    return mixed_BL, (mixed_BL == ids_BL).all(1).long()


def word_logits(model: VLM, batch: PretrainBatch, num_caption: int, seq2seq: bool) -> tuple[Tensor, Tensor]:
    """Logits (M, V) and targets (M,) of the M masked places of a batch.

    Args:
        model: with the head `words`.
        batch: masked texts and regions.
        num_caption: places of the caption; tags stand behind it.
        seq2seq: caption words see the words before them only, as in generation (see `Fusion.forward`).
    """
    fused = model.fuse(batch.regions, batch.masked_ids, num_caption=num_caption, seq2seq=seq2seq)
    chosen_BL = batch.targets != NO_TARGET
    states_MD = fused.hidden_BTD[-1][:, : batch.targets.shape[1]][chosen_BL]
    assert model.word_head is not None, "pre-training needs the head `words`"
    return model.word_head(states_MD, model.fusion.words.weight), batch.targets[chosen_BL]


def match_logits(model: VLM, batch: PretrainBatch, num_caption: int) -> Tensor:
    """Logits (B, 2) of: the text does not belong to the image, it does. Every token sees every other."""
    assert model.match_head is not None, "pre-training needs the head `match`"
    return model.match_head(model.fuse(batch.regions, batch.match_ids, num_caption=num_caption).pooled_BD)


def word_loss(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Cross-entropy of the masked words, nats; 0 where nothing is masked."""
    return F.cross_entropy(logits_MV, targets_M, reduction="sum") / max(1, len(targets_M))


def match_loss(logits_B2: Tensor, fits_B: Tensor) -> Tensor:
    """Binary cross-entropy of 'belongs', nats."""
    return F.cross_entropy(logits_B2, fits_B)
