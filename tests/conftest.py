"""Settings for all tests."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# The models are tiny and the tests run in two processes: more threads per process would only wait for each other.
torch.set_num_threads(1)

SHARED_FIXTURES = ("e2e", "targets")
"""Folders whose tests share one slow session fixture, and so must stay in one process."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for `pytest -n 2 --dist loadgroup`: by folder where a fixture is shared, else by file."""
    for item in items:
        folder = Path(item.path).parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in SHARED_FIXTURES else item.path.name))
