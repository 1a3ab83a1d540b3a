"""The governor at run time: which rung answers, by the time there is or by how sure the answer is (docs/governor.md).

Two small state machines, to be written again in other languages word by word: no clock, no randomness, nothing but
float64 arithmetic; `golden/governor.json` in a bundle holds cases for them. The image is encoded once; only the answer
program is started again.
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from pydantic import ValidationError

from calibration.risk import margins
from edgevlm.artifacts import Bundle, DeviceFacts, DeviceReport, ExportedModel, Governor, GovernorRung, answer_name
from edgevlm.errors import GovernorError, LatencyError
from targets.runtime import Arrays, Session

FILE = "governor.json"
"""In a bundle."""

Why = Literal["confident", "last", "climb", "not a number", "no time"]
"""Of a step of the margin governor: the answer is given because it is sure enough, because there is no larger rung, or
because none fits the time; or a larger rung is started because it is not sure enough, or no number at all."""


def read_governor(folder: Path, bundle: Bundle) -> Governor:
    """The governor of a bundle.

    Raises:
        GovernorError: there is none, it is malformed, or it was calibrated for another model.
    """
    path = folder / FILE
    again = "Export the checkpoint with a governor: `edgevlm run`, or `edgevlm export --governor FOLDER`"
    try:
        governor = Governor.model_validate_json(path.read_bytes())
    except FileNotFoundError as problem:
        raise GovernorError(f"{folder} has no {FILE}", again) from problem
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise GovernorError(f"{path} is not a governor of this version ({where}: {first['msg']})", again) from problem
    check_governor(governor, bundle.model_hash, str(path))
    return governor


def check_governor(governor: Governor, expected_hash: str, where: str) -> None:
    """Refuse a governor of another model.

    Raises:
        GovernorError: its hash is not `expected_hash`.
    """
    if governor.model_hash != expected_hash:
        raise GovernorError(
            f"{where} was calibrated for another model (hash {governor.model_hash}, this one's is "
            f"{expected_hash or 'unknown'}): its thresholds mean nothing here",
            "Take the governor of this model's own run, or calibrate one: stage `govern` of `edgevlm run`",
        )


def rung_times(
    report: DeviceReport, bundle: Bundle, model: ExportedModel, here: DeviceFacts, bundle_dir: Path
) -> dict[str, float]:
    """Milliseconds of every rung's answer program on this device.

    Args:
        report: of `edgevlm bench`.
        bundle: that is to be run.
        model: which of its files.
        here: this device, with as many threads as will run.
        bundle_dir: where the bundle lies, for the message.

    Raises:
        LatencyError: measured on another bundle or device, or without times of this model.
    """
    fix = f"Measure it here: edgevlm bench {bundle_dir} --out latency --threads {here.threads}"
    if report.bundle_key != bundle.provenance.key:
        raise LatencyError(f"The latency table was measured on another bundle than {bundle_dir}", fix)
    there = report.device
    if (there.name, there.processor, there.threads) != (here.name, here.processor, here.threads):
        raise LatencyError(f"The latency table is of {_device(there)}, and this is {_device(here)}", fix)
    rows = {row.rung: row for row in report.rows if (row.target, row.precision) == (model.target, model.precision)}
    times_ms: dict[str, float] = {}
    for rung in bundle.rungs:
        row = rows.get(rung.name)
        if row is None or not row.answer_p50_ms or not row.latency_valid:
            reason = "no such row" if row is None else row.reason or "the time means nothing (emulation)"
            what = f"The latency table has no time of {model.target} {model.precision} {rung.name} ({reason})"
            raise LatencyError(what, fix)
        times_ms[rung.name] = row.answer_p50_ms
    return times_ms


def _device(facts: DeviceFacts) -> str:
    return f"'{facts.name}', {facts.processor}, {facts.threads} threads"


class MarginGovernor:
    """Starts low, and climbs while the answer is not sure enough.

    Args:
        governor: of `governor.json`.
    """

    def __init__(self, governor: Governor) -> None:
        self.rungs, self.temperature = governor.rungs, governor.margin.temperature
        self._places = {rung.name: place for place, rung in enumerate(governor.rungs)}
        self.num_tokens = 0
        self.margin: float = math.nan
        """Of the last answer; NaN where a logit was not finite."""
        self.why: Why | None = None
        """Of the last step."""

    def start(self, num_tokens: int) -> str:
        """The first rung for a question of so many tokens: the cheapest that is ever started and reads it."""
        self.num_tokens, self.margin, self.why = num_tokens, math.nan, None
        return next(rung.name for rung in self.rungs if self._may_start(rung))

    def next(
        self,
        rung: str,
        logits: Sequence[float] | np.ndarray,
        left_ms: float | None = None,
        expected_ms: Mapping[str, float] | None = None,
    ) -> str | None:
        """The rung to start after `rung` answered with `logits`; None = its answer is given.

        With `left_ms` it climbs only to a rung whose expected time is left, except from logits that are not finite: such
        an answer is worth nothing, so the full rung is started whatever it takes.
        """
        place = self._places[rung]
        self.margin = float(margins(np.asarray(logits, np.float64)[None], self.temperature)[0])
        if place == len(self.rungs) - 1:
            self.why = "last"
            return None
        if math.isnan(self.margin):
            self.why = "not a number"
            return self.rungs[-1].name
        threshold = self.rungs[place].threshold
        if threshold is not None and self.margin >= threshold:
            self.why = "confident"
            return None
        for larger in self.rungs[place + 1 :]:
            in_time = left_ms is None or expected_ms is None or expected_ms[larger.name] <= left_ms
            if self._may_start(larger) and in_time:
                self.why = "climb"
                return larger.name
        self.why = "no time"
        return None

    def _may_start(self, rung: GovernorRung) -> bool:
        return rung.threshold is not None and (rung.num_words is None or self.num_tokens <= rung.num_words)


@dataclass(frozen=True)
class Choice:
    """What the latency governor chose."""

    rung: str
    expected_ms: float
    fits: bool
    """False: no rung fits, and this is the fastest that reads the question."""


class LatencyGovernor:
    """The most accurate rung whose time fits, on a device that may become slower and recover.

    Args:
        governor: of `governor.json`.
        times_ms: rung -> milliseconds of its answer program on this device, from `rung_times`.
    """

    def __init__(self, governor: Governor, times_ms: Mapping[str, float]) -> None:
        self.rungs, self.policy = governor.rungs, governor.latency
        self.times_ms = [times_ms[rung.name] for rung in self.rungs]
        self._places = {rung.name: place for place, rung in enumerate(governor.rungs)}
        self.ratios = deque([1.0] * self.policy.window, maxlen=self.policy.window)
        """Observed / tabled time of the last answers."""
        self.level: int | None = None
        """Place of the largest rung that may be chosen at present; None before the first choice."""
        self.patience = self.policy.patience
        """Choices that the next back-off will last."""
        self.paused = 0
        """Choices for which it does not climb yet ..."""
        self.paused_ms = 0.0
        """... as long as the target is no longer than this."""
        self.calm = 0
        """Choices since the last pause."""

    @property
    def scale(self) -> float:
        """How much slower than its table the device is."""
        return median(self.ratios)

    @property
    def expected_ms(self) -> dict[str, float]:
        """Rung -> time of its answer program as the device is now."""
        return {rung.name: ms * self.scale for rung, ms in zip(self.rungs, self.times_ms, strict=True)}

    def observe(self, rung: str, ms: float) -> None:
        """Learn from an answer that took `ms`; what is not a positive number is ignored."""
        tabled_ms = self.times_ms[self._places[rung]]
        if math.isfinite(ms) and ms > 0:
            self.ratios.append(ms / tabled_ms)

    def choose(self, target_ms: float, num_tokens: int) -> Choice:
        """The rung for a question of so many tokens that is to be answered within `target_ms`."""
        scale = self.scale
        fits = [ms * scale <= target_ms for ms in self.times_ms]
        self._set_level(target_ms, scale, fits)
        level = self.level or 0
        reads = [rung.num_words is None or num_tokens <= rung.num_words for rung in self.rungs]
        possible = [place for place in range(len(self.rungs)) if fits[place] and reads[place]]
        allowed = [place for place in possible if place <= level]
        if allowed:
            place = allowed[-1]
        elif possible:  # the rungs that are allowed do not read the question
            place = possible[0]
        else:
            place = min((p for p in range(len(self.rungs)) if reads[p]), key=lambda p: self.times_ms[p])
        return Choice(self.rungs[place].name, self.times_ms[place] * scale, bool(possible))

    def _set_level(self, target_ms: float, scale: float, fits: list[bool]) -> None:
        """Down at once; up with hysteresis, and after a back-off only when its pause is over."""
        top = max((place for place, fit in enumerate(fits) if fit), default=0)
        if self.level is None:
            self.level = top
        elif top < self.level:
            if self.times_ms[self.level] <= target_ms:  # not the target is short: the device became slower
                self.paused, self.paused_ms, self.calm = self.patience, target_ms, 0
                self.patience = min(math.ceil(self.patience * self.policy.back_off), self.policy.max_patience)
            self.level = top
        elif self.paused > 0:
            self.paused -= 1
            if target_ms > self.paused_ms:
                self._climb(target_ms, scale, top)
        else:
            self.calm += 1
            if self.calm >= self.patience:
                self.patience = self.policy.patience
            self._climb(target_ms, scale, top)

    def _climb(self, target_ms: float, scale: float, top: int) -> None:
        for place in range(top, self.level or 0, -1):
            if self.times_ms[place] * scale * self.policy.hysteresis <= target_ms:
                self.level = place
                return


@dataclass(frozen=True)
class Pass:
    """One start of an answer program."""

    rung: str
    ms: float
    margin: float | None
    """None where a logit was not finite, or the time alone decided."""
    why: Why | None
    """What came of it; None where the time alone decided."""


@dataclass(frozen=True)
class Governed:
    """An answer and how it came about."""

    output: Arrays
    """Of the last answer program."""
    passes: tuple[Pass, ...]
    fits: bool = True
    """False: a latency target was given, and no rung fits it."""

    @property
    def rung(self) -> str:
        return self.passes[-1].rung


def count_tokens(ids: np.ndarray, pad_id: int) -> int:
    """Tokens of a question that are not padding, [CLS] and [SEP] among them."""
    return int((np.asarray(ids) != pad_id).sum())


def governed_answer(
    session: Session,
    bundle: Bundle,
    governor: Governor,
    regions: Mapping[str, np.ndarray],
    ids: np.ndarray,
    *,
    latency: LatencyGovernor | None = None,
    max_ms: float | None = None,
) -> Governed:
    """Answer a question about an encoded image: start low and climb while the answer is not sure enough.

    Args:
        session: an opened model.
        bundle: its manifest.
        governor: of the bundle (`read_governor`).
        regions: what `encode_image` gave; it is not run again.
        ids: (L,) token ids.
        latency: learns from the times, and predicts them where there is a limit.
        max_ms: climb only while so much time lasts; needs `latency`.
    """
    machine, passes, spent_ms = MarginGovernor(governor), [], 0.0
    rung: str | None = machine.start(count_tokens(ids, bundle.tokenizer.pad_id))
    fits = latency is None or max_ms is None or latency.expected_ms[rung] <= max_ms
    output: Arrays = {}
    while rung is not None:
        output, ms = _run(session, rung, regions, ids)
        spent_ms += ms
        if latency is not None:
            latency.observe(rung, ms)
        left_ms = None if max_ms is None or latency is None else max_ms - spent_ms
        larger = machine.next(rung, output["logits"][0], left_ms, latency.expected_ms if latency else None)
        margin = None if math.isnan(machine.margin) else machine.margin
        passes.append(Pass(rung, ms, margin, machine.why))
        rung = larger
    return Governed(output, tuple(passes), fits)


def timed_answer(
    session: Session,
    bundle: Bundle,
    latency: LatencyGovernor,
    max_ms: float,
    regions: Mapping[str, np.ndarray],
    ids: np.ndarray,
) -> Governed:
    """Answer a question about an encoded image with the most accurate rung that fits `max_ms`."""
    choice = latency.choose(max_ms, count_tokens(ids, bundle.tokenizer.pad_id))
    output, ms = _run(session, choice.rung, regions, ids)
    latency.observe(choice.rung, ms)
    return Governed(output, (Pass(choice.rung, ms, None, None),), choice.fits)


def _run(session: Session, rung: str, regions: Mapping[str, np.ndarray], ids: np.ndarray) -> tuple[Arrays, float]:
    inputs = {**regions, "input_ids": np.asarray(ids, np.int32)[None]}
    start = time.perf_counter_ns()
    output = session.run(answer_name(rung), inputs)
    return output, (time.perf_counter_ns() - start) / 1e6
