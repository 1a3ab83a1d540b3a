"""Bad records are found with file and line, training does as it is told about them, and `edgevlm data check`."""

import json
import logging
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgevlm.artifacts import Labels
from edgevlm.cli import app
from edgevlm.data import open_reader
from edgevlm.data.check import check, check_reader
from edgevlm.data.entries import Entry, make_samples
from edgevlm.data.folders import Folder
from edgevlm.data.problems import Problems
from edgevlm.data.sample import Text
from edgevlm.data.shards import Shard
from edgevlm.errors import DataError
from edgevlm.progress import Reporter
from tests.edgevlm import dataset_folders as make
from tests.edgevlm.dataset_folders import HEIGHT, WIDTH, write_json, write_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    make.own_data(tmp_path)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "check", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


# --- bad records --------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"image": "images/none.png"}, "missing image", "2: the image FOLDER/images/none.png is missing"),
    ({"image": "data.jsonl"}, "unreadable image", "2: FOLDER/data.jsonl: The image is not an image that can be read"),
    ({"id": "r0"}, "duplicate id", "2: id 'r0' was used at FOLDER/data.jsonl:1"),
    ({"boxes": [[0, 0, 9, 9], [5, 5, 5, 9]]}, "bad box", "2: box 2 (5, 5, 5, 9) has no area"),
    ({"boxes": [[0, 0, 9, 9], [9, 5, 5, 9]]}, "bad box", "2: box 2 (9, 5, 5, 9) has no area"),
    ({"boxes": [[0, 0, 9, 9], [30, 5, 45, 9]]}, "bad box", "reaches outside the picture of 40 x 30 pixels"),
    ({"boxes": [[0, 0, 9, 9], [50, 5, 60, 9]]}, "bad box", "lies outside the picture of 40 x 30 pixels"),
    ({"boxes": [[0, 0, 9, 9], [0, 0, 1e999, 5]]}, "bad box", "2: box 2 (0, 0, inf, 5) is not a number"),
    ({"boxes": [[0, 0, 9, 9]]}, "malformed record", "2: Value error, 1 boxes, 2 classes, 2 attribute lists"),
    ({"captions": ["fine", "  "]}, "empty text", "2:captions[1]: the caption is empty"),
    ({"questions": [{"question": "", "answer": "cup"}]}, "empty text", "2:questions[0]: the question or sentence is"),
    ({"questions": [{"question": "q"}]}, "malformed record", "2: questions.0: Value error, give either 'answer' or"),
    ({"questions": [{"question": "why " * 600, "answer": "cup"}]}, "too long text", "has 600 words and marks; 510 fit"),
    ({"sentences": [{"sentence": "x", "label": "maybe"}]}, "malformed record", "2: sentences.0.label"),
    ({"captoins": ["x"]}, "malformed record", "2: captoins: Extra inputs are not permitted"),
]


def spoil(folder: Path, changes: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (folder / "data.jsonl").open()]
    rows[1].update(changes)
    write_lines(folder / "data.jsonl", rows)


@pytest.mark.parametrize(("changes", "kind", "complaint"), BAD)
def test_bad_records_are_found_where_they_are(own: Path, changes: dict[str, Any], kind: str, complaint: str) -> None:
    spoil(own, changes)
    report = check(str(own))
    (problem,) = report.problems
    assert problem.kind == kind
    assert str(problem).startswith(f"{own}/data.jsonl:2:")
    assert complaint.replace("FOLDER", str(own)) in str(problem)
    assert report.splits[0].problems == 1


def test_what_training_does_about_them(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoil(own, {"image": "images/none.png"})
    section = make.section("jsonl", own)
    with pytest.raises(DataError, match=r"data\.jsonl:2: the image .* is missing\. Mend it, or set data.on_bad: skip"):
        list(open_reader(section, "vqa", 0).samples("train"))
    reader = open_reader(section.model_copy(update={"on_bad": "skip"}), "vqa", 0)
    with caplog.at_level(logging.WARNING):
        assert [sample.id for sample in reader.samples("train")] == ["r0"]
        assert [sample.id for sample in reader.samples("train")] == ["r0"]
    assert [record.message for record in caplog.records] == [
        f"left out: {own}/data.jsonl:2: the image {own}/images/none.png is missing",
        "1 bad records left out so far: 1 × missing image",
    ]


def test_only_the_bad_part_is_left_out(own: Path) -> None:
    problems = Problems("collect")
    text = Text("which?", "yes", (0, 2), "", ())
    entry = Entry(
        "x",
        ("images/0.png",),
        "f",
        7,
        boxes=np.array([[0, 0, 5, 5], [0, 0, 0, 0], [1, 1, WIDTH + 0.9, HEIGHT]]),
        classes=(3, 4, 5),
        attributes=((), (1,), (2,)),
        texts=((text, 7), (Text("what?", "maybe"), 8)),
        captions=((" ", 9), ("two  words ", 10)),
    )
    labels = Labels(classes=tuple("abcdef"), attributes=tuple("abc"), answers=("yes",))
    (sample,) = make_samples([entry], Folder(own), labels, problems)
    np.testing.assert_array_equal(sample.boxes, np.array([[0, 0, 5, 5], [1, 1, WIDTH, HEIGHT]], np.float32))
    assert (sample.classes.tolist(), sample.attributes) == ([3, 5], ((), (2,)))
    assert sample.texts == (Text("which?", "yes", (0, 1)),), "it refers to the same objects as before"
    assert sample.captions == ("two words",)
    assert [str(problem).partition(" ")[0] for problem in problems.found] == ["f:8:", "f:9:", "f:7:"]


@settings(max_examples=60, deadline=None)
@given(
    boxes=st.lists(st.tuples(*[st.floats(-60, 90, width=32)] * 4), max_size=6),
    clip=st.booleans(),
)
def test_boxes_that_remain_are_sound(own_picture: Path, boxes: list[tuple[float, ...]], clip: bool) -> None:
    array = np.array(boxes, np.float64).reshape(-1, 4)
    entry = Entry("x", ("0.png",), "f", 1, boxes=array, classes=tuple(range(len(boxes))), attributes=((),) * len(boxes))
    problems = Problems("collect")
    labels = Labels(classes=tuple("abcdef"), attributes=(), answers=())
    samples = list(make_samples([entry], Folder(own_picture), labels, problems, clip=clip))
    kept = samples[0].boxes if samples else np.zeros((0, 4))
    assert len(kept) + problems.counts["bad box"] == len(boxes), "each is kept or reported"
    assert (kept[:, 2:] > kept[:, :2]).all()
    assert (kept >= 0).all()
    assert (kept <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()
    moved = [np.abs(kept[i] - array[index]).max() for i, index in enumerate(samples[0].classes)] if samples else []
    assert clip or all(distance <= 1 for distance in moved)


@settings(max_examples=60, deadline=None)
@given(
    states=st.lists(st.sampled_from(["good", "no image", "same id", "no words"]), max_size=20),
    limit=st.none() | st.integers(0, 25),
    world=st.integers(1, 5),
)
def test_parts_add_up_whatever_is_bad(own_picture: Path, states: list[str], limit: int | None, world: int) -> None:
    entries = [
        Entry(
            "twice" if state == "same id" else str(i),
            ("none.png" if state == "no image" else "0.png",),
            "f",
            i,
            captions=((" " if state == "no words" else f"caption {i}", i),),
        )
        for i, state in enumerate(states)
    ]

    def read(shard: Shard) -> list[str]:
        problems, labels = Problems("collect"), Labels(classes=(), attributes=(), answers=())
        found = list(make_samples(iter(entries), Folder(own_picture), labels, problems, limit, shard))
        assert limit is None or len(found) <= limit
        return [sample.captions[0] for sample in found]

    parts = [read(Shard(rank, world)) for rank in range(world)]
    assert sorted(chain(*parts), key=lambda caption: int(caption.split()[1])) == read(Shard())
    if limit is None:
        first = states.index("same id") if "same id" in states else None
        good = [i for i, state in enumerate(states) if state == "good" or i == first]
        assert read(Shard()) == [f"caption {i}" for i in good]


@pytest.fixture(scope="module")
def own_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("picture")
    make.picture(folder / "0.png")
    return folder


# --- other datasets -----------------------------------------------------------------------------------------------


def problems_of(name: str, folder: Path, task: str, **more: Any) -> list[str]:
    """What reading all splits finds, without the folder's name."""
    section = make.section(name, folder, on_bad="skip", **more)
    reader = open_reader(section, task, 0)
    problems = Problems("collect")
    reader.problems = problems  # pyright: ignore[reportAttributeAccessIssue]
    report = check_reader(reader, problems, {}, None, Reporter())
    return [str(problem).replace(f"{folder}/", "") for problem in report.problems]


def test_bad_records_of_vqav2(tmp_path: Path) -> None:
    make.vqav2(tmp_path, [(1, "what?", ["a"] * 10), (2, "who?", ["b"] * 10)])
    make.vqav2(tmp_path, [(3, " ", ["a"]), (4, "q", ["b"]), (5, "q", ["b"]), (6, "q", ["c"])], "val2014")
    (tmp_path / "val2014/COCO_val2014_000000000004.jpg").unlink()
    path = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    value = json.loads(path.read_text())
    value["questions"] += [
        value["questions"][3],
        {"image_id": 6, "question": "new?", "question_id": 9},
        {"image_id": 6},
    ]
    write_json(path, value)
    questions = "v2_OpenEnded_mscoco_val2014_questions.json"
    names = "val2014/COCO_val2014_000000000004.jpg"
    found = problems_of("vqav2", tmp_path, "vqa")
    assert found[:4] == [
        f"{questions}:questions[4]: question 6003 was asked at questions[3]",
        f"{questions}:questions[5]: question 9 has no answer in v2_mscoco_val2014_annotations.json",
        f"{questions}:questions[6]: question_id: Field required",
        f"{questions}:questions[0]: the question or sentence is empty",
    ]
    assert found[4].startswith(f"{questions}:questions[1]: the image {names} or images/val2014/")
    assert len(found) == 5


def test_bad_records_of_line_by_line_datasets(tmp_path: Path) -> None:
    good = {"image": "1.jpg", "caption": "The dog is on the bed.", "label": 1}
    for name in ("train", "dev", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [good])
    write_lines(
        tmp_path / "dev.jsonl", [good, good | {"label": 2}, "{", good | {"image": "2.jpg"}, good | {"caption": ""}]
    )
    make.picture(tmp_path / "images/1.jpg")
    found = problems_of("vsr", tmp_path, "reasoning")
    assert [problem.partition(" ")[0] for problem in found] == [
        "dev.jsonl:2:",
        "dev.jsonl:3:",
        "dev.jsonl:5:",
        "dev.jsonl:4:",
    ]
    assert [any(word in problem for problem in found) for word in ("label", "Invalid JSON", "is empty", "2.jpg")] == [
        True
    ] * 4

    for name in ("train", "dev", "test"):
        write_lines(tmp_path / f"snli_ve_{name}.jsonl", [{"Flickr30K_ID": "1", "sentence2": "x", "gold_label": "?"}])
    assert problems_of("snli-ve", tmp_path, "entailment")[0].startswith("snli_ve_train.jsonl:1: gold_label: ")

    record = {"identifier": "dev-1-0", "sentence": "x", "label": "True"}
    for name in ("train", "dev", "test1"):
        write_lines(tmp_path / f"{name}.json", [record])
    assert "dev.json:1: identifier: String should match pattern" in " ".join(
        problems_of("nlvr2", tmp_path, "reasoning")
    )


def test_bad_records_of_captions_and_boxes(tmp_path: Path) -> None:
    make.flickr30k(tmp_path)
    path = tmp_path / "dataset_flickr30k.json"
    value = json.loads(path.read_text())
    value["images"][1]["sentences"][2]["raw"] = ""
    value["images"].append(value["images"][3])
    write_json(path, value)
    assert problems_of("flickr30k", tmp_path, "retrieval") == [
        "dataset_flickr30k.json:images[1].sentences[2]: the caption is empty",
        "dataset_flickr30k.json:images[4]: id '4' was used at dataset_flickr30k.json:images[3]",
    ]

    make.genome(tmp_path / "vg", 20)
    value = json.loads((tmp_path / "vg/objects.json").read_text())
    value[2]["objects"][1]["w"] = 0
    del value[3]["objects"][0]["x"]
    write_json(tmp_path / "vg/objects.json", value)
    found = sorted(
        problem.partition("/vg/")[2] or problem
        for problem in problems_of("visual-genome", tmp_path / "vg", "detection")
    )
    assert found == [
        "objects.json:[2]: box 1 (5, 5, 5, 25) has no area",
        "objects.json:[3].objects[0]: x: Field required",
    ]

    (tmp_path / "cc").mkdir()
    write_lines(tmp_path / "cc/Train_GCC-training.tsv", ["fine\tu", "no tab", "\tu"])
    write_lines(tmp_path / "cc/Validation_GCC-1.1.0-Validation.tsv", ["fine\tu"])
    make.pictures(tmp_path / "cc", ["train/000000000.jpg", "train/000000002.jpg", "val/000000000.jpg"])
    assert problems_of("conceptual-captions", tmp_path / "cc", "pretraining") == [
        "Train_GCC-training.tsv:2: not of the form `caption<TAB>url`",
        "Train_GCC-training.tsv:3: the caption is empty",
    ]


def test_damaged_files_are_named_with_the_line(tmp_path: Path) -> None:
    make.flickr30k(tmp_path)
    path = tmp_path / "dataset_flickr30k.json"
    path.write_text('{"images": [\n{"filename": "1.jpg",\n')
    found = problems_of("flickr30k", tmp_path, "captioning")
    assert len(found) == 3, "no split can be read"
    assert all("dataset_flickr30k.json:3: Expecting property name" in problem for problem in found)
    path.write_text("[]")
    assert "does not hold an object with 'images'" in problems_of("flickr30k", tmp_path, "captioning")[0]


# --- the verb -----------------------------------------------------------------------------------------------------


def test_the_verb_says_yes(own: Path) -> None:
    code, printed = run(str(own))
    assert code == 0, printed
    assert "nothing is wrong" in printed
    code, printed = run(str(own / "data.jsonl"), "--json", "--split", "train", "--split", "val")
    report = json.loads(printed)
    assert (code, report["ok"], report["counts"]) == (0, True, {})
    assert [total["split"] for total in report["splits"]] == ["train", "val"]
    train = report["splits"][0]
    assert (train["images"], train["boxes"], train["texts"], train["captions"], train["longest"]) == (2, 4, 8, 2, 6)
    assert train["known_words"] == report["splits"][1]["known_words"] == 1.0


def test_the_verb_says_no_and_where(own: Path) -> None:
    spoil(own, {"image": "images/none.png"})
    code, printed = run(str(own))
    assert code == 1
    assert f"{own}/data.jsonl:2: the image {own}/images/none.png is missing" in printed
    assert "1 problems: 1 × missing image" in printed
    code, printed = run(str(own), "--json")
    report = json.loads(printed)
    assert (code, report["ok"], report["counts"]) == (1, False, {"missing image": 1})
    assert report["problems"][0]["where"] == 2


def test_the_verb_takes_a_recipe(own: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"base": "scenes-tiny", "name": "mine", "data": {"dataset": "jsonl"}}))
    limits = ("--set", "data.num_train=1", "--set", "data.num_val=1", "--set", "data.num_test=1")
    code, printed = run(str(recipe), "--data", str(own), "--json", *limits)
    report = json.loads(printed)
    assert code == 0, printed
    assert [total["samples"] for total in report["splits"]] == [1, 1, 1]
    # The recipe answers questions, of at most 24 word pieces.
    assert [total["texts"] for total in report["splits"]] == [2, 2, 2]
    spoil(own, {"questions": [{"question": "why " * 23, "answer": "cup"}]})
    code, printed = run(str(recipe), "--data", str(own), "--split", "train", "--set", "data.num_train=null")
    assert code == 1
    assert "has 23 words and marks; 22 fit" in printed


def test_the_verb_reads_drawn_data_too() -> None:
    limits = ("data.num_train=5", "data.num_val=3", "data.num_test=2")
    code, printed = run("scenes-tiny", "--json", *(word for limit in limits for word in ("--set", limit)))
    assert code == 0
    report = json.loads(printed)
    assert [total["images"] for total in report["splits"]] == [5, 3, 2]
    assert report["splits"][0]["texts_outside"] == 0


def test_mistakes_of_the_caller_are_errors(own: Path) -> None:
    for arguments, complaint in [
        ((str(own), "--split", "tset"), "no split 'tset'"),
        (("no-such-recipe",), "No recipe 'no-such-recipe'"),
        ((str(own / "images"),), "has no .jsonl file"),
    ]:
        result = CliRunner().invoke(app, ["data", "check", *arguments])
        assert complaint in str(result.exception)


@pytest.mark.data
def test_vqa_rad_is_whole() -> None:
    section = make.section("vqa-rad", make.published() / "vqa_rad")
    reader = open_reader(section, "vqa", 0)
    report = check_reader(reader, Problems("collect"), {}, ["train", "test"], Reporter())
    assert report.ok
    train, test = report.splits
    assert (test.images, test.texts, test.texts_outside) == (203, 451, 46)
    assert train.known_words == 1.0
    assert test.known_words is not None
    # Words of the test questions that training has too, counted here by another rule (split at spaces).
    assert 0.97 < test.known_words < 1.0
