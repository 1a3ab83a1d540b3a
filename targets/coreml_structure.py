"""What can be said about a Core ML package without a Mac: its functions, their inputs and outputs, and its weights.

This is no proof that Core ML gives the right answers, and parity says so: evidence 'none', verdict 'unproven'.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from edgevlm.artifacts import Bundle, Checkpoint
from edgevlm.models.vlm import VLM
from targets.program import ENCODE, build_programs
from targets.source import Source

FP32_TOLERANCE = 1e-5
"""Largest |difference| of a weight, relative to the tensor's largest value."""
INT8_STEP = 0.51 / 127
"""Half a quantisation step of a symmetric int8 channel, with room for rounding, relative to its largest value."""
UNUSED = ("referred.", "fusion.types.", "edge_weights", "tee.box_head.attributes.")
"""Parameters of training only, or folded into others by the converter."""


def check_structure(package: Path, manifest: Bundle | Checkpoint, model: VLM) -> list[str]:
    """Compare a package with the model it should hold.

    Args:
        package: the .mlpackage folder.
        manifest: names, rungs and shapes to expect.
        model: the PyTorch weights to find.

    Returns:
        Problems in words; empty if functions, inputs, outputs and weights are as they should be.
    """
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    spec: Any = ct.utils.load_spec(str(package))
    problems = list(_interface_problems(spec, manifest, model))
    weights = package / "Data" / "com.apple.CoreML" / "weights"
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(weights))
    tensors: dict[str, list[np.ndarray]] = {}
    for name, function in program.functions.items():
        for where, value, compressed in _constants(function.operations):
            if not np.isfinite(value).all():
                problems.append(f"{name}: constant {where} is not finite")
            tensors.setdefault(f"{name}/{'int8' if compressed else 'fp32'}", []).append(value)
    return problems + list(_weight_problems(tensors, model))


def _interface_problems(spec: Any, manifest: Bundle | Checkpoint, model: VLM) -> Iterator[str]:
    from coremltools.proto import FeatureTypes_pb2

    kinds = FeatureTypes_pb2.ArrayFeatureType
    found = {function.name: function for function in spec.description.functions}
    checkpoint = manifest if isinstance(manifest, Checkpoint) else _as_checkpoint(manifest)
    programs = build_programs(model, checkpoint)
    if set(found) != {program.name for program in programs}:
        yield f"functions {sorted(found)}, expected {sorted(p.name for p in programs)}"
        return
    shapes = _output_shapes(Source(model, checkpoint))
    for program in programs:
        function = found[program.name]
        inputs = {i.name: i.type for i in function.input}
        if set(inputs) != set(program.inputs):
            yield f"{program.name} takes {sorted(inputs)}, expected {sorted(program.inputs)}"
            continue
        for name, example in program.inputs.items():
            if program.name == ENCODE:
                image = inputs[name].imageType
                size = (image.height, image.width)
                if size != tuple(example.shape[1:3]) or image.colorSpace != image.RGB:
                    yield f"{program.name}: image is {size}, expected RGB {tuple(example.shape[1:3])}"
                continue
            array = inputs[name].multiArrayType
            kind = kinds.INT32 if example.dtype.is_floating_point is False else kinds.FLOAT32
            if tuple(array.shape) != tuple(example.shape) or array.dataType != kind:
                yield f"{program.name}: {name} is {tuple(array.shape)} of type {array.dataType}"
        outputs = {o.name: o.type.multiArrayType for o in function.output}
        for name in program.outputs:
            if name not in outputs:
                yield f"{program.name} has no output {name}"
            elif tuple(outputs[name].shape) != shapes[program.name][name] or outputs[name].dataType != kinds.FLOAT32:
                yield f"{program.name}: {name} is {tuple(outputs[name].shape)}, expected {shapes[program.name][name]}"


def _as_checkpoint(bundle: Bundle) -> Checkpoint:
    shared = ("provenance", "model", "task", "preprocess", "tokenizer", "labels", "rungs")
    return Checkpoint(**{name: getattr(bundle, name) for name in shared})


def _output_shapes(source: Source) -> dict[str, dict[str, tuple[int, ...]]]:
    from targets.source import run_batch

    shapes = {}
    for program in source.programs:
        outputs = run_batch(program, {name: x.numpy() for name, x in program.inputs.items()})
        shapes[program.name] = {name: y.shape for name, y in outputs.items()}
    return shapes


def _constants(operations: Any) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Name, value and whether it was compressed, of every float constant that computation sees."""
    for operation in operations:
        if operation.op_type.startswith("constexpr_"):
            yield operation.name, np.asarray(operation.materialized_val_inference()), True
        elif operation.op_type == "const":
            value = operation.outputs[0].val
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                yield operation.name, value, False


def _weight_problems(tensors: dict[str, list[np.ndarray]], model: VLM) -> Iterator[str]:
    """Every matrix and kernel of the model must be found among the constants of the functions that use it."""
    answers = sorted({key.split("/")[0] for key in tensors} - {ENCODE})
    norms = [m.weight / (m.running_var + m.eps).sqrt() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    scales = [scale.detach().numpy() for scale in norms]
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or any(part in name for part in UNUSED):
            continue
        value = parameter.detach().numpy()
        functions = [ENCODE] if name.startswith("tee.") else answers
        missing = [
            function
            for function in functions
            if not any(_same(value, c, scales, FP32_TOLERANCE) for c in tensors.get(f"{function}/fp32", []))
            and not any(_same(value, c, scales, INT8_STEP) for c in tensors.get(f"{function}/int8", []))
        ]
        if name.startswith("fusion.trimmer."):  # the full budget has no use for it
            missing = missing if len(answers) > 1 and missing == functions else []
        yield from (f"{function}: no constant equals the weights {name}" for function in missing)


def _same(weight: np.ndarray, constant: np.ndarray, scales: list[np.ndarray], tolerance: float) -> bool:
    """Whether a constant is the weight, up to the scales of a BatchNorm (and one number) folded into a convolution."""
    if constant.shape != weight.shape:
        return False
    limit = tolerance * max(float(np.abs(weight).max()), 1e-12)
    if np.abs(constant - weight).max() <= limit:
        return True
    rows, rows_const = weight.reshape(len(weight), -1), constant.reshape(len(weight), -1)
    if tolerance > FP32_TOLERANCE:  # per channel, each with its own step
        limits = tolerance * np.abs(rows_const).max(1)
        if (np.abs(rows - rows_const).max(1) <= np.maximum(limits, tolerance * np.abs(rows).max(1))).all():
            return True
    if weight.ndim != 4:
        return False
    ratio = (rows * rows_const).sum(1) / np.maximum((rows * rows).sum(1), 1e-12)
    error = np.abs(rows * ratio[:, None] - rows_const).max(1)
    if (error > max(2 * tolerance, 1e-4) * np.maximum(np.abs(rows_const).max(1), 1e-12)).any():
        return False
    candidates = [np.ones_like(ratio), *(scale for scale in scales if scale.shape == ratio.shape)]
    spread = 1e-3 if tolerance == FP32_TOLERANCE else 2e-2
    return any(float(np.ptp(ratio / scale)) <= spread * abs(float((ratio / scale).mean())) for scale in candidates)
