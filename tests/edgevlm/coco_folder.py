"""A tiny folder in COCO format, drawn for tests: bright rectangles on noise, boxes known to the pixel."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 9, "name": "blue"}]
"""Ids with gaps, as COCO's."""


def draw(seed: int, width: int = 80, height: int = 64) -> tuple[Image.Image, list[tuple[int, list[int]]]]:
    """A picture with two rectangles in the colour of their category, and (category id, x y w h) of each."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (height, width, 3)).astype(np.uint8)
    objects = []
    for left in (0, width // 2):
        w, h = rng.integers(14, 30, 2).tolist()
        x, y = left + int(rng.integers(0, width // 2 - w + 1)), int(rng.integers(0, height - h + 1))
        colour = int(rng.integers(3))
        pixels[y : y + h, x : x + w, colour] = 250
        objects.append((CATEGORIES[colour]["id"], [x, y, w, h]))
    return Image.fromarray(pixels), objects


def instances(folder: Path, split: str, number: int, first_id: int = 1) -> dict[str, Any]:
    """Write the images of a split as PNG and return its annotations."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(number):
        image, objects = draw(first_id + i)
        name = f"{first_id + i:03}.png"
        image.save(folder / split / name)
        images.append({"id": first_id + i, "file_name": name, "width": image.width, "height": image.height})
        for category, bbox in objects:
            record = {"id": len(annotations) + 1, "image_id": first_id + i, "category_id": category, "bbox": bbox}
            annotations.append(record | {"area": bbox[2] * bbox[3], "iscrowd": 0})
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write(folder: Path, split: str, value: dict[str, Any]) -> Path:
    """Write `<split>.json`."""
    path = folder / f"{split}.json"
    path.write_text(json.dumps(value))
    return path


def make_folder(folder: Path, train: int = 6, val: int = 3) -> Path:
    """`train.json`, `val.json` and their images."""
    write(folder, "train", instances(folder, "train", train))
    write(folder, "val", instances(folder, "val", val, first_id=101))
    return folder
