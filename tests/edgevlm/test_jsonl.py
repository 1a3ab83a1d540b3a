"""Own data in JSON lines."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from edgevlm.artifacts import Labels
from edgevlm.data.check import check
from edgevlm.data.jsonl import JsonLines, Record
from edgevlm.data.problems import Problems
from edgevlm.data.sample import Sample
from edgevlm.data.shards import Shard
from edgevlm.errors import DataError, RecipeError
from tests.edgevlm import dataset_folders as make
from tests.edgevlm.dataset_folders import HEIGHT, WIDTH, write_json, write_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    make.own_data(tmp_path)
    return tmp_path


def test_a_record_becomes_a_sample(own: Path) -> None:
    reader = JsonLines(str(own), "vqa")
    assert reader.splits == ("train", "val", "test")
    assert reader.labels == Labels(classes=("cup", "table"), attributes=("red",), answers=("1", "cup"))
    first, second = reader.samples("train")
    assert (first.id, second.id) == ("r0", "r1")
    np.testing.assert_array_equal(first.boxes, [[0, 0, 10, 10], [5, 5, WIDTH, HEIGHT]])
    assert (first.classes.tolist(), first.attributes) == ([0, 1], ((0,), ()))
    assert first.captions == ("a red cup on a table",)
    assert [(text.answer, text.answers, text.kind) for text in first.texts] == [
        ("cup", (), "object"),
        ("1", ("one", "1", "two"), "count"),
    ]
    assert second.image.getpixel((0, 0)) == (1, 0, 0)


def test_each_task_sees_its_texts(own: Path) -> None:
    answers = {}
    for task in ("reasoning", "entailment", "captioning"):
        reader = JsonLines(str(own), task)
        answers[task] = [text.answer for text in next(reader.samples("test")).texts]
    assert answers == {"reasoning": ["true"], "entailment": ["neutral"], "captioning": []}
    assert JsonLines(str(own), "reasoning").labels.answers == ("false", "true")
    with pytest.raises(RecipeError, match="no task 'vqs'"):
        JsonLines(str(own), "vqs")


def test_splits_by_file_and_pairs(tmp_path: Path) -> None:
    make.pictures(tmp_path, ["a.png", "b.png"])
    record = {"image": "a.png", "second": str(tmp_path / "b.png"), "sentences": [{"sentence": "same?", "label": False}]}
    write_lines(tmp_path / "train.jsonl", [record | {"id": "1"}, "", record | {"id": "2", "split": "hard"}])
    write_lines(tmp_path / "dev.jsonl", [record | {"id": "3"}])
    reader = JsonLines(str(tmp_path), "reasoning")
    assert reader.splits == ("train", "dev", "hard")
    (sample,) = reader.samples("hard")
    assert sample.id == "2"
    assert sample.second is not None
    assert JsonLines(str(tmp_path / "dev.jsonl"), "reasoning").splits == ("dev",)


def test_packed_files(own: Path) -> None:
    plain = [sample.id for sample in JsonLines(str(own), "vqa").samples("train")]
    (own / "data.jsonl.gz").write_bytes(gzip.compress((own / "data.jsonl").read_bytes()))
    (own / "data.jsonl").unlink()
    assert [sample.id for sample in JsonLines(str(own), "vqa").samples("train")] == plain == ["r0", "r1"]


def test_closed_lists_can_be_given(own: Path) -> None:
    write_json(own / "labels.json", {"classes": ["table"], "answers": ["cup", "1", "2"]})
    problems = Problems("collect")
    reader = JsonLines(str(own), "vqa", problems)
    assert reader.labels == Labels(classes=("table",), attributes=("red",), answers=("cup", "1", "2"))
    sample = next(reader.samples("train"))
    np.testing.assert_array_equal(sample.boxes, [[5, 5, WIDTH, HEIGHT]])
    (problem,) = problems.found
    assert str(problem) == f"{own}/data.jsonl:1: the class 'cup' of box 1 is not in the list of classes"
    write_json(own / "labels.json", {"answers": ["1", "1"]})
    with pytest.raises(DataError, match=r"labels\.json: '1' stands twice"):
        JsonLines(str(own), "vqa")
    write_json(own / "labels.json", {"anwsers": ["1"]})
    with pytest.raises(DataError, match=r"labels\.json:1: anwsers"):
        JsonLines(str(own), "vqa")


def test_answers_that_training_never_gives_count_as_wrong(own: Path) -> None:
    rows = [json.loads(line) for line in (own / "data.jsonl").open()]
    rows[4]["questions"][0]["answer"] = "teapot"
    write_lines(own / "data.jsonl", rows)
    text = next(JsonLines(str(own), "vqa").samples("test")).texts[0]
    assert (text.answer, text.answers) == ("teapot", ("teapot",)), "with annotators: it may be outside the list"
    report = check(str(own))
    assert report.ok
    assert {total.split: total.texts_outside for total in report.splits} == {"train": 0, "val": 0, "test": 1}


def test_the_schema_in_the_docs_is_the_readers() -> None:
    written = json.loads((ROOT / "docs" / "data_format.schema.json").read_text())
    assert written == Record.model_json_schema(), "put what `Record.model_json_schema()` gives there"


def test_the_example_in_the_docs_is_a_record() -> None:
    text = (ROOT / "docs" / "data_format.md").read_text()
    example = text.split("```jsonl\n")[1].split("```")[0]
    assert [Record.model_validate_json(line).split for line in example.splitlines()] == ["train", "val"]


def test_parts_add_up_for_own_data(own: Path) -> None:
    reader = JsonLines(str(own), "vqa")
    parts: list[list[Sample]] = [list(reader.samples("train", None, Shard(rank, 3))) for rank in range(3)]
    assert [[sample.id for sample in part] for part in parts] == [["r0"], ["r1"], []]
