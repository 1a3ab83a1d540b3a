"""Questions, sentences and captions about a scene, in words. What they assert comes from `scene_claims`.

Ours. Several phrasings and a few synonyms for each form, about 70 words in all, at most 20 tokens per text.
"""

import numpy as np

from edgevlm.data.sample import Text
from edgevlm.data.scene_claims import ANSWERS, BESIDE, MAKERS, Claim, Open
from edgevlm.data.scene_facts import (
    ASPECTS,
    MARGIN_PX,
    OPPOSITE,
    RELATIONS,
    Description,
    Scene,
    changed,
    holds_relation,
    pick,
    project,
    shuffled,
)

__all__ = ["ANSWERS", "make_caption", "make_text", "make_texts"]

# --- words -------------------------------------------------------------------------------------------------------

WORDS = {"small": ("small", "little"), "large": ("large", "big"), "dotted": ("dotted", "spotted")}
"""What may be said for a value; every other value has one word, its own."""

NOUNS = ("shape", "object", "thing")
# {x}, {y}: "large red star" (one thing); {xs}, {ys}: plural; {beside}: "left of"; {value}: an aspect's value.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "exist": (
        "is there a {x}",
        "can you see a {x}",
        "does the picture show a {x}",
        "is a {x} in the picture",
    ),
    "count": (
        "how many {xs} are there",
        "how many {xs} can you see",
        "count the {xs}",
        "what is the number of {xs}",
    ),
    "colour": (
        "what colour is the {x}",
        "what color is the {x}",
        "which colour does the {x} have",
        "what is the color of the {x}",
    ),
    "shape": ("what shape is the {x}", "which shape does the {x} have", "what is the shape of the {x}"),
    "texture": (
        "what texture does the {x} have",
        "what is the texture of the {x}",
        "is the {x} plain striped or dotted",
    ),
    "relation": ("is the {x} {beside} the {y}", "does the {x} lie {beside} the {y}"),
    "beside": (
        "what {aspect} is the {x} {beside} the {y}",
        "which {aspect} does the {x} {beside} the {y} have",
        "what is the {aspect} of the {x} {beside} the {y}",
    ),
    "more": ("are there more {xs} than {ys}", "do you see more {xs} than {ys}", "are there fewer {ys} than {xs}"),
    "equal": ("are there as many {xs} as {ys}", "is the number of {xs} the number of {ys}"),
    "larger": (
        "is the {x} larger than the {y}",
        "is the {x} bigger than the {y}",
        "is the {y} smaller than the {x}",
    ),
    "which_more": ("are there more {xs} or more {ys}", "which are there more of {xs} or {ys}"),
    "which_larger": ("which is larger the {x} or the {y}", "which is bigger the {x} or the {y}"),
    "which_smaller": ("which is smaller the {x} or the {y}",),
}

SENTENCES: dict[str, tuple[str, ...]] = {
    "exist": ("there is a {x}", "a {x} is in the picture", "the picture shows a {x}"),
    "count": ("there {are} exactly {n} {xs}", "exactly {n} {xs} {are} in the picture", "one can see exactly {n} {xs}"),
    "colour": ("the {x} is {value}", "the colour of the {x} is {value}", "the color of the {x} is {value}"),
    "shape": ("the {x} is a {value}", "the shape of the {x} is a {value}"),
    "texture": ("the {x} is {value}", "the texture of the {x} is {value}"),
    "relation": ("the {x} is {beside} the {y}", "the {x} lies {beside} the {y}"),
    "more": (
        "there are more {xs} than {ys}",
        "the picture shows more {xs} than {ys}",
        "there are fewer {ys} than {xs}",
    ),
    "equal": ("there are as many {xs} as {ys}", "the number of {xs} is the number of {ys}"),
    "larger": ("the {x} is larger than the {y}", "the {x} is bigger than the {y}", "the {y} is smaller than the {x}"),
}


def say(description: Description, rng: np.random.Generator, *, plural: bool = False) -> str:
    """The description in words, with a noun: 'little striped red object'."""
    words = [pick(rng, WORDS.get(value, (value,))) for value in description[:3] if value is not None]
    noun = description.shape or pick(rng, NOUNS)
    return " ".join([*words, plural_of(noun) if plural else noun])


def plural_of(noun: str) -> str:
    """'crosses', 'stars'."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _fill(template: str, claim: Claim, rng: np.random.Generator) -> str:
    slots = dict(claim.words)
    for slot, description in (("x", claim.x), ("y", claim.y)):
        if description is not None:
            slots[slot] = say(description, rng)
            slots[f"{slot}s"] = say(description, rng, plural=slots.get("n") != "1")
    return template.format(**slots)


# --- texts of a scene --------------------------------------------------------------------------------------------

ATTEMPTS = 24
"""Tries per text: a scene need not offer, say, two groups of equal number."""


def make_texts(scene: Scene, task: str, number: int, rng: np.random.Generator) -> tuple[Text, ...]:
    """Up to `number` different texts, the kinds as evenly as the scene allows."""
    texts: dict[str, Text] = {}
    kinds: list[str] = []
    for _ in range(2 * number + len(MAKERS[task])):
        kinds = kinds or shuffled(rng, tuple(MAKERS[task]))
        if text := make_text(scene, task, kinds.pop(), rng):
            texts.setdefault(text.text, text)
        if len(texts) == number:
            break
    return tuple(texts.values())


def make_text(scene: Scene, task: str, kind: str, rng: np.random.Generator) -> Text | None:
    """One question (`vqa`) or sentence (`reasoning`) of a kind, or None if the scene offers none that was found."""
    maker = pick(rng, MAKERS[task][kind])
    for _ in range(ATTEMPTS):
        if made := maker(scene, rng):
            break
    else:
        return None
    if isinstance(made, Open):
        claim, answer = made.claim, made.answer
    else:
        truth = rng.random() < 0.5
        claim = made.true if truth else made.false
        answer = {"vqa": ("no", "yes"), "reasoning": ("false", "true")}[task][truth]
    templates, mark = (QUESTIONS, "?") if task == "vqa" else (SENTENCES, ".")
    text = _fill(pick(rng, templates[made.form]), claim, rng)
    return Text(text + mark * int(rng.integers(2)), answer, claim.referred, kind)


# --- captions ----------------------------------------------------------------------------------------------------


def make_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """One or two sentences that are true of the scene, and the same with one word changed so that they are false."""
    while True:
        i, j = (int(index) for index in rng.permutation(len(scene.things))[:2])
        relations = [name for name in RELATIONS if scene.offset(i, j, name) >= MARGIN_PX]
        if not relations:
            continue
        relation = pick(rng, relations)
        a, b = (project(scene.things[k].looks, (pick(rng, ("size", "texture")), "colour", "shape")) for k in (i, j))
        count = pick(rng, [d for group in scene.by_count.values() for d in group]) if rng.random() < 0.5 else None
        if false := _false_caption(scene, rng, a, relation, b, count):
            return _caption(a, relation, b, count, len(scene.find(count)) if count else 0), false


def _false_caption(
    scene: Scene, rng: np.random.Generator, a: Description, relation: str, b: Description, count: Description | None
) -> str | None:
    """The caption with one word changed; None if the change that was drawn leaves it true."""
    n = len(scene.find(count)) if count else 0
    change = pick(rng, ("a", "b", "relation", "count") if count else ("a", "b", "relation"))
    if change == "count" and count:
        n += pick(rng, (-1, 1)) if n > 1 else 1
        return _caption(a, relation, b, count, n)
    if change == "relation":
        relation = OPPOSITE[relation]
    else:
        old = a if change == "a" else b
        aspect = pick(rng, old.stated)
        present = [value for value in ASPECTS[aspect] if value != getattr(old, aspect)]
        new = changed(old, aspect, pick(rng, present))
        a, b = (new, b) if change == "a" else (a, new)
    return None if holds_relation(scene, a, relation, b) else _caption(a, relation, b, count, n)


def _caption(a: Description, relation: str, b: Description, count: Description | None, n: int) -> str:
    first, second = (" ".join(value for value in description if value) for description in (a, b))
    text = f"a {first} is {BESIDE[relation][0]} a {second}."
    if count is None:
        return text
    noun = count.shape or "object"
    group = " ".join([*(value for value in count[:3] if value), noun if n == 1 else plural_of(noun)])
    return f"{text} there {'is' if n == 1 else 'are'} exactly {n} {group}."
