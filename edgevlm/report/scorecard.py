"""Join parity and latency into one row per target x rung x precision, and find the Pareto front."""

from collections.abc import Iterable, Mapping

from edgevlm.artifacts import (
    Bundle,
    DeviceReport,
    Gate,
    LatencyRow,
    ParityReport,
    ParityRow,
    Provenance,
    Scorecard,
    ScoreRow,
)

REFERENCE_TARGET = "pytorch"
"""Target name of the baseline rows; they are shown and compared with, but are no candidates for the Pareto front."""

Key = tuple[str, str, str]
"""Target, precision, rung."""


def join(
    parity: ParityReport,
    latency: DeviceReport,
    bundle: Bundle,
    training: Mapping[str, float],
    stage_seconds: Mapping[str, float],
    gates: tuple[Gate, ...],
    provenance: Provenance,
) -> Scorecard:
    """The scorecard of a bundle.

    Every model, export failure, parity row and latency row appears: what was not verified or not measured says so in
    its row instead of being left out.

    Args:
        parity: how close each file is to PyTorch.
        latency: what was measured, baseline rows included.
        bundle: decides names, sizes and the order of rungs.
        training: stage -> task metric on the test split, 0..1.
        stage_seconds: stage -> wall time.
        gates: promises of the run.
        provenance: of the scorecard.
    """
    parities = {(row.target, row.precision, row.rung): row for row in parity.rows}
    latencies = {(row.target, row.precision, row.rung): row for row in latency.rows}
    models = [(model.target, model.precision) for model in bundle.models]
    failures = [(failure.target, failure.precision) for failure in bundle.failures]
    exported = [(*model, rung.name) for model in (*models, *failures) for rung in bundle.rungs]
    keys = _ordered({*parities, *latencies, *exported}, exported, bundle)
    rows = [
        ScoreRow(
            parity=parities.get(key) or _parity_of(key, bundle, parity),
            latency=latencies.get(key) or _latency_of(key, bundle),
        )
        for key in keys
    ]
    return Scorecard(
        provenance=provenance,
        name=bundle.name,
        task=bundle.task,
        metric_name=parity.metric_name,
        majority=parity.majority,
        device=latency.device,
        training=dict(training),
        stage_seconds=dict(stage_seconds),
        rows=with_pareto(rows),
        gates=gates,
    )


def with_pareto(rows: Iterable[ScoreRow]) -> tuple[ScoreRow, ...]:
    """The rows with `pareto` set on those that no other eligible row beats.

    Eligible is an exported file that passed parity and has a metric and a valid time whose answers were checked. A
    row is beaten by one that is at least as fast and as accurate, and better in one of the two.
    """
    rows = list(rows)
    points = [point for row in rows if (point := _point(row)) is not None]

    def beaten(ms: float, metric: float) -> bool:
        return any(a <= ms and b >= metric and (a < ms or b > metric) for a, b in points)

    return tuple(
        row.model_copy(update={"pareto": (point := _point(row)) is not None and not beaten(*point)}) for row in rows
    )


def _point(row: ScoreRow) -> tuple[float, float] | None:
    parity, latency = row.parity, row.latency
    if parity.target == REFERENCE_TARGET or parity.verdict != "passed" or parity.metric is None:
        return None
    if latency.p50_ms is None or not latency.latency_valid or not latency.outputs_checked:
        return None
    return latency.p50_ms, parity.metric


def _ordered(keys: set[Key], exported: list[Key], bundle: Bundle) -> list[Key]:
    """Baseline first, then the bundle's order of models, the largest budget first."""
    models = list(dict.fromkeys((target, precision) for target, precision, _ in exported))
    targets = list(dict.fromkeys(target for target, _ in models))
    rungs = [rung.name for rung in bundle.rungs]

    def place(key: Key) -> tuple[object, ...]:
        target, precision, rung = key
        return (
            target != REFERENCE_TARGET,
            targets.index(target) if target in targets else len(targets),
            models.index((target, precision)) if (target, precision) in models else len(models),
            rungs.index(rung) if rung in rungs else len(rungs),
            key,
        )

    return sorted(keys, key=place)


def _parity_of(key: Key, bundle: Bundle, parity: ParityReport) -> ParityRow:
    """The row of something that `verify` did not report on."""
    target, precision, rung = key
    if target == REFERENCE_TARGET:
        # The reference agrees with itself; its metric was measured on the same samples as that of the files.
        same_rung = [row for row in parity.rows if row.rung == rung and row.reference_metric is not None]
        return ParityRow(
            target=target,
            precision=precision,
            rung=rung,
            evidence="runtime",
            verdict="passed",
            num_samples=max((row.num_samples for row in same_rung), default=0),
            metric=same_rung[0].reference_metric if same_rung else None,
            reference_metric=same_rung[0].reference_metric if same_rung else None,
        )
    reasons = _export_failures(key, bundle)
    return ParityRow(
        target=target,
        precision=precision,
        rung=rung,
        evidence="none",
        verdict="failed" if reasons else "unproven",
        reasons=reasons or ("not verified",),
    )


def _latency_of(key: Key, bundle: Bundle) -> LatencyRow:
    """The row of something that `bench` did not report on."""
    target, precision, rung = key
    sizes = [model.size_mb for model in bundle.models if (model.target, model.precision) == (target, precision)]
    return LatencyRow(
        target=target,
        precision=precision,
        rung=rung,
        size_mb=sizes[0] if sizes else 0.0,
        reason="; ".join(_export_failures(key, bundle)) or "not measured",
    )


def _export_failures(key: Key, bundle: Bundle) -> tuple[str, ...]:
    return tuple(f"not exported: {f.reason}" for f in bundle.failures if (f.target, f.precision) == key[:2])
