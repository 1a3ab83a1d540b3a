"""Stage `govern` on a real, tiny run: what it certifies is what the exported file does, and bundle and command line follow it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration import risk
from edgevlm.artifacts import Bundle, Checkpoint, DeviceReport, Governor, GovernorCalibration, model_hash
from edgevlm.ask import ask, course
from edgevlm.commands import bench_folder, export_checkpoint, verify_folder
from edgevlm.data.scenes import Scenes
from edgevlm.errors import BundleError, GovernorError, LatencyError, TargetError
from edgevlm.manifests import read_manifest, write_manifest
from edgevlm.models import vlm
from edgevlm.pipeline import run, stage_keys
from edgevlm.progress import Reporter
from edgevlm.recipes import load_recipe
from edgevlm.stages import govern, stages_of
from edgevlm.train.halves import held_out, units_of
from edgevlm.train.regions import RegionSplit
from targets.bundle import open_bundle
from targets.governor import FILE, MarginGovernor, governed_answer, read_governor
from targets.governor_golden import check_governor_golden
from targets.rungs import answer_split, make_governor
from tests.edgevlm.runs import job_for

OVERRIDES = [
    "data.num_val=60",
    "govern.epsilon=0.2",
    "export.targets=[onnx]",
    "export.precisions=[fp32]",
]


class Said(Reporter):
    """Keeps what the stages say."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


SAID = Said()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run up to its bundle: stage -> folder."""
    recipe = load_recipe("test-scenes", OVERRIDES)
    return run(stages_of(recipe), recipe, tmp_path_factory.mktemp("govern") / "run", until="export", reporter=SAID)


@pytest.fixture(scope="module")
def table(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the bundle's rungs take on this machine."""
    out = tmp_path_factory.mktemp("latency") / "latency"
    bench_folder(folders["export"], None, out, 1, 3, False, Reporter())
    return out


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    Scenes("vqa", 7, 1).sample("test", 0).image.save(path)
    return path


def calibrated(folder: Path) -> Governor:
    return read_manifest(folder, GovernorCalibration).governor


def through_onnx(folders: dict[str, Path], governor: Governor) -> tuple[np.ndarray, np.ndarray]:
    """Rung that answers every validation question, and whether it is right: exported file and run-time governor."""
    split = RegionSplit.load(folders["regions"], "val")
    bundle, _, session = open_bundle(folders["export"], "onnx")
    answered, right = [], []
    for row, image in enumerate(split.image_index):
        parts = {"features": split.features, "boxes": split.boxes, "scores": split.scores}
        regions = {name: part[image][None].numpy() for name, part in parts.items()}  # pyright: ignore
        governed = governed_answer(session, bundle, governor, regions, split.input_ids[row].numpy())
        answered.append(governed.rung)
        right.append(governed.output["logits"].argmax() == int(split.answers[row]))
    session.close()
    return np.array(answered), np.array(right)


def test_what_was_certified_is_what_the_exported_file_does(folders: dict[str, Path]) -> None:
    """Every held-out question through ONNX Runtime and the run-time governor, against the evidence in the manifest."""
    governor = calibrated(folders["govern"])
    assert governor.evidence is not None and governor.certified, governor
    assert any(line.startswith("  governor: loss <= 0.2 with probability 0.9") for line in SAID.lines)
    split = RegionSplit.load(folders["regions"], "val")
    is_held_out = held_out(units_of(folders["regions"], "val", split))
    answered, right = through_onnx(folders, governor)
    evidence = governor.evidence
    assert is_held_out.sum() == evidence.num_questions
    assert evidence.num_units == len(np.unique(split.image_index[is_held_out]))
    for name, share in evidence.answered_by.items():
        assert np.mean(answered[is_held_out] == name) == pytest.approx(share, abs=0.005)  # rounding at a threshold
    assert np.mean(right[is_held_out]) == pytest.approx(evidence.accuracy, abs=0.005)


def test_the_exported_file_climbs_as_the_calibration_does(folders: dict[str, Path]) -> None:
    """Thresholds in the middle of the margins, so that every rung answers some: question by question the same rung."""
    model, manifest = vlm.load(folders["trim"])
    answers, _ = answer_split(model, manifest, folders["regions"], "val")
    thresholds = (float(np.median(answers.margins_RQ[0])), float(np.median(answers.margins_RQ[1])), 0.0)
    governor = make_governor(manifest, thresholds, None, load_recipe("test-scenes").govern)
    answered, right = through_onnx(folders, governor)
    outcome = risk.govern(answers, thresholds)
    assert len(set(answered)) >= 2
    assert np.mean(answered == np.array(answers.names)[outcome.rung_Q]) > 0.99  # rounding at a threshold
    assert np.mean(right == outcome.scores_Q) > 0.99


def test_the_halves_share_no_image_and_are_stable(folders: dict[str, Path]) -> None:
    split = RegionSplit.load(folders["regions"], "val")
    units = units_of(folders["regions"], "val", split)
    mask = held_out(units)
    assert set(units[mask]).isdisjoint(units[~mask])
    assert 0.3 < mask.mean() < 0.7
    assert len(np.unique(units)) == 60
    reversed_ = held_out(units[::-1])
    np.testing.assert_array_equal(reversed_[::-1], mask)
    np.testing.assert_array_equal(held_out(units[:50]), mask[:50])
    texts = units_of(folders["regions"], "val", split, "text")
    same = (split.input_ids[:, None] == split.input_ids[None]).all(2)
    np.testing.assert_array_equal(texts[:, None] == texts[None], same.numpy())


def test_about_half_of_many_units_are_held_out() -> None:
    share = held_out(np.array([f"image {i}" for i in range(10_000)])).mean()
    assert abs(share - 0.5) < 0.02  # four standard errors


def test_the_bundle_carries_the_governor(folders: dict[str, Path]) -> None:
    bundle = read_manifest(folders["export"], Bundle)
    governor = calibrated(folders["govern"])
    assert read_governor(folders["export"], bundle) == governor
    assert {FILE, "golden/governor.json"} <= set(bundle.files)
    assert bundle.model_hash == governor.model_hash == model_hash(read_manifest(folders["trim"], Checkpoint))
    assert [rung.name for rung in governor.rungs] == [rung.name for rung in bundle.rungs][::-1]
    assert check_governor_golden(folders["export"]) == []
    assert "at most 0.2 of the score" in (folders["export"] / "MODEL_CARD.md").read_text()


def test_a_governor_that_decides_otherwise_fails_verification(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another version might: it stays at the first rung whatever the margin."""
    monkeypatch.setattr(MarginGovernor, "next", lambda *rest: None)
    with pytest.raises(BundleError, match=r"golden cases of the governor are decided otherwise; margin: "):
        verify_folder(folders["export"], folders["trim"], tmp_path / "parity", None, False, Reporter())
    assert not (tmp_path / "parity").exists()


def test_too_little_data_certify_nothing_and_say_so(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe("test-scenes", [*OVERRIDES, "govern.epsilon=0.01"])
    job = job_for("govern", tmp_path, recipe, {name: folders[name] for name in ("trim", "regions")})
    governor = govern(job).governor
    assert not governor.certified
    assert [rung.threshold for rung in governor.rungs] == [None, None, 0.0]
    assert governor.evidence is not None and governor.evidence.num_units < governor.evidence.least_units == 232


def test_units_may_be_texts(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe("test-scenes", [*OVERRIDES, "govern.unit=text"])
    job = job_for("govern", tmp_path, recipe, {name: folders[name] for name in ("trim", "regions")})
    evidence = govern(job).governor.evidence
    assert evidence is not None and evidence.unit == "text"
    split = RegionSplit.load(folders["regions"], "val")
    assert evidence.num_units + evidence.num_tuning_units == len(torch.unique(split.input_ids, dim=0))


# --- stages -------------------------------------------------------------------------------------------------------


def test_a_changed_promise_reruns_the_governor_and_what_carries_it() -> None:
    def keys(*overrides: str) -> dict[str, str]:
        recipe = load_recipe("test-scenes", list(overrides))
        return stage_keys(stages_of(recipe), recipe, None)

    before, after = keys(), keys("govern.epsilon=0.02")
    assert {name for name in before if before[name] != after[name]} == {
        "govern",
        "export",
        "verify",
        "bench",
        "scorecard",
    }


def test_one_rung_needs_no_governor() -> None:
    stages = {stage.name: stage for stage in stages_of(load_recipe("test-scenes", ["trim.rungs={full: 8}"]))}
    assert "govern" not in stages
    assert all("govern" not in stage.inputs for stage in stages.values())


def test_behind_a_pruned_extractor_it_reads_its_regions() -> None:
    recipe = load_recipe("test-scenes", ["prune.parts=[vision, fusion]"])
    stage = next(stage for stage in stages_of(recipe) if stage.name == "govern")
    assert stage.inputs == ("trim", "regions", "pruned_regions")


# --- export and ask -----------------------------------------------------------------------------------------------


def test_export_alone_takes_the_governor_of_its_own_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    def export(checkpoint: str, out: str) -> Bundle:
        options = (["onnx"], ["fp32"], False, Reporter(), folders["govern"])
        return export_checkpoint(folders[checkpoint], tmp_path / out, None, *options)

    assert read_governor(tmp_path / "own", export("trim", "own")) == calibrated(folders["govern"])
    with pytest.raises(GovernorError, match="calibrated for another model"):
        export("prune", "other")
    assert not (tmp_path / "other").exists()


def test_ask_climbs_and_says_how(folders: dict[str, Path], picture: Path) -> None:
    reply = ask(folders["export"], picture, "is there a red circle?", adaptive=True)
    assert reply.rung == reply.passes[-1].rung and reply.fits
    assert reply.passes[-1].why in ("confident", "last")
    lines = course(reply)
    assert lines[0].startswith("image: ") and len(lines) == 1 + len(reply.passes)
    json.dumps(asdict(reply), allow_nan=False)
    fixed = ask(folders["export"], picture, "is there a red circle?", rung=reply.rung)
    assert fixed.answer == reply.answer and fixed.passes == () and course(fixed) == []


@pytest.mark.parametrize("adaptive", [False, True])
def test_ask_within_a_time(folders: dict[str, Path], picture: Path, table: Path, adaptive: bool) -> None:
    question = "is there a red circle?"
    slow = ask(folders["export"], picture, question, adaptive=adaptive, max_ms=1e9, latency=table)
    assert slow.fits and (adaptive or slow.rung == "full")
    fast = ask(folders["export"], picture, question, adaptive=adaptive, max_ms=1e-3, latency=table)
    assert not fast.fits and len(fast.passes) == 1
    assert "no rung fits the time: the fastest was taken" in course(fast) or adaptive


def test_ask_refuses_what_does_not_belong_together(
    folders: dict[str, Path], picture: Path, table: Path, tmp_path: Path
) -> None:
    bundle, question = folders["export"], "is there a red circle?"
    with pytest.raises(TargetError, match="Drop --rung"):
        ask(bundle, picture, question, rung="full", adaptive=True)
    with pytest.raises(LatencyError, match=r"--max-ms needs.*edgevlm bench"):
        ask(bundle, picture, question, max_ms=5.0)
    with pytest.raises(LatencyError, match=r"holds no latency report.*edgevlm bench"):
        ask(bundle, picture, question, max_ms=5.0, latency=tmp_path)
    report = read_manifest(table, DeviceReport)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(table, elsewhere)
    device = report.device.model_copy(update={"processor": "another processor"})
    write_manifest(elsewhere, report.model_copy(update={"device": device}))
    with pytest.raises(LatencyError, match=r"another processor.*and this is.*edgevlm bench"):
        ask(bundle, picture, question, max_ms=5.0, latency=elsewhere)
    write_manifest(elsewhere, report.model_copy(update={"bundle_key": "other"}))
    with pytest.raises(LatencyError, match=r"another bundle.*edgevlm bench"):
        ask(bundle, picture, question, max_ms=5.0, latency=elsewhere)
    tampered = tmp_path / "tampered"
    shutil.copytree(bundle, tampered)
    governor = calibrated(folders["govern"]).model_copy(update={"model_hash": "0" * 16})
    (tampered / FILE).write_text(governor.model_dump_json())
    write_manifest(tampered, read_manifest(bundle, Bundle))
    with pytest.raises(GovernorError, match="another model"):
        ask(tampered, picture, question, adaptive=True)
