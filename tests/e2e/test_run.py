"""`edgevlm run` as a user sees it: every row, every file, resume after SIGKILL, and a rerun of just what changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgevlm.artifacts import KINDS, Bundle, ParityReport, Scorecard
from edgevlm.manifests import read_manifest
from edgevlm.stages import STAGES
from tests.e2e.conftest import edgevlm

TARGETS, PRECISIONS, RUNGS = ("onnx", "tflite", "openvino", "coreml"), ("fp32", "int8"), ("full", "b5", "b3")


def test_scorecard_has_a_row_per_target_rung_and_precision(rehearsal: Path) -> None:
    scorecard = read_manifest(rehearsal / "scorecard", Scorecard)
    rows = {(row.parity.target, row.parity.precision, row.parity.rung) for row in scorecard.rows}
    assert {(t, p, r) for t in TARGETS for p in PRECISIONS for r in RUNGS} <= rows


def test_fp32_files_agree_with_pytorch_on_their_runtimes(rehearsal: Path) -> None:
    """1e-4 on logits, pixels to logits: float32 sums in another order, a hundred times below what moves an answer."""
    report = read_manifest(rehearsal / "verify", ParityReport)
    checked = [row for row in report.rows if row.precision == "fp32" and row.target != "coreml"]
    assert len(checked) == 9
    for row in checked:
        assert (row.evidence, row.verdict) == ("runtime", "passed"), row
        assert row.max_abs_logits is not None and row.max_abs_logits <= 1e-4, row


def test_core_ml_is_unproven_away_from_a_mac(rehearsal: Path) -> None:
    if sys.platform == "darwin":
        pytest.skip("on a Mac, Core ML is verified on its own runtime")
    report = read_manifest(rehearsal / "verify", ParityReport)
    rows = [row for row in report.rows if row.target == "coreml"]
    assert len(rows) == 6
    assert {(row.evidence, row.verdict) for row in rows} == {("none", "unproven")}


def test_latency_comes_from_checked_outputs(rehearsal: Path) -> None:
    scorecard = read_manifest(rehearsal / "scorecard", Scorecard)
    for row in scorecard.rows:
        if row.parity.target in ("onnx", "tflite", "openvino") and row.parity.precision == "fp32":
            assert row.latency.outputs_checked, row.latency
            assert row.latency.p50_ms and row.latency.load_ms and row.latency.peak_memory_mb, row.latency


def test_rungs_share_weights(rehearsal: Path) -> None:
    bundle = read_manifest(rehearsal / "export", Bundle)
    for model in bundle.models:
        assert len(model.programs) == 1 + len(RUNGS), model.target
        listed = {name for name in bundle.files if name.startswith(f"{model.target}/{model.precision}/")}
        assert set(model.files) == listed


def test_second_run_redoes_nothing(rehearsal: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in rehearsal.rglob("*") if path.is_file() and path.name != "run.json"
    }
    done = edgevlm("run", "test-scenes", "--out", rehearsal)
    assert done.returncode == 0
    assert done.stderr.count("done before") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_every_manifest_reads_back(rehearsal: Path) -> None:
    for stage in STAGES:
        kind = json.loads((rehearsal / stage.name / "manifest.json").read_text())["kind"]
        artifact = read_manifest(rehearsal / stage.name, KINDS[kind])
        assert artifact.provenance.seconds > 0
        assert not list((rehearsal / stage.name).glob(".snapshot*"))
    assert not list(rehearsal.glob(".*.partial"))


def test_changed_bench_keeps_the_models(rehearsal: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(rehearsal, copy)
    done = edgevlm("run", "test-scenes", "--out", copy, "--set", "bench.runs=6", "--until", "bench")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done before") == 11
    assert "bench took" in done.stderr


@pytest.mark.parametrize("stage", ["detector", "prune", "export"])
def test_killed_run_goes_on(rehearsal: Path, tmp_path: Path, stage: str) -> None:
    """SIGKILL inside a stage: finished stages stay, nothing half-written carries a final name, the rest follows."""
    out = tmp_path / "run"
    names = [entry.name for entry in STAGES]
    shutil.copytree(rehearsal, out)
    for later in names[names.index(stage) :]:
        shutil.rmtree(out / later)
    # More steps would change the key of the stage, so the kill comes as soon as the stage shows its first file.
    one_file = ("--set", "export.targets=[onnx]", "--set", "export.precisions=[fp32]")  # quick to export
    arguments = ("run", "test-scenes", "--out", str(out), *one_file)
    command = [sys.executable, "-m", "edgevlm.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    partial = out / f".{stage}.partial"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (partial / ".key").exists():
        time.sleep(0.005)
    time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / stage).exists()
    done = edgevlm(*arguments, "--until", stage)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done before") == names.index(stage)
    if stage != "export":  # converters may stamp times into files; training is bitwise the same
        weights = "model.safetensors"
        assert (out / stage / weights).read_bytes() == (rehearsal / stage / weights).read_bytes()
