"""Captioning: what trains a captioner (masked words, then optionally CIDEr itself), and a baseline without one."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.artifacts import TokenizerSpec
from edgevlm.data.text import Tokenizer
from edgevlm.models.decoding import greedy, read_context, sample, word_log_probs, word_logits
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.tasks.cider import CiderD

END = "</s>"
"""Counts as a word in the reward: otherwise captions learn to stop in mid-sentence, where no n-gram can be wrong."""


class CaptionBatch(NamedTuple):
    """Captions with the regions and tags of their images."""

    regions: Regions
    input_ids: Tensor
    """(B, L): [CLS] caption [SEP] and padding up to `num_caption`, then tags [SEP] and padding."""
    masked: Tensor
    """(B, num_caption) bool: words to guess; see `choose_masked`."""
    images: Tensor
    """(B,) index of each image in its split."""


class CaptionObjective(nn.Module):
    """Guess words of the caption from the words before them, the tags and the regions.

    MiniVLM's fine-tuning masks a few words and runs the whole sequence. `every_word` (ours) asks for all words at once,
    each from exactly what generation will show: about twice the work per step for all of the signal.

    Args:
        model: a model with the head `words`.
        spec: the special ids.
        num_caption: places of the caption in `input_ids`.
        label_smoothing: share of the target's probability that is spread over the vocabulary.
        every_word: all words instead of those that the batch masks.
    """

    def __init__(
        self,
        model: VLM,
        spec: TokenizerSpec,
        num_caption: int,
        label_smoothing: float = 0.1,
        every_word: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.spec, self.num_caption = model, spec, num_caption
        self.label_smoothing, self.every_word = label_smoothing, every_word
        train_words_only(model)

    def forward(self, batch: CaptionBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits_MV, targets_M = self._every_word(batch) if self.every_word else self._masked_words(batch)
        loss = F.cross_entropy(logits_MV, targets_M.long(), label_smoothing=self.label_smoothing)
        return loss, {"words": (logits_MV.argmax(-1) == targets_M).float().mean()}

    def _masked_words(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        caption_BL, tags_BG = batch.input_ids[:, : self.num_caption], batch.input_ids[:, self.num_caption :]
        shown = torch.cat([caption_BL.masked_fill(batch.masked, self.spec.mask_id), tags_BG], dim=1)
        fused = self.model.fuse(batch.regions, shown, num_caption=self.num_caption, seq2seq=True)
        states_MD = fused.hidden_BTD[-1][:, : self.num_caption][batch.masked]
        assert self.model.word_head is not None, "a captioner has the head `words`"
        return self.model.word_head(states_MD, self.model.fusion.words.weight), caption_BL[batch.masked]

    def _every_word(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        caption_BL, tags_BG = batch.input_ids[:, : self.num_caption], batch.input_ids[:, self.num_caption :]
        longest = int((caption_BL != self.spec.pad_id).sum(1).amax())
        words_B1T = caption_BL[:, None, 1:longest]
        draft = read_context(self.model, batch.regions, tags_BG, self.num_caption)
        logits = word_logits(self.model, draft, words_B1T, self.spec)
        counted = words_B1T != self.spec.pad_id
        return logits[counted], words_B1T[counted]


def train_words_only(model: VLM) -> None:
    """Gradients for the fusion and the head of words; nothing for parts that captions do not pass through."""
    model.requires_grad_(False)
    for part in (model.fusion, model.word_head):
        if part is not None:
            part.requires_grad_(True)
    model.fusion.pooler.requires_grad_(False)
    if model.fusion.trimmers is not None:
        model.fusion.trimmers.requires_grad_(False)


def choose_masked(
    caption_BL: Tensor, tokenizer: TokenizerSpec, share: float, most: int, generator: torch.Generator
) -> Tensor:
    """Which words are masked, (B, L) bool: of every caption a random `share`, at least one and at most `most`.

    [SEP] is one of the words, so that the end is learned; [CLS] and padding are never masked. Masked words are always
    shown as [MASK] (ours: generation shows nothing else, so BERT's random and unchanged words would teach nothing).
    """
    maskable = (caption_BL != tokenizer.pad_id) & (caption_BL != tokenizer.cls_id)
    number_B1 = (maskable.sum(1, keepdim=True) * share).round().clamp(1, most)
    order = torch.rand(caption_BL.shape, generator=generator).masked_fill(~maskable, 2.0).argsort(1).argsort(1)
    return (order < number_B1) & maskable


# --- training on CIDEr itself ------------------------------------------------------------------------------------


class SelfCritical(nn.Module):
    """Self-critical sequence training: sampled captions are made likelier by as much as they beat the greedy one.

    Rennie and others, 2017 (arXiv 1612.00563), with CIDEr-D as the reward. Dropout is off throughout: the words that
    are scored are those that were drawn.

    Args:
        model: a captioner trained on words.
        tokenizer: turns ids into the words that CIDEr-D counts.
        rewards: CIDEr-D over the training references (see `reward_words`).
        num_caption: places of the caption in `input_ids`.
        num_samples: captions drawn per image.
        max_words: longest caption, [SEP] included.
    """

    def __init__(
        self, model: VLM, tokenizer: Tokenizer, rewards: CiderD, num_caption: int, num_samples: int, max_words: int
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.spec, self.rewards = model, tokenizer, tokenizer.spec, rewards
        self.num_caption, self.num_samples, self.max_words = num_caption, num_samples, max_words
        train_words_only(model)

    def forward(self, batch: CaptionBatch) -> tuple[Tensor, dict[str, Tensor]]:
        self.model.eval()
        spec, tags = self.spec, batch.input_ids[:, self.num_caption :]

        def draft():
            return read_context(self.model, batch.regions, tags, self.num_caption)

        with torch.no_grad():
            baseline_BK = self._rewards(greedy(self.model, draft(), spec, self.max_words).ids_BKT, batch.images)
            drawn = sample(self.model, draft(), spec, self.max_words, self.num_samples).ids_BKT
            reward_BK = self._rewards(drawn, batch.images)
        log_probs_BKT = word_log_probs(self.model, draft(), drawn, spec)
        gain_BK1 = (reward_BK - baseline_BK).unsqueeze(-1)
        loss = -(gain_BK1 * log_probs_BKT).sum(-1).mean()
        return loss, {"greedy": baseline_BK.mean(), "sampled": reward_BK.mean()}

    def _rewards(self, ids_BKT: Tensor, images_B: Tensor) -> Tensor:
        rows = zip(images_B.tolist(), ids_BKT.tolist(), strict=True)
        values = [[self.rewards.score(image, reward_words(self.tokenizer, ids)) for ids in row] for image, row in rows]
        return torch.tensor(values, dtype=torch.float32, device=ids_BKT.device)


def reward_words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The words of a caption without punctuation, and `END` where it has its [SEP]."""
    words = [word for word in tokenizer.decode(ids).split() if any(map(str.isalnum, word))]
    return [*words, END] if tokenizer.spec.sep_id in list(ids) else words


# --- a baseline --------------------------------------------------------------------------------------------------


def nearest_by_tags(tags: Sequence[Counter[str]], known: Sequence[Counter[str]]) -> np.ndarray:
    """For each image the index of the known image whose tags overlap most, (I,); the first of equals.

    Overlap is the intersection of the two multisets over their union: tags that are missing count as much as tags that
    are too many. Ours.
    """
    names = {tag: i for i, tag in enumerate(sorted({tag for counts in (*tags, *known) for tag in counts}))}

    def counts(images: Sequence[Counter[str]]) -> np.ndarray:
        table = np.zeros((len(images), max(1, len(names))), np.float32)
        for row, image in zip(table, images, strict=True):
            for tag, number in image.items():
                row[names[tag]] = number
        return table

    known_IN = counts(known)
    nearest = []
    for row in counts(tags):
        shared, either = np.minimum(row, known_IN).sum(1), np.maximum(row, known_IN).sum(1)
        nearest.append(int((shared / np.maximum(either, 1)).argmax()))
    return np.array(nearest, np.int64)
