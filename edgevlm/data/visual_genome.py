"""Visual Genome (Krishna et al., IJCV 2017): objects and attributes of given lists, and captions of regions.

Its annotators typed names freely. A list of classes (one per line, other names of the same thing after commas, as in
bottom-up attention's 1,600 objects and 400 attributes) says which names count; the others are left out and counted.
Boxes are cut off at the border of the picture: reaching beyond it is common here and says nothing about the object.

The annotations are JSON files of one array each, up to 700 MB. `datasets` reads such a file whole as well, and gives
no place to name in errors, so it is read with `json`.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel

from edgevlm.artifacts import Labels
from edgevlm.data.entries import Entry, expect, make_sample, make_samples, parse, require_split, require_task, unique
from edgevlm.data.folders import Folder
from edgevlm.data.problems import Problems
from edgevlm.data.sample import Sample
from edgevlm.data.shards import WHOLE, Shard
from edgevlm.data.vqa_files import genome_names, genome_split
from edgevlm.errors import DataError

SPLITS = ("train", "val", "test")
TASKS = ("detection", "pretraining")
OBJECTS, ATTRIBUTES, REGIONS = "objects.json", "attributes.json", "region_descriptions.json"
CLASS_LIST, ATTRIBUTE_LIST = "objects_vocab.txt", "attributes_vocab.txt"
WHERE = (
    "Get the annotations and images from https://homes.cs.washington.edu/~ranjay/visualgenome, and the lists "
    "(data/genome/1600-400-20) from https://github.com/peteanderson80/bottom-up-attention"
)


class Thing(BaseModel):
    """An object of `objects.json` or, with attributes, of `attributes.json`."""

    object_id: int
    names: list[str]
    x: float
    y: float
    w: float
    h: float
    attributes: list[str] | None = None


class Region(BaseModel):
    """A region of `region_descriptions.json`."""

    phrase: str


class VisualGenome:
    """Reader of Visual Genome: boxes, classes and attributes; for pre-training also the regions' captions.

    There are no official splits: a twentieth of the images each are held out as `val` and `test`, the same as in
    `visual-genome-qa`. About half of the images are COCO's too: leave out those that you test on elsewhere.

    Args:
        path: the folder, or its fsspec URL.
        task: `detection`, or `pretraining` (needs region_descriptions.json).
        problems: gets the bad records.

    Raises:
        RecipeError: another task.
        DataError: a file is missing, or a name stands twice in a list.
    """

    name = "visual-genome"
    splits: tuple[str, ...] = SPLITS

    def __init__(self, path: str, task: str, problems: Problems | None = None) -> None:
        require_task(self.name, task, TASKS)
        self.task = task
        self.problems = problems or Problems()
        self.folder = Folder(path)
        files = (OBJECTS, ATTRIBUTES, CLASS_LIST, ATTRIBUTE_LIST, *((REGIONS,) if task == "pretraining" else ()))
        self.folder.require(*files, where=WHERE)
        self._tables: dict[str, list[Entry]] = {}

    @property
    def labels(self) -> Labels:
        """The first name of each line of the lists; no answers."""
        return Labels(classes=tuple(self._lists[0][0]), attributes=tuple(self._lists[1][0]), answers=())

    @cached_property
    def _lists(self) -> tuple[tuple[list[str], dict[str, int]], tuple[list[str], dict[str, int]]]:
        return read_aliases(self.folder, CLASS_LIST), read_aliases(self.folder, ATTRIBUTE_LIST)

    def samples(self, split: str, limit: int | None = None, shard: Shard = WHOLE) -> Iterator[Sample]:
        """The first `limit` images of a split; of them, those of one part.

        Raises:
            DataError: an unknown split, or a bad record if that is the policy.
        """
        entries = self._table(split)
        yield from make_samples(entries, self.folder, self.labels, self.problems, limit, shard, clip=True)

    def num_samples(self, split: str, limit: int | None) -> int:
        """Records of a split, at most `limit`; those with a bad image included."""
        total = len(self._table(split))
        return total if limit is None else min(limit, total)

    def sample(self, split: str, index: int) -> Sample:
        """One sample by itself; if its image is bad and bad records are skipped, the next one instead."""
        return make_sample(self._table(split), index, self.folder, self.labels, self.problems, clip=True)

    def _table(self, split: str) -> list[Entry]:
        """The entries of a split, images unopened; read once."""
        require_split(self.name, split, self.splits)
        if split not in self._tables:
            self._tables[split] = list(unique(self._entries(split), self.problems))
        return self._tables[split]

    def _entries(self, split: str) -> Iterator[Entry]:
        place = self.folder.place(OBJECTS)
        images = self._images(OBJECTS, split)
        attributes = {i: row for i, _, row in self._images(ATTRIBUTES, split).values()}
        captions = self._captions(split) if self.task == "pretraining" else {}
        for image_id, (_, number, row) in images.items():
            where = f"[{number}]"
            things = self._things(row, "objects", place, where)
            tags = self._tags(attributes.get(image_id))
            class_ids = self._lists[0][1]
            named = [(thing, _first_known(thing.names, class_ids)) for thing in things]
            kept = [(thing, index) for thing, index in named if index is not None]
            self.problems.leave_out("object of a class outside the list", len(named) - len(kept))
            yield Entry(
                id=str(image_id),
                image=genome_names(image_id),
                file=place,
                where=where,
                boxes=np.array([(t.x, t.y, t.x + t.w, t.y + t.h) for t, _ in kept], np.float64).reshape(-1, 4),
                classes=tuple(index for _, index in kept),
                attributes=tuple(tags.get(thing.object_id, ()) for thing, _ in kept),
                captions=captions.get(image_id, ()),
            )

    def _images(self, file: str, split: str) -> dict[int, tuple[int, int, dict[str, Any]]]:
        """Image id -> (image id, position in the file, record), of one split in the order of the file."""
        place = self.folder.place(file)
        found: dict[int, tuple[int, int, dict[str, Any]]] = {}
        for i, row in enumerate(expect(self.folder.json(file), list, place, "a list of images")):
            image_id = row.get("image_id", row.get("id")) if isinstance(row, dict) else None
            if not isinstance(image_id, int):
                self.problems.report("malformed record", place, f"[{i}]", "no image_id")
            elif image_id in found:
                what = f"image {image_id} was described at [{found[image_id][1]}]"
                self.problems.report("duplicate id", place, f"[{i}]", what)
            else:
                found[image_id] = (image_id, i, row)
        wanted = genome_split(map(str, found), split)
        return {image_id: row for image_id, row in found.items() if str(image_id) in wanted}

    def _things(self, row: dict[str, Any], key: str, place: str, where: str) -> list[Thing]:
        values = row.get(key)
        if not isinstance(values, list):
            self.problems.report("malformed record", place, where, f"no list '{key}'")
            return []
        things = (parse(Thing, value, place, f"{where}.{key}[{j}]", self.problems) for j, value in enumerate(values))
        return [thing for thing in things if thing is not None]

    def _tags(self, row: dict[str, Any] | None) -> dict[int, tuple[int, ...]]:
        """Object id -> attributes of the list."""
        if row is None:
            return {}
        ids = self._lists[1][1]
        place = self.folder.place(ATTRIBUTES)
        tags: dict[int, tuple[int, ...]] = {}
        for thing in self._things(row, "attributes", place, f"image {row.get('image_id')}"):
            known = [ids[name] for name in map(_plain, thing.attributes or ()) if name in ids]
            self.problems.leave_out("attribute outside the list", len(thing.attributes or ()) - len(known))
            tags[thing.object_id] = tuple(dict.fromkeys((*tags.get(thing.object_id, ()), *known)))
        return tags

    def _captions(self, split: str) -> dict[int, tuple[tuple[str, str], ...]]:
        place = self.folder.place(REGIONS)
        captions: dict[int, tuple[tuple[str, str], ...]] = {}
        for image_id, number, row in self._images(REGIONS, split).values():
            regions = row.get("regions")
            if not isinstance(regions, list):
                self.problems.report("malformed record", place, f"[{number}]", "no list 'regions'")
                continue
            wheres = [f"[{number}].regions[{j}]" for j in range(len(regions))]
            parsed = [parse(Region, region, place, w, self.problems) for region, w in zip(regions, wheres, strict=True)]
            captions[image_id] = tuple(
                (region.phrase, where) for region, where in zip(parsed, wheres, strict=True) if region is not None
            )
        return captions


def read_aliases(folder: Folder, name: str) -> tuple[list[str], dict[str, int]]:
    """A list of names, and every name and alias -> its index; a line holds the name, then its aliases after commas.

    Raises:
        DataError: two lines share a name. (Of repeated aliases the first line wins: the published lists have some.)
    """
    names: list[str] = []
    ids: dict[str, int] = {}
    for number, line in folder.lines(name):
        aliases = [_plain(alias) for alias in line.split(",")]
        if aliases[0] in names:
            raise DataError(f"{folder.place(name)}:{number}: '{aliases[0]}' stands twice", "Remove one of the lines")
        for alias in aliases:
            ids.setdefault(alias, len(names))
        names.append(aliases[0])
    return names, ids


def _first_known(names: list[str], ids: dict[str, int]) -> int | None:
    return next((ids[name] for name in map(_plain, names) if name in ids), None)


def _plain(name: str) -> str:
    return " ".join(name.lower().split())
