"""Thresholds with a guarantee: how far a governor may trust small rungs before accuracy is lost (Learn then Test).

A small rung's answer is given where its margin reaches a threshold. The lower the threshold, the cheaper the answers, and the
more accuracy may be lost against the full rung. From held-out data, thresholds are chosen such that with probability
1 - delta over the draw of those data the expected loss is at most epsilon; nothing is assumed of model or data except
that units (images with their questions) are drawn independently from one distribution.

1. One part of the data (`tuning`) chooses a path: which rungs take part, and one threshold for all of them that falls
   from 1 to 0. Any choice is valid, because the other part has not been looked at.
2. Along the path, on the other part (`held_out`), 'the loss exceeds epsilon' is tested at level delta until the first test
   fails (fixed-sequence testing). Every threshold before it is certified, and the last of them is the cheapest.

Learn then Test: Angelopoulos and others, 2021; a path from one part of the data: Pareto Testing, Laufer-Goldshtein and
others, 2023; the test: betting, Waudby-Smith and Ramdas, 2024. Choosing the subset of rungs by a rehearsal of the test is ours.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from edgevlm.artifacts import GovernorEvidence

Thresholds = tuple[float | None, ...]
"""One per rung, cheapest first: smallest margin that is trusted; None = never started. The last (full) rung's is 0."""

STEPS = 100
"""Thresholds on a path."""
DECIMALS = 9
"""Of a threshold: a margin of 1 - 1e-9 stands for logits 21 apart."""
LARGEST_BET = 0.99
"""Share of the wealth that a unit may cost at most: after a loss of 1 there is still something to bet."""


def margins(logits_QA: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """How sure answers are, (Q,) float64: p1 - p2 of the softmax at `temperature`; NaN where a logit is not finite.

    With a single answer p2 is 0.
    """
    logits_QA = np.asarray(logits_QA, np.float64)
    finite_Q1 = np.all(np.isfinite(logits_QA), axis=1, keepdims=True)
    logits_QA = np.where(finite_Q1, logits_QA, 0.0)
    odds_QA = np.exp((logits_QA - logits_QA.max(axis=1, keepdims=True)) / temperature)
    second_Q = np.partition(odds_QA, -2, axis=1)[:, -2] if odds_QA.shape[1] > 1 else 0.0
    return np.where(finite_Q1[:, 0], (1.0 - second_Q) / odds_QA.sum(axis=1), np.nan)


@dataclass(frozen=True)
class Answers:
    """What every rung answers to the same questions; rungs from the cheapest to the full one."""

    margins_RQ: np.ndarray
    """`margins` of each rung's logits."""
    scores_RQ: np.ndarray
    """What each rung's answer is worth, 0..1."""
    reads_RQ: np.ndarray
    """bool: the question is not longer than what the rung reads."""
    units_Q: np.ndarray
    """Unit (image) of each question: units are independent of each other, questions of one are not."""
    gmacs_R: np.ndarray
    """Cost of each rung."""
    names: tuple[str, ...]
    """Of the rungs."""

    def rows(self, chosen: np.ndarray) -> "Answers":
        """Some of the questions, by number or by mask."""
        return replace(
            self,
            margins_RQ=self.margins_RQ[:, chosen],
            scores_RQ=self.scores_RQ[:, chosen],
            reads_RQ=self.reads_RQ[:, chosen],
            units_Q=self.units_Q[chosen],
        )

    @property
    def full(self) -> Thresholds:
        """The thresholds under which every question goes to the full rung at once."""
        return (None,) * (len(self.gmacs_R) - 1) + (0.0,)


class Outcome(NamedTuple):
    """What becomes of every question under some thresholds."""

    scores_Q: np.ndarray
    rung_Q: np.ndarray
    """Which rung's answer is given."""
    started_RQ: np.ndarray
    """bool: the rungs that were started on the way."""
    gmacs_Q: np.ndarray
    """Of all of them."""


def govern(answers: Answers, thresholds: Thresholds) -> Outcome:
    """Answer every question as the run-time governor does (`targets/governor.py`)."""
    last, num_questions = len(thresholds) - 1, len(answers.units_Q)
    scores_Q, rung_Q = np.zeros(num_questions), np.full(num_questions, last)
    started_RQ = np.zeros((last + 1, num_questions), bool)
    waiting_Q, broken_Q = np.ones(num_questions, bool), np.zeros(num_questions, bool)
    for rung, threshold in enumerate(thresholds):
        if threshold is None:
            continue
        starts_Q = waiting_Q if rung == last else waiting_Q & answers.reads_RQ[rung] & ~broken_Q
        broken_Q = broken_Q | (starts_Q & np.isnan(answers.margins_RQ[rung]))
        ends_Q = starts_Q if rung == last else starts_Q & (answers.margins_RQ[rung] >= threshold)
        started_RQ[rung] = starts_Q
        scores_Q, rung_Q = np.where(ends_Q, answers.scores_RQ[rung], scores_Q), np.where(ends_Q, rung, rung_Q)
        waiting_Q = waiting_Q & ~ends_Q
    return Outcome(scores_Q, rung_Q, started_RQ, answers.gmacs_R @ started_RQ)


def unit_means(values_Q: np.ndarray, units_Q: np.ndarray) -> np.ndarray:
    """Mean over the questions of each unit, (U,), in order of the unit's number."""
    _, unit_Q, counts_U = np.unique(units_Q, return_inverse=True, return_counts=True)
    return np.bincount(unit_Q, values_Q) / counts_U


def p_values(losses_JU: np.ndarray, epsilon: float, delta: float, history_JH: np.ndarray | None = None) -> np.ndarray:
    """P-values of 'the expected loss exceeds epsilon', (J,), one for each of several losses of the same units.

    A gambler who starts with 1 and bets before each unit that its loss is below epsilon cannot expect to gain if the
    hypothesis is true, whatever the distribution; so the largest wealth reached exceeds 1 / p with probability p at most
    (Ville). The bet is that of Waudby-Smith and Ramdas (equation 26), by the variance of the losses seen so far, which
    begin with `history`. Gains (negative losses) count: clipping them, as bounds for losses in 0..1 must, only loses wealth.

    Args:
        losses_JU: -1..1, in an order that does not depend on them.
        epsilon: 0..1.
        delta: level that the bet is best for; the p-value is valid at any.
        history_JH: losses of other units, for a first idea of the variance; any numbers are valid.
    """
    num_losses, num_units = losses_JU.shape
    history_JH = np.zeros((num_losses, 0)) if history_JH is None else history_JH
    count_U = 1 + history_JH.shape[1] + np.arange(num_units)
    sum_JU = history_JH.sum(1, keepdims=True) + np.cumsum(losses_JU, 1) - losses_JU
    squares_JU = 1 + (history_JH**2).sum(1, keepdims=True) + np.cumsum(losses_JU**2, 1) - losses_JU**2
    variance_JU = np.maximum(squares_JU / count_U - (sum_JU / count_U) ** 2, 1e-12)
    bet_JU = np.minimum(np.sqrt(2 * math.log(1 / delta) / (num_units * variance_JU)), LARGEST_BET / (1 - epsilon))
    log_wealth_JU = np.cumsum(np.log1p(bet_JU * (epsilon - losses_JU)), 1)
    return np.exp(-log_wealth_JU.max(1, initial=0.0))


def least_units(epsilon: float, delta: float) -> int:
    """Units without any loss from which on something can be certified: below, no data are enough."""
    return math.ceil(math.log(1 / delta) / math.log1p(LARGEST_BET * epsilon / (1 - epsilon)))


class Path(NamedTuple):
    """Thresholds from the safest to the cheapest, with what they did on the tuning data."""

    thresholds: tuple[Thresholds, ...]
    losses_JU: np.ndarray
    gmacs_J: np.ndarray


def measure(answers: Answers, thresholds: tuple[Thresholds, ...]) -> Path:
    """Mean loss of every unit, and the mean cost, under each of the thresholds."""
    _, unit_Q, counts_U = np.unique(answers.units_Q, return_inverse=True, return_counts=True)
    losses, gmacs = [], []
    for one in thresholds:
        outcome = govern(answers, one)
        losses.append(np.bincount(unit_Q, answers.scores_RQ[-1] - outcome.scores_Q) / counts_U)
        gmacs.append((np.bincount(unit_Q, outcome.gmacs_Q) / counts_U).mean())
    return Path(thresholds, np.stack(losses), np.array(gmacs))


def paths(answers: Answers) -> list[tuple[Thresholds, ...]]:
    """For every subset of the rungs: its largest answers whatever its margin, and the others from a threshold on that falls."""
    num_rungs = len(answers.gmacs_R)
    found = []
    for chosen in itertools.product((False, True), repeat=num_rungs):
        rungs = [rung for rung in range(num_rungs) if chosen[rung]]
        if not rungs or rungs == [num_rungs - 1]:
            continue  # nothing, or the full rung alone
        shares = np.linspace(1, 0, STEPS)
        seen = answers.margins_RQ[rungs[:-1]]
        seen = seen[np.isfinite(seen)]
        levels = [1.0, *np.round(np.quantile(seen, shares), DECIMALS).tolist(), 0.0] if len(seen) else [0.0]

        def at(level: float, rungs: list[int] = rungs) -> Thresholds:
            values: list[float | None] = [None] * (num_rungs - 1) + [0.0]
            for rung in rungs:
                values[rung] = level if rung != rungs[-1] else 0.0
            return tuple(values)

        found.append(tuple(at(level) for level in sorted(set(levels), reverse=True)))
    return found


def choose_path(tuning: Answers, epsilon: float, delta: float, num_units: int) -> Path:
    """The path that leads furthest if `num_units` held-out units are like the tuning units: lowest cost, then smallest p-value."""
    full_gmacs = float(tuning.gmacs_R[-1])

    def rehearsal(path: Path) -> tuple[float, float]:
        as_many_JU = path.losses_JU[:, np.arange(num_units) % path.losses_JU.shape[1]]
        p_J = p_values(as_many_JU, epsilon, delta)
        count = _certified(p_J, delta)
        return (min(full_gmacs, float(path.gmacs_J[count - 1])) if count else full_gmacs, float(p_J[0]))

    return min((measure(tuning, one) for one in paths(tuning)), key=rehearsal)


def _certified(p_J: np.ndarray, delta: float) -> int:
    """How many tests in a row, from the first, are passed."""
    failed = np.flatnonzero(p_J > delta)
    return int(failed[0]) if len(failed) else len(p_J)


def calibrate(
    tuning: Answers,
    held_out: Answers,
    *,
    epsilon: float,
    delta: float,
    seed: int = 0,
    unit: Literal["image", "text"] = "image",
) -> tuple[Thresholds, GovernorEvidence]:
    """Thresholds whose expected loss against the full rung is at most epsilon, with probability 1 - delta.

    The loss of a unit is the mean over its questions of score(full) - score(governed), so that every unit counts alike.

    Args:
        tuning: chooses the path; shares no unit with `held_out`.
        held_out: tests it. Units are independent draws of what the app will meet.
        epsilon, delta: the promise.
        seed: order in which the units are tested. Fix it before looking: a seed chosen by its result voids the promise.
        unit: what `units_Q` numbers; for the record.

    Returns:
        The thresholds, and what they rest on. Where nothing cheaper than the full rung could be certified, every question
        goes to the full rung, which loses nothing.
    """
    num_units = len(np.unique(held_out.units_Q))
    thresholds, p_value, tested = held_out.full, 1.0, 0
    if len(held_out.gmacs_R) > 1 and num_units and len(tuning.units_Q):
        path = choose_path(tuning, epsilon, delta, num_units)
        losses_JU = measure(held_out, path.thresholds).losses_JU
        order_U = np.random.default_rng(seed).permutation(num_units)
        p_J = p_values(losses_JU[:, order_U], epsilon, delta, path.losses_JU)
        count = _certified(p_J, delta)
        tested = min(count + 1, len(p_J))
        if count and path.gmacs_J[count - 1] < held_out.gmacs_R[-1]:
            thresholds, p_value = path.thresholds[count - 1], float(p_J[count - 1])
    return thresholds, _evidence(held_out, thresholds, tuning, epsilon, delta, unit, p_value, tested)


def _evidence(
    held_out: Answers,
    thresholds: Thresholds,
    tuning: Answers,
    epsilon: float,
    delta: float,
    unit: Literal["image", "text"],
    p_value: float,
    tested: int,
) -> GovernorEvidence:
    outcome, full_Q = govern(held_out, thresholds), held_out.scores_RQ[-1]

    def mean(values: np.ndarray) -> float:
        return round(float(values.mean()), 6) if len(values) else 0.0

    return GovernorEvidence(
        unit=unit,
        num_units=len(np.unique(held_out.units_Q)),
        num_questions=len(held_out.units_Q),
        least_units=least_units(epsilon, delta),
        num_tuning_units=len(np.unique(tuning.units_Q)),
        loss=mean(unit_means(full_Q - outcome.scores_Q, held_out.units_Q)),
        loss_questions=mean(full_Q - outcome.scores_Q),
        p_value=p_value,
        tested=tested,
        accuracy=mean(outcome.scores_Q),
        accuracy_full=mean(full_Q),
        gmacs=mean(outcome.gmacs_Q),
        gmacs_full=float(held_out.gmacs_R[-1]),
        answered_by={name: mean(outcome.rung_Q == rung) for rung, name in enumerate(held_out.names)},
    )
