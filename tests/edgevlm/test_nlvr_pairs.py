"""Drawn NLVR scenes and sentences: true by a second reading, balanced, minimal pairs, and the same on every call."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.data.nlvr import COLOURS, LABELS, SHAPES, SIZES, Record
from edgevlm.data.nlvr_pairs import MEMBERS, Errors, PairSource
from edgevlm.data.nlvr_scenes import Scenes, from_records, make_pool
from edgevlm.data.nlvr_sentences import draw
from edgevlm.data.nlvr_words import SAME, VOCABULARY, WORDS
from tests.edgevlm.nlvr_interpreter import interpret

KEYS = {name: key for key, name in COLOURS.items()}


def _record(number: int, boxes: list[list[dict[str, Any]]]) -> Record:
    fields = {"sentence": "x", "label": "true", "identifier": str(number), "directory": "0", "structured_rep": boxes}
    return Record.model_validate(fields)


def _records(count: int = 60) -> list[Record]:
    """Half scattered scenes on a grid that nothing overlaps in, half towers."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        boxes = []
        for _ in range(3):
            if number % 2:
                colours = rng.choice(list(COLOURS), size=rng.integers(1, 5))
                box = [
                    {"x_loc": 40, "y_loc": y, "size": 20, "type": "square", "color": str(colour)}
                    for y, colour in zip((80, 59, 38, 17), colours, strict=False)
                ]
            else:
                cells = rng.permutation(9)[: rng.integers(1, 8)]
                box = []
                for cell in cells:
                    size = int(rng.choice(list(SIZES)))
                    x, y = ((0, 34, 100 - size)[i] for i in divmod(int(cell), 3))
                    kind = {"type": str(rng.choice(SHAPES)), "color": str(rng.choice(list(COLOURS)))}
                    box.append({"x_loc": x, "y_loc": y, "size": size} | kind)
            boxes.append(box)
        records.append(_record(number, boxes))
    return records


def _boxes(scenes: Scenes, row: int) -> list[list[dict[str, Any]]]:
    """A scene as the interpreter reads it."""
    names, sizes = tuple(COLOURS.values()), tuple(SIZES)
    return [
        [
            {
                "colour": names[scenes.colour[row, box, slot]],
                "shape": SHAPES[scenes.shape[row, box, slot]],
                "size": sizes[scenes.size[row, box, slot]],
                "x": int(scenes.x[row, box, slot]),
                "y": int(scenes.y[row, box, slot]),
            }
            for slot in range(8)
            if scenes.colour[row, box, slot] >= 0
        ]
        for box in range(3)
    ]


@pytest.fixture(scope="module")
def source() -> PairSource:
    return PairSource(_records(), families=80, seed=3)


@pytest.mark.parametrize("towers", [False, True])
def test_sentences_mean_what_they_say(source: PairSource, towers: bool) -> None:
    """Against a reader of the words that shares no code; it must understand a fair share of the sentences."""
    pool = source.pools[towers]
    assert pool is not None
    rng = np.random.default_rng(1)
    understood = 0
    for _ in range(400):
        scenes = pool.take(rng.integers(len(pool), size=40))
        sentence = draw(rng, scenes, towers, 2)
        for row in range(len(scenes)):
            truth = interpret(sentence.text, _boxes(scenes, row))
            if truth is not None:
                assert truth == sentence.truth[row], (sentence.text, _boxes(scenes, row))
                understood += row == 0
    assert understood > 60


@pytest.mark.parametrize("towers", [False, True])
def test_traces_are_consistent(source: PairSource, towers: bool) -> None:
    pool = source.pools[towers]
    assert pool is not None
    rng = np.random.default_rng(2)
    for _ in range(300):
        scenes = pool.take(rng.integers(len(pool), size=40))
        sentence = draw(rng, scenes, towers, 2)
        assert sentence.items.shape == (40, 3, 8) and sentence.boxes.shape == sentence.counts.shape == (40, 3)
        assert not (sentence.items & ~scenes.present).any(), f"{sentence.text}: it speaks of an item that is not there"
        words = set(sentence.text.replace(",", " ").split())
        assert words <= set(WORDS), f"not in the vocabulary: {words - set(WORDS)}"


def test_scenes_stay_possible(source: PairSource) -> None:
    """Edits keep items inside their box and apart from each other, and towers standing."""
    scattered, towers = source.pools
    assert scattered is not None and towers is not None
    assert (towers.height >= 1).all() and (towers.height <= 4).all()
    for row in range(0, len(towers), 7):
        for box in _boxes(towers, row):
            assert [item["y"] for item in box] == [80, 59, 38, 17][: len(box)]
    for row in range(0, len(scattered), 7):
        for box in _boxes(scattered, row):
            for i, a in enumerate(box):
                assert 0 <= a["x"] <= 100 - a["size"] and 0 <= a["y"] <= 100 - a["size"]
                for b in box[i + 1 :]:
                    apart = a["x"] + a["size"] <= b["x"] or b["x"] + b["size"] <= a["x"]
                    assert apart or a["y"] + a["size"] <= b["y"] or b["y"] + b["size"] <= a["y"]


def test_families_differ_by_few_edits() -> None:
    _, towers = from_records(_records())
    pool = make_pool(towers, 50, MEMBERS, True, np.random.default_rng(0))
    colour = pool.colour.reshape(50, MEMBERS, -1)
    changed = (colour != colour[:, :1]).sum(2)
    assert (changed[:, 0] == 0).all() and changed.max() <= 6, "three edits change at most two blocks each"
    assert (changed[:, 1:] == 0).mean() < 0.4, "most members differ from the first"


def test_half_of_the_pairs_are_true_and_some_are_minimal(source: PairSource) -> None:
    for number in range(6):
        pairs = source.make(number, 4)
        assert len(pairs.texts) == 4 and pairs.tags.shape[0] == 32
        assert pairs.truth.reshape(4, 8).sum(1).tolist() == [4] * 4


def test_a_number_decides_the_batch(source: PairSource) -> None:
    again = PairSource(_records(), families=80, seed=3)
    for number in (0, 5, 2**31):
        one, two, other = source.make(number, 2), again.make(number, 2), source.make(number + 1, 2)
        assert one.texts == two.texts
        assert np.array_equal(one.boxes, two.boxes) and np.array_equal(one.tags, two.tags)
        assert one.texts != other.texts


def test_tokens_show_the_scene() -> None:
    """Without errors, tags and boxes say exactly what the records say, box by box in some order."""
    record = _records(2)[0]
    source = PairSource([record], families=1, errors=Errors(0.0, 0.0), seed=0)
    pool = source.pools[0]
    assert pool is not None
    pairs = source.make(0, 1)
    possible = [Counter(_shown(box) for box in _boxes(pool, row)) for row in range(MEMBERS)]
    for row in range(len(pairs.truth)):
        boxes: list[list[dict[str, Any]]] = [[], [], []]
        for tags, box, score in zip(pairs.tags[row], pairs.boxes[row], pairs.scores[row], strict=True):
            if score > 0:
                x, y, right, _ = (round(float(v)) for v in box * (400, 100, 400, 100))
                place = min(2, x // 150)
                boxes[place].append(
                    {"colour": LABELS.attributes[tags[4:7].argmax()], "shape": LABELS.classes[tags[:3].argmax()]}
                    | {"size": right - x, "x": x - 150 * place, "y": y}
                )
        assert Counter(map(_shown, boxes)) in possible


def _shown(box: list[dict[str, Any]]) -> tuple[Any, ...]:
    return tuple(sorted(tuple(sorted(item.items())) for item in box))


def test_spellings_lead_to_words_of_the_vocabulary() -> None:
    assert set(SAME.values()) <= set(VOCABULARY) and set(SAME) <= set(VOCABULARY)
    assert not set(SAME) & set(SAME.values()), "a chain of spellings"
    assert not set(SAME) & set(WORDS), "a word the drawn sentences use cannot stand for another"
    assert torch.tensor(len(VOCABULARY)) < 400
