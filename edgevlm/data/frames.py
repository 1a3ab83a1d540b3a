"""Whole splits as arrays, so that an epoch costs no decoding: images at the model's size, and encoded questions."""

import collections
import itertools
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from edgevlm.artifacts import Labels, PreprocessSpec
from edgevlm.data.answers import normalise_answer
from edgevlm.data.preprocess import preprocess, scale_boxes
from edgevlm.data.sample import Reader, Sample, Text
from edgevlm.data.text import Tokenizer
from edgevlm.errors import DataError, TextError

Progress = Callable[[int, int | None], None]
"""Called with (samples done, samples in all if known)."""

CHUNK = 32
"""Samples per message between processes."""


@dataclass
class Frames:
    """The images of a split as the model sees them; boxes are in pixels of the model's input."""

    ids: list[str]
    pixels: np.ndarray
    """(I, H, W, 3) uint8."""
    boxes: list[np.ndarray]
    """Per image (n, 4) float32: x1, y1, x2, y2."""
    classes: list[np.ndarray]
    """Per image (n,) int64."""
    attributes: list[np.ndarray]
    """Per image (n, A) float32, 0 or 1."""
    texts: list[tuple[Text, ...]]
    captions: list[tuple[str, ...]] = field(default_factory=list)
    """Per image; empty where nobody asked for them."""
    second: np.ndarray | None = None
    """(I, H, W, 3) uint8: the right-hand images, where the texts are about pairs."""

    def __len__(self) -> int:
        return len(self.ids)

    def ids_of(self, rows: Sequence[int]) -> list[str]:
        """Sample ids of some images."""
        return [self.ids[row] for row in rows]


@dataclass
class Questions:
    """The texts of a split, encoded; Q in all."""

    image_index: np.ndarray
    """(Q,) int64 into the frames."""
    input_ids: np.ndarray
    """(Q, L) int32."""
    answers: np.ndarray
    """(Q,) int64 into `labels.answers`; -1 where annotators answered and none of their answers is in the list."""
    referred: list[tuple[int, ...]]
    """Indices of the objects of the image that decide the answer."""
    kinds: list[str]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def spread(self, number: int) -> "Questions":
        """At most `number` questions, evenly spread over the images."""
        return self.take(np.unique(np.linspace(0, len(self) - 1, min(number, len(self))).round().astype(np.int64)))

    def known(self) -> "Questions":
        """The questions whose answer is in the list."""
        return self.take(np.flatnonzero(self.answers >= 0))

    def take(self, rows: np.ndarray) -> "Questions":
        """Questions `rows`, in that order."""
        arrays = (self.image_index[rows], self.input_ids[rows], self.answers[rows])
        lists = ([column[row] for row in rows] for column in (self.referred, self.kinds, self.texts))
        return Questions(*arrays, *lists)


@runtime_checkable
class RandomAccess(Protocol):
    """A reader that can make any sample by itself, and so in any process."""

    labels: Labels

    def sample(self, split: str, index: int) -> Sample: ...

    def num_samples(self, split: str, limit: int | None) -> int: ...


Row = tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[Text, ...], tuple[str, ...], np.ndarray | None]


def materialise(
    reader: Reader,
    split: str,
    limit: int | None,
    spec: PreprocessSpec,
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> Frames:
    """Read, preprocess and check the first `limit` samples of a split.

    Args:
        reader: any reader.
        split: `train`, `val` or `test`.
        limit: at most so many samples; None = all that the reader offers.
        spec: size of the model's input and how to get there.
        workers: processes that draw samples side by side, where the reader can make any sample by itself (others are
            read in this process). The frames are the same for any number.
        progress: called now and then.

    Raises:
        DataError: a malformed sample (its id is named), or a split without samples.
    """
    total = limit
    if isinstance(reader, RandomAccess):
        total = reader.num_samples(split, limit)
        rows = (
            _rows_in_parallel(reader, split, total, spec, workers) if workers > 0 else _rows(reader, split, total, spec)
        )
    else:
        rows = _rows(reader, split, limit, spec)
    frames = Frames([], np.empty((total or 1024, spec.height, spec.width, 3), np.uint8), [], [], [], [])
    second: list[np.ndarray] = []
    for sample_id, pixels_HWC, boxes, classes, attributes, texts, captions, second_HWC in rows:
        count = len(frames.ids)
        if count == len(frames.pixels):
            # In place: a stack of separate images would hold the split twice.
            frames.pixels.resize((2 * count, *frames.pixels.shape[1:]), refcheck=False)
        frames.pixels[count] = pixels_HWC
        frames.ids.append(sample_id)
        frames.boxes.append(boxes)
        frames.classes.append(classes)
        frames.attributes.append(attributes)
        frames.texts.append(texts)
        frames.captions.append(captions)
        if second_HWC is not None:
            second.append(second_HWC)
        if second and len(second) != len(frames.ids):
            raise DataError(
                f"Sample {sample_id} of split '{split}': some samples have a second image and some have not",
                "Keep pairs and single images in datasets of their own",
            )
        if progress and (count + 1) % CHUNK == 0:
            progress(count + 1, total)
    if not frames.ids:
        raise _empty(split)
    frames.pixels.resize((len(frames.ids), *frames.pixels.shape[1:]), refcheck=False)
    frames.second = np.stack(second) if second else None
    if progress:
        progress(len(frames.ids), len(frames.ids))
    return frames


def materialise_shards(
    reader: Reader,
    split: str,
    limit: int | None,
    spec: PreprocessSpec,
    size: int,
    wanted: Callable[[int], bool],
) -> Iterator[tuple[int, Frames]]:
    """Read a split in shards of `size` samples (`sample_shards`), so that it never lies in memory as a whole.

    Yields:
        Number of the shard, and its frames.

    Raises:
        DataError: as `materialise`, a split without samples included.
    """
    for shard, samples in sample_shards(reader, split, limit, size, wanted):
        yield shard, materialise(_Part(reader, samples), split, size, spec)


def sample_shards(
    reader: Reader, split: str, limit: int | None, size: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Iterator[Sample]]]:
    """The samples of a split in shards of `size`; each shard is to be used up before the next is asked for.

    Args:
        wanted: number of a shard -> whether to make it; the samples of the others are drawn only by readers that
            cannot make any sample by itself.

    Yields:
        Number of the shard, and its samples.

    Raises:
        DataError: a malformed sample, or a split without any.
    """
    if isinstance(reader, RandomAccess):
        total = reader.num_samples(split, limit)
        if total == 0:
            raise _empty(split)
        for shard in filter(wanted, range(-(-total // size))):
            indices = range(shard * size, min((shard + 1) * size, total))
            yield shard, (reader.sample(split, i) for i in indices)
        return
    samples = iter(reader.samples(split, limit))
    for shard in itertools.count():
        part = itertools.islice(samples, size)
        first = next(part, None)
        if first is None:
            if shard == 0:
                raise _empty(split)
            return
        if wanted(shard):
            yield shard, itertools.chain([first], part)
        else:
            collections.deque(part, maxlen=0)


class _Part:
    """Some samples of a reader, as a reader."""

    def __init__(self, reader: Reader, samples: Iterator[Sample]) -> None:
        self.name, self.labels, self.splits, self._samples = reader.name, reader.labels, reader.splits, samples

    def samples(self, split: str, limit: int | None = None) -> Iterator[Sample]:
        return self._samples


def make_questions(frames: Frames, tokenizer: Tokenizer, labels: Labels, *, truncate: bool = False) -> Questions:
    """Encode every text of the frames.

    Raises:
        DataError: an answer that is not in `labels.answers`, or a text that the tokenizer refuses (unless `truncate`).
    """
    answer_ids = {answer: i for i, answer in enumerate(labels.answers)}
    flat = [(i, text) for i, texts in enumerate(frames.texts) for text in texts]
    best = [_best_known(text, answer_ids) for _, text in flat]
    for (i, text), answer in zip(flat, best, strict=True):
        if answer < 0 and not text.answers:
            raise DataError(
                f"Sample {frames.ids[i]}: the answer '{text.answer}' is not one of the {len(answer_ids)} known answers",
                "Add it to the reader's labels, or leave the question out",
            )
    try:
        input_ids_QL = tokenizer.encode_batch([text.text for _, text in flat], truncate=truncate)
    except TextError:
        _name_refused(frames, tokenizer, truncate)
        raise
    return Questions(
        image_index=np.array([i for i, _ in flat], np.int64),
        input_ids=input_ids_QL,
        answers=np.array(best, np.int64),
        referred=[text.referred for _, text in flat],
        kinds=[text.kind for _, text in flat],
        texts=[text.text for _, text in flat],
    )


def _best_known(text: Text, answer_ids: dict[str, int]) -> int:
    """Id of the answer, or of the most frequent one in the list among what the annotators said; -1 = none."""
    if text.answer in answer_ids:
        return answer_ids[text.answer]
    counts = Counter(answer for answer in map(normalise_answer, text.answers) if answer in answer_ids)
    return answer_ids[counts.most_common(1)[0][0]] if counts else -1


def _name_refused(frames: Frames, tokenizer: Tokenizer, truncate: bool) -> None:
    for sample_id, texts in zip(frames.ids, frames.texts, strict=True):
        try:
            tokenizer.encode_batch([text.text for text in texts], truncate=truncate)
        except TextError as problem:
            raise DataError(f"Sample {sample_id}: {problem.what}", problem.fix) from problem


def _rows(reader: Reader, split: str, limit: int | None, spec: PreprocessSpec) -> Iterator[Row]:
    for sample in reader.samples(split, limit):
        yield _row(sample, reader.labels, spec)


def _rows_in_parallel(
    reader: RandomAccess, split: str, total: int, spec: PreprocessSpec, workers: int
) -> Iterator[Row]:
    # Spawned, not forked: the caller may hold PyTorch's threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    chunks = [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for rows in pool.map(partial(_draw_chunk, reader, split, spec), chunks):
            yield from rows


def _draw_chunk(reader: RandomAccess, split: str, spec: PreprocessSpec, indices: range) -> list[Row]:
    return [_row(reader.sample(split, index), reader.labels, spec) for index in indices]


def _row(sample: Sample, labels: Labels, spec: PreprocessSpec) -> Row:
    """Check a sample and bring it to the model's size."""
    n = len(sample.classes)
    boxes = np.asarray(sample.boxes, np.float32)
    if boxes.shape != (n, 4) or len(sample.attributes) != n:
        raise _bad(sample, f"{n} classes, boxes of shape {boxes.shape}, {len(sample.attributes)} attribute lists")
    if n and not (np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()):
        raise _bad(sample, "a box without area, or not a number")
    if n and not (sample.classes.min() >= 0 and sample.classes.max() < len(labels.classes)):
        raise _bad(sample, f"a class outside 0..{len(labels.classes) - 1}")
    attributes = np.zeros((n, len(labels.attributes)), np.float32)
    for row, tags in zip(attributes, sample.attributes, strict=True):
        if any(not 0 <= tag < len(labels.attributes) for tag in tags):
            raise _bad(sample, f"an attribute outside 0..{len(labels.attributes) - 1}")
        row[list(tags)] = 1
    for text in sample.texts:
        if any(not 0 <= i < n for i in text.referred):
            raise _bad(sample, f"the text {text.text!r} refers to an object that is not there")
    return (
        sample.id,
        preprocess(sample.image, spec),
        scale_boxes(boxes, sample.image.size, spec),
        sample.classes.astype(np.int64),
        attributes,
        sample.texts,
        sample.captions,
        None if sample.second is None else preprocess(sample.second, spec),
    )


def _empty(split: str) -> DataError:
    return DataError(f"Split '{split}' has no samples", "Check the folder, or raise the limit")


def _bad(sample: Sample, what: str) -> DataError:
    return DataError(f"Sample {sample.id} is malformed: {what}", "Mend the dataset's reader or the record")
