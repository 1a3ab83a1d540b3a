"""Open an exported model on its own runtime and check it against the golden cases.

This file needs numpy and the one runtime it is asked for, and nothing else of edgevlm: the benchmark runner copies it
to devices as it is.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ENCODE = "encode_image"
SHARED_WEIGHTS = "weights.bin"
"""Weights of all programs of one ONNX or OpenVINO model, beside the graphs."""

RUNTIMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": ("onnxruntime", ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")),
    "tflite": ("ai_edge_litert", ("ai-edge-litert", "ai-edge-litert-nightly")),
    "openvino": ("openvino", ("openvino",)),
    "coreml": ("coremltools", ("coremltools",)),
}
"""Target -> (module that runs it, distributions that may carry the module)."""

COREML_ELSEWHERE = "Core ML runs on macOS only"

Arrays = dict[str, np.ndarray]


class Session(Protocol):
    """An exported model, loaded."""

    def run(self, program: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run one program; inputs and outputs by name. Raises ValueError for a wrong program or input name."""
        ...

    def close(self) -> None:
        """Let go of the model's memory."""
        ...


def runtime_status(target: str) -> tuple[bool, str]:
    """Whether `target` can run here, and its runtime's version or the reason; imports nothing.

    Raises:
        ValueError: unknown target.
    """
    if target not in RUNTIMES:
        raise ValueError(f"unknown target '{target}'; known: {', '.join(RUNTIMES)}")
    if target == "coreml" and sys.platform != "darwin":
        return False, COREML_ELSEWHERE
    module, distributions = RUNTIMES[target]
    if importlib.util.find_spec(module) is None:
        return False, f"{distributions[0]} is not installed"
    for distribution in distributions:
        try:
            return True, importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return True, "unknown version"


def open_session(target: str, folder: str | Path, programs: Mapping[str, str], *, threads: int = 1) -> Session:
    """Load every program of an exported model.

    Args:
        target: `onnx`, `tflite`, `openvino` or `coreml`.
        folder: what the paths in `programs` are relative to.
        programs: program name -> file; several programs may share one file.
        threads: threads of one run.

    Raises:
        ValueError: unknown target.
        RuntimeError: the runtime is not here.
    """
    available, reason = runtime_status(target)
    if not available:
        raise RuntimeError(reason)
    openers: dict[str, Callable[[dict[str, Path], int], Session]] = {
        "onnx": _ONNXSession,
        "tflite": _LiteRTSession,
        "openvino": _OpenVINOSession,
        "coreml": _CoreMLSession,
    }
    return openers[target]({name: Path(folder) / file for name, file in programs.items()}, threads)


def _pick(programs: dict[str, Any], name: str, inputs: Mapping[str, np.ndarray], expected: dict[str, set[str]]) -> Any:
    if name not in programs:
        raise ValueError(f"no program '{name}'; there are: {', '.join(programs)}")
    if set(inputs) != expected[name]:
        raise ValueError(f"{name} takes {sorted(expected[name])}, got {sorted(inputs)}")
    return programs[name]


class _ONNXSession:
    def __init__(self, files: dict[str, Path], threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._programs = {
            name: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for name, path in files.items()
        }
        self._inputs = {name: {i.name for i in p.get_inputs()} for name, p in self._programs.items()}
        self._outputs = {name: [o.name for o in p.get_outputs()] for name, p in self._programs.items()}

    def run(self, program: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        session = _pick(self._programs, program, inputs, self._inputs)
        return dict(zip(self._outputs[program], session.run(None, dict(inputs)), strict=True))

    def close(self) -> None:
        self._programs.clear()


class _LiteRTSession:
    def __init__(self, files: dict[str, Path], threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        # One interpreter per file, so that the signatures of a file share its weights in memory too.
        self._interpreters = {p: Interpreter(model_path=str(p), num_threads=threads) for p in set(files.values())}
        self._programs = {name: self._interpreters[path].get_signature_runner(name) for name, path in files.items()}
        self._inputs = {name: set(runner.get_input_details()) for name, runner in self._programs.items()}

    def run(self, program: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        return dict(_pick(self._programs, program, inputs, self._inputs)(**inputs))

    def close(self) -> None:
        self._programs.clear()
        self._interpreters.clear()


class _OpenVINOSession:
    def __init__(self, files: dict[str, Path], threads: int) -> None:
        import openvino

        core = openvino.Core()
        settings = {
            # Left alone, OpenVINO computes in bf16 or f16 where the processor has it.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._programs = {}
        for name, path in files.items():
            weights = path.with_name(SHARED_WEIGHTS)
            model = (
                core.read_model(path, weights) if weights.is_file() and path.suffix == ".xml" else core.read_model(path)
            )
            self._programs[name] = core.compile_model(model, "CPU", settings).create_infer_request()
        self._inputs = {name: {i.any_name for i in p.model_inputs} for name, p in self._programs.items()}

    def run(self, program: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        request = _pick(self._programs, program, inputs, self._inputs)
        results = request.infer(dict(inputs), share_inputs=True, share_outputs=False)
        return {output.any_name: array for output, array in results.items()}

    def close(self) -> None:
        self._programs.clear()


class _CoreMLSession:
    def __init__(self, files: dict[str, Path], threads: int) -> None:
        import coremltools

        del threads  # Core ML decides by itself
        units = coremltools.ComputeUnit.ALL
        self._programs = {
            name: coremltools.models.MLModel(str(path), compute_units=units, function_name=name)
            for name, path in files.items()
        }
        # Functions of one package keep their descriptions in a list of their own.
        self._inputs = {}
        for name, model in self._programs.items():
            functions = {f.name: f for f in model.get_spec().description.functions}
            self._inputs[name] = {i.name for i in functions[name].input}

    def run(self, program: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        model = _pick(self._programs, program, inputs, self._inputs)
        values: dict[str, Any] = dict(inputs)
        if program == ENCODE:
            from PIL import Image  # coremltools takes an image input as a Pillow image

            values["image"] = Image.fromarray(inputs["image"][0])
        return {name: np.asarray(value) for name, value in model.predict(values).items()}

    def close(self) -> None:
        self._programs.clear()


# --- golden cases ------------------------------------------------------------------------------------------------


def run_golden(session: Session, golden: Mapping[str, np.ndarray]) -> Arrays:
    """Answer every golden case from its pixels, at every rung.

    Args:
        session: an opened model.
        golden: the arrays of `golden.npz`.

    Returns:
        rung -> logits (K, A).
    """
    rungs = [name.removeprefix("logits_") for name in golden if name.startswith("logits_")]
    logits: dict[str, list[np.ndarray]] = {rung: [] for rung in rungs}
    for pixels_HWC, input_ids_L in zip(golden["pixels"], golden["input_ids"], strict=True):
        regions = session.run(ENCODE, {"image": pixels_HWC[None]})
        for rung in rungs:
            outputs = session.run(f"answer_{rung}", {**regions, "input_ids": input_ids_L[None]})
            logits[rung].append(outputs["logits"][0])
    return {rung: np.stack(rows) for rung, rows in logits.items()}


def compare_golden(
    outputs_by_rung: Mapping[str, np.ndarray],
    golden: Mapping[str, np.ndarray],
    description: Mapping[str, Any],
    precision: str,
) -> list[str]:
    """Compare logits with the golden ones by the tolerances of `golden.json`.

    Args:
        outputs_by_rung: rung -> logits (K, A), from `run_golden`.
        golden: the arrays of `golden.npz`.
        description: the contents of `golden.json`.
        precision: which tolerances hold.

    Returns:
        Problems in words; empty if the model passes.
    """
    if precision not in description["tolerances"]:
        return [f"golden.json has no tolerances for {precision}"]
    limits = description["tolerances"][precision]
    problems = []
    for rung in (name.removeprefix("logits_") for name in golden if name.startswith("logits_")):
        if rung not in outputs_by_rung:
            problems.append(f"{rung}: no answers")
            continue
        expected, actual = np.asarray(golden[f"logits_{rung}"]), np.asarray(outputs_by_rung[rung])
        if actual.shape != expected.shape or not np.isfinite(actual).all():
            problems.append(f"{rung}: logits of shape {actual.shape} (expected {expected.shape}), or not numbers")
            continue
        wrong = []
        for case, want, got in zip(description["cases"], expected, actual, strict=True):
            if difference := _difference(want, got, limits):
                wrong.append(f"{rung}, case {case['id']}: {difference}")
        # A tolerance in whole cases: one in six may differ at int8, none of fewer than six.
        if len(wrong) > int(limits["max_differing_share"] * len(expected) + 1e-9):
            problems += wrong
    return problems


def _difference(want: np.ndarray, got: np.ndarray, limits: Mapping[str, Any]) -> str:
    margin = float(np.diff(np.sort(want)[-2:])[0])
    if margin > limits["min_margin"] and want.argmax() != got.argmax():
        return f"answer {int(got.argmax())} instead of {int(want.argmax())} (margin {margin:.2f})"
    error = float(np.abs(want - got).max())
    if "max_abs_logits" in limits and error > limits["max_abs_logits"]:
        return f"logits differ by {error:.2g}, allowed {limits['max_abs_logits']:.2g}"
    cosine = float(want @ got / max(np.linalg.norm(want) * np.linalg.norm(got), 1e-12))
    if "min_cosine" in limits and cosine < limits["min_cosine"]:
        return f"cosine of the logits {cosine:.3f}, at least {limits['min_cosine']}"
    return ""
