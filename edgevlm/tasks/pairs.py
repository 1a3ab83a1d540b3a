"""Sentences about two images (NLVR2): accuracy, and the official consistency over all items of a sentence."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

IDENTIFIER = re.compile(r"(.+)-(\d+)-(\d+)-(\d+)")
"""NLVR2's `split-set-pair-sentence`: a sentence was written for one set and is asked about the set's four pairs."""


def group_key(identifier: str, sentence: str) -> str:
    """What all items of one sentence share: the identifier without its pair, as the public evaluator has it.

    Identifiers of another form (other datasets) are grouped by the sentence itself.
    """
    parts = IDENTIFIER.fullmatch(identifier)
    return f"{parts[1]}-{parts[2]}--{parts[4]}" if parts else " ".join(sentence.lower().split())


def group_index(identifiers: Sequence[str], sentences: Sequence[str]) -> np.ndarray:
    """One number per item, (Q,) int64, the same for all items of a sentence: a hash, so that parts made apart agree."""
    keys = (group_key(*item) for item in zip(identifiers, sentences, strict=True))
    digests = (hashlib.sha256(key.encode()).digest() for key in keys)
    return np.array([int.from_bytes(digest[:8], "big", signed=True) for digest in digests], np.int64)


def consistency(right_Q: np.ndarray, group_Q: np.ndarray) -> float:
    """Share of sentences whose items are all answered right, 0..1."""
    if not len(right_Q):
        return 0.0
    _, number_Q = np.unique(group_Q, return_inverse=True)
    return float((np.bincount(number_Q, weights=~right_Q.astype(bool)) == 0).mean())
