"""What the closed-answer tasks share: one loss, one metric, counted over all questions and per kind."""

from collections import Counter, defaultdict

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def loss(logits_BA: Tensor, answers_B: Tensor) -> Tensor:
    """Cross-entropy against the one right answer."""
    return F.cross_entropy(logits_BA, answers_B)


def accuracy(predicted: np.ndarray, answers: np.ndarray) -> float:
    """Share of equal entries, 0..1."""
    return float((predicted == answers).mean()) if len(answers) else 0.0


def accuracy_by_kind(predicted: np.ndarray, answers: np.ndarray, kinds: list[str]) -> dict[str, float]:
    """Accuracy per kind of question."""
    rows: dict[str, list[bool]] = defaultdict(list)
    for right, kind in zip(predicted == answers, kinds, strict=True):
        rows[kind].append(bool(right))
    return {kind: sum(right) / len(right) for kind, right in sorted(rows.items())}


def majority(answers: np.ndarray) -> float:
    """Accuracy of always giving the most frequent answer."""
    return max(Counter(answers.tolist()).values()) / len(answers) if len(answers) else 0.0
