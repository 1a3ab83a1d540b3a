"""Hard-concrete gates for groups of channels, units and heads (Louizos and others, 2018; constants as in EfficientVLM's code)."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgevlm.models.groups import Group

LOW, HIGH, BETA, EPS = -0.1, 1.1, 2 / 3, 1e-6
LOG_ALPHA_LIMITS = (math.log(0.01), math.log(100.0))
KEEP_SHIFT = BETA * math.log(-LOW / HIGH)  # P(z > 0) = sigmoid(log_alpha - KEEP_SHIFT)
INITIAL = {"heads": 10.0, "neurons": 0.0}
"""Heads start almost surely open, neurons mostly: EfficientVLM's initial values (10 is clamped to log 100)."""
INITIAL_ELSEWHERE = 2.0
"""Ours, for what EfficientVLM does not gate: open to 97 %. A trained convolution does not bear a sixth of its channels missing."""


class HardConcrete(nn.Module):
    """`size` stochastic gates in [0, 1] that can be exactly 0 and exactly 1."""

    def __init__(self, size: int, initial: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((size,), float(initial)))
        self.clamp_()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep log_alpha within [log 0.01, log 100]; call after each optimiser step."""
        self.log_alpha.clamp_(*LOG_ALPHA_LIMITS)

    def keep_probability(self, shift: float = 0.0) -> Tensor:
        """P(gate > 0), (size,), with `shift` added to every log_alpha."""
        return torch.sigmoid(self.log_alpha + shift - KEEP_SHIFT)

    def sample(self) -> Tensor:
        """One draw per gate, differentiable in log_alpha."""
        u = torch.rand_like(self.log_alpha).clamp(EPS, 1 - EPS)
        s = torch.sigmoid((torch.logit(u) + self.log_alpha) / BETA)
        return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


class Gates(nn.Module):
    """A gate for every member of every group."""

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.by_group = nn.ModuleDict(
            {
                _key(group.name): HardConcrete(group.size, INITIAL.get(group.name.partition(".")[0], INITIAL_ELSEWHERE))
                for group in groups
            }
        )

    def __getitem__(self, name: str) -> HardConcrete:
        return self.by_group[_key(name)]  # pyright: ignore

    def sample(self) -> dict[str, Tensor]:
        """One draw of all gates: group -> (size,)."""
        return {group.name: self[group.name].sample() for group in self.groups}

    def expected(self, shift: float = 0.0) -> dict[str, Tensor]:
        """Expected number of open gates: group -> (), differentiable."""
        return {group.name: self[group.name].keep_probability(shift).sum() for group in self.groups}

    def clamp_(self) -> None:
        """See `HardConcrete.clamp_`."""
        for gate in self.by_group.values():
            gate.clamp_()  # pyright: ignore


@contextlib.contextmanager
def gated(model: nn.Module, groups: Sequence[Group], values: Mapping[str, Tensor]) -> Iterator[None]:
    """While this lasts, `model` multiplies the members of every group by `values` (group -> (size,))."""
    with contextlib.ExitStack() as hooks:
        for group in groups:
            for point in group.points:
                module, value = model.get_submodule(point.module), values[group.name].repeat_interleave(point.repeat)
                if point.side == "output":
                    handle = module.register_forward_hook(partial(_multiply_output, value))
                else:
                    handle = module.register_forward_pre_hook(partial(_multiply_input, value))
                hooks.callback(handle.remove)
        yield


def _multiply_output(value: Tensor, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return _multiply(output, value)


def _multiply_input(value: Tensor, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (_multiply(inputs[0], value),)


def _multiply(x: Tensor, value: Tensor) -> Tensor:
    return x * (value.view(1, -1, 1, 1) if x.dim() == 4 else value)


def _key(name: str) -> str:
    return name.replace(".", "_")  # a ModuleDict takes no dots
