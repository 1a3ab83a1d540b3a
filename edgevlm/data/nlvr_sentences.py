"""Sentences about NLVR scenes with their truth on many scenes at once, and a trace of how it comes about. Ours.

A sentence is drawn against a sample of scenes, so that it is true of some and false of others; the trace (items it
speaks of, boxes where its claim holds, how many it counts in each) is what teaches a small network to get there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgevlm.data import nlvr_towers as towers_
from edgevlm.data.nlvr_phrases import (
    COLOUR_NAMES,
    Claim,
    amount,
    at_wall,
    beside,
    colours,
    list_of,
    of_which,
    on_top,
    pick,
    place,
    quantify,
    sizes,
    some_number,
    thing,
    weighted,
)
from edgevlm.data.nlvr_scenes import Rng, Scenes

MAX_TRIES = 30


@dataclass(frozen=True)
class Sentence:
    """A sentence in canonical words, and its meaning on S scenes."""

    text: str
    truth: np.ndarray
    """(S,) bool."""
    items: np.ndarray
    """(S, 3, 8) bool: items it speaks of."""
    boxes: np.ndarray
    """(S, 3) bool: where its claim holds."""
    counts: np.ndarray
    """(S, 3) int: how many items it counts in each box."""


# --- about items anywhere ------------------------------------------------------------------------------------------


def count_items(rng: Rng, scenes: Scenes, towers: bool) -> Sentence:
    """Like "there is 4 yellow item", "there is exactly 1 blue circle touching the edge"."""
    it = thing(rng, scenes, towers, colour=0.9, shape=0.65)
    text, items = it.text, it.items
    at = ""
    if not towers and rng.random() < 0.75:
        where_text, where = place(rng, scenes)
        negated = rng.random() < 0.22
        at = f" {'not ' if negated else ''}{where_text}"
        items = items & (~where if negated else where)
    counts = items.sum((1, 2))
    forms = [(4.0, "a" if at else "is"), (1.5, "is"), (3, "exactly"), (2, "least"), (0.6, "only"), (0.5, "more")]
    forms += [(1.5, "no"), (0.4, "most"), (0.2, "less")]
    quantity, truth, _ = quantify(rng, counts, forms)
    that = pick(rng, "", "", "", "", " that is") if at else ""
    form = pick(rng, *["there is {} {}{}{}"] * 8, "{} {} is{}{}" if at and quantity != "no" else "there is {} {}{}{}")
    text = form.format(quantity, text, "" if " is{}" in form else that, at)
    return Sentence(text, truth, items, np.any(items, 2), items.sum(2))


def all_items(rng: Rng, scenes: Scenes, towers: bool) -> Sentence:
    """Like "none of the blue item is touching any edge", "all yellow square is touching the edge", "the black circle is ..."."""
    it = thing(rng, scenes, False, colour=0.9, shape=0.7, size=0.12)
    where_text, where = place(rng, scenes)
    negated = rng.random() < 0.3
    sign = "not " if negated else ""
    fits = it.items & (~where if negated else where)
    kind = weighted(rng, [(2.5, "none"), (1.0, "all"), (2, "the"), (0.5, "only")])
    if kind == "none":
        fits = it.items & where
        truth = ~np.any(fits, (1, 2))
        text = f"none of the {it.text} is {where_text}"
    elif kind == "all":
        truth = (fits == it.items).all((1, 2)) & np.any(it.items, (1, 2))
        text = pick(rng, f"all {it.text} is {sign}{where_text}", f"all the {it.text} is {sign}{where_text}")
    elif kind == "the":
        truth = np.any(fits, (1, 2))
        text = pick(
            rng,
            f"the {it.text} is {sign}{where_text}",
            f"{it.text} is {sign}{where_text}",
            f"a {it.text} is {sign}{where_text}",
        )
    else:
        fits = it.items & where
        truth = np.any(fits, (1, 2)) & (fits == (scenes.present & where)).all((1, 2))
        text = f"only {it.text} is {where_text}"
    return Sentence(text, truth, fits, np.any(fits, 2), fits.sum(2))


def in_boxes(rng: Rng, scenes: Scenes, towers: bool) -> Sentence:
    """Like "there is at least 1 black item in each box", "there is 2 yellow item in a box"."""
    it = thing(rng, scenes, towers, colour=0.85, shape=0.5)
    count = it.items.sum(2)
    quantity, holds, _ = quantify(rng, count, [(4, "least"), (2, "a"), (1, "exactly"), (2, "is")])
    if rng.random() < 0.75:
        noun = "tower" if towers and rng.random() < 0.5 else "box"
        lead = pick(rng, "each", "each", "all")
        form = pick(rng, "there is {q} {t} in {l} {n}", "{l} {n} has {q} {t}", "{l} {n} has {q} {t}", "{l} the {n} has {q} {t}",
                    "{l} 3 {n} has {q} {t}", "{l} of the {n} has {q} {t}", "{l} {n} has {q} {t} in it")  # fmt: skip
        truth = np.all(holds, 1)
        text = form.format(q=quantity, t=it.text, l=lead, n=noun)
    else:
        truth = np.any(holds, 1)
        text = f"there is {quantity} {it.text} in {pick(rng, 'a', '1')} box"
    return Sentence(text, truth, it.items, holds, count)


# --- about boxes ---------------------------------------------------------------------------------------------------

BOX_CLAIMS: list[tuple[float, Callable[[Rng, Scenes, bool], Claim]]] = [
    (5.0, amount),
    (3.5, list_of),
    (3.0, colours),
    (2.0, of_which),
    (1.6, lambda rng, scenes, towers: amount(rng, scenes, towers) if towers else at_wall(rng, scenes)),
    (1.6, lambda rng, scenes, towers: amount(rng, scenes, towers) if towers else on_top(rng, scenes)),
    (0.5, lambda rng, scenes, towers: colours(rng, scenes, towers) if towers else beside(rng, scenes)),
    (0.5, lambda rng, scenes, towers: list_of(rng, scenes, towers) if towers else sizes(rng, scenes)),
]


def _many(rng: Rng, scenes: Scenes, towers: bool) -> Claim:
    holds = scenes.height >= 4  # training labels call four many
    return Claim("many item", holds, scenes.present, scenes.height)


def box_claim(rng: Rng, scenes: Scenes, towers: bool) -> Claim:
    """Anything said of one box; sometimes two things."""
    if rng.random() < 0.03 and not towers:
        return _many(rng, scenes, towers)
    claim = weighted(rng, BOX_CLAIMS)(rng, scenes, towers)
    if rng.random() < 0.12:
        other = weighted(rng, BOX_CLAIMS)(rng, scenes, towers)
        text = f"{claim.text} and {other.text}"
        return Claim(text, claim.holds & other.holds, claim.items | other.items, claim.count)
    return claim


def _quantified_boxes(rng: Rng, holds: np.ndarray, noun: str, claim: str) -> tuple[str, np.ndarray]:
    """A sentence that says of how many boxes or towers a claim holds, and its truth (S,)."""
    number = holds.sum(1)
    kind = weighted(rng, [(10, "a"), (6, "quantity"), (1.6, "one of"), (1.2, "all"), (1.2, "no"), (0.5, "has")])
    link = pick(rng, "with", "with", "with", "that has", "that has", "has")
    plain = claim.split()[0] == "the"
    if plain:
        link = pick(rng, "that", "and")
    if kind == "a":
        return f"there is {pick(rng, 'a', 'a', 'a', 'at least 1')} {noun} {link} {claim}", number >= 1
    if kind == "quantity":
        quantity, truth, _ = quantify(
            rng,
            np.minimum(number, 3),
            [(4, "is"), (3, "exactly"), (3, "least"), (1.5, "only"), (0.3, "most"), (0.3, "more")],
        )
        return f"there is {quantity} {noun} {link} {claim}", truth
    if kind == "no":
        return f"there is no {noun} {link} {claim}", number == 0
    has = "" if plain else "has "
    if kind == "one of" and not plain:
        lead, least = pick(rng, ("1", 1), ("1", 1), ("at least 1", 1), ("2", 2))
        group = (
            pick(rng, "grey square", "grey square", "grey box", noun, "box")
            if noun == "box"
            else f"{pick(rng, '', '3 ')}{noun}"
        )
        return f"{lead} of the {group} has {claim}", number >= least
    if kind == "has" and not plain:
        number_, least = pick(rng, ("1", 1), ("at least 1", 1), ("2", 2), ("at least 2", 2))
        return f"{number_} {noun} has {claim}", number >= least
    lead = pick(rng, "all the", "each", "all", "all 3", "each", "all of the", "the 3")
    return (f"{lead} {noun} {has}{claim}" if has else f"there is a {noun} {link} {claim}"), (
        number == 3 if has else number >= 1
    )


def boxes(rng: Rng, scenes: Scenes, towers: bool) -> Sentence:
    """Like "there is a box with ..." in all its forms."""
    claim = box_claim(rng, scenes, towers)
    noun = weighted(rng, [(8, "box"), (0.8, "grey box"), (0.8, "grey square")])
    text, truth = _quantified_boxes(rng, claim.holds, noun, claim.text)
    return Sentence(text, truth, claim.items & (scenes.present), claim.holds, claim.count)


def same_boxes(rng: Rng, scenes: Scenes, towers: bool) -> Sentence:
    """Like "there is 2 box with the same number of item", and of towers also by height, base and top."""
    noun = "tower" if towers else "box"
    what = int(rng.integers(3)) if towers else 0
    last = np.maximum(scenes.height - 1, 0)
    top = np.take_along_axis(scenes.colour, last[..., None], 2)[..., 0]
    values = (scenes.height, scenes.colour[..., 0], top)[what]
    part = ("", "base", "top")[what]
    pairs = (values[:, 0] == values[:, 1]).astype(int) + (values[:, 0] == values[:, 2]) + (values[:, 1] == values[:, 2])
    whole, some = pairs == 3, pairs >= 1
    if what == 0:
        name = pick(
            rng, f"the same number of {'block' if towers else 'item'}", *(("the same height",) if towers else ())
        )
    else:
        name = pick(rng, f"the same {part}", f"the same color block at the {part}", f"the same {part} color",
                    f"the same color at the {part}", f"block of same color at {part}")  # fmt: skip
    form = weighted(rng, [(3, "two"), (2, "all"), (1.5, "is all"), (0.7, "different")])
    if form == "two":
        lead = pick(rng, "there is 2 {n} with {v}", "2 {n} has {v}", "there is 2 {n} that has {v}", "at least 2 {n} has {v}",
                    "there is at least 2 {n} with {v}", "2 of the 3 {n} has {v}")  # fmt: skip
        text, truth = lead.format(n=noun, v=name), some
    elif form == "all":
        text, truth = (
            pick(rng, "all the {n} has {v}", "all 3 {n} has {v}", "the 3 {n} has {v}").format(n=noun, v=name),
            whole,
        )
    elif form == "is all" and what:
        lead = pick(rng, f"the {part} of the tower is all the same", f"the {part} of the 3 tower is the same color",
                    f"all the {part} of the tower has the same color", f"there is only 1 color on the {part} in all 3 tower")  # fmt: skip
        text, truth = lead, whole
    else:
        text, truth = (
            f"all the {noun} has different {part + ' color' if what else 'number of ' + ('block' if towers else 'item')}",
            pairs == 0,
        )
        if rng.random() < 0.3 and not what:
            text, truth = f"all the {noun} is not the same in {'height' if towers else 'number'}", ~whole
    items = (
        scenes.present if what == 0 else scenes.present & (np.arange(8) == (last if what == 2 else 0 * last)[..., None])
    )
    return Sentence(text, truth, items, np.broadcast_to(truth[:, None], values.shape), items.sum(2))


# --- about towers --------------------------------------------------------------------------------------------------


def tower(rng: Rng, scenes: Scenes, _: bool) -> Sentence:
    """Like "there is a tower with ..." in all its forms."""
    claim = towers_.describe(rng, scenes)
    text, truth = _quantified_boxes(rng, claim.holds, "tower", claim.text)
    return Sentence(text, truth, claim.items, claim.holds, claim.count)


def tower_end(rng: Rng, scenes: Scenes, _: bool) -> Sentence:
    """Like "there is a yellow block as the top of a tower with 4 block"."""
    is_top, colour = rng.random() < 0.5, int(rng.integers(3))
    level = scenes.height - 1 if is_top else np.zeros_like(scenes.height)
    items = scenes.present & (np.arange(8) == level[..., None]) & (scenes.colour == colour)
    size_text, fits = "", np.ones(scenes.height.shape, bool)
    if rng.random() < 0.65:
        size = towers_.height(
            rng, scenes, [(5, "is"), (2.5, "least"), (2.5, "exactly"), (0.7, "most"), (0.5, "more"), (0.4, "only")]
        )
        size_text, fits = f" with {size.text}", size.holds
    holds = np.any(items, 2) & fits
    items, number = items & fits[..., None], holds.sum(1)
    where = "top" if is_top else "base"
    name = COLOUR_NAMES[colour]
    if rng.random() < 0.85:
        quantity, truth, _number = quantify(
            rng, number, [(6, "a"), (2.5, "is"), (1.5, "exactly"), (2, "least"), (1.5, "no"), (0.7, "only")]
        )
        text = f"there is {quantity} {name} block as the {where} of a tower{size_text}"
    else:
        quantity, truth, _number = quantify(rng, number, [(2, "exactly"), (3, "least"), (2, "is"), (1, "only")])
        text = f"there is a {name} block as the {where} of {quantity} tower{size_text}"
    return Sentence(text, truth, items, holds, items.sum(2))


def the_tower(rng: Rng, scenes: Scenes, _: bool) -> Sentence:
    """Like "the tower with exactly 2 block has a black block at the base"."""
    size = towers_.height(rng, scenes, [(5, "is"), (2, "exactly"), (0.5, "more")])
    claim = weighted(rng, towers_.SIMPLE)(rng, scenes)
    holds = size.holds & claim.holds
    number = size.text.split()[-2]
    plain = claim.text.startswith("the ")
    if plain or (claim.text.startswith("a ") and rng.random() < 0.2):
        form = pick(rng, "there is a {n} block tower and {c}", "there is a {n} block tower that {c}")
        if not plain:
            form = "there is a {n} block tower that has {c}"
        if not size.text[0].isdigit():
            form = form.replace("{n} block tower", "tower with {s}")
    else:
        form = pick(rng, "the tower with {s} has {c}", "the tower with {s} has {c}", "1 of the tower with {s} has {c}",
                    "at least 1 of the tower with {s} has {c}", "there is a tower with {s} and {c}")  # fmt: skip
    text = form.format(n=number, s=size.text, c=claim.text)
    return Sentence(text, np.any(holds, 1), claim.items & size.holds[..., None], holds, claim.count)


def coloured_tower(rng: Rng, scenes: Scenes, _: bool) -> Sentence:
    """Like "there is a black tower", "there is a yellow tower with only 1 block"."""
    colour = int(rng.integers(3))
    whole = ((scenes.colour == colour) | ~scenes.present).all(2)
    text, fits = "", np.ones_like(whole)
    if rng.random() < 0.45:
        size = towers_.height(rng, scenes, [(3, "only"), (1, "exactly"), (1, "least"), (1, "is")])
        text, fits = f" with {size.text}", size.holds
    holds = whole & fits
    quantity, truth, _number = quantify(
        rng, holds.sum(1), [(6, "a"), (2, "is"), (1, "no"), (1, "least"), (1, "exactly")]
    )
    items = scenes.present & holds[..., None]
    return Sentence(f"there is {quantity} {COLOUR_NAMES[colour]} tower{text}", truth, items, holds, items.sum(2))


def block_on_block(rng: Rng, scenes: Scenes, _: bool) -> Sentence:
    """Like "there is a yellow block on a yellow block"; "on" and "above" mean directly on."""
    claim = towers_.between(rng, scenes) if rng.random() < 0.12 else towers_.pair(rng, scenes)
    first, rest = claim.text.split(" ", 1)
    number = claim.count.sum(1)
    if first != "a" or " on top of each" in claim.text or "stacked" in claim.text or "attached" in claim.text:
        return Sentence(f"there is {claim.text}", np.any(claim.holds, 1), claim.items, claim.holds, claim.count)
    quantity, truth, _number = quantify(
        rng, number, [(7, "a"), (1, "exactly"), (2, "least"), (1.2, "no"), (0.6, "is"), (0.4, "only")]
    )
    return Sentence(f"there is {quantity} {rest}", truth, claim.items, claim.holds, claim.count)


def tower_parts(rng: Rng, scenes: Scenes, _: bool) -> Sentence:
    """Like "the top of a 4 block tower is blue", "the second block from the base of a tower is black"."""
    colour, index = int(rng.integers(3)), int(rng.integers(4))
    name = COLOUR_NAMES[colour]
    level = (0 * scenes.height, scenes.height - 1, 0 * scenes.height + 1, 0 * scenes.height + 2)[index]
    items = scenes.present & (np.arange(8) == level[..., None]) & (scenes.colour == colour)
    holds, part = np.any(items, 2), ("base", "top", "second block from the base", "third block from the base")[index]
    if rng.random() < 0.45:
        number = some_number(rng, scenes.height, high=4)
        fits = scenes.height == number
        holds, items = holds & fits, items & fits[..., None]
        text = pick(rng, f"the {part} of a {number} block tower is {name}", f"the {part} of the {number} block tower is {name}",
                    f"the {part} of a tower with {number} block is {name}")  # fmt: skip
        truth = np.any(holds, 1)
    elif rng.random() < 0.5:
        text, truth = f"the {part} of a tower is {name}", np.any(holds, 1)
    else:
        lead = pick(
            rng,
            f"the {part} of the 3 tower is {name}",
            f"the {part} of the tower is {name}",
            f"all the {part} of the tower is {name}",
        )
        text, truth = lead, holds.all(1)
    return Sentence(text, truth, items, holds, items.sum(2))


Template = Callable[[Rng, Scenes, bool], Sentence]
SCATTERED: list[tuple[float, Template]] = [
    (6.0, count_items), (1.4, all_items), (0.8, in_boxes), (7.0, boxes), (0.25, same_boxes),
]  # fmt: skip
TOWERS: list[tuple[float, Template]] = [
    (1.2, count_items), (0.5, in_boxes), (0.7, boxes), (0.8, same_boxes), (5.0, tower), (2.0, tower_end), (1.0, the_tower),
    (0.6, coloured_tower), (1.8, block_on_block), (0.6, tower_parts),
]  # fmt: skip


def draw(rng: Rng, scenes: Scenes, towers: bool, least: int) -> Sentence:
    """A sentence that is true of at least `least` of the scenes and false of as many."""
    for _ in range(MAX_TRIES):
        sentence = weighted(rng, TOWERS if towers else SCATTERED)(rng, scenes, towers)
        true = int(sentence.truth.sum())
        if least <= true <= len(sentence.truth) - least:
            return sentence
    return sentence  # pyright: ignore[reportPossiblyUnboundVariable]
