"""Bad records, in one way for training and `edgevlm data check`: stop at the first, or leave it out and count it."""

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from edgevlm.errors import DataError

Policy = Literal["stop", "skip", "collect"]
"""`stop` raises at the first problem; `skip` leaves the bad part out, counts and warns; `collect` does so in silence."""

Kind = Literal[
    "malformed record",
    "duplicate id",
    "missing image",
    "unreadable image",
    "bad box",
    "empty text",
    "too long text",
    "outside the list",
]

Where = int | str
"""A line (1, 2, ...) or the path of a JSON value (`questions[4]`)."""

MAX_KEPT = 10_000
"""Problems that are remembered one by one; further ones are only counted."""
MAX_WARNED = 10

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """Something wrong in a dataset, and the place to mend it."""

    kind: Kind
    file: str
    where: Where
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.where}: {self.what}"


class Problems:
    """Collects what is wrong while a reader reads.

    Args:
        policy: see `Policy`.
        max_words: texts with more words are too long; None = any length. (How many word pieces a text has depends on
            the vocabulary, but never fewer than its words and punctuation marks.)
    """

    def __init__(self, policy: Policy = "stop", max_words: int | None = None) -> None:
        self.policy = policy
        self.max_words = max_words
        self.found: dict[Problem, None] = {}
        """In order of finding; each once, however often the split is read."""
        self.counts: Counter[str] = Counter()
        """Problems by kind."""
        self.left_out: Counter[str] = Counter()
        """What the dataset is known to contain and its protocol leaves out: no problem, but never silent."""
        self._summed_up = 0

    def report(self, kind: Kind, file: str, where: Where, what: str) -> None:
        """Note a problem; the caller leaves the bad part out.

        Raises:
            DataError: the policy is to stop.
        """
        problem = Problem(kind, file, where, what)
        if self.policy == "stop":
            raise DataError(str(problem), "Mend it, or set data.on_bad: skip to leave such records out")
        if problem in self.found:
            return
        self.counts[kind] += 1
        if len(self.found) < MAX_KEPT:
            self.found[problem] = None
        if self.policy == "skip" and len(self.found) <= MAX_WARNED:
            log.warning("left out: %s", problem)
            if len(self.found) == MAX_WARNED:
                log.warning("further bad records are left out in silence; `edgevlm data check` lists all")

    def sum_up(self) -> None:
        """A split was read to its end: under `skip`, say how much was left out, unless that was said before."""
        number = sum(self.counts.values())
        if self.policy == "skip" and number > self._summed_up:
            self._summed_up = number
            kinds = ", ".join(f"{count:,} × {kind}" for kind, count in sorted(self.counts.items()))
            log.warning("%s bad records left out so far: %s", f"{number:,}", kinds)

    def leave_out(self, what: str, number: int = 1) -> None:
        """Count something that the dataset's protocol leaves out (an example without a label, say)."""
        self.left_out[what] += number


@runtime_checkable
class Reporting(Protocol):
    """A reader that reports its bad records."""

    problems: Problems
