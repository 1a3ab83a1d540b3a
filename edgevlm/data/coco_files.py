"""The annotation files of COCO format, checked and packed: instances, captions, and the Karpathy split of the captions.

Parsed JSON takes ten times the memory of the numbers in it, so each file becomes a few arrays at once; images are
decoded only when a sample is asked for.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.data.problems import Problems
from edgevlm.errors import DataError

OUTSIDE_PX = 1.0
"""A box may leave its image by this much (annotators' rounding): it is clipped. Beyond that the record is wrong."""


@dataclass
class Index:
    """The images of a split with what is annotated; the objects of image i are rows `starts[i]` to `starts[i + 1]`."""

    files: list[Path] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sizes_wh: list[tuple[int, int] | None] = field(default_factory=list)
    """As annotated; None where the file does not say."""
    captions: list[tuple[str, ...]] = field(default_factory=list)
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(N, 4) x1, y1, x2, y2 in pixels of the image."""
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def __len__(self) -> int:
        return len(self.files)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: missing, not JSON (the line is named), or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as problem:
        raise DataError(f"{path} is missing", "Check data.path and data.annotations") from problem
    except ValueError as problem:
        raise DataError(f"{path} is not valid JSON ({problem})", "Copy or download it again") from problem
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold an object with 'images'", "Give a file in COCO format")
    return value


def read_categories(path: Path) -> dict[int, str]:
    """Category id -> name, in order of the ids.

    Raises:
        DataError: none, or two of one id or name.
    """
    categories = read_json(path).get("categories")
    if not isinstance(categories, list) or not categories:
        raise DataError(f"{path} has no 'categories'", "Give an instances file in COCO format")
    names = {int(category["id"]): str(category["name"]) for category in categories}
    if len(names) != len(categories) or len(set(names.values())) != len(names):
        raise DataError(f"{path}: two categories share an id or a name", "Give each its own")
    return dict(sorted(names.items()))


def read_instances(path: Path, folder: Path, categories: dict[int, str], problems: Problems) -> Index:
    """Images and their boxes, in the order of the file's images.

    Args:
        path: `instances_*.json`, or any file with 'images', 'annotations' and 'categories'.
        folder: where the images lie.
        categories: of the training split, so that every split numbers its classes alike.
        problems: gets image ids that repeat, images that are missing, annotation ids that repeat, boxes without area or
            outside their image, and annotations of an unknown image or category.

    Raises:
        DataError: the file cannot be read, or a bad record if that is the policy.
    """
    value = read_json(path)
    if (own := read_categories(path)) != {key: categories.get(key) for key in own}:
        raise DataError(f"{path} names its categories otherwise than the training split", "Give all splits one list")
    index, row_of, listed = _images(value, path, folder, problems)
    class_of = {category: number for number, category in enumerate(categories)}
    seen: set[int] = set()
    rows: list[tuple[int, int, tuple[float, ...], int, bool, float]] = []
    for record in value.get("annotations", []):
        where = f"annotation {record.get('id')} (image {record.get('image_id')})"
        try:
            number, image, category = int(record["id"]), record["image_id"], record["category_id"]
            x, y, w, h = (float(number) for number in record["bbox"])
        except (KeyError, TypeError, ValueError) as problem:
            problems.report("malformed record", str(path), where, f"lacks a number ({problem})")
            continue
        if number in seen:
            problems.report("duplicate id", str(path), where, "its id stands twice")
            continue
        seen.add(number)
        if image not in row_of:
            if image not in listed:  # those of an image that was left out go with it: no further mistake
                problems.report("malformed record", str(path), where, "the file lists no such image")
            continue
        if category not in class_of:
            problems.report("outside the list", str(path), where, f"category {category} is not in the list")
            continue
        size = index.sizes_wh[row_of[image]]
        assert size is not None, "instances always carry sizes"
        box = (max(x, 0.0), max(y, 0.0), min(x + w, size[0]), min(y + h, size[1]))
        if not (w > 0 and h > 0 and box[2] > box[0] and box[3] > box[1]):
            what = "has no area" if not (w > 0 and h > 0) else f"lies outside the image of {size[0]} x {size[1]} pixels"
            problems.report("bad box", str(path), where, f"bbox {record['bbox']} {what}")
            continue
        if x < -OUTSIDE_PX or y < -OUTSIDE_PX or x + w > size[0] + OUTSIDE_PX or y + h > size[1] + OUTSIDE_PX:
            what = f"bbox {record['bbox']} leaves the image of {size[0]} x {size[1]} pixels"
            problems.report("bad box", str(path), where, what)
            continue
        crowd = bool(record.get("iscrowd", 0))
        rows.append((row_of[image], class_of[category], box, number, crowd, float(record.get("area", w * h))))
    rows.sort(key=lambda row: row[0])  # stable: the order of the file within an image
    index.starts = np.searchsorted([row[0] for row in rows], np.arange(len(index) + 1)).astype(np.int64)
    index.classes = np.array([row[1] for row in rows], np.int64)
    index.boxes = np.array([row[2] for row in rows], np.float32).reshape(-1, 4)
    index.crowd = np.array([row[4] for row in rows], bool)
    index.areas = np.array([row[5] for row in rows], np.float32)
    return index


def read_captions(path: Path, folder: Path, problems: Problems) -> Index:
    """Images and their captions from a `captions_*.json`.

    Raises:
        DataError: the file cannot be read, or a bad record if that is the policy (also: an empty caption).
    """
    value = read_json(path)
    index, row_of, _ = _images(value, path, folder, problems)
    captions: list[list[str]] = [[] for _ in index.files]
    seen: set[Any] = set()
    for record in value.get("annotations", []):
        where = f"annotation {record.get('id')} (image {record.get('image_id')})"
        text = " ".join(str(record.get("caption", "")).split())
        if record.get("id") in seen:
            problems.report("duplicate id", str(path), where, "its id stands twice")
        elif record.get("image_id") not in row_of:
            problems.report("malformed record", str(path), where, "the file lists no such image, or it was left out")
        elif not text:
            problems.report("empty text", str(path), where, "the caption is empty")
        else:
            captions[row_of[record["image_id"]]].append(text)
        seen.add(record.get("id"))
    index.captions = [tuple(texts) for texts in captions]
    return _with_captions(index, path, problems)


def read_karpathy(path: Path, root: Path, split: str, problems: Problems) -> Index:
    """One split of Karpathy's `dataset_coco.json` (113,287 / 5,000 / 5,000 images): `train` includes `restval`.

    Raises:
        DataError: the file cannot be read, or a bad record if that is the policy.
    """
    wanted = {"train", "restval"} if split == "train" else {split}
    index = Index()
    present: dict[Path, set[str]] = {}
    seen: set[Any] = set()
    for record in read_json(path).get("images", []):
        if record.get("split") not in wanted:
            continue
        key = record.get("cocoid", record.get("imgid"))
        folder = root / str(record.get("filepath", ""))
        where = f"image {key}"
        texts = tuple(" ".join(str(s.get("raw", "")).split()) for s in record.get("sentences", []))
        if key in seen:
            problems.report("duplicate id", str(path), where, "its id stands twice")
        elif not _present(folder, present, record.get("filename")):
            problems.report("missing image", str(path), where, f"{folder / str(record.get('filename'))} does not exist")
        else:
            if not all(texts):
                problems.report("empty text", str(path), where, "a caption is empty")
            index.files.append(folder / str(record["filename"]))
            index.ids.append(int(key))
            index.sizes_wh.append(None)
            index.captions.append(tuple(text for text in texts if text))
        seen.add(key)
    return _with_captions(index, path, problems)


def _images(
    value: dict[str, Any], path: Path, folder: Path, problems: Problems
) -> tuple[Index, dict[Any, int], set[Any]]:
    """The images of a file without their annotations; image id -> row; and all ids, those of bad records too."""
    index, row_of, seen = Index(), {}, set()
    present: dict[Path, set[str]] = {}
    for record in value.get("images", []):
        key, name = record.get("id"), str(record.get("file_name", ""))
        where = f"image {key} ({name})"
        width, height = record.get("width"), record.get("height")
        if key in seen:
            problems.report("duplicate id", str(path), where, "its id stands twice")
        elif not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
            problems.report("malformed record", str(path), where, f"width {width!r}, height {height!r}")
        elif not _present(folder, present, name):
            problems.report("missing image", str(path), where, f"{folder / name} does not exist")
        else:
            row_of[key] = len(index.files)
            index.files.append(folder / name)
            index.ids.append(int(key))
            index.sizes_wh.append((width, height))
        seen.add(key)
    index.captions = [()] * len(index.files)
    index.starts = np.zeros(len(index.files) + 1, np.int64)
    if not index.files:
        raise DataError(f"{path} lists no image that exists in {folder}", "Check data.path and data.images")
    return index, row_of, seen


def _present(folder: Path, seen: dict[Path, set[str]], name: Any) -> bool:
    """Whether a file exists; each folder is listed once, because 100,000 questions to a network disk take minutes."""
    parent = (folder / str(name)).parent
    if parent not in seen:
        seen[parent] = {entry.name for entry in parent.iterdir()} if parent.is_dir() else set()
    return bool(name) and Path(str(name)).name in seen[parent]


def _with_captions(index: Index, path: Path, problems: Problems) -> Index:
    """The images that have a caption."""
    for key, texts in zip(index.ids, index.captions, strict=True):
        if not texts:
            problems.report("empty text", str(path), f"image {key}", "it has no caption")
    rows = [row for row, texts in enumerate(index.captions) if texts]
    if not rows:
        raise DataError(f"{path} has no captioned image", "Check data.path and data.annotations")
    columns = ([column[row] for row in rows] for column in (index.files, index.ids, index.sizes_wh, index.captions))
    return Index(*columns, starts=np.zeros(len(rows) + 1, np.int64))  # pyright: ignore[reportArgumentType]
