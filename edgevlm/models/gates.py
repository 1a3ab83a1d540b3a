"""Hard-concrete gates for fusion heads and FFN neurons (Louizos and others, 2018; constants as in EfficientVLM's code)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

LOW, HIGH, BETA, EPS = -0.1, 1.1, 2 / 3, 1e-6
LOG_ALPHA_LIMITS = (math.log(0.01), math.log(100.0))
KEEP_SHIFT = BETA * math.log(-LOW / HIGH)  # P(z > 0) = sigmoid(log_alpha - KEEP_SHIFT)


class LayerGates(NamedTuple):
    """Multipliers of one layer: heads (H,) on the context, neurons (F,) after the activation."""

    heads: Tensor
    neurons: Tensor


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


class FusionGates(nn.Module):
    """Gates for every head and neuron of a fusion transformer."""

    def __init__(self, layer_heads: tuple[int, ...], layer_ffn: tuple[int, ...]) -> None:
        super().__init__()
        # Heads start almost surely open, neurons mostly: EfficientVLM's initial values (10 is clamped to log 100).
        self.heads = nn.ModuleList(HardConcrete(size, 10.0) for size in layer_heads)
        self.neurons = nn.ModuleList(HardConcrete(size, 0.0) for size in layer_ffn)

    def sample(self) -> list[LayerGates]:
        return [LayerGates(h.sample(), n.sample()) for h, n in zip(self.heads, self.neurons, strict=True)]  # pyright: ignore

    def clamp_(self) -> None:
        for gate in (*self.heads, *self.neurons):
            gate.clamp_()  # pyright: ignore
