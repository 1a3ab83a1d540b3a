"""What moves the weights: optimiser, learning-rate schedule, and their moving average."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgevlm.recipe import TrainSection
from edgevlm.train.fully_sharded import cut_like


def schedule(step: int, steps: int, warmup: float, shape: Literal["linear", "cosine", "constant"] = "linear") -> float:
    """Learning-rate factor: linear rise over `warmup * steps`, then a linear or cosine fall to 0, or none."""
    rise = max(1, round(warmup * steps))
    left = 1.0 if shape == "constant" else (steps - step) / max(1, steps - rise)
    if shape == "cosine" and left < 1:
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return min((step + 1) / rise, left)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only, not on biases, norms and scalars."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]


def make_optimiser(section: TrainSection, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """The section's optimiser; fused on a GPU, where one kernel then updates all weights."""
    fused = True if device.type == "cuda" else None
    if section.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum, fused=fused)
    return torch.optim.AdamW(groups, eps=1e-8, fused=fused)


class MovingAverage:
    """Exponential moving average of the trained weights and of the statistics of batch norms.

    The decay rises from 0.1 to `decay` (as TensorFlow's and timm's do), or a short run would average its random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        # References, not a state dict: this is called in every step.
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        named += [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
        self.names = [name for name, _ in named]
        self._live = [tensor for _, tensor in named]
        self._average = [tensor.detach().clone() for tensor in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [tensor.detach() for tensor in self._live], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def put_in_place(self) -> None:
        """The average becomes the model's weights."""
        for live, average in zip(self._live, self._average, strict=True):
            live.copy_(average)

    def state(self) -> dict[str, Tensor]:
        """Averages by name."""
        return dict(zip(self.names, self._average, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take over averages by name."""
        for name, average in zip(self.names, self._average, strict=True):
            average.copy_(cut_like(state[name], average))
