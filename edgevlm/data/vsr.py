"""VSR (Liu et al., TACL 2023): does a caption say truly how two objects of a photograph lie to each other?

The annotations are lines of JSON, read line by line so that errors can name the line.
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

STORED = {"train": "train.jsonl", "val": "dev.jsonl", "test": "test.jsonl"}
ANSWERS = ("false", "true")
WHERE = (
    "Get train.jsonl, dev.jsonl and test.jsonl (random or zeroshot split) from "
    "https://github.com/cambridgeltl/visual-spatial-reasoning, and COCO's images (docs/data_format.md shows the folder)"
)


class Record(BaseModel):
    """One line; other keys of the release are ignored."""

    image: Annotated[str, Field(min_length=1)]
    caption: str
    label: Literal[0, 1]
    relation: str = ""


class VSR:
    """Reader of VSR, task `reasoning`; one sample per image with all its captions, the kind is the relation.

    Args:
        path: the folder, or its fsspec URL.
        task: must be `reasoning`.
        problems: gets the bad records.

    Raises:
        RecipeError: another task.
        DataError: a file is missing.
    """

    name = "vsr"
    splits = tuple(STORED)
    labels = Labels(classes=(), attributes=(), answers=ANSWERS)

    def __init__(self, path: str, task: str, problems: Problems | None = None) -> None:
        require_task(self.name, task, ("reasoning",))
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
            if (record := parse(Record, line, place, number, self.problems)) is not None:
                names = tuple(f"{part}/{record.image}" for part in ("images", "train2017", "val2017", "trainval2017"))
                text = Text(record.caption, ANSWERS[record.label], (), record.relation)
                yield Entry(record.image.rpartition(".")[0], names, place, number, texts=((text, number),))
