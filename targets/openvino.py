"""OpenVINO: one .xml per program, and one weights.bin for all of them.

Read from the ONNX form. int8 comes from NNCF: static for the trunk, the BiFPN and the wide layers of the box head;
objectness, boxes, class scores and NMS are left out, because eight bits make ties, and ties reorder boxes. For the answer
programs static int8 is tried first (transformer preset); if it changes the answers of the calibration questions, only
their weights become int8.
"""

import hashlib
import io
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.artifacts import ExportedModel
from targets.base import TARGETS
from targets.program import ENCODE, Program
from targets.runtime import SHARED_WEIGHTS, Arrays
from targets.source import Source, files_under, folder_mb, run_batch

if TYPE_CHECKING:
    import nncf
    import openvino

FP32 = "float32 weights and arithmetic"
ENCODE_INT8 = "static int8 (NNCF) trunk, BiFPN and box-head layers, boxes and scores float32"
STATIC_ANSWERS = "static int8 (NNCF, transformer preset) answer programs"
WEIGHT_ANSWERS = "int8 weights, float32 arithmetic in the answer programs"
MIN_AGREEMENT = 0.97
"""Share of calibration questions whose answer static int8 must keep, at every rung."""
ALIGNMENT = 64
DENSE_LAST = "tee.rpn."
BOX_HEAD = ("tee.box_head.fc1.weight", "tee.box_head.fc2.weight")


def export(source: Source, precision: str, out_dir: Path) -> ExportedModel:
    """Write `<program>.xml` for every program and `weights.bin`.

    Raises:
        TargetError: int8 without calibration samples.
    """
    start = time.perf_counter()
    if precision == "int8":
        source.samples("openvino")  # before minutes of conversion
    scheme = FP32
    models = {program.name: _read(source, program) for program in source.programs}
    if precision == "int8":
        for program in source.programs:
            if program.name in source.static:
                models[program.name] = _quantise_encode(models[program.name], source, program)
        answers, answer_scheme = _quantise_answers(source, {p.name: models[p.name] for p in source.answers})
        models.update(answers)
        scheme = f"{ENCODE_INT8}; {answer_scheme}"
    for name, model in models.items():
        _describe(model, source, name, precision)
    write_shared(models, out_dir)
    return ExportedModel(
        target="openvino",
        precision=precision,
        scheme=scheme,
        programs={name: f"{name}.xml" for name in models},
        files=files_under(out_dir),
        size_mb=folder_mb(out_dir),
        tools=TARGETS["openvino"].versions(),
        seconds=round(time.perf_counter() - start, 2),
    )


def write_shared(models: dict[str, "openvino.Model"], folder: Path) -> None:
    """Save every model as `<name>.xml`, with equal constants stored once in one file."""
    import openvino

    folder.mkdir(parents=True, exist_ok=True)
    places: dict[bytes, int] = {}
    with (folder / SHARED_WEIGHTS).open("wb") as file, tempfile.TemporaryDirectory() as temporary:
        for name, model in models.items():
            path = Path(temporary) / f"{name}.xml"
            openvino.save_model(model, path, compress_to_fp16=False)
            weights = path.with_suffix(".bin").read_bytes()
            tree = ElementTree.parse(path)
            for data in tree.iterfind("./layers/layer[@type='Const']/data"):
                offset, size = int(data.attrib["offset"]), int(data.attrib["size"])
                content = weights[offset : offset + size]
                key = hashlib.sha256(content).digest()
                if key not in places:
                    file.write(b"\0" * (-file.tell() % ALIGNMENT))
                    places[key] = file.tell()
                    file.write(content)
                data.set("offset", str(places[key]))
            for element in tree.iter():  # indentation is a third of the file
                element.text, element.tail = (element.text or "").strip() or None, None
            tree.write(folder / f"{name}.xml", encoding="utf-8", xml_declaration=True)


def _read(source: Source, program: Program) -> "openvino.Model":
    import openvino

    content = source.once(f"onnx-bytes/{program.name}", lambda: source.onnx(program).SerializeToString())
    return openvino.Core().read_model(io.BytesIO(content))


def _describe(model: "openvino.Model", source: Source, name: str, precision: str) -> None:
    manifest = source.manifest
    facts = {
        "name": str(manifest.provenance.recipe.get("name", "")),
        "task": manifest.task,
        "program": name,
        "precision": precision,
        "preprocess_hash": manifest.preprocess.hash,
        "vocab_sha256": manifest.tokenizer.vocab_sha256,
    }
    for key, value in facts.items():
        model.set_rt_info(value, ["edgevlm", key])


def _quantise_encode(model: "openvino.Model", source: Source, program: Program) -> "openvino.Model":
    import nncf

    rows = source.calibration_inputs(program, "openvino")
    ignored = nncf.IgnoredScope(names=_outside_dense(model, program), validate=False)
    return nncf.quantize(
        model,
        nncf.Dataset(rows),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(rows),
        ignored_scope=ignored,
        advanced_parameters=_advanced(share_weights=False),
    )


def _advanced(*, share_weights: bool) -> "nncf.AdvancedQuantizationParameters":
    """Settings that differ from NNCF's defaults.

    * Seven-bit weights: on x86 without VNNI, sums of unsigned x signed bytes saturate.
    * Full activation ranges: the default, a mean of the samples' ranges, cuts off peaks.
    * No SmoothQuant, which moves activation scales into weights: each rung would get weights of its own, and our
      students kept 97.3 % of their answers with it against 99.2 % without. Bias correction differs per rung too.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters, OverflowFix
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    return nncf.AdvancedQuantizationParameters(
        overflow_fix=OverflowFix.ENABLE,
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=-1),
        disable_bias_correction=share_weights,
    )


def _quantise_answers(source: Source, models: dict[str, "openvino.Model"]) -> tuple[dict[str, "openvino.Model"], str]:
    import nncf

    static = {}
    for program in source.answers:
        rows = source.calibration_inputs(program, "openvino")
        # The trimmer ranks tokens: its scores stay float like all others.
        ignored = nncf.IgnoredScope(
            patterns=[".*trimmer.*"], types=["TopK", "Gather", "GatherElements"], validate=False
        )
        static[program.name] = nncf.quantize(
            models[program.name].clone(),
            nncf.Dataset(rows),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(rows),
            ignored_scope=ignored,
            advanced_parameters=_advanced(share_weights=True),
        )
    judged = [program for program in source.answers if "logits" in program.outputs]  # pieces give none
    if all(_agreement(static[program.name], source, program) >= MIN_AGREEMENT for program in judged):
        return static, STATIC_ANSWERS
    compressed = {
        name: nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM) for name, model in models.items()
    }
    return compressed, WEIGHT_ANSWERS


def _agreement(model: "openvino.Model", source: Source, program: Program) -> float:
    import openvino

    rows = source.calibration_inputs(program, "openvino")
    batch: Arrays = {name: np.concatenate([row[name] for row in rows]) for name in program.inputs}
    expected = run_batch(program, batch)["logits"].argmax(1)
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    actual = [request.infer(row)["logits"].argmax() for row in rows]
    return float(np.mean(np.array(actual) == expected))


def _outside_dense(model: "openvino.Model", program: Program) -> list[str]:
    """Names of all nodes that stay float: everything but trunk, BiFPN and the wide layers of the box head.

    In a piece of the extractor (`pieces.py`) without the RPN, whatever follows the first convolution is trunk or BiFPN.
    """
    nodes = model.get_ordered_ops()
    feeds = {
        node.get_friendly_name(): {v.get_node().get_friendly_name() for v in node.input_values()} for node in nodes
    }
    convolutions = {
        node.get_friendly_name(): _weights_name(node)
        for node in nodes
        if node.get_type_name() in ("Convolution", "GroupConvolution")
    }
    last = {name for name, weights in convolutions.items() if weights.startswith(DENSE_LAST)}
    if not last and program.name == ENCODE:
        raise ValueError(f"no convolution with weights named {DENSE_LAST}* in the graph: the exporter renamed them")
    before: set[str] = set()
    queue = list(last)
    while queue:
        for feed in feeds[queue.pop()] - before:
            before.add(feed)
            queue.append(feed)
    if not last:
        before = set(feeds)
    after: set[str] = set()
    for node in nodes:
        name = node.get_friendly_name()
        if name in convolutions or feeds[name] & after:
            after.add(name)

    # The exporter transposes linear weights and renames them, so they are found by their values.
    state = dict(program.module.named_parameters())
    wide = [state[name].detach().numpy() for name in BOX_HEAD if name in state]
    inside = before & after
    for node in nodes:
        if (
            node.get_type_name() == "MatMul"
            and (constant := node.input_value(1).get_node()).get_type_name() == "Constant"
        ):
            matrix = constant.get_data()
            if any(matrix.shape == w.T.shape and np.array_equal(matrix, w.T) for w in wide):
                inside.add(node.get_friendly_name())
    return [
        name
        for node in nodes
        if (name := node.get_friendly_name()) not in inside and node.get_type_name() != "Constant"
    ]


def _weights_name(convolution: "openvino.Node") -> str:
    """Name of a convolution's weights; those of a grouped one are reshaped first."""
    node = convolution.input_value(1).get_node()
    while node.get_input_size():
        node = node.input_value(0).get_node()
    return node.get_friendly_name()
