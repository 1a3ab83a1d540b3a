"""Image-text retrieval: the matching loss, recall in both directions over all pairs or a shortlist, and tags as a rival.

Scores are matrices captions x images (C, I); `image_C` names the image of each caption, and an image may have several
(COCO: five). Text retrieval (TR) asks with an image, image retrieval (IR) with a caption.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM

KS = (1, 5, 10)
UNSCORED = -100.0
"""Score of a pair outside the shortlist: below every score, never 0."""
TAG_SCORE = 0.5
"""An attribute is a tag of the image from this probability on."""


def match_logits(model: VLM, regions: Regions, input_ids_BL: Tensor, num_caption: int | None = None) -> Tensor:
    """Logits (B, 2) of: text i does not fit image i, it fits.

    Args:
        model: with the head `match`.
        regions: of image i.
        input_ids_BL: caption, and behind `num_caption` words its image's tags.
        num_caption: words of the caption; None = all.
    """
    return model.match_head(model.fuse(regions, input_ids_BL, num_caption=num_caption).pooled_BD)  # pyright: ignore


def match_loss(logits_B2: Tensor, fits_B: Tensor) -> Tensor:
    """Cross-entropy of the two-way softmax 'fits / does not fit' (MiniVLM's recipe, after Oscar)."""
    return F.cross_entropy(logits_B2, fits_B.long())


def draw_negatives(
    image_C: Tensor, rows_B: Tensor, seed: int, near_IK: Tensor | None = None, hard: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One random pair that does not fit for each caption of the batch: another image, or another image's caption.

    The choice is a function of the rows and the seed alone, so that a resumed training goes on with the same pairs.

    Args:
        image_C: image of each caption of the split, rising.
        rows_B: captions of the batch.
        seed: another seed draws others.
        near_IK: images that resemble each image (`near_images`).
        hard: share of the negatives drawn among them.

    Returns:
        Captions and images of the negative pairs, (B,) each.
    """
    weights = torch.arange(1, len(rows_B) + 1)
    mixed = int(((rows_B + 1) * weights).sum()) * 1_000_003 + seed
    generator = torch.Generator().manual_seed(mixed % 2**63)
    own_B = image_C[rows_B]
    others_B = torch.randint(len(image_C), rows_B.shape, generator=generator)
    for _ in range(100):  # with two images or more, the chance to need more is next to none
        same_B = image_C[others_B] == own_B
        if not same_B.any():
            break
        others_B = torch.where(same_B, torch.randint(len(image_C), rows_B.shape, generator=generator), others_B)
    if near_IK is not None and hard > 0:
        chosen_B = near_IK[own_B, torch.randint(near_IK.shape[1], rows_B.shape, generator=generator)]
        first_B, end_B = torch.searchsorted(image_C, chosen_B), torch.searchsorted(image_C, chosen_B, right=True)
        place_B = (torch.rand(rows_B.shape, generator=generator) * (end_B - first_B)).long()
        is_hard_B = (torch.rand(rows_B.shape, generator=generator) < hard) & (end_B > first_B) & (chosen_B != own_B)
        others_B = torch.where(is_hard_B, first_B + place_B, others_B)
    swap_caption_B = torch.rand(rows_B.shape, generator=generator) < 0.5
    captions_B = torch.where(swap_caption_B, others_B, rows_B)
    images_B = torch.where(swap_caption_B, own_B, image_C[others_B])
    return captions_B, images_B


# --- recall ------------------------------------------------------------------------------------------------------


def image_ranks(scores_CI: np.ndarray, image_C: np.ndarray) -> np.ndarray:
    """How many wrong images each caption ranks at or above its own, (C,); 0 = found first. Ties count as wrong."""
    own_C1 = np.take_along_axis(scores_CI, image_C[:, None], axis=1)
    return (scores_CI >= own_C1).sum(1) - 1


def text_ranks(scores_CI: np.ndarray, image_C: np.ndarray) -> np.ndarray:
    """How many wrong captions each image ranks at or above the best of its own, (I,); ties count as wrong."""
    own_CI = image_C[:, None] == np.arange(scores_CI.shape[1])
    best_I = np.where(own_CI, scores_CI, -np.inf).max(0)
    return ((scores_CI >= best_I) & ~own_CI).sum(0)


def recalls(
    scores_CI: np.ndarray, image_C: np.ndarray, text_scores_CI: np.ndarray | None = None, ks: Sequence[int] = KS
) -> dict[str, float]:
    """`tr@k` and `ir@k`, 0..1: share of queries with (one of) the right answers among the first k.

    Args:
        scores_CI: every pair's score; used for both directions unless the next one is given.
        image_C: image of each caption; every image has at least one.
        text_scores_CI: scores for text retrieval, where it has a shortlist of its own.
        ks: depths.
    """
    by_image = text_ranks(scores_CI if text_scores_CI is None else text_scores_CI, image_C)
    by_caption = image_ranks(scores_CI, image_C)
    rows = {f"tr@{k}": float((by_image < k).mean()) for k in ks}
    return rows | {f"ir@{k}": float((by_caption < k).mean()) for k in ks}


def folds(image_C: np.ndarray, num_images: int, fold_images: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(captions, images) of each whole fold of `fold_images` images in order: COCO's 1K protocol is five of 1,000."""
    starts = range(0, num_images - fold_images + 1, fold_images)
    parts = [np.arange(start, start + fold_images) for start in starts]
    return [(np.flatnonzero(np.isin(image_C, images)), images) for images in parts]


def fold_recalls(scores_CI: np.ndarray, image_C: np.ndarray, fold_images: int) -> dict[str, float]:
    """Recalls within each fold, averaged over the folds (1K protocol)."""
    rows = [
        recalls(scores_CI[np.ix_(captions, images)], image_C[captions] - images[0])
        for captions, images in folds(image_C, scores_CI.shape[1], fold_images)
    ]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


# --- shortlists --------------------------------------------------------------------------------------------------


def shortlist(cheap_CI: np.ndarray, num_kept: int, axis: int) -> np.ndarray:
    """Which pairs a cheap score keeps, (C, I) bool: the best `num_kept` along `axis` (1: images per caption)."""
    kept_CI = np.zeros(cheap_CI.shape, bool)
    best = np.argsort(-cheap_CI, axis=axis, kind="stable")
    np.put_along_axis(kept_CI, best.take(range(min(num_kept, cheap_CI.shape[axis])), axis=axis), True, axis=axis)
    return kept_CI


def outside_shortlist(scores_CI: np.ndarray, kept_CI: np.ndarray) -> np.ndarray:
    """The scores with every pair outside the shortlist at `UNSCORED`."""
    return np.where(kept_CI, scores_CI, UNSCORED)


# --- retrieval by tags -------------------------------------------------------------------------------------------


@torch.no_grad()
def tag_words(model: VLM, regions: Regions, classes: Sequence[str], attributes: Sequence[str]) -> list[list[str]]:
    """Words of what the detector sees in each image: classes and likely attributes of the regions that count.

    The box head's last layers read the cached region features, so this costs no image.
    """
    head = model.tee.box_head
    seen_BNC = head.classes(regions.features_BND)[..., :-1].argmax(-1)
    # An attribute head of its own reads more than the cached features: then the classes are all there is.
    scored_BNA = regions.features_BND[..., :0]
    if head.attributes is not None:
        scored_BNA = head.attributes(regions.features_BND).sigmoid()
    likely_BNA = scored_BNA >= TAG_SCORE
    images = []
    for valid_N, seen_N, likely_NA in zip(model.valid(regions) > 0, seen_BNC, likely_BNA, strict=True):
        names = [classes[int(index)] for index in seen_N[valid_N]]
        names += [attributes[int(index)] for row in likely_NA[valid_N] for index in row.nonzero().flatten()]
        images.append([word for name in names for word in name.split()])
    return images


class TagIndex:
    """Images by their tags: counts of each word, weighted by its inverse document frequency, at unit length."""

    def __init__(self, images: Sequence[Iterable[str]]) -> None:
        self._words = {word: column for column, word in enumerate(sorted({word for tags in images for word in tags}))}
        counts_IW = self._count(images)
        self._weights_W = np.log((1 + len(images)) / (1 + (counts_IW > 0).sum(0))).astype(np.float32)
        self.images_IW = _unit(counts_IW * self._weights_W)

    def scores(self, texts: Sequence[Iterable[str]]) -> np.ndarray:
        """Cosine between the words of each text and the tags of each image, (C, I): the baseline, and the cheap score."""
        return _unit(self._count(texts) * self._weights_W) @ self.images_IW.T

    def near_images(self, num_near: int, chunk: int = 2048) -> np.ndarray:
        """The images whose tags resemble each image's most, without itself, (I, K) int64."""
        rows, num_near = [], min(num_near, len(self.images_IW) - 1)
        for start in range(0, len(self.images_IW), chunk):
            scores = self.images_IW[start : start + chunk] @ self.images_IW.T
            scores[np.arange(len(scores)), start + np.arange(len(scores))] = -np.inf
            rows.append(np.argpartition(-scores, num_near - 1, axis=1)[:, :num_near])
        return np.concatenate(rows)

    def _count(self, texts: Sequence[Iterable[str]]) -> np.ndarray:
        table = np.zeros((len(texts), len(self._words)), np.float32)
        for row, text in enumerate(texts):
            for word in text:
                # A plural names the same thing: "circles" asks for the tag "circle".
                column = self._words.get(word, self._words.get(word.removesuffix("s")))
                if column is not None:
                    table[row, column] += 1
        return table


def _unit(rows_XW: np.ndarray) -> np.ndarray:
    return rows_XW / np.linalg.norm(rows_XW, axis=1, keepdims=True).clip(1e-12)
