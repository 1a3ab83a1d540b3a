"""Drawn scenes: pictures against their boxes, answers against a second interpreter, balance, streams."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.data import open_reader
from edgevlm.data.scene_facts import SHAPES, Scene
from edgevlm.data.scenes import CANVAS_PX, RGB, Scenes, draw
from edgevlm.errors import DataError, RecipeError
from edgevlm.recipe import DataSection
from tests.edgevlm.scene_interpreter import Interpreter, Object, Refused, read_objects

NUM_SCENES = 320  # x 8 texts: 2,560 per task


@pytest.fixture(scope="module", params=["vqa", "reasoning"])
def reader(request: pytest.FixtureRequest) -> Scenes:
    return Scenes(request.param, seed=3, texts_per_image=8)


def interpreter_of(sample, labels) -> Interpreter:
    return Interpreter(read_objects(sample.boxes, sample.classes, sample.attributes, labels))


# --- texts -------------------------------------------------------------------------------------------------------


def test_second_interpreter_agrees(reader: Scenes) -> None:
    """Answer and referred objects of every text, found again from the text and the boxes alone."""
    checked: Counter[str] = Counter()
    for sample in reader.samples("train", NUM_SCENES):
        interpreter = interpreter_of(sample, reader.labels)
        for text in sample.texts:
            read = interpreter.question if reader.task == "vqa" else interpreter.sentence
            verdict = read(text.text)
            assert verdict.answer == text.answer, (sample.id, text)
            assert verdict.referred == set(text.referred), (sample.id, text)
            assert text.answer in reader.labels.answers
            checked[text.kind] += 1
    assert checked.total() >= 2000
    assert set(checked) == {"exist", "count", "colour", "shape", "texture", "relation", "compare"}
    assert min(checked.values()) >= 150


def test_interpreter_can_disagree() -> None:
    """The oracle is worth something only if it refuses and contradicts."""
    looks = {"shape": "star", "colour": "red", "size": "small", "texture": "plain"}
    objects = [Object(0, 10, 10, looks), Object(1, 50, 14, {**looks, "colour": "blue"})]
    interpreter = Interpreter(objects)
    assert interpreter.question("is the red star left of the blue star?").answer == "yes"
    assert interpreter.question("is the blue star left of the red star?").answer == "no"
    for ambiguous in ("what colour is the star", "is the red star above the blue star", "is the pink star tall"):
        with pytest.raises(Refused):
            interpreter.question(ambiguous)


def test_answers_are_balanced(reader: Scenes) -> None:
    """Majority, and per kind and word the share of yes (true): the words alone give nothing away."""
    texts = [text for sample in _texts_only(reader, 800) for text in sample]
    answers = Counter(text.answer for text in texts)
    if reader.task == "vqa":
        assert answers.most_common(1)[0][1] / len(texts) <= 0.20
        assert set(answers) == set(reader.labels.answers)
        for kind in ("count", "colour", "shape", "texture"):
            share = Counter(text.answer for text in texts if text.kind == kind)
            assert max(share.values()) / share.total() <= 0.40
    yes: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for text in texts:
        if text.answer in ("yes", "no", "true", "false"):
            for word in {"", *re.findall(r"\w+", text.text)}:
                total[text.kind, word] += 1
                yes[text.kind, word] += text.answer in ("yes", "true")
    for key, n in total.items():
        if n >= 100:
            assert abs(yes[key] / n - 0.5) < 4.5 * 0.5 / math.sqrt(n), (key, yes[key], n)


def _texts_only(reader: Scenes, number: int):
    from edgevlm.data.scene_texts import make_texts

    for index in range(number):
        yield make_texts(reader.scene("val", index), reader.task, 8, np.random.default_rng([7, index]))


def test_texts_are_short_and_different(reader: Scenes) -> None:
    for texts in _texts_only(reader, 300):
        assert len({text.text for text in texts}) == len(texts) >= 6
        for text in texts:
            # Words and marks, [CLS] and [SEP]; whole words are single tokens in the trained vocabulary.
            assert len(re.findall(r"\w+|[?.]", text.text)) + 2 <= 20
            assert text.text == text.text.lower()


def test_several_captions_are_true_and_begin_with_the_one() -> None:
    several, one = Scenes("vqa", seed=5, captions_per_image=5), Scenes("vqa", seed=5)
    different = 0
    for index in range(20):
        sample, alone = several.sample("train", index), one.sample("train", index)
        assert len(sample.captions) == 5 and sample.captions[:1] == alone.captions and sample.texts == alone.texts
        assert all(interpreter_of(sample, several.labels).caption(caption) for caption in sample.captions)
        different += len(set(sample.captions))
    assert different > 80


def test_captions_match_and_near_misses_do_not() -> None:
    reader = Scenes("vqa", seed=5)
    matches: list[bool] = []
    captions: list[str] = []
    for pair in reader.pairs("train", 150):
        interpreter = interpreter_of(pair.sample, reader.labels)
        assert interpreter.caption(pair.caption) == pair.matches, pair.caption
        assert interpreter.caption(pair.sample.captions[0])
        matches.append(pair.matches)
        captions.append(re.sub(r"(star|circle|square|triangle|object)s\b|(cross)es\b", r"\1\2", pair.caption))
    assert sum(matches) == 150
    assert 40 <= sum(matches[::2]) <= 110  # which of the two comes first is a coin
    for a, b in zip(captions[::2], captions[1::2], strict=True):
        changed = [(x, y) for x, y in zip(a.split(), b.split(), strict=True) if x != y and "are" not in (x, y)]
        assert len(changed) == 1, (a, b)  # one word, apart from the plural that goes with a number


# --- pictures ----------------------------------------------------------------------------------------------------


def _scenes(split: str, number: int) -> list[Scene]:
    reader = Scenes("vqa", seed=11)
    return [reader.scene(split, index) for index in range(number)]


def test_boxes_are_tight_to_a_pixel() -> None:
    """On flat backgrounds, the box of what differs from the background is the object's box within 1 px."""
    checked: Counter[str] = Counter()
    for scene in _scenes("train", 250):
        if scene.backdrop != "flat":
            continue
        distance_HW = np.abs(np.asarray(draw(scene), int) - scene.backdrop_rgb[0]).max(2)
        for i, thing in enumerate(scene.things):
            x1, y1, x2, y2 = thing.box
            if any(
                x1 - 4 < o.box[2] and o.box[0] < x2 + 4 and y1 - 4 < o.box[3] and o.box[1] < y2 + 4
                for k, o in enumerate(scene.things)
                if k != i
            ):
                continue
            left, top = max(0, math.floor(x1) - 3), max(0, math.floor(y1) - 3)
            rows, columns = np.nonzero(distance_HW[top : math.ceil(y2) + 3, left : math.ceil(x2) + 3] > 12)
            seen = (columns.min() + left, rows.min() + top, columns.max() + left + 1, rows.max() + top + 1)
            assert np.abs(np.subtract(seen, thing.box)).max() <= 1.0, (thing, seen)
            checked[str(thing.looks.shape)] += 1
    assert set(checked) == set(SHAPES)
    assert checked.total() > 100


def test_sizes_are_far_apart_and_inside_the_canvas() -> None:
    for scene in _scenes("val", 200):
        assert 3 <= len(scene.things) <= 6
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            assert min(x1, y1) >= 0
            assert max(x2, y2) <= CANVAS_PX
            low, high = {"small": (16, 24), "large": (32, 46)}[str(thing.looks.size)]
            assert low <= max(x2 - x1, y2 - y1) <= high


def test_occlusion_is_mild_and_never_by_the_same_colour() -> None:
    """Each object drawn alone and in the scene: at least 75 % of its pixels are the same (3 % for soft edges)."""
    worst = 1.0
    for scene in _scenes("test", 120):
        whole = np.asarray(draw(scene), int)
        empty = np.asarray(draw(Scene((), scene.backdrop, scene.backdrop_rgb, scene.backdrop_seed)), int)
        for i, thing in enumerate(scene.things):
            alone = np.asarray(draw(Scene((thing,), scene.backdrop, scene.backdrop_rgb, scene.backdrop_seed)), int)
            own_HW = np.abs(alone - empty).max(2) > 20
            same = (np.abs(whole - alone).max(2) <= 20)[own_HW].mean()
            worst = min(worst, same)
            assert same >= 0.72
            for other in scene.things[:i]:
                if other.looks.colour == thing.looks.colour:
                    apart_x = max(thing.box[0] - other.box[2], other.box[0] - thing.box[2])
                    apart_y = max(thing.box[1] - other.box[3], other.box[1] - thing.box[3])
                    assert max(apart_x, apart_y) >= 2
    assert worst < 0.95  # there is occlusion


def test_named_colour_is_the_colour_seen() -> None:
    for scene in _scenes("val", 60):
        pixels = np.asarray(draw(scene), int)
        thing = scene.things[-1]  # nothing covers the last one
        if thing.looks.texture != "plain":
            continue
        x, y = (round(value) for value in thing.centre)
        nearest = min(RGB, key=lambda name: np.abs(pixels[y, x] - RGB[name]).sum())
        assert nearest == thing.looks.colour


def test_textures_differ_in_the_picture() -> None:
    """Around the centre, plain is one colour, and stripes and dots have a second one on 8 % to 80 % of the pixels."""
    for scene in _scenes("train", 100):
        thing = scene.things[-1]
        if thing.looks.shape not in ("square", "circle"):
            continue
        x, y = (round(value) for value in thing.centre)
        inner = np.asarray(draw(scene), int)[y - 4 : y + 4, x - 4 : x + 4].reshape(-1, 3)
        dark = (np.abs(inner - thing.rgb).max(1) > 40).mean()
        assert (dark == 0) if thing.looks.texture == "plain" else (0.08 < dark < 0.8), (thing, dark)


# --- streams -----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), index=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_sample_depends_on_seed_split_and_index_alone(seed: int, index: int) -> None:
    scenes = {
        (s, split, i): Scenes("vqa", s).scene(split, i)
        for s in (seed, seed + 1)
        for split in ("train", "val", "test")
        for i in (index, index + 1)
    }
    assert len({scene.things for scene in scenes.values()}) == len(scenes)
    again = Scenes("vqa", seed).scene("val", index)
    assert again == scenes[seed, "val", index]
    assert again.things != Scenes("vqa", seed).scene("test", index).things


def test_samples_are_the_same_in_any_order_and_repeat_exactly() -> None:
    reader = Scenes("vqa", seed=1)
    in_order = list(reader.samples("val", 5))
    alone = reader.sample("val", 4)
    assert alone.texts == in_order[4].texts
    assert alone.captions == in_order[4].captions
    assert alone.image.tobytes() == in_order[4].image.tobytes()
    assert np.array_equal(alone.boxes, in_order[4].boxes)


def test_pictures_of_splits_do_not_meet() -> None:
    reader = Scenes("vqa", seed=0)
    pictures = [draw(reader.scene(split, i)).tobytes() for split in reader.splits for i in range(150)]
    assert len(set(pictures)) == len(pictures)


# --- errors ------------------------------------------------------------------------------------------------------


def test_open_reader_by_name() -> None:
    reader = open_reader(DataSection(dataset="scenes", texts_per_image=3), "reasoning", 4)
    assert reader.labels.answers == ("false", "true")
    (sample,) = reader.samples("test", 1)
    assert len(sample.texts) == 3


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'scenes'"):
        open_reader(DataSection(dataset="scene"), "vqa", 0)
    with pytest.raises(RecipeError, match="Did you mean 'reasoning'"):
        Scenes("reason", 0)
    with pytest.raises(DataError, match="no split 'valid'"):
        next(Scenes("vqa", 0).samples("valid", 1))


def test_training_split_needs_a_limit() -> None:
    with pytest.raises(DataError, match=r"data\.num_train"):
        next(Scenes("vqa", 0).samples("train"))
    assert Scenes("vqa", 0).num_samples("val", None) == 1000
