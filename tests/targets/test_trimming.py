"""Every way to trim, words and merging included, on every target's own runtime: PyTorch's logits at each rung."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from edgevlm.artifacts import Rung, TrimConfig
from edgevlm.models.registry import FUSIONS, TEES
from targets.base import open_model
from targets.coreml_structure import check_structure
from targets.parity import Samples, reference, run_samples
from targets.source import Source
from tests.targets import lively
from tests.targets.conftest import make_frames

RUNGS = (
    Rung(name="full", regions=(8, 8)),
    Rung(name="some", regions=(6, 4), words=(8, 8)),
    Rung(name="few", regions=(4, 3), words=(7, 5), num_words=11, num_regions=7),
)
WAYS = {
    "merging": TrimConfig(layers=(0, 1), words=True, context=2),
    "attention": TrimConfig(layers=(0, 1), policy="attention", words=True, context=1),
    "random": TrimConfig(layers=(0, 1), policy="random", words=True),
    "similarity": TrimConfig(layers=(0, 1), policy="similarity"),
}


def source(way: str) -> Source:
    """A taught model of three layers that trims behind two."""
    sizes = {"layer_heads": (2, 2, 2), "layer_ffn": (32, 32, 32), "trim": WAYS[way]}
    fusion = FUSIONS["test-fusion"].model_copy(update=sizes)
    model, manifest = lively.make_model(TEES["test-tee"], fusion, 64, (8,), steps=150)
    rungs = RUNGS if WAYS[way].words else tuple(rung.model_copy(update={"words": ()}) for rung in RUNGS)
    return Source(model, manifest.model_copy(update={"rungs": rungs}))


EVERYWHERE = ("merging", "similarity")
"""These two between them hold every operation; the others go through ONNX Runtime alone, for the time that conversions take."""


@pytest.fixture(scope="module", params=list(WAYS))
def trimmed(request: pytest.FixtureRequest) -> Source:
    return source(request.param)


def way_of(trimmed: Source) -> str:
    """Its name in `WAYS`."""
    return next(name for name, config in WAYS.items() if config == trimmed.manifest.model.fusion.trim)


@pytest.fixture(scope="module")
def samples(trimmed: Source) -> Samples:
    frames, questions = make_frames(24, seed=7)
    return reference(trimmed, questions, frames.pixels)


def test_the_rungs_differ(samples: Samples) -> None:
    for rung in ("some", "few"):
        assert np.abs(samples.logits["full"] - samples.logits[rung]).max() > 1e-2


@pytest.mark.parametrize("target", ["onnx", "tflite", "openvino"])
def test_fp32_gives_pytorchs_logits(trimmed: Source, samples: Samples, tmp_path: Path, target: str) -> None:
    """1e-4: float32 sums in another order, and no choice among tokens that differs."""
    if target != "onnx" and way_of(trimmed) not in EVERYWHERE:
        pytest.skip("its operations are those of the other ways")
    session = open_model(importlib.import_module(f"targets.{target}").export(trimmed, "fp32", tmp_path), tmp_path)
    got = run_samples(session, samples)
    session.close()
    for rung, want in samples.logits.items():
        assert np.abs(got.same_input[rung] - want).max() <= 1e-4, rung


def test_core_ml_keeps_the_rungs_numbers(trimmed: Source, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    if way_of(trimmed) not in EVERYWHERE:
        pytest.skip("its operations are those of the other ways")
    coreml = importlib.import_module("targets.coreml")
    coreml.export(trimmed, "fp32", tmp_path)
    assert check_structure(tmp_path / coreml.PACKAGE, trimmed) == []
    if way_of(trimmed) == "similarity":
        return
    fewer = tuple(rung.model_copy(update={"regions": (5, 2)}) if rung.name == "some" else rung for rung in RUNGS)
    other = Source(trimmed.model, trimmed.manifest.model_copy(update={"rungs": fewer}))
    assert any("answer_some keeps" in problem for problem in check_structure(tmp_path / coreml.PACKAGE, other))
