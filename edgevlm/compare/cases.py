"""What comparisons share: cases as runs that share finished stages, latencies that are measured once, tables."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from edgevlm.artifacts import Checkpoint
from edgevlm.commands import bench_folder, export_checkpoint
from edgevlm.errors import CheckpointError, RecipeError, nearest
from edgevlm.manifests import read_manifest
from edgevlm.pipeline import RUN_FILE
from edgevlm.progress import Reporter
from edgevlm.recipe import Recipe

LATENCY_RUNS = 200


class Quiet(Reporter):
    """Only the lines about results: a comparison has hundreds of others."""

    def __init__(self, inner: Reporter) -> None:
        self.inner = inner

    def say(self, text: str) -> None:
        if "accuracy" in text:
            self.inner.say(text)


def check_ways(ways: Sequence[str], known: Mapping[str, object], what: str) -> None:
    """Raise RecipeError for a way that nobody knows."""
    for way in ways:
        if way not in known:
            raise RecipeError(f"No way to {what} '{way}'", f"{nearest(way, known)} Known: {', '.join(known)}".strip())


def link(stages: Mapping[str, Path], folder: Path) -> None:
    """Make a run folder in which these stages are done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).touch()
    for name, done in stages.items():
        linked(done, folder, name)


def linked(checkpoint: Path, folder: Path, name: str | None = None) -> Path:
    """The checkpoint under a folder of its own, where what is measured of it can lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / (name or checkpoint.name)
    if not place.exists():
        place.symlink_to(os.path.relpath(checkpoint, folder), target_is_directory=True)
    return place


def calibration_of(run: Path, precisions: Sequence[str], recipe: Recipe) -> Path:
    """The run's calibration set.

    Raises:
        CheckpointError: int8 needs one, and there is none.
    """
    calibration = run / "calibrate"
    if "int8" in precisions and not calibration.is_dir():
        raise CheckpointError(
            f"{run} has no calibration set for int8", f"Finish it: edgevlm run {recipe.name} --out {run}"
        )
    return calibration


def latencies(
    checkpoint: Path, target: str, precision: str, calibration: Path, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """Rung -> p50 of one question (`answer_ms`), and of its image with it (`image_and_answer_ms`), one thread; measured once.

    Raises:
        CheckpointError: the target cannot be measured here.
    """
    name = f"{target}-{precision}"
    bundle, latency = checkpoint.parent / f"bundle-{name}", checkpoint.parent / f"latency-{name}.json"
    key = read_manifest(checkpoint, Checkpoint, check_files=False).provenance.key
    known = json.loads(latency.read_text()) if latency.is_file() else {}
    if known.get("checkpoint") != key:  # never measured, or of a checkpoint that was made anew since
        calibrated = calibration if precision == "int8" else None
        export_checkpoint(checkpoint, bundle, calibrated, [target], [precision], True, Quiet(reporter))
        report = bench_folder(bundle, None, checkpoint.parent / f"bench-{name}", 1, LATENCY_RUNS, True, Quiet(reporter))
        found = {}
        for row in report.rows:
            if row.p50_ms is None:
                raise CheckpointError(f"{target} could not be measured ({row.reason})", "Leave it out of --target")
            found[row.rung] = {"answer_ms": row.answer_p50_ms, "image_and_answer_ms": row.p50_ms}
        known = {"checkpoint": key, "rungs": found}
        latency.write_text(json.dumps(known, indent=1) + "\n")
    return known["rungs"]


def accuracy_text(accuracies: Sequence[float]) -> str:
    """Mean in percent, with the standard deviation over the seeds where there are several."""
    spread = f" ± {100 * stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return f"{100 * mean(accuracies):.1f}{spread}"


def draw_way(axes: Any, way: str, x: Sequence[float], accuracies: Sequence[Sequence[float]]) -> str:
    """A way's line on a plot with a band of one standard deviation; returns its colour."""
    y = [100 * mean(values) for values in accuracies]
    spread = [100 * stdev(values) if len(values) > 1 else 0.0 for values in accuracies]
    (line,) = axes.plot(x, y, marker="o", label=way)
    low, high = ([a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    return line.get_color()


def markdown(intro: str, titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as the docs show it: the first column is text, the others are numbers."""
    text = [intro, "", "| " + " | ".join(titles) + " |", "|---" + "|--:" * (len(titles) - 1) + "|"]
    return "\n".join([*text, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def print_table(titles: Sequence[str], lines: Sequence[Sequence[str]], console: Console) -> None:
    """The same on a terminal."""
    table = Table(box=None)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number == 0 else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
