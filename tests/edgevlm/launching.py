"""Start several processes of a module on this machine, as `torchrun` would, without its agent."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """This environment, with one thread per process and the tree under test first."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", **more}


def start(number: int, module: str, *arguments: str | Path, **more: str) -> list[subprocess.Popen[str]]:
    """`number` processes of `python -m module` that can join each other by gloo; `more` joins their environment."""
    port = str(free_port())
    started = []
    for rank in range(number):
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        address = {"LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                env=environment(**numbers, **address, **more),
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return started


def finish(started: list[subprocess.Popen[str]], timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; when one fails the others are ended, as a launcher does."""
    try:
        results = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, results, strict=True)]
