"""Every exported file against PyTorch, on the file's own runtime."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm.data.text import Tokenizer
from edgevlm.errors import BundleError, GovernorError, TargetError
from targets.base import open_model
from targets.bundle import open_bundle
from targets.golden import check_golden, read_golden
from targets.governor import read_governor
from targets.parity import Outputs, Samples, box_match, reference, run_samples
from targets.runtime import SHARED_WEIGHTS
from tests.targets.conftest import make_frames

RUNNABLE = ("onnx", "tflite", "openvino")


@pytest.fixture(scope="module")
def samples(source) -> Samples:
    frames, questions = make_frames(60, seed=7)
    return reference(source, questions, frames.pixels)


@pytest.fixture(scope="module")
def outputs(world, samples) -> dict[tuple[str, str], Outputs]:
    """What every runnable file makes of the samples."""
    results = {}
    for model in world.bundle.models:
        if model.target in RUNNABLE:
            session = open_model(model, world.bundle_dir)
            results[model.target, model.precision] = run_samples(session, samples)
            session.close()
    return results


def test_every_target_is_exported(world) -> None:
    made = [(model.target, model.precision) for model in world.bundle.models]
    assert made == [(t, p) for t in ("onnx", "tflite", "openvino", "coreml") for p in ("fp32", "int8")]
    assert world.bundle.failures == ()
    assert len(world.said) == 8
    for model in world.bundle.models:
        assert set(model.programs) == {"encode_image", "answer_b8", "answer_b5", "answer_b3"}
        assert all((world.bundle_dir / file).is_file() for file in model.files)
        assert model.size_mb == pytest.approx(sum((world.bundle_dir / f).stat().st_size for f in model.files) / 1e6)
        assert model.tools["torch"]


@pytest.mark.parametrize("target", RUNNABLE)
def test_fp32_gives_pytorchs_logits(outputs, samples, target: str) -> None:
    got = outputs[target, "fp32"]
    for rung, want in samples.logits.items():
        assert np.abs(got.logits[rung] - want).max() <= 1e-4, rung
        assert np.abs(got.same_input[rung] - want).max() <= 1e-4, rung
    assert box_match(samples.regions, got.regions, 0.2) >= 0.995
    for name, want in samples.regions.items():
        assert np.abs(got.regions[name] - want).max() <= 1e-3, name


@pytest.mark.parametrize("target", RUNNABLE)
def test_int8_keeps_the_answers(outputs, samples, target: str) -> None:
    got = outputs[target, "int8"]
    for rung, want in samples.logits.items():
        assert (got.logits[rung].argmax(1) == want.argmax(1)).mean() >= 0.85, rung
        assert (got.same_input[rung].argmax(1) == want.argmax(1)).mean() >= 0.95, rung
        assert np.abs(got.same_input[rung] - want).max() <= 1.0, rung
        assert np.abs(got.logits[rung] - want).max() > 1e-3, f"{rung}: this is not int8"


def test_int8_files_are_smaller_where_weights_count(world) -> None:
    def weights(target: str, precision: str) -> int:
        folder = world.bundle_dir / target / precision
        return sum(f.stat().st_size for f in folder.rglob("*") if f.name in (SHARED_WEIGHTS, "weight.bin"))

    for target in ("onnx", "openvino"):
        assert weights(target, "int8") < 0.7 * weights(target, "fp32"), target
    assert weights("coreml", "int8") < 0.8 * weights("coreml", "fp32")


def test_openvino_gives_the_same_answers_from_the_onnx_files(world, samples) -> None:
    """A second runtime reads the ONNX form, external weights and all."""
    openvino = pytest.importorskip("openvino")
    core, settings = openvino.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    folder = world.bundle_dir / "onnx" / "fp32"

    def load(name: str):
        return core.compile_model(core.read_model(folder / f"{name}.onnx"), "CPU", settings).create_infer_request()

    encode, answer = load("encode_image"), load("answer_b5")
    for row in range(10):
        image = samples.image_index[row]
        regions = encode.infer({"image": samples.pixels[image][None]}, share_outputs=False)
        inputs = {name: regions[name] for name in ("features", "boxes", "scores")}
        logits = answer.infer({**inputs, "input_ids": samples.input_ids[row][None]})["logits"]
        assert np.abs(logits[0] - samples.logits["b5"][row]).max() <= 1e-4


def constants(path: Path) -> dict[int, int]:
    """Offset in weights.bin -> size, of the constants that one program's graph refers to."""
    if path.suffix == ".xml":
        data = ElementTree.parse(path).iterfind("./layers/layer[@type='Const']/data")
        return {int(d.attrib["offset"]): int(d.attrib["size"]) for d in data}
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path, load_external_data=False)
    entries = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    return {int(entry["offset"]): int(entry["length"]) for entry in entries}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_rungs_share_one_set_of_weights(world, target: str, precision: str) -> None:
    """What a second and third rung add to the weights file is at most 5 % of one (the trimmer aside)."""
    files = {m.target + m.precision: m.programs for m in world.bundle.models}[target + precision]
    places = {name: constants(world.bundle_dir / file) for name, file in files.items()}
    b5, b3 = places["answer_b5"], places["answer_b3"]
    added = sum(size for offset, size in b3.items() if offset not in b5)
    total = sum((world.bundle_dir / model).stat().st_size for model in {*files.values()})
    print(f"{target} {precision}: b3 adds {added} bytes of weights to b5's {sum(b5.values())}; graphs {total} bytes")
    assert added <= 0.05 * sum(b5.values())
    content = (world.bundle_dir / target / precision / SHARED_WEIGHTS).read_bytes()
    pieces = {(offset, size) for place in places.values() for offset, size in place.items()}
    assert len({content[o : o + n] for o, n in pieces}) == len(pieces), "the same bytes are stored twice"


def test_core_ml_functions_share_one_set_of_weights(world) -> None:
    size = (world.bundle_dir / "coreml/fp32/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    parameters = sum(p.numel() for p in world.model.parameters()) * 4
    answers = sum(p.numel() for name, p in world.model.named_parameters() if not name.startswith("tee.")) * 4
    print(f"coreml fp32: weights {size} bytes; the model's parameters {parameters}, one answer program's {answers}")
    assert size < parameters + 0.5 * answers


def test_a_tflite_rung_costs_its_graph_only(world) -> None:
    sizes = {p: (world.bundle_dir / "tflite" / p / "model.tflite").stat().st_size for p in ("fp32", "int8")}
    parameters = sum(p.numel() for p in world.model.parameters()) * 4
    answers = sum(p.numel() for name, p in world.model.named_parameters() if not name.startswith("tee.")) * 4
    print(f"tflite bytes: {sizes}; parameters {parameters}, of one answer program {answers}")
    graph = sizes["fp32"] - parameters  # names, shapes and operators of four signatures
    assert graph < 250_000


def test_the_image_goes_in_as_bytes(world) -> None:
    """uint8 in every form, also int8 ones: quantisers like to change the type of inputs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    for precision in ("fp32", "int8"):
        session = onnxruntime.InferenceSession(str(world.bundle_dir / "onnx" / precision / "encode_image.onnx"))
        assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [("image", "tensor(uint8)", [1, 64, 64, 3])]
        assert {o.type for o in session.get_outputs()} == {"tensor(float)"}
        facts = session.get_modelmeta().custom_metadata_map
        assert facts["edgevlm.preprocess_hash"] == world.manifest.preprocess.hash
        assert facts["edgevlm.precision"] == precision
        litert = pytest.importorskip("ai_edge_litert.interpreter")
        interpreter = litert.Interpreter(str(world.bundle_dir / "tflite" / precision / "model.tflite"))
        image = interpreter.get_signature_runner("encode_image").get_input_details()["image"]
        assert (image["dtype"], image["shape"].tolist()) == (np.uint8, [1, 64, 64, 3])
        outputs = interpreter.get_signature_runner("answer_b3").get_output_details()
        assert {name: d["dtype"] for name, d in outputs.items()} == {"logits": np.float32, "looked_at": np.float32}


def test_looked_at_points_at_the_regions_that_were_kept(world, samples) -> None:
    model = next(m for m in world.bundle.models if (m.target, m.precision) == ("onnx", "fp32"))
    session = open_model(model, world.bundle_dir)
    regions = {name: x[:1] for name, x in samples.regions.items()}
    for rung, kept in (("b8", 8), ("b3", 3)):
        looked = session.run(f"answer_{rung}", {**regions, "input_ids": samples.input_ids[:1]})["looked_at"][0]
        assert (looked > 0).sum() <= kept
        assert 0 < looked.sum() <= 1.0001


# --- golden cases --------------------------------------------------------------------------------------------------


def test_without_a_calibration_there_is_no_governor(world) -> None:
    assert world.bundle.model_hash and not [name for name in world.bundle.files if "governor" in name]
    with pytest.raises(GovernorError, match=r"has no governor\.json.*--governor"):
        read_governor(world.bundle_dir, world.bundle)


def test_golden_cases_pass_on_every_runnable_file(world) -> None:
    for model in world.bundle.models:
        if model.target in RUNNABLE:
            session = open_model(model, world.bundle_dir)
            assert check_golden(session, world.bundle_dir, world.bundle.labels, model.precision) == [], model.target


def test_golden_cases_hold_together(world) -> None:
    """Picture, question, ids and answer of a case belong together, and can be made again from scratch."""
    arrays, description = read_golden(world.bundle_dir)
    tokenizer = Tokenizer(world.bundle_dir / "vocab.txt", world.bundle.tokenizer)
    assert len(description["cases"]) == len(arrays["pixels"]) == 6
    for row, case in enumerate(description["cases"]):
        picture = np.asarray(Image.open(world.bundle_dir / case["image"]))
        assert np.array_equal(picture, arrays["pixels"][row])
        assert tokenizer.encode(case["question"]).tolist() == case["input_ids"] == arrays["input_ids"][row].tolist()
        for rung, answer in case["answers"].items():
            assert world.bundle.labels.answers[arrays[f"logits_{rung}"][row].argmax()] == answer
    assert all(entry["why"] for entry in description["tolerances"].values())
    assert len({case["answers"]["b8"] for case in description["cases"]}) >= 3


# --- a bundle on disk ----------------------------------------------------------------------------------------------


def test_bundle_holds_what_an_app_needs(world) -> None:
    labels = json.loads((world.bundle_dir / "labels.json").read_text())
    assert labels["answers"] == list(world.manifest.labels.answers)
    preprocess = json.loads((world.bundle_dir / "preprocess.json").read_text())
    assert (preprocess["height"], preprocess["hash"]) == (64, world.manifest.preprocess.hash)
    card = (world.bundle_dir / "MODEL_CARD.md").read_text()
    for model in world.bundle.models:
        assert model.scheme in card
    for path in world.bundle_dir.rglob("*"):
        assert (
            not path.is_file()
            or path.name == "manifest.json"
            or str(path.relative_to(world.bundle_dir)) in world.bundle.files
        )


def test_open_bundle(world) -> None:
    bundle, model, session = open_bundle(world.bundle_dir, "onnx")
    assert (bundle.name, model.precision) == ("lively", "int8")
    assert session.run("encode_image", {"image": np.zeros((1, 64, 64, 3), np.uint8)})["boxes"].shape == (1, 8, 4)
    with pytest.raises(TargetError, match=r"has no onnx at 'fp16'.*It has: fp32, int8"):
        open_bundle(world.bundle_dir, "onnx", "fp16")
    with pytest.raises(BundleError, match="No bundle in"):
        open_bundle(world.checkpoint / "nowhere", "onnx")


@pytest.mark.parametrize(
    "victim", ["onnx/fp32/weights.bin", "tflite/int8/model.tflite", "vocab.txt", "golden/golden.npz"]
)
def test_an_altered_file_is_noticed(world, tmp_path: Path, victim: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(world.bundle_dir, folder)
    content = bytearray((folder / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / victim).write_bytes(content)
    with pytest.raises(BundleError, match=f"{victim} was altered"):
        open_bundle(folder, "onnx")
    (folder / victim).unlink()
    with pytest.raises(BundleError, match=f"{victim} is missing"):
        open_bundle(folder, "onnx")
