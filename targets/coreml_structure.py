"""What can be said about a Core ML package without a Mac: its functions, their inputs and outputs, and its weights.

This is no proof that Core ML gives the right answers, and parity says so: evidence 'none', verdict 'unproven'.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from edgevlm.artifacts import Checkpoint, Rung, TrimConfig
from targets.program import ENCODE, Program, answer_name, rungs_of
from targets.source import Source, run_batch

FP32_TOLERANCE = 1e-5
"""Largest |difference| of a weight, relative to the tensor's largest value."""
INT8_STEP = 0.51 / 127
"""Half a quantisation step of a symmetric int8 channel, with room for rounding, relative to its largest value."""
FOLDED = ("fusion.types.",)
"""Parameters that the converter folds into others."""


def check_structure(package: Path, source: Source) -> list[str]:
    """Compare a package with the model it should hold.

    Args:
        package: the .mlpackage folder.
        source: the model that it was exported from.

    Returns:
        Problems in words; empty if functions, inputs, outputs and weights are as they should be.
    """
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    spec: Any = ct.utils.load_spec(str(package))
    problems = list(_interface_problems(spec, source))
    weights = package / "Data" / "com.apple.CoreML" / "weights"
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(weights))
    tensors: dict[str, list[np.ndarray]] = {}
    for name, function in program.functions.items():
        for where, value, compressed in _constants(function.operations):
            if not np.isfinite(value).all():
                problems.append(f"{name}: constant {where} is not finite")
            tensors.setdefault(f"{name}/{'int8' if compressed else 'fp32'}", []).append(value)
        if budget := _budget_problem(name, function.operations, source):
            problems.append(budget)
    return problems + list(_weight_problems(tensors, source))


def _interface_problems(spec: Any, source: Source) -> Iterator[str]:
    from coremltools.proto import FeatureTypes_pb2

    kinds: Any = FeatureTypes_pb2.ArrayFeatureType
    found = {function.name: function for function in spec.description.functions}
    programs = source.programs
    if set(found) != {program.name for program in programs}:
        yield f"functions {sorted(found)}, expected {sorted(p.name for p in programs)}"
        return
    shapes = _output_shapes(source)
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


def _budget_problem(name: str, operations: Any, source: Source) -> str:
    """An answer program with a trimmer must keep as many tokens as its rung says."""
    rung = {answer_name(rung.name): rung for rung in rungs_of(source.manifest)}.get(name)
    trim = source.manifest.model.fusion.trim
    if rung is None or trim is None or trim.policy == "similarity":
        return ""
    wanted = _numbers_kept(rung, source.manifest, trim)
    kept = [int(operation.k.val) for operation in operations if operation.op_type == "topk"]
    return "" if kept == wanted else f"{name} keeps {kept} tokens, its rung {wanted}"


def _numbers_kept(rung: Rung, manifest: Checkpoint, trim: TrimConfig) -> list[int]:
    """Of each choice that the rung's program makes, in order: words, then regions, behind each trimming layer."""
    words, regions = rung.num_words or manifest.tokenizer.max_tokens, rung.num_regions or manifest.model.tee.num_regions
    wanted = []
    for place in range(len(rung.regions)):
        if rung.words and rung.words[place] < words:
            words = rung.words[place]
            wanted.append(words)
        if rung.regions[place] < regions:
            regions = rung.regions[place]
            wanted.append(regions)
            if trim.context > 1:  # the context token that each dropped region joins
                wanted.append(1)
    return wanted


def _output_shapes(source: Source) -> dict[str, dict[str, tuple[int, ...]]]:
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


def _weight_problems(tensors: dict[str, list[np.ndarray]], source: Source) -> Iterator[str]:
    """Every matrix and kernel of the model must be found among the constants of the functions that use it."""
    norms = [m for m in source.model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_var is not None]
    scales = [(m.weight / (m.running_var + m.eps).sqrt()).detach().numpy() for m in norms]  # pyright: ignore
    num_words = {answer_name(rung.name): rung.num_words for rung in rungs_of(source.manifest)}
    for program in source.programs:
        exact = tensors.get(f"{program.name}/fp32", [])
        near = tensors.get(f"{program.name}/int8", [])
        if program.name == ENCODE:
            for name, value in (("mean", source.model.tee.mean), ("1 / std", source.model.tee.inv_std)):
                if not any(c.size == 3 and np.allclose(c.ravel(), value.ravel(), rtol=1e-5) for c in exact):
                    yield f"{program.name}: no constant equals the {name} of the preprocessing"
        for name, parameter in used_parameters(source, program).items():
            if parameter.ndim < 2 or name.startswith(FOLDED):
                continue
            if name == "fusion.positions.weight":  # a constant of those that the rung reads
                parameter = parameter[: num_words.get(program.name)]
            if name == "fusion.parts":  # the converter computes their norm once, for a batch of one
                parameter = source.model.fusion.part_norm(source.model.fusion.parts).detach().numpy()[None]
            found = any(_same(parameter, constant, scales, FP32_TOLERANCE) for constant in exact)
            if not found and not any(_same(parameter, constant, scales, INT8_STEP) for constant in near):
                yield f"{program.name}: no constant equals the weights {name}"


def used_parameters(source: Source, program: Program) -> dict[str, np.ndarray]:
    """The parameters that a program's outputs depend on, by their names in the module.

    A trunk may hold stages that nobody asks for, and the box head has outputs for training only.
    """
    exported = source.exported(program)
    names = exported.graph_signature.inputs_to_parameters
    needed, queue = set(), [node for node in exported.graph.nodes if node.op == "output"]
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                queue.append(node)
    used = {names[node.name] for node in needed if node.name in names}
    return {name: x.detach().numpy() for name, x in program.module.named_parameters() if name in used}


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
