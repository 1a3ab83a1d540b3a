"""Percentiles against numpy's own, and at their edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevlm.bench.stats import percentile, summarise

TIMES = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=200)


@given(TIMES, st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], share: float) -> None:
    assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-9)


@given(TIMES)
def test_the_tail_is_never_below_the_median(values: list[float]) -> None:
    timing = summarise(values)
    assert min(values) <= timing.p50_ms <= timing.p90_ms <= timing.p99_ms <= max(values)
    assert timing.num_runs == len(values)


def test_one_slow_run_moves_the_tail_and_not_the_median() -> None:
    calm, hiccup = summarise([10.0] * 50), summarise([10.0] * 49 + [500.0])
    assert hiccup.p50_ms == calm.p50_ms == 10.0
    assert hiccup.p99_ms > 100


def test_nothing_to_summarise_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        summarise([])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        percentile([1.0], 90)
