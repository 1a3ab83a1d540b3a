"""That tests which share a slow fixture run in one process."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="runs with -n 2, as scripts/test does")
def test_this_file_is_a_group(request: pytest.FixtureRequest) -> None:
    """pytest 9.2 hides the names that xdist 3.8 writes its groups into: every process then makes every fixture."""
    assert request.node.nodeid.endswith("@test_grouping.py")
