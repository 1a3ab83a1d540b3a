"""Conceptual Captions (Sharma et al., ACL 2018): captions from web pages, with the images that could be downloaded.

The dataset is a list of captions and URLs; the images are everyone's own to download, and many are gone. Three
layouts of what was downloaded are read, as the tool img2dataset writes them:

* the TSV beside a folder of images, named by the number of the row (`train/00012/000123456.jpg`);
* tar archives (`train/00000.tar`, ...: the WebDataset form) with an image and a `.txt` or a `.json` with the caption;
* parquet files (`train/00000.parquet`, ...) with the columns `jpg` and `caption`.

The last two are streamed by `datasets`, and divided among processes by whole files where that comes out even.
"""

from collections.abc import Iterator
from typing import Any

from edgevlm.artifacts import Labels
from edgevlm.data.entries import Entry, make_samples, require_split, require_task
from edgevlm.data.folders import Folder
from edgevlm.data.problems import Problems
from edgevlm.data.sample import Sample
from edgevlm.data.shards import WHOLE, Shard
from edgevlm.data.streams import stream
from edgevlm.errors import DataError

TABLES = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
TASKS = ("captioning", "pretraining")
ROWS_PER_FOLDER = 10_000
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
MISSING = "caption whose image was not downloaded"
WHERE = (
    "Get the TSV files from https://ai.google.com/research/ConceptualCaptions/download and download the images with "
    "img2dataset (docs/data_format.md shows the folder)"
)


class ConceptualCaptions:
    """Reader of Conceptual Captions; one sample per image with its caption. There is no test split.

    Rows whose image is missing are left out and counted: they are expected.

    Args:
        path: the folder, or its fsspec URL.
        task: one of `TASKS`.
        problems: gets the bad records.

    Raises:
        RecipeError: another task.
        DataError: nothing of a split is there.
    """

    name = "conceptual-captions"
    splits = tuple(TABLES)
    labels = Labels(classes=(), attributes=(), answers=())

    def __init__(self, path: str, task: str, problems: Problems | None = None) -> None:
        require_task(self.name, task, TASKS)
        self.problems = problems or Problems()
        self.folder = Folder(path)
        self.folder.require(where=WHERE)
        for split in self.splits:
            self._files(split)

    def samples(self, split: str, limit: int | None = None, shard: Shard = WHOLE) -> Iterator[Sample]:
        """Samples of the first `limit` rows of a split that have an image; of them, those of one part.

        Raises:
            DataError: an unknown split, or a bad record if that is the policy.
        """
        require_split(self.name, split, self.splits)
        form, files = self._files(split)
        if form == "tsv":
            entries = self._rows(files[0], split)
        elif limit is None:
            entries, shard = self._stream(form, files, shard), WHOLE
        else:
            # Whole files to each part would leave open which rows are the first ones.
            entries = self._stream(form, files, WHOLE)
        yield from make_samples(entries, self.folder, self.labels, self.problems, limit, shard)

    def _files(self, split: str) -> tuple[str, list[str]]:
        for form, pattern in (("tar", f"{split}/*.tar"), ("parquet", f"{split}/*.parquet")):
            if files := self.folder.find(pattern):
                return form, files
        if not self.folder.has(TABLES[split]):
            places = f"{self.folder.place(TABLES[split])}, {split}/*.tar or {split}/*.parquet"
            raise DataError(f"None of {places} is there", WHERE)
        return "tsv", [TABLES[split]]

    def _rows(self, file: str, split: str) -> Iterator[Entry]:
        place = self.folder.place(file)
        present = self._present(split)
        row = -1
        for number, line in self.folder.lines(file):
            caption, tab, _ = line.partition("\t")
            if number == 1 and line.split("\t")[:2] == ["caption", "url"]:
                continue  # the heading that img2dataset wants
            row += 1
            key = f"{row:09}"
            if not tab:
                self.problems.report("malformed record", place, number, "not of the form `caption<TAB>url`")
            elif key not in present:
                self.problems.leave_out(MISSING)
            else:
                yield Entry(f"{split}-{key}", (present[key],), place, number, captions=((caption, number),))

    def _present(self, split: str) -> dict[str, str]:
        """Key -> name of each image: folders are listed once, because 3 million questions to a disk take hours."""
        names = [
            name
            for ending in IMAGE_KEYS
            for part in ("", "*/")
            for name in self.folder.find(f"{split}/{part}*.{ending}")
        ]
        return {name.rpartition("/")[2].partition(".")[0]: name for name in names}

    def _stream(self, form: str, files: list[str], shard: Shard) -> Iterator[Entry]:
        places = [self.folder.place(file) for file in files]
        kind = "webdataset" if form == "tar" else "parquet"
        folder = self.folder.place(files[0].rpartition("/")[0])
        for number, row in enumerate(stream(kind, places, shard)):
            image, caption = _image_bytes(row), _caption(row)
            key = str(row.get("__key__") or row.get("key") or "")
            place, where = str(row.get("__url__") or folder), key or f"row {number}"
            if image is None:
                self.problems.leave_out(MISSING)
            elif not key or caption is None:
                self.problems.report("malformed record", place, where, "no caption" if key else "no key")
            else:
                yield Entry(key, image, place, where, captions=((caption, where),))


def _image_bytes(row: dict[str, Any]) -> bytes | None:
    for key in IMAGE_KEYS:
        value = row.get(key)
        value = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(value, bytes):
            return value
    return None


def _caption(row: dict[str, Any]) -> str | None:
    facts = row.get("json")
    for value in (row.get("txt"), row.get("caption"), facts.get("caption") if isinstance(facts, dict) else None):
        if isinstance(value, bytes | str):
            return value.decode(errors="replace") if isinstance(value, bytes) else value
    return None
