"""What NLVR sentences say of a tower of blocks: its height, its colours, and what stands where. See `nlvr_phrases`."""

from collections.abc import Callable

import numpy as np

from edgevlm.data.nlvr_phrases import COLOUR_NAMES, Claim, colours, list_of, of_which, pick, quantify, weighted
from edgevlm.data.nlvr_scenes import SLOTS, Rng, Scenes

LEVEL = np.arange(SLOTS)
ORDINALS = ("base", "second", "third", "fourth")


def height(rng: Rng, scenes: Scenes, forms: list[tuple[float, str]] | None = None) -> Claim:
    """Like "exactly 3 block"."""
    text, holds, _ = quantify(
        rng,
        scenes.height,
        forms or [(4, "is"), (3, "exactly"), (2, "only"), (2, "least"), (1, "most"), (0.8, "more"), (0.5, "less")],
    )
    noun = pick(rng, "block", "block", "block", "block", "item") if text.startswith("exactly") else "block"
    return Claim(f"{text} {noun}", holds, scenes.present, scenes.height)


def _at(scenes: Scenes, level: np.ndarray) -> np.ndarray:
    """(S, 3, 8) bool: the block at `level`, (S, 3)."""
    return scenes.present & (level[..., None] == LEVEL)


def end(rng: Rng, scenes: Scenes, colour: int | None = None) -> Claim:
    """Like "a blue block at the top", "the base is black"."""
    is_top = rng.random() < 0.5
    where = pick(rng, "top", "top", "very top") if is_top and rng.random() < 0.1 else ("top" if is_top else "base")
    colour = int(rng.integers(3)) if colour is None else colour
    level = scenes.height - 1 if is_top else np.zeros_like(scenes.height)
    negated = rng.random() < 0.06
    items = _at(scenes, level) & ((scenes.colour == colour) ^ negated)
    name = COLOUR_NAMES[colour]
    if negated:
        text = f"the {where} that is not {name}"
    else:
        text = weighted(rng, [
            (6, f"a {name} block at the {where}"), (2, f"1 {name} block at the {where}"), (1, f"a {name} block at {where}"),
            (1, f"{name} block at the {where}"), (1, f"a {name} {where}"), (1, f"the {where} is {name}"),
            (0.5, f"a {name} block on the {where}"), (0.5, f"the {where} block is {name}"), (0.4, f"the {name} block at the {where}"),
            (0.3, f"a {name} block at the very {where}"),
        ])  # fmt: skip
    return Claim(text, np.any(items, 2), items, items.sum(2))


def both_ends(rng: Rng, scenes: Scenes) -> Claim:
    """Like "a blue block at the base and a black block at the top", "a blue block at the top and base"."""
    a, b = int(rng.integers(3)), int(rng.integers(3))
    base, top = _at(scenes, np.zeros_like(scenes.height)), _at(scenes, scenes.height - 1)
    low, high = base & (scenes.colour == a), top & (scenes.colour == b)
    holds = np.any(low, 2) & np.any(high, 2)
    one, two = COLOUR_NAMES[a], COLOUR_NAMES[b]
    if rng.random() < 0.25:
        high = top & (scenes.colour == a)
        items = low | high
        holds = np.any(low, 2) & np.any(high, 2)
        text = pick(rng, f"a {one} block at the top and base", f"a {one} block at the top and at the base",
                    f"the top and base is {one}", f"the base and top is {one}")  # fmt: skip
        return Claim(text, holds, items, items.sum(2))
    text = pick(rng, f"a {one} block at the base and a {two} block at the top", f"a {two} block at the top and a {one} block at the base",
                f"{one} block at the base and {two} block at the top", f"a {one} base and {two} top",
                f"the base is {one} and the top is {two}", f"a {one} base and a {two} top")  # fmt: skip
    items = low | high
    return Claim(text, holds, items, items.sum(2))


def same_ends(rng: Rng, scenes: Scenes) -> Claim:
    """Like "the top and base is the same color", and of other pairs of levels."""
    last = np.maximum(scenes.height - 1, 0)
    top = np.take_along_axis(scenes.colour, last[..., None], 2)[..., 0]
    kind = weighted(rng, [(2, "ends"), (1, "low")])
    if kind == "ends":
        same = scenes.colour[..., 0] == top
        items = _at(scenes, last) | _at(scenes, np.zeros_like(last))
        names = pick(rng, "the top and base", "the base and top", "the top and the base block")
    else:
        same = (scenes.colour[..., 0] == scenes.colour[..., 1]) & (scenes.height > 1)
        items = scenes.present & (LEVEL < 2)
        names = pick(rng, "the base and second block", "the base and the second block")
    if rng.random() < 0.25:
        return Claim(f"{names} is not the same in color", ~same, items, items.sum(2))
    return Claim(
        f"{names} is {pick(rng, 'the same color', 'the same in color', 'of the same color')}", same, items, items.sum(2)
    )


def level(rng: Rng, scenes: Scenes) -> Claim:
    """Like "the second block from the base is blue", "a blue block in the middle"."""
    colour = int(rng.integers(3))
    name, mine = COLOUR_NAMES[colour], scenes.colour == colour
    kind = weighted(rng, [(3, "ordinal"), (3, "middle"), (0.7, "under top"), (0.7, "over base")])
    if kind == "ordinal":
        index = int(rng.choice((1, 1, 2)))
        items = scenes.present & mine & (index == LEVEL)
        text = pick(rng, f"the {ORDINALS[index]} block from the base is {name}", f"the {ORDINALS[index]} block is {name}",
                    f"a {name} {ORDINALS[index]} block", f"{name} block as the {ORDINALS[index]} level")  # fmt: skip
    elif kind == "middle":
        inner = (LEVEL > 0) & (scenes.height[..., None] - 1 > LEVEL)
        items = scenes.present & mine & inner
        text = pick(rng, f"a {name} block in the middle", f"a {name} block as a middle block", f"the middle block is {name}",
                    f"a {name} block in the middle of it")  # fmt: skip
    elif kind == "under top":
        items = _at(scenes, scenes.height - 2) & mine
        text = f"a {name} block below the top block"
    else:
        items = scenes.present & mine & (LEVEL == 1)
        text = pick(rng, f"a {name} block above the base block", f"a {name} block above the base")
    return Claim(text, np.any(items, 2), items, items.sum(2))


def pair(rng: Rng, scenes: Scenes) -> Claim:
    """Like "a black block above a yellow block", "2 blue block stacked together"."""
    up, down = int(rng.integers(3)), int(rng.integers(3))
    shifted = np.concatenate([scenes.colour[..., 1:], np.full((*scenes.height.shape, 1), -1, np.int8)], 2)
    if rng.random() < 0.3:
        number = int(rng.choice((2, 2, 2, 3)))
        run = scenes.colour == up
        whole = run.copy()
        for i in range(1, number):
            whole[..., : SLOTS - i] &= run[..., i:]
            whole[..., SLOTS - i :] = False
        items = whole.copy()
        for i in range(1, number):
            items[..., i:] |= whole[..., : SLOTS - i]
        name, holds = COLOUR_NAMES[up], np.any(whole, 2)
        how = pick(rng, "stacked together", "stacked together", "attached with each other", "on top of each other")
        lead = pick(rng, f"{number}", f"{number}", f"at least {number}", f"exactly {number}")
        if lead.startswith("exactly"):
            holds = holds & (run.sum(2) == number)
        return Claim(f"{lead} {name} block {how}", holds, items, items.sum(2))
    lower = (scenes.colour == down) & (shifted == up)
    upper = np.concatenate([np.zeros((*scenes.height.shape, 1), bool), lower[..., :-1]], 2)
    high, low = COLOUR_NAMES[up], COLOUR_NAMES[down]
    text = weighted(rng, [
        (5, f"a {high} block above a {low} block"), (2, f"a {high} block on a {low} block"), (1, f"a {high} block on top of a {low} block"),
        (1, f"a {high} block above the {low} block"), (1, f"a {low} block below a {high} block"), (0.4, f"{high} block above a {low} block"),
    ])  # fmt: skip
    items = lower | upper
    return Claim(text, np.any(lower, 2), items, upper.sum(2))


def between(rng: Rng, scenes: Scenes) -> Claim:
    """Like "a black block between 2 yellow block"."""
    inner, outer = int(rng.integers(3)), int(rng.integers(3))
    middle = np.zeros(scenes.present.shape, bool)
    middle[..., 1:-1] = scenes.colour[..., 1:-1] == inner
    middle[..., 1:-1] &= (scenes.colour[..., :-2] == outer) & (scenes.colour[..., 2:] == outer)
    items = middle.copy()
    items[..., :-1] |= middle[..., 1:]
    items[..., 1:] |= middle[..., :-1]
    form = pick(rng, "a {} block between 2 {} block", "a {} block in between 2 {} block", "a {} block between {} block")
    return Claim(form.format(COLOUR_NAMES[inner], COLOUR_NAMES[outer]), np.any(middle, 2), items, middle.sum(2))


def number_of(rng: Rng, scenes: Scenes) -> Claim:
    """Like "at least 2 blue block", "only black block"."""
    colour = int(rng.integers(3))
    items = scenes.colour == colour
    count = items.sum(2)
    text, holds, _ = quantify(
        rng, count, [(4, "is"), (3, "least"), (2.5, "exactly"), (1.5, "only"), (1, "a"), (0.5, "no"), (0.3, "more")]
    )
    return Claim(f"{text} {COLOUR_NAMES[colour]} block", holds, items, count)


SIMPLE: list[tuple[float, Callable[[Rng, Scenes], Claim]]] = [
    (5, end),
    (3, number_of),
    (3, pair),
    (2, height),
    (1.5, lambda rng, scenes: colours(rng, scenes, True)),
    (1.2, level),
    (1.0, both_ends),
    (0.8, between),
    (0.8, same_ends),
    (0.8, lambda rng, scenes: list_of(rng, scenes, True)),
    (0.6, lambda rng, scenes: of_which(rng, scenes, True)),
]


def describe(rng: Rng, scenes: Scenes) -> Claim:
    """Anything said of one tower: a simple claim, or a height and a claim."""
    claim = weighted(rng, SIMPLE)(rng, scenes)
    if rng.random() > 0.35 or (claim.text.split()[-1] == "block" and claim.count is scenes.height):
        return claim
    size = height(rng, scenes, [(4, "is"), (4, "exactly"), (1, "least"), (1, "more"), (0.6, "less"), (0.3, "most")])
    if claim.text.startswith("the "):
        link = pick(rng, "and", "that", "and")
    else:
        link = pick(rng, "has", "has", "with", "and", "that has", "and has")
    holds = size.holds & claim.holds
    return Claim(f"{size.text} {link} {claim.text}", holds, claim.items, claim.count)
