"""The embedded dataset `scenes`: coloured, textured shapes on a background, drawn by code, as many as asked for.

Sample `index` of a split depends on (seed, split, index) alone, through independent random streams, so splits never
overlap and any sample can be drawn by itself, in any process. About a millisecond per image: outlines are drawn
once per (shape, size, angle) at four times the resolution, and composed from that cache.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from edgevlm.artifacts import Labels
from edgevlm.data import scene_texts
from edgevlm.data.sample import Sample
from edgevlm.data.scene_facts import COLOURS, SHAPES, SIZES, TEXTURES, Description, Scene, Thing, pick, shuffled
from edgevlm.errors import DataError, RecipeError, nearest

CANVAS_PX = 128
NUM_THINGS = (3, 6)
SIDE_PX = {"small": (16, 24), "large": (32, 46)}
ANGLES_DEG = (-15, -10, -5, 0, 5, 10, 15)
MAX_COVERED = 0.25
"""Largest share of a thing's area that others may hide; half of the scenes have no overlap at all."""

RGB = {
    "red": (214, 42, 42),
    "green": (40, 158, 60),
    "blue": (40, 84, 214),
    "yellow": (244, 208, 46),
    "purple": (142, 58, 184),
    "cyan": (58, 204, 214),
}
JITTER_RGB = 10
INK = 0.35
"""Brightness of stripes and dots relative to the thing's colour."""

GAP_PX = 2
"""Between things of the same colour."""

SUPERSAMPLE = 4
SPLITS = {"train": 0, "val": 1, "test": 2}
DEFAULT_NUM_SAMPLES = 1000
"""Of `val` and `test`, when no limit is given."""


@dataclass(frozen=True)
class Pair:
    """A caption that is true of the image, or one that a single changed word makes false."""

    sample: Sample
    caption: str
    matches: bool


class Scenes:
    """Reader of the drawn dataset.

    Args:
        task: `vqa` (questions with open answers) or `reasoning` (sentences that are true or false).
        seed: another seed is another dataset.
        texts_per_image: questions or sentences per image (a few less where a scene does not offer that many).
        captions_per_image: captions per image; the first is the same for any number, and some may be equal.
    """

    name = "scenes"
    splits = tuple(SPLITS)

    def __init__(self, task: str, seed: int, texts_per_image: int = 8, captions_per_image: int = 1) -> None:
        if task not in scene_texts.ANSWERS:
            known = ", ".join(scene_texts.ANSWERS)
            raise RecipeError(f"Dataset scenes has no task '{task}'", f"{nearest(task, scene_texts.ANSWERS)} {known}")
        self.task = task
        self.seed = seed
        self.texts_per_image = texts_per_image
        self.captions_per_image = captions_per_image
        self.labels = Labels(classes=SHAPES, attributes=COLOURS + SIZES + TEXTURES, answers=scene_texts.ANSWERS[task])

    def scene(self, split: str, index: int) -> Scene:
        """What is in image `index` of a split."""
        return make_scene(self._rng(split, index, 0))

    def sample(self, split: str, index: int) -> Sample:
        """Image `index` (0, 1, ...) of a split, with its texts."""
        scene = self.scene(split, index)
        rng = self._rng(split, index, 1)
        texts = scene_texts.make_texts(scene, self.task, self.texts_per_image, rng)
        captions = tuple(scene_texts.make_caption(scene, rng)[0] for _ in range(self.captions_per_image))
        tags = self.labels.attributes
        return Sample(
            id=f"{split}-{index}",
            image=draw(scene),
            boxes=np.array([thing.box for thing in scene.things], np.float32),
            classes=np.array([SHAPES.index(str(thing.looks.shape)) for thing in scene.things], np.int64),
            attributes=tuple(
                tuple(tags.index(str(value)) for value in (thing.looks.colour, thing.looks.size, thing.looks.texture))
                for thing in scene.things
            ),
            texts=texts,
            captions=captions,
        )

    def samples(self, split: str, limit: int | None = None) -> Iterator[Sample]:
        """The first `limit` samples; `val` and `test` have 1,000 unless a limit says otherwise.

        Raises:
            DataError: an unknown split, or `train` without a limit (there is no end to it).
        """
        for index in range(self.num_samples(split, limit)):
            yield self.sample(split, index)

    def pairs(self, split: str, limit: int | None = None) -> Iterator[Pair]:
        """Image-text pairs, one true and one false (one word changed) per image, in random order."""
        for index in range(self.num_samples(split, limit)):
            rng = self._rng(split, index, 2)
            sample = self.sample(split, index)
            true, false = scene_texts.make_caption(self.scene(split, index), rng)
            pairs = [Pair(sample, true, True), Pair(sample, false, False)]
            yield from pairs if rng.random() < 0.5 else pairs[::-1]

    def num_samples(self, split: str, limit: int | None) -> int:
        """How many samples `samples` yields; raises as it does."""
        if split not in SPLITS:
            raise DataError(f"Dataset scenes has no split '{split}'", f"Use one of {', '.join(SPLITS)}")
        if limit is None and split == "train":
            raise DataError("The training split of scenes has no end", "Set data.num_train in the recipe")
        return DEFAULT_NUM_SAMPLES if limit is None else limit

    def _rng(self, split: str, index: int, stream: int) -> np.random.Generator:
        if split not in SPLITS:
            raise DataError(f"Dataset scenes has no split '{split}'", f"Use one of {', '.join(SPLITS)}")
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(SPLITS[split], index, stream)))


# --- composing ---------------------------------------------------------------------------------------------------


def make_scene(rng: np.random.Generator) -> Scene:
    """A random scene; a limited palette per scene makes repeated colours and shapes, and so counts above one."""
    while True:
        things = _place_things(rng)
        if len(things) >= NUM_THINGS[0]:
            break
    base = rng.integers(80, 226) + rng.integers(-12, 13, size=(2, 3))
    base[1] += rng.integers(-45, 46)
    low, high = ((int(r), int(g), int(b)) for r, g, b in base.clip(50, 240))
    return Scene(
        things=tuple(things),
        backdrop=pick(rng, ("flat", "gradient", "noise")),
        backdrop_rgb=(low, high),
        backdrop_seed=int(rng.integers(2**32)),
    )


def _place_things(rng: np.random.Generator) -> list[Thing]:
    colours = shuffled(rng, COLOURS)[: rng.integers(2, len(COLOURS) + 1)]
    shapes = shuffled(rng, SHAPES)[: rng.integers(2, len(SHAPES) + 1)]
    textures = shuffled(rng, TEXTURES)[: rng.integers(1, len(TEXTURES) + 1)]
    max_covered = MAX_COVERED if rng.random() < 0.5 else 0.0
    things: list[Thing] = []
    visible: list[np.ndarray] = []  # per thing, the part of its mask that nothing hides
    for _ in range(int(rng.integers(NUM_THINGS[0], NUM_THINGS[1] + 1))):
        size = pick(rng, SIZES)
        looks = Description(size, pick(rng, textures), pick(rng, colours), pick(rng, shapes))
        side = int(rng.integers(SIDE_PX[size][0], SIDE_PX[size][1] + 1))
        angle = 0 if looks.shape == "circle" else pick(rng, ANGLES_DEG)
        jitter = rng.integers(-JITTER_RGB, JITTER_RGB + 1, 3).tolist()
        r, g, b = (value + change for value, change in zip(RGB[str(looks.colour)], jitter, strict=True))
        pattern = int(rng.integers(NUM_PATTERNS))
        solid = _solid(str(looks.shape), side, angle)
        for corner in rng.integers(2, CANVAS_PX - side - 1, (30, 2)).tolist():
            x, y = corner
            apart = all(_apart(x, y, side, thing) for thing in things if thing.looks.colour == looks.colour)
            if apart and _covers_little((x, y), solid, things, visible, max_covered):
                width, height = _extent(str(looks.shape), side, angle)
                thing = Thing(looks, (x, y, x + width, y + height), side, angle, (r, g, b), pattern)
                _hide(thing, solid, things, visible)
                things.append(thing)
                visible.append(solid.copy())
                break
    return things


def _apart(x: int, y: int, side: int, thing: Thing) -> bool:
    """Whether a gap remains: nobody could say what two things of one colour are where they overlap."""
    left, top = _corner(thing)
    reach, other = side + GAP_PX, thing.side_px + GAP_PX
    return x >= left + other or left >= x + reach or y >= top + other or top >= y + reach


def _overlap(
    a: tuple[int, int], a_side: int, b: tuple[int, int], b_side: int
) -> tuple[slice, slice, slice, slice] | None:
    """Rows and columns of `a`, then of `b`, where the two squares of pixels meet."""
    x1, y1 = max(a[0], b[0]), max(a[1], b[1])
    x2, y2 = min(a[0] + a_side, b[0] + b_side), min(a[1] + a_side, b[1] + b_side)
    if x1 >= x2 or y1 >= y2:
        return None
    return (
        slice(y1 - a[1], y2 - a[1]),
        slice(x1 - a[0], x2 - a[0]),
        slice(y1 - b[1], y2 - b[1]),
        slice(x1 - b[0], x2 - b[0]),
    )


def _corner(thing: Thing) -> tuple[int, int]:
    return int(thing.box[0]), int(thing.box[1])


def _covers_little(
    corner: tuple[int, int], solid: np.ndarray, things: list[Thing], visible: list[np.ndarray], max_covered: float
) -> bool:
    """Whether a new outline at `corner` leaves enough of every thing that is there already."""
    for thing, shown in zip(things, visible, strict=True):
        if meet := _overlap(corner, len(solid), _corner(thing), thing.side_px):
            hidden = int((solid[meet[0], meet[1]] & shown[meet[2], meet[3]]).sum())
            area = int(_solid(str(thing.looks.shape), thing.side_px, thing.angle_deg).sum())
            if hidden + area - int(shown.sum()) > max_covered * area:
                return False
    return True


def _hide(new: Thing, solid: np.ndarray, things: list[Thing], visible: list[np.ndarray]) -> None:
    for thing, shown in zip(things, visible, strict=True):
        if meet := _overlap(_corner(new), len(solid), _corner(thing), thing.side_px):
            shown[meet[2], meet[3]] &= ~solid[meet[0], meet[1]]


# --- drawing -----------------------------------------------------------------------------------------------------


def draw(scene: Scene) -> Image.Image:
    """The scene as a 128 x 128 RGB image."""
    image = _backdrop(scene)
    for thing in scene.things:
        shape, texture = str(thing.looks.shape), str(thing.looks.texture)
        mask = _mask(shape, thing.side_px, thing.angle_deg)
        corner = _corner(thing)
        image.paste(thing.rgb, (*corner, corner[0] + thing.side_px, corner[1] + thing.side_px), mask)
        if texture != "plain":
            r, g, b = (round(INK * value) for value in thing.rgb)
            pattern = _pattern(texture, thing.pattern).crop((0, 0, thing.side_px, thing.side_px))
            image.paste((r, g, b), corner, ImageChops.multiply(mask, pattern))
    return image


def _backdrop(scene: Scene) -> Image.Image:
    low, high = scene.backdrop_rgb
    if scene.backdrop == "flat":
        return Image.new("RGB", (CANVAS_PX, CANVAS_PX), low)
    rng = np.random.default_rng(scene.backdrop_seed)
    if scene.backdrop == "gradient":
        # Bilinear enlargement of four corners is a gradient in a random direction.
        across, down = rng.random(2)
        weights_HW = np.array([[0.0, across], [down, across + down]]) / max(across + down, 1e-6)
        corners_HWC = np.add(low, weights_HW[..., None] * np.subtract(high, low))
        small = Image.fromarray(corners_HWC.round().astype(np.uint8))
        return small.resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    cells_HWC = np.add(low, rng.random((16, 16, 1)) * np.subtract(high, low))
    smooth = Image.fromarray(cells_HWC.round().astype(np.uint8)).resize(
        (CANVAS_PX, CANVAS_PX), Image.Resampling.BILINEAR
    )
    grain_HWC = rng.integers(-8, 9, size=(CANVAS_PX, CANVAS_PX, 1), dtype=np.int16)
    return Image.fromarray((np.asarray(smooth, np.int16) + grain_HWC).clip(0, 255).astype(np.uint8))


@cache
def _outline(shape: str, angle_deg: int) -> np.ndarray:
    """Corners of a shape's polygon, scaled so that the longer side of its box is 1 and the box begins at (0, 0)."""
    if shape == "square":
        points = [(0, 0), (1, 0), (1, 1), (0, 1)]
    elif shape == "triangle":
        points = [(0.5, 0), (1, 0.9), (0, 0.9)]
    elif shape == "star":
        turns = [(math.pi * k / 5, 1.0 if k % 2 == 0 else 0.45) for k in range(10)]
        points = [(radius * math.sin(turn), -radius * math.cos(turn)) for turn, radius in turns]
    elif shape == "cross":
        near, far = 0.33, 0.67
        points = [(near, 0), (far, 0), (far, near), (1, near), (1, far), (far, far)]
        points += [(far, 1), (near, 1), (near, far), (0, far), (0, near), (near, near)]
    else:
        turns = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        points = np.stack([np.sin(turns), np.cos(turns)], 1)
    turn = math.radians(angle_deg)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    corners = np.asarray(points, np.float64) @ rotation
    corners -= corners.min(0)
    return corners / corners.max()


def _extent(shape: str, side_px: int, angle_deg: int) -> tuple[float, float]:
    """Width and height of a shape's box, in pixels; the longer is `side_px`."""
    width, height = _outline(shape, angle_deg).max(0) * side_px
    return float(width), float(height)


@cache
def _mask(shape: str, side_px: int, angle_deg: int) -> Image.Image:
    """Antialiased coverage, side_px x side_px, of a shape that begins at the top left."""
    side = side_px * SUPERSAMPLE
    image = Image.new("L", (side, side))
    # Pillow fills up to and including the corner pixels: the last one is side - 1.
    corners = _outline(shape, angle_deg) * (side - 1)
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    return image.reduce(SUPERSAMPLE)


@cache
def _solid(shape: str, side_px: int, angle_deg: int) -> np.ndarray:
    return np.asarray(_mask(shape, side_px, angle_deg)) > 127


NUM_PATTERNS = 8


@cache
def _pattern(texture: str, pattern: int) -> Image.Image:
    """Antialiased stripes (four directions) or dots (straight or staggered), at two phases or spacings; 48 x 48."""
    side = 48 * SUPERSAMPLE
    y_HW, x_HW = np.mgrid[:side, :side] / SUPERSAMPLE
    if texture == "striped":
        turn = math.pi / 4 * (pattern % 4)
        period, phase = 7.0, 3.5 * (pattern // 4)
        ink_HW = ((x_HW * math.cos(turn) + y_HW * math.sin(turn) + phase) % period) < 0.45 * period
    else:
        period, radius = 7.0, 2.0
        shift = 3.5 * (pattern // 4)
        row_HW = np.floor((y_HW + shift) / period)
        x_HW = x_HW + shift + (row_HW % 2) * period / 2 * (pattern % 2)
        dx_HW, dy_HW = x_HW % period - period / 2, (y_HW + shift) % period - period / 2
        ink_HW = dx_HW**2 + dy_HW**2 < radius**2
    return Image.fromarray(ink_HW.astype(np.uint8) * 255).reduce(SUPERSAMPLE)
