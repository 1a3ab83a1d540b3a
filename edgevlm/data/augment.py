"""Random changes of an image and its boxes: cut, mirror, colour. The result goes through `preprocess` like any image."""

import numpy as np
from PIL import Image, ImageEnhance

from edgevlm.recipe import AugmentSection


def augment(
    image: Image.Image, boxes: np.ndarray, settings: AugmentSection, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A random variant of an image.

    Args:
        image: RGB.
        boxes: (n, 4) corners in pixels of the image.
        settings: how much may change.
        rng: decides everything; the same state gives the same variant.

    Returns:
        The new image; the boxes that stay, (m, 4) float32 in its pixels, clipped to it; and their rows, (m,) int64.
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    rows = np.arange(len(boxes))
    if settings.min_cut < 1 and rng.random() < settings.cut_probability:
        image, boxes, rows = cut(image, boxes, random_window(image.size, settings.min_cut, rng), settings.min_kept)
    if rng.random() < settings.flip:
        image, boxes = mirror(image, boxes)
    if settings.colour:
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(1 + settings.colour * rng.uniform(-1, 1))
    return image, boxes, rows


def random_window(size_wh: tuple[int, int], min_cut: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A window (x1, y1, x2, y2) inside the image; its sides are drawn one by one, so the aspect ratio changes too."""
    width, height = (max(1, round(side * rng.uniform(min_cut, 1))) for side in size_wh)
    x, y = int(rng.integers(size_wh[0] - width + 1)), int(rng.integers(size_wh[1] - height + 1))
    return x, y, x + width, y + height


def cut(
    image: Image.Image, boxes: np.ndarray, window: tuple[int, int, int, int], min_kept: float
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """What lies inside `window`; boxes keep their part of it, or go if that is less than `min_kept` of their area."""
    x1, y1, x2, y2 = window
    clipped = np.clip(boxes, (x1, y1, x1, y1), (x2, y2, x2, y2)) - np.array([x1, y1, x1, y1], np.float32)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = (clipped[:, 2] - clipped[:, 0]) * (clipped[:, 3] - clipped[:, 1])
    rows = np.flatnonzero((left >= min_kept * areas) & (left > 0))
    return image.crop(window), clipped[rows].astype(np.float32), rows


def mirror(image: Image.Image, boxes: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Left and right exchanged."""
    flipped = boxes.copy()
    flipped[:, 0], flipped[:, 2] = image.width - boxes[:, 2], image.width - boxes[:, 0]
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flipped
