"""COCO and every dataset in its format: detection from an instances file, or captions (Karpathy's split where it lies).

Which files: `data.annotations` and `data.images` of the recipe name them per split; what they leave out is looked for
under the usual names: `annotations/instances_train2017.json` + `train2017/`, `train.json` + `train/`, and
`train/_annotations.coco.json` + `train/`. `docs/data.md` describes the folder.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from edgevlm.artifacts import Labels
from edgevlm.data.coco_files import Index, read_captions, read_categories, read_instances, read_karpathy
from edgevlm.data.preprocess import load_image
from edgevlm.data.problems import Policy, Problems
from edgevlm.data.sample import Sample
from edgevlm.errors import DataError, ImageError, RecipeError

TASKS = {"detection": "instances", "captioning": "captions", "retrieval": "captions", "pretraining": "captions"}
"""Task -> kind of annotation file."""
NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Split -> how files and folders call it."""
ANNOTATIONS = ("annotations/{kind}_{name}2017.json", "annotations/{kind}_{name}2014.json", "{name}.json")
ROBOFLOW = "{name}/_annotations.coco.json"
KARPATHY = ("dataset_coco.json", "annotations/dataset_coco.json")
WHERE = "docs/data.md says how the folder should look; data.annotations and data.images name other files"


class Coco:
    """Reader of COCO-format folders. Any sample can be made by itself, so it needs no more memory than its index.

    Args:
        path: the folder.
        task: `detection` (boxes), or one of the caption tasks.
        annotations: split -> annotation file inside the folder.
        images: split -> image folder inside the folder.
        on_bad: `stop` at a malformed record, or `skip` and count it in `problems`.

    Raises:
        RecipeError: another task, or a split that is not train, val or test.
        DataError: the folder or the training annotations are missing.
    """

    name = "coco"

    def __init__(
        self,
        path: Path,
        task: str,
        annotations: Mapping[str, str] | None = None,
        images: Mapping[str, str] | None = None,
        on_bad: Policy = "stop",
    ) -> None:
        if task not in TASKS:
            raise RecipeError(f"Dataset coco has no task '{task}'", f"Set task to one of {', '.join(TASKS)}")
        if unknown := (set(annotations or {}) | set(images or {})) - set(NAMES):
            raise RecipeError(
                f"data.annotations or data.images name the split '{unknown.pop()}'", "Use train, val, test"
            )
        if not path.is_dir():
            raise DataError(f"The COCO folder {path} does not exist", WHERE)
        self.path, self.kind = path, TASKS[task]
        self.problems = Problems(on_bad)
        self._karpathy = next((path / name for name in KARPATHY if (path / name).is_file()), None)
        self._files = self._find(dict(annotations or {}), dict(images or {}))
        self.splits: tuple[str, ...] = tuple(self._files)
        self._indices: dict[str, Index] = {}
        self._categories = read_categories(self._files["train"][0]) if self.kind == "instances" else {}
        self.labels = Labels(classes=tuple(self._categories.values()), attributes=(), answers=())

    def samples(self, split: str, limit: int | None = None) -> Iterator[Sample]:
        """The first `limit` samples, in the order of the annotation file.

        Raises:
            DataError: an unknown split, or a malformed record or image while `on_bad` is `stop`.
        """
        number = 0
        for row in range(len(self.index(split))):
            if limit is not None and number >= limit:
                return
            if (sample := self._sample(split, row)) is not None:
                number += 1
                yield sample
        self.problems.sum_up()

    def num_samples(self, split: str, limit: int | None) -> int:
        """Samples of a split, at most `limit`."""
        total = len(self.index(split))
        return total if limit is None else min(limit, total)

    def sample(self, split: str, index: int) -> Sample:
        """One sample by itself; where its image is damaged and `on_bad` is `skip`, the next one instead."""
        total = len(self.index(split))
        for step in range(total):
            if (sample := self._sample(split, (index + step) % total)) is not None:
                return sample
        raise DataError(f"Split '{split}' of {self.path} has no image that can be read", WHERE)

    def index(self, split: str) -> Index:
        """What the annotation file of a split holds; read once.

        Raises:
            DataError: an unknown split, or a malformed record while `on_bad` is `stop`.
        """
        if split not in self._files:
            raise DataError(f"Dataset {self.path} has no split '{split}'", f"Use one of {', '.join(self._files)}")
        if split not in self._indices:
            file, folder = self._files[split]
            if file == self._karpathy:
                self._indices[split] = read_karpathy(file, self.path, split, self.problems)
            elif self.kind == "captions":
                self._indices[split] = read_captions(file, folder, self.problems)
            else:
                self._indices[split] = read_instances(file, folder, self._categories, self.problems)
        return self._indices[split]

    def _sample(self, split: str, row: int) -> Sample | None:
        """Sample `row`, or None if its image is bad and bad records are skipped."""
        index = self.index(split)
        file, where = str(self._files[split][0]), f"image {index.ids[row]}"
        try:
            image = load_image(index.files[row])
        except ImageError as problem:
            self.problems.report("unreadable image", file, where, problem.what)
            return None
        if index.sizes_wh[row] not in (None, image.size):
            width, height = index.sizes_wh[row] or (0, 0)
            what = f"{index.files[row]} has {image.width} x {image.height} pixels, annotated are {width} x {height}"
            self.problems.report("malformed record", file, where, what)
            return None
        objects = slice(index.starts[row], index.starts[row + 1])
        return Sample(
            id=str(index.ids[row]),
            image=image,
            boxes=index.boxes[objects],
            classes=index.classes[objects],
            attributes=((),) * (objects.stop - objects.start),
            captions=index.captions[row],
            crowd=index.crowd[objects],
            areas=index.areas[objects],
        )

    def _find(self, annotations: dict[str, str], images: dict[str, str]) -> dict[str, tuple[Path, Path]]:
        """Split -> annotation file and image folder."""
        if self.kind == "captions" and self._karpathy is not None and not annotations:
            return dict.fromkeys(NAMES, (self._karpathy, self.path))
        found: dict[str, tuple[Path, Path]] = {}
        for split, names in NAMES.items():
            pair = self._usual(names)
            file = self.path / annotations[split] if split in annotations else (pair[0] if pair else None)
            if file is None:
                continue
            if not file.is_file():
                raise DataError(f"The annotations of '{split}', {file}, are missing", WHERE)
            folder = self.path / images[split] if split in images else (pair[1] if pair else file.parent)
            if not folder.is_dir():
                raise DataError(f"The image folder of '{split}', {folder}, is missing", WHERE)
            found[split] = (file, folder)
        if "train" not in found:
            raise DataError(f"{self.path} has no {self.kind} annotations of a training split", WHERE)
        return found

    def _usual(self, names: tuple[str, ...]) -> tuple[Path, Path] | None:
        for name in names:
            for pattern in (*ANNOTATIONS, ROBOFLOW):
                file = self.path / pattern.format(kind=self.kind, name=name)
                if file.is_file():
                    folder = next((year for year in ("2017", "2014") if file.stem.endswith(year)), "")
                    return file, self.path / f"{name}{folder}"
        return None
