"""Check the governor's promise over many resamplings of finished runs, and what it saves: `python benchmarks/governor.py RUN [RUN ...]`.

Two experiments per run, on all questions that were not trained on:

* splits: 200 random thirds of the images: one chooses the path, one tests it, and the last shows the loss. That loss is an
  estimate from a third of the images, so it exceeds epsilon more often than the expected loss does.
* population: all images together are taken for the population; tuning and held-out images are drawn from it with
  replacement, so the expected loss of what comes out is known exactly. Its share above epsilon must be at most delta.

`--p-values` prints what the test of the thresholds can certify beside the Hoeffding-Bentkus bound.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from calibration.risk import Answers, Outcome, calibrate, govern, p_values, unit_means
from edgevlm.artifacts import DeviceReport
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.recipes import parse_recipe
from edgevlm.train.regions import cached_splits
from targets.rungs import answer_split


class Result(NamedTuple):
    """One calibration, judged on the images that it must hold for."""

    loss: float
    accuracy: float
    gmacs: float
    ms: float
    saves: bool


def load_pool(run: Path) -> tuple[Answers, int, str]:
    """Answers to all questions of the evaluation splits; images in half of the validation split; the run's name."""
    model, manifest = vlm.load(run / "trim")
    recipe = parse_recipe(manifest.provenance.recipe, f"inside {run / 'trim'}")
    cache = next(folder for folder in (run / "pruned_regions", run / "regions") if folder.is_dir())
    parts, num_units, half = [], 0, 0
    for name in cached_splits(cache):
        if name == "train":
            continue
        answers, _ = answer_split(model, manifest, cache, name, recipe.govern.unit, recipe.govern.temperature)
        parts.append(replace(answers, units_Q=answers.units_Q + num_units))
        num_units += int(answers.units_Q.max()) + 1
        half = (int(answers.units_Q.max()) + 1) // 2 if name == "val" else half
    joined = {
        field: np.concatenate([getattr(part, field) for part in parts], axis=-1)
        for field in ("margins_RQ", "scores_RQ", "reads_RQ", "units_Q")
    }
    return replace(parts[0], **joined), half, recipe.name


def rung_ms(run: Path, names: tuple[str, ...]) -> tuple[np.ndarray, str] | None:
    """Measured milliseconds of every rung's answer, of the first file that has them all, and which file that is."""
    if not (run / "bench" / "manifest.json").is_file():
        return None
    rows = read_manifest(run / "bench", DeviceReport, check_files=False).rows
    for target, precision in dict.fromkeys((row.target, row.precision) for row in rows if row.target != "pytorch"):
        times = {r.rung: r.answer_p50_ms for r in rows if (r.target, r.precision) == (target, precision)}
        if all(times.get(name) for name in names):
            return np.array([times[name] for name in names], float), f"{target} {precision}"
    return None


def judge(answers: Answers, outcome: Outcome, ms_R: np.ndarray, saves: bool) -> Result:
    """Loss, accuracy and costs, each image counting alike."""

    def mean(values_Q: np.ndarray) -> float:
        return float(unit_means(values_Q, answers.units_Q).mean())

    return Result(
        loss=mean(answers.scores_RQ[-1] - outcome.scores_Q),
        accuracy=mean(outcome.scores_Q),
        gmacs=mean(outcome.gmacs_Q),
        ms=mean(ms_R @ outcome.started_RQ),
        saves=saves,
    )


def as_units(answers: Answers, rows_by_unit: list[np.ndarray], units: np.ndarray) -> Answers:
    """The questions of some units; a unit that is drawn twice is two units."""
    rows = [rows_by_unit[unit] for unit in units]
    chosen = answers.rows(np.concatenate(rows))
    return replace(chosen, units_Q=np.repeat(np.arange(len(units)), [len(one) for one in rows]))


def experiments(
    answers: Answers, half: int, ms_R: np.ndarray, epsilon: float, delta: float, repeat: int
) -> dict[str, list[Result]]:
    """Both experiments; a unit's questions stay together."""
    rng = np.random.default_rng(0)
    num_units = int(answers.units_Q.max()) + 1
    rows_by_unit = [np.flatnonzero(answers.units_Q == unit) for unit in range(num_units)]

    def once(tuning: Answers, held_out: Answers, judged: Answers) -> Result:
        thresholds, _ = calibrate(tuning, held_out, epsilon=epsilon, delta=delta)
        return judge(judged, govern(judged, thresholds), ms_R, thresholds != judged.full)

    def thirds() -> Iterator[Answers]:
        for units in np.array_split(rng.permutation(num_units), 3):
            yield as_units(answers, rows_by_unit, units)

    def draws() -> Iterator[Answers]:
        for _ in range(2):
            yield as_units(answers, rows_by_unit, rng.integers(0, num_units, half))
        yield answers

    return {name: [once(*draw()) for _ in range(repeat)] for name, draw in (("splits", thirds), ("population", draws))}


def static_accuracies(answers: Answers, cost_R: np.ndarray, at_cost: float) -> tuple[float, float]:
    """Without a governor, at this mean cost at most: accuracy of the best rung, and of the best mixture of two rungs."""
    accuracy_R = np.array([unit_means(scores_Q, answers.units_Q).mean() for scores_Q in answers.scores_RQ])
    affordable = cost_R <= at_cost + 1e-12
    single = float(accuracy_R[affordable].max()) if affordable.any() else float("nan")
    mixed = single
    for low in range(len(cost_R)):
        for high in range(len(cost_R)):
            if cost_R[low] <= at_cost < cost_R[high]:
                share = (at_cost - cost_R[low]) / (cost_R[high] - cost_R[low])
                mixed = np.nanmax([mixed, (1 - share) * accuracy_R[low] + share * accuracy_R[high]])
    return single, float(mixed)


def table(run: Path, epsilons: list[float], delta: float, repeat: int) -> str:
    """The run's rungs, and a row per epsilon and experiment."""
    answers, half, name = load_pool(run)
    measured = rung_ms(run, answers.names)
    ms_R, where = measured or (np.full(len(answers.names), np.nan), "")
    num_units = int(answers.units_Q.max()) + 1
    lines = [
        f"## {name}",
        "",
        f"{num_units} units, {len(answers.units_Q)} questions; delta {delta:g}, {repeat} repetitions.",
    ]
    lines += [
        "",
        f"| rung | GMAC |{f' ms ({where}) |' if measured else ''} accuracy % |",
        f"|---|--:|{'--:|' if measured else ''}--:|",
    ]
    for place, rung in enumerate(answers.names):
        accuracy = 100 * unit_means(answers.scores_RQ[place], answers.units_Q).mean()
        time = f" {ms_R[place]:.3f} |" if measured else ""
        lines.append(f"| {rung} | {answers.gmacs_R[place]:.5f} |{time} {accuracy:.2f} |")
    head = "experiment | epsilon | units per set | loss > epsilon, share | saves, share | loss | accuracy % | cost %"
    more = " | time %" if measured else ""
    lines += [
        "",
        f"| {head}{more} | best rung at that cost % | best mixture % |",
        "|---" + "|--:" * (10 + bool(measured)) + "|",
    ]
    for epsilon in epsilons:
        for experiment, results in experiments(answers, half, ms_R, epsilon, delta, repeat).items():
            loss, accuracy, gmacs, ms = (np.mean([r[field] for r in results]) for field in range(4))
            single, mixed = static_accuracies(answers, answers.gmacs_R, float(gmacs))
            cells = [experiment, f"{epsilon:g}", str(num_units // 3 if experiment == "splits" else half)]
            cells += [
                f"{np.mean([r.loss > epsilon for r in results]):.3f}",
                f"{np.mean([r.saves for r in results]):.2f}",
            ]
            cells += [f"{loss:.4f}", f"{100 * accuracy:.2f}", f"{100 * gmacs / answers.gmacs_R[-1]:.1f}"]
            cells += [f"{100 * ms / ms_R[-1]:.1f}"] if measured else []
            cells += [f"{100 * single:.2f}", f"{100 * mixed:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- p-values -----------------------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, int], np.ndarray]
LOSSES: dict[str, Draw] = {
    "no loss at all": lambda rng, n: np.zeros(n),
    "12 questions, 0.6 % lost, 0.4 % gained": lambda rng, n: (
        (rng.binomial(12, 0.006, n) - rng.binomial(12, 0.004, n)) / 12
    ),
    "12 questions, 2 % lost, 2 % gained": lambda rng, n: (rng.binomial(12, 0.02, n) - rng.binomial(12, 0.02, n)) / 12,
    "1 question, 0.6 % lost, 0.3 % gained": lambda rng, n: rng.choice([1.0, -1.0, 0.0], n, p=[0.006, 0.003, 0.991]),
    "expected loss 0.01: 12 questions": lambda rng, n: (rng.binomial(12, 0.03, n) - rng.binomial(12, 0.02, n)) / 12,
    "expected loss 0.01: 1 question": lambda rng, n: rng.choice([1.0, 0.0], n, p=[0.01, 0.99]),
}
"""Losses of images that are drawn: the first four should be certified at epsilon 0.01, the last two must not be."""


def hoeffding_bentkus(losses_JU: np.ndarray, epsilon: float) -> np.ndarray:
    """P-values (J,) for losses in 0..1 (Bates and others, 2021): gains must be clipped away."""
    num_units = losses_JU.shape[1]
    mean_J = np.clip(losses_JU, 0, 1).mean(1)
    low_J = np.clip(np.minimum(mean_J, epsilon), 1e-12, 1 - 1e-12)
    divergence_J = low_J * np.log(low_J / epsilon) + (1 - low_J) * np.log((1 - low_J) / (1 - epsilon))
    counts = np.arange(num_units + 1)
    steps = np.log((num_units - counts[:-1]) / (counts[:-1] + 1) * epsilon / (1 - epsilon))
    binomial = np.cumsum(np.exp(num_units * np.log1p(-epsilon) + np.concatenate([[0.0], np.cumsum(steps)])))
    bentkus_J = np.e * binomial[np.ceil(num_units * mean_J - 1e-9).astype(int)]
    return np.minimum(1.0, np.minimum(np.exp(-num_units * divergence_J), bentkus_J))


def p_value_table(repeat: int = 1000, epsilon: float = 0.01, delta: float = 0.1) -> str:
    """Share of draws that each test certifies: betting / Hoeffding-Bentkus."""
    rng, sizes = np.random.default_rng(0), (250, 500, 1000, 3000)
    lines = [
        "| losses of an image | " + " | ".join(f"{size} images" for size in sizes) + " |",
        "|---" + "|--:" * 4 + "|",
    ]
    for name, draw in LOSSES.items():
        cells = []
        for size in sizes:
            losses, history = (np.stack([draw(rng, size) for _ in range(repeat)]) for _ in range(2))
            tests = (p_values(losses, epsilon, delta, history), hoeffding_bentkus(losses, epsilon))
            cells.append(" / ".join(f"{np.mean(p_J <= delta):.2f}" for p_J in tests))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables of every run named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs (up to `trim` at least)")
    parser.add_argument("--epsilon", type=float, action="append", help="repeat for several; default: 0.01 and 0.02")
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--p-values", action="store_true", help="also compare tests of thresholds, on drawn losses")
    chosen = parser.parse_args()
    for run in chosen.runs:
        print(table(run, chosen.epsilon or [0.01, 0.02], chosen.delta, chosen.repeat), end="\n\n")
    if chosen.p_values:
        print(p_value_table())


if __name__ == "__main__":
    main()
