"""Print the tables of docs/benchmarks.md from finished runs: `python benchmarks/runs.py runs/scenes-tiny runs/nlvr-tiny`."""

import sys
from pathlib import Path

from edgevlm.artifacts import Checkpoint, Scorecard
from edgevlm.manifests import read_manifest
from edgevlm.report.table import day, machine

STAGES = ("teacher", "distil", "prune", "trim")


def training_table(run: Path, scorecard: Scorecard) -> str:
    """Accuracy of every training stage on every evaluation split, beside the majority answer."""
    checkpoints = {name: read_manifest(run / name, Checkpoint) for name in STAGES}
    metrics = checkpoints["teacher"].metrics
    splits = [name[9:] for name in metrics if name.startswith("majority_")]
    kinds = [name[14:] for name in metrics if name.startswith("accuracy_test.")]
    columns = [*splits, *(f"test: {kind}" for kind in kinds)]
    lines = ["| model | parameters of the fusion | " + " | ".join(columns) + " |"]
    lines.append("|---" + "|--:" * (len(columns) + 1) + "|")
    majority = [f"{100 * metrics[f'majority_{split}']:.1f}" for split in splits] + [""] * len(kinds)
    lines.append("| majority answer | | " + " | ".join(majority) + " |")
    for name, checkpoint in checkpoints.items():
        values = [checkpoint.metrics[f"accuracy_{s}"] for s in splits]
        values += [checkpoint.metrics[f"accuracy_test.{k}"] for k in kinds]
        size = sum_parameters(checkpoint)
        lines.append(f"| {name} | {size:,} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")
    ladder = [
        f"{rung.name} {100 * checkpoints['trim'].metrics[f'accuracy_test@{rung.name}']:.1f}"
        for rung in checkpoints["trim"].rungs
    ]
    detector = read_manifest(run / "detector", Checkpoint).metrics
    lines += [
        "",
        f"Rungs on test: {', '.join(ladder)}. Detector on val: mAP {detector['map']:.3f}, AP50 {detector['ap50']:.3f}.",
    ]
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in scorecard.stage_seconds.items())
    lines.append(f"Seconds: {seconds}.")
    return "\n".join(lines)


def sum_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of heads and neurons, what pruning can remove."""
    from edgevlm.compress.cost import prunable_parameters

    return prunable_parameters(checkpoint.model.fusion)


def export_table(scorecard: Scorecard) -> str:
    """One row per target x precision x rung."""
    lines = [
        "| target | precision | rung | MB | evidence | verdict | max logit difference | agreement % | accuracy % | p50 ms | against PyTorch |"
    ]
    lines.append("|---|---|---|--:|---|---|--:|--:|--:|--:|--:|")
    eager = {row.latency.rung: row.latency.p50_ms for row in scorecard.rows if row.parity.target == "pytorch"}
    for row in scorecard.rows:
        parity, latency = row.parity, row.latency
        ratio = eager.get(parity.rung)
        cells = [
            parity.target,
            parity.precision,
            parity.rung,
            f"{latency.size_mb:.2f}",
            parity.evidence,
            parity.verdict if parity.target != "pytorch" else "reference",
            "" if parity.max_abs_logits is None else f"{parity.max_abs_logits:.1e}",
            "" if parity.agreement is None else f"{100 * parity.agreement:.1f}",
            "" if parity.metric is None else f"{100 * parity.metric:.1f}",
            "" if latency.p50_ms is None else f"{latency.p50_ms:.2f}",
            "" if latency.p50_ms is None or not ratio else f"{latency.p50_ms / ratio:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print Markdown for every run named on the command line."""
    for run in map(Path, sys.argv[1:]):
        scorecard = read_manifest(run / "scorecard", Scorecard)
        print(f"## {scorecard.name}\n\n{day(scorecard)}, {machine(scorecard)}; `edgevlm run {scorecard.name}`.\n")
        print(training_table(run, scorecard), export_table(scorecard), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
