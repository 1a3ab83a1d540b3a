"""Export a checkpoint to a bundle, and open a bundle for inference.

bundle/
  manifest.json  MODEL_CARD.md  vocab.txt  labels.json  preprocess.json  governor.json
  <target>/<precision>/...      the files of one exported model
  golden/                       cases that prove a device runs the model that was trained
"""

import json
import multiprocessing
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from calibration.choose import load as load_calibration
from edgevlm.artifacts import (
    VOCABULARY,
    Bundle,
    Checkpoint,
    ExportedModel,
    ExportFailure,
    Governor,
    PreprocessSpec,
    Provenance,
    model_hash,
)
from edgevlm.data.text import Tokenizer
from edgevlm.errors import EdgeVLMError, TargetError, nearest
from edgevlm.manifests import read_manifest, write_manifest
from edgevlm.models.vlm import load
from edgevlm.progress import Reporter
from edgevlm.quiet import hush
from targets.base import check_target, load_exporter, open_model
from targets.golden import write_golden
from targets.governor import FILE as GOVERNOR
from targets.governor import check_governor
from targets.governor_golden import write_governor_golden
from targets.model_card import model_card
from targets.program import rungs_of
from targets.quiet import quiet
from targets.runtime import Session
from targets.source import CalibrationData, Source

GROUPS = (("tflite",), ("onnx", "openvino"), ("coreml",))
"""Targets exported by one process, the longest first: OpenVINO reads the ONNX form. A crash takes only its group's rows."""
PREFERENCE = ("int8", "fp32")
"""Which precision is opened where none is named."""


def export_bundle(
    checkpoint_dir: Path,
    calibration_dir: Path | None,
    out_dir: Path,
    *,
    targets: Sequence[str],
    precisions: Sequence[str],
    num_golden: int,
    provenance: Provenance,
    governor: Governor | None = None,
    reporter: Reporter | None = None,
    verbose: bool = False,
) -> Bundle:
    """Export a checkpoint to every target at every precision.

    Args:
        checkpoint_dir: the trained model.
        calibration_dir: a frozen calibration set; int8 of most targets needs one.
        out_dir: an empty folder; the caller renames it when this returns.
        targets, precisions: names of `targets.base.TARGETS` and of their precisions.
        num_golden: golden cases to write.
        provenance: of the bundle.
        governor: calibrated on this checkpoint; None = the bundle has none.
        reporter: told about each model.
        verbose: show what the converters print.

    Returns:
        The manifest, written. A target that failed is listed in it with the reason.

    Raises:
        TargetError: an unknown target or precision, or every export failed.
        CheckpointError, CalibrationError: an input is missing, altered, or was preprocessed differently.
        GovernorError: the governor was calibrated for another model.
    """
    reporter = reporter or Reporter()
    for target in targets:
        for precision in precisions:
            check_target(target, precision)
    model, manifest = load(checkpoint_dir)
    if governor is not None:
        check_governor(governor, model_hash(manifest), "The governor")
    source = Source(model, manifest, _calibration(calibration_dir, manifest))
    tokenizer = Tokenizer(checkpoint_dir / VOCABULARY, manifest.tokenizer)
    exported = _export_all(checkpoint_dir, calibration_dir, out_dir, targets, precisions, reporter, verbose)
    models = [result for result in exported if isinstance(result, ExportedModel)]
    failures = [result for result in exported if isinstance(result, ExportFailure)]
    if not models:
        reasons = "; ".join(sorted({f"{failure.target}: {failure.reason}" for failure in failures}))
        raise TargetError(
            f"No target could be exported ({reasons})", "Install the libraries of one target, or run with -v"
        )
    write_golden(source, tokenizer, out_dir, num_golden)
    if governor is not None:
        (out_dir / GOVERNOR).write_text(governor.model_dump_json(indent=1) + "\n")
        write_governor_golden(out_dir, governor, manifest.tokenizer.pad_id)
    shutil.copyfile(checkpoint_dir / VOCABULARY, out_dir / VOCABULARY)
    (out_dir / "labels.json").write_text(manifest.labels.model_dump_json(indent=1) + "\n")
    (out_dir / "preprocess.json").write_text(json.dumps(_preprocess(manifest.preprocess), indent=1) + "\n")
    bundle = Bundle(
        provenance=provenance,
        name=_name(provenance, manifest.provenance, checkpoint_dir),
        task=manifest.task,
        model=manifest.model,
        preprocess=manifest.preprocess,
        tokenizer=manifest.tokenizer,
        labels=manifest.labels,
        rungs=rungs_of(manifest),
        models=tuple(models),
        failures=tuple(failures),
        metrics=manifest.metrics,
        model_hash=model_hash(manifest),
    )
    (out_dir / "MODEL_CARD.md").write_text(model_card(bundle, governor))
    written = write_manifest(out_dir, bundle)
    assert isinstance(written, Bundle)
    return written


def open_bundle(
    folder: Path, target: str, precision: str | None = None, threads: int = 1, check: bool = True
) -> tuple[Bundle, ExportedModel, Session]:
    """Open one exported model of a bundle.

    Args:
        folder: the bundle.
        target: which target.
        precision: which precision; None takes int8 if the bundle has it.
        threads: threads of the runtime.
        check: compare every file's hash with the manifest.

    Raises:
        BundleError: no bundle, or a file is missing or altered.
        TargetError: the bundle lacks the target or precision, or its runtime is not here.
    """
    check_target(target)
    bundle = read_manifest(folder, Bundle, check_files=check)
    of_target = {model.precision: model for model in bundle.models if model.target == target}
    if not of_target:
        failed = [f.reason for f in bundle.failures if f.target == target]
        why = f" (it could not be exported: {failed[0]})" if failed else ""
        there = ", ".join(sorted({model.target for model in bundle.models}))
        raise TargetError(f"{folder} has no {target} model{why}", f"It has: {there}")
    if precision is None:
        precision = next((name for name in PREFERENCE if name in of_target), next(iter(of_target)))
    if precision not in of_target:
        hint = nearest(precision, of_target)
        raise TargetError(
            f"{folder} has no {target} at '{precision}'", f"{hint} It has: {', '.join(of_target)}".strip()
        )
    model = of_target[precision]
    return bundle, model, open_model(model, folder, threads=threads)


def _export_all(
    checkpoint_dir: Path,
    calibration_dir: Path | None,
    out_dir: Path,
    targets: Sequence[str],
    precisions: Sequence[str],
    reporter: Reporter,
    verbose: bool,
) -> list[ExportedModel | ExportFailure]:
    """Every target x precision in the order asked for; two groups at a time, each in a process of its own."""
    missing = {target: reason for target in targets if (reason := _why_missing(target))}
    groups = [chosen for group in GROUPS if (chosen := tuple(t for t in targets if t in group and t not in missing))]

    def run(group: tuple[str, ...]) -> list[ExportedModel | ExportFailure]:
        results: list[ExportedModel | ExportFailure]
        arguments = (checkpoint_dir, calibration_dir, out_dir, group, tuple(precisions), verbose)
        try:
            # 'spawn': a converter's threads and a fork of torch's do not get along.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                results = pool.submit(_export_group, *arguments).result()
        except BrokenProcessPool:
            reason = "the converter's process ended without a result (crashed, or ran out of memory)"
            results = [ExportFailure(target=t, precision=p, reason=reason) for t in group for p in precisions]
        for result in results:
            if isinstance(result, ExportedModel):
                reporter.say(f"  {result.target} {result.precision}: {result.size_mb:.2f} MB, {result.seconds:.0f} s")
            else:
                reporter.say(f"  {result.target} {result.precision}: not exported: {result.reason}")
        return results

    with ThreadPoolExecutor(2) as pool:
        results = [result for group in pool.map(run, groups) for result in group]
    for target, reason in missing.items():
        results += [ExportFailure(target=target, precision=precision, reason=reason) for precision in precisions]
        reporter.say(f"  {target}: not exported: {reason}")
    return sorted(results, key=lambda result: (targets.index(result.target), precisions.index(result.precision)))


def _why_missing(target: str) -> str:
    try:
        load_exporter(target)
    except TargetError as problem:
        return str(problem)
    return ""


def _export_group(
    checkpoint_dir: Path,
    calibration_dir: Path | None,
    out_dir: Path,
    targets: tuple[str, ...],
    precisions: tuple[str, ...],
    verbose: bool,
) -> list[ExportedModel | ExportFailure]:
    """Targets that share conversion steps, one after the other."""
    if not verbose:
        hush()
    model, manifest = load(checkpoint_dir)
    source = Source(model, manifest, _calibration(calibration_dir, manifest))
    return [_export_one(source, target, precision, out_dir, verbose) for target in targets for precision in precisions]


def _export_one(
    source: Source, target: str, precision: str, out_dir: Path, verbose: bool
) -> ExportedModel | ExportFailure:
    folder = out_dir / target / precision
    shutil.rmtree(folder, ignore_errors=True)
    try:
        exporter = load_exporter(target)
        with quiet(verbose):
            model = exporter(source, precision, folder)
    except Exception as problem:  # a converter may raise anything; the others go on
        if verbose and not isinstance(problem, EdgeVLMError):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        reason = problem.what if isinstance(problem, TargetError) else _first_line(problem)
        if isinstance(problem, TargetError) and problem.fix:
            reason = f"{reason}. {problem.fix}"
        return ExportFailure(target=target, precision=precision, reason=reason)
    prefix = f"{target}/{precision}"
    return model.model_copy(
        update={
            "programs": {name: f"{prefix}/{file}" for name, file in model.programs.items()},
            "files": tuple(f"{prefix}/{file}" for file in model.files),
        }
    )


def _first_line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0][:300]}" if lines else type(problem).__name__


def _calibration(folder: Path | None, manifest: Checkpoint) -> CalibrationData | None:
    if folder is None:
        return None
    chosen, arrays = load_calibration(folder, manifest.preprocess, manifest.tokenizer)
    return CalibrationData(arrays["image"], arrays["input_ids"], tuple(map(str, arrays["texts"])), chosen.sample_ids)


def _preprocess(spec: PreprocessSpec) -> dict[str, Any]:
    """The spec with its steps in words, for whoever writes it in another language."""
    if spec.resize == "stretch":
        resize = f"resize to {spec.width} x {spec.height} pixels, ignoring the aspect ratio"
    else:
        resize = (
            f"resize to fit {spec.width} x {spec.height} pixels, keeping the aspect ratio; "
            f"pad right and bottom with grey {spec.pad_value}"
        )
    app = ["decode, honouring EXIF orientation", "convert to RGB, 8 bits per channel"]
    app += [
        f"{resize} ({spec.interpolation}, antialiased when shrinking, as Pillow does)",
        "hand over uint8 (1, H, W, 3)",
    ]
    return {
        **spec.model_dump(mode="json"),
        "hash": spec.hash,
        "app": app,
        "graph": ["(x / 255 - mean) / std, per channel"],
    }


def _name(provenance: Provenance, source: Provenance, checkpoint_dir: Path) -> str:
    return str(provenance.recipe.get("name") or source.recipe.get("name") or checkpoint_dir.resolve().name)
