"""What the closed-answer tasks share: losses for one right answer or several, and accuracy over all and per kind."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from edgevlm.tasks import vqa


def loss(logits_BA: Tensor, answers_B: Tensor, targets_BA: Tensor | None = None) -> Tensor:
    """Cross-entropy against the one right answer, or the soft loss of `vqa` where several annotators answered."""
    return F.cross_entropy(logits_BA, answers_B) if targets_BA is None else vqa.soft_loss(logits_BA, targets_BA)


def batch_accuracy(logits_BA: Tensor, answers_B: Tensor, targets_BA: Tensor | None = None) -> Tensor:
    """Mean score of the likeliest answers, 0..1."""
    best_B = logits_BA.argmax(1)
    if targets_BA is None:
        return (best_B == answers_B).float().mean()
    return targets_BA.gather(1, best_B.unsqueeze(1)).mean()


def mean_by(scores: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Mean score per group (kind of question, right answer), in order of the name."""
    rows: dict[str, list[float]] = defaultdict(list)
    for score, group in zip(scores.tolist(), groups, strict=True):
        rows[group].append(float(score))
    return {group: sum(values) / len(values) for group, values in sorted(rows.items())}


def majority(answers: np.ndarray) -> float:
    """Accuracy of always giving the most frequent answer; -1 stands for an answer outside the list."""
    known = Counter(answers[answers >= 0].tolist())
    return max(known.values()) / len(answers) if known else 0.0
