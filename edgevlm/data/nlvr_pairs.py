"""Drawn sentences with drawn scenes, as the arrays a fusion learns from: an endless, reproducible supply. No pixels.

Each sentence comes with as many scenes where it is true as where it is false, half of them minimal pairs: two members
of one family, an edit or two apart. Items become what the extractor would hand over: tags and boxes, with its errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgevlm.data.nlvr import BOX_STEP_PX, IMAGE_SIZE_WH, LABELS, Record
from edgevlm.data.nlvr_scenes import SIZES_PX, Rng, Scenes, from_records, make_pool
from edgevlm.data.nlvr_sentences import Sentence, draw

NUM_CLASSES, NUM_ATTRIBUTES = len(LABELS.classes), len(LABELS.attributes)
TAGS = NUM_CLASSES + 1 + NUM_ATTRIBUTES
MEMBERS = 6
"""Scenes of a family."""
SAMPLE_FAMILIES = 48
"""Families a sentence is drawn against."""
WINDOW = 5
"""The scenes of a batch come from a fifth of the pool, which is sorted by the number of items."""


@dataclass(frozen=True)
class Pairs:
    """B sentences with a scene each; B = sentences x scenes per sentence, sentence by sentence."""

    texts: list[str]
    """One per sentence, in canonical words."""
    tags: np.ndarray
    """(B, N, TAGS) float32: class probabilities, background behind them, then attribute probabilities."""
    boxes: np.ndarray
    """(B, N, 4) float32, normalised corners."""
    scores: np.ndarray
    """(B, N) float32; 0 = padding."""
    truth: np.ndarray
    """(B,) int64: 1 = true."""
    referred: np.ndarray
    """(B, N) uint8: the sentence speaks of the item."""
    holds: np.ndarray
    """(B, 3) float32: its claim holds in the box."""
    counts: np.ndarray
    """(B, 3) int64: items it counts in the box."""


@dataclass(frozen=True)
class Errors:
    """How the extractor errs."""

    box_px: float = 0.3
    """Standard deviation of an edge, pixels of the stored image."""
    doubt: float = 0.03
    """Probability mass that a tag puts on other values, on average."""


class PairSource:
    """Draws pairs from the scenes of training records.

    Args:
        records: training records only.
        families: size of the pool of scenes, in families.
        share_towers: share of the sentences that are about towers.
        scenes_per_sentence: even.
        seed: together with a sentence's number it decides everything.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        families: int = 4000,
        share_towers: float = 0.4,
        scenes_per_sentence: int = 8,
        errors: Errors | None = None,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng((seed, 0))
        self.share_towers, self.per_sentence, self.seed = share_towers, scenes_per_sentence, seed
        self.errors = errors or Errors()
        worlds = from_records(records)
        self.pools = [
            make_pool(world, families, MEMBERS, towers=bool(towers), rng=rng) if len(world) else None
            for towers, world in enumerate(worlds)
        ]
        for pool in self.pools:
            if pool is not None:
                _ = (pool.left, pool.top, pool.right, pool.bottom, pool.height, pool.highest, pool.lowest, pool.on)

    def make(self, number: int, sentences: int) -> Pairs:
        """Batch `number`: the same whenever it is asked for.

        Half of a batch would be padding if chance alone put it together. So a batch is about one world, its scenes have
        about as many items, and of twice the sentences it keeps the shorter or the longer half.
        """
        rng = np.random.default_rng((self.seed, 1, number))
        both = all(pool is not None for pool in self.pools)
        towers = rng.random() < self.share_towers if both else self.pools[0] is None
        pool = self.pools[int(towers)]
        assert pool is not None
        num_families = len(pool) // MEMBERS
        width = max(1, num_families // WINDOW)
        first = int(rng.integers(num_families - width + 1))
        window = (first, first + width)
        drawn = [self._sentence(rng, pool, bool(towers), window) for _ in range(2 * sentences)]
        drawn.sort(key=lambda pair: pair[0].text.count(" "))
        drawn = drawn[:sentences] if rng.random() < 0.5 else drawn[sentences:]
        scenes = Scenes(*(np.concatenate(part) for part in zip(*(_arrays(scene) for _, scene in drawn), strict=True)))
        return self._tokens([sentence for sentence, _ in drawn], scenes, rng)

    def _sentence(self, rng: Rng, pool: Scenes, towers: bool, window: tuple[int, int]) -> tuple[Sentence, Scenes]:
        """A sentence, and its scenes with its meaning on them."""
        family = rng.integers(*window, size=SAMPLE_FAMILIES)
        rows = (family[:, None] * MEMBERS + np.arange(MEMBERS)).reshape(-1)
        sample = pool.take(rows)
        sentence = draw(rng, sample, towers, self.per_sentence // 2)
        chosen = _choose(sentence.truth, self.per_sentence, rng)
        parts = (sentence.truth, sentence.items, sentence.boxes, sentence.counts)
        return Sentence(sentence.text, *(part[chosen] for part in parts)), sample.take(chosen)

    def _tokens(self, sentences: list[Sentence], scenes: Scenes, rng: Rng) -> Pairs:
        truth, items, holds, counts = (
            np.concatenate([getattr(sentence, name) for sentence in sentences])
            for name in ("truth", "items", "boxes", "counts")
        )
        num = len(scenes)
        order = rng.permuted(np.broadcast_to(np.arange(3), (num, 3)), axis=1)  # box that stands at each place
        row = np.arange(num)[:, None]
        colour, shape, size, x, y = (part[row, order] for part in _arrays(scenes))
        items, holds, counts = items[row, order], holds[row, order], counts[row, order]
        present = (colour >= 0).reshape(num, -1)
        longest = max(1, int(present.sum(1).max()))
        keep = np.argsort(~present, axis=1, kind="stable")[:, :longest]

        def flat(values: np.ndarray) -> np.ndarray:
            return np.take_along_axis(values.reshape(num, -1), keep, 1)

        colour, shape, size, present, referred = flat(colour), flat(shape), flat(size), flat(present), flat(items)
        left = flat(x + np.arange(3)[:, None] * BOX_STEP_PX).astype(np.float32)
        top, px = flat(y).astype(np.float32), SIZES_PX[size].astype(np.float32)
        boxes = np.stack([left, top, left + px, top + px], -1)
        boxes += rng.normal(0, self.errors.box_px, boxes.shape)
        boxes = np.clip(boxes / np.tile(IMAGE_SIZE_WH, 2), 0, 1).astype(np.float32)
        return Pairs(
            [sentence.text for sentence in sentences],
            self._tags(colour, shape, size, rng),
            boxes * present[..., None],
            np.where(present, 0.99, 0.0).astype(np.float32),
            truth.astype(np.int64),
            (referred & present).astype(np.uint8),
            holds.astype(np.float32),
            np.minimum(counts, 8).astype(np.int64),
        )

    def _tags(self, colour: np.ndarray, shape: np.ndarray, size: np.ndarray, rng: Rng) -> np.ndarray:
        tags = np.zeros((*colour.shape, TAGS), np.float32)
        for first, value in ((0, shape), (NUM_CLASSES + 1, colour), (NUM_CLASSES + 4, size)):
            np.put_along_axis(tags, first + np.maximum(value, 0)[..., None].astype(int), 1.0, -1)
        doubt = rng.exponential(self.errors.doubt, tags.shape).clip(0, 0.6).astype(np.float32)
        tags = np.abs(tags - doubt)
        classes = tags[..., : NUM_CLASSES + 1]
        classes /= classes.sum(-1, keepdims=True)
        return tags


def _arrays(scenes: Scenes) -> tuple[np.ndarray, ...]:
    return scenes.colour, scenes.shape, scenes.size, scenes.x, scenes.y


def _choose(truth: np.ndarray, number: int, rng: Rng) -> np.ndarray:
    """`number` scenes, as many true as false where there are as many; half of them in pairs of one family."""
    half = number // 2
    by_family = truth.reshape(-1, MEMBERS)
    mixed = np.flatnonzero(by_family.any(1) & ~by_family.all(1))
    chosen: list[int] = []
    for family in rng.permutation(mixed)[: number // 4]:
        members = rng.permutation(MEMBERS)
        values = by_family[family, members]
        chosen += [family * MEMBERS + members[values.argmax()], family * MEMBERS + members[values.argmin()]]
    for value in (True, False):
        missing = half - int((truth[chosen] == value).sum()) if chosen else half
        candidates = np.flatnonzero(truth == value)
        if len(candidates) == 0:
            candidates = np.arange(len(truth))
        chosen += list(rng.choice(candidates, size=missing, replace=len(candidates) < missing))
    return np.array(chosen)
