import shutil
import subprocess
import sys

import numpy as np
import pytest

from targets import runtime
from targets.golden import choose_cases, tolerances

CASES = {"cases": [{"id": f"case{i}"} for i in range(6)], "tolerances": tolerances(np.full(6, 0.8))}
LOGITS = np.array([[3, 0, -1], [0, 2, 0], [0, -1, 4], [2, 0.5, 0], [0, 3, 1], [1.5, 1, 0]], np.float32)
GOLDEN = {"logits_full": LOGITS, "pixels": np.zeros((6, 2, 2, 3), np.uint8)}


def problems(logits: np.ndarray, precision: str) -> list[str]:
    return runtime.compare_golden({"full": logits}, GOLDEN, CASES, precision)


def test_the_golden_logits_themselves_pass() -> None:
    assert problems(LOGITS, "fp32") == []
    assert problems(LOGITS, "int8") == []


def test_fp32_may_differ_by_rounding_only() -> None:
    assert problems(LOGITS + np.float32(5e-4), "fp32") == []
    nudged = LOGITS.copy()
    nudged[4, 0] += 2e-3
    assert len(problems(nudged, "fp32")) == 1
    assert "case4" in problems(nudged, "fp32")[0]


def test_int8_forgives_one_case_of_six_and_not_two() -> None:
    one, two = LOGITS.copy(), LOGITS.copy()
    one[0] = one[0, ::-1]
    two[[0, 2]] = two[[0, 2], ::-1]
    assert problems(one, "int8") == []
    assert len(problems(two, "int8")) == 2
    few = {"logits_full": LOGITS[:5]}
    description = {**CASES, "cases": CASES["cases"][:5]}
    assert runtime.compare_golden({"full": one[:5]}, few, description, "int8") != []


def test_int8_excuses_a_changed_answer_only_where_the_margin_is_narrow() -> None:
    narrow = LOGITS.copy()
    narrow[5, :2] = [1.0, 1.5]  # margin 0.5, below the stored 0.8
    narrow[0] = narrow[0, ::-1]  # uses up the one case
    assert problems(narrow, "int8") == []


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_not_a_number_never_passes(precision: str) -> None:
    broken = LOGITS.copy()
    broken[3, 1] = np.nan
    assert problems(broken, precision) != []
    assert problems(LOGITS[:, :2], precision) != []
    assert runtime.compare_golden({}, GOLDEN, CASES, precision) == ["full: no answers"]


def test_unknown_precision_is_a_problem_not_a_pass() -> None:
    assert problems(LOGITS, "fp8") == ["golden.json has no tolerances for fp8"]


def test_cases_are_chosen_for_margin_and_variety() -> None:
    rng = np.random.default_rng(0)
    sharp = rng.normal(size=(200, 4)) * 3
    blunt = sharp + rng.normal(size=(200, 4))
    chosen = choose_cases({"full": sharp, "low": blunt}, 6)
    margin = np.minimum(*(np.diff(np.sort(x)[:, -2:])[:, 0] for x in (sharp, blunt)))
    assert len(set(chosen.tolist())) == 6
    assert margin[chosen].min() >= np.median(margin)
    assert len(set(sharp[chosen].argmax(1).tolist())) == 4


def test_runtime_travels_alone(world, tmp_path) -> None:
    """Copied to an empty folder, without edgevlm on the path, the file still runs a model and its golden cases."""
    shutil.copy(runtime.__file__, tmp_path / "runtime.py")
    model = next(m for m in world.bundle.models if (m.target, m.precision) == ("onnx", "int8"))
    script = f"""
import sys, json, numpy as np
sys.modules["edgevlm"] = sys.modules["targets"] = sys.modules["torch"] = None
import runtime
session = runtime.open_session("onnx", {str(world.bundle_dir)!r}, {model.programs!r})
golden = dict(np.load({str(world.bundle_dir / "golden/golden.npz")!r}))
description = json.load(open({str(world.bundle_dir / "golden/golden.json")!r}))
print(runtime.compare_golden(runtime.run_golden(session, golden), golden, description, "int8"))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_core_ml_says_that_it_needs_a_mac(monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert runtime.runtime_status("coreml") == (False, "Core ML runs on macOS only")
    with pytest.raises(RuntimeError, match="Core ML runs on macOS only"):
        runtime.open_session("coreml", ".", {})


def test_wrong_names_are_named(world) -> None:
    model = next(m for m in world.bundle.models if (m.target, m.precision) == ("onnx", "fp32"))
    session = runtime.open_session("onnx", world.bundle_dir, model.programs)
    with pytest.raises(ValueError, match="no program 'answer_b9'; there are: encode_image, answer_b8"):
        session.run("answer_b9", {})
    with pytest.raises(ValueError, match=r"encode_image takes \['image'\], got \['picture'\]"):
        session.run("encode_image", {"picture": np.zeros(1)})
    with pytest.raises(ValueError, match="unknown target 'onxx'"):
        runtime.open_session("onxx", ".", {})
