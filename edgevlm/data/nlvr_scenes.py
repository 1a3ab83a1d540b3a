"""Scenes of NLVR as arrays: recombined and edited from training records, thousands at a time. No pixels.

Two worlds: `scattered` items of every shape, size and place, and `towers` of medium squares (slot k of a box is the k-th
block from the base). What a sentence may speak of (walls, corners, what lies on top) is computed once per pool. Ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from edgevlm.data.nlvr import COLOURS, SHAPES, SIZES, Record

SIDE_PX = 100
"""Of a box."""
SLOTS = 8
"""Items in a box, at most."""
TOWER_X, TOWER_Y = 40, (80, 59, 38, 17)
"""Where the blocks of a tower stand, from the base: 20 px each, one pixel apart."""
TOWER_HEIGHT = len(TOWER_Y)
SIZES_PX = np.array([*SIZES, 0], np.int16)
"""Pixels of the sizes; the last stands for 'no item'."""
NEAR_PX = 3
"""Items this near to each other, or overlapping, count as touching each other."""
EDITS = (0.45, 0.35)
"""Probabilities that a member of a family differs from its first by one edit, by two; else by three."""

Rng = np.random.Generator


@dataclass(frozen=True)
class Scenes:
    """S scenes of three boxes with up to eight items: arrays (S, 3, 8); a slot without an item has colour -1."""

    colour: np.ndarray
    """int8, index into `nlvr.COLOURS`."""
    shape: np.ndarray
    """int8, index into `nlvr.SHAPES`."""
    size: np.ndarray
    """int8, index into `nlvr.SIZES`."""
    x: np.ndarray
    """int16, left edge in pixels from the box's left."""
    y: np.ndarray
    """int16, top edge in pixels from the box's top."""

    def __len__(self) -> int:
        return len(self.colour)

    def take(self, index: np.ndarray) -> "Scenes":
        """Scenes `index`, with what is already computed about them."""
        chosen = Scenes(*(getattr(self, field.name)[index] for field in fields(self)))
        for name in ("present", "left", "top", "right", "bottom", "height", "highest", "lowest", "on"):
            if name in self.__dict__:
                chosen.__dict__[name] = self.__dict__[name][index]
        return chosen

    def copy(self) -> "Scenes":
        """Arrays of its own."""
        return Scenes(*(getattr(self, field.name).copy() for field in fields(self)))

    @cached_property
    def present(self) -> np.ndarray:
        """(S, 3, 8) bool."""
        return self.colour >= 0

    @cached_property
    def px(self) -> np.ndarray:
        """(S, 3, 8) int16: side of the item in pixels."""
        return SIZES_PX[np.where(self.colour >= 0, self.size, -1)]

    @cached_property
    def left(self) -> np.ndarray:
        """(S, 3, 8) bool: touches the left wall."""
        return self.present & (self.x <= 0)

    @cached_property
    def top(self) -> np.ndarray:
        """(S, 3, 8) bool: touches the roof."""
        return self.present & (self.y <= 0)

    @cached_property
    def right(self) -> np.ndarray:
        """(S, 3, 8) bool: touches the right wall."""
        return self.present & (self.x + self.px >= SIDE_PX)

    @cached_property
    def bottom(self) -> np.ndarray:
        """(S, 3, 8) bool: touches the floor."""
        return self.present & (self.y + self.px >= SIDE_PX)

    @cached_property
    def height(self) -> np.ndarray:
        """(S, 3) int: items in the box; of a tower, its height."""
        return self.present.sum(2)

    @cached_property
    def highest(self) -> np.ndarray:
        """(S, 3, 8) bool: nothing in the box begins higher up."""
        y = np.where(self.present, self.y, 10 * SIDE_PX)
        return self.present & (y == y.min(2, keepdims=True))

    @cached_property
    def lowest(self) -> np.ndarray:
        """(S, 3, 8) bool: nothing in the box reaches lower down."""
        end = np.where(self.present, self.y + self.px, -1)
        return self.present & (end == end.max(2, keepdims=True))

    @cached_property
    def on(self) -> np.ndarray:
        """(S, 3, 8, 8) bool: item i lies above item j and touches it."""
        x, y, px = self.x.astype(np.int16), self.y, self.px
        gap_x = np.maximum(x[..., :, None] - (x + px)[..., None, :], x[..., None, :] - (x + px)[..., :, None])
        gap_y = y[..., None, :] - (y + px)[..., :, None]
        both = self.present[..., :, None] & self.present[..., None, :]
        return both & (gap_x < 0) & (np.abs(gap_y) <= NEAR_PX)

    @cached_property
    def touching(self) -> np.ndarray:
        """(S, 3, 8, 8) bool: items i and j touch each other."""
        x, y, px = self.x, self.y, self.px
        gap_x = np.maximum(x[..., :, None] - (x + px)[..., None, :], x[..., None, :] - (x + px)[..., :, None])
        gap_y = np.maximum(y[..., :, None] - (y + px)[..., None, :], y[..., None, :] - (y + px)[..., :, None])
        both = self.present[..., :, None] & self.present[..., None, :] & ~np.eye(SLOTS, dtype=bool)
        return both & (gap_x <= NEAR_PX) & (gap_y <= NEAR_PX)


def from_records(records: Iterable[Record]) -> tuple[Scenes, Scenes]:
    """(scattered, towers): the scenes of the records, each in its world."""
    worlds: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    shapes, colours, sizes = ({name: i for i, name in enumerate(names)} for names in (SHAPES, COLOURS, SIZES))
    for record in records:
        scene = np.full((5, 3, SLOTS), -1, np.int16)
        for box, items in enumerate(record.structured_rep):
            for slot, item in enumerate(sorted(items, key=lambda item: -item.y_loc)[:SLOTS]):
                place = round(item.x_loc), round(item.y_loc)
                scene[:, box, slot] = colours[item.color], shapes[item.type], sizes[item.size], *place
        worlds[_is_tower(scene)].append(scene)
    return tuple(_scenes(np.stack(world, 1) if world else np.zeros((5, 0, 3, SLOTS), np.int16)) for world in worlds)  # pyright: ignore[reportReturnType]


def _is_tower(scene: np.ndarray) -> bool:
    present = scene[0] >= 0
    level = np.broadcast_to(np.arange(SLOTS), present.shape)[present]
    if not present.any(1).all() or level.max() >= TOWER_HEIGHT:
        return False
    return bool((scene[3][present] == TOWER_X).all() and (scene[4][present] == np.array(TOWER_Y)[level]).all())


def _scenes(arrays: np.ndarray) -> Scenes:
    colour, shape, size = (part.astype(np.int8) for part in arrays[:3])
    return Scenes(colour, shape, size, arrays[3], arrays[4])


def make_pool(base: Scenes, families: int, members: int, towers: bool, rng: Rng) -> Scenes:
    """`families * members` scenes: the members of a family stand together and differ by a few edits from its first.

    The first of a family is a scene of `base`, or three boxes from different ones. Families stand in order of size.
    """
    first = rng.integers(len(base), size=(families, 1)).repeat(3, 1)
    other = rng.integers(len(base), size=(families, 3))
    index = np.where(rng.random((families, 1)) < 0.5, first, other).repeat(members, 0)
    box = rng.permuted(np.broadcast_to(np.arange(3), (families, 3)), axis=1).repeat(members, 0)
    pool = Scenes(*(getattr(base, field.name)[index, box].copy() for field in fields(base)))
    is_first = np.arange(len(pool)) % members == 0
    draw = rng.random(len(pool))
    edits = np.where(is_first, 0, np.where(draw < EDITS[0], 1, np.where(draw < sum(EDITS), 2, 3)))
    for number in range(3):
        (edit_tower if towers else edit_scattered)(pool, np.flatnonzero(edits > number), rng)
    size = pool.present.reshape(families, members, -1).sum((1, 2))
    rows = (np.argsort(size, kind="stable")[:, None] * members + np.arange(members)).reshape(-1)
    return Scenes(*(getattr(pool, field.name)[rows] for field in fields(pool)))


def edit_tower(scenes: Scenes, rows: np.ndarray, rng: Rng) -> None:
    """One edit of each scene `rows`, in place: another colour, a block more or fewer on top, or two blocks swapped."""
    box = rng.integers(3, size=len(rows))
    height = (scenes.colour[rows, box] >= 0).sum(1)
    kind = rng.choice(4, size=len(rows), p=(0.5, 0.2, 0.15, 0.15))
    kind[(kind == 1) & (height == TOWER_HEIGHT) | (kind == 2) & (height == 1)] = 0
    colour = rng.integers(3, size=len(rows))
    level = (rng.random(len(rows)) * height).astype(int)
    level[kind == 1] = height[kind == 1]
    level[kind == 2] = height[kind == 2] - 1
    other = (rng.random(len(rows)) * height).astype(int)
    old = scenes.colour[rows, box, level].copy()
    new = np.choose(kind, [colour, colour, np.full_like(colour, -1), scenes.colour[rows, box, other]])
    scenes.colour[rows, box, level] = new
    swapped = kind == 3
    scenes.colour[rows[swapped], box[swapped], other[swapped]] = old[swapped]
    scenes.shape[rows, box, level] = SHAPES.index("square")
    scenes.size[rows, box, level] = 1
    scenes.x[rows, box, level] = TOWER_X
    scenes.y[rows, box, level] = np.array(TOWER_Y)[level]


def edit_scattered(scenes: Scenes, rows: np.ndarray, rng: Rng) -> None:
    """One edit of each scene `rows`, in place: an item changes colour, shape, size or place, goes, or a new one comes."""
    box = rng.integers(3, size=len(rows))
    present = scenes.colour[rows, box] >= 0
    # A present slot where there is one, and the first free one for a new item.
    slot = np.where(present, rng.random(present.shape), -1).argmax(1)
    kind = rng.choice(6, size=len(rows), p=(0.3, 0.15, 0.05, 0.25, 0.1, 0.15))
    count = present.sum(1)
    kind[count == 0] = 5
    kind[(kind == 5) & (count == SLOTS)] = 4
    slot = np.where(kind == 5, present.argmin(1), slot)
    at = (rows, box, slot)
    new = kind == 5
    colour, shape, size = (rng.integers(3, size=len(rows)) for _ in range(3))
    scenes.shape[at] = np.where(new | (kind == 1), shape, scenes.shape[at])
    old_size = scenes.size[at].copy()
    scenes.size[at] = np.where(new | (kind == 2), size, old_size)
    free, x, y = _free_place(scenes, rows, box, slot, rng)
    moved = new | (kind == 3) | (kind == 2)
    scenes.size[at] = np.where(moved & ~free & ~new, old_size, scenes.size[at])
    moved = moved & free
    scenes.x[at], scenes.y[at] = np.where(moved, x, scenes.x[at]), np.where(moved, y, scenes.y[at])
    appears = new & free
    scenes.colour[at] = np.where(appears | (kind == 0), colour, scenes.colour[at])
    scenes.colour[at] = np.where((kind == 4) | (new & ~free), -1, scenes.colour[at])


def _free_place(
    scenes: Scenes, rows: np.ndarray, box: np.ndarray, slot: np.ndarray, rng: Rng, tries: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A place for item `slot` that overlaps no other, often at the right wall or the floor, as in the data."""
    px = SIZES_PX[scenes.size[rows, box, slot]][:, None]
    room = SIDE_PX - px
    x = np.floor(rng.random((len(rows), tries)) * (room + 1)).astype(np.int16)
    y = np.floor(rng.random((len(rows), tries)) * (room + 1)).astype(np.int16)
    x, y = np.where(rng.random(x.shape) < 0.2, room, x), np.where(rng.random(y.shape) < 0.25, room, y)
    others = scenes.colour[rows, box] >= 0
    others[np.arange(len(rows)), slot] = False
    ox, oy, opx = scenes.x[rows, box][:, None], scenes.y[rows, box][:, None], SIZES_PX[scenes.size[rows, box]][:, None]
    inside_x = (x[..., None] < ox + opx) & (ox < (x + px)[..., None])
    inside_y = (y[..., None] < oy + opx) & (oy < (y + px)[..., None])
    clear = ~np.any(inside_x & inside_y & others[:, None], 2)
    best = clear.argmax(1)
    pick = np.arange(len(rows)), best
    return clear[pick], x[pick], y[pick]
