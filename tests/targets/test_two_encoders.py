"""A fusion of two encoders on every target: PyTorch's logits at every rung, on the target's own runtime."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from edgevlm.artifacts import TrimConfig
from edgevlm.models.registry import FUSIONS, TEES
from targets.base import open_model
from targets.coreml_structure import check_structure
from targets.parity import Samples, reference, run_samples
from targets.source import CalibrationData, Source
from tests.targets import lively
from tests.targets.conftest import make_frames


@pytest.fixture(scope="module")
def dual() -> Source:
    fusion = FUSIONS["test-dual"].model_copy(update={"trim": TrimConfig(layers=(0,))})
    return Source(*lively.make_model(TEES["test-tee"], fusion, 64, (8, 5, 3), steps=600))


@pytest.fixture(scope="module")
def dual_samples(dual: Source) -> Samples:
    frames, questions = make_frames(40, seed=7)
    return reference(dual, questions, frames.pixels)


def test_the_rungs_differ_and_the_model_has_learned(dual_samples: Samples) -> None:
    assert dual_samples.metric(dual_samples.logits["b8"]) > 0.7, "the most frequent answer has less than 0.5"
    assert np.abs(dual_samples.logits["b8"] - dual_samples.logits["b3"]).max() > 1e-2


@pytest.mark.parametrize("target", ["onnx", "tflite", "openvino"])
def test_fp32_gives_pytorchs_logits(dual: Source, dual_samples: Samples, tmp_path: Path, target: str) -> None:
    session = open_model(importlib.import_module(f"targets.{target}").export(dual, "fp32", tmp_path), tmp_path)
    got = run_samples(session, dual_samples)
    session.close()
    for rung, want in dual_samples.logits.items():
        assert np.abs(got.logits[rung] - want).max() <= 1e-4, rung
        assert np.abs(got.same_input[rung] - want).max() <= 1e-4, rung


@pytest.mark.parametrize("target", ["onnx", "tflite", "openvino"])
def test_int8_keeps_the_answers(dual: Source, dual_samples: Samples, tmp_path: Path, target: str) -> None:
    """Within the bounds that tests/targets/test_export.py has for a single stream; quantised, and not fp32 by mistake."""
    frames, questions = make_frames(32, seed=3)
    quantised = Source(dual.model, dual.manifest, CalibrationData(frames.pixels, questions.input_ids))
    session = open_model(importlib.import_module(f"targets.{target}").export(quantised, "int8", tmp_path), tmp_path)
    got = run_samples(session, dual_samples)
    session.close()
    for rung, want in dual_samples.logits.items():
        assert (got.same_input[rung].argmax(1) == want.argmax(1)).mean() >= 0.95, rung
        assert 1e-3 < np.abs(got.same_input[rung] - want).max() <= 1.0, rung


def test_core_ml_holds_every_weight(dual: Source, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    coreml = importlib.import_module("targets.coreml")
    coreml.export(dual, "fp32", tmp_path)
    assert check_structure(tmp_path / coreml.PACKAGE, dual) == []
    with torch.no_grad():
        layer = dual.model.fusion.layers[1]
        layer.cross_attention.key.weight[3, 4] += 1.0  # pyright: ignore
        problems = check_structure(tmp_path / coreml.PACKAGE, dual)
        layer.cross_attention.key.weight[3, 4] -= 1.0  # pyright: ignore
    assert "answer_b3: no constant equals the weights fusion.layers.1.cross_attention.key.weight" in problems
