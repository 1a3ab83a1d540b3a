"""`edgevlm compare trim`: ways to trim a finished run's pruned student, each with the ladder that suits it, and several seeds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

from edgevlm.artifacts import Checkpoint, Rung
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
from edgevlm.compress.cost import fusion_macs, macs_of
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.dynamic import answer_dynamic
from edgevlm.pipeline import run as run_stages
from edgevlm.progress import Reporter
from edgevlm.recipe import Recipe, RungBudget
from edgevlm.stages import stages_of
from edgevlm.train.answering import batch_of, question_scores
from edgevlm.train.regions import RegionSplit

WAYS: dict[str, dict[str, Any]] = {
    "learned": {"policy": "learned", "context": 0},
    "learned-merge": {"policy": "learned", "context": 2},
    "attention": {"policy": "attention", "context": 0},
    "attention-merge": {"policy": "attention", "context": 2},
    "random": {"policy": "random", "context": 0},
    "similarity": {"policy": "similarity", "words": False},
}
"""Name -> what it changes in the section `trim`. `attention` is the parameter-free choice of PuMer and TRIPS, `similarity` is ToMe."""
THRESHOLDS = (-1.0, 0.0, 1.0)
"""At which dynamic inference of learned trimmers is scored."""


@dataclass(frozen=True)
class Row:
    """One way at one budget."""

    way: str
    rung: str
    """Its name in the way's ladder, or the threshold of dynamic inference."""
    words: str
    """Read and kept behind each trimming layer."""
    regions: str
    mmacs: float
    """Multiply-adds of one question, in 1e6; the mean over the test questions where each input has its own."""
    accuracies: tuple[float, ...]
    """On the test split, one per seed, 0..1."""
    ms: dict[str, float]
    """`<target> <precision>` -> p50 of one question on this machine, one thread; of the first seed. Empty for dynamic
    inference, which PyTorch alone can do."""


@dataclass(frozen=True)
class Comparison:
    """All rows, and the pruned student that they started from."""

    recipe: str
    pruned: Row
    rows: tuple[Row, ...]


def compare_trim(
    run: Path,
    *,
    ways: Sequence[str] = tuple(WAYS),
    rungs: int = 5,
    seeds: int = 3,
    targets: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    overrides: Sequence[str] = (),
    data_path: str | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Trim the pruned student of a finished run in every way, and write `compare-trim/trim.json`, `.md` and `.png` into it.

    Every way gets the same steps and the same search for its ladder, which the first seed makes and the others take over.
    Every case is a run of its own that shares the stages up to the pruned student: a killed comparison goes on.

    Args:
        run: its folder; `prune` at least is done, and `calibrate` where int8 is to be measured.
        ways: names in `WAYS`.
        rungs: of each ladder, the full one among them.
        seeds: repetitions with other draws.
        targets, precisions: where the first seed's latency is measured.
        overrides: `trim.key=value`, for all ways.
        data_path: as in `edgevlm run`.
        reporter: told what came out.

    Raises:
        RecipeError: an unknown way, or an override of another section.
        CheckpointError: the run has no pruned student, or one of another recipe or version.
    """
    reporter = reporter or Reporter()
    check_ways(ways, WAYS, "trim")
    recipe = recipe_of(run, "prune", "trim", overrides, data_path)
    calibration = calibration_of(run, precisions, recipe)
    folder = run / "compare-trim"
    cache = "pruned_regions" if "pruned_regions" in before(recipe, "trim") else "regions"

    def measure(checkpoint: Path) -> dict[str, dict[str, float]]:
        """Rung -> `<target> <precision>` -> ms of one question."""
        found: dict[str, dict[str, float]] = {}
        for target in targets:
            for precision in precisions:
                for rung, ms in latencies(checkpoint, target, precision, calibration, reporter).items():
                    found.setdefault(rung, {})[f"{target} {precision}"] = ms["answer_ms"]
        return found

    rows: list[Row] = []
    for way in ways:
        cases, ladder = [], None
        for seed in range(seeds):
            cases.append(_trim(run, recipe, way, rungs if ladder is None else ladder, seed, data_path, reporter))
            ladder = ladder or _budgets(read_manifest(cases[0], Checkpoint).rungs)
        manifests = [read_manifest(case, Checkpoint) for case in cases]
        ms = measure(cases[0])
        for rung in manifests[0].rungs:
            accuracies = tuple(manifest.metrics[f"accuracy_test@{rung.name}"] for manifest in manifests)
            rows.append(_row(way, rung, manifests[0], accuracies, ms[rung.name]))
        if WAYS[way]["policy"] == "learned":
            rows += _dynamic_rows(way, cases, run / cache, recipe)
    manifest = read_manifest(run / "prune", Checkpoint)
    full = Rung(name="full", regions=(manifest.model.tee.num_regions,))
    its_ms = measure(linked(run / "prune", folder / "pruned")).get("full", {})
    pruned = _row("pruned", full, manifest, (manifest.metrics["accuracy_test"],), its_ms)
    comparison = Comparison(recipe.name, pruned, tuple(rows))
    _write(comparison, folder)
    return comparison


def _trim(
    run: Path,
    recipe: Recipe,
    way: str,
    rungs: int | dict[str, RungBudget],
    seed: int,
    data_path: str | None,
    reporter: Reporter,
) -> Path:
    """Folder of the trimmed checkpoint."""
    folder = run / "compare-trim" / f"{way}-{seed}"
    link({name: run / name for name in before(recipe, "trim")}, folder)
    section = recipe.trim.model_copy(update={**WAYS[way], "rungs": rungs, "seed": seed})
    changed = recipe.model_copy(update={"trim": section})
    reporter.say(f"{way}, seed {seed}")
    return run_stages(stages_of(changed), changed, folder, data_path=data_path, until="trim", reporter=Quiet(reporter))[
        "trim"
    ]


def _budgets(rungs: Sequence[Rung]) -> dict[str, RungBudget]:
    """A ladder as a recipe names it."""
    return {
        rung.name: RungBudget(
            regions=rung.regions, words=rung.words, num_words=rung.num_words, num_regions=rung.num_regions
        )
        for rung in rungs
    }


def _row(way: str, rung: Rung, manifest: Checkpoint, accuracies: tuple[float, ...], ms: dict[str, float]) -> Row:
    num_words, num_regions = manifest.tokenizer.max_tokens, manifest.model.tee.num_regions
    region_dim = manifest.model.region_dim(manifest.labels)
    macs = rung.gmacs * 1e9 or fusion_macs(manifest.model.fusion, num_words, num_regions, region_dim)
    words = " → ".join(map(str, (rung.num_words or num_words, *rung.words)))
    regions = " → ".join(map(str, (rung.num_regions or num_regions, *rung.regions)))
    return Row(way, rung.name, words, regions, macs / 1e6, accuracies, ms)


def _dynamic_rows(way: str, cases: Sequence[Path], regions: Path, recipe: Recipe) -> list[Row]:
    """Learned trimmers by threshold, every question with the tokens that it needs; heads are counted as if all worked."""
    split = RegionSplit.load(regions, "test")
    rows = []
    for threshold in THRESHOLDS:
        accuracies, numbers = [], []
        for case in cases:
            model, _ = vlm.load(case)
            heads = threshold if recipe.trim.head_layers else None
            predicted, words, kept = [], [], []
            for chunk in torch.arange(len(split.answers)).split(512):
                batch = batch_of(model, split, chunk)
                answer = answer_dynamic(model, batch.regions, batch.input_ids, threshold, heads)
                predicted.append(answer.logits_BA.argmax(1))
                words.append(answer.words_BL)
                kept.append(answer.regions_BL)
            accuracies.append(float(question_scores(torch.cat(predicted).numpy(), split).mean()))
            of_words, of_regions = (list(torch.cat(counts).T) for counts in (words, kept))
            macs = macs_of(model.config.fusion, model.tee.region_dim, of_words, of_regions)
            means = [" → ".join(f"{float(n.mean()):.1f}" for n in layers) for layers in (of_words, of_regions)]
            numbers.append((float(macs.mean()) / 1e6, *means))
        mmacs, words_text, regions_text = numbers[0]
        rows.append(Row(way, f"θ = {threshold:g}", words_text, regions_text, mmacs, tuple(accuracies), {}))
    return rows


def _write(comparison: Comparison, folder: Path) -> None:
    (folder / "trim.json").write_text(json.dumps(asdict(comparison), indent=1) + "\n")
    (folder / "trim.md").write_text(as_markdown(comparison))
    plot(comparison, folder / "trim.png")


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Column titles and the rows as text; the pruned student comes first."""
    names = list(comparison.pruned.ms)
    titles = ["way", "rung", "words", "regions", "MMAC per question", "accuracy %"]
    titles += [f"{name} ms" for name in names] + [f"× ({name})" for name in names]
    lines = []
    for row in (comparison.pruned, *comparison.rows):
        line = [row.way, row.rung, row.words, row.regions, f"{row.mmacs:.2f}"]
        line.append(accuracy_text(row.accuracies))
        line += [f"{row.ms[name]:.3f}" if name in row.ms else "" for name in names]
        line += [f"{comparison.pruned.ms[name] / row.ms[name]:.2f}" if name in row.ms else "" for name in names]
        lines.append(line)
    return titles, lines


def as_markdown(comparison: Comparison) -> str:
    """The table, as docs/trimming.md shows it."""
    intro = (
        f"`{comparison.recipe}`; accuracy on test, mean ± standard deviation of "
        f"{len(comparison.rows[0].accuracies)} seeds; × is how many times faster than the pruned student."
    )
    return markdown(intro, *cells(comparison))


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The same on a terminal."""
    print_table(*cells(comparison), console)


def plot(comparison: Comparison, path: Path) -> None:
    """Accuracy against multiply-adds, and against the time on every target, one line per way."""
    from matplotlib.figure import Figure

    names = list(comparison.pruned.ms)
    figure = Figure(figsize=(5.2 * (1 + len(names)), 4.2), layout="constrained")
    panels = figure.subplots(1, 1 + len(names), squeeze=False)[0]
    for axes, name in zip(panels, [None, *names], strict=True):
        for way in dict.fromkeys(row.way for row in comparison.rows):
            rungs = [row for row in comparison.rows if row.way == way and row.ms]
            rungs.sort(key=lambda row: row.mmacs if name is None else row.ms[name])
            x = [row.mmacs if name is None else row.ms[name] for row in rungs]
            colour = draw_way(axes, way, x, [row.accuracies for row in rungs])
            dynamic = [row for row in comparison.rows if row.way == way and not row.ms]
            if name is None and dynamic:
                points = [100 * mean(row.accuracies) for row in dynamic]
                label = f"{way}, each input by threshold"
                axes.plot([row.mmacs for row in dynamic], points, "^:", color=colour, label=label)
        axes.axhline(100 * mean(comparison.pruned.accuracies), color="gray", linestyle="--", label="pruned student")
        axes.set(
            xlabel="MMAC per question" if name is None else f"ms per question, {name}", ylabel="accuracy on test, %"
        )
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
