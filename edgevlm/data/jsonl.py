"""Your own data: one JSON object per line beside a folder of images; the schema is in docs/data_format.md.

The lines are read one by one, not through `datasets`: an error can then name the line, and records need not all have
the same keys and types, as Arrow's columns must.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from edgevlm.artifacts import Labels
from edgevlm.data.answers import agreed_answer, build_answers, spellings
from edgevlm.data.entries import Entry, make_sample, make_samples, parse, require_split, require_task, unique
from edgevlm.data.folders import Folder
from edgevlm.data.problems import Problems
from edgevlm.data.sample import Sample, Text
from edgevlm.data.shards import WHOLE, Shard
from edgevlm.errors import DataError

LABELS = "labels.json"
TASKS = ("detection", "vqa", "reasoning", "entailment", "captioning", "retrieval", "pretraining")
SENTENCE_ANSWERS = {"reasoning": ("false", "true"), "entailment": ("contradiction", "neutral", "entailment")}
WHERE = "docs/data_format.md shows the folder: *.jsonl with one record per line, and the images"
USUAL_SPLITS = ("train", "val", "test")

Words = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Question(_Strict):
    """A question with one right answer, or with what several people answered."""

    question: str
    answer: str | None = None
    """The right answer, verbatim one of the closed list."""
    answers: list[str] = []
    """What each annotator said; compared by the rules of the official VQA accuracy."""
    kind: str = ""
    """Type of question, for a breakdown of the accuracy."""

    @model_validator(mode="after")
    def _answered(self) -> "Question":
        if (self.answer is None) == (not self.answers):
            raise ValueError("give either 'answer' or 'answers'")
        return self


class Sentence(_Strict):
    """A sentence that is true or false of the image (task `reasoning`), or how the image bears on it (`entailment`)."""

    sentence: str
    label: StrictBool | Literal["contradiction", "neutral", "entailment"]
    kind: str = ""
    """Type of sentence, for a breakdown of the accuracy."""


class Record(_Strict):
    """One line: an image (or a pair) and what is known about it."""

    id: Words
    """Unique in the dataset."""
    image: Words
    """Path relative to the file, absolute path, or fsspec URL."""
    second: Words | None = None
    """The right-hand image, where the sentences are about a pair."""
    split: Words | None = None
    """`train`, `val`, `test` or another; default: the name of the file without its ending (`data`: `train`)."""
    boxes: list[Annotated[list[float], Field(min_length=4, max_length=4)]] = []
    """Per object: x1, y1, x2, y2 in pixels of the image, from its top left corner."""
    classes: list[str] = []
    """Per object: its class."""
    attributes: list[list[str]] = []
    """Per object: its attributes; may be left out."""
    captions: list[str] = []
    questions: list[Question] = []
    sentences: list[Sentence] = []

    @model_validator(mode="after")
    def _equal_lengths(self) -> "Record":
        if len(self.boxes) != len(self.classes) or (self.attributes and len(self.attributes) != len(self.boxes)):
            lengths = f"{len(self.boxes)} boxes, {len(self.classes)} classes, {len(self.attributes)} attribute lists"
            raise ValueError(f"{lengths}: give one of each per object")
        return self


class GivenLabels(_Strict):
    """`labels.json`: closed lists. Without one, whatever the training split contains is the list."""

    classes: tuple[str, ...] | None = None
    attributes: tuple[str, ...] | None = None
    answers: tuple[str, ...] | None = None


class JsonLines:
    """Reader of your own data, any task; one sample per line.

    Args:
        path: a folder with `*.jsonl` (or `.jsonl.gz`), one such file, or the fsspec URL of either.
        task: decides which texts are answered; None = questions and sentences alike (to check them).
        problems: gets the bad records.

    Raises:
        RecipeError: another task.
        DataError: there is no such file, or `labels.json` is malformed.
    """

    name = "jsonl"

    def __init__(self, path: str, task: str | None, problems: Problems | None = None) -> None:
        if task is not None:
            require_task(self.name, task, TASKS)
        self.task = task
        self.problems = problems or Problems()
        single = path.endswith((".jsonl", ".jsonl.gz"))
        parent, _, name = path.rpartition("/") if single else (path, "", "")
        self.folder = Folder(parent or ".")
        self.folder.require(*((name,) if single else ()), where=WHERE)
        self.files = [name] if single else [*self.folder.find("*.jsonl"), *self.folder.find("*.jsonl.gz")]
        if not self.files:
            raise DataError(f"{self.folder.name} has no .jsonl file", WHERE)
        self._tables: dict[str, list[Entry]] = {}
        self._first_use: dict[str, tuple[str, int]] = {}
        self.labels, self.splits = self._survey()

    def samples(self, split: str, limit: int | None = None, shard: Shard = WHOLE) -> Iterator[Sample]:
        """The first `limit` records of a split; of them, those of one part.

        Raises:
            DataError: an unknown split, or a bad record if that is the policy.
        """
        require_split(self.name, split, self.splits)
        yield from make_samples(self._entries(split), self.folder, self.labels, self.problems, limit, shard)

    def num_samples(self, split: str, limit: int | None) -> int:
        """Records of a split, at most `limit`; those with a bad image included."""
        total = len(self._table(split))
        return total if limit is None else min(limit, total)

    def sample(self, split: str, index: int) -> Sample:
        """One sample by itself; if its image is bad and bad records are skipped, the next one instead."""
        return make_sample(self._table(split), index, self.folder, self.labels, self.problems)

    def _table(self, split: str) -> list[Entry]:
        """The entries of a split, images unopened; read once."""
        require_split(self.name, split, self.splits)
        if split not in self._tables:
            self._tables[split] = list(unique(self._entries(split), self.problems))
        return self._tables[split]

    def _survey(self) -> tuple[Labels, tuple[str, ...]]:
        """One pass over the lines, images unopened: which splits there are, which labels, and where ids were used."""
        given = GivenLabels()
        if self.folder.has(LABELS):
            place = self.folder.place(LABELS)
            given = parse(GivenLabels, self.folder.text(LABELS), place, 1, Problems("stop")) or given
            lists = [names for names in given.model_dump().values() if names]
            if twice := [name for names in lists for name in names if names.count(name) > 1]:
                raise DataError(f"{place}: '{twice[0]}' stands twice", "Remove one: the position of a name is its id")
        splits: dict[str, None] = {}
        classes, attributes, answers = Counter[str](), Counter[str](), Counter[str]()
        for file, number, record in self._records(Problems("collect")):
            self._first_use.setdefault(record.id, (file, number))
            split = record.split or _split_of(file)
            splits[split] = None
            if split == "train":
                classes.update(record.classes)
                attributes.update(tag for tags in record.attributes for tag in tags)
                answers.update(item.answer or agreed_answer(item.answers) for item in record.questions)
        self._answers_given = given.answers is not None
        listed = build_answers(answers.elements(), 1) if given.answers is None else given.answers
        if self.task is None:
            listed = tuple(dict.fromkeys((*listed, *(word for words in SENTENCE_ANSWERS.values() for word in words))))
        labels = Labels(
            classes=tuple(sorted(classes)) if given.classes is None else given.classes,
            attributes=tuple(sorted(attributes)) if given.attributes is None else given.attributes,
            answers=SENTENCE_ANSWERS.get(self.task or "", listed),
        )
        usual = [split for split in USUAL_SPLITS if split in splits]
        return labels, (*usual, *(split for split in splits if split not in usual))

    def _records(self, problems: Problems) -> Iterator[tuple[str, int, Record]]:
        for file in self.files:
            for number, line in self.folder.lines(file):
                if (record := parse(Record, line, self.folder.place(file), number, problems)) is not None:
                    yield file, number, record

    def _entries(self, split: str) -> Iterator[Entry]:
        spelled, listed = spellings(self.labels.answers), frozenset(self.labels.answers)
        for file, number, record in self._records(self.problems):
            if (record.split or _split_of(file)) != split:
                continue
            place = self.folder.place(file)
            first = self._first_use[record.id]
            if first != (file, number):
                used = f"{self.folder.place(first[0])}:{first[1]}"
                self.problems.report("duplicate id", place, number, f"id '{record.id}' was used at {used}")
                continue
            kept, classes, attributes = self._objects(record, place, number)
            texts = self._texts(record, spelled, listed)
            yield Entry(
                id=record.id,
                image=(record.image,),
                file=place,
                where=number,
                boxes=np.array([record.boxes[i] for i in kept], np.float64).reshape(-1, 4),
                classes=classes,
                attributes=attributes,
                texts=tuple((text, f"{number}:{where}") for text, where in texts),
                captions=tuple((caption, f"{number}:captions[{i}]") for i, caption in enumerate(record.captions)),
                second=(record.second,) if record.second else (),
            )

    def _objects(
        self, record: Record, place: str, number: int
    ) -> tuple[list[int], tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Objects of a known class: their indices in the record, their classes and their known attributes."""
        class_ids = {name: i for i, name in enumerate(self.labels.classes)}
        tag_ids = {name: i for i, name in enumerate(self.labels.attributes)}
        kept, classes, attributes = [], [], []
        for i, name in enumerate(record.classes):
            if name not in class_ids:
                what = f"the class '{name}' of box {i + 1} is not in the list of classes"
                self.problems.report("outside the list", place, number, what)
                continue
            tags = record.attributes[i] if record.attributes else []
            for tag in tags:
                if tag not in tag_ids:
                    what = f"the attribute '{tag}' of box {i + 1} is not in the list of attributes"
                    self.problems.report("outside the list", place, number, what)
            kept.append(i)
            classes.append(class_ids[name])
            attributes.append(tuple(tag_ids[tag] for tag in tags if tag in tag_ids))
        return kept, tuple(classes), tuple(attributes)

    def _texts(self, record: Record, spelled: Mapping[str, str], listed: Collection[str]) -> Iterator[tuple[Text, str]]:
        """The texts of the task, with their places in the record; both arguments are the list of answers."""
        for i, item in enumerate(record.questions if self.task in (None, "vqa") else ()):
            said = tuple(item.answers)
            answer = agreed_answer(said, spelled) if item.answer is None else item.answer
            if answer not in listed and not self._answers_given:
                # An answer that training never gives is no mistake of the record: no model knows it, so it counts.
                said = said or (answer,)
            yield Text(item.question, answer, (), item.kind, said), f"questions[{i}]"
        for i, item in enumerate(record.sentences):
            wanted = {"reasoning": bool, "entailment": str, None: object}.get(self.task)
            if wanted is not None and isinstance(item.label, wanted):
                answer = item.label if isinstance(item.label, str) else str(item.label).lower()
                yield Text(item.sentence, answer, (), item.kind), f"sentences[{i}]"


def _split_of(file: str) -> str:
    name = file.partition(".")[0]
    return "train" if name == "data" else name
