"""One small model, exported once to every target for all tests of this folder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from calibration.choose import choose, freeze
from edgevlm.artifacts import Bundle, Checkpoint, Provenance
from edgevlm.data.frames import Frames, Questions
from edgevlm.models.vlm import VLM
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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> tuple[VLM, Checkpoint, Path, Path]:
    """Model, manifest, checkpoint folder and calibration folder."""
    model, manifest = lively.small_model()
    folder = tmp_path_factory.mktemp("checkpoint")
    manifest = lively.write_checkpoint(folder, model, manifest)
    frames, questions = make_frames(80, seed=300)
    chosen = choose(frames, questions, manifest.labels, num=48, seed=0)
    calibration = tmp_path_factory.mktemp("calibration")
    section = CalibrationSection(num_samples=48, min_samples=32)
    provenance = Provenance(stage="calibrate", key="c0")
    spec, tokenizer = manifest.preprocess, manifest.tokenizer
    freeze(frames, questions, chosen, manifest.labels, section, spec, tokenizer, "tints", calibration, provenance)
    return model, manifest, folder, calibration


@pytest.fixture(scope="session")
def world(checkpoint, tmp_path_factory) -> World:
    """The bundle of all targets at both precisions."""
    from edgevlm.progress import Reporter

    said: list[str] = []

    class Listener(Reporter):
        def say(self, text: str) -> None:
            said.append(text)

    model, manifest, folder, calibration = checkpoint
    out = tmp_path_factory.mktemp("bundle")
    bundle = export_bundle(
        folder,
        calibration,
        out,
        targets=TARGET_NAMES,
        precisions=("fp32", "int8"),
        num_golden=6,
        provenance=Provenance(stage="export", key="e0", recipe={"name": "lively"}, parents={"trim": "k0"}),
        reporter=Listener(),
    )
    return World(model, manifest, folder, calibration, out, bundle, said)


@pytest.fixture(scope="session")
def source(world: World) -> Source:
    """The PyTorch side of the bundle."""
    return Source(world.model, world.manifest)
