"""Visual entailment (SNLI-VE): does the image prove the sentence, contradict it, or neither? Three closed answers.

Head, loss and accuracy are those of every closed-answer task; what is reported besides is the accuracy per right
answer, since a model that reads only the sentence already does well on one class.
"""

from collections.abc import Sequence

import numpy as np

from edgevlm.tasks.answers import mean_by


def per_class_accuracy(predicted_Q: np.ndarray, answers_Q: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Share of right predictions among the questions of each right answer, 0..1."""
    return mean_by(predicted_Q == answers_Q, [names[int(answer)] for answer in answers_Q])
