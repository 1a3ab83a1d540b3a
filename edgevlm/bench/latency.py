"""Latency tables for pruning: what each piece of a model takes at several sizes on a target's runtime, and the whole.

Every time is kept in a file of the user's cache, one per target, precision, threads and machine, so that a second table
of the same shapes is there at once. The machine's other work only adds time: of many short runs the lower quartile
counts, and the sizes of a piece take turns.
"""

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from edgevlm import __version__
from edgevlm.artifacts import ENCODE, Checkpoint, LatencyTable, PieceTimes, Provenance, digest
from edgevlm.bench.facts import device_facts
from edgevlm.bench.stats import percentile
from edgevlm.compress.latency import grid
from edgevlm.compress.shrink import steps_of
from edgevlm.errors import TargetError
from edgevlm.models.groups import Group
from edgevlm.models.vlm import VLM
from edgevlm.progress import Reporter
from targets.base import TARGETS, check_target, load_exporter, open_model, runtime_status
from targets.pieces import Example, Piece, PieceSource, groups_in, pieces_of, program_of
from targets.program import Program
from targets.quiet import quiet
from targets.runtime import Arrays, Session
from targets.source import CalibrationData, Source

POINTS = {1: 5, 2: 3}
"""Groups in a piece -> sizes at which each is measured. With more groups than that two, and three of the one that most
weights of the piece go with."""
ROUNDS = 400
MAX_SECONDS = 4.0
"""Of measuring a piece at all its sizes (of the whole, four times that): long enough to outlast a busy moment, at least five rounds."""
WHOLE_ROUNDS = 1000
QUARTILE = 0.25


class Times:
    """What was measured on this machine, in a file that outlives the run."""

    def __init__(self, target: str, precision: str, threads: int) -> None:
        facts = device_facts(threads).model_dump()
        key = digest({"edgevlm": __version__, "tools": TARGETS[target].versions(), **facts})[:12]
        self.path = cache_folder() / f"{target}-{precision}-{threads}-{key}.json"
        self.ms: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # nothing there yet, or no longer whole
            self.ms = json.loads(self.path.read_bytes())["ms"]
        self._facts = facts

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"device": self._facts, "ms": self.ms}, indent=1) + "\n")
        temporary.replace(self.path)


def cache_folder() -> Path:
    """`edgevlm/latency` in the user's cache (`XDG_CACHE_HOME`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgevlm" / "latency"


def check_timed(target: str, precision: str) -> None:
    """Raise TargetError where models of this target and precision cannot be made or run on this machine."""
    check_target(target, precision)
    load_exporter(target)
    available, reason = runtime_status(target)
    if not available:
        raise TargetError(f"{target} models cannot be timed here ({reason})", "Name another in prune.target")


def measure_table(
    model: VLM,
    manifest: Checkpoint,
    groups: Sequence[Group],
    calibration: CalibrationData,
    *,
    target: str,
    precision: str,
    threads: int,
    round_to: int,
    provenance: Provenance,
    reporter: Reporter | None = None,
) -> LatencyTable:
    """Measure a model and its pieces on this machine.

    Args:
        model: whole.
        manifest: of the model.
        groups: what pruning may cut out of it.
        calibration: a few samples; ranges change no time, but the quantisers need some.
        target, precision, threads: what runs it.
        round_to: sizes are multiples of it, heads excepted.
        provenance: of the table.
        reporter: told about progress.

    Raises:
        TargetError: the target cannot be exported to or run here.
    """
    reporter = reporter or Reporter()
    times = Times(target, precision, threads)
    example = Example(
        torch.from_numpy(calibration.images[:1].astype(np.float32)).permute(0, 3, 1, 2),
        torch.from_numpy(calibration.input_ids[:1]).long(),
    )
    found: dict[str, PieceTimes] = {}
    shrinkable = [group for group in groups if group.size > _step(group, round_to)]
    pieces = [(piece, inside) for piece in pieces_of(model) if (inside := groups_in(piece, shrinkable))]
    with reporter.bar(f"latency {target} {precision}", len(pieces) + 1) as bar:
        for done, (piece, inside) in enumerate(pieces):
            points = _points(inside, piece, round_to)
            names = [group.name for group in inside]
            sizes = [dict(zip(names, combination, strict=True)) for combination in itertools.product(*points)]
            programs = [
                program_of(model, piece, groups, members, f"size_{i}", example) for i, members in enumerate(sizes)
            ]
            ms = _measured(programs, piece, model, manifest, calibration, times, target, precision, threads)
            found[piece.name] = PieceTimes(groups=tuple(names), points=points, ms=tuple(ms))
            bar.update(done + 1, piece.name)
        whole = time_model(model, manifest, calibration, target, precision, threads)
        bar.update(len(pieces) + 1, "whole")
    return LatencyTable(
        provenance=provenance,
        target=target,
        precision=precision,
        threads=threads,
        device=device_facts(threads),
        whole_ms=whole,
        pieces=found,
    )


def time_model(
    model: VLM, manifest: Checkpoint, calibration: CalibrationData, target: str, precision: str, threads: int
) -> float:
    """Milliseconds of one image and one untrimmed question (lower quartile, as of the pieces).

    Raises:
        TargetError: the target cannot be exported to or run here.
    """
    manifest = manifest.model_copy(update={"model": model.config, "rungs": ()})
    source = Source(model, manifest, calibration)
    with tempfile.TemporaryDirectory(prefix="edgevlm-latency-") as folder:
        session = _open(source, target, precision, Path(folder), threads)
        image, ids = calibration.images[:1], calibration.input_ids[:1].astype(np.int32)
        answer = source.answers[0].name

        def ask() -> None:
            regions = session.run(ENCODE, {"image": image})
            session.run(answer, {**regions, "input_ids": ids})

        (times,) = take_turns([ask], WHOLE_ROUNDS, 4 * MAX_SECONDS)
        session.close()
    return percentile(times, QUARTILE)


def _points(groups: list[Group], piece: Piece, round_to: int) -> tuple[tuple[int, ...], ...]:
    """The sizes at which each group of a piece is measured."""
    inside = [sum(part.module.startswith(piece.modules) for part in group.slices) for group in groups]
    number = [POINTS.get(len(groups), 2)] * len(groups)
    busiest = inside.index(max(inside))
    number[busiest] = max(number[busiest], 3)
    return tuple(grid(group.size, points, _step(group, round_to)) for group, points in zip(groups, number, strict=True))


def _step(group: Group, round_to: int) -> int:
    return steps_of([group], round_to)[group.name]


def _measured(
    programs: list[Program],
    piece: Piece,
    model: VLM,
    manifest: Checkpoint,
    calibration: CalibrationData,
    times: Times,
    target: str,
    precision: str,
    threads: int,
) -> list[float]:
    """Milliseconds of every program; those of shapes that were never measured here are, and written down."""
    keys = [_shape(program, piece.dense) for program in programs]
    new = {key: program for key, program in zip(keys, programs, strict=True) if key not in times.ms}
    if new:
        chosen = list(new.values())
        dense = tuple(program.name for program in chosen) if piece.dense else ()
        source = PieceSource(model, manifest, calibration, pieces=chosen, dense=dense)
        with tempfile.TemporaryDirectory(prefix="edgevlm-latency-") as folder:
            session = _open(source, target, precision, Path(folder), threads)
            calls = [_call(session, p.name, {n: x.numpy() for n, x in p.inputs.items()}) for p in chosen]
            measured = take_turns(calls, ROUNDS, MAX_SECONDS)
            session.close()
        times.ms |= {key: percentile(values, QUARTILE) for key, values in zip(new, measured, strict=True)}
        times.save()
    return [times.ms[key] for key in keys]


def _open(source: Source, target: str, precision: str, folder: Path, threads: int) -> Session:
    with quiet():
        exported = load_exporter(target)(source, precision, folder)
    return open_model(exported, folder, threads=threads)


def _call(session: Session, name: str, inputs: Arrays) -> Callable[[], object]:
    return lambda: session.run(name, inputs)


def take_turns(calls: Sequence[Callable[[], object]], rounds: int, max_seconds: float) -> list[list[float]]:
    """Milliseconds of each call in every round: all of them once, then all again; the first rounds warm up."""
    for _ in range(3):
        for call in calls:
            call()
    found: list[list[float]] = [[] for _ in calls]
    started = time.monotonic()
    for number in range(rounds):
        if number >= 5 and time.monotonic() - started > max_seconds:
            break
        for call, values in zip(calls, found, strict=True):
            start = time.perf_counter_ns()
            call()
            values.append((time.perf_counter_ns() - start) / 1e6)
    return found


def _shape(program: Program, dense: bool) -> str:
    """Everything that decides a piece's time on a given target; not where in the model it stands."""
    leaves = [repr(module) for module in program.module.modules() if not list(module.children())]
    heads = [m.num_heads for m in program.module.modules() if hasattr(m, "num_heads")]
    shapes = [tuple(x.shape) for x in program.inputs.values()]
    return digest({"leaves": leaves, "heads": heads, "inputs": shapes, "dense": dense})[:16]
