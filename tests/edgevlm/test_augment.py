"""Augmentation moves boxes with what they hold: drawn rectangles are found again where the boxes say."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgevlm.artifacts import PreprocessSpec
from edgevlm.data.augment import augment, cut, mirror, random_window
from edgevlm.data.coco import Coco
from edgevlm.data.pictures import Pictures, training_specs
from edgevlm.recipe import AugmentSection
from tests.edgevlm.coco_folder import instances, make_folder, write


def drawing(boxes: list[list[int]], width: int = 90, height: int = 70) -> Image.Image:
    """Box i filled with grey level 100 + i on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        pixels[y1:y2, x1:x2] = 100 + i
    return Image.fromarray(pixels)


def found(image: Image.Image, level: int) -> list[int]:
    """The box around all pixels of a level."""
    ys, xs = np.nonzero(np.asarray(image)[..., 0] == level)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


FLIP = AugmentSection(flip=1.0, min_cut=1.0, cut_probability=0.0, min_kept=0.4, colour=0.0)
BOXES = [[3, 5, 20, 30], [40, 10, 80, 25], [30, 40, 50, 70]]


def test_mirror() -> None:
    image, boxes = mirror(drawing(BOXES), np.array(BOXES, np.float32))
    assert boxes.tolist() == [found(image, 100 + i) for i in range(3)]
    assert boxes[0].tolist() == [70, 5, 87, 30]


@given(seed=st.integers(0, 10_000), flip=st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_every_box_that_stays_is_where_its_pixels_are(seed: int, flip: float) -> None:
    changes = AugmentSection(flip=flip, min_cut=0.4, cut_probability=1.0, min_kept=0.3, colour=0.0)
    image, boxes, rows = augment(drawing(BOXES), np.array(BOXES), changes, np.random.default_rng(seed))
    for box, row in zip(boxes, rows, strict=True):
        assert box.tolist() == found(image, 100 + int(row))
    for row in set(range(3)) - set(rows.tolist()):  # what went has less than 0.3 of its pixels left
        x1, y1, x2, y2 = BOXES[row]
        assert (np.asarray(image)[..., 0] == 100 + row).sum() < 0.3 * (x2 - x1) * (y2 - y1) + 1e-6


def test_share_that_must_remain() -> None:
    boxes = np.array([[0, 0, 10, 10]], np.float32)
    image = drawing([[0, 0, 10, 10]])
    assert cut(image, boxes, (6, 0, 60, 60), 0.4)[1].tolist() == [[0, 0, 4, 10]]  # 40 % of the box: it stays
    assert len(cut(image, boxes, (7, 0, 60, 60), 0.4)[1]) == 0


@given(seed=st.integers(0, 10_000), width=st.integers(1, 700), height=st.integers(1, 700))
@settings(max_examples=100, deadline=None)
def test_windows_lie_inside(seed: int, width: int, height: int) -> None:
    x1, y1, x2, y2 = random_window((width, height), 0.5, np.random.default_rng(seed))
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
    assert x2 - x1 >= 0.5 * width - 0.5
    assert y2 - y1 >= 0.5 * height - 0.5


def test_training_sizes_keep_the_proportions() -> None:
    sizes = [(s.height, s.width) for s in training_specs(PreprocessSpec(height=96, width=384), (64, 128, 250))]
    assert sizes == [(64, 256), (128, 512), (256, 992)]  # 1000 is rounded to a multiple of 32
    assert training_specs(PreprocessSpec(height=100, width=100), ()) == [PreprocessSpec(height=100, width=100)]


def test_drawn_pictures_hold_their_boxes_at_any_size(tmp_path: Path) -> None:
    """Twice the size, mirrored: each box is full of its colour and ends where the colour does (to the resize's blur)."""
    reader = Coco(make_folder(tmp_path), "detection")
    pictures = Pictures(reader, "train", None, FLIP)
    for picture in pictures.draw(range(len(pictures)), PreprocessSpec(height=128, width=160), seed=1):
        for (x1, y1, x2, y2), colour in zip(picture.boxes.round().astype(int), picture.classes, strict=True):
            plane = picture.pixels_HWC[..., colour]
            assert plane[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].min() > 200
            outside = plane[y1:y2, max(0, x1 - 4) : max(0, x1 - 2)]
            assert outside.size == 0 or outside.max() < 120


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    changes = AugmentSection(flip=0.5, min_cut=0.5, cut_probability=0.8, min_kept=0.4, colour=0.4)
    pictures = Pictures(Coco(make_folder(tmp_path), "detection"), "train", None, changes)
    spec = PreprocessSpec(height=64, width=64)
    first, again, other = (pictures.draw([2, 2, 0], spec, seed) for seed in (5, 5, 6))
    assert all(np.array_equal(a.pixels_HWC, b.pixels_HWC) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a.pixels_HWC, b.pixels_HWC) for a, b in zip(first, other, strict=True))
    assert not np.array_equal(first[0].pixels_HWC, first[1].pixels_HWC)  # a row drawn twice differs


@pytest.mark.parametrize("crowd", [0, 1])
def test_crowds_are_not_trained_on(tmp_path: Path, crowd: int) -> None:
    value = instances(tmp_path, "train", 1)
    value["annotations"][0]["iscrowd"] = crowd
    write(tmp_path, "train", value)
    pictures = Pictures(Coco(tmp_path, "detection"), "train", None)
    (picture,) = pictures.draw([0], PreprocessSpec(height=64, width=80), seed=0)
    x, y, w, h = value["annotations"][1]["bbox"]
    assert len(picture.boxes) == 2 - crowd
    assert picture.boxes[-1].tolist() == [x, y, x + w, y + h]
