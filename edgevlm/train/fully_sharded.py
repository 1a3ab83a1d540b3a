"""Fully sharded training (FSDP): processes share the weights, gradients and optimiser states instead of repeating them.

accelerate's launcher says that it is wanted (`edgevlm launch-config fsdp`); the sharding is PyTorch's `fully_shard`. It
changes the objective in place, and a stage goes on with the same objective after the training: so it is undone then.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from edgevlm import processes
from edgevlm.models.attention import Layer

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)
"""What `fully_shard` leaves on a module, beside its class and its parameters."""


def is_wanted() -> bool:
    """Whether this run was launched with FSDP and has processes to share with."""
    return processes.world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(objective: nn.Module, groups: list[dict[str, Any]], bf16: bool) -> Callable[[], None]:
    """Cut the weights of every fusion layer, and of the rest, among the processes.

    Args:
        groups: optimiser parameter groups with parameters of `objective`; afterwards they hold the parts.
        bf16: gather weights and compute in bfloat16; the parts stay float32.

    Returns:
        A function that makes the objective whole again, in every process.
    """
    for tensor in (*objective.parameters(), *objective.buffers()):
        tensor.data.copy_(broadcast(tensor.data))  # pyright: ignore[reportArgumentType]  (as DDP does)
    before = [(m, m.__class__, {name: getattr(m, name).copy() for name in HOOKS}) for m in objective.modules()]
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for module in list(objective.modules()):
        if isinstance(module, Layer):
            fully_shard(module, mp_policy=policy)
    fully_shard(objective, mp_policy=policy)
    parts = dict(objective.named_parameters())
    for group in groups:
        group["params"] = [parts[names[id(parameter)]] for parameter in group["params"]]

    def unshard() -> None:
        for module, kind, hooks in before:
            module.__class__ = kind
            for name, hook in hooks.items():
                setattr(module, name, hook)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)

    return unshard


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as `like` is."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor
