"""The training loop: accelerate for devices, processes and mixed precision; everything else is a page of plain code.

An objective is a module whose `forward(**batch)` returns (loss, logs). A step trains on `batch_size` rows, however many
processes and pieces share them. The order of the data is a function of the seed and the step alone, so that a killed
run goes on exactly where its snapshot was taken.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from torch import Tensor, nn

from edgevlm import processes
from edgevlm.errors import TrainingError
from edgevlm.progress import Reporter
from edgevlm.recipe import TrainSection
from edgevlm.train import fully_sharded
from edgevlm.train.batches import Batch, Batches, Loader, Piece, generator_of, prefetch, wait_for
from edgevlm.train.optimiser import MovingAverage, make_optimiser, parameter_groups, schedule
from edgevlm.train.snapshot import load_snapshot, save_snapshot

__all__ = ["SNAPSHOTS", "Batch", "Batches", "fit", "generator_of", "parameter_groups", "schedule"]

SNAPSHOTS = ".snapshot-*"
"""What `fit` leaves in its work folder for a resume; whoever finishes the stage deletes it."""

LOG_EVERY = 10
"""Steps between entries of the log."""

BAD_BATCH = SNAPSHOTS.replace("*", "{}-bad-batch.json")
"""Where `fit` writes which rows were in the batch that it stopped at."""

NAMED = 4
"""Samples that an error names; the file has all."""

RANK_SEED = 7919
"""Between the seeds of two processes: each drops other neurons."""


class Logs:
    """The logs of the steps, read together: reading waits for the GPU, and the mean over processes for the others."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: list[tuple[int, tuple[str, ...], Tensor]] = []

    def add(self, step: int, logs: dict[str, Tensor | float]) -> None:
        """Keep the logs of a step."""
        values = [torch.as_tensor(value, dtype=torch.float32, device=self.device).detach() for value in logs.values()]
        self._pending.append((step, tuple(logs), torch.stack(values)))

    def read(self, accelerator: Accelerator) -> list[tuple[int, dict[str, float]]]:
        """Logs of the steps since the last reading, as means over the processes."""
        if not self._pending:
            return []
        flat = torch.cat([values for _, _, values in self._pending])
        numbers = iter((accelerator.reduce(flat, "mean") if accelerator.num_processes > 1 else flat).tolist())  # pyright: ignore
        steps = [(step, {name: next(numbers) for name in names}) for step, names, _ in self._pending]
        self._pending = []
        return steps


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
    names: Callable[[Tensor], list[str]] | None = None,
) -> dict[str, float]:
    """Minimise `objective` for `section.steps` steps; resumes from a snapshot of the same `key` in `work_dir`.

    Args:
        make_batch: row indices -> keyword arguments of the objective. It runs ahead of the step in a thread, so it
            depends on the rows alone; what is random in it comes from `generator_of(rows)`.
        groups: optimiser parameter groups; default: all trainable parameters of the objective.
        before_step, after_step: called with the step index (for ramps and clamps).
        names: row indices -> ids of their samples, for errors.

    Returns:
        Means of the logs and of the gradient's norm over the last tenth of the steps, `samples_per_s`, and `stall_share`: the share of the time
        in which steps waited for their data, 0..1.

    Raises:
        TrainingError: the loss or the gradient is not finite (the batch is named, and the last good snapshot kept), a
            batch has fewer rows than pieces, or `make_batch` draws from the global generator.
    """
    accelerator = start_accelerator(section, work_dir / "tensorboard")
    accelerator.init_trackers(what)
    torch.manual_seed(seed + RANK_SEED * accelerator.process_index)
    groups = groups or parameter_groups(objective, section.lr, section.weight_decay)
    base_lrs = [group["lr"] for group in groups]
    if fully_sharded.is_wanted():
        wrapped = objective
        unshard = fully_sharded.shard(objective.to(accelerator.device), groups, wants_bf16(section))
    else:
        wrapped, unshard = accelerator.prepare(objective), None
    optimiser = make_optimiser(section, groups, accelerator.device)
    average = MovingAverage(objective, section.ema) if section.ema is not None else None
    snapshot = work_dir / SNAPSHOTS.replace("*", f"{what}.safetensors")
    start = load_snapshot(snapshot, objective, optimiser, key, average)
    if len(set(processes.gathered(start))) > 1:
        raise TrainingError(
            f"{what}: the processes found different snapshots in {work_dir}", "Give --out a folder that all nodes share"
        )
    if start:
        reporter.say(f"  {what}: going on from step {start} of {section.steps}")
    batches = Batches(num_rows, section.batch_size, seed, accelerator.process_index, accelerator.num_processes)
    check_pieces(batches.batch_size, accelerator.num_processes, section.accumulate, what)
    loader = Loader(batches, make_batch, section.accumulate, accelerator.device)
    if section.compile:
        objective.compile()
    trainable = [p for group in groups for p in group["params"]]
    logs, totals = Logs(accelerator.device), {}
    read_every = 1 if accelerator.device.type == "cpu" and accelerator.num_processes == 1 else LOG_EVERY
    clock = Clock()

    def pieces_of(step: int) -> list[Piece]:
        # The first is made while this thread waits for it, so a change of the random state is the batch's doing.
        return loader.first_pieces(step) if step == start and section.loaders else loader.pieces(step)

    objective.train()
    with (
        reporter.bar(what, section.steps) as bar,
        contextlib.closing(prefetch(pieces_of, range(start, section.steps), section.loaders)) as ready,
    ):
        for step, pieces, waited in ready:
            for group, lr in zip(optimiser.param_groups, base_lrs, strict=True):
                group["lr"] = lr * schedule(step, section.steps, section.warmup, section.schedule)
            if before_step is not None:
                before_step(step)
            values = backward(accelerator, wrapped, pieces)
            norm = accelerator.clip_grad_norm_(trainable, section.clip_norm)
            logs.add(step, {**values, "gradient": fully_sharded.whole(norm)})  # pyright: ignore[reportArgumentType]
            last = step + 1 == section.steps
            saving = last or (step + 1) % section.save_every == 0
            if step % read_every == 0 or saving:
                for at, values in logs.read(accelerator):
                    for quantity in ("loss", "gradient"):
                        if not math.isfinite(values[quantity]):
                            became = f"{what}: the {quantity} became {values[quantity]} at step {at}"
                            raise stopped(became, batches.at(at), names, work_dir, what)
                    if at >= 0.9 * section.steps:
                        for name, value in values.items():
                            totals.setdefault(name, []).append(value)
                    if at % LOG_EVERY == 0:
                        accelerator.log(values, step=at)
                        note = "  ".join(f"{name} {value:.3f}" for name, value in list(values.items())[:4])
                        bar.update(at + 1, note)
            optimiser.step()
            optimiser.zero_grad()
            if after_step is not None:
                after_step(step)
            if average is not None:
                average.update(step)
            if saving:
                save_snapshot(snapshot, objective, optimiser, step + 1, key, average)
            clock.tick(waited)
    speed = clock.speed(batches.batch_size)
    if speed:
        accelerator.log(speed, step=section.steps)
        reporter.say(
            f"  {what}: {speed['samples_per_s']:.0f} samples/s, {speed['stall_share']:.1%} of the time waiting for data"
        )
    for tracker in accelerator.trackers:  # `end_training` would part the processes as well
        tracker.finish()
    leave(objective, average, unshard)
    return {name: sum(values) / len(values) for name, values in totals.items()} | speed


def stopped(
    became: str, rows: Tensor, names: Callable[[Tensor], list[str]] | None, work_dir: Path, what: str
) -> TrainingError:
    """The error that names a batch; the rows and samples of all processes are written to a file."""
    numbers = [row for share in processes.gathered(rows.tolist()) for row in share]
    samples = names(torch.tensor(numbers)) if names else []
    path = work_dir / BAD_BATCH.format(what)
    if processes.is_main():
        path.write_text(json.dumps({"error": became, "rows": numbers, "samples": samples}) + "\n")
    kind, shown = ("samples", samples) if samples else ("rows", numbers)
    named = ", ".join(map(str, shown[:NAMED])) + (f" and {len(shown) - NAMED} more" if len(shown) > NAMED else "")
    return TrainingError(
        f"{became}, on {kind} {named} (all in {path})",
        f"Look at them, or lower the learning rate; the last good state is kept in {work_dir}",
    )


def backward(accelerator: Accelerator, wrapped: nn.Module, pieces: list[Piece]) -> dict[str, Tensor | float]:
    """Gradients of a step, over all pieces and processes; returns the loss and logs as this process sees them."""
    sums: dict[str, Any] = {}
    for number, piece in enumerate(pieces, 1):
        # Gradients travel between the processes once per step, with the last piece.
        with accelerator.no_sync(wrapped) if number < len(pieces) else contextlib.nullcontext():
            loss, logs = wrapped(**wait_for(piece))
            loss = loss if piece.weight == 1 else loss * piece.weight
            accelerator.backward(loss)
        for name, value in {"loss": loss.detach(), **logs}.items():
            value = value if name == "loss" or piece.weight == 1 else value * piece.weight
            sums[name] = sums[name] + value if name in sums else value
    return sums


def start_accelerator(section: TrainSection, log_dir: Path) -> Accelerator:
    """An Accelerator with the section's precision, whatever an earlier stage of this process used."""
    processes.join()
    AcceleratorState._reset_state(False)
    return Accelerator(
        mixed_precision="bf16" if wants_bf16(section) else "no",
        log_with="tensorboard",
        project_dir=log_dir,
        # Heads that a task leaves alone have no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def wants_bf16(section: TrainSection) -> bool:
    """Whether matrix products are to be taken in bfloat16 here."""
    return section.precision == "bf16" or (section.precision == "auto" and torch.cuda.is_available())


def check_pieces(batch_size: int, world: int, accumulate: int, what: str) -> None:
    """Raise TrainingError where a batch has fewer rows than there are pieces to share them."""
    if batch_size < world * accumulate:
        raise TrainingError(
            f"{what}: {batch_size} rows per step cannot be shared by {world} processes x {accumulate} pieces",
            f"Set {what}.batch_size to {world * accumulate} or more, or start fewer processes",
        )


def leave(objective: nn.Module, average: MovingAverage | None, unshard: Callable[[], None] | None) -> None:
    """The objective as the stage goes on with it: averaged weights, whole, not compiled, the same in every process."""
    if average is not None:
        average.put_in_place()
    if unshard is not None:
        unshard()
    objective._compiled_call_impl = None
    objective.eval()
    if processes.world_size() > 1:
        for buffer in objective.buffers():  # each process saw other batches: the main one's batch norms hold
            buffer.copy_(broadcast(buffer))  # pyright: ignore[reportArgumentType]


class Clock:
    """Time of the steps and of their waiting; the first step does not count: it warms up, and nothing was ahead."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._steps, self._waited = 0, 0.0

    def tick(self, waited_s: float) -> None:
        """A step is over."""
        if self._start is None:
            self._start = time.perf_counter()
            return
        self._steps += 1
        self._waited += waited_s

    def speed(self, batch_size: int) -> dict[str, float]:
        """Samples per second and stall share so far; empty before the second step."""
        if self._start is None or not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return {"samples_per_s": batch_size * self._steps / seconds, "stall_share": min(1.0, self._waited / seconds)}
