"""Which rows a step trains on, and having its batch ready before the step asks for it.

The order of the data is a function of the seed and the step alone, and a batch a function of its rows alone: so a
killed run goes on exactly where its snapshot was taken, whatever had been prepared ahead.
"""

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor

from edgevlm.errors import TrainingError

Batch = dict[str, Any]
"""Keyword arguments of an objective: tensors, or named tuples of them."""

T = TypeVar("T")


class Batches:
    """Row indices per step: a fresh permutation each epoch, cut into batches, split among the processes."""

    def __init__(self, num_rows: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.num_rows, self.seed, self.rank, self.world = num_rows, seed, rank, world
        self.batch_size = min(batch_size, num_rows)
        self.per_epoch = num_rows // self.batch_size
        self._epoch = (-1, torch.empty(0, dtype=torch.long))

    def at(self, step: int) -> Tensor:
        """Indices of this process's share of batch `step`."""
        epoch, position = divmod(step, self.per_epoch)
        known, order = self._epoch  # one attribute: several loader threads ask
        if epoch != known:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.num_rows, generator=generator)
            self._epoch = (epoch, order)
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        return rows[self.rank :: self.world]


def generator_of(rows: Tensor, seed: int = 0) -> torch.Generator:
    """A random generator that depends on the rows of a batch, their order and the seed, and on nothing else.

    For augmentation in `make_batch`, which runs in a thread ahead of the step: the global generators would give other
    numbers after a resume.
    """
    state = seed
    for row in rows.tolist():
        state = (state * 1_000_003 + row + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(state)


class Piece(NamedTuple):
    """What one forward pass of one process takes."""

    batch: Batch
    weight: float
    """Factor of its loss, such that the mean over processes of the sum over pieces is the mean over the batch."""
    ready: "torch.cuda.Event | None"
    """When the copy to the GPU is done; None where there is none."""


class Loader:
    """Makes the pieces of a step and brings them to the device; called from loader threads.

    Args:
        make_batch: row indices -> keyword arguments of the objective; a function of the rows alone.
        accumulate: pieces per step and process.
    """

    def __init__(
        self, batches: Batches, make_batch: Callable[[Tensor], Batch], accumulate: int, device: torch.device
    ) -> None:
        self.batches, self.make_batch, self.accumulate, self.device = batches, make_batch, accumulate, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pieces(self, step: int) -> list[Piece]:
        """This process's share of batch `step`, in pieces."""
        share = self.batches.at(step).tensor_split(self.accumulate)
        factor = self.batches.world / self.batches.batch_size
        return [self._piece(self.make_batch(rows), len(rows) * factor) for rows in share]

    def first_pieces(self, step: int) -> list[Piece]:
        """The pieces of the first step of a run, while nothing else draws random numbers.

        Raises:
            TrainingError: `make_batch` drew from PyTorch's global generator, and so would not repeat itself.
        """
        before = torch.get_rng_state()
        pieces = self.pieces(step)
        if not torch.equal(before, torch.get_rng_state()):
            raise TrainingError(
                "make_batch drew from PyTorch's global random generator, but runs ahead of the step",
                "Draw from generator_of(rows), or set loaders: 0",
            )
        return pieces

    def _piece(self, batch: Batch, weight: float) -> Piece:
        if self._stream is None:
            return Piece(send_to_device(batch, self.device), weight, None)  # pyright: ignore[reportArgumentType]
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            pinned = recursively_apply(lambda tensor: tensor.pin_memory(), batch)
            moved = send_to_device(pinned, self.device, non_blocking=True)
            return Piece(moved, weight, self._stream.record_event())  # pyright: ignore[reportArgumentType]


def wait_for(piece: Piece) -> Batch:
    """The piece's batch, once its copy is done (the GPU waits, not the CPU)."""
    if piece.ready is not None:
        stream = torch.cuda.current_stream()
        stream.wait_event(piece.ready)
        recursively_apply(lambda tensor: tensor.record_stream(stream), piece.batch)  # not freed before it was read
    return piece.batch


def prefetch(make: Callable[[int], T], steps: range, loaders: int) -> Generator[tuple[int, T, float], None, None]:
    """Yield (step, make(step), seconds waited for it) in order, made ahead by `loaders` threads; 0 = when asked for.

    An error in `make` is raised at its own step. Close the iterator to stop the threads.
    """
    if loaders == 0:
        for step in steps:
            start = time.perf_counter()
            made = make(step)
            yield step, made, time.perf_counter() - start
        return
    pool = ThreadPoolExecutor(loaders, thread_name_prefix="edgevlm-loader")
    try:
        depth = loaders + 1  # each thread has one to make, and one lies ready
        ahead = deque(pool.submit(make, step) for step in steps[:depth])
        for step in steps:
            start = time.perf_counter()
            made = ahead.popleft().result()
            waited = time.perf_counter() - start
            if step + depth < steps.stop:
                ahead.append(pool.submit(make, step + depth))
            yield step, made, waited
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
