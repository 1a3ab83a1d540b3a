"""Imports point down, the command line starts without any target's library, and what is imported is declared."""

import ast
import importlib.metadata
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import edgevlm

ROOT = Path(__file__).parent.parent
PACKAGES = ("edgevlm", "targets", "calibration")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "nncf",
    "coremltools",
    "litert_torch",
    "ai_edge_litert",
    "ai_edge_quantizer",
    "tensorflow",
}
ENTRIES = ("edgevlm.cli", "edgevlm.stages", "edgevlm.pipeline", "edgevlm.doctor", "edgevlm.report", "targets.base")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_imports_point_down() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_upwards_is_noticed(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    errors = tmp_path / "edgevlm" / "errors.py"
    errors.write_text(errors.read_text() + "\nfrom targets import program\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "edgevlm.errors -> targets.program" in result.stdout


def test_every_module_has_a_layer() -> None:
    (contract,) = PROJECT["tool"]["importlinter"]["contracts"]
    layers = {name.strip(" ()") for line in contract["layers"] for name in re.split(r"[|:]", line)}
    modules = {f"edgevlm.{module.name}" for module in pkgutil.iter_modules(edgevlm.__path__)}
    assert modules - layers == set(), "add it to the layers in pyproject.toml"


@pytest.mark.parametrize("entry", ENTRIES)
def test_starts_without_any_targets_library(entry: str) -> None:
    code = f"import {entry}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert HEAVY & set(result.stdout.split()) == set()


def imported_modules(path: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_declared() -> None:
    project = PROJECT["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    names = [re.split(r"[<>=!;\[ ]", line)[0] for line in (*project["dependencies"], *extras)]
    declared = {normal(name) for name in names}
    carriers = importlib.metadata.packages_distributions()
    ours = {*PACKAGES, "runtime"}  # `runtime` lies beside the benchmark's runner on a device
    missing = {
        f"{path.relative_to(ROOT)}: {module}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for module in imported_modules(path) - ours - sys.stdlib_module_names
        if not {normal(name) for name in carriers.get(module, [module])} & declared
    }
    assert missing == set()
