"""The scorecard's table, once: terminal, Markdown and page show the same columns and the same text."""

from collections.abc import Callable
from dataclasses import dataclass

from edgevlm.artifacts import Scorecard, ScoreRow
from edgevlm.report.scorecard import REFERENCE_TARGET

NONE = "–"
"""What a cell without a number shows."""

P50 = "p50 ms"
"""Title of the column that carries the mark of the Pareto front."""

TARGET_NAMES = {
    "pytorch": "PyTorch",
    "onnx": "ONNX",
    "tflite": "TFLite",
    "openvino": "OpenVINO",
    "coreml": "Core ML",
}
"""Target -> how people write it."""


@dataclass(frozen=True)
class Column:
    """One column: how a row's cell reads, and what it sorts by."""

    title: str
    help: str
    text: Callable[[ScoreRow], str]
    value: Callable[[ScoreRow], float | str | None]
    number: bool = True
    """Right-aligned."""
    wide_only: bool = False
    """Left out where there is little room (a narrow terminal)."""


def target_name(target: str) -> str:
    """A target as people write it."""
    return TARGET_NAMES.get(target, target)


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def three_digits(value: float | None) -> str:
    """About three digits, no exponent; good for megabytes as well."""
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def percent(value: float | None) -> str:
    """One decimal place, without the sign."""
    return _number(None if value is None else 100 * value, ".1f")


def half_width(row: ScoreRow) -> float | None:
    """Half of the metric's confidence interval, 0..1."""
    interval = row.parity.metric_ci
    return None if interval is None else (interval[1] - interval[0]) / 2


def _metric(row: ScoreRow) -> str:
    margin = half_width(row)
    return percent(row.parity.metric) + (f" ± {percent(margin)}" if margin is not None else "")


def _verdict(row: ScoreRow) -> str:
    return "reference" if row.parity.target == REFERENCE_TARGET else row.parity.verdict


def _p50(row: ScoreRow) -> str:
    text = three_digits(row.latency.p50_ms)
    return text if row.latency.latency_valid or row.latency.p50_ms is None else f"({text})"


def _evidence(row: ScoreRow) -> str:
    return NONE if row.parity.target == REFERENCE_TARGET else row.parity.evidence


def _words(title: str, help: str, text: Callable[[ScoreRow], str]) -> Column:
    return Column(title, help, text, text, number=False)


def _numbers(
    title: str,
    help: str,
    value: Callable[[ScoreRow], float | None],
    form: Callable[[float | None], str],
    *,
    wide_only: bool = False,
) -> Column:
    return Column(title, help, lambda row: form(value(row)), value, wide_only=wide_only)


def columns(metric_name: str) -> tuple[Column, ...]:
    """The columns of a scorecard whose task metric has this name."""
    return (
        _words("target", "runtime", lambda r: target_name(r.parity.target)),
        _words("precision", "form of the weights", lambda r: r.parity.precision),
        _words("rung", "token budget", lambda r: r.parity.rung),
        _numbers("MB", "size of the files, 1e6 bytes", lambda r: r.latency.size_mb or None, three_digits),
        _words("evidence", "what the verdict rests on", _evidence),
        _words("verdict", "parity with PyTorch", _verdict),
        _numbers("max |Δ|", "largest logit difference", lambda r: r.parity.max_abs_logits, _scientific, wide_only=True),
        _numbers("agree %", "same answer as PyTorch", lambda r: r.parity.agreement, percent, wide_only=True),
        Column(f"{metric_name} %", "with half of its 95 % interval", _metric, lambda r: r.parity.metric),
        _numbers("load ms", "files to ready", lambda r: r.latency.load_ms, three_digits, wide_only=True),
        _numbers("first ms", "first image and question", lambda r: r.latency.first_ms, three_digits, wide_only=True),
        Column(P50, "pixels to answer, warm, median", _p50, lambda r: r.latency.p50_ms),
        _numbers("p90 ms", "nine of ten are faster", lambda r: r.latency.p90_ms, three_digits, wide_only=True),
        _numbers("peak MB", "memory of a process with only this model", _peak, _whole, wide_only=True),
    )


def _peak(row: ScoreRow) -> float | None:
    return row.latency.peak_memory_mb


def _scientific(value: float | None) -> str:
    return _number(value, ".1e")


def _whole(value: float | None) -> str:
    return _number(value, ".0f")


LEGEND: tuple[tuple[str, str], ...] = (
    ("rung", "one static token budget; all rungs of a file share its weights"),
    (
        "evidence",
        "what a verdict rests on: device > runtime (the target's own, on this machine) > emulated > reference "
        "evaluator > none (converted, never run)",
    ),
    ("verdict", "passed or failed against PyTorch on the same samples; unproven where there is no evidence"),
    ("max |Δ|", "largest difference between a logit of the file and PyTorch's, pixels to logits"),
    ("agree %", "share of samples with the same answer as PyTorch"),
    ("±", "half of the 95 % confidence interval; differences within it mean nothing"),
    ("load, first", "from files to ready, then the first image and question, in a fresh process"),
    ("p50, p90", "median and tail of image plus question, warm, one after the other"),
    ("peak MB", "resident memory of a process that holds only this model, Python and the runtime included"),
    ("Pareto", "no file that passed is both faster and more accurate"),
    ("(…) ms", "measured where time means nothing, for example in emulation"),
)
"""Term -> meaning, for readers who were not there."""


def reasons(row: ScoreRow) -> tuple[str, ...]:
    """Why a row failed, is unproven, or has no numbers; each reason once."""
    return tuple(dict.fromkeys(reason for reason in (*row.parity.reasons, row.latency.reason) if reason))


def grouped_reasons(scorecard: Scorecard) -> list[tuple[str, str]]:
    """(rows, reason) with rows of one reason put together: `("Core ML fp32: full, b10", "needs macOS")`."""
    groups: dict[str, dict[str, list[str]]] = {}
    for row in scorecard.rows:
        model = f"{target_name(row.parity.target)} {row.parity.precision}"
        for reason in reasons(row):
            groups.setdefault(reason, {}).setdefault(model, []).append(row.parity.rung)
    return [
        ("; ".join(f"{model}: {', '.join(rungs)}" for model, rungs in models.items()), reason)
        for reason, models in groups.items()
    ]


def reproduce(scorecard: Scorecard) -> list[tuple[str, str]]:
    """(what, command) pairs that make the numbers again."""
    run, threads = f"runs/{scorecard.name}", scorecard.device.threads
    checkpoint = f"--checkpoint {run}/trim"
    data = "" if scorecard.provenance.dataset in {"", "scenes"} else " --data FOLDER"  # scenes are drawn
    return [
        ("Everything, from the data to this page", f"edgevlm run {scorecard.name} --out {run}{data}"),
        ("Evidence, verdict, differences, agreement, accuracy", f"edgevlm verify {run}/export {checkpoint}{data}"),
        ("Load, first, p50, p90, peak memory", f"edgevlm bench {run}/export {checkpoint} --threads {threads}"),
        (
            "One row by hand: name its target, precision and rung",
            f'edgevlm ask {run}/export IMAGE "QUESTION" --target {_example(scorecard)}',
        ),
    ]


def _example(scorecard: Scorecard) -> str:
    rows = [row for row in scorecard.rows if row.pareto] or list(scorecard.rows)
    if not rows:
        return "onnx"
    parity = rows[0].parity
    return f"{parity.target} --precision {parity.precision} --rung {parity.rung}"


def machine(scorecard: Scorecard) -> str:
    """The device in one line."""
    device = scorecard.device
    threads = f"{device.threads} thread{'s' if device.threads > 1 else ''}"
    return f"{device.processor}, {threads} of {device.num_cores} cores, {device.memory_gb:.0f} GB, {device.system}"


def day(scorecard: Scorecard) -> str:
    """When the scorecard was made, to the day."""
    return scorecard.provenance.created[:10]


def summary(scorecard: Scorecard) -> str:
    """One line: how many rows passed, failed, are unproven."""
    verdicts = [row.parity.verdict for row in scorecard.rows if row.parity.target != REFERENCE_TARGET]
    counts = [(verdicts.count(verdict), verdict) for verdict in ("passed", "failed", "unproven")]
    return f"{len(verdicts)} rows: " + ", ".join(f"{count} {verdict}" for count, verdict in counts if count)
