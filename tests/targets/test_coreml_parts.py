"""Core ML's structure check on a fusion with part tokens, whose norm the converter computes ahead."""

from pathlib import Path

import pytest
import torch

from edgevlm.artifacts import Checkpoint
from edgevlm.models.vlm import VLM
from targets import coreml
from targets.coreml_structure import check_structure
from targets.source import Source
from tests.targets import lively


def source_with(manifest: Checkpoint) -> Source:
    torch.manual_seed(0)
    model = VLM(manifest.model, manifest.preprocess, manifest.tokenizer, manifest.labels).eval()
    return Source(model, manifest)


def test_parts_are_found_and_others_are_not(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    _, manifest = lively.small_model()
    fusion = manifest.model.fusion.model_copy(update={"parts": ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))})
    manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update={"fusion": fusion})})
    source = source_with(manifest)
    coreml.export(source, "fp32", tmp_path)
    assert check_structure(tmp_path / coreml.PACKAGE, source) == []
    with torch.no_grad():
        source.model.fusion.parts.add_(torch.tensor([1.0, -1.0]).repeat(fusion.hidden // 2))
    assert any("fusion.parts" in problem for problem in check_structure(tmp_path / coreml.PACKAGE, source))
