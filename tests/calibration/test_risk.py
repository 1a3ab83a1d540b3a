"""The promise of the thresholds, against exact enumeration, simulated populations whose risk is known, and adversaries."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.risk import (
    Answers,
    Thresholds,
    calibrate,
    choose_path,
    govern,
    least_units,
    margins,
    measure,
    p_values,
    paths,
    unit_means,
)

EPSILON, DELTA = 0.05, 0.1
PER_UNIT = 4


def answers_of(margins_RQ: np.ndarray, scores_RQ: np.ndarray, units_Q: np.ndarray, gmacs: tuple[float, ...]) -> Answers:
    reads_RQ = np.ones(margins_RQ.shape, bool)
    names = tuple(f"r{place}" for place in range(len(gmacs)))
    return Answers(margins_RQ, scores_RQ, reads_RQ, units_Q, np.array(gmacs), names)


def drawn(population: Answers, units: np.ndarray) -> Answers:
    """Units of a population, with replacement; each draw is a unit of its own. A unit has `PER_UNIT` questions in a row."""
    rows = (units[:, None] * PER_UNIT + np.arange(PER_UNIT)).ravel()
    chosen = population.rows(rows)
    return answers_of(
        chosen.margins_RQ,
        chosen.scores_RQ,
        np.repeat(np.arange(len(units)), PER_UNIT),
        tuple(population.gmacs_R.tolist()),
    )


def true_loss(population: Answers, thresholds: Thresholds) -> float:
    lost_Q = population.scores_RQ[-1] - govern(population, thresholds).scores_Q
    return float(unit_means(lost_Q, population.units_Q).mean())


# --- populations --------------------------------------------------------------------------------------------------

Population = Callable[[np.random.Generator], Answers]
NUM_UNITS = 4000


def _trained(rng: np.random.Generator) -> Answers:
    """Three rungs as training leaves them: the smaller, the more often wrong and unsure; images differ in difficulty."""
    num = NUM_UNITS * PER_UNIT
    ease_Q = rng.normal(1.5, 1.2, num) + np.repeat(rng.normal(0, 0.7, NUM_UNITS), PER_UNIT)
    signals_RQ = np.stack([ease_Q + rng.normal(0, spread, num) for spread in (1.0, 0.5, 0.1)])
    return answers_of(
        np.tanh(np.abs(signals_RQ)),
        (signals_RQ > 0).astype(float),
        np.repeat(np.arange(NUM_UNITS), PER_UNIT),
        (1, 2, 5),
    )


def _all_or_nothing(rng: np.random.Generator) -> Answers:
    """The small rung fails on whole images, whose questions are then all lost: few draws say much, or nothing."""
    lost_U = rng.random(NUM_UNITS) < 0.055  # just above epsilon
    scores_RQ = np.stack([np.repeat(~lost_U, PER_UNIT), np.ones(NUM_UNITS * PER_UNIT, bool)]).astype(float)
    margins_RQ = rng.random(scores_RQ.shape)
    return answers_of(margins_RQ, scores_RQ, np.repeat(np.arange(NUM_UNITS), PER_UNIT), (1, 3))


def _sure_when_wrong(rng: np.random.Generator) -> Answers:
    """The surer the small rung, the likelier it is wrong."""
    num = NUM_UNITS * PER_UNIT
    margins_RQ = rng.random((2, num))
    scores_RQ = np.stack([rng.random(num) > 0.2 * margins_RQ[0], np.ones(num, bool)]).astype(float)
    return answers_of(margins_RQ, scores_RQ, np.repeat(np.arange(NUM_UNITS), PER_UNIT), (1, 3))


def _gains_hide_losses(rng: np.random.Generator) -> Answers:
    """Soft scores; the small rung gains on many questions and loses everything on a few."""
    num = NUM_UNITS * PER_UNIT
    full_Q = rng.choice([0.3, 0.6, 0.9, 1.0], num)
    small_Q = np.where(rng.random(num) < 0.15, 0.0, np.minimum(1.0, full_Q + 0.07))
    margins_RQ = np.stack([rng.random(num), rng.random(num)])
    return answers_of(margins_RQ, np.stack([small_Q, full_Q]), np.repeat(np.arange(NUM_UNITS), PER_UNIT), (1, 3))


POPULATIONS: dict[str, Population] = {
    "trained": _trained,
    "all or nothing": _all_or_nothing,
    "sure when wrong": _sure_when_wrong,
    "gains hide losses": _gains_hide_losses,
}


# --- margins ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=6), st.sampled_from([0.5, 1.0, 3.0]))
def test_margin_is_the_difference_of_the_two_largest_probabilities(row: list[float], temperature: float) -> None:
    best = (torch.tensor(row, dtype=torch.float64) / temperature).softmax(0).topk(2).values
    assert margins(np.array([row]), temperature)[0] == pytest.approx(float(best[0] - best[1]), abs=1e-12)


def test_margins_at_the_edges() -> None:
    rows = np.array([[2.0, 2.0], [800.0, 0.0], [np.nan, 0.0], [np.inf, 0.0], [-np.inf, 0.0], [3e38, -3e38]])
    np.testing.assert_array_equal(margins(rows), [0.0, 1.0, np.nan, np.nan, np.nan, 1.0])
    assert margins(np.array([[5.0]]))[0] == 1.0


# --- p-values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [(), (0.0,) * 9, (1.0, -1.0) * 4, (-1.0,) * 9])
@pytest.mark.parametrize("losses", [(-1.0, 1.0), (0.0, 1.0), (-0.2, 1.0), (-1.0, 0.35)])
def test_p_values_are_valid_by_enumeration(losses: tuple[float, float], history: tuple[float, ...]) -> None:
    """Every sequence of ten units with two possible losses, weighted by its probability under the null hypothesis."""
    epsilon, num_units = 0.3, 10
    low, high = losses
    share = (epsilon - low) / (high - low)  # of the high loss: the expectation is epsilon
    sequences = np.array(list(itertools.product(losses, repeat=num_units)))
    num_high = (sequences == high).sum(1)
    weights = share**num_high * (1 - share) ** (num_units - num_high)
    assert weights.sum() == pytest.approx(1)
    for level in (0.01, 0.05, 0.1, 0.3):
        p = p_values(sequences, epsilon, level, np.tile(history, (len(sequences), 1)))
        assert weights[p <= level].sum() <= level + 1e-12


@pytest.mark.parametrize("name", POPULATIONS)
def test_p_values_are_valid_on_populations(name: str) -> None:
    """Units of a population, shifted so that the expected loss is exactly epsilon."""
    rng = np.random.default_rng(7)
    population = POPULATIONS[name](rng)
    losses_U = unit_means(population.scores_RQ[-1] - population.scores_RQ[0], population.units_Q)
    losses_U = np.clip(losses_U + EPSILON - losses_U.mean(), -1, 1)
    epsilon = float(losses_U.mean())
    draws = losses_U[rng.integers(0, NUM_UNITS, (3000, 200))]
    history = losses_U[rng.integers(0, NUM_UNITS, (3000, 100))]
    p = p_values(draws, epsilon, DELTA, history)
    for level in (0.02, 0.1, 0.3):
        assert np.mean(p <= level) <= level + 3 * math.sqrt(level * (1 - level) / len(p))
    assert np.mean(p <= 0.3) > 0.1, "and not by being useless"


@settings(max_examples=30)
@given(st.sampled_from([0.005, 0.01, 0.05, 0.2]), st.sampled_from([0.01, 0.1, 0.3]))
def test_least_units_is_where_zero_loss_is_certified(epsilon: float, delta: float) -> None:
    least = least_units(epsilon, delta)
    for num_units, certified in ((least, True), (least - 1, False)):
        p = p_values(np.zeros((1, num_units)), epsilon, delta, np.zeros((1, 10 * num_units)))
        assert bool(p[0] <= delta) == certified


def test_gains_count() -> None:
    rng = np.random.default_rng(0)
    losses = rng.choice([-0.5, 0.5, 0.0], (1, 2000), p=[0.1, 0.1, 0.8])
    assert p_values(losses, EPSILON, DELTA)[0] < 1e-3 < p_values(np.maximum(losses, 0), EPSILON, DELTA)[0]


# --- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POPULATIONS)
def test_thresholds_and_costs_fall_along_every_path(name: str) -> None:
    population = POPULATIONS[name](np.random.default_rng(3)).rows(np.arange(400))
    found = paths(population)
    num_rungs = len(population.gmacs_R)
    assert len({one[0] for one in found}) == len(found) == 2**num_rungs - 2
    for one in found:
        values = np.array([[2.0 if t is None else t for t in thresholds] for thresholds in one])
        assert (np.diff(values, axis=0) <= 0).all() and (values[:, -1] == 0).all()
        assert (np.diff(measure(population, one).gmacs_J) <= 1e-12).all()
        assert all(t in (None, 0.0) for t in one[-1]), "it ends where its cheapest rung always answers"


def test_a_long_question_and_a_nan_go_to_larger_rungs() -> None:
    nan = math.nan
    margins_RQ = np.array([[0.9, 0.9, nan, 0.1], [0.9, 0.9, 0.9, 0.1], [0.5, 0.5, 0.5, 0.5]])
    answers = answers_of(margins_RQ, np.zeros((3, 4)), np.arange(4), (1.0, 2.0, 4.0))
    answers.reads_RQ[0, 1] = False
    outcome = govern(answers, (0.5, 0.5, 0.0))
    assert outcome.rung_Q.tolist() == [0, 1, 2, 2]
    assert outcome.gmacs_Q.tolist() == [1, 2, 1 + 4, 1 + 2 + 4]
    assert govern(answers, (0.5, None, 0.0)).rung_Q.tolist() == [0, 2, 2, 2]
    assert govern(answers, answers.full).gmacs_Q.tolist() == [4] * 4


# --- the promise --------------------------------------------------------------------------------------------------


def violations(population: Answers, repeat: int, num_units: int) -> tuple[float, float]:
    """Share of calibrations whose true loss exceeds epsilon, and mean cost as a share of the full rung's."""
    rng, broken, gmacs = np.random.default_rng(11), 0, []
    for _ in range(repeat):
        tuning, held_out = (drawn(population, rng.integers(0, NUM_UNITS, num_units)) for _ in range(2))
        thresholds, _ = calibrate(tuning, held_out, epsilon=EPSILON, delta=DELTA)
        broken += true_loss(population, thresholds) > EPSILON
        gmacs.append(govern(population, thresholds).gmacs_Q.mean() / population.gmacs_R[-1])
    return broken / repeat, float(np.mean(gmacs))


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_promise_holds_over_resamplings(name: str) -> None:
    """120 calibrations on fresh draws, the true loss of each known: at most delta of them break the promise."""
    population, repeat = POPULATIONS[name](np.random.default_rng(5)), 120
    share, cost = violations(population, repeat, 150)
    assert share <= DELTA + 2.6 * math.sqrt(DELTA * (1 - DELTA) / repeat)  # 99.5 % of a binomial
    assert cost <= 1
    if name == "trained":
        assert cost < 0.8, "and it saves something"


def test_questions_of_an_image_taken_for_independent_break_the_promise() -> None:
    """What units are for: images whose twenty questions are lost together, at a loss of exactly epsilon."""
    rng = np.random.default_rng(5)
    images = (rng.random((2000, 100)) < EPSILON).astype(float)
    questions = rng.permuted(np.repeat(images, 20, axis=1), axis=1)
    as_units, as_questions = (np.mean(p_values(losses, EPSILON, DELTA) <= DELTA) for losses in (images, questions))
    assert as_units <= DELTA and as_questions > 3 * DELTA


def test_any_tuning_data_keep_the_promise() -> None:
    """A path chosen on answers that have nothing to do with the model is a bad path, not a broken promise."""
    population, repeat, broken = _trained(np.random.default_rng(5)), 80, 0
    rng = np.random.default_rng(2)
    tuning = drawn(population, rng.integers(0, NUM_UNITS, 100))
    tuning = answers_of(tuning.margins_RQ, np.ones_like(tuning.scores_RQ), tuning.units_Q, (1, 2, 5))  # never a loss
    for _ in range(repeat):
        held_out = drawn(population, rng.integers(0, NUM_UNITS, 150))
        broken += true_loss(population, calibrate(tuning, held_out, epsilon=EPSILON, delta=DELTA)[0]) > EPSILON
    assert broken / repeat <= DELTA + 2.6 * math.sqrt(DELTA * (1 - DELTA) / repeat)


def test_too_few_units_certify_nothing() -> None:
    population = _trained(np.random.default_rng(5))
    tuning, held_out = (drawn(population, np.arange(start, start + 40)) for start in (0, 40))
    thresholds, evidence = calibrate(tuning, held_out, epsilon=EPSILON, delta=DELTA)
    assert evidence.num_units == 40 < evidence.least_units == least_units(EPSILON, DELTA)
    assert thresholds == (None, None, 0.0)
    assert (evidence.loss, evidence.p_value, evidence.gmacs) == (0.0, 1.0, evidence.gmacs_full)
    assert evidence.answered_by == {"r0": 0.0, "r1": 0.0, "r2": 1.0}


def test_no_held_out_or_tuning_data_certify_nothing() -> None:
    population = _trained(np.random.default_rng(5))
    some, none = drawn(population, np.arange(200)), population.rows(np.zeros(len(population.units_Q), bool))
    for tuning, held_out in ((some, none), (none, some), (none, none)):
        assert calibrate(tuning, held_out, epsilon=EPSILON, delta=DELTA)[0] == (None, None, 0.0)


def test_a_small_rung_as_good_as_the_full_one_always_answers() -> None:
    rng = np.random.default_rng(0)
    right_Q = (rng.random(2 * 300 * PER_UNIT) < 0.8).astype(float)
    units_Q = np.repeat(np.arange(600), PER_UNIT)
    answers = answers_of(rng.random((3, len(units_Q))), np.stack([0 * right_Q, right_Q, right_Q]), units_Q, (1, 2, 5))
    first_Q = units_Q < 300
    thresholds, evidence = calibrate(answers.rows(first_Q), answers.rows(~first_Q), epsilon=EPSILON, delta=DELTA)
    assert thresholds == (None, 0.0, 0.0)
    assert (evidence.gmacs, evidence.loss) == (2.0, 0.0)


def test_evidence_is_of_the_held_out_questions() -> None:
    population = _trained(np.random.default_rng(5))
    tuning, held_out = (drawn(population, np.arange(start, start + 300)) for start in (0, 300))
    thresholds, evidence = calibrate(tuning, held_out, epsilon=EPSILON, delta=DELTA)
    outcome = govern(held_out, thresholds)
    assert evidence.p_value <= DELTA and evidence.loss <= EPSILON
    assert evidence.accuracy == pytest.approx(outcome.scores_Q.mean(), abs=1e-6)
    assert evidence.loss_questions == pytest.approx(evidence.accuracy_full - evidence.accuracy, abs=2e-6)
    assert evidence.gmacs == pytest.approx(outcome.gmacs_Q.mean(), abs=1e-6)
    assert sum(evidence.answered_by.values()) == pytest.approx(1, abs=1e-5)
    assert (evidence.num_units, evidence.num_questions, evidence.num_tuning_units) == (300, 1200, 300)
    assert calibrate(tuning, held_out, epsilon=EPSILON, delta=DELTA)[0] == thresholds, "nothing is random but the seed"


def test_the_path_is_chosen_without_the_held_out_data() -> None:
    population = _trained(np.random.default_rng(5))
    tuning = drawn(population, np.arange(300))
    chosen = choose_path(tuning, EPSILON, DELTA, 300)
    assert chosen.thresholds in paths(tuning)
    for seed in range(3):
        held_out = drawn(population, np.random.default_rng(seed).integers(0, NUM_UNITS, 300))
        thresholds, _ = calibrate(tuning, held_out, epsilon=EPSILON, delta=DELTA)
        assert thresholds in (*chosen.thresholds, held_out.full)
