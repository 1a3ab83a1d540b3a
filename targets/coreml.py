"""Core ML: one .mlpackage (ML program, iOS 18 / macOS 15) with a function per program, all sharing one weight file.

`encode_image` takes an image (8-bit RGB from the app); Core ML hands its planes to the graph as 0..255 floats, and the
graph normalises. fp32 computes in float32 throughout. int8 is weight-only (per channel, symmetric; float32
arithmetic): smaller, not faster before A17 Pro / M4; objectness, box deltas and class scores keep float32 weights.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgevlm.artifacts import ExportedModel
from targets.base import TARGETS
from targets.program import ENCODE, EncodePlanes, Program
from targets.source import Source, files_under, folder_mb

MLModel = Any
"""coremltools' class of that name; its annotations are too loose to check against."""

SCHEMES = {
    "fp32": "float32 weights and arithmetic",
    "int8": "weight-only int8 (per channel, symmetric), float32 arithmetic; score and box layers float32",
}
PACKAGE = "model.mlpackage"
MIN_WEIGHTS = 1024
"""Smaller tensors stay float: compressing them saves nothing."""
KEEP_FLOAT = ("tee.rpn.", "tee.box_head.classes.", "tee.box_head.deltas.", "fusion.trimmers.", "head.outer.")
"""Beginnings of the names of weights that decide an order or an answer directly."""


def export(source: Source, precision: str, out_dir: Path) -> ExportedModel:
    """Write `model.mlpackage`. Works on Linux; only a Mac can run it."""
    import coremltools as ct

    start = time.perf_counter()
    out_dir.mkdir(parents=True, exist_ok=True)
    package = out_dir / PACKAGE
    if package.exists():
        shutil.rmtree(package)
    with tempfile.TemporaryDirectory() as folder:
        functions = ct.utils.MultiFunctionDescriptor()
        for program in source.programs:
            model = source.once(f"coreml/{program.name}", lambda program=program: _convert(source, program))
            if precision == "int8":
                model = _compress(model, source, program)
            path = str(Path(folder) / f"{program.name}.mlpackage")
            model.save(path)
            functions.add_function(path, src_function_name="main", target_function_name=program.name)
        functions.default_function_name = ENCODE
        ct.utils.save_multifunction(functions, str(package))
    _describe(package, source, precision)
    return ExportedModel(
        target="coreml",
        precision=precision,
        scheme=SCHEMES[precision],
        programs={program.name: PACKAGE for program in source.programs},
        files=files_under(out_dir),
        size_mb=folder_mb(out_dir),
        tools=TARGETS["coreml"].versions(),
        seconds=round(time.perf_counter() - start, 2),
    )


def _convert(source: Source, program: Program) -> MLModel:
    import coremltools as ct

    spec = source.manifest.preprocess
    if program.name == ENCODE:
        # Core ML's image input is planes of floats, so this program has no permute and no cast.
        planes = EncodePlanes(source.model).eval()
        exported = torch.export.export(planes, (torch.zeros(1, 3, spec.height, spec.width),), strict=False)
        inputs: list[Any] = [
            ct.ImageType(name="image", shape=(1, 3, spec.height, spec.width), color_layout=ct.colorlayout.RGB)
        ]
    else:
        exported = source.exported(program)
        inputs = [
            ct.TensorType(name=name, shape=tuple(x.shape), dtype=np.int32 if x.dtype == torch.int32 else np.float32)
            for name, x in program.inputs.items()
        ]
    return ct.convert(
        exported.run_decompositions({}),  # without it: "Provided Dialect: TRAINING"
        inputs=inputs,
        outputs=[ct.TensorType(name=name) for name in program.outputs],
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )


def _compress(model: MLModel, source: Source, program: Program) -> MLModel:
    import coremltools.optimize.coreml as cto

    part = "tee." if program.name == ENCODE else ("fusion.", "head.")
    parameters = [name for name, _ in source.model.named_parameters() if name.startswith(part)]
    keep = {constant_name(name): None for name in parameters if name.startswith(KEEP_FLOAT) and name.endswith("weight")}
    linear = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=MIN_WEIGHTS)
    # By operation, not globally: constants such as the anchors are no weights.
    by_type: Any = dict.fromkeys(("conv", "linear", "gather"), linear)
    by_name: Any = keep
    config = cto.OptimizationConfig(op_type_configs=by_type, op_name_configs=by_name)
    return cto.linear_quantize_weights(model, config=config)


def constant_name(parameter: str) -> str:
    """The name that the converter gives to a parameter's constant (unless it fuses it with another)."""
    return "p_" + parameter.replace(".", "_")


def _describe(package: Path, source: Source, precision: str) -> None:
    """Write what the file is into its metadata, without loading it (only a Mac can)."""
    from coremltools.proto import Model_pb2

    path = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec: Any = Model_pb2.Model()  # pyright: ignore[reportAttributeAccessIssue]
    spec.ParseFromString(path.read_bytes())
    manifest = source.manifest
    metadata = spec.description.metadata
    metadata.shortDescription = f"{manifest.task} by edgevlm, {precision}: {SCHEMES[precision]}"
    metadata.userDefined["edgevlm.name"] = str(manifest.provenance.recipe.get("name", ""))
    metadata.userDefined["edgevlm.preprocess_hash"] = manifest.preprocess.hash
    metadata.userDefined["edgevlm.vocab_sha256"] = manifest.tokenizer.vocab_sha256
    path.write_bytes(spec.SerializeToString(deterministic=True))
