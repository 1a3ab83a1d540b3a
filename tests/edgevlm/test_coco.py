"""The COCO reader: what it reads is what lies there, bad records are named or counted, real photos come through."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.data import open_reader
from edgevlm.data.coco import Coco
from edgevlm.errors import DataError, RecipeError
from edgevlm.recipe import DataSection
from tests.edgevlm.coco_folder import CATEGORIES, draw, instances, make_folder, write

AQUARIUM = Path(os.environ.get("EDGEVLM_DATA", "")) / "aquarium"


def test_samples_are_what_was_drawn(tmp_path: Path) -> None:
    reader = Coco(make_folder(tmp_path), "detection")
    assert reader.splits == ("train", "val")
    assert reader.labels.classes == ("red", "green", "blue")
    samples = list(reader.samples("val"))
    assert [sample.id for sample in samples] == ["101", "102", "103"]
    for seed, sample in zip((101, 102, 103), samples, strict=True):
        image, objects = draw(seed)
        assert np.array_equal(np.asarray(sample.image), np.asarray(image))
        expected = [(*box[:2], box[0] + box[2], box[1] + box[3]) for _, box in objects]
        assert sample.boxes.tolist() == [list(map(float, box)) for box in expected]
        for (x1, y1, x2, y2), colour in zip(sample.boxes.astype(int), sample.classes, strict=True):
            assert (np.asarray(sample.image)[y1:y2, x1:x2, colour] == 250).all()


def test_a_sample_by_itself_is_the_one_of_the_row(tmp_path: Path) -> None:
    reader = Coco(make_folder(tmp_path), "detection")
    rows = list(reader.samples("train"))
    assert reader.num_samples("train", None) == 6
    assert reader.num_samples("train", 4) == len(list(reader.samples("train", 4))) == 4
    for row in (5, 0, 3):
        alone = reader.sample("train", row)
        assert alone.id == rows[row].id
        assert np.array_equal(alone.boxes, rows[row].boxes)


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}2014.json", "{}2014"),
        ("{}.json", "{}"),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
@pytest.mark.parametrize("val", ["val", "valid"])
def test_usual_names_are_found(tmp_path: Path, annotations: str, images: str, val: str) -> None:
    for split in ("train", val):
        value = instances(tmp_path, images.format(split), 2)
        path = tmp_path / annotations.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))
    reader = Coco(tmp_path, "detection")
    assert reader.splits == ("train", "val")
    assert len(list(reader.samples("val"))) == 2


def test_the_recipe_names_other_files(tmp_path: Path) -> None:
    (tmp_path / "boxes").mkdir()
    for split in ("train", "val"):
        (tmp_path / "boxes" / f"{split}-v2.json").write_text(json.dumps(instances(tmp_path, "photos", 3)))
    section = DataSection(
        dataset="coco",
        path=str(tmp_path),
        annotations={"train": "boxes/train-v2.json", "val": "boxes/val-v2.json"},
        images={"train": "photos", "val": "photos"},
    )  # pyright: ignore[reportCallIssue]
    reader = open_reader(section, "detection", 0)
    assert len(list(reader.samples("train"))) == 3


def _change(value: dict[str, Any], kind: str) -> str:
    """Spoil one record; returns what the error must name."""
    record = value["annotations"][2]
    if kind == "outside":
        record["bbox"] = [70, 10, 20, 20]
    elif kind == "far outside":
        record["bbox"] = [200, 10, 20, 20]
    elif kind == "area":
        record["bbox"] = [10, 10, 0, 20]
    elif kind == "category":
        record["category_id"] = 8
    elif kind == "image":
        record["image_id"] = 999
    elif kind == "number":
        record["bbox"] = [1, 2, 3]
    elif kind == "duplicate":
        record["id"] = 1
    elif kind == "missing":
        value["images"][1]["file_name"] = "gone.png"
        return r"train\.json:image 2 \(gone\.png\)"
    elif kind == "duplicate image":
        value["images"].append(dict(value["images"][0]))
        return r"train\.json:image 1"
    return rf"train\.json:annotation {record['id']} \(image {record['image_id']}\)"


@pytest.mark.parametrize(
    ("kind", "counted", "num_boxes"),
    [
        ("outside", "bad box", 7),
        ("far outside", "bad box", 7),
        ("area", "bad box", 7),
        ("category", "outside the list", 7),
        ("image", "malformed record", 7),
        ("number", "malformed record", 7),
        ("duplicate", "duplicate id", 7),
        ("missing", "missing image", 6),
        ("duplicate image", "duplicate id", 8),
    ],
)
def test_a_bad_record_is_named_or_counted(tmp_path: Path, kind: str, counted: str, num_boxes: int) -> None:
    value = instances(tmp_path, "train", 4)
    named = _change(value, kind)
    write(tmp_path, "train", value)
    with pytest.raises(DataError, match=named):
        list(Coco(tmp_path, "detection").samples("train"))
    reader = Coco(tmp_path, "detection", on_bad="skip")
    samples = list(reader.samples("train"))
    assert sum(len(sample.boxes) for sample in samples) == num_boxes
    assert reader.problems.counts == {counted: 1}


def test_a_box_over_the_edge_by_rounding_is_clipped(tmp_path: Path) -> None:
    value = instances(tmp_path, "train", 1)
    value["annotations"][0]["bbox"] = [-0.4, 10, 20, 54.9]
    write(tmp_path, "train", value)
    sample = next(Coco(tmp_path, "detection").samples("train"))
    np.testing.assert_allclose(sample.boxes[0], [0, 10, 19.6, 64], atol=1e-5)


def test_crowds_and_areas_are_kept(tmp_path: Path) -> None:
    value = instances(tmp_path, "train", 1)
    value["annotations"][1] |= {"iscrowd": 1, "area": 12.5}
    write(tmp_path, "train", value)
    sample = next(Coco(tmp_path, "detection").samples("train"))
    assert sample.crowd is not None
    assert sample.areas is not None
    assert sample.crowd.tolist() == [False, True]
    assert sample.areas[1] == 12.5


def test_a_damaged_image_is_named_or_passed_over(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "train" / "002.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"train\.json:image 2: .*002\.png is not an image"):
        list(Coco(tmp_path, "detection").samples("train"))
    reader = Coco(tmp_path, "detection", on_bad="skip")
    assert [sample.id for sample in reader.samples("train")] == ["1", "3", "4", "5", "6"]
    assert reader.sample("train", 1).id == "3"
    assert reader.problems.counts == {"unreadable image": 1}, "once, however often it is met"


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path)
    draw(1, width=64, height=80)[0].save(tmp_path / "train" / "001.png")
    with pytest.raises(DataError, match="64 x 80 pixels, annotated are 80 x 64"):
        list(Coco(tmp_path, "detection").samples("train"))


def test_splits_must_name_their_categories_alike(tmp_path: Path) -> None:
    make_folder(tmp_path)
    value = instances(tmp_path, "val", 2)
    value["categories"] = [{"id": 3, "name": "pink"}, *CATEGORIES[1:]]
    write(tmp_path, "val", value)
    with pytest.raises(DataError, match="names its categories otherwise"):
        list(Coco(tmp_path, "detection").samples("val"))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Coco(tmp_path / "nowhere", "detection")
    with pytest.raises(DataError, match="has no instances annotations of a training split"):
        Coco(tmp_path, "detection")
    (tmp_path / "train.json").write_text("{")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="not valid JSON"):
        Coco(tmp_path, "detection")
    with pytest.raises(RecipeError, match="no task 'vqa'"):
        Coco(tmp_path, "vqa")


def _captions(folder: Path) -> dict[str, Any]:
    value = instances(folder, "train", 3)
    texts = ["a red box", "two boxes ", "a green  box", "a picture", "noise"]
    value["annotations"] = [{"id": i, "image_id": 1 + i % 3, "caption": text} for i, text in enumerate(texts)]
    return value


def test_plain_captions(tmp_path: Path) -> None:
    write(tmp_path, "train", _captions(tmp_path))
    reader = Coco(tmp_path, "captioning")
    captions = [sample.captions for sample in reader.samples("train")]
    assert captions == [("a red box", "a picture"), ("two boxes", "noise"), ("a green box",)]


def test_an_empty_caption_is_named_or_left_out(tmp_path: Path) -> None:
    value = _captions(tmp_path)
    value["annotations"][2]["caption"] = "  "
    write(tmp_path, "train", value)
    with pytest.raises(DataError, match=r"train\.json:annotation 2 \(image 3\): the caption is empty"):
        list(Coco(tmp_path, "captioning").samples("train"))
    reader = Coco(tmp_path, "captioning", on_bad="skip")
    assert [sample.id for sample in reader.samples("train")] == ["1", "2"]
    assert reader.problems.counts == {"empty text": 2}


def test_karpathy_split(tmp_path: Path) -> None:
    """`restval` belongs to training; images lie in the folders that the file names."""
    records = []
    for number, split in enumerate(["train", "restval", "val", "test", "test"]):
        folder = "val2014" if split != "train" else "train2014"
        (tmp_path / folder).mkdir(exist_ok=True)
        draw(number)[0].save(tmp_path / folder / f"{number}.png")
        sentences = [{"raw": f"Caption {number}."}, {"raw": "Another."}]
        record = {"filepath": folder, "filename": f"{number}.png", "cocoid": 100 + number, "split": split}
        records.append(record | {"sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": records, "dataset": "coco"}))
    reader = Coco(tmp_path, "retrieval")
    ids = {split: [sample.id for sample in reader.samples(split)] for split in reader.splits}
    assert ids == {"train": ["100", "101"], "val": ["102"], "test": ["103", "104"]}
    assert next(reader.samples("test")).captions == ("Caption 3.", "Another.")


@pytest.mark.data
@pytest.mark.skipif(not AQUARIUM.is_dir(), reason="EDGEVLM_DATA does not name a folder that holds aquarium/")
def test_aquarium_is_read_whole() -> None:
    """Counts by the publisher: 448 / 127 / 63 photos, 7 classes; boxes by the annotation files themselves."""
    reader = Coco(AQUARIUM, "detection", on_bad="skip")
    assert reader.labels.classes == ("fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray")
    for split, file, images in (("train", "train.json", 448), ("val", "valid.json", 127), ("test", "test.json", 63)):
        assert reader.num_samples(split, None) == images
        records = json.loads((AQUARIUM / file).read_text())["annotations"]
        flat = sum(record["bbox"][2] * record["bbox"][3] == 0 for record in records)
        assert flat == (2 if split == "test" else 0)
        assert len(reader.index(split).boxes) == len(records) - flat
    assert reader.problems.counts == {"bad box": 2}, "those without area"
    sample = reader.sample("val", 5)
    assert (sample.boxes[:, 2:] <= np.array(sample.image.size)).all()
