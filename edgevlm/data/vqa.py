"""Visual question answering: VQAv2, VQA-RAD, GQA and Visual Genome QA, with a closed list of answers.

The datasets differ in their files (`vqa_files.py`); the rest is here: questions grouped by image, so that an image is
decoded and encoded once, what the annotators said, and the closed list from the training answers or a given file.

Their annotations are JSON files of one array (or object) each, up to 1 GB. `datasets` reads such a file whole as well,
and gives no place to name in errors, so it is read with `json`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from edgevlm.artifacts import Labels
from edgevlm.data.answers import agreed_answer, build_answers, parse_answers, spellings
from edgevlm.data.entries import Entry, group_by_id, make_samples, require_split, require_task
from edgevlm.data.folders import Folder
from edgevlm.data.problems import Problems, Where
from edgevlm.data.sample import Sample, Text
from edgevlm.data.shards import WHOLE, Shard


@dataclass(frozen=True)
class Asked:
    """A question as a dataset's files have it."""

    image_id: str
    image: tuple[str, ...]
    """Names that the image may have in the folder."""
    question: str
    said: tuple[str, ...]
    """What each annotator answered, as written."""
    kind: str
    file: str
    where: Where


@dataclass(frozen=True)
class Layout:
    """What sets one of these datasets apart."""

    name: str
    splits: tuple[str, ...]
    files: tuple[str, ...]
    """They must exist."""
    source: str
    """Where to get them."""
    read: Callable[[Folder, str, Problems], Iterator[Asked]]
    """The questions of a split, in the order of the file."""
    min_count: int = 1
    """Training answers that occur less often do not enter the closed list."""


class VisualQuestions:
    """Reader of a dataset of questions about images, task `vqa`.

    `Text.answers` holds what each annotator said; `Text.answer` is what most of them said, normalised as the official
    accuracy does, an answer of the closed list before others. Questions whose answers are not in the list stay in all
    splits: no model with that list can answer them, and the accuracy counts them.

    Args:
        path: the folder, or its fsspec URL.
        task: must be `vqa`.
        layout: which dataset.
        answers: a file with the closed list (JSON list, or one answer per line); None = from the training answers.
        problems: gets the bad records.

    Raises:
        RecipeError: another task.
        DataError: a file is missing.
    """

    def __init__(
        self, path: str, task: str, layout: Layout, answers: str | None = None, problems: Problems | None = None
    ) -> None:
        require_task(layout.name, task, ("vqa",))
        self.name, self.splits, self.layout = layout.name, layout.splits, layout
        self.problems = problems or Problems()
        self.folder = Folder(path)
        self.folder.require(*layout.files, where=f"{layout.source} (docs/data_format.md shows the folder)")
        self._answers = read_answers(answers) if answers is not None else None

    @property
    def labels(self) -> Labels:
        """No classes; the closed list of answers, counted on the first use."""
        return self._labels

    @cached_property
    def _labels(self) -> Labels:
        answers = self._answers
        if answers is None:
            # In silence: the same problems are reported when the split itself is read.
            asked = self.layout.read(self.folder, "train", Problems("collect"))
            answers = build_answers((agreed_answer(item.said) for item in asked if item.said), self.layout.min_count)
        return Labels(classes=(), attributes=(), answers=answers)

    def samples(self, split: str, limit: int | None = None, shard: Shard = WHOLE) -> Iterator[Sample]:
        """The first `limit` images of a split with all their questions; of them, those of one part.

        Raises:
            DataError: an unknown split, or a bad record if that is the policy.
        """
        require_split(self.name, split, self.splits)
        known = spellings(self.labels.answers)
        asked = self.layout.read(self.folder, split, self.problems)
        entries = group_by_id(_entry(item, known) for item in asked)
        yield from make_samples(entries, self.folder, self.labels, self.problems, limit, shard)


def read_answers(path: str) -> tuple[str, ...]:
    """The closed list in a file, local or behind a URL.

    Raises:
        DataError: it is missing or not a list of answers.
    """
    parent, _, name = path.rpartition("/")
    return parse_answers(Folder(parent or ".").text(name), path)


def _entry(item: Asked, known: Mapping[str, str]) -> Entry:
    answer = agreed_answer(item.said, known) if item.said else ""
    text = Text(item.question, answer, (), item.kind, item.said)
    return Entry(item.image_id, item.image, item.file, item.where, texts=((text, item.where),))
