import importlib.util
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgevlm.artifacts import Bundle, Checkpoint, ExportFailure, Provenance, Rung
from edgevlm.errors import BundleError
from edgevlm.manifests import read_manifest, write_manifest
from edgevlm.models.vlm import load
from edgevlm.recipe import VerifySection
from targets import parity
from targets.bundle import export_bundle
from targets.onnx import export as export_onnx
from targets.source import Source
from tests.targets import lively
from tests.targets.conftest import World, make_frames

SETTINGS = VerifySection()  # pyright: ignore[reportCallIssue]
PROVENANCE = Provenance(stage="verify", key="v0")


def verify(bundle_dir: Path, checkpoint: Path, num: int = 60):
    frames, questions = make_frames(num, seed=7)
    return parity.verify_bundle(bundle_dir, checkpoint, questions, frames.pixels, SETTINGS, PROVENANCE)


def test_report_on_a_sound_bundle(world: World) -> None:
    report = verify(world.bundle_dir, world.checkpoint)
    rows = {(row.target, row.precision, row.rung): row for row in report.rows}
    assert len(rows) == 4 * 2 * 3
    for (target, precision, _), row in rows.items():
        if target == "coreml":
            assert (row.evidence, row.verdict) == ("none", "unproven")
            assert "macOS only" in row.reasons[0]
            assert "nothing was run" in row.reasons[0]
            assert row.metric is None
            continue
        assert row.evidence == "runtime"
        assert row.num_samples == 60
        assert row.metric_ci is not None and row.metric is not None
        assert row.metric_ci[0] <= row.metric <= row.metric_ci[1]
        if precision == "fp32":
            assert row.verdict == "passed", row.reasons
            assert row.agreement == 1.0
            assert row.metric == row.reference_metric
    assert report.metric_name == "accuracy"
    assert 0 < report.majority < 1
    assert report.bundle_key == "e0"


def export_wrong(world: World, folder: Path, change, *, encoder: bool = False) -> Path:
    """A bundle whose ONNX fp32 files come from a changed model, though it claims to be the original's."""
    model, manifest = load(world.checkpoint)
    manifest = change(model, manifest) or manifest
    shutil.copytree(world.bundle_dir, folder)
    wrong = folder / "onnx" / "fp32"
    shutil.rmtree(wrong)
    source = Source(model, manifest)
    if not encoder:  # its graph is the same: take it from the files, weights and all
        path = world.bundle_dir / "onnx" / "fp32" / "encode_image.onnx"
        source.once("onnx/encode_image", lambda: onnx.load(path))
    export_onnx(source, "fp32", wrong)
    bundle = read_manifest(folder, Bundle, check_files=False)
    models = tuple(m for m in bundle.models if (m.target, m.precision) == ("onnx", "fp32"))
    write_manifest(folder, bundle.model_copy(update={"models": models}))
    return folder


def swap_mean_and_std(model, manifest):
    spec = manifest.preprocess
    wrong = lively.VLM(
        manifest.model,
        spec.model_copy(update={"mean": spec.std, "std": spec.mean}),
        manifest.tokenizer,
        manifest.labels,
    )
    model.tee.mean, model.tee.inv_std = wrong.tee.mean, wrong.tee.inv_std


def other_rung(model, manifest: Checkpoint) -> Checkpoint:
    rungs = tuple(Rung(name=r.name, regions=(4 if r.name == "b5" else r.regions[0],)) for r in manifest.rungs)
    return manifest.model_copy(update={"rungs": rungs})


def swap_words(model, manifest):
    words = model.fusion.words.weight.data
    words[[7, 8]] = words[[8, 7]]  # 'red' and 'green'


def test_a_wrong_normalisation_fails(world: World, tmp_path: Path) -> None:
    report = verify(export_wrong(world, tmp_path / "b", swap_mean_and_std, encoder=True), world.checkpoint)
    assert {row.verdict for row in report.rows} == {"failed"}
    assert "logits differ by up to" in report.rows[0].reasons[0]


def test_a_wrong_budget_fails_at_its_rung_only(world: World, tmp_path: Path) -> None:
    report = verify(export_wrong(world, tmp_path / "b", other_rung), world.checkpoint)
    assert {row.rung: row.verdict for row in report.rows} == {"b8": "passed", "b5": "failed", "b3": "passed"}


def test_two_swapped_words_fail(world: World, tmp_path: Path) -> None:
    report = verify(export_wrong(world, tmp_path / "b", swap_words), world.checkpoint)
    assert {row.verdict for row in report.rows} == {"failed"}


def test_a_bundle_of_another_vocabulary_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.bundle_dir, tmp_path / "b")
    bundle = read_manifest(tmp_path / "b", Bundle)
    tokenizer = bundle.tokenizer.model_copy(update={"lowercase": False})
    write_manifest(tmp_path / "b", bundle.model_copy(update={"tokenizer": tokenizer}))
    with pytest.raises(BundleError, match="was not exported from"):
        verify(tmp_path / "b", world.checkpoint)


def test_what_could_not_be_exported_or_run_stays_visible(world: World, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(world.bundle_dir, tmp_path / "b")
    (tmp_path / "b/tflite/fp32/model.tflite").write_bytes(b"not a model")
    bundle = read_manifest(tmp_path / "b", Bundle, check_files=False)
    models = tuple(m for m in bundle.models if m.precision == "fp32" and m.target in ("tflite", "openvino"))
    failures = (ExportFailure(target="coreml", precision="int8", reason="ValueError: no"),)
    write_manifest(tmp_path / "b", bundle.model_copy(update={"models": models, "failures": failures}))
    real = parity.runtime_status
    missing = (False, "openvino is not installed")
    monkeypatch.setattr(parity, "runtime_status", lambda target: missing if target == "openvino" else real(target))
    rows = {(row.target, row.rung): row for row in verify(tmp_path / "b", world.checkpoint, num=4).rows}
    assert len(rows) == 9
    broken, absent, failed = rows["tflite", "b8"], rows["openvino", "b5"], rows["coreml", "b3"]
    assert (broken.evidence, broken.verdict) == ("none", "failed")
    assert "did not run" in broken.reasons[0]
    assert (absent.evidence, absent.verdict, absent.reasons) == ("none", "unproven", ("openvino is not installed",))
    assert (failed.evidence, failed.verdict) == ("none", "failed")
    assert failed.reasons == ("not exported: ValueError: no",)


def test_an_untrimmed_checkpoint_where_one_target_is_missing(world: World, tmp_path: Path, monkeypatch) -> None:
    """One rung, no calibration set, and a target that fails: the others go on, and the failure stays in sight."""
    model, manifest = load(world.checkpoint)
    folder = tmp_path / "checkpoint"
    lively.write_checkpoint(folder, model, manifest.model_copy(update={"rungs": ()}))
    (tmp_path / "b").mkdir()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "coremltools" else find(n, *a))
    bundle = export_bundle(
        folder,
        None,
        tmp_path / "b",
        targets=("coreml", "onnx"),
        precisions=("fp32",),
        num_golden=3,
        provenance=PROVENANCE,
    )
    assert [rung.name for rung in bundle.rungs] == ["full"]
    assert [model.target for model in bundle.models] == ["onnx"]
    assert "pip install 'edgevlm[coreml]'" in bundle.failures[0].reason
    assert "not exported" in (tmp_path / "b/MODEL_CARD.md").read_text()
    assert "no calibration set was given" in (tmp_path / "b/golden/golden.json").read_text()
    rows = verify(tmp_path / "b", folder, num=10).rows
    assert [(row.target, row.rung, row.verdict) for row in rows] == [
        ("onnx", "full", "passed"),
        ("coreml", "full", "failed"),
    ]


def test_wilson_interval_against_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    for successes, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = parity.wilson(successes / count, count)
        assert np.allclose(interval, (low, high), atol=5e-4)


def test_box_match_counts_sets_not_places() -> None:
    boxes = np.array([[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.1, 0.1, 0.2, 0.2]]], np.float32)
    scores = np.array([[0.9, 0.8, 0.1]], np.float32)
    want = {"boxes": boxes, "scores": scores}
    assert parity.box_match(want, {"boxes": boxes[:, [1, 0, 2]], "scores": scores}, 0.2) == 1.0
    moved = boxes.copy()
    moved[0, 0, 2] = 0.3
    assert parity.box_match(want, {"boxes": moved, "scores": scores}, 0.2) == 0.5
    weak = {"boxes": boxes, "scores": np.array([[0.9, 0.1, 0.1]], np.float32)}
    assert parity.box_match(want, weak, 0.2) == 0.5
