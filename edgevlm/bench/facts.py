"""What machine is this? Facts that a latency means nothing without; standard library only."""

import importlib.metadata
import os
import platform
from pathlib import Path

from edgevlm.artifacts import DeviceFacts

DISTRIBUTIONS = ("numpy", "torch", "onnxruntime", "ai-edge-litert", "openvino", "coremltools")
"""Libraries whose version changes a timing."""


def device_facts(threads: int, name: str = "this machine") -> DeviceFacts:
    """The machine this process runs on.

    Args:
        threads: threads that the runtimes were given.
        name: what people call the device.
    """
    return DeviceFacts(
        name=name,
        system=_system(),
        processor=processor(),
        num_cores=num_cores(),
        memory_gb=round(memory_gb(), 1),
        threads=threads,
        versions={"python": platform.python_version(), **_versions()},
    )


def processor() -> str:
    """Model name of the processor, as its maker spells it where the system tells."""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        # x86 says "model name", Raspberry Pi and Jetson "Model" or "Hardware".
        if key.strip() in {"model name", "Model", "Hardware"} and value.strip():
            return value.strip()
    for line in _lines("/proc/device-tree/model"):
        return line.rstrip("\0")
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores this process may use (a container may have fewer than the machine)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gb() -> float:
    """Physical memory, in GB (1e9 bytes)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):  # not every system has these two
        return 0.0


def _system() -> str:
    names = dict(line.split("=", 1) for line in _lines("/etc/os-release") if "=" in line)
    pretty = names.get("PRETTY_NAME", "").strip('"') or f"{platform.system()} {platform.release()}"
    return f"{pretty}, {platform.machine()}"


def _versions() -> dict[str, str]:
    found = {}
    for distribution in DISTRIBUTIONS:
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
