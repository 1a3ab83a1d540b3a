"""`edgevlm compare prune`: ways to prune a finished run's student, at equal budgets, equal steps and several seeds."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from edgevlm.artifacts import Checkpoint
from edgevlm.commands import bench_folder, export_checkpoint
from edgevlm.compress.cost import fusion_macs
from edgevlm.errors import CheckpointError, RecipeError, nearest
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.pipeline import RUN_FILE, is_done, stage_keys
from edgevlm.pipeline import run as run_stages
from edgevlm.progress import Reporter
from edgevlm.recipe import Recipe
from edgevlm.recipes import parse_recipe
from edgevlm.stages import stages_of

WAYS: dict[str, dict[str, Any]] = {
    "gates": {"method": "gates"},
    "gates-alone": {"method": "gates", "kd_weight": 0.0},
    "gradient": {"method": "gradient"},
    "modality": {"method": "modality"},
    "magnitude": {"method": "magnitude"},
}
"""Name -> what it changes in the section `prune`; `gates-alone` has no teacher (`compress/structure.py` has the others)."""
LATENCY_RUNS = 200


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
    """Of the fusion, word table included; of the first seed."""
    mmacs: float
    """Multiply-adds of one question, in 1e6; of the first seed."""
    ms: dict[str, float]
    """Target -> p50 of one question on this machine, one thread; of the first seed."""

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they started from."""

    recipe: str
    teacher: float
    student: float
    rows: tuple[Row, ...]


def compare_prune(
    run: Path,
    *,
    ways: Sequence[str] = tuple(WAYS),
    keeps: Sequence[float] = (0.75, 0.5, 0.35, 0.25),
    seeds: int = 3,
    targets: Sequence[str] = ("onnx",),
    data_path: str | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Prune the student of a finished run in every way, and write `compare/prune.json`, `.md` and `.png` into it.

    Every case is a run of its own under `compare/`, which shares the stages up to the student: a killed comparison goes on.

    Raises:
        RecipeError: an unknown way, or a share outside 0..1.
        CheckpointError: the run has no student, or one of another recipe or version.
    """
    reporter = reporter or Reporter()
    for way in ways:
        if way not in WAYS:
            raise RecipeError(f"No way to prune '{way}'", f"{nearest(way, WAYS)} Known: {', '.join(WAYS)}".strip())
    for keep in keeps:
        if not 0 < keep < 1:
            raise RecipeError(f"Cannot keep {keep:g} of a model", "Give shares between 0 and 1, for example 0.5")
    student = read_manifest(run / "distil", Checkpoint)
    recipe = parse_recipe(student.provenance.recipe, f"inside {run / 'distil'}")
    _check_whole(run, recipe, data_path)
    rows = []
    for way in ways:
        for keep in keeps:
            cases = [_prune(run, recipe, way, keep, seed, data_path, reporter) for seed in range(seeds)]
            rows.append(_row(way, keep, cases, targets, reporter))
    teacher = read_manifest(run / "teacher", Checkpoint, check_files=False)
    comparison = Comparison(
        recipe.name, teacher.metrics["accuracy_test"], student.metrics["accuracy_test"], tuple(rows)
    )
    _write(comparison, run / "compare")
    return comparison


def _shared(recipe: Recipe) -> list[str]:
    names = [stage.name for stage in stages_of(recipe)]
    if "prune" not in names:
        raise RecipeError(f"Recipe {recipe.name} has no stage 'prune'", "Compare a run that answers questions")
    return names[: names.index("prune")]


def _check_whole(run: Path, recipe: Recipe, data_path: str | None) -> None:
    keys = stage_keys(stages_of(recipe), recipe, data_path)
    for name in _shared(recipe):
        if not is_done(run / name, keys[name]):
            raise CheckpointError(
                f"{run / name} is not what its recipe makes now",
                f"Run it again: edgevlm run {recipe.name} --out {run} --until distil (and give --data if it has data)",
            )


def _prune(
    run: Path, recipe: Recipe, way: str, keep: float, seed: int, data_path: str | None, reporter: Reporter
) -> Path:
    """Folder of the pruned checkpoint."""
    folder = run / "compare" / f"{way}-{keep:g}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).touch()
    for name in _shared(recipe):
        if not (folder / name).exists():
            (folder / name).symlink_to(os.path.relpath(run / name, folder), target_is_directory=True)
    section = recipe.prune.model_copy(update={**WAYS[way], "sparsity": 1 - keep, "seed": seed})
    changed = recipe.model_copy(update={"prune": section})
    reporter.say(f"{way}, {keep:.0%} kept, seed {seed}")
    return run_stages(
        stages_of(changed), changed, folder, data_path=data_path, until="prune", reporter=Quiet(reporter)
    )["prune"]


class Quiet(Reporter):
    """Only the lines about results: a comparison has hundreds of others."""

    def __init__(self, inner: Reporter) -> None:
        self.inner = inner

    def say(self, text: str) -> None:
        if "accuracy" in text:
            self.inner.say(text)


def _row(way: str, keep: float, cases: list[Path], targets: Sequence[str], reporter: Reporter) -> Row:
    manifests = [read_manifest(case, Checkpoint) for case in cases]
    first = manifests[0]
    model, _ = vlm.load(cases[0])
    tee, fusion = first.model.tee, first.model.fusion
    macs = fusion_macs(fusion, first.tokenizer.max_tokens, tee.num_regions, tee.num_regions, model.tee.region_dim)
    return Row(
        way=way,
        keep=keep,
        kept=1 - mean(manifest.metrics["sparsity"] for manifest in manifests),
        accuracies=tuple(manifest.metrics["accuracy_test"] for manifest in manifests),
        parameters=sum(p.numel() for p in model.fusion.parameters()),
        mmacs=macs / 1e6,
        ms={target: _latency(cases[0], target, reporter) for target in targets},
    )


def _latency(checkpoint: Path, target: str, reporter: Reporter) -> float:
    """p50 of one untrimmed question, fp32, one thread."""
    bundle, latency = checkpoint.parent / f"bundle-{target}", checkpoint.parent / f"latency-{target}.json"
    if not latency.is_file():
        export_checkpoint(checkpoint, bundle, None, [target], ["fp32"], True, Quiet(reporter))
        folder = checkpoint.parent / f"bench-{target}"
        report = bench_folder(bundle, None, folder, 1, LATENCY_RUNS, True, Quiet(reporter))
        row = report.rows[0]
        if row.p50_ms is None:
            raise CheckpointError(f"{target} could not be measured ({row.reason})", "Leave it out of --target")
        latency.write_text(json.dumps({"p50_ms": row.p50_ms}))
    return json.loads(latency.read_text())["p50_ms"]


def _write(comparison: Comparison, folder: Path) -> None:
    (folder / "prune.json").write_text(json.dumps(asdict(comparison), indent=1) + "\n")
    (folder / "prune.md").write_text(as_markdown(comparison))
    plot(comparison, folder / "prune.png")


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Column titles and the rows as text."""
    targets = list(comparison.rows[0].ms)
    titles = ["way", "asked %", "kept %", "accuracy %", "of the teacher %", "parameters", "MMAC per question"]
    titles += [f"{target} ms" for target in targets]
    lines = []
    for row in comparison.rows:
        accuracy = mean(row.accuracies)
        line = [row.way, f"{100 * row.keep:g}", f"{100 * row.kept:.1f}"]
        line.append(f"{100 * accuracy:.1f} ± {100 * row.spread:.1f}")
        line += [f"{100 * accuracy / comparison.teacher:.1f}", f"{row.parameters:,}", f"{row.mmacs:.2f}"]
        lines.append([*line, *(f"{row.ms[target]:.3f}" for target in targets)])
    return titles, lines


def as_markdown(comparison: Comparison) -> str:
    """The table, as docs/pruning.md shows it."""
    titles, lines = cells(comparison)
    seeds = len(comparison.rows[0].accuracies)
    text = [
        f"`{comparison.recipe}`, accuracy on test, mean ± standard deviation of {seeds} seeds; teacher "
        f"{100 * comparison.teacher:.1f}, unpruned student {100 * comparison.student:.1f}.",
        "",
        "| " + " | ".join(titles) + " |",
        "|---" + "|--:" * (len(titles) - 1) + "|",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]
    return "\n".join(text) + "\n"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The same on a terminal."""
    titles, lines = cells(comparison)
    table = Table(box=None)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number == 0 else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(f"teacher {comparison.teacher:.1%}, unpruned student {comparison.student:.1%}")


def plot(comparison: Comparison, path: Path) -> None:
    """Accuracy against what was kept, one line per way, a band of one standard deviation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for way in dict.fromkeys(row.way for row in comparison.rows):
        rows = sorted((row for row in comparison.rows if row.way == way), key=lambda row: row.kept)
        x = [100 * row.kept for row in rows]
        y = [100 * mean(row.accuracies) for row in rows]
        spread = [100 * row.spread for row in rows]
        (line,) = axes.plot(x, y, marker="o", label=way)
        low, high = ([a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(100 * comparison.teacher, color="black", linestyle=":", label="teacher")
    axes.axhline(100 * comparison.student, color="gray", linestyle="--", label="unpruned student")
    axes.set(xlabel="kept of what can be removed, %", ylabel="accuracy on test, %")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
