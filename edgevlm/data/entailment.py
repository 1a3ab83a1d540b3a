"""SNLI-VE (Xie et al., 2019): does a photograph entail a sentence, contradict it, or leave it open?

The annotations are lines of JSON, read line by line so that errors can name the line; the images are Flickr30k's.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from edgevlm.artifacts import Labels
from edgevlm.data.entries import Entry, group_by_id, make_samples, parse, require_split, require_task
from edgevlm.data.folders import Folder
from edgevlm.data.problems import Problems
from edgevlm.data.sample import Sample, Text
from edgevlm.data.shards import WHOLE, Shard

STORED = {"train": "snli_ve_train.jsonl", "val": "snli_ve_dev.jsonl", "test": "snli_ve_test.jsonl"}
ANSWERS = ("contradiction", "neutral", "entailment")
NO_LABEL = "-"
"""Where the annotators did not agree."""
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
WHERE = (
    "Make snli_ve_{train,dev,test}.jsonl as https://github.com/necla-ml/SNLI-VE says, and ask for Flickr30k's images "
    "(docs/data_format.md shows the folder)"
)


class Record(BaseModel):
    """One line; other keys of the release are ignored."""

    Flickr30K_ID: Annotated[str, Field(min_length=1)]
    sentence2: str
    """The hypothesis; `sentence1` is a caption, which the image replaces."""
    gold_label: Literal["contradiction", "neutral", "entailment", "-"]


class SNLIVE:
    """Reader of SNLI-VE, task `entailment`; one sample per image with all its hypotheses.

    Sentences without an agreed label are left out and counted.

    Args:
        path: the folder, or its fsspec URL.
        task: must be `entailment`.
        problems: gets the bad records.

    Raises:
        RecipeError: another task.
        DataError: a file is missing.
    """

    name = "snli-ve"
    splits = tuple(STORED)
    labels = Labels(classes=(), attributes=(), answers=ANSWERS)

    def __init__(self, path: str, task: str, problems: Problems | None = None) -> None:
        require_task(self.name, task, ("entailment",))
        self.problems = problems or Problems()
        self.folder = Folder(path)
        self.folder.require(*STORED.values(), where=WHERE)

    def samples(self, split: str, limit: int | None = None, shard: Shard = WHOLE) -> Iterator[Sample]:
        """The first `limit` images of a split; of them, those of one part.

        Raises:
            DataError: an unknown split, or a bad record if that is the policy.
        """
        require_split(self.name, split, self.splits)
        entries = group_by_id(self._entries(STORED[split]))
        yield from make_samples(entries, self.folder, self.labels, self.problems, limit, shard)

    def _entries(self, file: str) -> Iterator[Entry]:
        place = self.folder.place(file)
        for number, line in self.folder.lines(file):
            if (record := parse(Record, line, place, number, self.problems)) is None:
                continue
            if record.gold_label == NO_LABEL:
                self.problems.leave_out("sentence without an agreed label")
                continue
            image_id = record.Flickr30K_ID.removesuffix(".jpg")
            names = tuple(f"{part}/{image_id}.jpg" for part in IMAGE_FOLDERS)
            text = Text(record.sentence2, record.gold_label)
            yield Entry(image_id, names, place, number, texts=((text, number),))
