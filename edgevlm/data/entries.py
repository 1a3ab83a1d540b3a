"""From what a dataset's files say to Samples: the checks that all readers share, and images opened one at a time.

A reader turns its files into entries, each with its place in them. Bad records are reported there and here, to the
same collector: `stop` and `skip` of a recipe and `edgevlm data check` therefore see the same things.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError
from tokenizers import pre_tokenizers

from edgevlm.artifacts import Labels
from edgevlm.data.folders import Folder
from edgevlm.data.preprocess import load_image
from edgevlm.data.problems import Problems, Where
from edgevlm.data.sample import Sample, Text
from edgevlm.data.shards import WHOLE, Shard
from edgevlm.errors import DataError, ImageError, RecipeError

SLACK_PX = 1.0
"""Annotators round: a box may reach outside the picture by this much and is then cut off."""

VAL_SHARE = 0.08
"""Held out of the training split where a dataset's own validation split is used as the test."""

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Entry:
    """One sample before its image is opened, and where it stands."""

    id: str
    image: tuple[str, ...] | bytes
    """Names in the dataset's folder, the first that exists is taken; or the bytes of the image file."""
    file: str
    where: Where
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(n, 4) x1, y1, x2, y2 in pixels of the image."""
    classes: tuple[int, ...] = ()
    attributes: tuple[tuple[int, ...], ...] = ()
    texts: tuple[tuple[Text, Where], ...] = ()
    """With their places in the file."""
    captions: tuple[tuple[str, Where], ...] = ()
    second: tuple[str, ...] = ()


def make_samples(
    entries: Iterable[Entry],
    folder: Folder,
    labels: Labels,
    problems: Problems,
    limit: int | None = None,
    shard: Shard = WHOLE,
    *,
    clip: bool = False,
) -> Iterator[Sample]:
    """Open the images of the first `limit` entries, those of one part, and check what belongs to them.

    What is bad goes to `problems` and is left out: a whole entry for its id or image, else the box, text or caption.
    An entry of which nothing is left is left out too. Entries with a bad image count towards the limit, so that the
    parts of several processes always add up to the same.

    Args:
        clip: cut boxes off at the border of the picture, however far they reach.

    Raises:
        DataError: a bad record, if that is the policy of `problems`.
    """
    answers = frozenset(labels.answers)
    stop = None if limit is None else max(limit, 0)
    for index, entry in enumerate(islice(unique(entries, problems), stop)):
        if shard.takes(index) and (sample := _make_sample(entry, folder, answers, problems, clip)) is not None:
            yield sample
    problems.sum_up()


def make_sample(
    entries: Sequence[Entry], index: int, folder: Folder, labels: Labels, problems: Problems, *, clip: bool = False
) -> Sample:
    """Entry `index` by itself; if it is bad and bad ones are skipped, the next good one, from the start after the end.

    Raises:
        DataError: a bad record, if that is the policy of `problems`; or every entry is bad.
    """
    answers = frozenset(labels.answers)
    for step in range(len(entries)):
        entry = entries[(index + step) % len(entries)]
        if (sample := _make_sample(entry, folder, answers, problems, clip)) is not None:
            return sample
    raise DataError(f"No image of {folder.name} can be read", "Run `edgevlm data check` on it")


def unique(entries: Iterable[Entry], problems: Problems) -> Iterator[Entry]:
    """The entries whose id was not used before; the others are reported."""
    seen: dict[str, str] = {}
    for entry in entries:
        place = f"{entry.file}:{entry.where}"
        if seen.setdefault(entry.id, place) == place:
            yield entry
        else:
            problems.report("duplicate id", entry.file, entry.where, f"id '{entry.id}' was used at {seen[entry.id]}")


def _make_sample(
    entry: Entry, folder: Folder, answers: Collection[str], problems: Problems, clip: bool
) -> Sample | None:
    texts = [text for text, where in entry.texts if _sound_text(text, entry.file, where, answers, problems)]
    captions = [
        " ".join(caption.split())
        for caption, where in entry.captions
        if _sound_words(caption, "caption", entry.file, where, problems)
    ]
    image = _open(entry, entry.image, folder, problems)
    second = _open(entry, entry.second, folder, problems) if entry.second else None
    if image is None or (entry.second and second is None):
        return None
    boxes, kept = _sound_boxes(entry, image.size, problems, clip)
    had_something = bool(entry.texts or entry.captions or len(entry.boxes))
    if had_something and not (texts or captions or kept):
        return None
    if len(kept) < len(entry.boxes):
        texts = [_refer_again(text, kept) for text in texts]
    return Sample(
        id=entry.id,
        image=image,
        boxes=boxes,
        classes=np.array([entry.classes[i] for i in kept], np.int64),
        attributes=tuple(entry.attributes[i] for i in kept),
        texts=tuple(texts),
        captions=tuple(captions),
        second=second,
    )


def _open(entry: Entry, source: tuple[str, ...] | bytes, folder: Folder, problems: Problems) -> Image.Image | None:
    try:
        return load_image(source) if isinstance(source, bytes) else folder.image(source)
    except FileNotFoundError as problem:
        problems.report("missing image", entry.file, entry.where, f"the image {problem} is missing")
    except ImageError as problem:
        problems.report("unreadable image", entry.file, entry.where, problem.what)
    return None


def _sound_boxes(
    entry: Entry, size_wh: tuple[int, int], problems: Problems, clip: bool
) -> tuple[np.ndarray, list[int]]:
    """The good boxes inside the picture, (k, 4) float32, and their indices."""
    boxes = np.asarray(entry.boxes, np.float64).reshape(-1, 4)
    border = np.array([*size_wh, *size_wh], np.float64)
    inside = boxes.clip(0, border)
    kept = []
    for i, box in enumerate(boxes):
        slack = np.inf if clip else SLACK_PX
        corners = ", ".join(f"{value:g}" for value in box)
        picture = f"the picture of {size_wh[0]} x {size_wh[1]} pixels"
        if not np.isfinite(box).all():
            what = "is not a number"
        elif not (box[2:] > box[:2]).all():
            what = "has no area"
        elif not (inside[i, 2:] > inside[i, :2]).all():
            what = f"lies outside {picture}"
        elif (box < -slack).any() or (box > border + slack).any():
            what = f"reaches outside {picture}"
        else:
            kept.append(i)
            continue
        problems.report("bad box", entry.file, entry.where, f"box {i + 1} ({corners}) {what}")
    return inside[kept].astype(np.float32), kept


def _refer_again(text: Text, kept: list[int]) -> Text:
    """The text with the indices that its objects have after others are gone."""
    referred = tuple(kept.index(i) for i in text.referred if i in kept)
    return Text(text.text, text.answer, referred, text.kind, text.answers)


def _sound_text(text: Text, file: str, where: Where, answers: Collection[str], problems: Problems) -> bool:
    if not _sound_words(text.text, "question or sentence", file, where, problems):
        return False
    # Where annotators answered in words of their own, some answers are in no list: they count as wrong, in every model.
    if text.answer not in answers and not text.answers:
        problems.report("outside the list", file, where, f"the answer '{text.answer}' is not in the list of answers")
        return False
    return True


def _sound_words(words: str, what: str, file: str, where: Where, problems: Problems) -> bool:
    if not words.strip():
        problems.report("empty text", file, where, f"the {what} is empty")
        return False
    if problems.max_words is not None and (number := len(split_words(words))) > problems.max_words:
        problems.report(
            "too long text", file, where, f"the {what} has {number} words and marks; {problems.max_words} fit"
        )
        return False
    return True


def split_words(text: str) -> list[str]:
    """Words and punctuation marks, as every BERT tokenizer separates them before it looks for word pieces."""
    words = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text.lower())  # pyright: ignore[reportAttributeAccessIssue]
    return [word for word, _ in words]


# --- what readers share besides -----------------------------------------------------------------------------------


def parse(model: type[Model], value: Any, file: str, where: Where, problems: Problems) -> Model | None:
    """A record as its type; one that does not fit is reported, and the result is None.

    Args:
        value: a line of JSON, or a value that was parsed already.
    """
    try:
        return model.model_validate_json(value) if isinstance(value, str) else model.model_validate(value)
    except ValidationError as problem:
        error = problem.errors()[0]
        key = ".".join(map(str, error["loc"]))
        problems.report("malformed record", file, where, f"{key}: {error['msg']}" if key else error["msg"])
        return None


def expect(value: Any, kind: type[Any], file: str, what: str) -> Any:
    """`value` if it is a list or dict, as the file's format has it.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, kind):
        raise DataError(f"{file} does not hold {what}", "Give the file as the dataset's authors publish it")
    return value


def require_task(dataset: str, task: str, tasks: Collection[str]) -> None:
    """Refuse a task that a dataset has no labels for.

    Raises:
        RecipeError: it is none of `tasks`.
    """
    if task not in tasks:
        raise RecipeError(f"Dataset {dataset} has no task '{task}'", f"Set task to one of: {', '.join(tasks)}")


def require_split(dataset: str, split: str, splits: Collection[str]) -> None:
    """Refuse a split that a dataset does not have.

    Raises:
        DataError: it is none of `splits`.
    """
    if split not in splits:
        raise DataError(f"Dataset {dataset} has no split '{split}'", f"Use one of {', '.join(splits)}")


def held_out(keys: Iterable[str], dataset: str, share: float = VAL_SHARE) -> set[str]:
    """A share of the keys (images, directories), at least one of two: the same on every machine, as good as random."""
    order = sorted(set(keys), key=lambda key: hashlib.sha256(f"{dataset}/{key}".encode()).digest())
    return set(order[: max(1, round(share * len(order)))] if len(order) > 1 else ())


def group_by_id(entries: Iterable[Entry]) -> list[Entry]:
    """One entry per id with all texts and captions, in order of first appearance: an image is decoded once."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.id, []).append(entry)
    return [
        Entry(
            id=key,
            image=group[0].image,
            file=group[0].file,
            where=group[0].where,
            texts=tuple(text for entry in group for text in entry.texts),
            captions=tuple(caption for entry in group for caption in entry.captions),
        )
        for key, group in groups.items()
    ]
