"""Parts of NLVR sentences with their meaning on many scenes at once: things, quantifiers, and claims about one box.

Every phrase is drawn together with numpy arrays over S scenes. The wording follows training sentences only, in the
canonical words of `nlvr_words`. Readings were chosen where training labels decide: "a box with 3 X" means exactly 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgevlm.data.nlvr import COLOURS, SHAPES, SIZES
from edgevlm.data.nlvr_scenes import Rng, Scenes

COLOUR_NAMES, SIZE_NAMES = tuple(COLOURS.values()), tuple(SIZES.values())


@dataclass(frozen=True)
class Thing:
    """A noun phrase without article, and the items it names, (S, 3, 8)."""

    text: str
    items: np.ndarray


@dataclass(frozen=True)
class Claim:
    """Something said of one box, and what it means in every box of S scenes."""

    text: str
    """Goes after "with" or "has"."""
    holds: np.ndarray
    """(S, 3) bool."""
    items: np.ndarray
    """(S, 3, 8) bool: what it speaks of."""
    count: np.ndarray
    """(S, 3) int: how many of them are in the box."""


def pick(rng: Rng, *options: Any) -> Any:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def weighted(rng: Rng, options: Sequence[tuple[float, Any]]) -> Any:
    """One of the (weight, option) pairs."""
    weights = np.array([weight for weight, _ in options])
    return options[int(rng.choice(len(options), p=weights / weights.sum()))][1]


def some_number(rng: Rng, counts: np.ndarray, low: int = 1, high: int = 8) -> int:
    """A number that is the count somewhere, so that what is said of it is neither always true nor always false."""
    value = int(counts.reshape(-1)[rng.integers(counts.size)]) + int(rng.choice((-1, 0, 0, 0, 1)))
    return min(max(value, low), high)


def quantify(rng: Rng, counts: np.ndarray, forms: Sequence[tuple[float, str]]) -> tuple[str, np.ndarray, int]:
    """A quantifier, where it is true of `counts`, and its number (1 without one).

    Forms: a, no, is (bare number, exactly), exactly, only, least, most, more, less.
    """
    form = weighted(rng, forms)
    if form == "a":
        return "a", counts >= 1, 1
    if form == "no":
        return "no", counts == 0, 1
    number = some_number(rng, counts, low=2 if form == "less" else 1)
    compare: dict[str, tuple[str, Callable[[], np.ndarray]]] = {
        "is": ("{}", lambda: counts == number),
        "exactly": ("exactly {}", lambda: counts == number),
        "only": ("only {}", lambda: counts == number),
        "least": ("at least {}", lambda: counts >= number),
        "most": ("at most {}", lambda: counts <= number),
        "more": ("more than {}", lambda: counts > number),
        "less": ("less than {}", lambda: counts < number),
    }
    text, truth = compare[form]
    return text.format(number), truth(), number


def thing(rng: Rng, scenes: Scenes, towers: bool, colour: float = 0.8, shape: float = 0.6, size: float = 0.06) -> Thing:
    """An item by colour, shape and size, each named with the given probability."""
    items, words = scenes.present, []
    if not towers and rng.random() < size:
        index = int(rng.integers(3))
        words.append(pick(rng, *(("small",), ("medium",), ("large",))[index]))
        items = items & (scenes.size == index)
    if rng.random() < colour:
        index = int(rng.integers(3))
        words.append(COLOUR_NAMES[index])
        items = items & (scenes.colour == index)
    noun = "block" if towers else "item"
    if not towers and rng.random() < shape:
        index = int(rng.integers(3))
        noun = SHAPES[index]
        items = items & (scenes.shape == index)
    return Thing(" ".join([*words, noun]), items)


def place(rng: Rng, scenes: Scenes) -> tuple[str, np.ndarray]:
    """Like "touching the base" and its like, with the items (S, 3, 8) that do."""
    edge = scenes.left | scenes.right | scenes.top | scenes.bottom
    corner = (scenes.left | scenes.right) & (scenes.top | scenes.bottom)
    kind = weighted(
        rng, [(4, "edge"), (4, "base"), (2, "right"), (2, "corner"), (0.3, "top"), (0.2, "left"), (0.3, "right corner")]
    )
    tail = pick(rng, "", "", " of a box")
    texts = {
        "edge": pick(rng, "the edge", "any edge", "a edge", "the edge", "the edge of the box", f"a edge{tail}"),
        "base": pick(rng, f"the base{tail}", "the base", "the base of a box", "the base base", "the base edge"),
        "right": pick(rng, "right edge of a box", "right edge of a box", "the right edge"),
        "corner": pick(rng, f"a corner{tail}", "the corner", f"a corner{tail}", "a box corner"),
        "top": pick(rng, f"the roof{tail}", f"the top{tail}"),
        "left": f"left edge{tail}",
        "right corner": pick(rng, f"the right corner{tail}", f"the base right corner{tail}"),
    }
    where = {
        "edge": edge,
        "base": scenes.bottom,
        "right": scenes.right,
        "corner": corner,
        "top": scenes.top,
        "left": scenes.left,
        "right corner": scenes.right
        & (scenes.bottom if "base" in texts["right corner"] else scenes.top | scenes.bottom),
    }
    closely = pick(rng, "closely ", "closely ", "") if kind not in ("edge",) else pick(rng, "closely ", "", "", "")
    if kind == "corner" and rng.random() < 0.1:
        closely = "nearly "
    return f"{closely}touching {texts[kind]}", where[kind]


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _colours_of(scenes: Scenes) -> np.ndarray:
    """(S, 3, 3) int: items of each colour in each box."""
    return np.stack([(scenes.colour == i).sum(2) for i in range(3)], -1)


# --- claims about any box ------------------------------------------------------------------------------------------


def amount(rng: Rng, scenes: Scenes, towers: bool) -> Claim:
    """Like "exactly 3 item", "only 1 black item", "2 blue circle"."""
    it = thing(rng, scenes, towers, colour=0.6, shape=0.25)
    count = it.items.sum(2)
    text, holds, number = quantify(
        rng, count, [(4, "is"), (3, "exactly"), (3, "only"), (3, "least"), (0.5, "most"), (0.5, "more"), (0.4, "less"),
                     (1, "a"), (0.3, "no")]
    )  # fmt: skip
    if text.startswith("only") and it.text not in ("item", "block") and number > 1 and rng.random() < 0.2:
        holds = holds & (count == scenes.height)
    end = pick(rng, "", "", "", " in it", "")
    return Claim(f"{text} {it.text}{end}", holds, it.items, count)


def list_of(rng: Rng, scenes: Scenes, towers: bool) -> Claim:
    """Like "a black circle and 2 blue item" and longer lists; "a" is exactly one here."""
    number, parts = int(rng.choice((2, 2, 2, 3, 3, 4))), []
    holds, items = np.ones(scenes.height.shape, bool), np.zeros(scenes.present.shape, bool)
    forms = [(4, "a"), (1, "is"), (1.5, "least"), (0.4, "exactly"), (0.2, "more")]
    only_colours = rng.random() < 0.2
    order = rng.permutation(3)
    for i in range(min(number, 3) if only_colours else number):
        if only_colours:
            it = Thing(COLOUR_NAMES[order[i]], scenes.colour == order[i])
        else:
            it = thing(rng, scenes, towers, colour=0.93, shape=0.75, size=0.02)
        text, true, _ = quantify(rng, it.items.sum(2), forms)
        if text == "a":
            true = it.items.sum(2) == 1
        parts.append(f"{text} {it.text}")
        holds, items = holds & true, items | it.items
    noun = pick(rng, " block" if towers else " item", "") if only_colours else ""
    return Claim(_and(parts) + noun + pick(rng, "", "", "", " in it"), holds, items, items.sum(2))


def colours(rng: Rng, scenes: Scenes, towers: bool) -> Claim:
    """Like "only blue and black item", "4 item of 3 different color", "2 item of the same color"."""
    noun = "block" if towers else "item"
    per_colour, height = _colours_of(scenes), scenes.height
    present = per_colour > 0
    amount_text, amount_true = "", np.ones(height.shape, bool)
    if rng.random() < 0.55:
        amount_text, amount_true, _ = quantify(
            rng, height, [(5, "is"), (2, "exactly"), (2, "least"), (1, "only"), (0.4, "most")]
        )
        amount_text += " "
    kind = weighted(rng, [(4, "two"), (3, "one"), (3, "kinds"), (1.5, "all"), (2, "same")])
    a, b = (int(i) for i in rng.permutation(3)[:2])
    if kind == "two":
        true = present[..., a] & present[..., b] & (per_colour[..., a] + per_colour[..., b] == height)
        pair = f"{COLOUR_NAMES[a]} and {COLOUR_NAMES[b]}"
        text = pick(
            rng,
            f"only {pair} {noun}",
            f"{amount_text}{noun} of only {pair} color",
            f"{amount_text}{noun} of {pair} color",
            f"{pair} {noun}",
            f"{noun} of {pair} color only",
        )
        if not text.startswith(amount_text):
            amount_true = np.ones(height.shape, bool)
        if text == f"{pair} {noun}":
            true = (
                present[..., a]
                & present[..., b]
                & ((height == per_colour[..., a] + per_colour[..., b]) | (rng.random() < 0.5))
            )
    elif kind == "one":
        true = present[..., a] & (per_colour[..., a] == height)
        name = COLOUR_NAMES[a]
        text = pick(rng, f"only {name} {noun}", f"{name} {noun} only", f"only {name} color {noun}",
                    f"{amount_text}{noun} of {name} color", f"{amount_text}{noun} that is {name}",
                    f"{amount_text}{noun} that is all {name}")  # fmt: skip
        if not text.startswith(amount_text):
            amount_true = np.ones(height.shape, bool)
    elif kind == "kinds":
        number = int(rng.choice((1, 2, 2, 2, 3, 3)))
        true = present.sum(2) == number
        form = pick(
            rng, "of {} different color", "of {} different color", "of only {} color", "of only {} different color"
        )
        text = f"{amount_text}{noun} {form.format(number)}"
    elif kind == "all":
        true = present.all(2)
        text = f"{amount_text}{noun} of all 3 {pick(rng, 'different ', '')}color"
    else:
        true = (present.sum(2) == 1) & (height > 1 if rng.random() < 0.8 else height > 0)
        text = pick(rng, f"{amount_text}{noun} of the same color", f"{amount_text}{noun} of same color",
                    f"{amount_text}{noun} and the {noun} is the same color")  # fmt: skip
    return Claim(text, true & amount_true, scenes.present, height)


def of_which(rng: Rng, scenes: Scenes, towers: bool) -> Claim:
    """Like "6 item of that 2 is yellow", "2 item and the 2 is black"."""
    noun = "block" if towers else "item"
    text, true, number = quantify(
        rng, scenes.height, [(5, "is"), (2, "exactly"), (2, "least"), (1, "only"), (1, "most")]
    )
    it = thing(rng, scenes, towers, colour=0.8, shape=0.35)
    words = it.text.removesuffix(" item").removesuffix(" block") if it.text != noun else noun
    count = it.items.sum(2)
    if rng.random() < 0.4:
        whole = count == scenes.height
        link = pick(rng, f"and the {number} is {words}", f"and the {noun} is {words}", f"and it is {words}", f"that is {words}",
                    f"and the {number} {noun} is {words}", f"and it is all {words}")  # fmt: skip
        return Claim(f"{text} {noun} {link}", true & whole, it.items, count)
    inner, inner_true, _ = quantify(rng, count, [(5, "is"), (2, "least"), (2, "exactly"), (1, "only"), (0.7, "most")])
    link = pick(rng, f"of that {inner} is {words}", f"of that {inner} is {words}", f"that {inner} is {words}",
                f"{inner} of that is {words}", f"that has {inner} {words} {noun}", f"and {inner} is {words}")  # fmt: skip
    return Claim(f"{text} {noun} {link}", true & inner_true, it.items, count)


# --- claims about boxes of scattered items -------------------------------------------------------------------------


def at_wall(rng: Rng, scenes: Scenes) -> Claim:
    """Like "a yellow item touching the edge", with the like in front or behind."""
    it = thing(rng, scenes, False, shape=0.5, size=0.15)
    where_text, where = place(rng, scenes)
    if rng.random() < 0.2:
        where_text, where = f"not {where_text}", ~where
    items = it.items & where
    count = items.sum(2)
    text, holds, _ = quantify(rng, count, [(5, "a"), (1, "is"), (1, "least"), (0.7, "exactly"), (0.4, "only")])
    text = f"{text} {it.text} {where_text}"
    if rng.random() < 0.25:
        front, true, _ = quantify(rng, scenes.height, [(4, "is"), (2, "least"), (1, "exactly")])
        text, holds = f"{front} item {pick(rng, 'and', 'and', 'of that', 'that')} {text}", holds & true
    return Claim(text, holds, items, count)


def on_top(rng: Rng, scenes: Scenes) -> Claim:
    """Like "a blue item on top", "a black item touching the edge and a blue item on top of it"."""
    it = thing(rng, scenes, False, shape=0.2, size=0.0)
    upper = it.items & scenes.highest
    kind = weighted(rng, [(3, "top"), (3, "wall"), (1.5, "amount"), (1, "over")])
    noun = it.text if rng.random() < 0.7 else it.text.replace("item", "1")
    if kind == "top":
        return Claim(f"a {noun} on top", np.any(upper, 2), upper, upper.sum(2))
    if kind == "amount":
        text, true, _ = quantify(rng, scenes.height, [(4, "is"), (2, "least")])
        return Claim(f"{text} item and a {noun} on top", true & np.any(upper, 2), upper, upper.sum(2))
    other = thing(rng, scenes, False, shape=0.3, size=0.05)
    if kind == "wall":
        lower = other.items & scenes.bottom
        pairs = np.any(scenes.on & it.items[..., :, None] & lower[..., None, :], (2, 3))
        holds = pairs | (np.any(upper, 2) & np.any(lower, 2) & (scenes.height > 1))
        end = pick(rng, " on top", " on top of it", " on top of it")
        text = f"a {other.text} touching the edge and a {noun}{end}"
    else:
        lower = other.items & scenes.present
        holds = np.any(scenes.on & it.items[..., :, None] & lower[..., None, :], (2, 3))
        text = f"a {noun} {pick(rng, 'on top of', 'directly on top of', 'above')} {pick(rng, 'a', 'the')} {other.text}"
    items = upper | lower
    return Claim(text, holds, items, items.sum(2))


def beside(rng: Rng, scenes: Scenes) -> Claim:
    """Like "2 black item touching each other", "a black and a blue circle touching each other"."""
    if rng.random() < 0.6:
        it = thing(rng, scenes, False, shape=0.4, size=0.05)
        pairs = scenes.touching & it.items[..., :, None] & it.items[..., None, :]
        items = np.any(pairs, 3)
        text = f"2 {it.text} touching each other"
    else:
        one, other = thing(rng, scenes, False, size=0.0), thing(rng, scenes, False, size=0.0)
        pairs = scenes.touching & one.items[..., :, None] & other.items[..., None, :]
        items = np.any(pairs, 3) | np.any(pairs, 2)
        text = pick(rng, f"a {one.text} closely touching a {other.text}", f"a {one.text} and a {other.text} touching each other",
                    f"a {one.text} touching a {other.text}")  # fmt: skip
    holds = np.any(pairs, (2, 3))
    negated = rng.random() < 0.15
    return Claim(text.replace("touching", "not touching") if negated else text, holds ^ negated, items, items.sum(2))


def sizes(rng: Rng, scenes: Scenes) -> Claim:
    """Like "2 yellow square of the same size", "a blue circle of medium size"."""
    it = thing(rng, scenes, False, shape=0.8, size=0.0)
    if rng.random() < 0.5:
        index = int(rng.integers(3))
        items = it.items & (scenes.size == index)
        return Claim(f"a {it.text} of {SIZE_NAMES[index]} size", np.any(items, 2), items, items.sum(2))
    per_size = np.stack([(it.items & (scenes.size == i)).sum(2) for i in range(3)], -1)
    if rng.random() < 0.5:
        return Claim(f"2 {it.text} of the same size", np.any(per_size >= 2, 2), it.items, it.items.sum(2))
    return Claim(f"2 {it.text} of different size", ((per_size > 0).sum(2) >= 2), it.items, it.items.sum(2))
