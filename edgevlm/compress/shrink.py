"""Physical shrinking: a structure that fills a budget, and a smaller model whose output equals the gated one's."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from edgevlm.compress.cost import Cost
from edgevlm.errors import RecipeError
from edgevlm.models.groups import Group, cut
from edgevlm.models.vlm import VLM

Kept = dict[str, tuple[int, ...]]
"""Group -> sorted indices of the members that stay."""


CLOSE = 0.01
"""Share of a budget that may stay unused where an exchange would use it."""
GIVEN_UP = 4
"""Steps of a group at most that are exchanged at once: a head is worth a few steps of neurons."""


def masks(groups: Sequence[Group], kept: Kept) -> dict[str, Tensor]:
    """The choice as gates of exactly 0 and 1."""
    return {g.name: torch.zeros(g.size).index_fill_(0, torch.tensor(kept[g.name]), 1.0) for g in groups}


def steps_of(groups: Sequence[Group], round_to: int) -> dict[str, int]:
    """Group -> what its count is a multiple of, and what it keeps at least; heads go one by one."""
    return {g.name: 1 if g.name.startswith("heads.") else min(round_to, g.size) for g in groups}


def check_reachable(groups: Sequence[Group], cost: Cost, budget: float, round_to: int) -> None:
    """Raise RecipeError, which names the least, where a budget is below it."""
    least = cost.of(steps_of(groups, round_to))
    if budget < least * (1 - 1e-6):
        raise RecipeError(
            f"prune: {cost.show(budget)} is below the least that can be kept, {cost.show(least)} of {cost.show(cost.whole)}",
            f"Remove at most {100 * (1 - least / cost.whole):.0f} %, or lower prune.round_to",
        )


def fill_budget(
    groups: Sequence[Group],
    cost: Cost,
    budget: float,
    round_to: int,
    wanted: Callable[[float], Mapping[str, float]],
    scores: Mapping[str, Tensor],
) -> Kept:
    """The largest structure within a budget, along a line of structures that only grow.

    Counts are multiples of `round_to` (what vector units like), except heads; no group vanishes (a vanished layer breaks
    training, and converters refuse empty matrices). What rounding leaves of the budget goes to whoever misses most; where
    that still is more than 1 %, groups exchange steps.

    Args:
        groups: what may be removed.
        cost: of the model; `budget` is in its unit.
        round_to: see above.
        wanted: level -> members wanted of each group, rising with the level from nothing at -30 to all at 30.
        scores: of each member, (size,); the best of a group stay.

    Raises:
        RecipeError: the budget is below the least that can be kept.
    """
    steps, sizes = steps_of(groups, round_to), {g.name: g.size for g in groups}
    check_reachable(groups, cost, budget, round_to)

    def whole_steps(level: float) -> dict[str, int]:
        numbers = wanted(level)
        return {name: min(sizes[name], max(1, int(numbers[name] / step + 1e-6)) * step) for name, step in steps.items()}

    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.of(whole_steps(middle)) <= budget else (low, middle)
    counts, numbers = whole_steps(low), wanted(high)

    def one_more() -> bool:
        for name in sorted(steps, key=lambda name: (counts[name] - numbers[name]) / steps[name]):
            grown = min(sizes[name], counts[name] + steps[name])
            if grown > counts[name] and cost.of({**counts, name: grown}) <= budget:
                counts[name] = grown
                return True
        return False

    while one_more():
        pass
    while cost.of(counts) < (1 - CLOSE) * budget and (better := _exchanged(counts, steps, sizes, cost, budget)):
        counts = better
    return {name: tuple(sorted(torch.topk(scores[name], count).indices.tolist())) for name, count in counts.items()}


def _exchanged(
    counts: dict[str, int], steps: dict[str, int], sizes: dict[str, int], cost: Cost, budget: float
) -> dict[str, int] | None:
    """The fullest structure within the budget that gives up a few steps of a group for steps of another; None if none is fuller."""
    best, most = None, cost.of(counts) + 1e-9 * budget
    for less, number in itertools.product(steps, range(1, GIVEN_UP + 1)):
        given_up = {**counts, less: counts[less] - number * steps[less]}
        if given_up[less] < steps[less]:
            continue
        for more in steps:
            if more == less:
                continue
            trial = given_up
            while (grown := min(sizes[more], trial[more] + steps[more])) > trial[more]:
                wider = {**trial, more: grown}
                if cost.of(wider) > budget:
                    break
                trial = wider
            if (filled := cost.of(trial)) > most:
                best, most = trial, filled
    return best


def shrink(model: VLM, groups: Sequence[Group], kept: Kept) -> None:
    """Cut every group down to `kept`, in place, and let the model's config say so."""
    fusion, widths = model.config.fusion, dict(model.config.widths)
    fields: dict[str, list[int]] = {}
    for group in groups:
        cut(model, group, kept[group.name])
        if group.place is None:
            widths[group.name] = len(kept[group.name])
        else:
            field, layer = group.place
            fields.setdefault(field, list(getattr(fusion, field)))[layer] = len(kept[group.name])
    fusion = fusion.model_copy(update={field: tuple(numbers) for field, numbers in fields.items()})
    model.config = model.config.model_copy(update={"fusion": fusion, "widths": widths})
    model.fusion.config = fusion
