"""What is installed, what can be exported and verified on this machine, and what is missing."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgevlm import __version__
from edgevlm.bench.facts import memory_gb, num_cores, processor
from targets import runtime
from targets.base import TARGETS, Target

CORE = (
    "torch",
    "torchvision",
    "timm",
    "effdet",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "pydantic",
    "tensorboard",
)
"""Distributions that every stage before export needs."""

DATA_VARIABLE = "EDGEVLM_DATA"


@dataclass(frozen=True)
class Library:
    """A distribution and what it is for."""

    name: str
    version: str | None
    """None: not installed."""
    needed_for: str


@dataclass(frozen=True)
class TargetFinding:
    """What can be done with one target here."""

    name: str
    exports: bool
    missing: tuple[str, ...]
    """Distributions the exporter lacks."""
    evidence: str
    """What `verify` can rest a verdict on here: `runtime` or `none`."""
    evidence_note: str
    """The runtime and its version, or why there is none."""
    install: str
    """Command that brings what is missing; empty if nothing can be installed to help."""


@dataclass(frozen=True)
class Findings:
    """Everything `edgevlm doctor` knows."""

    edgevlm: str
    python: str
    system: str
    processor: str
    num_cores: int
    memory_gb: float
    disk_free_gb: float
    gpus: tuple[str, ...]
    data: str | None
    """Folder named by EDGEVLM_DATA."""
    datasets: tuple[str, ...]
    """Folders in it."""
    libraries: tuple[Library, ...]
    targets: tuple[TargetFinding, ...]
    problems: tuple[str, ...]
    """What keeps edgevlm from working, each with what to do."""


def collect() -> Findings:
    """Look around. Imports torch (for the GPUs) and each runtime (to see that it loads), no converter."""
    libraries = [Library(name, _version(name), "core") for name in CORE]
    for target in TARGETS.values():
        for name in target.libraries.values():
            known = next((i for i, library in enumerate(libraries) if library.name == name), None)
            if known is None:
                libraries.append(Library(name, _version(name), target.name))
            elif libraries[known].needed_for != "core":
                used = f"{libraries[known].needed_for}, {target.name}"
                libraries[known] = Library(name, libraries[known].version, used)
    data = os.environ.get(DATA_VARIABLE) or None
    problems = [
        f"{library.name} is not installed; run: pip install edgevlm"
        for library in libraries
        if library.version is None and library.needed_for == "core"
    ]
    if data is not None and not Path(data).is_dir():
        problems.append(f"{DATA_VARIABLE}={data} is not a folder; name the folder that holds the datasets, or unset it")
    gpus, problem = _gpus()
    problems += [problem] if problem else []
    return Findings(
        edgevlm=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        num_cores=num_cores(),
        memory_gb=round(memory_gb(), 1),
        disk_free_gb=round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        gpus=gpus,
        data=data,
        datasets=tuple(sorted(p.name for p in Path(data).iterdir() if p.is_dir()))
        if data and Path(data).is_dir()
        else (),
        libraries=tuple(libraries),
        targets=tuple(examine(target) for target in TARGETS.values()),
        problems=tuple(problems),
    )


def examine(target: Target) -> TargetFinding:
    """What can be done with a target on this machine."""
    missing = tuple(name for module, name in target.libraries.items() if not _has_module(module))
    available, note = runtime.runtime_status(target.name)
    if available:
        module = runtime.RUNTIMES[target.name][0]
        note = f"{module} {note}"
        try:
            importlib.import_module(module)
        except Exception as problem:  # a broken native library raises whatever it likes
            available = False
            note = f"{module} is installed but does not load: {' '.join(str(problem).split())[:120]}"
    curable = bool(missing) or (not available and note != runtime.COREML_ELSEWHERE)
    return TargetFinding(
        name=target.name,
        exports=not missing,
        missing=missing,
        evidence="runtime" if available else "none",
        evidence_note=note,
        install=target.install if curable else "",
    )


def as_dict(findings: Findings) -> dict[str, Any]:
    """The findings as plain data, for `--json`."""
    return asdict(findings)


def render(findings: Findings, console: Console) -> None:
    """The findings as tables for people."""
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_row("edgevlm", f"{findings.edgevlm}, Python {findings.python}")
    facts.add_row("machine", f"{escape(findings.processor)}, {findings.num_cores} cores, {findings.system}")
    facts.add_row("memory", f"{findings.memory_gb:.1f} GB; disk {findings.disk_free_gb:.0f} GB free here")
    facts.add_row("GPU", escape(", ".join(findings.gpus)) or "none that torch can use; training runs on the CPU")
    facts.add_row("data", _data_line(findings))
    console.print(facts)

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("target", "export", "verify here", "with"):
        table.add_column(title)
    for target in findings.targets:
        export = "[green]yes[/]" if target.exports else f"[yellow]lacks {', '.join(target.missing)}[/]"
        verify = "[green]yes, runtime[/]" if target.evidence == "runtime" else "[yellow]no, evidence none[/]"
        table.add_row(target.name, export, verify, escape(target.evidence_note))
    console.print(table)

    console.print("[bold]installed[/]  " + _versions(findings), soft_wrap=True)
    if absent := [library.name for library in findings.libraries if library.version is None]:
        console.print(f"[bold]missing[/]    {', '.join(absent)}", soft_wrap=True)
    for command in dict.fromkeys(target.install for target in findings.targets if target.install):
        console.print(f"[bold]to add[/]     {escape(command)}", soft_wrap=True)
    for problem in findings.problems:
        console.print(f"[bold red]problem[/]    {escape(problem)}", soft_wrap=True)
    if not findings.problems:
        console.print("\nNext: edgevlm run scenes-tiny")


def _versions(findings: Findings) -> str:
    return ", ".join(f"{library.name} {library.version}" for library in findings.libraries if library.version)


def _data_line(findings: Findings) -> str:
    if findings.data is None:
        return f"{DATA_VARIABLE} is not set; drawn data (scenes) needs none"
    return escape(f"{findings.data}: {', '.join(findings.datasets) or 'no folders in it'}")


def _gpus() -> tuple[tuple[str, ...], str]:
    """Names of the GPUs torch can use, and a problem in words if torch does not load."""
    try:
        import torch
    except Exception as problem:  # missing, or a native library that does not load
        return (), f"torch does not load ({' '.join(str(problem).split())[:120]}); run: scripts/setup"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("Apple GPU (mps)")
    return tuple(names), ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
