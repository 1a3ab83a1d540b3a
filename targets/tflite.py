"""LiteRT: one .tflite file with a signature per program, all sharing one set of weights.

int8 is mixed: static for the convolutions of the trunk and BiFPN (the fast path of phones), dynamic for fully connected
layers and the word table (static would leave the table in float), and float for objectness, box deltas and class
scores. `image` is uint8 and stays so: the graph casts, scales and normalises.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from torch import nn

from edgevlm.artifacts import ExportedModel
from targets.base import TARGETS
from targets.program import Program
from targets.source import Source, files_under, folder_mb, named_module

SCHEMES = {
    "fp32": "float32 weights and arithmetic",
    "int8": "static int8 convolutions; dynamic int8 fully connected layers and word table; boxes and scores float32",
}
FILE = "model.tflite"
KEEP_FLOAT = (r".*RPNHead_rpn.*", r".*BoxHead_box_head/.*Linear_(classes|deltas).*")
"""Scopes (module paths, as the converter writes them into tensor names) whose eight bits would make ties."""


def export(source: Source, precision: str, out_dir: Path) -> ExportedModel:
    """Write `model.tflite`.

    Raises:
        TargetError: int8 without calibration samples.
    """
    start = time.perf_counter()
    if precision == "int8":
        source.samples("tflite")  # before minutes of conversion
    content = source.once("tflite", lambda: _convert(source))
    if precision == "int8":
        content = _quantise(content, source)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / FILE).write_bytes(_short_names(content))
    return ExportedModel(
        target="tflite",
        precision=precision,
        scheme=SCHEMES[precision],
        programs={program.name: FILE for program in source.programs},
        files=files_under(out_dir),
        size_mb=folder_mb(out_dir),
        tools=TARGETS["tflite"].versions(),
        seconds=round(time.perf_counter() - start, 2),
    )


def _convert(source: Source) -> bytes:
    import litert_torch

    # `signature` starts a converter; the further ones are added to it. Names of inputs come from keyword arguments,
    # names of outputs from the dictionary that the module returns.
    first, *rest = source.programs
    converter = litert_torch.signature(first.name, named_module(first), sample_kwargs=first.inputs)
    for program in rest:
        converter.signature(program.name, named_module(program), sample_kwargs=program.inputs)
    model = converter.convert()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        model.export(str(path))
        return path.read_bytes()


def _quantise(content: bytes, source: Source) -> bytes:
    from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe_manager
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    op = qtyping.TFLOperationName
    static = [program for program in source.programs if program.name in source.static and _has_convolutions(program)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        path.write_bytes(content)
        work = quantizer.Quantizer(str(path))
        for kind in (op.FULLY_CONNECTED, op.EMBEDDING_LOOKUP):
            work.add_dynamic_config(".*", kind, num_bits=8)
        for kind in (op.CONV_2D, op.DEPTHWISE_CONV_2D) if static else ():
            work.add_static_config(".*", kind, activation_num_bits=8, weight_num_bits=8)
        for kind in (op.INPUT, op.OUTPUT):
            work.update_quantization_recipe(".*", kind, algorithm_key=AlgorithmName.NO_QUANTIZE)
        for scope in KEEP_FLOAT:  # the last matching rule wins
            for kind in (op.CONV_2D, op.FULLY_CONNECTED):
                work.update_quantization_recipe(scope, kind, algorithm_key=AlgorithmName.NO_QUANTIZE)
        # The quantiser's own calibration keeps a moving average of each sample's range, which cuts off peaks: on our
        # test model 27 % of the regions were found again, against 59 % with the full range.
        recipe = recipe_manager.RecipeManager()
        recipe.load_quantization_recipe(work.get_quantization_recipe())
        ranges = calibrator.Calibrator(str(path), num_threads=1, qsv_update_func=min_max_update)
        if static:
            ranges.calibrate({p.name: source.calibration_inputs(p, "tflite") for p in static}, recipe)
        quantised = work.quantize(ranges.get_model_qsvs() if static else None).quantized_model
        if quantised is None:
            raise ValueError("the quantiser returned no model")
        return bytes(quantised)


def _has_convolutions(program: Program) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in program.module.modules())


def _short_names(content: bytes) -> bytes:
    """Number the tensors: the converter's names are whole module paths and make up an eighth of a small file.

    Signatures find their inputs and outputs by index, so nothing depends on the names.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model: Any = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    for subgraph in model.subgraphs:
        for index, tensor in enumerate(subgraph.tensors):
            tensor.name = str(index).encode()
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))
