"""Flickr30k (Young et al., TACL 2014): photographs with five captions each, in Karpathy's splits or with given lists.

Either `dataset_flickr30k.json` (Karpathy and Fei-Fei, CVPR 2015: captions and splits in one file of 30 MB), or the
release's `results_20130124.token` with `train.txt`, `val.txt` and `test.txt`, which list image ids.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, Field

from edgevlm.artifacts import Labels
from edgevlm.data.entailment import IMAGE_FOLDERS
from edgevlm.data.entries import Entry, expect, group_by_id, make_samples, parse, require_split, require_task
from edgevlm.data.folders import Folder
from edgevlm.data.problems import Problems
from edgevlm.data.sample import Sample
from edgevlm.data.shards import WHOLE, Shard

KARPATHY = "dataset_flickr30k.json"
TOKENS = "results_20130124.token"
SPLITS = ("train", "val", "test")
TASKS = ("captioning", "retrieval", "pretraining")
WHERE = (
    f"Get {KARPATHY} (Karpathy's splits), or {TOKENS} with lists of image ids in train.txt, val.txt and test.txt; "
    "docs/data_format.md shows the folder"
)


class Sentence(BaseModel):
    """A caption of Karpathy's file."""

    raw: str


class Record(BaseModel):
    """One image of Karpathy's file; other keys are ignored."""

    filename: Annotated[str, Field(min_length=1)]
    split: str
    sentences: list[Sentence]


class Flickr30k:
    """Reader of Flickr30k; one sample per image, its texts are captions.

    Args:
        path: the folder, or its fsspec URL.
        task: one of `TASKS`.
        problems: gets the bad records.

    Raises:
        RecipeError: another task.
        DataError: a file is missing.
    """

    name = "flickr30k"
    splits: tuple[str, ...] = SPLITS
    labels = Labels(classes=(), attributes=(), answers=())

    def __init__(self, path: str, task: str, problems: Problems | None = None) -> None:
        require_task(self.name, task, TASKS)
        self.problems = problems or Problems()
        self.folder = Folder(path)
        self.folder.require(where=WHERE)
        if not self.folder.has(KARPATHY):
            self.folder.require(TOKENS, *(f"{split}.txt" for split in SPLITS), where=WHERE)

    def samples(self, split: str, limit: int | None = None, shard: Shard = WHOLE) -> Iterator[Sample]:
        """The first `limit` images of a split; of them, those of one part.

        Raises:
            DataError: an unknown split, or a bad record if that is the policy.
        """
        require_split(self.name, split, self.splits)
        entries = self._karpathy(split) if self.folder.has(KARPATHY) else group_by_id(self._tokens(split))
        yield from make_samples(entries, self.folder, self.labels, self.problems, limit, shard)

    def _karpathy(self, split: str) -> Iterator[Entry]:
        place = self.folder.place(KARPATHY)
        rows = expect(self.folder.json(KARPATHY), dict, place, "an object with 'images'")
        for i, row in enumerate(expect(rows.get("images"), list, place, "a list 'images'")):
            where = f"images[{i}]"
            record = parse(Record, row, place, where, self.problems)
            if record is not None and record.split == split:
                captions = tuple(
                    (sentence.raw, f"{where}.sentences[{j}]") for j, sentence in enumerate(record.sentences)
                )
                yield Entry(_image_id(record.filename), _names(record.filename), place, where, captions=captions)

    def _tokens(self, split: str) -> Iterator[Entry]:
        place = self.folder.place(TOKENS)
        wanted = {_image_id(line.strip()) for _, line in self.folder.lines(f"{split}.txt")}
        for number, line in self.folder.lines(TOKENS):
            key, tab, caption = line.partition("\t")
            filename, mark, _ = key.partition("#")
            if not (tab and mark and filename):
                what = "not of the form `image.jpg#0<TAB>caption`"
                self.problems.report("malformed record", place, number, what)
            elif _image_id(filename) in wanted:
                yield Entry(_image_id(filename), _names(filename), place, number, captions=((caption, number),))


def _image_id(filename: str) -> str:
    return filename.removesuffix(".jpg")


def _names(filename: str) -> tuple[str, ...]:
    return tuple(f"{part}/{filename}" for part in IMAGE_FOLDERS)
