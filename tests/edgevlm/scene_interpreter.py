"""A second opinion on scenes: reads a generated text and answers it from boxes, classes and attributes alone.

Shares no code or word list with the generator. It knows English patterns, not templates: a referring phrase must fit
exactly one object, a relation must differ by 10 px or more, or it refuses.
"""

import re
from dataclasses import dataclass

SHAPE_WORDS = ("circle", "square", "triangle", "star", "cross")
COLOUR_WORDS = ("red", "green", "blue", "yellow", "purple", "cyan")
OTHER_WORDS = {
    "small": ("size", "small"),
    "little": ("size", "small"),
    "large": ("size", "large"),
    "big": ("size", "large"),
    "plain": ("texture", "plain"),
    "striped": ("texture", "striped"),
    "dotted": ("texture", "dotted"),
    "spotted": ("texture", "dotted"),
}
SIDES = {
    "left of": ("x", -1),
    "to the left of": ("x", -1),
    "right of": ("x", 1),
    "to the right of": ("x", 1),
    "above": ("y", -1),
    "higher than": ("y", -1),
    "below": ("y", 1),
    "lower than": ("y", 1),
}
SIDE = "(" + "|".join(sorted(SIDES, key=len, reverse=True)) + ")"
MARGIN_PX = 10


@dataclass
class Object:
    index: int
    x: float
    y: float
    features: dict[str, str]


@dataclass
class Verdict:
    answer: str
    referred: set[int]


class Refused(Exception):
    """The text is ambiguous, or not understood."""


def read_objects(boxes, classes, attributes, labels) -> list[Object]:
    objects = []
    for index, (box, class_id, tags) in enumerate(zip(boxes, classes, attributes, strict=True)):
        features = {"shape": labels.classes[class_id]}
        for tag in tags:
            word = labels.attributes[tag]
            kind = "colour" if word in COLOUR_WORDS else OTHER_WORDS[word][0]
            features[kind] = word
        assert len(features) == 4
        objects.append(Object(index, float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2, features))
    return objects


def phrase(words: str) -> dict[str, str]:
    """'little red stars' -> {'size': 'small', 'colour': 'red', 'shape': 'star'}."""
    wanted: dict[str, str] = {}
    *adjectives, noun = words.split()
    for word in adjectives:
        kind, value = OTHER_WORDS.get(word, ("colour", word))
        if kind == "colour" and word not in COLOUR_WORDS:
            raise Refused(f"unknown adjective {word!r} in {words!r}")
        wanted[kind] = value
    stem = "cross" if noun in ("cross", "crosses") else noun.removesuffix("s")
    if stem in SHAPE_WORDS:
        wanted["shape"] = stem
    elif stem not in ("shape", "object", "thing"):
        raise Refused(f"unknown noun {noun!r} in {words!r}")
    return wanted


class Interpreter:
    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects

    def all(self, words: str) -> list[Object]:
        wanted = phrase(words)
        return [o for o in self.objects if all(o.features[kind] == value for kind, value in wanted.items())]

    def the(self, words: str) -> Object:
        """The single object that 'large star' or 'large star above the red circle' names."""
        if match := re.fullmatch(rf"(.+?) {SIDE} the (.+)", words):
            anchor = self.the(match[3])
            candidates = []
            for other in self.all(match[1]):
                if other is anchor:
                    continue
                distance = self.distance(other, match[2], anchor)
                if abs(distance) < MARGIN_PX:
                    raise Refused(f"{words!r}: too close to call")
                if distance > 0:
                    candidates.append(other)
        else:
            candidates = self.all(words)
        if len(candidates) != 1:
            raise Refused(f"{words!r} fits {len(candidates)} objects")
        return candidates[0]

    @staticmethod
    def distance(a: Object, side: str, b: Object) -> float:
        axis, sign = SIDES[side]
        return sign * (getattr(a, axis) - getattr(b, axis))

    def beside(self, a: str, side: str, b: str) -> tuple[bool, set[int]]:
        first, second = self.the(a), self.the(b)
        distance = self.distance(first, side, second)
        if abs(distance) < MARGIN_PX:
            raise Refused(f"{a!r} and {b!r} are too close to call")
        return distance > 0, {first.index, second.index}

    def larger(self, a: str, b: str) -> tuple[bool, set[int]]:
        first, second = self.the(a), self.the(b)
        sizes = [o.features["size"] for o in (first, second)]
        if sizes[0] == sizes[1]:
            raise Refused(f"{a!r} and {b!r} have the same size")
        return sizes[0] == "large", {first.index, second.index}

    def groups(self, a: str, b: str) -> tuple[int, int, set[int]]:
        first, second = self.all(a), self.all(b)
        return len(first), len(second), {o.index for o in first + second}

    def question(self, text: str) -> Verdict:
        text = text.removesuffix("?").replace("color", "colour")
        if match := re.fullmatch(
            r"(?:is there|can you see|does the picture show) a (.+)|is a (.+) in the picture", text
        ):
            found = self.all(match[1] or match[2])
            return Verdict("yes" if found else "no", {o.index for o in found})
        if match := re.fullmatch(
            r"how many (.+) (?:are there|can you see)|count the (.+)|what is the number of (.+)", text
        ):
            found = self.all(next(group for group in match.groups() if group))
            return Verdict(str(len(found)), {o.index for o in found})
        if match := re.fullmatch(r"(?:which|what) (colour|shape|texture) (?:is|does) the (.+?)(?: have)?", text):
            return self.feature(match[1], match[2])
        if match := re.fullmatch(r"what is the (colour|shape|texture) of the (.+)", text):
            return self.feature(match[1], match[2])
        if match := re.fullmatch(r"is the (.+) plain striped or dotted", text):
            return self.feature("texture", match[1])
        if match := re.fullmatch(r"which are there more of (.+) or (.+)|are there more (.+) or more (.+)", text):
            a, b = match[1] or match[3], match[2] or match[4]
            n, m, both = self.groups(a, b)
            if n == m:
                raise Refused("as many of the one as of the other")
            return Verdict(self.only(a if n > m else b), both)
        if match := re.fullmatch(r"which is (larger|bigger|smaller) the (.+) or the (.+)", text):
            first, both = self.larger(match[2], match[3])
            return Verdict(self.only(match[2] if first == (match[1] != "smaller") else match[3]), both)
        # What is left is a yes/no question; said as a sentence, it is true or false.
        for pattern, sentence in (
            (r"are there (more|fewer|as many) (.+)", r"there are \1 \2"),
            (r"do you see more (.+)", r"there are more \1"),
            (r"is the number of (.+) the number of (.+)", r"the number of \1 is the number of \2"),
            (rf"does the (.+) lie {SIDE} the (.+)", r"the \1 is \2 the \3"),
            (rf"is the (.+?) (larger than|bigger than|smaller than|{SIDE[1:-1]}) the (.+)", r"the \1 is \2 the \3"),
        ):
            if re.fullmatch(pattern, text):
                verdict = self.sentence(re.sub(pattern, sentence, text))
                return Verdict("yes" if verdict.answer == "true" else "no", verdict.referred)
        raise Refused(f"not understood: {text!r}")

    def feature(self, kind: str, words: str) -> Verdict:
        found = self.the(words)
        referred = {found.index}
        if match := re.fullmatch(rf".+? {SIDE} the (.+)", words):
            referred.add(self.the(match[2]).index)
        return Verdict(found.features[kind], referred)

    @staticmethod
    def only(words: str) -> str:
        (value,) = phrase(words).values()
        return value

    def sentence(self, text: str) -> Verdict:
        text = text.removesuffix(".").replace("color", "colour")
        truth, referred = self._judge(text)
        return Verdict("true" if truth else "false", referred)

    def _judge(self, text: str) -> tuple[bool, set[int]]:
        if match := re.fullmatch(
            r"there (?:is|are) exactly (\d) (.+)|exactly (\d) (.+) (?:is|are) in the picture|one can see exactly (\d) (.+)",
            text,
        ):
            number, words = [group for group in match.groups() if group]
            found = self.all(words)
            return len(found) == int(number), {o.index for o in found}
        if match := re.fullmatch(r"(?:there is|the picture shows) a (.+)|a (.+) is in the picture", text):
            found = self.all(match[1] or match[2])
            return bool(found), {o.index for o in found}
        if match := re.fullmatch(r"(?:there are|the picture shows) (more|fewer|as many) (.+) (?:than|as) (.+)", text):
            n, m, both = self.groups(match[2], match[3])
            return {"more": n > m, "fewer": n < m, "as many": n == m}[match[1]], both
        if match := re.fullmatch(r"the number of (.+) is the number of (.+)", text):
            n, m, both = self.groups(match[1], match[2])
            return n == m, both
        if match := re.fullmatch(r"the (.+) is (larger|bigger|smaller) than the (.+)", text):
            first, both = self.larger(match[1], match[3])
            return first == (match[2] != "smaller"), both
        if match := re.fullmatch(rf"the (.+?) (?:is|lies) {SIDE} the (.+)", text):
            return self.beside(match[1], match[2], match[3])
        if match := re.fullmatch(r"the (colour|shape|texture) of the (.+) is (?:a )?(\w+)", text):
            return self.the(match[2]).features[match[1]] == match[3], {self.the(match[2]).index}
        if match := re.fullmatch(r"the (.+) is (?:a )?(\w+)", text):
            found = self.the(match[1])
            kind = "shape" if match[2] in SHAPE_WORDS else "colour" if match[2] in COLOUR_WORDS else "texture"
            return found.features[kind] == match[2], {found.index}
        raise Refused(f"not understood: {text!r}")

    def caption(self, text: str) -> bool:
        """Whether every sentence of a caption holds for some choice of objects, by however few pixels."""
        for sentence in text.removesuffix(".").split(". "):
            if match := re.fullmatch(rf"a (.+?) is {SIDE} a (.+)", sentence):
                holds = any(
                    a is not b and self.distance(a, match[2], b) > 0
                    for a in self.all(match[1])
                    for b in self.all(match[3])
                )
            else:
                holds = self._judge(sentence)[0]
            if not holds:
                return False
        return True
