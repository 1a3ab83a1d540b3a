"""NLVR v1 (Suhr et al., ACL 2017): is a sentence true of an image of three boxes with coloured shapes?

The images are parquet files, streamed through Hugging Face `datasets` from the local folder; the network is never
used. `docs/data.md` describes the folder and how to make it from the upstream release.

Each example has six images, with its three boxes in every order. The official score is over all six; one is enough to
train on. For `val`, whole directories of the training split are held out, as upstream advises.
"""

import atexit
import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from edgevlm.artifacts import Labels
from edgevlm.data.entries import parse
from edgevlm.data.nlvr_words import VOCABULARY
from edgevlm.data.preprocess import load_image
from edgevlm.data.problems import Problems
from edgevlm.data.sample import Sample, Text
from edgevlm.errors import DataError, ImageError, RecipeError

IMAGE_SIZE_WH = (400, 100)
BOX_PX, BOX_STEP_PX = 100, 150
"""Three boxes of 100 x 100 pixels, 50 pixels apart."""

BOX_ORDER = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
"""Permutation -> which of the record's boxes stands first, second and third in the image."""

SHAPES = ("circle", "square", "triangle")
COLOURS = {"Black": "black", "#0099ff": "blue", "Yellow": "yellow"}
SIZES = {10: "small", 20: "medium", 30: "large"}
LABELS = Labels(classes=SHAPES, attributes=(*COLOURS.values(), *SIZES.values()), answers=("false", "true"))

Choice = Sequence[int] | Literal["random"]
PERMUTATIONS: dict[str, Choice] = {"train": (0,), "val": (0,), "dev": range(6), "test": range(6)}
VAL_SHARE = 0.08
"""Of the training directories."""

WHERE = "Get NLVR from https://github.com/lil-lab/nlvr and convert it with scripts/nlvr_to_parquet.py; see docs/data.md"


_half_read: weakref.WeakSet[Any] = weakref.WeakSet()
"""Open streams. pyarrow aborts the process if one is still open when the interpreter ends, so they are closed before."""


@atexit.register
def _close_half_read() -> None:
    for rows in list(_half_read):
        rows.close()


class Item(BaseModel):
    """One shape of a record: position inside its box, from the top left."""

    x_loc: float
    y_loc: float
    size: Literal[10, 20, 30]
    type: Literal["circle", "square", "triangle"]
    color: Literal["Black", "Yellow", "#0099ff"]


class Record(BaseModel):
    """One line of `<split>.jsonl`; other keys of the release are ignored."""

    sentence: Annotated[str, Field(min_length=1)]
    label: Literal["true", "false"]
    identifier: str
    directory: str
    structured_rep: Annotated[list[list[Item]], Field(min_length=3, max_length=3)]
    line: int = 0
    """Where it stands in the file, from 1."""


class NLVR:
    """Reader of NLVR v1, task `reasoning`.

    Args:
        path: the folder.
        task: must be `reasoning`.
        seed: decides the draw of "random" permutations; nothing else depends on it.
        permutations: split -> permutations (0 to 5) of each example, or "random": one per example. What is not named
            keeps the default: 0 of `train` and `val`, all six of `dev` and `test` (the official score).
        problems: gets the bad records; by default the first one stops.

    Raises:
        RecipeError: another task, split or permutation.
        DataError: a file of the folder is missing (all are looked for at once, before hours of training).
    """

    name = "nlvr"
    splits: tuple[str, ...] = ("train", "val", "dev", "test")
    labels = LABELS
    words = VOCABULARY
    """What the vocabulary must hold whole, so that a spelling can take another's meaning."""

    def __init__(
        self,
        path: Path,
        task: str,
        seed: int = 0,
        permutations: Mapping[str, Choice] | None = None,
        problems: Problems | None = None,
    ) -> None:
        if task != "reasoning":
            raise RecipeError(f"Dataset nlvr has no task '{task}'", "Set task: reasoning")
        self.path = path
        self.seed = seed
        self.permutations = PERMUTATIONS | dict(permutations or {})
        self.problems = problems or Problems()
        for split, choice in self.permutations.items():
            if split not in self.splits or (choice != "random" and (not choice or not set(choice) <= set(range(6)))):
                raise RecipeError(
                    f"Dataset nlvr: no permutations {choice!r} of split '{split}'",
                    f"Name splits of {', '.join(self.splits)} and permutations 0 to 5",
                )
        self._check_files()

    def samples(self, split: str, limit: int | None = None) -> Iterator[Sample]:
        """The first `limit` samples: all examples in permutation 0, then in the others where asked for.

        `Text.kind` says of evaluation sentences whether training has `seen` them: about half of them repeat.

        Raises:
            DataError: an unknown split, or a bad record or image where that stops (the line or the image is named).
        """
        if split not in self.splits:
            raise DataError(f"Dataset nlvr has no split '{split}'", f"Use one of {', '.join(self.splits)}")
        if limit is not None and limit <= 0:
            return
        train, val = _divide(self._records("train"))
        parts = {"train": train, "val": val}
        records = parts[split] if split in parts else self._records(split)
        left_out = {"train": val, "val": train}.get(split, {})
        seen = {_plain(record) for record in train.values()} if split != "train" else set()
        wanted = {(identifier, number) for identifier in records for number in self._wanted(split, identifier)}
        num_samples = 0
        for row in self._images(split):
            identifier, permutation = str(row["identifier"]), int(row["perm"])
            if identifier in left_out or permutation not in self._wanted(split, identifier):
                continue
            if identifier not in records:
                self.problems.leave_out("image without a record")
                continue
            wanted.discard((identifier, permutation))
            kind = "" if split == "train" else ("seen" if _plain(records[identifier]) in seen else "unseen")
            sample = self._sample(_stored(split), records[identifier], permutation, row["image"], kind)
            if sample is None:
                continue
            yield sample
            num_samples += 1
            if num_samples == limit:
                return
        file = str(self.path / f"{_stored(split)}.jsonl")
        for identifier, number in sorted(wanted):
            what = f"{identifier} has no image of permutation {number} in the folder"
            self.problems.report("missing image", file, records[identifier].line, what)
        self.problems.sum_up()

    def records(self, split: str) -> list[Record]:
        """The records of a split, without images.

        Raises:
            DataError: a bad record, where that stops.
        """
        train, val = _divide(self._records("train"))
        parts = {"train": train, "val": val}
        return list((parts[split] if split in parts else self._records(split)).values())

    def _wanted(self, split: str, identifier: str) -> Sequence[int]:
        choice = self.permutations[split]
        if not isinstance(choice, str):
            return choice
        return (hashlib.sha256(f"{self.seed}/{identifier}".encode()).digest()[0] % 6,)

    def _records(self, stored: str) -> dict[str, Record]:
        """Identifier -> record, in the order of the file."""
        path = self.path / f"{stored}.jsonl"
        records: dict[str, Record] = {}
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = parse(Record, line, str(path), number, self.problems)
                if record is None:
                    continue
                if record.identifier in records:
                    self.problems.report("duplicate id", str(path), number, f"{record.identifier} stands twice")
                elif outside := _outside(record):
                    self.problems.report("bad box", str(path), number, outside)
                else:
                    records[record.identifier] = record.model_copy(update={"line": number})
        return records

    def _images(self, split: str) -> Iterator[dict[str, Any]]:
        from datasets import load_dataset

        files = [str(path) for path in self._image_files(split)]
        try:
            rows = iter(load_dataset("parquet", data_files=files, split="train", streaming=True))
        except (OSError, ValueError) as problem:
            raise DataError(f"{', '.join(files)} cannot be read ({problem})", WHERE) from problem
        _half_read.add(rows)
        with closing(rows):  # pyright: ignore[reportArgumentType]
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except (OSError, ValueError) as problem:
                    raise DataError(f"{', '.join(files)} cannot be read ({problem})", WHERE) from problem
                if not {"identifier", "perm", "image"} <= set(row):
                    raise DataError(f"{files[0]} has the columns {', '.join(row)}", WHERE)
                yield row

    def _sample(self, stored: str, record: Record, permutation: int, image_bytes: bytes, kind: str) -> Sample | None:
        """A sample; a bad image is reported, and the result is None."""
        file, name = str(self.path / f"images-{stored}-*.parquet"), f"{stored}-{record.identifier}/p{permutation}"
        try:
            image = load_image(image_bytes)
        except ImageError as problem:
            self.problems.report("unreadable image", file, name, problem.what)
            return None
        if image.size != IMAGE_SIZE_WH:
            what = f"{image.width} x {image.height} pixels, not 400 x 100"
            self.problems.report("malformed record", file, name, what)
            return None
        corners, classes, attributes = [], [], []
        for place, box in enumerate(BOX_ORDER[permutation]):
            for item in record.structured_rep[box]:
                x, y = place * BOX_STEP_PX + item.x_loc, item.y_loc
                corners.append((x, y, x + item.size, y + item.size))
                classes.append(SHAPES.index(item.type))
                tags = LABELS.attributes
                attributes.append((tags.index(COLOURS[item.color]), tags.index(SIZES[item.size])))
        return Sample(
            id=name,
            image=image,
            boxes=np.array(corners, np.float32).reshape(-1, 4),
            classes=np.array(classes, np.int64),
            attributes=tuple(attributes),
            texts=(Text(record.sentence, record.label, (), kind),),
        )

    def _image_files(self, split: str) -> list[Path]:
        choice, stored = self.permutations[split], _stored(split)
        wanted = set(range(6) if isinstance(choice, str) else choice)
        files = [self.path / f"images-{stored}-p0.parquet"] if 0 in wanted else []
        if wanted - {0}:
            found = sorted(self.path.glob(f"images-{stored}-p1-5*.parquet"))
            files += found or [self.path / f"images-{stored}-p1-5.parquet"]
        return files

    def _check_files(self) -> None:
        if not self.path.is_dir():
            raise DataError(f"The NLVR folder {self.path} does not exist", WHERE)
        needed = [self.path / f"{_stored(split)}.jsonl" for split in self.splits]
        needed += [file for split in self.splits for file in self._image_files(split)]
        for file in needed:
            if not file.is_file():
                raise DataError(f"{file} is missing", WHERE)


def _stored(split: str) -> str:
    return "train" if split == "val" else split


def _divide(records: dict[str, Record]) -> tuple[dict[str, Record], dict[str, Record]]:
    """The training file as `train` and `val`, by directory: the same on every machine, and as good as random."""
    directories = {record.directory for record in records.values()}
    order = sorted(directories, key=lambda directory: hashlib.sha256(f"nlvr/{directory}".encode()).digest())
    held_out = set(order[: max(1, round(VAL_SHARE * len(order)))] if len(order) > 1 else ())
    train = {key: record for key, record in records.items() if record.directory not in held_out}
    val = {key: record for key, record in records.items() if record.directory in held_out}
    return train, val


def _plain(record: Record) -> str:
    return " ".join(record.sentence.lower().rstrip(" .").split())


def _outside(record: Record) -> str:
    """What is wrong with the first item that is not inside its box; empty if all are."""
    for number, box in enumerate(record.structured_rep, 1):
        for item in box:
            if min(item.x_loc, item.y_loc) < 0 or max(item.x_loc, item.y_loc) + item.size > BOX_PX:
                return f"box {number} has an item at ({item.x_loc:g}, {item.y_loc:g}) of size {item.size} outside its {BOX_PX} px"
    return ""
