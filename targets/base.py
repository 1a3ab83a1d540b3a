"""The table of targets, and what each one needs. Importing this needs no target's library."""

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgevlm.artifacts import ExportedModel
from edgevlm.errors import TargetError, nearest
from targets import runtime
from targets.quiet import quiet
from targets.runtime import Session

if TYPE_CHECKING:
    from targets.source import Source

__all__ = ["TARGETS", "Session", "Target", "check_target", "load_exporter", "open_model", "runtime_status"]


class Exporter(Protocol):
    """Writes one model at one precision."""

    def __call__(self, source: "Source", precision: str, out_dir: Path) -> ExportedModel:
        """Convert every program of `source` into files under `out_dir`; paths of the result are relative to it."""
        ...


@dataclass(frozen=True)
class Target:
    """A form that a model can be exported to."""

    name: str
    entry: str
    """Import string of the exporter; resolved on use, because the module behind it pulls heavy libraries."""
    libraries: dict[str, str]
    """Modules the exporter imports -> the distributions that carry them."""
    precisions: tuple[str, ...] = ("fp32", "int8")

    @property
    def extra(self) -> str:
        """The extra of edgevlm that installs the libraries."""
        return self.name

    @property
    def install(self) -> str:
        """The command that installs what the target needs."""
        return f"pip install 'edgevlm[{self.extra}]'"

    def versions(self) -> dict[str, str]:
        """Distribution -> installed version, with torch, where every model comes from."""
        return {name: importlib.metadata.version(name) for name in ("torch", *self.libraries.values())}


ONNX_LIBRARIES = {"onnx": "onnx", "onnxscript": "onnxscript"}

TARGETS: dict[str, Target] = {
    "onnx": Target("onnx", "targets.onnx:export", {**ONNX_LIBRARIES, "onnxruntime": "onnxruntime"}),
    "tflite": Target(
        "tflite",
        "targets.tflite:export",
        {"litert_torch": "litert-torch", "ai_edge_quantizer": "ai-edge-quantizer", "ai_edge_litert": "ai-edge-litert"},
    ),
    "openvino": Target(
        "openvino", "targets.openvino:export", {**ONNX_LIBRARIES, "openvino": "openvino", "nncf": "nncf"}
    ),
    "coreml": Target("coreml", "targets.coreml:export", {"coremltools": "coremltools"}),
}
"""Every target by name."""


def check_target(name: str, precision: str | None = None) -> Target:
    """The target of a name, if it offers the precision.

    Raises:
        TargetError: unknown target or precision; the nearest is named.
    """
    if name not in TARGETS:
        raise TargetError(f"Unknown target '{name}'", f"{nearest(name, TARGETS)} Known: {', '.join(TARGETS)}".strip())
    target = TARGETS[name]
    if precision is not None and precision not in target.precisions:
        hint = nearest(precision, target.precisions)
        raise TargetError(
            f"Target {name} has no precision '{precision}'", f"{hint} It has: {', '.join(target.precisions)}".strip()
        )
    return target


def load_exporter(name: str) -> Exporter:
    """The function that exports to a target.

    Raises:
        TargetError: unknown target, or a library it needs is not installed (the extra to install is named).
    """
    target = check_target(name)
    for module, distribution in target.libraries.items():
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise TargetError(f"Target {name} needs {distribution}, which is not installed", f"Run: {target.install}")
    module, _, function = target.entry.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as problem:
        raise TargetError(f"Target {name} cannot be loaded ({problem})", f"Run: {target.install}") from problem


def runtime_status(target: str) -> tuple[bool, str]:
    """Whether a target's runtime is here, and its version or the reason.

    Raises:
        TargetError: unknown target.
    """
    check_target(target)
    return runtime.runtime_status(target)


def open_model(model: ExportedModel, folder: Path, *, threads: int = 1) -> Session:
    """Load an exported model that lies in a bundle's folder.

    Raises:
        TargetError: its runtime is not here, or refuses the files.
    """
    target = check_target(model.target)
    available, reason = runtime_status(model.target)
    if not available:
        fix = "Open it on a Mac" if reason == runtime.COREML_ELSEWHERE else f"Run: {target.install}"
        raise TargetError(f"{model.target} models cannot run here ({reason})", fix)
    try:
        with quiet():  # runtimes greet
            return runtime.open_session(model.target, folder, model.programs, threads=threads)
    except Exception as problem:  # each runtime has exceptions of its own
        reason = " ".join(str(problem).split())[:300] or type(problem).__name__
        raise TargetError(
            f"{model.target} {model.precision} could not be loaded ({reason})", "Export it again"
        ) from problem
