"""What is in a scene, how objects are named, and what is true of them; nothing here draws or speaks.

Ours. Image coordinates: x grows to the right, y downwards; positions are compared by the centres of the boxes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from typing import NamedTuple, TypeVar

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")

ASPECTS: dict[str, tuple[str, ...]] = {"size": SIZES, "texture": TEXTURES, "colour": COLOURS, "shape": SHAPES}
"""Aspect -> its values, in the order in which English puts them before a noun."""

MARGIN_PX = 10.0
"""Centres closer than this along an axis are neither left nor right, above nor below of each other."""

RELATIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Relation -> axis of the centre, sign of the difference."""

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


class Description(NamedTuple):
    """A phrase such as 'large red': what it leaves open is None. Fits a thing if all that it says is so."""

    size: str | None = None
    texture: str | None = None
    colour: str | None = None
    shape: str | None = None

    @property
    def stated(self) -> tuple[str, ...]:
        """Names of the aspects that the phrase states."""
        return _stated(self)


@cache
def _stated(description: Description) -> tuple[str, ...]:
    return tuple(aspect for aspect, value in zip(description._fields, description, strict=True) if value is not None)


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `box` is that of the whole outline, covered or not."""

    looks: Description
    """All four aspects stated."""
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels."""
    side_px: int
    """Longer side of the box, rounded up."""
    angle_deg: int
    rgb: tuple[int, int, int]
    pattern: int
    """Which of the drawn patterns of its texture."""

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass(frozen=True)
class Scene:
    """Objects from back to front, and the seed of the background's grain."""

    things: tuple[Thing, ...]
    backdrop: str
    """flat, gradient or noise."""
    backdrop_rgb: tuple[tuple[int, int, int], tuple[int, int, int]]
    backdrop_seed: int

    @cached_property
    def census(self) -> dict[Description, tuple[int, ...]]:
        """Every description that fits anything -> the indices of the things it fits."""
        found: dict[Description, list[int]] = {}
        for i, thing in enumerate(self.things):
            for description in _parts(thing.looks):
                found.setdefault(description, []).append(i)
        return {description: tuple(indices) for description, indices in found.items()}

    @cached_property
    def names(self) -> tuple[tuple[Description, ...], ...]:
        """Per thing, the descriptions of one to three aspects that fit it alone, the shortest first."""
        unique: list[list[Description]] = [[] for _ in self.things]
        for description, indices in self.census.items():
            if len(indices) == 1 and 1 <= len(description.stated) <= 3:
                unique[indices[0]].append(description)
        return tuple(tuple(sorted(names, key=lambda name: len(name.stated))) for names in unique)

    @cached_property
    def by_count(self) -> dict[int, tuple[Description, ...]]:
        """Number of things -> the descriptions of at most two aspects that fit that many (one or more)."""
        groups: dict[int, list[Description]] = {}
        for description, indices in self.census.items():
            if len(description.stated) <= 2:
                groups.setdefault(len(indices), []).append(description)
        return {count: tuple(group) for count, group in groups.items()}

    def find(self, description: Description) -> tuple[int, ...]:
        """Indices of the things that a description fits."""
        return self.census.get(description, ())

    def offset(self, i: int, j: int, relation: str) -> float:
        """Pixels by which thing `i` lies to the `relation` of thing `j`; negative if it lies to the other side."""
        axis, sign = RELATIONS[relation]
        return sign * (self.things[i].centre[axis] - self.things[j].centre[axis])

    def beside(self, j: int, relation: str, description: Description) -> int | None:
        """The one thing of a description that lies to the `relation` of thing `j`, if there is one and no doubt.

        None as well if any candidate lies within the margin, on either side.
        """
        found = None
        for i in self.find(description):
            offset = self.offset(i, j, relation)
            if i == j or offset <= -MARGIN_PX:
                continue
            if offset < MARGIN_PX or found is not None:
                return None
            found = i
        return found


def project(looks: Description, aspects: Iterable[str]) -> Description:
    """The description that states only `aspects`."""
    return Description(**{aspect: getattr(looks, aspect) for aspect in aspects})


@cache
def _parts(looks: Description) -> tuple[Description, ...]:
    """Every description that fits a thing of these looks, the empty one included."""
    return tuple(project(looks, aspects) for n in range(len(ASPECTS) + 1) for aspects in combinations(ASPECTS, n))


def changed(description: Description, aspect: str, value: str | None) -> Description:
    """The description with one aspect replaced."""
    return description._replace(**{aspect: value})


T = TypeVar("T")


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of `choices`, all equally likely."""
    return choices[int(rng.integers(len(choices)))]


def shuffled(rng: np.random.Generator, choices: Sequence[T]) -> list[T]:
    """All of `choices` in random order."""
    return [choices[i] for i in rng.permutation(len(choices))]


def holds_relation(scene: Scene, a: Description, relation: str, b: Description) -> bool:
    """Whether any thing of `a` has its centre to the `relation` of any other thing of `b`, by however little."""
    return any(i != j and scene.offset(i, j, relation) > 0 for i in scene.find(a) for j in scene.find(b))
