"""The training loop: accelerate for devices, processes and mixed precision; everything else is a page of plain code.

An objective is a module whose `forward(**batch)` returns (loss, logs). The order of the data is a function of the seed
and the step alone, so that a killed run goes on exactly where its snapshot was taken.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from edgevlm.errors import TrainingError
from edgevlm.progress import Reporter
from edgevlm.recipe import TrainSection
from edgevlm.train.snapshot import load_snapshot, save_snapshot

SNAPSHOTS = ".snapshot-*"
"""What `fit` leaves in its work folder for a resume; whoever finishes the stage deletes it."""

Batch = dict[str, Any]
"""Keyword arguments of an objective: tensors, or named tuples of them."""


class Batches:
    """Row indices per step: a fresh permutation each epoch, cut into batches, split among the processes."""

    def __init__(self, num_rows: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.num_rows, self.seed, self.rank, self.world = num_rows, seed, rank, world
        self.batch_size = min(batch_size, num_rows)
        self.per_epoch = num_rows // self.batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def at(self, step: int) -> Tensor:
        """Indices of this process's share of batch `step`."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num_rows, generator=generator)
        rows = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        return rows[self.rank :: self.world]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Learning-rate factor: linear rise over `warmup * steps`, then linear fall to 0."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only, not on biases, norms and scalars."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]


def fit(
    objective: nn.Module,
    num_rows: int,
    make_batch: Callable[[Tensor], Batch],
    section: TrainSection,
    *,
    what: str,
    work_dir: Path,
    key: str,
    seed: int,
    reporter: Reporter,
    groups: list[dict[str, Any]] | None = None,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    make_optimiser: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
) -> dict[str, float]:
    """Minimise `objective` for `section.steps` steps; resumes from a snapshot of the same `key` in `work_dir`.

    Args:
        make_batch: row indices -> keyword arguments of the objective.
        groups: optimiser parameter groups; default: all trainable parameters of the objective.
        before_step, after_step: called with the step index (for ramps and clamps).
        make_optimiser: parameter groups -> optimiser; default: AdamW.

    Returns:
        Means of the logs over the last tenth of the steps.

    Raises:
        TrainingError: the loss is not finite; the last good snapshot is kept.
    """
    accelerator = Accelerator(
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
        log_with="tensorboard",
        project_dir=work_dir / "tensorboard",
    )
    accelerator.init_trackers(what)
    torch.manual_seed(seed)
    groups = groups or parameter_groups(objective, section.lr, section.weight_decay)
    base_lrs = [group["lr"] for group in groups]
    optimiser = make_optimiser(groups) if make_optimiser else torch.optim.AdamW(groups, eps=1e-8)
    wrapped, optimiser_ = accelerator.prepare(objective, optimiser)
    snapshot = work_dir / SNAPSHOTS.replace("*", f"{what}.safetensors")
    start = load_snapshot(snapshot, objective, optimiser, key)
    if start:
        reporter.say(f"  {what}: going on from step {start} of {section.steps}")
    batches = Batches(num_rows, section.batch_size, seed, accelerator.process_index, accelerator.num_processes)
    trainable = [p for group in groups for p in group["params"]]
    totals: dict[str, list[float]] = {}
    objective.train()
    with reporter.bar(what, section.steps) as bar:
        for step in range(start, section.steps):
            for group, lr in zip(optimiser.param_groups, base_lrs, strict=True):
                group["lr"] = lr * schedule(step, section.steps, section.warmup)
            if before_step is not None:
                before_step(step)
            loss, logs = wrapped(**send_to_device(make_batch(batches.at(step)), accelerator.device))  # pyright: ignore
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trainable, section.clip_norm)
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(
                    f"{what}: the loss became {value} at step {step}",
                    f"Lower the learning rate; the state before it is kept in {work_dir}",
                )
            optimiser_.step()
            optimiser_.zero_grad()
            if after_step is not None:
                after_step(step)
            logs = {"loss": value, **{name: float(log) for name, log in logs.items()}}
            if step >= 0.9 * section.steps:
                for name, log in logs.items():
                    totals.setdefault(name, []).append(log)
            if step % 10 == 0:
                accelerator.log(logs, step=step)
                bar.update(step + 1, "  ".join(f"{name} {log:.3f}" for name, log in list(logs.items())[:4]))
            last = step + 1 == section.steps
            if (last or (step + 1) % section.save_every == 0) and accelerator.is_main_process:
                save_snapshot(snapshot, objective, optimiser, step + 1, key)
    accelerator.end_training()
    objective.eval()
    return {name: sum(values) / len(values) for name, values in totals.items()}
