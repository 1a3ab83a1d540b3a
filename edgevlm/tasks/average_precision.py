"""COCO's figures of a detector, by pycocotools: six average precisions and six average recalls."""

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FIGURES = ("map", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
FIGURES += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
"""In the order of COCO's own printout; small, medium and large: below 32 x 32 and 96 x 96 pixels, and above."""


class Annotated(NamedTuple):
    """What is in an image."""

    boxes: np.ndarray
    """(n, 4) corners in pixels of the original image, on which the size limits are defined."""
    classes: np.ndarray
    """(n,)."""
    crowd: np.ndarray | None = None
    """(n,) bool: what is found in such a box counts neither for nor against. None = no such box."""
    areas: np.ndarray | None = None
    """(n,) pixels of the object. None = of the box."""


class Detected(NamedTuple):
    """What was found in an image."""

    boxes: np.ndarray
    """(m, 4) corners in the same pixels."""
    classes: np.ndarray
    """(m,)."""
    scores: np.ndarray
    """(m,)."""


def coco_figures(truths: Sequence[Annotated], detections: Sequence[Detected]) -> dict[str, float]:
    """The twelve figures (0..1) by name; -1 where no object has the size that a figure is about.

    Args:
        truths: one per image.
        detections: one per image, in the same order.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, results = [], []
    for image, truth in enumerate(truths):
        crowd = np.zeros(len(truth.classes), bool) if truth.crowd is None else truth.crowd
        for row, (box, label) in enumerate(zip(truth.boxes, truth.classes, strict=True)):
            shape = _xywh(box)
            area = shape[2] * shape[3] if truth.areas is None else float(truth.areas[row])
            record = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label), "bbox": shape}
            annotations.append(record | {"area": area, "iscrowd": int(crowd[row])})
    for image, found in enumerate(detections):
        for box, label, score in zip(found.boxes, found.classes, found.scores, strict=True):
            record = {"image_id": image, "category_id": int(label), "bbox": _xywh(box), "score": float(score)}
            results.append(record)
    if not results:
        return dict.fromkeys(FIGURES, 0.0)
    categories = sorted({annotation["category_id"] for annotation in annotations})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {  # pyright: ignore (its stubs ask for fields that boxes do not have)
            "images": [{"id": i} for i in range(len(truths))],
            "annotations": annotations,
            "categories": [{"id": c, "name": str(c)} for c in categories],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")  # pyright: ignore (a list works as well as a path)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}


def mean_average_precision(
    truths: Sequence[tuple[np.ndarray, np.ndarray]], detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> dict[str, float]:
    """`map` and `ap50` alone (0..1).

    Args:
        truths: per image, boxes (n, 4) corners and classes (n,).
        detections: per image, boxes (m, 4), classes (m,) and scores (m,).
    """
    figures = coco_figures([Annotated(*truth) for truth in truths], [Detected(*found) for found in detections])
    return {name: figures[name] for name in ("map", "ap50")}


def _xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]
