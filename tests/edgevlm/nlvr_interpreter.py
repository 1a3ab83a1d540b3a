"""A second reading of NLVR sentences, for tests: from the words alone, with loops over items, no numpy, no shared code.

It takes the plain forms only and returns None for the others. Items are dicts with colour, shape, size (px), x, y.
"""

import re
from collections.abc import Callable, Sequence

Item = dict
Box = list[Item]

COLOUR = r"(?:black|blue|yellow)"
SIZE_PX = {"small": 10, "medium": 20, "large": 30, "big": 30}
QUANTITY = r"(?:(a|no)|(exactly |only |at least |at most |more than |less than |)(\d))"
NOUN = rf"((?:small |medium |large |big )?(?:{COLOUR} )?(?:item|block|circle|square|triangle))"
PLACE = (
    r"(?:closely )?touching (the edge|any edge|a edge|the base base|the base edge|the base|the right edge"
    r"|right edge|left edge|the roof|the top|the corner|a corner|a box corner)(?: of (?:a|the) box)?"
)


def enough(groups: Sequence[str | None], count: int) -> bool:
    """Whether `count` is what the three groups of QUANTITY ask for."""
    word, relation, number = groups
    if word:
        return count >= 1 if word == "a" else count == 0
    tests: dict[str, Callable[[int], bool]] = {
        "at least ": lambda n: count >= n,
        "at most ": lambda n: count <= n,
        "more than ": lambda n: count > n,
        "less than ": lambda n: count < n,
    }
    return tests.get(relation or "", lambda n: count == n)(int(number or 0))


def named(noun: str, item: Item) -> bool:
    """Whether the noun phrase names the item."""
    for word in noun.split():
        if word in SIZE_PX and item["size"] != SIZE_PX[word]:
            return False
        if re.fullmatch(COLOUR, word) and item["colour"] != word:
            return False
        if word in ("circle", "square", "triangle") and item["shape"] != word:
            return False
    return True


def at(place: str, item: Item) -> bool:
    """Whether the item touches the place."""
    left, top = item["x"] == 0, item["y"] == 0
    right, bottom = item["x"] + item["size"] == 100, item["y"] + item["size"] == 100
    if "corner" in place:
        return (left or right) and (top or bottom)
    if "base" in place:
        return bottom
    if "right" in place:
        return right
    if "left" in place:
        return left
    if "roof" in place or "top" in place:
        return top
    return left or right or top or bottom


def tower(box: Box) -> list[str]:
    """Colours from the base."""
    return [item["colour"] for item in sorted(box, key=lambda item: -item["y"])]


def interpret(text: str, boxes: list[Box]) -> bool | None:
    """The truth of a sentence, or None for a form that is not taken."""
    items = [item for box in boxes for item in box]
    if match := re.fullmatch(rf"there is {QUANTITY} {NOUN}", text):
        return enough(match.groups()[:3], sum(named(match[4], item) for item in items))
    if match := re.fullmatch(rf"there is {QUANTITY} {NOUN}(?: that is)? (not )?{PLACE}", text):
        fits = [item for item in items if named(match[4], item) and at(match[6], item) != bool(match[5])]
        return enough(match.groups()[:3], len(fits))
    if match := re.fullmatch(rf"none of the {NOUN} is {PLACE}", text):
        return not any(named(match[1], item) and at(match[2], item) for item in items)
    if match := re.fullmatch(
        rf"there is {QUANTITY} (?:grey )?(?:box|square) (?:with|has|that has) {QUANTITY} item", text
    ):
        return enough(match.groups()[:3], sum(enough(match.groups()[3:], len(box)) for box in boxes))
    if match := re.fullmatch(rf"there is {QUANTITY} box (?:with|has|that has) only ({COLOUR}) item", text):
        kinds = [{item["colour"] for item in box} for box in boxes]
        return enough(match.groups()[:3], sum(kind == {match[4]} for kind in kinds))
    if match := re.fullmatch(
        rf"there is {QUANTITY} box (?:with|has|that has) only ({COLOUR}) and ({COLOUR}) item", text
    ):
        kinds = [{item["colour"] for item in box} for box in boxes]
        return enough(match.groups()[:3], sum(kind == {match[4], match[5]} for kind in kinds))
    if match := re.fullmatch(
        rf"there is {QUANTITY} tower (?:with|has|that has) (?:a|1) ({COLOUR}) block at the (top|base)", text
    ):
        ends = [tower(box)[-1 if match[5] == "top" else 0] for box in boxes if box]
        return enough(match.groups()[:3], ends.count(match[4]))
    if match := re.fullmatch(
        rf"there is {QUANTITY} ({COLOUR}) block as the (top|base) of a tower(?: with {QUANTITY} block)?", text
    ):
        fits = [
            box
            for box in boxes
            if box
            and tower(box)[-1 if match[5] == "top" else 0] == match[4]
            and ((match[6] is None and match[8] is None) or enough(match.groups()[5:8], len(box)))
        ]
        return enough(match.groups()[:3], len(fits))
    if match := re.fullmatch(rf"there is {QUANTITY} ({COLOUR}) block (?:above|on|on top of) a ({COLOUR}) block", text):
        pairs = sum(
            upper == match[4] and lower == match[5]
            for box in boxes
            for lower, upper in zip(tower(box), tower(box)[1:], strict=False)
        )
        return enough(match.groups()[:3], pairs)
    if match := re.fullmatch(rf"there is {QUANTITY} ({COLOUR}) tower", text):
        return enough(match.groups()[:3], sum(set(tower(box)) == {match[4]} for box in boxes))
    if match := re.fullmatch(rf"the (second|third) block from the base of a tower is ({COLOUR})", text):
        level = ("base", "second", "third").index(match[1])
        return any(len(box) > level and tower(box)[level] == match[2] for box in boxes)
    return None
