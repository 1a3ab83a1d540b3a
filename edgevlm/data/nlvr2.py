"""NLVR2 (Suhr et al., ACL 2019): is a sentence true of a pair of photographs?

The annotations are lines of JSON, as upstream's `nlvr2/data` has them, read line by line so that errors can name the
line. Both images of a pair go with the sample: `image` on the left, `second` on the right.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from edgevlm.artifacts import Labels
from edgevlm.data.entries import Entry, held_out, make_samples, parse, require_split, require_task
from edgevlm.data.folders import Folder
from edgevlm.data.problems import Problems
from edgevlm.data.sample import Sample, Text
from edgevlm.data.shards import WHOLE, Shard

STORED = {"train": "train", "val": "train", "dev": "dev", "test": "test1"}
"""Split -> file and folder of the release; `test` is the public Test-P."""
SUBSETS = {"dev": "dev", "test": "test1"}
WHERE = (
    "Get train.json, dev.json and test1.json (nlvr2/data) from https://github.com/lil-lab/nlvr, and ask there for the "
    "images (docs/data_format.md shows the folder)"
)


class Record(BaseModel):
    """One line; other keys of the release are ignored."""

    identifier: Annotated[str, Field(pattern=r"^\w+-\d+-\d+-\d+$")]
    sentence: str
    label: Literal["True", "False"]
    directory: int | str = ""
    """Of the training images."""


class NLVR2:
    """Reader of NLVR2, task `reasoning`; one sample per sentence, its id is the identifier.

    `val` is held out of the training split by whole buckets (`directory`). Of evaluation sentences `Text.kind` says
    whether they are in the `balanced` or the `unbalanced` subset, if the files of the subsets lie beside the others.

    Args:
        path: the folder, or its fsspec URL.
        task: must be `reasoning`.
        problems: gets the bad records.

    Raises:
        RecipeError: another task.
        DataError: a file is missing.
    """

    name = "nlvr2"
    splits = tuple(STORED)
    labels = Labels(classes=(), attributes=(), answers=("false", "true"))

    def __init__(self, path: str, task: str, problems: Problems | None = None) -> None:
        require_task(self.name, task, ("reasoning",))
        self.problems = problems or Problems()
        self.folder = Folder(path)
        self.folder.require(*(f"{stored}.json" for stored in dict.fromkeys(STORED.values())), where=WHERE)

    def samples(self, split: str, limit: int | None = None, shard: Shard = WHOLE) -> Iterator[Sample]:
        """The first `limit` pairs of a split; of them, those of one part.

        Raises:
            DataError: an unknown split, or a bad record if that is the policy.
        """
        require_split(self.name, split, self.splits)
        yield from make_samples(self._entries(split), self.folder, self.labels, self.problems, limit, shard)

    def _entries(self, split: str) -> Iterator[Entry]:
        stored = STORED[split]
        place = self.folder.place(f"{stored}.json")
        kinds = self._subsets(split)
        wanted: set[str] | None = None
        if stored == "train":
            buckets = [_bucket(record) for _, record in self._records(stored, Problems("collect"))]
            aside = held_out(buckets, self.name)
            wanted = aside if split == "val" else set(buckets) - aside
        for number, record in self._records(stored, self.problems):
            if wanted is not None and _bucket(record) not in wanted:
                continue
            pair = record.identifier.rpartition("-")[0]
            parts = (f"{stored}/{record.directory}", f"images/{stored}/{record.directory}", stored, f"images/{stored}")
            left, right = (
                tuple(f"{part.rstrip('/')}/{pair}-img{side}.png" for part in dict.fromkeys(parts)) for side in (0, 1)
            )
            text = Text(record.sentence, record.label.lower(), (), kinds.get(record.identifier, ""))
            yield Entry(record.identifier, left, place, number, texts=((text, number),), second=right)

    def _records(self, stored: str, problems: Problems) -> Iterator[tuple[int, Record]]:
        name = f"{stored}.json"
        for number, line in self.folder.lines(name):
            if (record := parse(Record, line, self.folder.place(name), number, problems)) is not None:
                yield number, record

    def _subsets(self, split: str) -> dict[str, str]:
        """Identifier -> subset, of the subsets whose files are there."""
        kinds: dict[str, str] = {}
        if split not in SUBSETS:
            return kinds
        for subset in ("balanced", "unbalanced"):
            file = f"{subset}_{SUBSETS[split]}.json"
            for name in filter(self.folder.has, (f"{subset}/{file}", file)):
                for number, line in self.folder.lines(name):
                    if record := parse(Record, line, self.folder.place(name), number, self.problems):
                        kinds[record.identifier] = subset
        return kinds


def _bucket(record: Record) -> str:
    """What stays together when training is divided: the directory, or the set of a release without directories."""
    return str(record.directory) or record.identifier.rsplit("-", 2)[0]
