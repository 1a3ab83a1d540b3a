"""Five ways to choose what stays of a model: ours, and those that it must beat.

| method | |
|---|---|
| `fisher` | ours: the sum of gradient² of plain gates, per unit of cost, ranks everything together; progressive |
| `gates` | EfficientVLM's: hard-concrete gates on everything under one Lagrangian; the split between groups is learned |
| `gradient` | after UPop: plain gates; the sum of |gradient| ranks heads and neurons, standardised by kind; progressive |
| `modality` | every part (vision, fusion; with two encoders each of the three) loses the same share of its cost; within it, one ranking of weights' norms by kind |
| `magnitude` | every group loses the same share of its members, those with the smallest weights |
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgevlm.compress.cost import Cost
from edgevlm.compress.shrink import Kept, fill_budget, masks, steps_of
from edgevlm.models.gates import Gates, gated
from edgevlm.models.groups import Group
from edgevlm.models.vlm import VLM
from edgevlm.recipe import PruneSection
from edgevlm.train.loop import parameter_groups

HISTORY_POINTS = 100
"""Of a picture over time."""
TINY = 1e-12
"""Keeps the logarithm of a sum, and a division by what a member costs, finite."""


class Choice(NamedTuple):
    """The structures that were found, and how the training came to them."""

    at: Callable[[float], Kept]
    """Cost -> what stays at that cost; the ranking of members stays the same."""
    history: dict[int, dict[str, float]]
    """Steps done -> group -> share of its members that were (expected to be) open."""


@dataclass(frozen=True)
class Pruning:
    """One model on its way to a budget."""

    section: PruneSection
    student: VLM
    inner: nn.Module
    """Loss of the student without gates."""
    groups: tuple[Group, ...]
    cost: Cost
    """Of what can be removed, or of the whole where it is a time."""
    fit: Callable[..., None]
    """Train while choosing: (objective, parameter groups of the optimiser, hooks as in `train.loop.fit`)."""

    sparsity: float
    """Share of `cost` to remove."""

    @property
    def budget(self) -> float:
        """What may stay, in the unit of `cost`."""
        return self.cost.whole * (1 - self.sparsity)

    def fill(self, wanted: Callable[[float], dict[str, float]], scores: dict[str, Tensor], budget: float) -> Kept:
        """See `fill_budget`."""
        return fill_budget(self.groups, self.cost, budget, self.section.round_to, wanted, scores)


def target_sparsity(step: int, steps: int, ramp: float, final: float) -> float:
    """Linear rise from 0 to `final` over the first `ramp` of the steps, then constant: one counter, never restarted."""
    return final * min(1.0, (step + 1) / max(1.0, ramp * steps))


# --- learned gates -----------------------------------------------------------------------------------------------


class History(nn.Module):
    """What was open in the course of the training; a buffer, so that it lies in the snapshots."""

    shares_TG: Tensor

    def __init__(self, groups: tuple[Group, ...], steps: int) -> None:
        super().__init__()
        self.groups, self.every = groups, max(1, steps // HISTORY_POINTS)
        self.register_buffer("shares_TG", torch.full((steps // self.every, len(groups)), float("nan")))

    @torch.no_grad()
    def record(self, step: int, members: Callable[[], Mapping[str, Tensor]]) -> None:
        """Note the share of (expected) open members of every group, now and then."""
        place = (step + 1) // self.every - 1
        if (step + 1) % self.every == 0 and place < len(self.shares_TG):
            found = members()
            self.shares_TG[place] = torch.stack([found[g.name].detach().float() / g.size for g in self.groups])

    def by_step(self) -> dict[int, dict[str, float]]:
        """Steps done -> group -> share, 0..1."""
        names = [group.name for group in self.groups]
        return {
            (i + 1) * self.every: dict(zip(names, row, strict=True)) for i, row in enumerate(self.shares_TG.tolist())
        }


class PruneObjective(nn.Module):
    """Distillation loss of the gated student + l1 (s - t) + l2 (s - t)^2, with s the expected and t the target sparsity.

    The multipliers l1, l2 ascend while everything else descends.
    """

    def __init__(self, pruning: Pruning) -> None:
        super().__init__()
        self.inner, self.gates, self.cost = pruning.inner, Gates(pruning.groups), pruning.cost
        self._student = [pruning.student]  # a part of `inner`
        self.history = History(pruning.groups, pruning.section.steps)
        self.multipliers = nn.Parameter(torch.zeros(2))
        self.target = 0.0

    def forward(self, **batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with gated(self._student[0], self.gates.groups, self.gates.sample()):
            loss, logs = self.inner(**batch)
        sparsity = 1 - self.cost.of(self.gates.expected()) / self.cost.whole
        gap = sparsity - self.target
        loss = loss + self.multipliers[0] * gap + self.multipliers[1] * gap * gap
        return loss, {**logs, "sparsity": sparsity.detach(), "target": torch.tensor(self.target)}


def choose_by_gates(gates: Gates, fill: Callable[..., Kept], budget: float) -> Kept:
    """The structure that the gates have learned.

    A short run may end before the Lagrangian has met its target. All gates are therefore shifted together until the
    likeliest members fill the budget; what was learned, their order and the split between groups, stays.
    """

    @torch.no_grad()
    def wanted(shift: float) -> dict[str, float]:
        return {name: number.item() for name, number in gates.expected(shift).items()}

    return fill(wanted, {group.name: gates[group.name].log_alpha for group in gates.groups}, budget)


def by_gates(pruning: Pruning) -> Choice:
    """Train gates and weights together towards the budget."""
    section = pruning.section
    objective = PruneObjective(pruning)

    def before_step(step: int) -> None:
        objective.target = target_sparsity(step, section.steps, section.ramp, pruning.sparsity)

    def after_step(step: int) -> None:
        objective.gates.clamp_()
        objective.history.record(step, objective.gates.expected)

    optimised = [
        *parameter_groups(pruning.inner, section.lr, section.weight_decay),
        {"params": list(objective.gates.parameters()), "lr": section.gate_lr, "weight_decay": 0.0},
        {"params": [objective.multipliers], "lr": section.gate_lr, "weight_decay": 0.0, "maximize": True},
    ]
    pruning.fit(objective, optimised, before_step=before_step, after_step=after_step)
    return Choice(partial(choose_by_gates, objective.gates, pruning.fill), objective.history.by_step())


# --- accumulated gradients ---------------------------------------------------------------------------------------


class GradientObjective(nn.Module):
    """Distillation loss of the student with what the accumulated gradients have closed so far.

    Args:
        pruning: what is pruned.
        power: of the gradients, as they are summed.
        scored: sums of all groups -> scores of all members, comparable.
    """

    def __init__(self, pruning: Pruning, power: int, scored: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        super().__init__()
        self.inner, self._pruning = pruning.inner, [pruning]  # a list: not part of the module
        self.power, self.scored = power, scored
        self.values = nn.ParameterDict({_key(g): nn.Parameter(torch.ones(g.size)) for g in pruning.groups})
        for group in pruning.groups:
            self.register_buffer(f"sum_{_key(group)}", torch.zeros(group.size))
            self.register_buffer(f"open_{_key(group)}", torch.ones(group.size))
        self.history = History(pruning.groups, pruning.section.steps)

    def forward(self, **batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        groups = self._pruning[0].groups
        # The value is 0 or 1, and its gradient is that of a gate, open or closed: a closed one may come back.
        values = {
            g.name: self.get_buffer(f"open_{_key(g)}") + self.values[_key(g)] - self.values[_key(g)].detach()
            for g in groups
        }
        with gated(self._pruning[0].student, groups, values):
            return self.inner(**batch)

    @torch.no_grad()
    def accumulate(self, step: int) -> None:
        """Add up the gradients of the last step and close what the ramp asks for now."""
        pruning = self._pruning[0]
        for group in pruning.groups:
            value = self.values[_key(group)]
            if value.grad is not None:
                self.get_buffer(f"sum_{_key(group)}").add_(value.grad.abs() ** self.power)
                value.grad = None
        section = pruning.section
        sparsity = target_sparsity(step, section.steps, section.ramp, pruning.sparsity)
        for name, mask in masks(pruning.groups, self.choose(pruning.cost.whole * (1 - sparsity))).items():
            self.get_buffer(f"open_{name.replace('.', '_')}").copy_(mask)
        self.history.record(step, lambda: {g.name: self.get_buffer(f"open_{_key(g)}").sum() for g in pruning.groups})

    def choose(self, budget: float) -> Kept:
        """The structure at a budget."""
        pruning = self._pruning[0]
        sums = {g.name: self.get_buffer(f"sum_{_key(g)}").cpu() for g in pruning.groups}
        return by_threshold(pruning, self.scored(sums), budget)


def train_closing(pruning: Pruning, objective: GradientObjective) -> Choice:
    """Train, add up the gates' gradients, and close step by step what scores least."""
    section = pruning.section
    optimised = parameter_groups(pruning.inner, section.lr, section.weight_decay)
    pruning.fit(objective, optimised, after_step=objective.accumulate)
    return Choice(objective.choose, objective.history.by_step())


def by_fisher(pruning: Pruning) -> Choice:
    """What is lost per unit of cost that is saved, over all groups of all kinds.

    Where training has converged, closing a member raises the loss by about half the mean square of its gate's gradient
    (Theis and others, 2018: the Fisher information); closed is what raises it least for what it costs.
    """
    costs = saved_by_one(pruning)

    def scored(sums: dict[str, Tensor]) -> dict[str, Tensor]:
        logs = {name: torch.log(value.double() + TINY) - math.log(costs[name]) for name, value in sums.items()}
        mean = torch.cat(list(logs.values())).mean()
        return {name: (value - mean).float() for name, value in logs.items()}

    return train_closing(pruning, GradientObjective(pruning, 2, scored))


def saved_by_one(pruning: Pruning) -> dict[str, float]:
    """Group -> what a member costs, on average from the whole group down to the least of it that can stay."""
    cost, least = pruning.cost, steps_of(pruning.groups, pruning.section.round_to)
    found = {}
    for group in pruning.groups:
        removable = group.size - least[group.name]
        saved = cost.whole - cost.of({group.name: least[group.name]}) if removable else 0.0
        found[group.name] = max(saved / max(1, removable), TINY * cost.whole)  # a time may not fall at all
    return found


def by_gradient(pruning: Pruning) -> Choice:
    """|gradient|, standardised by kind (UPop, section 3)."""
    return train_closing(pruning, GradientObjective(pruning, 1, standardised))


# --- before training ---------------------------------------------------------------------------------------------


def by_modality(pruning: Pruning) -> Choice:
    """One ranking within each part, each at the same share of its own cost."""
    scores = standardised(magnitudes(pruning.student, pruning.groups))
    parts = []
    for part in sorted({group.part for group in pruning.groups}):
        own = tuple(group for group in pruning.groups if group.part == part)
        parts.append(replace(pruning, groups=own, cost=pruning.cost.only(group.name for group in own)))
    prunable = sum(part.cost.whole for part in parts)

    def at(budget: float) -> Kept:
        share = 1 - (pruning.cost.whole - budget) / prunable
        kept: Kept = {}
        for part in parts:
            kept |= by_threshold(part, {g.name: scores[g.name] for g in part.groups}, share * part.cost.whole)
        return kept

    return Choice(at, {})


def by_magnitude(pruning: Pruning) -> Choice:
    """The same share of every group."""
    scores = magnitudes(pruning.student, pruning.groups)

    def wanted(level: float) -> dict[str, float]:
        share = torch.sigmoid(torch.tensor(level)).item()
        return {group.name: share * group.size for group in pruning.groups}

    return Choice(lambda budget: pruning.fill(wanted, scores, budget), {})


METHODS: dict[str, Callable[[Pruning], Choice]] = {
    "fisher": by_fisher,
    "gates": by_gates,
    "gradient": by_gradient,
    "modality": by_modality,
    "magnitude": by_magnitude,
}
TRAINED = ("fisher", "gates", "gradient")
"""These train while they choose; the others spend the same steps on recovering."""


def by_threshold(pruning: Pruning, scores: dict[str, Tensor], budget: float) -> Kept:
    """One threshold for the scores of all groups."""

    def wanted(level: float) -> dict[str, float]:
        return {name: float((score >= -level).sum()) for name, score in scores.items()}

    return pruning.fill(wanted, scores, budget)


@torch.no_grad()
def magnitudes(model: VLM, groups: tuple[Group, ...]) -> dict[str, Tensor]:
    """Root of the mean square of all weights that go with a member: group -> (size,)."""
    found = {}
    for group in groups:
        squares, count = torch.zeros(group.size), 0
        for part in group.slices:
            weight: Tensor = model.get_submodule(part.module).weight  # pyright: ignore
            if weight.dim() == 1:
                continue  # a norm's scale is of another kind
            rows = weight.transpose(0, 1) if part.axis == "in" else weight
            own = rows[: group.size * part.repeat].reshape(group.size, -1).cpu().double()
            squares, count = squares + own.square().sum(1), count + own.shape[1]
        found[group.name] = (squares / max(1, count)).sqrt().float()
    return found


def standardised(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores with mean 0 and deviation 1 over all groups of a kind, so that kinds can be ranked together."""
    kinds: dict[str, list[str]] = {}
    for name in scores:
        kinds.setdefault(name.partition(".")[0], []).append(name)
    found = {}
    for names in kinds.values():
        values = torch.cat([scores[name] for name in names])
        deviation = values.std(unbiased=False).clamp(min=1e-12)
        found |= {name: (scores[name] - values.mean()) / deviation for name in names}
    return found


def _key(group: Group) -> str:
    return group.name.replace(".", "_")
