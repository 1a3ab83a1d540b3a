"""Disjoint parts of a split for processes that read side by side; together they are the whole split."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `world` parts.

    Raises:
        ValueError: no such part.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"there is no part {self.rank} of {self.world}")

    def takes(self, index: int) -> bool:
        """Whether record `index` (0, 1, ...) belongs to this part."""
        return index % self.world == self.rank


WHOLE = Shard()


def shard(samples: Iterable[T], rank: int, world: int) -> Iterator[T]:
    """Every `world`-th sample, beginning with number `rank`.

    It works for any reader, but each process decodes everything. Readers whose `samples` take a `Shard` open only
    the images of their part.
    """
    return islice(samples, Shard(rank, world).rank, None, world)
