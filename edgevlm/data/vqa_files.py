"""The files of VQAv2, VQA-RAD, GQA and Visual Genome QA, and how each dataset is divided."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator

from edgevlm.data.entries import expect, held_out, parse
from edgevlm.data.folders import Folder
from edgevlm.data.problems import Problems
from edgevlm.data.vqa import Asked, Layout

RARE = 9
"""An answer of VQAv2 or Visual Genome enters the closed list from this count on (3,129 answers of VQAv2 train + val)."""


def _words(rows: Any) -> Any:
    """What each annotator said: an object per answer would take gigabytes for the 4.4 million of VQAv2."""
    return [row.get("answer") if isinstance(row, dict) else row for row in rows] if isinstance(rows, list) else rows


class _Annotation(BaseModel):
    question_id: int
    answers: Annotated[tuple[str, ...], BeforeValidator(_words)]
    answer_type: str = ""


class _Question(BaseModel):
    question_id: int
    image_id: int
    question: str


class _Rad(BaseModel):
    qid: int | str
    image_name: str
    question: str
    answer: str | int | float
    answer_type: str = ""


class _Types(BaseModel):
    structural: str = ""


class _Gqa(BaseModel):
    imageId: str
    question: str
    answer: str
    isBalanced: bool = True
    types: _Types = _Types()


class _Pair(BaseModel):
    image_id: int
    question: str
    answer: str


def read_vqav2(folder: Folder, split: str, problems: Problems) -> Iterator[Asked]:
    """VQAv2 (Goyal et al., CVPR 2017): ten annotators per question; kinds `yes/no`, `number`, `other`.

    The answers of the official test are secret. `test` is therefore the official validation split (val2014), and `val`
    is held out of the training images.
    """
    official = "val2014" if split == "test" else "train2014"
    questions_file = f"v2_OpenEnded_mscoco_{official}_questions.json"
    annotations_file = f"v2_mscoco_{official}_annotations.json"
    place, answers_place = folder.place(questions_file), folder.place(annotations_file)
    rows = expect(folder.json(annotations_file), dict, answers_place, "an object with 'annotations'")
    annotations: dict[int, _Annotation] = {}
    for i, row in enumerate(expect(rows.get("annotations"), list, answers_place, "a list 'annotations'")):
        if annotation := parse(_Annotation, row, answers_place, f"annotations[{i}]", problems):
            annotations[annotation.question_id] = annotation
    del rows  # 4 million answers as dictionaries take gigabytes
    rows = expect(folder.json(questions_file), dict, place, "an object with 'questions'")
    rows = expect(rows.get("questions"), list, place, "a list 'questions'")
    images = held_out((str(row.get("image_id")) for row in rows if isinstance(row, dict)), "vqav2")
    seen: dict[int, int] = {}
    for i, row in enumerate(rows):
        where = f"questions[{i}]"
        if (question := parse(_Question, row, place, where, problems)) is None:
            continue
        if split != "test" and (str(question.image_id) in images) != (split == "val"):
            continue
        if (first := seen.setdefault(question.question_id, i)) != i:
            what = f"question {question.question_id} was asked at questions[{first}]"
            problems.report("duplicate id", place, where, what)
            continue
        annotation = annotations.get(question.question_id)
        if annotation is None or not annotation.answers:
            what = f"question {question.question_id} has no answer in {answers_place}"
            problems.report("malformed record", place, where, what)
            continue
        names, kind = coco_names(question.image_id, official), annotation.answer_type
        yield Asked(str(question.image_id), names, question.question, annotation.answers, kind, place, where)


def coco_names(image_id: int, folder_2014: str) -> tuple[str, ...]:
    """Where an image of COCO may lie: the folders of 2014, those of 2017, or all in `images/`."""
    old, new = f"COCO_{folder_2014}_{image_id:012}.jpg", f"{image_id:012}.jpg"
    return (
        f"{folder_2014}/{old}",
        f"images/{folder_2014}/{old}",
        f"train2017/{new}",
        f"val2017/{new}",
        f"images/{old}",
        f"images/{new}",
    )


def read_vqa_rad(folder: Folder, split: str, problems: Problems) -> Iterator[Asked]:
    """VQA-RAD (Lau et al., Scientific Data 2018), clinicians' questions about radiology; kinds `open` and `closed`.

    The official test asks new questions, but about images of the training split. `val` is held out by image.
    """
    name = "testset.json" if split == "test" else "trainset.json"
    place = folder.place(name)
    rows = expect(folder.json(name), list, place, "a list of questions")
    images = held_out((str(row.get("image_name")) for row in rows if isinstance(row, dict)), "vqa-rad")
    seen: dict[str, int] = {}
    for i, row in enumerate(rows):
        if (record := parse(_Rad, row, place, f"[{i}]", problems)) is None:
            continue
        if split != "test" and (record.image_name in images) != (split == "val"):
            continue
        if (first := seen.setdefault(str(record.qid), i)) != i:
            problems.report("duplicate id", place, f"[{i}]", f"qid {record.qid} was used at [{first}]")
            continue
        kind = record.answer_type.strip().lower()  # two records say "CLOSED "
        image_id = record.image_name.rpartition(".")[0] or record.image_name
        names = (f"images/{record.image_name}", record.image_name)
        yield Asked(image_id, names, record.question, (str(record.answer),), kind, place, f"[{i}]")


def read_gqa(folder: Folder, split: str, problems: Problems) -> Iterator[Asked]:
    """GQA (Hudson and Manning, CVPR 2019), balanced questions; kinds are its structural types (`query`, `verify`, ...).

    `test` is testdev, which has public answers.
    """
    official = {"test": "testdev"}.get(split, split)
    name = f"{official}_balanced_questions.json"
    place = folder.place(name)
    for key, row in expect(folder.json(name), dict, place, "questions by their ids").items():
        if (record := parse(_Gqa, row, place, key, problems)) is None:
            continue
        if not record.isBalanced:
            problems.leave_out("question of GQA's unbalanced set")
            continue
        names, kind = (f"images/{record.imageId}.jpg",), record.types.structural
        yield Asked(record.imageId, names, record.question, (record.answer,), kind, place, key)


def read_genome_qa(folder: Folder, split: str, problems: Problems) -> Iterator[Asked]:
    """Visual Genome's question answers (Krishna et al., 2017); the kind is the question's first word.

    It has no official splits: a twentieth of the images each are held out as `val` and `test`.
    """
    name = "question_answers.json"
    place = folder.place(name)
    rows = expect(folder.json(name), list, place, "a list of images with 'qas'")
    wanted = genome_split((str(row.get("id")) for row in rows if isinstance(row, dict)), split)
    for i, row in enumerate(rows):
        pairs = row.get("qas") if isinstance(row, dict) else None
        if not isinstance(pairs, list):
            problems.report("malformed record", place, f"[{i}]", "no list 'qas'")
            continue
        if str(row.get("id")) not in wanted:
            continue
        for j, pair in enumerate(pairs):
            where = f"[{i}].qas[{j}]"
            if (record := parse(_Pair, pair, place, where, problems)) is not None:
                kind = (record.question.lower().split() or [""])[0]
                names = genome_names(record.image_id)
                yield Asked(str(record.image_id), names, record.question, (record.answer,), kind, place, where)


def genome_names(image_id: int) -> tuple[str, ...]:
    """Where an image of Visual Genome may lie: in either of the two published folders."""
    return (f"VG_100K/{image_id}.jpg", f"VG_100K_2/{image_id}.jpg", f"images/{image_id}.jpg")


def genome_split(image_ids: Iterator[str], split: str) -> set[str]:
    """The images of one of our splits of Visual Genome, the same for all its annotations."""
    every = set(image_ids)
    evaluated = held_out(every, "visual-genome", 0.1)
    test = held_out(evaluated, "visual-genome-test", 0.5)
    return {"test": test, "val": evaluated - test}.get(split, every - evaluated)


THREE = ("train", "val", "test")

VQAV2 = Layout(
    name="vqav2",
    splits=THREE,
    files=tuple(
        name
        for part in ("train2014", "val2014")
        for name in (f"v2_OpenEnded_mscoco_{part}_questions.json", f"v2_mscoco_{part}_annotations.json")
    ),
    source="Get questions, annotations and COCO's 2014 images from https://visualqa.org/download.html",
    read=read_vqav2,
    min_count=RARE,
)
VQA_RAD = Layout(
    name="vqa-rad",
    splits=THREE,
    files=("trainset.json", "testset.json"),
    source="Get VQA-RAD from https://osf.io/89kps, divided as in MEVF's release",
    read=read_vqa_rad,
)
GQA = Layout(
    name="gqa",
    splits=THREE,
    files=tuple(f"{part}_balanced_questions.json" for part in ("train", "val", "testdev")),
    source="Get the questions (1.2) and images from https://cs.stanford.edu/people/dorarad/gqa/download.html",
    read=read_gqa,
)
GENOME_QA = Layout(
    name="visual-genome-qa",
    splits=THREE,
    files=("question_answers.json",),
    source="Get question_answers.json and the images from https://homes.cs.washington.edu/~ranjay/visualgenome",
    read=read_genome_qa,
    min_count=RARE,
)
LAYOUTS = {layout.name: layout for layout in (VQAV2, VQA_RAD, GQA, GENOME_QA)}
"""Dataset name -> layout."""
