"""ONNX: one small graph per program, and one file of weights for all of them.

int8 is static QDQ for the convolutions of `encode_image` and the wide layers of its box head, and dynamic for the
answer programs. Objectness, boxes, class scores and NMS stay float: eight bits make ties, and ties reorder boxes.

On x86 without VNNI, ONNX Runtime's kernels for unsigned x signed bytes saturate 16-bit sums, and a model that was right
on the build machine is quietly wrong on the user's. So weights are unsigned like activations: those kernels are exact.
"""

import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgevlm.artifacts import ExportedModel
from targets.base import TARGETS
from targets.program import ENCODE, Program
from targets.runtime import SHARED_WEIGHTS, Arrays
from targets.source import Source, files_under, folder_mb

if TYPE_CHECKING:
    from onnx import ModelProto

SCHEMES = {
    "fp32": "float32 weights and arithmetic",
    "int8": "static int8 QDQ (U8U8, per channel) for convolutions and wide box-head layers, boxes and scores float32; "
    "dynamic int8 (U8U8) for the answer programs",
}
EXTERNAL_BYTES = 256
"""Larger tensors go to the shared file; smaller ones stay inside, where shape inference can read them."""
ALIGNMENT = 64
STATIC_TYPES = {"Conv", "Clip", "Relu", "Add", "MaxPool"}
DENSE_FIRST, DENSE_LAST = "tee.trunk.", "tee.rpn."
BOX_HEAD = ("tee.box_head.fc1.weight", "tee.box_head.fc2.weight")
DYNAMIC_TYPES = ["MatMul", "Gemm", "Gather"]


def export(source: Source, precision: str, out_dir: Path) -> ExportedModel:
    """Write `<program>.onnx` for every program and `weights.bin`.

    Raises:
        TargetError: int8 without calibration samples.
    """
    start = time.perf_counter()
    if precision == "int8":
        source.samples("onnx")  # before minutes of conversion
    models: dict[str, ModelProto] = {}
    for program in source.programs:
        model = source.onnx(program)
        if precision == "int8":
            model = _static_int8(model, source, program) if program.name in source.static else _dynamic_int8(model)
        _describe(model, source, program, precision)
        models[program.name] = model
    write_shared(models, out_dir)
    return ExportedModel(
        target="onnx",
        precision=precision,
        scheme=SCHEMES[precision],
        programs={name: f"{name}.onnx" for name in models},
        files=files_under(out_dir),
        size_mb=folder_mb(out_dir),
        tools=TARGETS["onnx"].versions(),
        seconds=round(time.perf_counter() - start, 2),
    )


def write_shared(models: dict[str, "ModelProto"], folder: Path) -> None:
    """Save every model as `<name>.onnx`, with equal weights stored once in one external file."""
    from onnx import external_data_helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    places: dict[bytes, tuple[int, int]] = {}
    with (folder / SHARED_WEIGHTS).open("wb") as file:
        for name, model in models.items():
            for tensor in model.graph.initializer:
                content = numpy_helper.to_array(tensor).tobytes()
                if len(content) < EXTERNAL_BYTES:
                    continue
                key = hashlib.sha256(content).digest()
                if key not in places:
                    file.write(b"\0" * (-file.tell() % ALIGNMENT))
                    places[key] = (file.tell(), len(content))
                    file.write(content)
                offset, length = places[key]
                for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                    tensor.ClearField(field)
                tensor.raw_data = content  # set_external_data wants it, and then it goes
                external_data_helper.set_external_data(tensor, SHARED_WEIGHTS, offset=offset, length=length)
                tensor.ClearField("raw_data")
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))


def _describe(model: "ModelProto", source: Source, program: Program, precision: str) -> None:
    manifest = source.manifest
    facts = {
        "name": str(manifest.provenance.recipe.get("name", "")),
        "task": manifest.task,
        "program": program.name,
        "rung": program.name.removeprefix("answer_") if program.name != ENCODE else "",
        "precision": precision,
        "preprocess_hash": manifest.preprocess.hash,
        "vocab_sha256": manifest.tokenizer.vocab_sha256,
    }
    del model.metadata_props[:]
    for key, value in facts.items():
        model.metadata_props.add(key=f"edgevlm.{key}", value=value)
    model.producer_name = "edgevlm"
    for node in model.graph.node:  # the exporter's traces of our source files
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]


def _dynamic_int8(model: "ModelProto") -> "ModelProto":
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    del model.graph.value_info[:]  # quantize_dynamic finds its own shapes in conflict with the exporter's
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_dynamic(
            model, path, op_types_to_quantize=DYNAMIC_TYPES, per_channel=True, weight_type=QuantType.QUInt8
        )
        return onnx.load(path)


def _static_int8(model: "ModelProto", source: Source, program: Program) -> "ModelProto":
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self, rows: list[Arrays]) -> None:
            self._rows: Iterator[Arrays] = iter(rows)

        def get_next(self) -> Arrays | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            return next(self._rows, None)

    nodes = quantised_nodes(model, program)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_static(
            model,
            path,
            Reader(source.calibration_inputs(program, "onnx")),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QUInt8,
            per_channel=True,
            nodes_to_quantize=nodes,
            op_types_to_quantize=[*STATIC_TYPES, "MatMul"],
            calibrate_method=CalibrationMethod.MinMax,
        )
        return onnx.load(path)


def quantised_nodes(model: "ModelProto", program: Program) -> list[str]:
    """Names of the nodes of `encode_image` that become int8: trunk, BiFPN, and the wide layers of the box head.

    In a piece of it (`pieces.py`) without the RPN, whatever follows the first convolution is trunk or BiFPN.
    """
    import numpy as np
    from onnx import numpy_helper

    nodes = list(model.graph.node)
    by_output = {output: i for i, node in enumerate(nodes) for output in node.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [i for i, node in enumerate(nodes) if node.op_type == "Conv"]
    last = {i for i in convolutions if nodes[i].input[1].startswith(DENSE_LAST)}
    starts = any(nodes[i].input[1].startswith(DENSE_FIRST) for i in convolutions)
    if program.name == ENCODE and not (last and starts):
        raise ValueError(f"no convolutions of {DENSE_FIRST} or {DENSE_LAST} in the graph: the exporter renamed them")
    before: set[int] = set()  # everything the objectness and delta convolutions depend on
    queue = list(last)
    while queue:
        for name in nodes[queue.pop()].input:
            if (i := by_output.get(name)) is not None and i not in before:
                before.add(i)
                queue.append(i)
    if not last:
        before = set(range(len(nodes)))
    after: set[int] = set()  # everything from the first convolution on (node order is topological)
    reached = {output for i in convolutions for output in nodes[i].output}
    for i, node in enumerate(nodes):
        if i in convolutions or reached & set(node.input):
            after.add(i)
            reached |= set(node.output)
    chosen = {i for i in before & after if nodes[i].op_type in STATIC_TYPES}

    # The exporter transposes linear weights and renames them, so they are found by their values.
    state = dict(program.module.named_parameters())
    wide = [state[name].detach().numpy() for name in BOX_HEAD if name in state]
    for i, node in enumerate(nodes):
        if node.op_type == "MatMul" and node.input[1] in weights:
            matrix = numpy_helper.to_array(weights[node.input[1]])
            if any(matrix.shape == w.T.shape and np.array_equal(matrix, w.T) for w in wide):
                chosen.add(i)
    return [nodes[i].name for i in sorted(chosen)]
