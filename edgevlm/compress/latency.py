"""Milliseconds as a function of structure: a measured table of a model's pieces, interpolated between its points.

A table (`artifacts.LatencyTable`) holds what each piece of the model takes, alone on the target's runtime, at a few
sizes. Their sum differs from what the whole takes (calls, copies, pieces that nothing shrinks): that difference is a
constant, so that the whole model costs what was measured of it, and a structure what its pieces save.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from edgevlm.artifacts import LatencyTable, PieceTimes


class LatencyModel(NamedTuple):
    """The milliseconds of a model for any number of members in its groups; `cost.CostModel` for time."""

    whole: float
    """With all members; so much was measured."""
    pieces: tuple[PieceTimes, ...]
    sizes: dict[str, int]

    def of(self, members: Mapping[str, Any]) -> Any:
        """Milliseconds with so many members (numbers or tensors) left in each group; those not named are whole."""
        total: Any = self.whole
        for piece in self.pieces:
            counts = [members.get(name, self.sizes[name]) for name in piece.groups]
            total = total + interpolate(piece, counts) - piece.ms[-1]
        return total

    def only(self, names: Iterable[str]) -> "LatencyModel":
        """The pieces in which any of these groups has a part."""
        chosen = set(names)
        pieces = tuple(piece for piece in self.pieces if chosen & set(piece.groups))
        return LatencyModel(sum(piece.ms[-1] for piece in pieces), pieces, self.sizes)

    def show(self, value: float) -> str:
        """A cost in words."""
        return f"{value:.3g} ms"


def latency_model(table: LatencyTable, sizes: Mapping[str, int]) -> LatencyModel:
    """The model of a table, made monotone: noise must not make a smaller piece dearer.

    Args:
        table: measured.
        sizes: group -> its members.
    """
    return LatencyModel(table.whole_ms, tuple(monotone(piece) for piece in table.pieces.values()), dict(sizes))


def monotone(piece: PieceTimes) -> PieceTimes:
    """The piece with times that never fall when a group grows."""
    times = np.array(piece.ms).reshape([len(points) for points in piece.points])
    # From the largest size down: what is full was measured against the whole, so it is the anchor.
    for axis in range(times.ndim):
        times = np.flip(np.minimum.accumulate(np.flip(times, axis), axis), axis)
    return piece.model_copy(update={"ms": tuple(times.ravel().tolist())})


def interpolate(piece: PieceTimes, counts: list[Any]) -> Any:
    """Milliseconds between the measured sizes: linear in each group (and beyond the smallest), differentiable.

    Args:
        piece: its table.
        counts: members of each of its groups; numbers or tensors ().
    """
    places = [_place(points, count) for points, count in zip(piece.points, counts, strict=True)]
    strides = [int(np.prod([len(points) for points in piece.points[i + 1 :]])) for i in range(len(places))]
    total: Any = 0.0
    for corner in itertools.product((0, 1), repeat=len(places)):
        share: Any = 1.0
        for (_, along), upper in zip(places, corner, strict=True):
            share = share * (along if upper else 1 - along)
        index = sum((low + upper) * stride for (low, _), upper, stride in zip(places, corner, strides, strict=True))
        total = total + share * piece.ms[index]
    return total


def _place(points: tuple[int, ...], count: Any) -> tuple[int, Any]:
    """The measured size below, and how far the count is on the way to the next (0..1, below 0 under the smallest)."""
    number = count.item() if isinstance(count, Tensor) else count
    low = int(np.clip(np.searchsorted(points, number, side="right") - 1, 0, len(points) - 2))
    return low, (count - points[low]) / (points[low + 1] - points[low])


def grid(size: int, num_points: int, step: int) -> tuple[int, ...]:
    """Sizes to measure a group of `size` members at: the least that can stay (`step`), the whole, and multiples between.

    Fewer than `num_points` where there is no room for so many.
    """
    least = min(step, size)
    wanted = np.linspace(least, size, num_points)
    between = (min(size, max(least, round(value / step) * step)) for value in wanted[1:-1])
    return tuple(sorted({least, size, *between}))
