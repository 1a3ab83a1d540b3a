"""One rehearsal run for all end-to-end tests: the smallest recipe through every stage, by the real command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def edgevlm(*arguments: str | Path, timeout: float = 600, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, in a process of its own."""
    command = [sys.executable, "-m", "edgevlm.cli", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False, **kwargs
    )  # pyright: ignore


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished `edgevlm run test-scenes`."""
    out = tmp_path_factory.mktemp("e2e") / "run"
    done = edgevlm("run", "test-scenes", "--out", out)
    assert done.returncode == 0, done.stderr + done.stdout
    (out.parent / "stdout.txt").write_text(done.stdout)
    return out
