"""CIDEr-D in a page: the reward of self-critical training.

Vedantam and others, 2015 (arXiv 1411.5726), the variant that pycocoevalcap calls CIDEr: clipped counts, a Gaussian
penalty on the difference in length, times 10. Documents are images; their frequencies come from all references given.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_N = 4
SIGMA = 6.0
SCALE = 10.0

NGram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """One caption: tf-idf weights and their norm for each n, and its length."""

    weights: tuple[dict[NGram, float], ...]
    norms: tuple[float, ...]
    length: int


class CiderD:
    """Scores captions against the references of their image.

    Args:
        references: per image, each reference as a list of words.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        self._log_images = math.log(max(1, len(references)))
        self._frequency: Counter[NGram] = Counter()
        counted = [[ngrams(words) for words in image] for image in references]
        for image in counted:
            self._frequency.update({ngram for counts in image for ngram in counts})
        self._references = [[self._vector(counts) for counts in image] for image in counted]

    def score(self, image: int, words: Sequence[str]) -> float:
        """CIDEr-D of a caption of image `image`; 10 is the best there is."""
        hypothesis = self._vector(ngrams(words))
        references = self._references[image]
        if not references:
            return 0.0
        return SCALE * sum(_similarity(hypothesis, reference) for reference in references) / len(references)

    def scores(self, captions: Sequence[Sequence[str]]) -> np.ndarray:
        """CIDEr-D of one caption for each image, (I,)."""
        return np.array([self.score(image, words) for image, words in enumerate(captions)])

    def _vector(self, counts: Counter[NGram]) -> _Vector:
        weights: tuple[dict[NGram, float], ...] = tuple({} for _ in range(MAX_N))
        for ngram, count in counts.items():
            # An n-gram that no reference has counts as if one had: rare, so as heavy as any can be.
            weights[len(ngram) - 1][ngram] = count * (self._log_images - math.log(max(1, self._frequency[ngram])))
        norms = tuple(math.sqrt(sum(weight * weight for weight in table.values())) for table in weights)
        # The published code measures length in bigrams; so do we, or the scores would differ.
        return _Vector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def ngrams(words: Sequence[str]) -> Counter[NGram]:
    """How often each sequence of 1 to 4 words occurs."""
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _similarity(hypothesis: _Vector, reference: _Vector) -> float:
    """Mean over n of the cosine with clipped counts, times the penalty on length."""
    total = 0.0
    for ours, theirs, norm, other in zip(
        hypothesis.weights, reference.weights, hypothesis.norms, reference.norms, strict=True
    ):
        product = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs)
        total += product / (norm * other) if norm and other else 0.0
    difference = hypothesis.length - reference.length
    return total / MAX_N * math.exp(-(difference**2) / (2 * SIGMA**2))
