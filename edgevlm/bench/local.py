"""Measure a bundle on this machine: one fresh process per exported model, so that a crash costs its own rows only."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgevlm.artifacts import Bundle, DeviceReport, ExportedModel, LatencyRow, Provenance
from edgevlm.bench import runner
from edgevlm.bench.facts import device_facts
from edgevlm.bench.stats import summarise
from edgevlm.manifests import read_manifest
from edgevlm.progress import Reporter
from edgevlm.recipe import BenchSection
from targets import runtime

REFERENCE = ("pytorch", "fp32")
"""Target and precision of the baseline rows: the same programs in eager PyTorch."""


def bench_bundle(
    bundle_dir: Path,
    settings: BenchSection,
    provenance: Provenance,
    reporter: Reporter | None = None,
    *,
    checkpoint_dir: Path | None = None,
    raw_dir: Path | None = None,
    timeout_s: float = 600.0,
) -> DeviceReport:
    """Time every model of a bundle on this machine.

    Args:
        bundle_dir: the bundle's folder.
        settings: threads, warm-up and number of runs.
        provenance: of the report.
        reporter: told about progress.
        checkpoint_dir: adds baseline rows, `pytorch` `fp32`, of this checkpoint.
        raw_dir: also writes what each process measured, run by run, as `<target>_<precision>.json`.
        timeout_s: a model that takes longer is stopped, and its rows say so.

    Returns:
        One row per model and rung, and per rung of what could not be exported; a row without numbers has a reason.

    Raises:
        BundleError: the bundle is not whole.
    """
    reporter = reporter or Reporter()
    bundle = read_manifest(bundle_dir, Bundle)
    rungs = [rung.name for rung in bundle.rungs]
    rows: list[LatencyRow] = []
    with reporter.bar("bench", len(bundle.models) + (checkpoint_dir is not None)) as bar:
        if checkpoint_dir is not None:
            rows += bench_reference(checkpoint_dir, bundle_dir, rungs, settings, raw_dir, timeout_s)
            bar.update(1, "pytorch fp32")
        for done, model in enumerate(bundle.models, start=1 + (checkpoint_dir is not None)):
            rows += bench_model(model, bundle_dir, rungs, settings, raw_dir, timeout_s)
            bar.update(done, f"{model.target} {model.precision}")
    for failure in bundle.failures:
        reason = f"not exported: {failure.reason}"
        rows += _without_numbers(failure.target, failure.precision, rungs, 0.0, reason)
    return DeviceReport(
        provenance=provenance,
        bundle_key=bundle.provenance.key,
        device=device_facts(settings.threads),
        rows=tuple(rows),
    )


def bench_model(
    model: ExportedModel,
    bundle_dir: Path,
    rungs: list[str],
    settings: BenchSection,
    raw_dir: Path | None = None,
    timeout_s: float = 600.0,
) -> list[LatencyRow]:
    """Time one exported model; one row per rung."""
    available, reason = runtime.runtime_status(model.target)
    if not available:
        return _without_numbers(model.target, model.precision, rungs, model.size_mb, reason)
    job = {
        "bundle": str(bundle_dir.resolve()),
        "target": model.target,
        "precision": model.precision,
        "programs": model.programs,
        "rungs": rungs,
        **settings.model_dump(),
    }
    with tempfile.TemporaryDirectory(prefix="edgevlm-bench-") as folder:
        # The two files run from a folder of their own, as they do on a device.
        for module in (runner, runtime):
            shutil.copy(str(module.__file__), folder)
        result = run_in_process([str(Path(folder) / "runner.py")], job, timeout_s)
    return _rows(model.target, model.precision, rungs, model.size_mb, result, raw_dir)


def bench_reference(
    checkpoint_dir: Path,
    bundle_dir: Path,
    rungs: list[str],
    settings: BenchSection,
    raw_dir: Path | None = None,
    timeout_s: float = 600.0,
) -> list[LatencyRow]:
    """Time a checkpoint in eager PyTorch on the bundle's golden cases; one row per rung."""
    job = {
        "bundle": str(bundle_dir.resolve()),
        "checkpoint": str(checkpoint_dir.resolve()),
        "rungs": rungs,
        **settings.model_dump(),
    }
    result = run_in_process(["-m", "edgevlm.bench.reference"], job, timeout_s)
    weights = checkpoint_dir / "model.safetensors"
    size_mb = weights.stat().st_size / 1e6 if weights.is_file() else 0.0
    return _rows(*REFERENCE, rungs, size_mb, result, raw_dir)


def run_in_process(arguments: list[str], job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run a measuring script in a fresh Python with `job` in a file as its last argument.

    Returns:
        The JSON object it printed, or `{"error": why there is none}`.
    """
    with tempfile.TemporaryDirectory(prefix="edgevlm-bench-") as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(job))
        command = [sys.executable, *arguments, str(job_file)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {timeout_s:g} s"}
    last_line = next(reversed(done.stderr.decode(errors="replace").split("\n")[:-1]), "").strip()
    if done.returncode < 0:
        return {"error": f"the process was killed by {signal.Signals(-done.returncode).name}"}
    if done.returncode:
        return {"error": last_line or f"the process ended with status {done.returncode}"}
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"error": "the process printed no result"}


def _rows(
    target: str, precision: str, rungs: list[str], size_mb: float, result: dict[str, Any], raw_dir: Path | None
) -> list[LatencyRow]:
    if raw_dir is not None:
        raw_dir.mkdir(parents=True, exist_ok=True)
        (raw_dir / f"{target}_{precision}.json").write_text(json.dumps(result) + "\n")
    if "error" in result:
        return _without_numbers(target, precision, rungs, size_mb, result["error"])
    rows = []
    for rung in rungs:
        encode_ms, answer_ms = result["encode_ms"][rung], result["answer_ms"][rung]
        both = summarise([encode + answer for encode, answer in zip(encode_ms, answer_ms, strict=True)])
        problems = result["problems"][rung]
        rows.append(
            LatencyRow(
                target=target,
                precision=precision,
                rung=rung,
                size_mb=size_mb,
                load_ms=result["load_ms"],
                first_ms=result["first_encode_ms"] + result["first_answer_ms"][rung],
                encode_p50_ms=summarise(encode_ms).p50_ms,
                answer_p50_ms=summarise(answer_ms).p50_ms,
                p50_ms=both.p50_ms,
                p90_ms=both.p90_ms,
                num_runs=both.num_runs,
                peak_memory_mb=result["peak_memory_mb"],
                outputs_checked=not problems,
                reason=f"the timed answers differ from the golden ones: {'; '.join(problems)}" if problems else "",
            )
        )
    return rows


def _without_numbers(target: str, precision: str, rungs: list[str], size_mb: float, reason: str) -> list[LatencyRow]:
    return [LatencyRow(target=target, precision=precision, rung=rung, size_mb=size_mb, reason=reason) for rung in rungs]
