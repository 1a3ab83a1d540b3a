"""Resumable snapshots of training as one safetensors file: model, optimiser, random state, step. No pickle."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


def save_snapshot(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, step: int, key: str) -> None:
    """Write the state after `step` steps; a crash while writing leaves the previous snapshot."""
    tensors = {f"model.{name}": value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    state = optimiser.state_dict()["state"]
    for index, values in state.items():
        for name, value in values.items():
            tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    temporary = path.with_suffix(".writing")
    save_file(
        {name: value.clone() for name, value in tensors.items()}, temporary, {"step": str(step), "key": json.dumps(key)}
    )
    temporary.replace(path)


def load_snapshot(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, key: str) -> int:
    """Restore the state and return the step to go on from; 0 if there is no usable snapshot of this `key`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if json.loads(metadata["key"]) != key:
                return 0
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (FileNotFoundError, SafetensorError, OSError):
        return 0
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, field = name.split(".")
            state.setdefault(int(index), {})[field] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return int(metadata["step"])
