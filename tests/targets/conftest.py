"""One small model, exported once to every target for all tests of this folder."""

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from calibration.choose import choose, freeze
from edgevlm.artifacts import Bundle, Checkpoint, Provenance
from edgevlm.data.frames import Frames, Questions
from edgevlm.manifests import read_manifest
from edgevlm.models.vlm import VLM, load
from edgevlm.progress import Reporter
from edgevlm.recipe import CalibrationSection
from targets.bundle import export_bundle
from targets.source import Source
from tests.targets import lively

TARGET_NAMES = ("onnx", "tflite", "openvino", "coreml")


@dataclass
class World:
    """A checkpoint, samples, and the bundle exported from them."""

    model: VLM
    manifest: Checkpoint
    checkpoint: Path
    calibration: Path
    bundle_dir: Path
    bundle: Bundle
    said: list[str]


def make_frames(num: int, seed: int, size: int = 64) -> tuple[Frames, Questions]:
    """A split: tinted images, each with one box per class in turn, and one question."""
    images, tints = lively.draw_images(num, size, seed)
    texts, answers = lively.draw_questions(tints, seed)
    boxes = [np.array([[2, 2, 10 + 8 * (i % 6), 12 + 8 * (i % 6)]], np.float32) for i in range(num)]
    frames = Frames(
        ids=[f"s{seed}-{i}" for i in range(num)],
        pixels=images,
        boxes=boxes,
        classes=[np.array([i % 3]) for i in range(num)],
        attributes=[np.zeros((1, 2), np.float32)] * num,
        texts=[()] * num,
    )
    questions = Questions(
        image_index=np.arange(num),
        input_ids=lively.encode_texts(texts, 12),
        answers=answers,
        referred=[()] * num,
        kinds=["tint"] * num,
        texts=texts,
    )
    return frames, questions


def build_world(root: Path) -> None:
    """Write checkpoint, calibration set and bundle under `root`."""
    model, manifest = lively.small_model()
    manifest = lively.write_checkpoint(root / "checkpoint", model, manifest)
    frames, questions = make_frames(80, seed=300)
    chosen = choose(frames, questions, manifest.labels, num=48, seed=0)
    section = CalibrationSection(num_samples=48, min_samples=32)
    provenance = Provenance(stage="calibrate", key="c0")
    spec, tokenizer = manifest.preprocess, manifest.tokenizer
    out = root / "calibration"
    freeze(frames, questions, chosen, manifest.labels, section, spec, tokenizer, "tints", out, provenance)
    said: list[str] = []

    class Listener(Reporter):
        def say(self, text: str) -> None:
            said.append(text)

    (root / "bundle").mkdir()
    export_bundle(
        root / "checkpoint",
        out,
        root / "bundle",
        targets=TARGET_NAMES,
        precisions=("fp32", "int8"),
        num_golden=6,
        provenance=Provenance(stage="export", key="e0", recipe={"name": "lively"}, parents={"trim": "k0"}),
        reporter=Listener(),
    )
    (root / "said.txt").write_text("\n".join(said))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The bundle of all targets at both precisions: exported once, also where several processes run the tests."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "targets-world"
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "said.txt").is_file():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            build_world(root)
    model, manifest = load(root / "checkpoint")
    bundle = read_manifest(root / "bundle", Bundle)
    said = (root / "said.txt").read_text().splitlines()
    return World(model, manifest, root / "checkpoint", root / "calibration", root / "bundle", bundle, said)


@pytest.fixture(scope="session")
def source(world: World) -> Source:
    """The PyTorch side of the bundle."""
    return Source(world.model, world.manifest)
