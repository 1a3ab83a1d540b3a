"""Print the tables of docs/tasks.md: VQA-RAD beside the question prior, retrieval beside tags.

`python benchmarks/tasks.py --vqa-rad FOLDER [--answers runs/vqa-rad/teacher] [--retrieval runs/NAME/retrieval]`
"""

import argparse
import json
from pathlib import Path

import numpy as np

from edgevlm.artifacts import Checkpoint
from edgevlm.data.answers import normalise_answer
from edgevlm.manifests import read_manifest
from edgevlm.tasks.answers import mean_by
from edgevlm.tasks.retrieval import KS
from edgevlm.tasks.vqa import question_prior

PUBLISHED = (43.9, 75.1)
"""Open and closed accuracy on VQA-RAD's test of MEVF with BAN (Nguyen and others, 2019)."""


def prior_on_vqa_rad(folder: Path) -> dict[str, float]:
    """Accuracy by kind of question of the most frequent training answer to the question, or to how it begins."""
    train, test = (json.loads((folder / f"{name}set.json").read_text()) for name in ("train", "test"))
    pairs = [(row["question"], normalise_answer(str(row["answer"]))) for row in train]
    predicted = question_prior(pairs, [row["question"] for row in test])
    right = [answer == normalise_answer(str(row["answer"])) for answer, row in zip(predicted, test, strict=True)]
    shares = mean_by(np.array(right), [row["answer_type"].strip().lower() for row in test])
    return {**shares, "all": float(np.mean(right))}


def vqa_rad_table(folder: Path, answers: Path | None) -> str:
    """Open, closed and all questions of the official test, in %."""
    rows = {"question prior (no image)": prior_on_vqa_rad(folder)}
    if answers is not None:
        metrics = read_manifest(answers, Checkpoint).metrics
        rows["edgevlm"] = {kind: metrics[f"accuracy_test.{kind}"] for kind in ("open", "closed")}
        rows["edgevlm"]["all"] = metrics["accuracy_test"]
    lines = ["| | open | closed | all |", "|---|--:|--:|--:|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * row[kind]:.1f}" for kind in ("open", "closed", "all")) + " |")
    return "\n".join([*lines, f"| MEVF + BAN, published | {PUBLISHED[0]} | {PUBLISHED[1]} | |"])


def retrieval_table(folder: Path, split: str = "test") -> str:
    """Recalls of the model and of the detector's tags, in %."""
    metrics = read_manifest(folder, Checkpoint).metrics
    columns = [f"{way}@{k}" for way in ("tr", "ir") for k in KS]
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|--:" * len(columns) + "|"]
    for name, prefix in (("tags alone", "tags."), ("matching head", "")):
        lines.append(
            f"| {name} | " + " | ".join(f"{100 * metrics[f'{prefix}{c}_{split}']:.1f}" for c in columns) + " |"
        )
    return "\n".join([*lines, f"Passes of the fusion per caption: {metrics[f'passes_per_caption_{split}']:.0f}."])


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vqa-rad", type=Path, help="folder of VQA-RAD")
    parser.add_argument("--answers", type=Path, help="checkpoint trained on VQA-RAD")
    parser.add_argument("--retrieval", type=Path, help="checkpoint of the stage `retrieval`")
    chosen = parser.parse_args()
    if chosen.vqa_rad is not None:
        print(vqa_rad_table(chosen.vqa_rad, chosen.answers), end="\n\n")
    if chosen.retrieval is not None:
        print(retrieval_table(chosen.retrieval))


if __name__ == "__main__":
    main()
