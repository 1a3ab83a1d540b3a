"""Readers of questions and sentences about images: hand-made folders, and the annotation files as published."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgevlm.data import open_reader
from edgevlm.data.entailment import SNLIVE
from edgevlm.data.nlvr2 import NLVR2
from edgevlm.data.sample import Sample
from edgevlm.data.vqa import VisualQuestions
from edgevlm.data.vqa_files import GENOME_QA, GQA, VQA_RAD, VQAV2
from edgevlm.data.vsr import VSR
from tests.edgevlm import dataset_folders as make
from tests.edgevlm.dataset_folders import picture, pictures, write_json, write_lines


@pytest.fixture
def published() -> Path:
    return make.published()


@pytest.fixture
def vqav2(tmp_path: Path) -> Path:
    return make.vqav2_example(tmp_path)


@pytest.fixture
def nlvr2(tmp_path: Path) -> Path:
    return make.nlvr2_example(tmp_path)


def ids(samples: Iterator[Sample]) -> list[str]:
    return [sample.id for sample in samples]


def test_vqav2_groups_questions_by_image(vqav2: Path) -> None:
    reader = VisualQuestions(str(vqav2), "vqa", VQAV2)
    assert reader.labels.answers == ("net",), "'2' is the majority of one question: fewer than nine"
    train, val = ids(reader.samples("train")), ids(reader.samples("val"))
    assert not set(train) & set(val)
    assert sorted(map(int, train + val)) == list(range(1, 25))
    assert len(val) == 2, "8 % of 24 images"
    by_id = {sample.id: sample for split in ("train", "val") for sample in reader.samples(split)}
    first, second = by_id["1"].texts
    assert (first.text, first.answer, first.kind) == ("what is 1?", "net", "other")
    assert first.answers == ("a Net",) * 9 + ("two",), "as written: the official accuracy wants them so"
    assert (second.text, second.answer) == ("how many?", "2")


def test_questions_without_a_known_answer_stay(vqav2: Path) -> None:
    test = list(VisualQuestions(str(vqav2), "vqa", VQAV2).samples("test"))
    assert [text.answer for sample in test for text in sample.texts] == ["net", "nobody"]


def test_a_given_list_decides_which_answer_is_meant(vqav2: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "list.json", ["pitcher", "mesh"])
    section = make.section("vqav2", vqav2, answers=str(tmp_path / "list.json"))
    reader = open_reader(section, "vqa", 0)
    assert reader.labels.answers == ("pitcher", "mesh")
    assert next(reader.samples("test")).texts[0].answer == "mesh", "the first of the list's answers to be said"


def test_images_of_the_2017_release_are_found(vqav2: Path) -> None:
    shutil.rmtree(vqav2 / "val2014")
    pictures(vqav2, ["train2017/000000000090.jpg", "val2017/000000000091.jpg"])
    assert ids(VisualQuestions(str(vqav2), "vqa", VQAV2).samples("test")) == ["90", "91"]


def test_gqa_reads_balanced_questions(tmp_path: Path) -> None:
    def question(image: str, balanced: bool = True) -> dict[str, object]:
        types = {"structural": "query", "semantic": "rel"}
        return {"imageId": image, "question": "What?", "answer": "sky", "isBalanced": balanced, "types": types}

    for part in ("train", "val", "testdev"):
        write_json(tmp_path / f"{part}_balanced_questions.json", {"1": question("n1"), "2": question("n1", False)})
    picture(tmp_path / "images/n1.jpg")
    reader = VisualQuestions(str(tmp_path), "vqa", GQA)
    (sample,) = reader.samples("test")
    assert [(text.answer, text.kind, text.answers) for text in sample.texts] == [("sky", "query", ("sky",))]
    assert reader.problems.left_out == {"question of GQA's unbalanced set": 1}


@pytest.mark.data
def test_published_vqav2_questions(published: Path, tmp_path: Path) -> None:
    source = published / "loader_samples/allennlp/vqav2"
    for part in ("train2014", "val2014"):
        shutil.copy(source / "questions.json", tmp_path / f"v2_OpenEnded_mscoco_{part}_questions.json")
        shutil.copy(source / "annotations.json", tmp_path / f"v2_mscoco_{part}_annotations.json")
    picture(tmp_path / "val2014/COCO_val2014_000000458752.jpg")
    answers = str(published / "vocab/vqa2_label2ans_3129.json")
    (sample,) = VisualQuestions(str(tmp_path), "vqa", VQAV2, answers).samples("test")
    assert sample.id == "458752"
    assert [(text.text, text.answer, len(text.answers)) for text in sample.texts] == [
        ("What is this photo taken looking through?", "net", 10),
        ("What position is this man playing?", "pitcher", 10),
        ("What color is the players shirt?", "orange", 10),
    ]


@pytest.mark.data
def test_published_gqa_questions(published: Path, tmp_path: Path) -> None:
    for part in ("train", "val", "testdev"):
        source = published / "loader_samples/allennlp/gqa/questions.json"
        shutil.copy(source, tmp_path / f"{part}_balanced_questions.json")
    picture(tmp_path / "images/n578564.jpg")
    (sample,) = VisualQuestions(str(tmp_path), "vqa", GQA, str(published / "vocab/gqa_label2ans.json")).samples("val")
    (text,) = sample.texts
    assert (text.text, text.answer, text.kind) == ("What is hanging above the chalkboard?", "picture", "query")


@pytest.mark.data
def test_published_genome_questions(published: Path, tmp_path: Path) -> None:
    shutil.copy(published / "loader_samples/allennlp/vgqa/question_answers.json", tmp_path)
    pictures(tmp_path, ["VG_100K/4.jpg", "VG_100K_2/5.jpg"])
    reader = VisualQuestions(str(tmp_path), "vqa", GENOME_QA)
    found = {sample.id: sample for split in reader.splits for sample in reader.samples(split)}
    assert {key: len(sample.texts) for key, sample in found.items()} == {"4": 5, "5": 3}
    assert [(text.answer, text.kind) for text in found["4"].texts][:2] == [("sailboats", "what"), ("in room", "where")]


@pytest.mark.data
def test_published_vqa_rad(published: Path) -> None:
    reader = VisualQuestions(str(published / "vqa_rad"), "vqa", VQA_RAD)
    splits = {split: list(reader.samples(split)) for split in reader.splits}
    texts = {split: [text for sample in samples for text in sample.texts] for split, samples in splits.items()}
    assert len(texts["train"]) + len(texts["val"]) == 3064
    assert not {sample.id for sample in splits["train"]} & {sample.id for sample in splits["val"]}
    kinds = [text.kind for text in texts["test"]]
    assert (kinds.count("closed"), kinds.count("open"), len(kinds)) == (272, 179, 451)
    assert {text.answer for text in texts["train"]} == set(reader.labels.answers)
    # Answers are typed freely, so a tenth of the test's were never given in training. No model can give them.
    assert sum(text.answer not in reader.labels.answers for text in texts["test"]) == 46


def test_nlvr2_brings_both_pictures(nlvr2: Path) -> None:
    reader = NLVR2(str(nlvr2), "reasoning")
    first, second = reader.samples("dev")
    assert (first.id, second.id) == ("dev-1-0-0", "dev-1-0-1")
    assert [(text.answer, text.kind) for text in (*first.texts, *second.texts)] == [("true", ""), ("false", "balanced")]
    assert first.image.getpixel((0, 0)) == (0, 0, 0)
    assert first.second is not None
    assert first.second.getpixel((0, 0)) == (0, 0, 1)
    assert ids(reader.samples("test")) == ["test1-0-1-0"]


def test_nlvr2_holds_out_whole_directories(nlvr2: Path) -> None:
    reader = NLVR2(str(nlvr2), "reasoning")
    buckets = {
        split: {int(name.split("-")[1]) % 5 for name in ids(reader.samples(split))} for split in ("train", "val")
    }
    assert len(buckets["val"]) == 1
    assert buckets["train"] == set(range(5)) - buckets["val"]


@pytest.mark.data
def test_published_nlvr2_pairs(published: Path, tmp_path: Path) -> None:
    source = published / "loader_samples"
    shutil.copy(source / "allennlp/nlvr2/tiny-dev.json", tmp_path / "train.json")
    shutil.copy(source / "nlvr2/balanced_dev.json", tmp_path / "dev.json")
    shutil.copy(source / "nlvr2/balanced_test1.json", tmp_path / "test1.json")
    pairs = {json.loads(line)["identifier"].rpartition("-")[0] for line in (tmp_path / "dev.json").open()}
    picture(tmp_path / "one.png")
    (tmp_path / "dev").mkdir()
    for pair in pairs:
        for side in (0, 1):
            (tmp_path / f"dev/{pair}-img{side}.png").hardlink_to(tmp_path / "one.png")
    samples = list(NLVR2(str(tmp_path), "reasoning").samples("dev"))
    answers = [text.answer for sample in samples for text in sample.texts]
    assert len(set(ids(iter(samples)))) == len(answers) == 2300
    assert answers.count("true") == answers.count("false") == 1150, "balanced"


def test_vsr_and_snli_ve_group_by_image(tmp_path: Path) -> None:
    rows = [
        {"image": "000000000001.jpg", "caption": "The dog is on the bed.", "label": 1, "relation": "on", "subj": "dog"},
        {"image": "000000000002.jpg", "caption": "The cat is under it.", "label": 0, "relation": "under"},
        {"image": "000000000001.jpg", "caption": "The bed is on the dog.", "label": 0, "relation": "on"},
    ]
    for name in ("train", "dev", "test"):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    pictures(tmp_path, ["train2017/000000000001.jpg", "images/000000000002.jpg"])
    first, second = VSR(str(tmp_path), "reasoning").samples("val")
    assert [(text.answer, text.kind) for text in first.texts] == [("true", "on"), ("false", "on")]
    assert (second.id, second.texts[0].answer) == ("000000000002", "false")

    rows = [{"Flickr30K_ID": "7", "sentence2": f"s {label}", "gold_label": label} for label in ("neutral", "-")]
    for name in ("train", "dev", "test"):
        write_lines(tmp_path / f"snli_ve_{name}.jsonl", rows)
    picture(tmp_path / "flickr30k-images/7.jpg")
    reader = SNLIVE(str(tmp_path), "entailment")
    (sample,) = reader.samples("test")
    assert [(text.text, text.answer) for text in sample.texts] == [("s neutral", "neutral")]
    assert reader.problems.left_out == {"sentence without an agreed label": 1}


@pytest.mark.data
def test_published_vsr_sentences(published: Path, tmp_path: Path) -> None:
    for name in ("dev", "test"):
        shutil.copy(published / f"loader_samples/vsr_zeroshot/{name}.jsonl", tmp_path)
    shutil.copy(tmp_path / "dev.jsonl", tmp_path / "train.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "dev.jsonl").open()]
    pictures(tmp_path, {f"images/{row['image']}" for row in rows})
    samples = list(VSR(str(tmp_path), "reasoning").samples("val"))
    texts = [text for sample in samples for text in sample.texts]
    assert len(samples) == len({row["image"] for row in rows})
    assert len(texts) == len(rows) == 340
    assert sum(text.answer == "true" for text in texts) == sum(row["label"] for row in rows)


@pytest.mark.data
def test_published_snli_ve_sentences(published: Path, tmp_path: Path) -> None:
    source = published / "loader_samples/allennlp/visual_entailment/sample_pairs.jsonl"
    for name in ("train", "dev", "test"):
        shutil.copy(source, tmp_path / f"snli_ve_{name}.jsonl")
    rows = [json.loads(line) for line in source.open()]
    pictures(tmp_path, {f"flickr30k-images/{row['Flickr30K_ID']}.jpg" for row in rows})
    reader = SNLIVE(str(tmp_path), "entailment")
    found = sorted((text.text, text.answer) for sample in reader.samples("test") for text in sample.texts)
    assert found == sorted((row["sentence2"], row["gold_label"]) for row in rows if row["gold_label"] != "-")
