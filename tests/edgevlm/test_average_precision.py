"""COCO's twelve figures: the official printout of the official example, and cases small enough for mental arithmetic."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from edgevlm.tasks.average_precision import FIGURES, Annotated, Detected, coco_figures

FIXTURE = Path(os.environ.get("EDGEVLM_DATA", "")) / "eval_fixtures" / "coco_det"


def corners(bbox: list[float]) -> list[float]:
    x, y, w, h = bbox
    return [x, y, x + w, y + h]


@pytest.mark.data
@pytest.mark.skipif(
    not FIXTURE.is_dir(), reason="EDGEVLM_DATA does not name a folder that holds eval_fixtures/coco_det"
)
def test_all_twelve_official_figures() -> None:
    """100 images of COCO val2014 with crowds, and the results that COCO's own tools are shown with."""
    value = json.loads((FIXTURE / "instances_val2014_100.json").read_text())
    results = json.loads((FIXTURE / "instances_val2014_fakebbox100_results.json").read_text())
    truths, detections = [], []
    for image in value["images"]:
        objects = [record for record in value["annotations"] if record["image_id"] == image["id"]]
        found = [record for record in results if record["image_id"] == image["id"]]
        boxes = np.array([corners(record["bbox"]) for record in objects]).reshape(-1, 4)
        columns = [[record[key] for record in objects] for key in ("category_id", "iscrowd", "area")]
        truths.append(Annotated(boxes, np.array(columns[0]), np.array(columns[1], bool), np.array(columns[2])))
        boxes = np.array([corners(record["bbox"]) for record in found]).reshape(-1, 4)
        columns = [[record[key] for record in found] for key in ("category_id", "score")]
        detections.append(Detected(boxes, np.array(columns[0]), np.array(columns[1])))
    assert any(truth.crowd.any() for truth in truths if truth.crowd is not None)
    printed = (FIXTURE / "val2014_fake_eval_res.txt").read_text()
    section = printed.partition("type=bbox")[2].partition("type=")[0]
    expected = [float(number) for number in re.findall(r"= (-?\d\.\d{3})", section)]
    assert len(expected) == len(FIGURES)
    figures = coco_figures(truths, detections)
    assert [round(figures[name], 3) for name in FIGURES] == expected


BOX = np.array([[0, 0, 40, 40], [100, 100, 140, 140]], np.float32)


def test_a_crowd_counts_neither_for_nor_against() -> None:
    """A find inside a crowd is forgiven; without the crowd it is a false alarm that ranks first and halves precision."""
    found = Detected(BOX[::-1], np.array([0, 0]), np.array([0.9, 0.8]))
    crowd = Annotated(BOX, np.array([0, 0]), np.array([False, True]))
    assert coco_figures([crowd], [found])["ap50"] == pytest.approx(1.0)
    alone = Annotated(BOX[:1], np.array([0]))
    assert coco_figures([alone], [found])["ap50"] == pytest.approx(0.5)


def test_the_annotated_area_decides_what_is_small() -> None:
    """A box of 40 x 40 is medium; an object that fills 900 of its pixels is small."""
    found = Detected(BOX[:1], np.array([0]), np.array([0.9]))
    by_box = coco_figures([Annotated(BOX[:1], np.array([0]))], [found])
    assert (by_box["ap_medium"], by_box["ap_small"]) == (pytest.approx(1.0), -1)
    by_mask = coco_figures([Annotated(BOX[:1], np.array([0]), None, np.array([900.0]))], [found])
    assert (by_mask["ap_small"], by_mask["ap_medium"]) == (pytest.approx(1.0), -1)


def test_nothing_found() -> None:
    nothing = Detected(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    assert set(coco_figures([Annotated(BOX, np.array([0, 1]))], [nothing]).values()) == {0.0}
