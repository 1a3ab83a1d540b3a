"""Tiny folders in the layouts of public datasets, for the tests of their readers."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgevlm.recipe import DataSection

WIDTH, HEIGHT = 40, 30
TEN = ["net"] * 6 + ["netting", "mesh", "pitcher", "orange"]
"""What ten annotators said."""


def published() -> Path:
    """The folder of real data; the test is skipped without it."""
    if "EDGEVLM_DATA" not in os.environ:
        pytest.skip("EDGEVLM_DATA is not set")
    return Path(os.environ["EDGEVLM_DATA"])


def section(dataset: str, path: Path | str | None = None, **more: Any) -> DataSection:
    """The recipe's section that names a dataset."""
    return DataSection.model_validate({"dataset": dataset, "path": None if path is None else str(path)} | more)


def picture(path: Path, colour: tuple[int, int, int] = (200, 40, 10)) -> None:
    """A picture of 40 x 30 pixels, in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), colour).save(path)


def pictures(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        picture(folder / name)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """One JSON value per line; strings as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def vqav2(folder: Path, questions: list[tuple[int, str, list[str]]], split: str = "train2014") -> None:
    """The two files of a split of VQAv2 from (image id, question, answers), and its pictures."""
    asked = [
        {"image_id": image, "question": text, "question_id": 1000 * image + i}
        for i, (image, text, _) in enumerate(questions)
    ]
    said = [
        {
            "question_id": asked[i]["question_id"],
            "image_id": image,
            "answer_type": "other",
            "answers": [{"answer": word, "answer_id": k + 1} for k, word in enumerate(words)],
        }
        for i, (image, _, words) in enumerate(questions)
    ]
    write_json(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": asked})
    write_json(folder / f"v2_mscoco_{split}_annotations.json", {"annotations": said})
    pictures(folder, {f"{split}/COCO_{split}_{image:012}.jpg" for image, _, _ in questions})


def vqav2_example(folder: Path) -> Path:
    """VQAv2 of 24 training and 2 evaluation images, a question each; the first has two."""
    train = [(i, f"what is {i}?", ["a Net"] * 9 + ["two"]) for i in range(1, 25)]
    train.insert(1, (1, "how many?", ["two"] * 10))
    vqav2(folder, train)
    vqav2(folder, [(90, "what is it?", TEN), (91, "who?", ["nobody"] * 10)], "val2014")
    return folder


def nlvr2_record(identifier: str, label: str = "True", **more: object) -> dict[str, object]:
    """A line of NLVR2."""
    return {"identifier": identifier, "sentence": "Two dogs.", "label": label, "synset": "dog"} | more


def nlvr2_example(folder: Path) -> Path:
    """NLVR2 of 20 training pairs in 5 directories; the blue of a picture is 0 on the left and 1 on the right."""
    train = [nlvr2_record(f"train-{i}-{p}-0", directory=i % 5) for i in range(10) for p in range(2)]
    write_lines(folder / "train.json", train)
    write_lines(folder / "dev.json", [nlvr2_record("dev-1-0-0"), nlvr2_record("dev-1-0-1", "False")])
    write_lines(folder / "test1.json", [nlvr2_record("test1-0-1-0")])
    write_lines(folder / "balanced/balanced_dev.json", [nlvr2_record("dev-1-0-1", "False")])
    for side in range(2):
        for i, p in ((i, p) for i in range(10) for p in range(2)):
            picture(folder / f"images/train/{i % 5}/train-{i}-{p}-img{side}.png", (i, p, side))
        picture(folder / f"dev/dev-1-0-img{side}.png", (0, 0, side))
        picture(folder / f"images/test1/test1-0-1-img{side}.png", (0, 0, side))
    return folder


def flickr30k(folder: Path) -> None:
    """Karpathy's file with two training images and one each of the others, five captions per image."""
    rows = [("1", "train"), ("2", "train"), ("3", "val"), ("4", "test")]
    images = [
        {
            "filename": f"{name}.jpg",
            "split": split,
            "sentences": [{"raw": f"Caption {i} of picture {name} .", "tokens": []} for i in range(5)],
        }
        for name, split in rows
    ]
    write_json(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    pictures(folder, (f"flickr30k-images/{name}.jpg" for name, _ in rows))


def genome(folder: Path, number: int = 40) -> None:
    """Visual Genome of `number` images: a dog and an unlisted thing each, a box beyond the border, two region captions."""
    objects, attributes, regions = [], [], []
    for image in range(1, number + 1):
        dog = {"object_id": 10 * image, "names": ["Puppy"], "x": 5, "y": 5, "w": 100, "h": 20}
        blob = {"object_id": 10 * image + 1, "names": ["thingummy"], "x": 0, "y": 0, "w": 5, "h": 5}
        objects.append({"image_id": image, "objects": [blob, dog]})
        attributes.append({"image_id": image, "attributes": [dog | {"attributes": ["Grey", "lovely"]}]})
        phrases = [{"region_id": image, "phrase": "a small dog"}, {"region_id": -image, "phrase": "it sleeps"}]
        regions.append({"id": image, "regions": phrases})
        picture(folder / ("VG_100K" if image % 2 else "VG_100K_2") / f"{image}.jpg")
    write_json(folder / "objects.json", objects)
    write_json(folder / "attributes.json", attributes)
    write_json(folder / "region_descriptions.json", regions)
    (folder / "objects_vocab.txt").write_text("cat\ndog,puppy\n")
    (folder / "attributes_vocab.txt").write_text("red\ngray,grey\n")


def own_data(folder: Path) -> list[dict[str, Any]]:
    """Own data: two records each for training, validation and testing, with everything a record can hold."""
    rows = []
    for i, split in enumerate(["train", "train", "val", "val", "test", "test"]):
        rows.append(
            {
                "id": f"r{i}",
                "image": f"images/{i}.png",
                "split": split,
                "boxes": [[0, 0, 10, 10], [5, 5, WIDTH, HEIGHT]],
                "classes": ["cup", "table"],
                "attributes": [["red"], []],
                "captions": ["a red cup on a table"],
                "questions": [
                    {"question": "what is on the table?", "answer": "cup", "kind": "object"},
                    {"question": "how many cups?", "answers": ["one", "1", "two"], "kind": "count"},
                ],
                "sentences": [{"sentence": "the cup is red", "label": True}, {"sentence": "it is", "label": "neutral"}],
            }
        )
        picture(folder / f"images/{i}.png", (i, 0, 0))
    write_lines(folder / "data.jsonl", rows)
    return rows
