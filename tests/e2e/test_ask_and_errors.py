"""`ask`, `export`, `verify`, `bench` on their own, and what a user's mistakes look like: one line, exit 1, nothing written."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm.artifacts import Bundle
from edgevlm.data.scenes import Scenes
from edgevlm.manifests import read_manifest
from tests.e2e.conftest import edgevlm


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    Scenes("vqa", 7, 1).sample("test", 0).image.save(path)
    return path


def refused(*arguments: str | Path, saying: str) -> None:
    """The command fails with exit 1 and one line that holds `saying`."""
    done = edgevlm(*arguments)
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error:"), done.stderr
    assert saying in lines[0], lines[0]


@pytest.mark.parametrize("target", ["onnx", "tflite", "openvino"])
def test_ask_gives_pytorchs_answer(rehearsal: Path, picture: Path, tmp_path: Path, target: str) -> None:
    """The exported file against the PyTorch model on the same picture: same answer, probability within 1e-4."""
    import torch

    from edgevlm.data.preprocess import load_image, preprocess
    from edgevlm.data.text import Tokenizer
    from edgevlm.models import vlm

    question, drawn = "is there a red circle?", tmp_path / "looked.png"
    options = ("--target", target, "--precision", "fp32", "--json", "--draw", drawn)
    done = edgevlm("ask", rehearsal / "export", picture, question, *options)
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    model, manifest = vlm.load(rehearsal / "trim")
    pixels = torch.from_numpy(preprocess(load_image(picture), manifest.preprocess))[None].permute(0, 3, 1, 2).float()
    ids = torch.from_numpy(Tokenizer(rehearsal / "trim" / "vocab.txt", manifest.tokenizer).encode(question))[None]
    with torch.no_grad():
        probabilities = model.answer(model.encode(pixels), ids).logits_BA.softmax(1)[0]
    assert reply["answer"] == manifest.labels.answers[int(probabilities.argmax())]
    assert reply["probability"] == pytest.approx(float(probabilities.max()), abs=1e-4)
    assert np.asarray(Image.open(drawn)).std() > 0
    assert all(0 <= edge <= 128 for region in reply["regions"] for edge in region["box"])


def test_ask_with_the_governor(rehearsal: Path, picture: Path) -> None:
    """By the margin, by the time, and what is missing for either."""
    bundle, question = rehearsal / "export", "is there a red circle?"
    done = edgevlm("ask", bundle, picture, question, "--adaptive")
    assert done.returncode == 0, done.stderr
    assert "rung full: " in done.stdout, (
        "24 validation images can certify nothing: every question goes to the full rung"
    )
    options = ("--max-ms", "100000", "--latency", rehearsal / "bench", "--json")
    done = edgevlm("ask", bundle, picture, question, *options)
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert [step["rung"] for step in reply["passes"]] == ["full"] and reply["fits"]
    refused("ask", bundle, picture, question, "--max-ms", "5", saying=f"edgevlm bench {bundle}")
    refused("ask", bundle, picture, question, "--adaptive", "--rung", "b5", saying="Drop --rung")


def test_ask_mistakes(rehearsal: Path, picture: Path, tmp_path: Path) -> None:
    bundle = rehearsal / "export"
    refused("ask", bundle, tmp_path / "no.png", "is it?", saying="no.png")
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    refused("ask", bundle, text, "is it?", saying="text.png")
    cut = tmp_path / "cut.jpg"
    Image.open(picture).convert("RGB").save(cut)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    refused("ask", bundle, cut, "is it?", saying="cut.jpg")
    refused("ask", bundle, huge_png(tmp_path / "huge.png"), "is it?", saying="64 million")
    refused("ask", bundle, picture, "is " * 60, saying="24")
    refused("ask", bundle, picture, "  ", saying="no words")
    refused("ask", bundle, picture, "is it?", "--rung", "fulll", saying="Did you mean 'full'")
    refused("ask", bundle, picture, "is it?", "--target", "tensorrt", saying="tensorrt")
    refused("ask", tmp_path, picture, "is it?", saying="manifest.json is missing")


def huge_png(path: Path) -> Path:
    """A PNG whose header says 50,000 x 50,000, with hardly any data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    return path


def test_altered_and_missing_files_are_refused(rehearsal: Path, picture: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(rehearsal / "export", copy)
    model = next(m for m in read_manifest(copy, Bundle).models if (m.target, m.precision) == ("onnx", "fp32"))
    file = copy / model.files[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    refused("ask", copy, picture, "is it?", "--target", "onnx", saying="altered")
    file.unlink()
    refused("bench", copy, "--out", tmp_path / "latency", saying="missing")
    assert not (tmp_path / "latency").exists()


def test_run_mistakes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("run", "scenes-tinny", "--out", out, saying="Did you mean 'scenes-tiny'")
    refused("run", "test-scenes", "--out", out, "--set", "teacher.stepps=3", saying="Did you mean 'steps'")
    refused("run", "test-scenes", "--out", out, "--set", "data.dataset=scened", saying="Did you mean 'scenes'")
    refused("run", "nlvr-tiny", "--out", out, saying="--data")
    refused("run", "nlvr-tiny", "--out", out, "--data", tmp_path / "nowhere", saying="nowhere")
    refused("run", "test-scenes", "--out", out, "--set", "tee.name=test-te", saying="Did you mean 'test-tee'")
    refused("run", "test-scenes", "--out", out, "--set", "trim.rungs={full: 7}", saying="8")
    refused("run", "test-scenes", "--out", out, "--set", "export.targets=[onxn]", saying="Did you mean 'onnx'")
    assert not list(out.glob("*/manifest.json")), "a recipe's mistake is found before anything runs"


def test_export_verify_and_bench_alone(rehearsal: Path, tmp_path: Path) -> None:
    bundle, parity = tmp_path / "bundle", tmp_path / "parity"
    options = ("--target", "onnx", "--precision", "fp32")
    done = edgevlm("export", rehearsal / "trim", "--out", bundle, *options)
    assert done.returncode == 0, done.stderr
    refused("export", rehearsal / "trim", "--out", bundle, *options, saying="--overwrite")
    done = edgevlm("verify", bundle, "--checkpoint", rehearsal / "trim", "--out", parity, "--json")
    assert done.returncode == 0, done.stderr
    assert {row["verdict"] for row in json.loads(done.stdout)["rows"]} == {"passed"}
    refused(
        "verify", bundle, "--checkpoint", rehearsal / "prune", "--out", tmp_path / "other", saying="not exported from"
    )
    done = edgevlm("bench", bundle, "--out", tmp_path / "latency", "--runs", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 3


def test_a_broken_gate_exits_2_and_keeps_everything(rehearsal: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(rehearsal, copy)
    done = edgevlm("run", "test-scenes", "--out", copy, "--set", "gates.min_points_above_majority=99")
    assert done.returncode == 2, done.stderr
    assert "student above the majority answer" in done.stderr
    assert (copy / "scorecard" / "scorecard.html").is_file()
