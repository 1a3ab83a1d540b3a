"""Materialised splits: the same from any number of processes, scaled as their images are, and checked."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm.artifacts import Labels, PreprocessSpec
from edgevlm.data.frames import Frames, make_questions, materialise
from edgevlm.data.sample import Sample, Text
from edgevlm.data.scenes import Scenes
from edgevlm.data.text import Tokenizer, make_spec, train_vocabulary, write_vocabulary
from edgevlm.errors import DataError

SPEC = PreprocessSpec(height=96, width=64)


class Listed:
    """A reader of given samples, without random access."""

    name = "listed"
    labels = Labels(classes=("a", "b"), attributes=("x", "y", "z"), answers=("no", "yes"))
    splits = ("train",)

    def __init__(self, samples: list[Sample]) -> None:
        self.listed = samples

    def samples(self, split: str, limit: int | None = None) -> Iterator[Sample]:
        yield from self.listed[:limit]


GOOD = Sample(
    id="one",
    image=Image.new("RGB", (128, 32), (10, 20, 30)),
    boxes=np.array([[0, 0, 128, 32], [32, 8, 64, 16]], np.float32),
    classes=np.array([0, 1]),
    attributes=((0, 2), ()),
    texts=(Text("is it red?", "yes", (1,), "exist"), Text("is it blue?", "no")),
)


@pytest.fixture(scope="module")
def frames() -> Frames:
    return materialise(Scenes("vqa", 2, 4), "train", 40, SPEC)


def make_tokenizer(folder: Path, texts: list[str], max_tokens: int = 22) -> Tokenizer:
    write_vocabulary(folder / "vocab.txt", train_vocabulary(texts, 256))
    return Tokenizer(folder / "vocab.txt", make_spec(folder / "vocab.txt", max_tokens))


def test_processes_make_no_difference(frames: Frames) -> None:
    parallel = materialise(Scenes("vqa", 2, 4), "train", 40, SPEC, workers=2)
    assert parallel.ids == frames.ids == [f"train-{i}" for i in range(40)]
    assert np.array_equal(parallel.pixels, frames.pixels)
    assert parallel.texts == frames.texts
    for name in ("boxes", "classes", "attributes"):
        for a, b in zip(getattr(parallel, name), getattr(frames, name), strict=True):
            assert np.array_equal(a, b)
            assert a.dtype == b.dtype


def test_frames_follow_their_samples(frames: Frames) -> None:
    reader = Scenes("vqa", 2, 4)
    assert frames.pixels.shape == (40, 96, 64, 3)
    assert frames.pixels.dtype == np.uint8
    for i, sample in enumerate(reader.samples("train", 5)):
        # 128 x 128 becomes 64 wide and 96 high.
        np.testing.assert_allclose(frames.boxes[i], sample.boxes * [0.5, 0.75, 0.5, 0.75], atol=1e-4)
        for row, tags in zip(frames.attributes[i], sample.attributes, strict=True):
            assert np.nonzero(row)[0].tolist() == sorted(tags)
        assert frames.classes[i].tolist() == sample.classes.tolist()


def test_a_plain_reader_grows_without_a_limit() -> None:
    tiny = PreprocessSpec(height=2, width=2)
    many = [replace(GOOD, id=str(i), image=Image.new("RGB", (4, 4), (i % 256, 0, 0)), boxes=np.array([[0, 0, 2, 2]] * 2))
            for i in range(1100)]  # fmt: skip
    seen: list[tuple[int, int | None]] = []
    frames = materialise(
        Listed(many), "train", None, tiny, workers=2, progress=lambda n, total: seen.append((n, total))
    )
    assert len(frames) == len(frames.pixels) == 1100
    assert frames.pixels[:, 0, 0, 0].tolist() == [i % 256 for i in range(1100)]
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)
    assert seen[-1] == (1100, 1100)
    assert len(materialise(Listed(many), "train", 3, tiny)) == 3


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"classes": np.array([0])}, "1 classes"),
        ({"classes": np.array([0, 2])}, "class outside 0..1"),
        ({"classes": np.array([0, -1])}, "class outside 0..1"),
        ({"attributes": ((0,), (3,))}, "attribute outside 0..2"),
        ({"attributes": ((0,),)}, "1 attribute lists"),
        ({"boxes": np.array([[0, 0, 5, 5], [4, 4, 4, 9.0]])}, "without area"),
        ({"boxes": np.array([[0, 0, 5, 5], [4, 4, np.nan, 9.0]])}, "not a number"),
        ({"texts": (Text("is it?", "yes", (2,)),)}, "refers to an object that is not there"),
    ],
)
def test_malformed_samples_are_named(change: dict, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"Sample two is malformed: .*{complaint}"):
        materialise(Listed([GOOD, replace(GOOD, id="two", **change)]), "train", None, SPEC)


def test_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="'train' has no samples"):
        materialise(Listed([]), "train", None, SPEC)


def test_images_without_objects_are_fine() -> None:
    bare = Sample(id="bare", image=GOOD.image, texts=(Text("is it?", "no"),))
    frames = materialise(Listed([bare]), "train", None, SPEC)
    assert frames.boxes[0].shape == (0, 4)
    assert frames.attributes[0].shape == (0, 3)


def test_questions_point_at_their_image_and_answer(tmp_path: Path, frames: Frames) -> None:
    labels = Scenes("vqa", 2).labels
    tokenizer = make_tokenizer(tmp_path, [text.text for texts in frames.texts for text in texts])
    questions = make_questions(frames, tokenizer, labels)
    assert len(questions) == sum(map(len, frames.texts))
    assert questions.input_ids.shape == (len(questions), 22)
    assert questions.image_index.dtype == questions.answers.dtype == np.int64
    at = 0
    for i, texts in enumerate(frames.texts):
        for text in texts:
            assert questions.image_index[at] == i
            assert labels.answers[questions.answers[at]] == text.answer
            assert tokenizer.decode(questions.input_ids[at]) == text.text.replace("?", " ?")
            assert (questions.texts[at], questions.kinds[at], questions.referred[at]) == (
                text.text, text.kind, text.referred)  # fmt: skip
            at += 1


def test_foreign_answers_and_long_texts_name_the_sample(tmp_path: Path) -> None:
    frames = materialise(Listed([GOOD]), "train", None, SPEC)
    tokenizer = make_tokenizer(tmp_path, ["is it red?", "is it blue?"], max_tokens=5)
    with pytest.raises(DataError, match=r"Sample one: 'is it red\?' has 6 tokens"):
        make_questions(frames, tokenizer, Listed.labels)
    assert make_questions(frames, tokenizer, Listed.labels, truncate=True).input_ids[0, -1] == 3
    with pytest.raises(DataError, match="Sample one: the answer 'yes' is not one of"):
        make_questions(frames, tokenizer, Labels(classes=("a",), attributes=(), answers=("no", "maybe")))
