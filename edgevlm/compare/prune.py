"""`edgevlm compare prune`: ways to prune a finished run's student, at equal budgets, equal steps and several seeds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from edgevlm.artifacts import Checkpoint
from edgevlm.commands import before, recipe_of
from edgevlm.compare.cases import (
    Quiet,
    accuracy_text,
    calibration_of,
    check_ways,
    draw_way,
    latencies,
    link,
    linked,
    markdown,
    print_table,
)
from edgevlm.compress.cost import cost_model, fusion_macs
from edgevlm.errors import RecipeError
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.groups import groups_of
from edgevlm.pipeline import run as run_stages
from edgevlm.progress import Reporter
from edgevlm.recipe import Recipe
from edgevlm.stages import LATENCY, stages_of

WAYS: dict[str, dict[str, Any]] = {
    "fisher": {"method": "fisher"},
    "fisher-alone": {"method": "fisher", "kd_weight": 0.0},
    "gates": {"method": "gates"},
    "gradient": {"method": "gradient"},
    "modality": {"method": "modality"},
    "magnitude": {"method": "magnitude"},
}
"""Name -> what it changes in the section `prune`; `fisher-alone` has no teacher (`compress/structure.py` has the others)."""


@dataclass(frozen=True)
class Row:
    """One way at one budget."""

    way: str
    keep: float
    """Share of the prunable cost that was to stay."""
    kept: float
    """Share that stayed."""
    accuracies: tuple[float, ...]
    """On the test split, one per seed, 0..1."""
    parameters: int
    """Of what was pruned: the fusion with its word table, or the whole model; of the first seed, as all that follow."""
    mmacs: float
    """Multiply-adds of one question, in 1e6; with its image where the extractor was pruned."""
    ms: dict[str, float]
    """`<target> <precision>` -> p50 of the same on this machine, one thread."""


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they started from."""

    recipe: str
    parts: tuple[str, ...]
    """What was pruned."""
    teacher: Row
    student: Row
    """Before pruning."""
    rows: tuple[Row, ...]


def compare_prune(
    run: Path,
    *,
    ways: Sequence[str] = tuple(WAYS),
    keeps: Sequence[float] = (0.75, 0.5, 0.35, 0.25),
    seeds: int = 3,
    targets: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    overrides: Sequence[str] = (),
    data_path: str | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Prune the student of a finished run in every way, and write `compare/prune.json`, `.md` and `.png` into it.

    Every case is a run of its own under `compare/`, which shares the stages up to the student: a killed comparison goes on.

    Args:
        run: its folder; `distil` at least is done, and `calibrate` where int8 is to be measured.
        ways: names in `WAYS`.
        keeps: shares of the prunable cost that stay, 0..1.
        seeds: repetitions with other draws.
        targets, precisions: where the first seed's latency is measured, beside the teacher's and the student's.
        overrides: `prune.key=value`, for all ways.
        data_path: as in `edgevlm run`.
        reporter: told what came out.

    Raises:
        RecipeError: an unknown way, a share outside 0..1, or an override of another section.
        CheckpointError: the run has no student, or one of another recipe or version.
    """
    reporter = reporter or Reporter()
    check_ways(ways, WAYS, "prune")
    for keep in keeps:
        if not 0 < keep < 1:
            raise RecipeError(f"Cannot keep {keep:g} of a model", "Give shares between 0 and 1, for example 0.5")
    recipe = recipe_of(run, "distil", "prune", overrides, data_path)
    calibration = calibration_of(run, precisions, recipe)
    measured = [(target, precision) for target in targets for precision in precisions]
    rows = []
    for way in ways:
        for keep in keeps:
            cases = [_prune(run, recipe, way, keep, seed, data_path, reporter) for seed in range(seeds)]
            rows.append(_row(way, keep, cases, recipe.prune.parts, measured, calibration, reporter))
    teacher, unpruned = (
        _row(
            name,
            1.0,
            [linked(run / stage, run / "compare" / name)],
            recipe.prune.parts,
            measured,
            calibration,
            reporter,
        )
        for name, stage in (("teacher", "teacher"), ("student", "distil"))
    )
    comparison = Comparison(recipe.name, recipe.prune.parts, teacher, unpruned, tuple(rows))
    _write(comparison, run / "compare")
    return comparison


def _prune(
    run: Path, recipe: Recipe, way: str, keep: float, seed: int, data_path: str | None, reporter: Reporter
) -> Path:
    """Folder of the pruned checkpoint."""
    folder = run / "compare" / f"{way}-{keep:g}-{seed}"
    shared = {name: run / name for name in before(recipe, "prune")}
    if recipe.prune.measure == "ms":  # measured once, or the ways would be judged by different tables
        table = run / "compare" / LATENCY.name
        link(shared, table)
        settings = {"data_path": data_path, "until": LATENCY.name, "reporter": Quiet(reporter)}
        shared |= run_stages(stages_of(recipe), recipe, table, **settings)
    link(shared, folder)
    section = recipe.prune.model_copy(update={**WAYS[way], "sparsity": 1 - keep, "seed": seed})
    changed = recipe.model_copy(update={"prune": section})
    reporter.say(f"{way}, {keep:.0%} kept, seed {seed}")
    return run_stages(
        stages_of(changed), changed, folder, data_path=data_path, until="prune", reporter=Quiet(reporter)
    )["prune"]


def _row(
    way: str,
    keep: float,
    cases: list[Path],
    parts: Sequence[str],
    measured: Sequence[tuple[str, str]],
    calibration: Path,
    reporter: Reporter,
) -> Row:
    manifests = [read_manifest(case, Checkpoint) for case in cases]
    first = manifests[0]
    model, _ = vlm.load(cases[0])
    num_words, num_regions = first.tokenizer.max_tokens, first.model.tee.num_regions
    if "vision" in parts:
        macs, counted = cost_model(model, groups_of(model), "macs", num_words).whole, model
    else:
        macs = fusion_macs(first.model.fusion, num_words, num_regions, model.tee.region_dim)
        counted = model.fusion
    return Row(
        way=way,
        keep=keep,
        kept=1 - mean(manifest.metrics.get("sparsity", 0.0) for manifest in manifests),
        accuracies=tuple(manifest.metrics["accuracy_test"] for manifest in manifests),
        parameters=sum(p.numel() for p in counted.parameters()),
        mmacs=macs / 1e6,
        ms={
            f"{target} {precision}": _whole(latencies(cases[0], target, precision, calibration, reporter), parts)
            for target, precision in measured
        },
    )


def _whole(found: dict[str, dict[str, float]], parts: Sequence[str]) -> float:
    """Of the untrimmed rung: a question, with its image where the extractor was pruned."""
    return next(iter(found.values()))["image_and_answer_ms" if "vision" in parts else "answer_ms"]


def _write(comparison: Comparison, folder: Path) -> None:
    (folder / "prune.json").write_text(json.dumps(asdict(comparison), indent=1) + "\n")
    (folder / "prune.md").write_text(as_markdown(comparison))
    plot(comparison, folder / "prune.png")


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Column titles and the rows as text; the teacher and the unpruned student come first."""
    asked = "image and question" if "vision" in comparison.parts else "question"
    titles = ["way", "asked %", "kept %", "accuracy %", "of the teacher %", "parameters", f"MMAC per {asked}"]
    titles += [f"{name} ms" for name in comparison.teacher.ms]
    lines, reference = [], mean(comparison.teacher.accuracies)
    for row in (comparison.teacher, comparison.student, *comparison.rows):
        line = [row.way, f"{100 * row.keep:g}", f"{100 * row.kept:.1f}", accuracy_text(row.accuracies)]
        line += [f"{100 * mean(row.accuracies) / reference:.1f}", f"{row.parameters:,}", f"{row.mmacs:.2f}"]
        lines.append([*line, *(f"{ms:.3f}" for ms in row.ms.values())])
    return titles, lines


def as_markdown(comparison: Comparison) -> str:
    """The table, as docs/pruning.md shows it."""
    titles, lines = cells(comparison)
    seeds = len(comparison.rows[0].accuracies)
    intro = f"`{comparison.recipe}`, {' and '.join(comparison.parts)} pruned; accuracy on test, mean ± standard deviation of {seeds} seeds."
    return markdown(intro, titles, lines)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The same on a terminal."""
    print_table(*cells(comparison), console)


def plot(comparison: Comparison, path: Path) -> None:
    """Accuracy against what was kept, one line per way, a band of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for way in dict.fromkeys(row.way for row in comparison.rows):
        rows = sorted((row for row in comparison.rows if row.way == way), key=lambda row: row.kept)
        draw_way(axes, way, [100 * row.kept for row in rows], [row.accuracies for row in rows])
    axes.axhline(100 * mean(comparison.teacher.accuracies), color="black", linestyle=":", label="teacher")
    axes.axhline(100 * mean(comparison.student.accuracies), color="gray", linestyle="--", label="unpruned student")
    axes.set(xlabel="kept of what can be removed, %", ylabel="accuracy on test, %")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
