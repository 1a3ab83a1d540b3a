"""The governor's two state machines: properties on random sequences, a second implementation, and mistakes that golden cases find."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.risk import Answers, govern, margins
from edgevlm.artifacts import (
    Bundle,
    DeviceFacts,
    DeviceReport,
    ExportedModel,
    Governor,
    GovernorEvidence,
    GovernorRung,
    LatencyPolicy,
    LatencyRow,
    Provenance,
    Rung,
)
from edgevlm.errors import BundleError, EdgeVLMError, GovernorError, LatencyError
from edgevlm.manifests import read_manifest
from targets import governor_golden
from targets.governor import (
    FILE,
    LatencyGovernor,
    MarginGovernor,
    governed_answer,
    read_governor,
    rung_times,
    timed_answer,
)
from targets.governor_golden import (
    TOLERANCE,
    check_governor_golden,
    latency_cases,
    margin_cases,
    play_latency,
    play_margin,
    write_governor_golden,
)
from targets.runtime import Arrays
from tests.edgevlm.tiny import LABELS, SPEC, TOKENIZER, tiny_vlm
from tests.targets import json_schema

ROOT = Path(__file__).parents[2]
NAMES = ("small", "medium", "full")
TIMES_MS = {"small": 2.0, "medium": 4.0, "full": 8.0}


def governor_of(
    thresholds: tuple[float | None, ...] = (0.6, 0.3, 0.0),
    num_words: tuple[int | None, ...] = (6, 9, None),
    **rest: Any,
) -> Governor:
    rungs = tuple(
        GovernorRung(name=name, num_words=words, threshold=threshold, gmacs=place + 1.0)
        for place, (name, words, threshold) in enumerate(zip(NAMES, num_words, thresholds, strict=True))
    )
    fields = {"model_hash": "m0", "rungs": rungs, "epsilon": 0.01, "delta": 0.1, "certified": True}
    return Governor.model_validate(fields | rest)


# --- by the margin ------------------------------------------------------------------------------------------------

threshold = st.one_of(st.none(), st.floats(0, 1))
logit = st.one_of(st.floats(-20, 20), st.sampled_from([math.nan, math.inf, -math.inf]))


@settings(max_examples=300)
@given(
    thresholds=st.tuples(threshold, threshold),
    num_tokens=st.integers(1, 12),
    logits=st.lists(st.lists(logit, min_size=3, max_size=3), min_size=3, max_size=3),
)
def test_it_decides_as_the_calibration_does(
    thresholds: tuple[float | None, ...], num_tokens: int, logits: list[list[float]]
) -> None:
    """Question by question, the state machine against the arithmetic on whole arrays that thresholds are certified by."""
    governor = governor_of((*thresholds, 0.0))
    machine, started = MarginGovernor(governor), []
    rung: str | None = machine.start(num_tokens)
    while rung is not None:
        started.append(rung)
        rung = machine.next(rung, logits[NAMES.index(rung)])
    answers = Answers(
        margins_RQ=np.array([margins(np.array([row])) for row in logits]),
        scores_RQ=np.zeros((3, 1)),
        reads_RQ=np.array([[num_tokens <= (rung.num_words or num_tokens)] for rung in governor.rungs]),
        units_Q=np.zeros(1, int),
        gmacs_R=np.array([1.0, 2.0, 3.0]),
        names=NAMES,
    )
    outcome = govern(answers, (*thresholds, 0.0))
    assert started[-1] == NAMES[outcome.rung_Q[0]]
    assert sum(NAMES.index(rung) + 1 for rung in started) == outcome.gmacs_Q[0]
    assert started == sorted(set(started), key=NAMES.index), "it only climbs, and no rung answers twice"


@settings(max_examples=200)
@given(
    logits=st.lists(st.lists(logit, min_size=2, max_size=2), min_size=3, max_size=3),
    max_ms=st.floats(0, 30),
    times=st.tuples(*[st.floats(0.1, 20)] * 3),
)
def test_it_climbs_only_while_the_time_lasts(
    logits: list[list[float]], max_ms: float, times: tuple[float, ...]
) -> None:
    machine, expected, spent = MarginGovernor(governor_of((0.9, 0.9, 0.0))), dict(zip(NAMES, times, strict=True)), 0.0
    rung: str | None = machine.start(3)
    while rung is not None:
        spent += expected[rung]
        larger = machine.next(rung, logits[NAMES.index(rung)], max_ms - spent, expected)
        if larger is not None and machine.why != "not a number":
            assert spent + expected[larger] <= max_ms + 1e-9
        if larger is None and machine.why == "no time":
            beyond = NAMES[NAMES.index(rung) + 1 :]
            assert all(spent + expected[name] > max_ms - 1e-9 for name in beyond)
        if not np.isfinite(logits[NAMES.index(rung)]).all() and rung != "full":
            assert (larger, machine.why) == ("full", "not a number")
        rung = larger


# --- by the time --------------------------------------------------------------------------------------------------

event = st.one_of(
    st.tuples(st.just("choose"), st.floats(0.5, 40), st.integers(1, 12)),
    st.tuples(st.just("observe"), st.sampled_from(NAMES), st.floats(0.01, 200)),
)
policies = st.builds(
    LatencyPolicy,
    window=st.integers(1, 9),
    hysteresis=st.floats(1, 2),
    patience=st.integers(0, 20),
    back_off=st.floats(1, 4),
    max_patience=st.integers(0, 60),
)


@settings(max_examples=300)
@given(events=st.lists(event, min_size=1, max_size=60), policy=policies, times=st.tuples(*[st.floats(0.1, 20)] * 3))
def test_never_a_rung_that_does_not_fit_when_another_does(
    events: list[tuple[Any, ...]], policy: LatencyPolicy, times: tuple[float, ...]
) -> None:
    """Whatever was observed before, and whatever order the times have."""
    tabled = dict(zip(NAMES, times, strict=True))
    governor = governor_of(latency=policy)
    machine, observed = LatencyGovernor(governor, tabled), [1.0] * policy.window
    for kind, *values in events:
        if kind == "observe":
            machine.observe(*values)
            observed.append(values[1] / tabled[values[0]])
            continue
        target_ms, num_tokens = values
        choice = machine.choose(target_ms, num_tokens)
        scale = float(np.median(observed[-policy.window :]))
        reads = [rung.name for rung in governor.rungs if num_tokens <= (rung.num_words or num_tokens)]
        fitting = [name for name in reads if tabled[name] * scale <= target_ms]
        assert choice.rung in reads and choice.fits == bool(fitting)
        assert choice.expected_ms == pytest.approx(tabled[choice.rung] * scale)
        assert choice.rung in fitting if fitting else tabled[choice.rung] == min(tabled[name] for name in reads)


@pytest.mark.parametrize(("target_ms", "rung"), [(8.0, "full"), (7.9, "medium"), (4.0, "medium"), (3.0, "small")])
def test_on_a_cool_device_it_is_the_most_accurate_that_fits(target_ms: float, rung: str) -> None:
    machine = LatencyGovernor(governor_of(), TIMES_MS)
    assert [machine.choose(target_ms, 5).rung for _ in range(20)] == [rung] * 20


def run_device(policy: LatencyPolicy, slower: list[Callable[[str], float]], target_ms: float = 10.0) -> list[str]:
    """Rungs chosen on a device whose answers take so many times what the table says, one question after the other."""
    machine, chosen = LatencyGovernor(governor_of(latency=policy), TIMES_MS), []
    for factor in slower:
        chosen.append(machine.choose(target_ms, 5).rung)
        machine.observe(chosen[-1], TIMES_MS[chosen[-1]] * factor(chosen[-1]))
    return chosen


def switches(chosen: list[str]) -> int:
    return sum(a != b for a, b in zip(chosen, chosen[1:], strict=False))


def steady(factor: float) -> Callable[[str], float]:
    return lambda _rung: factor


def test_it_backs_off_within_half_a_window_and_recovers() -> None:
    policy = LatencyPolicy()
    chosen = run_device(policy, [steady(1.0)] * 10 + [steady(2.0)] * 50 + [steady(1.0)] * 60)
    assert chosen[:10] == ["full"] * 10
    assert chosen[10 + (policy.window + 1) // 2 : 60] == ["medium"] * (50 - (policy.window + 1) // 2)
    assert chosen[60 + (policy.window + 1) // 2 + 1 :] == ["full"] * (60 - (policy.window + 1) // 2 - 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_device_at_the_edge_does_not_make_it_oscillate(seed: int) -> None:
    """Full takes 10 ms +- 6 % and the target is 10 ms: without hysteresis and patience it would change all the time."""
    rng = np.random.default_rng(seed)
    noisy = [steady(float(factor)) for factor in rng.normal(1.25, 0.075, 600)]
    restless = LatencyPolicy(hysteresis=1.0, patience=0)
    assert switches(run_device(LatencyPolicy(), noisy)) <= 4
    assert switches(run_device(restless, noisy)) > 60


def test_a_rung_that_is_slow_by_itself_is_tried_ever_more_rarely() -> None:
    """The full rung alone is slow (memory, say): the small ones look cool, so only the pauses keep it away."""
    slow_full = [lambda rung: 2.0 if rung == "full" else 1.0] * 1000
    assert run_device(LatencyPolicy(), slow_full).count("full") < 50
    assert run_device(LatencyPolicy(back_off=1.0), slow_full).count("full") > 150


@pytest.mark.parametrize("hiccup", [3.0, 100.0, 1e6])
def test_two_slow_answers_in_a_row_change_nothing(hiccup: float) -> None:
    slower = [steady(1.0)] * 8 + [steady(hiccup)] * 2 + [steady(1.0)] * 8
    assert run_device(LatencyPolicy(), slower) == ["full"] * 18


# --- golden cases -------------------------------------------------------------------------------------------------


@pytest.fixture
def cases_dir(tmp_path: Path) -> Path:
    """A folder with golden logits, and the governor's cases made from them."""
    rng = np.random.default_rng(0)
    (tmp_path / "golden").mkdir()
    arrays = {f"logits_{name}": rng.normal(0, 2, (6, 5)).astype(np.float32) for name in reversed(NAMES)}
    np.savez(tmp_path / "golden" / "golden.npz", input_ids=np.ones((6, 12), np.int32), **arrays)  # pyright: ignore
    (tmp_path / "golden" / "golden.json").write_text("{}")
    write_governor_golden(tmp_path, governor_of(num_words=(6, None, None)), TOKENIZER.pad_id)
    return tmp_path


def test_golden_cases_pass_and_a_changed_decision_is_noticed(cases_dir: Path) -> None:
    assert check_governor_golden(cases_dir) == []
    path = cases_dir / governor_golden.FILE
    description = json.loads(path.read_text())
    names = [case["id"] for case in description["cases"]]
    assert len(set(names)) == len(names) and sum("golden" in name for name in names) == 6
    for case in description["cases"]:
        case["expected"][-1]["rung"] = "other"
    path.write_text(json.dumps(description))
    assert len(check_governor_golden(cases_dir)) == len(names)
    path.write_text("{")
    with pytest.raises(BundleError, match="Export the bundle again"):
        check_governor_golden(cases_dir)


def test_golden_cases_are_plain_json_whose_decisions_no_rounding_changes(cases_dir: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    cases = json.loads((cases_dir / governor_golden.FILE).read_text(), parse_constant=refuse)["cases"]
    for case in (case for case in cases if case["kind"] == "margin"):
        for rung, step in ((r, s) for s in case["expected"] for r in case["rungs"] if r["name"] == s["rung"]):
            if rung["threshold"] is not None and step["margin"] not in (None, rung["threshold"]):
                assert abs(step["margin"] - rung["threshold"]) > TOLERANCE


MISTAKES: dict[str, tuple[str, str]] = {
    "a threshold that must be exceeded": ("self.margin >= threshold", "self.margin > threshold"),
    "the next rung after a NaN": ("return self.rungs[-1].name", "return self.rungs[place + 1].name"),
    "a rung without threshold is started": ("return rung.threshold is not None and (", "return ("),
    "questions must be shorter than what a rung reads": (
        "self.num_tokens <= rung.num_words",
        "self.num_tokens < rung.num_words",
    ),
    "the budget is not looked at": ("expected_ms[larger.name] <= left_ms", "True"),
    "only the very next rung is considered": ("in self.rungs[place + 1 :]:", "in self.rungs[place + 1 : place + 2]:"),
    "the mean for the median": ("return median(self.ratios)", "return sum(self.ratios) / len(self.ratios)"),
    "a time must be below the target": ("ms * scale <= target_ms for", "ms * scale < target_ms for"),
    "no hysteresis": (" * self.policy.hysteresis", ""),
    "no pause": ("self.paused, self.paused_ms, self.calm = self.patience, target_ms, 0", "self.paused_ms = target_ms"),
    "every pause is equally long": ("self.patience * self.policy.back_off", "self.patience"),
    "patience has no limit": (
        "min(math.ceil(self.patience * self.policy.back_off), self.policy.max_patience)",
        "math.ceil(self.patience * self.policy.back_off)",
    ),
    "patience is never restored": ("if self.calm >= self.patience:", "if False:"),
    "a shorter target pauses": ("if self.times_ms[self.level] <= target_ms:", "if True:"),
    "more time does not end a pause": ("if target_ms > self.paused_ms:", "if False:"),
    "a pause holds long questions back": ("place = possible[0]", "place = possible[-1]"),
    "times that are none count": ("if math.isfinite(ms) and ms > 0:", "if True:"),
    "questions that are too long for a rung": ("if fits[place] and reads[place]]", "if fits[place]]"),
    "none fits: the first rung": ("key=lambda p: self.times_ms[p]", "key=lambda p: -self.times_ms[p]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_golden_cases_find_the_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an implementation in another language may get wrong, put into this one."""
    right, wrong = MISTAKES[mistake]
    source = (ROOT / "targets" / "governor.py").read_text()
    assert source.count(right) == 1, "the line is gone: say the mistake anew"
    changed: dict[str, Any] = {"__name__": "targets.governor"}
    exec(compile(source.replace(right, wrong), "mistaken governor", "exec"), changed)
    cases = [*margin_cases(), *latency_cases()]  # as the right one decides
    for name in ("MarginGovernor", "LatencyGovernor"):
        monkeypatch.setattr(governor_golden, name, changed[name])
    found = []
    for case in cases:
        try:
            got = (play_margin if case["kind"] == "margin" else play_latency)(case)
        except (ValueError, TypeError, StopIteration):  # a machine that breaks has failed the case as well
            got = None
        if got != case["expected"]:
            found.append(case["id"])
    assert found


# --- answering ----------------------------------------------------------------------------------------------------


class Fake:
    """A session that answers from given logits and counts its runs."""

    def __init__(self, logits: dict[str, list[float]]) -> None:
        self.logits, self.runs = logits, []

    def run(self, program: str, inputs: Any) -> Arrays:
        self.runs.append(program)
        assert set(inputs) == {"features", "input_ids"} and inputs["input_ids"].shape == (1, 12)
        return {"logits": np.array([self.logits[program.removeprefix("answer_")]], np.float32)}

    def close(self) -> None: ...


BUNDLE = Bundle(
    provenance=Provenance(stage="export", key="b0"),
    name="b",
    task="vqa",
    model=tiny_vlm().config,
    preprocess=SPEC,
    tokenizer=TOKENIZER,
    labels=LABELS,
    rungs=tuple(Rung(name=name, regions=(8,)) for name in reversed(NAMES)),
    models=(ExportedModel(target="onnx", precision="fp32", scheme="", programs={}, files=(), size_mb=1.0),),
    model_hash="m0",
)
REGIONS = {"features": np.zeros((1, 8, 4), np.float32)}
IDS = np.array([2, 7, 8, 3] + [0] * 8)


def test_only_the_fusion_is_repeated() -> None:
    session = Fake({"small": [0.1, 0.0], "medium": [9.0, 0.0], "full": [0.0, 9.0]})
    governed = governed_answer(session, BUNDLE, governor_of(), REGIONS, IDS)
    assert session.runs == ["answer_small", "answer_medium"]
    assert [(p.rung, p.why) for p in governed.passes] == [("small", "climb"), ("medium", "confident")]
    assert governed.rung == "medium" and governed.output["logits"].argmax() == 0


def test_a_nan_falls_back_to_the_full_rung() -> None:
    session = Fake({"small": [math.nan, 0.0], "medium": [9.0, 0.0], "full": [0.0, 9.0]})
    governed = governed_answer(session, BUNDLE, governor_of(), REGIONS, IDS)
    assert [(p.rung, p.margin is None, p.why) for p in governed.passes] == [
        ("small", True, "not a number"),
        ("full", False, "last"),
    ]


def test_a_limit_ends_the_climb_and_says_when_none_fits() -> None:
    session = Fake({name: [0.1, 0.0] for name in NAMES})
    slow = LatencyGovernor(governor_of(), {"small": 1e6, "medium": 2e6, "full": 3e6})
    governed = governed_answer(session, BUNDLE, governor_of(), REGIONS, IDS, latency=slow, max_ms=10.0)
    assert [p.why for p in governed.passes] == ["no time"] and not governed.fits
    timed = timed_answer(session, BUNDLE, LatencyGovernor(governor_of(), TIMES_MS), 5.0, REGIONS, IDS)
    assert timed.rung == "medium" and timed.fits and timed.passes[0].ms > 0


# --- files that do not belong together ----------------------------------------------------------------------------

HERE = DeviceFacts(name="phone", system="x", processor="A9", num_cores=4, memory_gb=2.0, threads=2)
ROWS = tuple(
    LatencyRow(target="onnx", precision="fp32", rung=name, size_mb=1.0, answer_p50_ms=ms)
    for name, ms in TIMES_MS.items()
)
REPORT = DeviceReport(provenance=Provenance(stage="bench", key="r0"), bundle_key="b0", device=HERE, rows=ROWS)


def times_of(report: DeviceReport, here: DeviceFacts = HERE) -> dict[str, float]:
    return rung_times(report, BUNDLE, BUNDLE.models[0], here, Path("bundle"))


def test_times_of_this_device_are_taken() -> None:
    assert times_of(REPORT) == TIMES_MS
    elsewhere = HERE.model_copy(update={"system": "y", "memory_gb": 3.0})
    assert times_of(REPORT, elsewhere) == TIMES_MS, "an update of the system is no other device"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bundle_key": "b1"}, "measured on another bundle than bundle"),
        ({"device": HERE.model_copy(update={"name": "tablet"})}, "of 'tablet', A9, 2 threads, and this is 'phone'"),
        ({"device": HERE.model_copy(update={"processor": "A8"})}, "of 'phone', A8, 2 threads, and this is 'phone', A9"),
        ({"device": HERE.model_copy(update={"threads": 1})}, "of 'phone', A9, 1 threads, and this is"),
        ({"rows": ROWS[:2]}, r"no time of onnx fp32 full \(no such row\)"),
        (
            {"rows": (*ROWS[:2], ROWS[2].model_copy(update={"answer_p50_ms": None, "reason": "it crashed"}))},
            "it crashed",
        ),
        ({"rows": (*ROWS[:2], ROWS[2].model_copy(update={"latency_valid": False}))}, "emulation"),
    ],
)
def test_another_latency_table_is_refused_with_the_command_that_measures(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(LatencyError, match=says) as caught:
        times_of(REPORT.model_copy(update=changes))
    assert "edgevlm bench bundle --out latency --threads 2" in caught.value.fix
    assert isinstance(caught.value, EdgeVLMError)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "has no governor.json"),
        ("{", "is not a governor of this version"),
        (governor_of(model_hash="m1").model_dump_json(), r"calibrated for another model \(hash m1, this one's is m0\)"),
        (governor_of().model_dump_json().replace('"schema_version":1', '"schema_version":2'), "schema_version"),
        (governor_of().model_dump_json().replace('"epsilon"', '"epsilom"'), "epsilo"),
        (governor_of().model_dump_json().replace('"threshold":0.6', '"threshold":1.6'), r"rungs\.0\.threshold"),
        (governor_of().model_dump_json().replace('"threshold":0.0', '"threshold":0.2'), "last rung must read every"),
        (governor_of().model_dump_json().replace('"small"', '"full"'), "two rungs have the same name"),
    ],
)
def test_a_governor_that_does_not_fit_is_refused(text: str | None, says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(GovernorError, match=says) as caught:
        read_governor(tmp_path, BUNDLE)
    assert "govern" in caught.value.fix


def test_a_bundle_of_an_earlier_version_has_no_hash_and_takes_no_governor(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(governor_of().model_dump_json())
    with pytest.raises(GovernorError, match="this one's is unknown"):
        read_governor(tmp_path, BUNDLE.model_copy(update={"model_hash": ""}))


# --- the schema ---------------------------------------------------------------------------------------------------

EVIDENCE = GovernorEvidence(
    num_units=300,
    num_questions=1200,
    least_units=232,
    num_tuning_units=290,
    loss=0.001,
    loss_questions=0.002,
    p_value=0.03,
    tested=41,
    accuracy=0.7,
    accuracy_full=0.71,
    gmacs=1.5,
    gmacs_full=3.0,
    answered_by={"small": 0.6, "medium": 0.3, "full": 0.1},
)


def test_the_schema_in_the_docs_is_the_artifacts() -> None:
    written = json.loads((ROOT / "docs" / "governor.schema.json").read_text())
    assert written == Governor.model_json_schema(mode="serialization"), "put what this gives there"


def test_what_is_written_follows_the_schema() -> None:
    schema = json.loads((ROOT / "docs" / "governor.schema.json").read_text())
    for governor in (governor_of(), governor_of((None, None, 0.0), evidence=EVIDENCE, certified=False)):
        assert list(json_schema.problems(json.loads(governor.model_dump_json()), schema)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("rungs", 0, "threshold"), 1.5),
        (("rungs", 0, "num_words"), 0),
        (("rungs",), []),
        (("margin", "kind"), "entropy"),
        (("margin", "temperature"), 0.0),
        (("latency", "window"), 0),
        (("latency", "hysteresis"), 0.9),
        (("epsilon",), 0.0),
        (("certified",), "yes"),
        (("surprise",), 1),
        (("model_hash",), None),
    ],
)
def test_schema_and_reader_refuse_the_same(path: tuple[Any, ...], value: Any) -> None:
    document = json.loads(governor_of(evidence=EVIDENCE).model_dump_json())
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert list(json_schema.problems(document, json.loads((ROOT / "docs" / "governor.schema.json").read_text())))
    with pytest.raises(ValueError, match="validation error"):
        Governor.model_validate_json(json.dumps(document))


def test_manifests_of_before_read_without_a_hash(tmp_path: Path) -> None:
    fields = json.loads(BUNDLE.model_dump_json())
    del fields["model_hash"]
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    assert read_manifest(tmp_path, Bundle).model_hash == ""
