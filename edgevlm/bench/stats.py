"""Percentiles of a handful of timings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Summary of repeated runs of one thing, milliseconds."""

    num_runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie, linear between neighbours (numpy's default rule).

    Raises:
        ValueError: no values, or a share outside 0..1.
    """
    if not values:
        raise ValueError("no values")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be within 0..1, got {share}")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(times_ms: Sequence[float]) -> Timing:
    """Median and tail of some timings.

    Raises:
        ValueError: no timings.
    """
    return Timing(len(times_ms), *(percentile(times_ms, share) for share in (0.5, 0.9, 0.99)))
