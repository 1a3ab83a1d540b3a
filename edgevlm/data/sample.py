"""The one Sample type that every reader yields, and what a reader must offer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from edgevlm.artifacts import Labels


@dataclass(frozen=True)
class Text:
    """A question or sentence about an image, with its answer."""

    text: str
    answer: str
    """One of the reader's `labels.answers`; outside of them only where annotators answered in words of their own."""
    referred: tuple[int, ...] = ()
    """Indices of the objects that decide the answer, where the data say so (auxiliary supervision)."""
    kind: str = ""
    """Type of question, for a breakdown of the accuracy."""
    answers: tuple[str, ...] = ()
    """What each annotator said, as written (VQA: ten); `answer` is then the most frequent, normalised."""


@dataclass(frozen=True)
class Sample:
    """An image with everything known about it; boxes are corners in pixels of this image."""

    id: str
    image: Image.Image
    """Decoded RGB at its original size."""
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(n, 4) float32: x1, y1, x2, y2."""
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) int64: index into `labels.classes`."""
    attributes: tuple[tuple[int, ...], ...] = ()
    """Per object: indices into `labels.attributes`."""
    texts: tuple[Text, ...] = ()
    captions: tuple[str, ...] = ()
    second: Image.Image | None = None
    """The right-hand image, where the texts are about a pair (NLVR2)."""
    crowd: np.ndarray | None = None
    """(n,) bool: the box holds a group that was not annotated one by one; never trained on, forgiven in evaluation."""
    areas: np.ndarray | None = None
    """(n,) float32: pixels of the object itself, where the data say so (COCO); None = those of its box."""


class Reader(Protocol):
    """One dataset, opened for one task."""

    name: str
    splits: tuple[str, ...]
    """`train`, `val` and `test`, and others that are only evaluated."""

    @property
    def labels(self) -> Labels:
        """The closed lists; a large dataset may count its answers on the first use."""
        ...

    def samples(self, split: str, limit: int | None = None) -> Iterator[Sample]:
        """The first `limit` samples of a split, always in the same order."""
        ...
