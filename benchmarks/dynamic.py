"""What dynamic inference gains in PyTorch: every question with the tokens that it needs, against all with everything.

python benchmarks/dynamic.py runs/scenes-tiny [--regions STAGE] [--threads 1]

Times are of the fusion and the answer head alone, on cached regions of the test split; the two forms take turns, and the
median of the ratios counts.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from edgevlm.models import vlm
from edgevlm.models.dynamic import answer_dynamic
from edgevlm.models.vlm import VLM
from edgevlm.train.answering import batch_of
from edgevlm.train.regions import RegionSplit

THRESHOLDS = (-1.0, 0.0, 1.0)
ROUNDS = 15


def main() -> None:
    """Read the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--regions", default="regions", help="stage that cached them; pruned_regions where there is one"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, _ = vlm.load(arguments.run / "trim")
    split = RegionSplit.load(arguments.run / arguments.regions, "test")
    print("| batch | θ | accuracy % | full ms per question | dynamic ms | times faster |")
    print("|--:|--:|--:|--:|--:|--:|")
    for batch_size in (1, 256):
        for threshold in THRESHOLDS:
            print(row(model, split, batch_size, threshold))


@torch.no_grad()
def row(model: VLM, split: RegionSplit, batch_size: int, threshold: float) -> str:
    """One line of the table."""
    number = min(len(split.answers), 64 if batch_size == 1 else 2048)
    batches = [batch_of(model, split, rows) for rows in torch.arange(number).split(batch_size)]
    ratios, full_ms, dynamic_ms, right, answers = [], [], [], 0, []
    for turn in range(ROUNDS):
        start = time.perf_counter()
        for batch in batches:
            model.answer(batch.regions, batch.input_ids)
        middle = time.perf_counter()
        answers = [answer_dynamic(model, batch.regions, batch.input_ids, threshold) for batch in batches]
        end = time.perf_counter()
        if turn:  # the first warms up
            ratios.append((middle - start) / (end - middle))
            full_ms.append(1000 * (middle - start) / number)
            dynamic_ms.append(1000 * (end - middle) / number)
    for batch, answer in zip(batches, answers, strict=True):
        right += int((answer.logits_BA.argmax(1) == batch.answers).sum())
    cells = (
        f"{100 * right / number:.1f}",
        f"{median(full_ms):.3f}",
        f"{median(dynamic_ms):.3f}",
        f"{median(ratios):.2f}",
    )
    return f"| {batch_size} | {threshold:g} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
