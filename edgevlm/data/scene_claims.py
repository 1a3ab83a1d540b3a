"""What can be asked or asserted about a scene: fillings for the templates of `scene_texts`, with their answers.

Ours. Every yes/no question and every sentence is born with its opposite: a maker returns a true and a false filling
of the same template, as alike as the scene allows (a near miss), and a coin decides which one is used. A model that
does not look therefore gains nothing from the words. A maker returns None where its draw leads nowhere, and is asked
again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edgevlm.data.scene_facts import (
    ASPECTS,
    COLOURS,
    MARGIN_PX,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    TEXTURES,
    Description,
    Scene,
    changed,
    pick,
    project,
    shuffled,
)

MAX_COUNT = 5
ANSWERS: dict[str, tuple[str, ...]] = {
    "vqa": ("yes", "no", *(str(n) for n in range(MAX_COUNT + 1)), *COLOURS, *SHAPES, *TEXTURES),
    "reasoning": ("false", "true"),
}
"""Task -> answers, in the order of their ids."""

COUNT_WEIGHTS = np.array([0.28, 0.09, 0.11, 0.13, 0.17, 0.22])
"""How often each number is sought, 0 to 5. Scenes offer many phrases that fit one thing and few that fit five."""

BESIDE = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
"""Relation -> what may be said for it."""


@dataclass(frozen=True)
class Claim:
    """A filling of a template."""

    x: Description | None = None
    y: Description | None = None
    words: tuple[tuple[str, str], ...] = ()
    referred: tuple[int, ...] = ()


class Opposites(NamedTuple):
    """A true and a false filling of one template."""

    form: str
    true: Claim
    false: Claim


class Open(NamedTuple):
    """A filling with its answer."""

    form: str
    claim: Claim
    answer: str


def _exist(scene: Scene, rng: np.random.Generator) -> Opposites | None:
    aspects = shuffled(rng, tuple(ASPECTS))[: pick(rng, (1, 2, 2, 2, 3))]
    here = project(pick(rng, scene.things).looks, aspects)
    aspect = pick(rng, aspects)
    absent = [value for value in ASPECTS[aspect] if changed(here, aspect, value) not in scene.census]
    if not absent:
        return None
    near = [value for value in absent if changed(Description(), aspect, value) in scene.census]
    false = changed(here, aspect, pick(rng, near or absent))
    return Opposites("exist", Claim(here, referred=scene.find(here)), Claim(false))


def _exactly(scene: Scene, rng: np.random.Generator) -> Opposites | None:
    """The number is the same in both fillings and the thing counted differs: the number alone gives nothing away."""
    x = project(pick(rng, scene.things).looks, shuffled(rng, tuple(ASPECTS))[: pick(rng, (1, 1, 2))])
    aspect = pick(rng, x.stated)
    others = [changed(x, aspect, value) for value in ASPECTS[aspect] if value != getattr(x, aspect)]
    n = len(scene.find(x))
    others = [other for other in others if len(scene.find(other)) != n]
    if not others or n > MAX_COUNT:
        return None
    least = min(abs(len(scene.find(other)) - n) for other in others)
    y = pick(rng, [other for other in others if abs(len(scene.find(other)) - n) == least])
    # Read the other way round, the same two phrases serve for the number of the second.
    if rng.random() < 0.5 and len(scene.find(y)) <= MAX_COUNT:
        x, y, n = y, x, len(scene.find(y))
    words = (("n", str(n)), ("are", "is" if n == 1 else "are"))
    return Opposites("count", Claim(x, None, words, scene.find(x)), Claim(y, None, words, scene.find(y)))


def _is(aspect: str) -> Callable[[Scene, np.random.Generator], Opposites | None]:
    def make(scene: Scene, rng: np.random.Generator) -> Opposites | None:
        if (found := _name_without(scene, rng, aspect)) is None:
            return None
        i, name = found
        right = getattr(scene.things[i].looks, aspect)
        wrong = [value for value in ASPECTS[aspect] if value != right]
        near = [value for value in wrong if changed(Description(), aspect, value) in scene.census]
        value = pick(rng, near or wrong)
        return Opposites(
            aspect, Claim(name, None, (("value", right),), (i,)), Claim(name, None, (("value", value),), (i,))
        )

    return make


def _relation(scene: Scene, rng: np.random.Generator) -> Opposites | None:
    i, j = (int(index) for index in rng.permutation(len(scene.things))[:2])
    relations = [name for name in RELATIONS if scene.offset(i, j, name) >= MARGIN_PX]
    if not relations or not scene.names[i] or not scene.names[j]:
        return None
    x, y, relation = _name(scene, rng, i), _name(scene, rng, j), pick(rng, relations)
    phrase = int(rng.integers(2))
    true, false = ((("beside", BESIDE[name][phrase]),) for name in (relation, OPPOSITE[relation]))
    return Opposites("relation", Claim(x, y, true, (i, j)), Claim(x, y, false, (i, j)))


def _more(scene: Scene, rng: np.random.Generator) -> Opposites | None:
    if (found := _two_groups(scene, rng)) is None:
        return None
    x, y = found
    both = scene.find(x) + scene.find(y)
    return Opposites("more", Claim(x, y, referred=both), Claim(y, x, referred=both))


def _equal(scene: Scene, rng: np.random.Generator) -> Opposites | None:
    aspect = pick(rng, ("colour", "shape", "texture"))
    groups = [changed(Description(), aspect, value) for value in ASPECTS[aspect]]
    x, y, z = (groups[k] for k in rng.permutation(len(groups))[:3])
    n, m, other = (len(scene.find(group)) for group in (x, y, z))
    if n != m or n == 0 or other == n:
        return None
    true, false = (
        Claim(x, y, referred=scene.find(x) + scene.find(y)),
        Claim(x, z, referred=scene.find(x) + scene.find(z)),
    )
    return Opposites("equal", true, false)


def _larger(scene: Scene, rng: np.random.Generator) -> Opposites | None:
    if (found := _large_and_small(scene, rng)) is None:
        return None
    (i, x), (j, y) = found
    return Opposites("larger", Claim(x, y, referred=(i, j)), Claim(y, x, referred=(j, i)))


def _count(scene: Scene, rng: np.random.Generator) -> Open | None:
    n = int(rng.choice(MAX_COUNT + 1, p=COUNT_WEIGHTS))
    if n > 0:
        if n not in scene.by_count:
            return None
        x = pick(rng, scene.by_count[n])
    else:
        # Nothing there, though each word by itself fits something.
        aspects = shuffled(rng, tuple(ASPECTS))[:2]
        x = Description(**{aspect: getattr(pick(rng, scene.things).looks, aspect) for aspect in aspects})
        if x in scene.census:
            return None
    return Open("count", Claim(x, referred=scene.find(x)), str(n))


def _what(aspect: str) -> Callable[[Scene, np.random.Generator], Open | None]:
    def make(scene: Scene, rng: np.random.Generator) -> Open | None:
        if (found := _name_without(scene, rng, aspect)) is None:
            return None
        i, name = found
        return Open(aspect, Claim(name, referred=(i,)), getattr(scene.things[i].looks, aspect))

    return make


def _beside(scene: Scene, rng: np.random.Generator) -> Open | None:
    j = int(rng.integers(len(scene.things)))
    if not scene.names[j]:
        return None
    aspect, relation = pick(rng, ("colour", "shape", "texture")), pick(rng, tuple(RELATIONS))
    others = [other for other in ASPECTS if other != aspect]
    x = project(pick(rng, scene.things).looks, shuffled(rng, others)[: pick(rng, (0, 1, 1))])
    if (i := scene.beside(j, relation, x)) is None:
        return None
    words = (("aspect", aspect), ("beside", pick(rng, BESIDE[relation])))
    claim = Claim(x, _name(scene, rng, j), words, (i, j))
    return Open("beside", claim, getattr(scene.things[i].looks, aspect))


def _which_more(scene: Scene, rng: np.random.Generator) -> Open | None:
    if (found := _two_groups(scene, rng)) is None:
        return None
    x, y = found
    if x.stated not in {("colour",), ("shape",), ("texture",)}:
        return None
    first, second = (x, y) if rng.random() < 0.5 else (y, x)
    return Open("which_more", Claim(first, second, referred=scene.find(x) + scene.find(y)), _only_value(x))


def _which_larger(scene: Scene, rng: np.random.Generator) -> Open | None:
    if (found := _large_and_small(scene, rng)) is None:
        return None
    (i, x), (j, y) = found
    if x.stated != y.stated or len(x.stated) != 1:
        return None
    form, answer = ("which_larger", x) if rng.random() < 0.5 else ("which_smaller", y)
    first, second = (x, y) if rng.random() < 0.5 else (y, x)
    return Open(form, Claim(first, second, referred=(i, j)), _only_value(answer))


# --- naming ------------------------------------------------------------------------------------------------------


def _name(scene: Scene, rng: np.random.Generator, i: int, without: str | None = None) -> Description:
    """A description that fits thing `i` alone: as short as can be, or one word longer."""
    names = [name for name in scene.names[i] if without is None or getattr(name, without) is None]
    shortest = len(names[0].stated)
    return pick(rng, [name for name in names if len(name.stated) <= shortest + 1])


def _name_without(scene: Scene, rng: np.random.Generator, aspect: str) -> tuple[int, Description] | None:
    """A thing, and a description that fits it alone and does not state `aspect`."""
    i = int(rng.integers(len(scene.things)))
    if all(getattr(name, aspect) is not None for name in scene.names[i]):
        return None
    return i, _name(scene, rng, i, aspect)


def _two_groups(scene: Scene, rng: np.random.Generator) -> tuple[Description, Description] | None:
    """Two values of one aspect, the more frequent first; both are there."""
    aspect = pick(rng, tuple(ASPECTS))
    a, b = (changed(Description(), aspect, value) for value in shuffled(rng, ASPECTS[aspect])[:2])
    n, m = len(scene.find(a)), len(scene.find(b))
    if n == m or not n or not m:
        return None
    return (a, b) if n > m else (b, a)


def _large_and_small(
    scene: Scene, rng: np.random.Generator
) -> tuple[tuple[int, Description], tuple[int, Description]] | None:
    """A large and a small thing with names that do not state the size."""
    large, small = (scene.find(Description(size=size)) for size in ("large", "small"))
    if not large or not small:
        return None
    i, j = pick(rng, large), pick(rng, small)
    if any(all(name.size is not None for name in scene.names[k]) for k in (i, j)):
        return None
    return (i, _name(scene, rng, i, "size")), (j, _name(scene, rng, j, "size"))


def _only_value(description: Description) -> str:
    return next(value for value in description if value is not None)


# --- table -------------------------------------------------------------------------------------------------------

Maker = Callable[[Scene, np.random.Generator], Opposites | Open | None]

MAKERS: dict[str, dict[str, tuple[Maker, ...]]] = {
    "vqa": {
        "exist": (_exist,),
        "count": (_count,),
        "colour": (_what("colour"),),
        "shape": (_what("shape"),),
        "texture": (_what("texture"),),
        "relation": (_relation, _beside),
        "compare": (_more, _equal, _larger, _which_more, _which_larger),
    },
    "reasoning": {
        "exist": (_exist,),
        "count": (_exactly,),
        "colour": (_is("colour"),),
        "shape": (_is("shape"),),
        "texture": (_is("texture"),),
        "relation": (_relation,),
        "compare": (_more, _equal, _larger),
    },
}
"""Task -> kind of text -> its makers."""
