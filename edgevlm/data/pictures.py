"""Training images drawn anew for every batch: decoded, changed at random, brought to the size of the step.

Where `frames.py` holds a whole split at one size, this holds none: what photos and multi-scale training need.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from edgevlm.artifacts import PreprocessSpec
from edgevlm.data.augment import augment
from edgevlm.data.frames import RandomAccess
from edgevlm.data.preprocess import preprocess, scale_boxes
from edgevlm.data.sample import Reader, Sample
from edgevlm.recipe import AugmentSection

MAX_WORKERS = 16
SIZE_STEP_PX = 32
"""Sides of multi-scale inputs are rounded to this."""


class Picture(NamedTuple):
    """One training image at the model's size; boxes in pixels of it, without crowds."""

    pixels_HWC: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    attributes: tuple[tuple[int, ...], ...]


class Pictures:
    """A split of which any row can be drawn at any size.

    Args:
        reader: one that offers single samples is asked for them; any other is read into memory once.
        split: the split.
        limit: at most so many samples; None = all.
        settings: random changes; None = none.
    """

    def __init__(self, reader: Reader, split: str, limit: int | None, settings: AugmentSection | None = None) -> None:
        self.reader, self.split, self.settings = reader, split, settings
        self._held = None if isinstance(reader, RandomAccess) else list(reader.samples(split, limit))
        self._number = len(self._held) if self._held is not None else reader.num_samples(split, limit)  # pyright: ignore
        # Decoding and resizing release Python's lock, so that threads are enough.
        self._pool = ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1))

    def __len__(self) -> int:
        return self._number

    def draw(self, rows: Sequence[int], spec: PreprocessSpec, seed: int) -> list[Picture]:
        """The images of `rows` at the size of `spec`; the same seed gives the same pictures, on any number of cores."""
        jobs = [(row, spec, np.random.default_rng((seed, place))) for place, row in enumerate(rows)]
        return list(self._pool.map(self._one, jobs))

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Sample ids of some rows."""
        return [self._sample(row).id for row in rows]

    def _one(self, job: tuple[int, PreprocessSpec, np.random.Generator]) -> Picture:
        row, spec, rng = job
        sample = self._sample(row)
        image, boxes, attributes = sample.image, sample.boxes, sample.attributes
        kept = np.arange(len(boxes)) if sample.crowd is None else np.flatnonzero(~sample.crowd)
        boxes = boxes[kept]
        if self.settings is not None:
            image, boxes, rows = augment(image, boxes, self.settings, rng)
            kept = kept[rows]
        return Picture(
            preprocess(image, spec),
            scale_boxes(boxes, image.size, spec),
            sample.classes[kept],
            tuple(attributes[i] for i in kept) if attributes else ((),) * len(kept),
        )

    def _sample(self, row: int) -> Sample:
        if self._held is not None:
            return self._held[row]
        return self.reader.sample(self.split, row)  # pyright: ignore[reportAttributeAccessIssue]


def training_specs(spec: PreprocessSpec, short_sides_px: Sequence[int]) -> list[PreprocessSpec]:
    """`spec` at other short sides, the other side in proportion, both rounded to 32 px; [spec] if none are given."""

    def rounded(side: float) -> int:
        return max(SIZE_STEP_PX, round(side / SIZE_STEP_PX) * SIZE_STEP_PX)

    short = min(spec.height, spec.width)
    sizes = [(rounded(spec.height * side / short), rounded(spec.width * side / short)) for side in short_sides_px]
    return [spec.model_copy(update={"height": height, "width": width}) for height, width in sizes] or [spec]
