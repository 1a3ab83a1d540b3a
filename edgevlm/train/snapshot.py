"""Resumable snapshots of training as one safetensors file: model, optimiser, average, random states, step. No pickle."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgevlm import processes
from edgevlm.train.fully_sharded import cut_like, whole
from edgevlm.train.optimiser import MovingAverage


def save_snapshot(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    key: str,
    average: MovingAverage | None = None,
) -> None:
    """Write the state after `step` steps; a crash while writing leaves the previous snapshot.

    Every process calls it (each has a random state of its own); the main one writes.
    """
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, values in optimiser.state_dict()["state"].items():
        for name, value in values.items():
            if value is not None:  # SGD's before its first step with a gradient
                tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value)
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.state().items()}
    tensors = {name: whole(value.detach()) for name, value in tensors.items()}
    for rank, state in enumerate(processes.gathered(random)):
        tensors |= {f"random.{name}.{rank}": value for name, value in state.items()}
    if not processes.is_main():
        return
    temporary = path.with_suffix(".writing")
    save_file(
        {name: value.cpu().contiguous().clone() for name, value in tensors.items()},
        temporary,
        {"step": str(step), "key": json.dumps(key)},
    )
    temporary.replace(path)


def load_snapshot(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    key: str,
    average: MovingAverage | None = None,
) -> int:
    """Restore the state and return the step to go on from; 0 if there is no usable snapshot of this `key`.

    With another number of processes than before, the weights go on exactly and the random states of new ones start
    afresh.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if json.loads(metadata["key"]) != key:
                return 0
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (FileNotFoundError, SafetensorError, OSError):
        return 0
    live = model.state_dict()
    model.load_state_dict({name: cut_like(value, live[name]) for name, value in _part(tensors, "model.").items()})
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(tensors, "optimiser.").items():
        index, field = name.split(".")
        state.setdefault(int(index), {})[field] = cut_like(value, parameters[int(index)])
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    if average is not None:
        average.load(_part(tensors, "average."))
    rank = processes.rank()
    if f"random.cpu.{rank}" in tensors:
        torch.set_rng_state(tensors[f"random.cpu.{rank}"])
    if f"random.cuda.{rank}" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"random.cuda.{rank}"])
    return int(metadata["step"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
