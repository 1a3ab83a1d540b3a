"""Visual question answering with several annotators: soft targets, the official accuracy, and the question prior.

Ten people answered each question of VQAv2. Training counts their answers (a target between 0 and 1 for each answer of
the closed list), evaluation asks whether the nine others would agree with the prediction.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.data.answers import normalise_answer

AGREEING = 3
"""Annotators beside oneself who make an answer fully right."""
NUM_ANNOTATORS = 10
PRIOR = 0.01
"""Probability that an untrained classifier gives each answer (MiniVLM's recipe)."""

_normal = lru_cache(maxsize=1 << 16)(normalise_answer)


class ScoreTable(NamedTuple):
    """What is right to some degree, per question: K answers at most, padded with id -1 and score 0."""

    answer_ids_QK: np.ndarray
    """int32 into the closed list."""
    soft_QK: np.ndarray
    """float32, 0..1: training target."""
    official_QK: np.ndarray
    """float32, 0..1: what the official accuracy gives for this answer."""


def official_accuracy(predicted: str, said: Sequence[str]) -> float:
    """Agreement of a prediction with its annotators, 0..1 (Antol and others, 2015; the form of the public evaluator).

    Each annotator in turn is left out, and the prediction is worth min(1, matches among the others / 3); the result
    is the mean. Answers are normalised only where the annotators differ, as the public evaluator does: where all say
    the same, the prediction must be that very text.
    """
    said = [_plain(answer) for answer in said]
    predicted = _plain(predicted)
    if len(set(said)) > 1:
        said, predicted = [_normal(answer) for answer in said], _normal(predicted)
    return leave_one_out(said.count(predicted), len(said))


def leave_one_out(matches: int, num_annotators: int) -> float:
    """Mean over the annotators of min(1, matches among the others / 3), in closed form.

    Of ten annotators it is min(1, 0.3 x matches), the soft target in common use.
    """
    with_match = matches * min(1.0, (matches - 1) / AGREEING)
    without = (num_annotators - matches) * min(1.0, matches / AGREEING)
    return (with_match + without) / num_annotators


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def score_table(said: Sequence[Sequence[str]], answers: Sequence[str]) -> ScoreTable:
    """Targets and official scores of every question for the answers of the closed list that someone gave.

    Args:
        said: what each annotator of each question said, as written.
        answers: the closed list.
    """
    known: dict[str, list[int]] = defaultdict(list)
    for index, answer in enumerate(answers):
        known[_normal(answer)].append(index)
    rows = []
    for given in said:
        counts = Counter(_normal(answer) for answer in given)
        rows.append(
            [
                (index, leave_one_out(count, len(given)), official_accuracy(answers[index], given))
                for answer, count in counts.items()
                for index in known.get(answer, ())
            ]
        )
    most = max(1, max(map(len, rows), default=1))
    table = np.zeros((3, len(rows), most), np.float32)
    table[0] = -1
    for question, row in enumerate(rows):
        if row:
            table[:, question, : len(row)] = np.array(row, np.float32).T
    return ScoreTable(table[0].astype(np.int32), table[1], table[2])


def official_scores(predicted_Q: np.ndarray, answer_ids_QK: np.ndarray, official_QK: np.ndarray) -> np.ndarray:
    """Official accuracy of each predicted answer id, (Q,); 0 for an answer that nobody gave."""
    return (official_QK * (answer_ids_QK == predicted_Q[:, None])).sum(1)


def best_constant(answer_ids_QK: np.ndarray, official_QK: np.ndarray) -> float:
    """Official accuracy of always giving the same answer, the best one for these questions."""
    totals = np.bincount(answer_ids_QK[answer_ids_QK >= 0], weights=official_QK[answer_ids_QK >= 0], minlength=1)
    return float(totals.max()) / max(1, len(answer_ids_QK))


def dense_targets(answer_ids_BK: Tensor, soft_BK: Tensor, num_answers: int) -> Tensor:
    """Soft targets over the whole list, (B, A)."""
    targets_BA = torch.zeros(len(answer_ids_BK), num_answers)
    # Padding adds its score of 0 to answer 0.
    return targets_BA.scatter_add_(1, answer_ids_BK.clamp(min=0).long(), soft_BK)


def soft_loss(logits_BA: Tensor, targets_BA: Tensor) -> Tensor:
    """Binary cross-entropy of every answer, summed, per positive target of the batch.

    MiniVLM's recipe normalises by the positives; which count as positive is not public. Ours: every target above 0.
    """
    targets_BA = targets_BA.to(logits_BA.dtype)
    total = F.binary_cross_entropy_with_logits(logits_BA, targets_BA, reduction="sum")
    return total / (targets_BA > 0).sum().clamp(min=1)


@torch.no_grad()
def start_at_prior(last: nn.Linear, prior: float = PRIOR) -> None:
    """Set the bias of a classifier so that it begins by giving each answer the probability `prior`.

    Without it, thousands of answers at probability one half drown the first steps.
    """
    last.bias.fill_(-math.log((1 - prior) / prior))


# --- the baseline that does not look ------------------------------------------------------------------------------


def question_prior(
    train: Sequence[tuple[str, str]], questions: Sequence[str], *, num_words: int | None = None
) -> list[str]:
    """Answers without an image: the most frequent training answer of the question, or of how it begins.

    For each question, the longest beginning that training knows decides (all words, one word less, ..., none).

    Args:
        train: (question, answer) pairs.
        questions: those to answer.
        num_words: longest beginning that is looked up, in words; None = the whole question.
    """
    votes: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for question, given in train:
        words = _words(question)[:num_words]
        for length in range(len(words) + 1):
            votes[words[:length]][given] += 1
    best = {beginning: counts.most_common(1)[0][0] for beginning, counts in votes.items()}

    def answer(question: str) -> str:
        words = _words(question)[:num_words]
        return next(best[words[:length]] for length in range(len(words), -1, -1) if words[:length] in best)

    return [answer(question) for question in questions]


def _words(question: str) -> tuple[str, ...]:
    return tuple(question.lower().rstrip(" ?.").split())
