"""`edgevlm doctor` against pip's own list, and in environments that lack things."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from edgevlm import doctor
from targets.base import TARGETS

LIBRARIES = sorted({module for target in TARGETS.values() for module in target.libraries})


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Make modules look as if they were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in modules else real(name, *a))


def shown(findings: doctor.Findings) -> str:
    out = StringIO()
    doctor.render(findings, Console(file=out, width=100))
    return out.getvalue()


def test_versions_are_pips() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    pip = {re.sub(r"[-_.]+", "-", p["name"]).lower(): p["version"] for p in json.loads(listed.stdout)}
    for library in doctor.collect().libraries:
        assert library.version == pip.get(library.name), library.name


def test_core_alone_names_the_extra_of_each_target(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *LIBRARIES)
    findings = doctor.collect()
    assert [target.name for target in findings.targets] == list(TARGETS)
    text = shown(findings)
    for target in findings.targets:
        assert not target.exports
        assert target.evidence == "none"
        assert f"pip install 'edgevlm[{target.name}]'" in text
    assert findings.problems == (), "a missing target is no problem of the core"


def test_one_missing_converter_still_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    hide(monkeypatch, "onnxscript")
    finding = doctor.examine(TARGETS["onnx"])
    assert finding.missing == ("onnxscript",)
    assert not finding.exports
    assert finding.evidence == "runtime"
    assert "edgevlm[onnx]" in finding.install


def test_core_ml_away_from_a_mac_cannot_be_cured_by_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("coremltools")
    monkeypatch.setattr("sys.platform", "linux")
    finding = doctor.examine(TARGETS["coreml"])
    assert finding.exports
    assert finding.evidence == "none"
    assert "macOS" in finding.evidence_note
    assert finding.install == ""


def test_a_runtime_that_does_not_load_is_no_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor.examine(TARGETS["onnx"])
    assert finding.evidence == "none"
    assert "libgomp.so.1" in finding.evidence_note
    assert finding.install


def test_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(doctor.DATA_VARIABLE, str(tmp_path / "nowhere"))
    findings = doctor.collect()
    assert any("nowhere is not a folder" in problem for problem in findings.problems)
    assert "problem" in shown(findings)
    (tmp_path / "nlvr1").mkdir()
    monkeypatch.setenv(doctor.DATA_VARIABLE, str(tmp_path))
    findings = doctor.collect()
    assert findings.datasets == ("nlvr1",)
    assert findings.problems == ()
    monkeypatch.delenv(doctor.DATA_VARIABLE)
    assert "not set" in shown(doctor.collect())


def test_findings_are_plain_data() -> None:
    findings = doctor.collect()
    assert json.loads(json.dumps(doctor.as_dict(findings)))["targets"][0]["name"] == next(iter(TARGETS))
    assert findings.memory_gb > 0.5
    assert findings.num_cores >= 1
    assert findings.processor
