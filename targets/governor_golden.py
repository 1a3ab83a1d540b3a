"""Golden cases of the governor: `golden/governor.json`, by which an app proves that its governor decides like this one.

Every case carries all that it needs: rungs with their thresholds or times, the policy, inputs, and every decision that
follows. Some come from the bundle's golden logits, the others are the edges: ties, thresholds that are met exactly, logits
that are not numbers, questions that are too long, a device that slows down and recovers. docs/governor.md has the format.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.artifacts import Governor, GovernorRung, LatencyPolicy, MarginDefinition
from edgevlm.errors import BundleError
from targets.golden import FOLDER, read_golden
from targets.governor import LatencyGovernor, MarginGovernor, count_tokens

FILE = f"{FOLDER}/governor.json"
TOLERANCE = 1e-9
"""Of margins; a case whose margin comes this near to a threshold meets it exactly, in any arithmetic."""
DIGITS = 6
"""Decimals of golden logits in the file: the decisions are those that follow from the rounded ones."""
TIMES_MS = {"small": 2.0, "medium": 4.0, "full": 8.0}
"""Of the ladder in the cases of the latency governor."""
WORDS = {"small": 8, "medium": 12, "full": None}
SURE, UNSURE, TIE = [1000.0, 0.0, 0.0], [1.0, 0.5, 0.0], [2.0, 2.0, 0.0]
"""Logits whose margin is exactly 1, between 0 and 1, and exactly 0."""


def write_governor_golden(folder: Path, governor: Governor, pad_id: int) -> None:
    """Write the cases beside a bundle's golden logits, which must lie there."""
    cases = [*bundle_cases(governor, *_golden(folder), pad_id), *margin_cases(), *latency_cases()]
    close = [case["id"] for case in cases if case["kind"] == "margin" and not _is_clear(case)]
    description = {"schema_version": 1, "cases": [case for case in cases if case["id"] not in close]}
    (folder / FILE).write_text(
        json.dumps(description, indent=None, separators=(",", ":")).replace('{"id"', '\n{"id"') + "\n"
    )


def check_governor_golden(folder: Path) -> list[str]:
    """Replay a bundle's cases; problems in words, empty if every decision is the expected one.

    Raises:
        BundleError: the cases are missing or unreadable.
    """
    try:
        cases = json.loads((folder / FILE).read_text())["cases"]
    except (OSError, ValueError, KeyError) as problem:
        raise BundleError(f"{folder / FILE} cannot be read ({problem})", "Export the bundle again") from problem
    problems = []
    for case in cases:
        expected, got = case["expected"], (play_margin if case["kind"] == "margin" else play_latency)(case)
        if len(expected) != len(got) or not all(_same(*both) for both in zip(expected, got, strict=True)):
            problems.append(f"{case['id']}: {got} instead of {expected}")
    return problems


def play_margin(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every answer of a question in turn: rung, margin (null if a logit is not finite), and what came of it."""
    machine, took_ms, steps = MarginGovernor(_governor(case)), 0.0, []
    budget = case.get("budget")
    rung: str | None = machine.start(case["num_tokens"])
    while rung is not None:
        left_ms = None
        if budget is not None:
            took_ms += budget["took_ms"][rung]
            left_ms = budget["max_ms"] - took_ms
        logits = [float(value) for value in case["logits"][rung]]
        larger = machine.next(rung, logits, left_ms, budget and budget["expected_ms"])
        margin = None if math.isnan(machine.margin) else machine.margin
        steps.append({"rung": rung, "margin": margin, "why": machine.why})
        rung = larger
    return steps


def play_latency(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every choice in turn."""
    machine, choices = LatencyGovernor(_governor(case), {r["name"]: r["ms"] for r in case["rungs"]}), []
    for event in case["events"]:
        if "observe" in event:
            machine.observe(event["observe"]["rung"], float(event["observe"]["ms"]))
        else:
            choice = machine.choose(event["choose"]["target_ms"], event["choose"]["num_tokens"])
            choices.append({"rung": choice.rung, "expected_ms": choice.expected_ms, "fits": choice.fits})
    return choices


# --- cases of the margin governor ---------------------------------------------------------------------------------


def bundle_cases(
    governor: Governor, logits: Mapping[str, np.ndarray], ids_KL: np.ndarray, pad_id: int
) -> Iterator[dict[str, Any]]:
    """The bundle's golden questions under its own governor."""
    for number, ids_L in enumerate(ids_KL):
        rows = {name: [round(float(value), DIGITS) for value in values[number]] for name, values in logits.items()}
        yield _margin_case(
            f"golden {number}", governor.rungs, rows, count_tokens(ids_L, pad_id), governor.margin.temperature
        )


def margin_cases() -> Iterator[dict[str, Any]]:
    """The edges of the margin governor, on a ladder of three rungs."""

    def case(
        name: str, *logits: list[Any], thresholds: Sequence[float | None] = (0.5, 0.25), **rest: Any
    ) -> dict[str, Any]:
        rungs = [
            GovernorRung(name=rung, num_words=WORDS[rung], threshold=threshold)
            for rung, threshold in zip(TIMES_MS, (*thresholds, 0.0), strict=True)
        ]
        return _margin_case(name, rungs, dict(zip(TIMES_MS, logits, strict=True)), **{"num_tokens": 5, **rest})

    yield case("sure at once", SURE, UNSURE, UNSURE)
    yield case("sure at the second rung", UNSURE, SURE, UNSURE)
    yield case("never sure", UNSURE, UNSURE, UNSURE, thresholds=(0.9, 0.9))
    yield case("the threshold is met exactly: 1", SURE, UNSURE, UNSURE, thresholds=(1.0, 0.5))
    yield case("just below 1", [20.0, 0.0, 0.0], SURE, UNSURE, thresholds=(1.0, 0.5))
    yield case("the threshold is met exactly: 0", TIE, UNSURE, UNSURE, thresholds=(0.0, 0.0))
    yield case("a tie", TIE, TIE, TIE)
    yield case("one answer only", [3.0], [3.0], [3.0], thresholds=(1.0, 1.0))
    yield case("not a number", ["NaN", 1.0, 0.0], SURE, SURE)
    yield case("infinite", ["Infinity", 1.0, 0.0], SURE, UNSURE)
    yield case("minus infinite", ["-Infinity", 1.0, 0.0], SURE, UNSURE)
    yield case("not a number at the second rung", UNSURE, ["NaN", "NaN", "NaN"], UNSURE)
    yield case("not a number at the full rung", UNSURE, UNSURE, ["NaN", 0.0, 0.0], thresholds=(0.9, 0.9))
    yield case("a rung that is never started", UNSURE, UNSURE, UNSURE, thresholds=(None, 0.9))
    yield case("nothing is certified", SURE, SURE, UNSURE, thresholds=(None, None))
    yield case("a rung that always answers", UNSURE, TIE, SURE, thresholds=(0.9, 0.0))
    yield case("as long as the first rung reads", SURE, SURE, SURE, num_tokens=8)
    yield case("too long for the first rung", SURE, SURE, SURE, num_tokens=9)
    yield case("too long for all but the full rung", SURE, SURE, SURE, num_tokens=13)
    yield case("too long for the only rung that is started", SURE, SURE, SURE, thresholds=(0.5, None), num_tokens=9)
    yield case("a higher temperature is less sure", [2.0, 0.0, 0.0], UNSURE, UNSURE, temperature=4.0)
    yield case("large logits do not overflow", [3e38, -3e38, 0.0], UNSURE, UNSURE)

    def budget(max_ms: float, **expected_ms: float) -> dict[str, Any]:
        return {"max_ms": max_ms, "expected_ms": TIMES_MS | expected_ms, "took_ms": TIMES_MS}

    yield case("time for all", UNSURE, UNSURE, UNSURE, thresholds=(0.9, 0.9), budget=budget(14.0))
    yield case("time for two", UNSURE, UNSURE, UNSURE, thresholds=(0.9, 0.9), budget=budget(13.0))
    yield case("time for one", UNSURE, UNSURE, UNSURE, thresholds=(0.9, 0.9), budget=budget(5.0))
    yield case("the full rung is the faster one", UNSURE, UNSURE, UNSURE, budget=budget(6.0, medium=5.0, full=4.0))
    yield case("no time, but no number either", ["NaN", 0.0, 0.0], SURE, SURE, budget=budget(3.0))


def _margin_case(
    name: str,
    rungs: Iterable[GovernorRung],
    logits: Mapping[str, list[Any]],
    num_tokens: int,
    temperature: float = 1.0,
    budget: dict[str, Any] | None = None,
) -> dict[str, Any]:
    fields = [{"name": rung.name, "num_words": rung.num_words, "threshold": rung.threshold} for rung in rungs]
    case: dict[str, Any] = {"id": f"margin: {name}", "kind": "margin", "rungs": fields, "temperature": temperature}
    case |= {"num_tokens": num_tokens, "logits": dict(logits)} | ({"budget": budget} if budget else {})
    return {**case, "expected": play_margin(case)}


def _is_clear(case: Mapping[str, Any]) -> bool:
    """Whether rounding in another language cannot change a decision."""
    thresholds = {rung["name"]: rung["threshold"] for rung in case["rungs"]}
    for step in case["expected"]:
        threshold, margin = thresholds[step["rung"]], step["margin"]
        if (
            threshold is not None
            and margin is not None
            and margin != threshold
            and abs(margin - threshold) < 2 * TOLERANCE
        ):
            return False
    return True


# --- cases of the latency governor --------------------------------------------------------------------------------


def latency_cases() -> Iterator[dict[str, Any]]:
    """The edges of the latency governor, on a ladder of three rungs that take 2, 4 and 8 ms."""
    cool, slow = (10.0, 1.0), (10.0, 2.0)
    """A target of 10 ms on a device as fast as its table, and on one that takes twice as long."""
    for name, answers in {
        "all fit": [cool] * 3,
        "a target that is met exactly": [(8.0, 1.0), (4.0, 1.0), (2.0, 1.0)],
        "none fits": [(1.0, 1.0)] * 2,
        "a long question and little time": [(5.0, 1.0, 13), (5.0, 1.0, 9), (5.0, 1.0, 5), (3.0, 1.0, 9)],
        "one slow answer changes nothing": [cool] * 3 + [(10.0, 20.0)] + [cool] * 3,
        "slower, and back": [cool] * 3 + [slow] * 6 + [cool] * 20,
        "slower than any rung": [(3.0, 1.0)] * 2 + [(3.0, 3.0)] * 6 + [(3.0, 1.0)] * 16,
        "slower twice: the second pause is longer": ([slow] * 5 + [cool] * 12) * 2 + [cool] * 12,
        "a calm device forgets": [slow] * 5 + [cool] * 40 + [slow] * 5 + [cool] * 12,
        "hardly slower: up only with room to spare": [(9.0, 1.2)] * 6 + [(9.0, 1.1)] * 16 + [(9.0, 1.0)] * 6,
        "a shorter target is no reason to pause": [cool, (3.0, 1.0)] * 4 + [slow] * 5 + [cool] * 14,
        "more time ends a pause": [slow] * 5 + [(40.0, 2.0), cool],
        "a pause does not hold a long question back": [cool] * 2 + [(10.0, 3.0)] * 4 + [(10.0, 1.0, 9)] * 6,
        "faster than its table": [(5.0, 0.5)] * 8,
    }.items():
        yield _latency_case(name, answers)
    broken = [{"observe": {"rung": "full", "ms": ms}} for ms in ("NaN", "Infinity", 0.0, -1.0)]
    yield _latency_case("times that are none are ignored", [cool], events=[*broken, _choose(10.0, 5)])
    yield _latency_case("the full rung alone is slow: tried ever more rarely", [slow] * 80, slow_rungs=("full",))
    policy = LatencyPolicy(window=4, hysteresis=1.0, patience=6, back_off=2.5, max_patience=14)
    yield _latency_case("another policy", [slow] * 60, policy=policy, slow_rungs=("full",))


def _latency_case(
    name: str,
    answers: Sequence[tuple[float, float] | tuple[float, float, int]],
    policy: LatencyPolicy | None = None,
    slow_rungs: Sequence[str] = tuple(TIMES_MS),
    events: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Questions in turn, each (target in ms, how much slower `slow_rungs` are, tokens), then further `events`."""
    rungs = [{"name": rung, "num_words": WORDS[rung], "ms": ms} for rung, ms in TIMES_MS.items()]
    case: dict[str, Any] = {"id": f"latency: {name}", "kind": "latency", "rungs": rungs}
    case |= {"policy": (policy or LatencyPolicy()).model_dump(), "events": []}
    for target_ms, slower, *tokens in answers:
        case["events"].append(_choose(target_ms, int(tokens[0]) if tokens else 5))
        rung = play_latency(case)[-1]["rung"]
        took_ms = TIMES_MS[rung] * (slower if rung in slow_rungs else 1.0)
        case["events"].append({"observe": {"rung": rung, "ms": took_ms}})
    case["events"] += events
    return {**case, "expected": play_latency(case)}


def _choose(target_ms: float, num_tokens: int) -> dict[str, Any]:
    return {"choose": {"target_ms": target_ms, "num_tokens": num_tokens}}


# --- helpers ------------------------------------------------------------------------------------------------------


def _golden(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    arrays, _ = read_golden(folder)
    logits = {name.removeprefix("logits_"): rows for name, rows in arrays.items() if name.startswith("logits_")}
    return logits, arrays["input_ids"]


def _governor(case: Mapping[str, Any]) -> Governor:
    """What the state machines need of a governor; the last rung's threshold is 0 where the case gives none."""
    fields = [
        {name: rung[name] for name in ("name", "num_words", "threshold") if name in rung} for rung in case["rungs"]
    ]
    fields[-1].setdefault("threshold", 0.0)
    return Governor(
        model_hash="",
        rungs=tuple(GovernorRung.model_validate(rung) for rung in fields),
        margin=MarginDefinition(temperature=case.get("temperature", 1.0)),
        latency=LatencyPolicy.model_validate(case.get("policy", {})),
        epsilon=0.01,
        delta=0.1,
        certified=True,
    )


def _same(expected: Mapping[str, Any], got: Mapping[str, Any]) -> bool:
    return expected.keys() == got.keys() and all(_equal(expected[name], got[name]) for name in expected)


def _equal(expected: Any, got: Any) -> bool:
    if isinstance(expected, float) and isinstance(got, float):
        return abs(expected - got) <= TOLERANCE
    return expected == got
