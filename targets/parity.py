"""Prove that every exported file still gives PyTorch's answers, or say why that is not proven.

Each file runs on its own runtime, pixels to logits, on the same samples as the PyTorch programs. A row says what its
figures rest on: `runtime`, or `none` where the file cannot run on this machine. 'none' never passes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgevlm.artifacts import Bundle, ExportedModel, ParityReport, ParityRow, Provenance
from edgevlm.data.frames import Questions
from edgevlm.errors import BundleError
from edgevlm.manifests import read_manifest
from edgevlm.models.regions import box_iou
from edgevlm.models.vlm import load
from edgevlm.progress import Reporter
from edgevlm.recipe import VerifySection
from targets.base import open_model, runtime_status
from targets.governor import FILE as GOVERNOR
from targets.governor_golden import check_governor_golden
from targets.program import ENCODE, answer_name
from targets.quiet import quiet
from targets.runtime import COREML_ELSEWHERE, Arrays, Session
from targets.source import Source, run_all

MATCH_IOU = 0.9
THREADS = 2
METRIC = "accuracy"


@dataclass
class Samples:
    """Questions about images, and what PyTorch makes of them."""

    pixels: np.ndarray
    """(I, H, W, 3) uint8; only images that a question is about."""
    image_index: np.ndarray
    """(Q,) into `pixels`."""
    input_ids: np.ndarray
    """(Q, L) int32."""
    answers: np.ndarray
    """(Q,) correct answers."""
    regions: Arrays
    """PyTorch's regions: features, boxes, scores, (I, ...)."""
    logits: dict[str, np.ndarray]
    """Rung -> PyTorch's logits (Q, A)."""

    def metric(self, logits_QA: np.ndarray) -> float:
        """Accuracy of logits."""
        return float((logits_QA.argmax(1) == self.answers).mean())


@dataclass
class Outputs:
    """What an exported file made of the samples."""

    regions: Arrays
    logits: dict[str, np.ndarray]
    """Rung -> logits, pixels to answer."""
    same_input: dict[str, np.ndarray]
    """Rung -> logits of the answer program on PyTorch's regions."""


def verify_bundle(
    bundle_dir: Path,
    checkpoint_dir: Path,
    questions: Questions,
    pixels: np.ndarray,
    settings: VerifySection,
    provenance: Provenance,
    reporter: Reporter | None = None,
) -> ParityReport:
    """Compare every model of a bundle with the checkpoint it came from.

    Args:
        bundle_dir, checkpoint_dir: the exported files and their origin.
        questions: with their correct answers.
        pixels: (I, H, W, 3) uint8, preprocessed; `questions.image_index` points into it.
        settings: limits.
        provenance: of the report.
        reporter: told about progress.

    Returns:
        One row per model and rung, failed exports included. The caller writes it.

    Raises:
        BundleError: the bundle is not whole, or is not of this checkpoint, or its governor decides otherwise than its golden
            cases say.
    """
    reporter = reporter or Reporter()
    bundle = read_manifest(bundle_dir, Bundle)
    model, manifest = load(checkpoint_dir)
    if (bundle.preprocess, bundle.tokenizer, bundle.labels) != (
        manifest.preprocess,
        manifest.tokenizer,
        manifest.labels,
    ):
        raise BundleError(
            f"{bundle_dir} was not exported from {checkpoint_dir} (preprocessing, vocabulary or labels differ)",
            "Give the checkpoint named in its manifest",
        )
    if (bundle_dir / GOVERNOR).is_file() and (problems := check_governor_golden(bundle_dir)):
        raise BundleError(
            f"{bundle_dir}: {len(problems)} golden cases of the governor are decided otherwise; {problems[0]}",
            "Export the bundle again",
        )
    source = Source(model, manifest)
    samples = reference(source, questions, pixels)
    counts = np.bincount(samples.answers, minlength=len(manifest.labels.answers))
    rows: list[ParityRow] = []
    with reporter.bar("verify", len(bundle.models)) as bar:
        for done, exported in enumerate(bundle.models, 1):
            rows += _verify_model(exported, bundle_dir, source, samples, settings)
            bar.update(done, f"{exported.target} {exported.precision}")
    for failure in bundle.failures:
        reason = f"not exported: {failure.reason}"
        rows += [
            ParityRow(
                target=failure.target,
                precision=failure.precision,
                rung=rung,
                evidence="none",
                verdict="failed",
                reasons=(reason,),
            )
            for rung in samples.logits
        ]
    return ParityReport(
        provenance=provenance,
        bundle_key=bundle.provenance.key,
        metric_name=METRIC,
        majority=float(counts.max() / max(1, counts.sum())),
        rows=tuple(rows),
    )


def reference(source: Source, questions: Questions, pixels: np.ndarray) -> Samples:
    """Run the PyTorch programs (fp32, eager, in batches) on the samples."""
    used, image_index = np.unique(np.asarray(questions.image_index), return_inverse=True)
    images = pixels[used]
    regions = run_all(source.encode, {"image": images})
    input_ids = np.asarray(questions.input_ids, np.int32)
    per_question = {name: value[image_index] for name, value in regions.items()}
    logits = {
        p.name.removeprefix("answer_"): run_all(p, {**per_question, "input_ids": input_ids}, batch=128)["logits"]
        for p in source.answers
    }
    return Samples(images, image_index, input_ids, np.asarray(questions.answers), regions, logits)


def run_samples(session: Session, samples: Samples) -> Outputs:
    """Encode each image once, and answer every question at every rung, from pixels and from PyTorch's regions."""
    encoded = [session.run(ENCODE, {"image": image[None]}) for image in samples.pixels]
    exact = [{name: x[i : i + 1] for name, x in samples.regions.items()} for i in range(len(samples.pixels))]

    def ask(rung: str, regions: list[Arrays]) -> np.ndarray:
        rows = zip(samples.image_index, samples.input_ids, strict=True)
        program = answer_name(rung)
        return np.concatenate(
            [session.run(program, {**regions[image], "input_ids": ids[None]})["logits"] for image, ids in rows]
        )

    return Outputs(
        {name: np.concatenate([regions[name] for regions in encoded]) for name in samples.regions},
        {rung: ask(rung, encoded) for rung in samples.logits},
        {rung: ask(rung, exact) for rung in samples.logits},
    )


def _verify_model(
    exported: ExportedModel, folder: Path, source: Source, samples: Samples, settings: VerifySection
) -> Iterator[ParityRow]:
    available, reason = runtime_status(exported.target)
    failed = ""
    if available:
        try:
            with quiet():
                session = open_model(exported, folder, threads=THREADS)
                outputs = run_samples(session, samples)
                session.close()
        except Exception as problem:  # each runtime has exceptions of its own; the row says which
            failed = f"it did not run: {' '.join(str(problem).split())[:300] or type(problem).__name__}"
        else:
            threshold = source.manifest.model.tee.score_threshold
            for rung in samples.logits:
                yield compare(exported, rung, samples, outputs, threshold, settings)
            return
    elif reason == COREML_ELSEWHERE:
        problems, note = _structure(exported, folder, source)
        failed = "; ".join(problems)
        reason = f"{reason}; {note}"
    for rung in samples.logits:
        yield ParityRow(
            target=exported.target,
            precision=exported.precision,
            rung=rung,
            evidence="none",
            verdict="failed" if failed else "unproven",
            reasons=(failed or reason,),
        )


def _structure(exported: ExportedModel, folder: Path, source: Source) -> tuple[list[str], str]:
    """Problems of a Core ML package's structure, and a note on what was checked."""
    try:
        from targets.coreml_structure import check_structure

        with quiet():
            return check_structure(folder / exported.programs[ENCODE], source), (
                "its functions, inputs, outputs and weights equal the model's, but nothing was run"
            )
    except ImportError as problem:
        return [], f"its structure was not checked ({problem})"
    except Exception as problem:  # a package that cannot be read is a failure, whatever the reader raises
        return [f"the package cannot be read: {' '.join(str(problem).split())[:300]}"], ""


def compare(
    exported: ExportedModel,
    rung: str,
    samples: Samples,
    outputs: Outputs,
    score_threshold: float,
    settings: VerifySection,
) -> ParityRow:
    """Figures and verdict of one model at one rung."""
    want, got = samples.logits[rung], outputs.logits[rung]
    difference = np.abs(want - got)
    largest = float(difference.max())
    same_input = float(np.abs(want - outputs.same_input[rung]).max())
    agreement = float((want.argmax(1) == got.argmax(1)).mean())
    metric, expected = samples.metric(got), samples.metric(want)
    reasons = []
    if not np.isfinite(got).all():
        reasons.append("logits that are not numbers")
    elif exported.precision == "fp32":
        # Rounding grows with the numbers: beyond |logit| 10 the limit is relative (1e-4 is then 1e-5 of the largest).
        limit = settings.max_abs_logits_fp32 * max(1.0, float(np.abs(want).max()) / 10)
        if largest > limit:
            num_beyond = int((difference.max(1) > limit).sum())
            reasons.append(
                f"logits differ by up to {largest:.2g}, limit {limit:g} ({num_beyond} of {len(want)} samples)"
            )
        if agreement < settings.min_agreement_fp32:
            reasons.append(f"agreement {agreement:.4f}, at least {settings.min_agreement_fp32:g}")
        if reasons and same_input <= limit:
            reasons.append(
                f"on PyTorch's regions they differ by {same_input:.2g} only: "
                + _encoder_difference(samples, outputs, difference.max(1) > limit, score_threshold)
            )
    elif metric < settings.min_retention_int8 * expected:
        reasons.append(
            f"{METRIC} {metric:.4f} against {expected:.4f} in PyTorch, at least {settings.min_retention_int8:g} of it"
        )
        reasons.append(f"on PyTorch's regions its {METRIC} is {samples.metric(outputs.same_input[rung]):.4f}")
    return ParityRow(
        target=exported.target,
        precision=exported.precision,
        rung=rung,
        evidence="runtime",
        verdict="failed" if reasons else "passed",
        num_samples=len(want),
        max_abs_logits=_number(largest),
        mean_abs_logits=_number(float(difference.mean())),
        box_match=box_match(samples.regions, outputs.regions, score_threshold),
        agreement=agreement,
        metric=metric,
        metric_ci=wilson(metric, len(want)),
        reference_metric=expected,
        reasons=tuple(reasons),
    )


def _encoder_difference(samples: Samples, outputs: Outputs, beyond_Q: np.ndarray, score_threshold: float) -> str:
    """What the encoder did to the images of the samples beyond the limit, in words."""
    images = np.unique(samples.image_index[beyond_Q])
    want, got = ({name: x[images] for name, x in regions.items()} for regions in (samples.regions, outputs.regions))
    valid = want["scores"] >= score_threshold
    moved = (np.abs(want["boxes"] - got["boxes"]).max(-1) > 1e-3) & valid
    if moved.any():
        return f"the encoder chose or ordered nearly equal boxes otherwise in {int(moved.any(1).sum())} images"
    largest = float(np.abs(want["features"] - got["features"]).max(-1)[valid].max()) if valid.any() else 0.0
    return f"the boxes are the same, features differ by {largest:.2g}, and these questions amplify it"


def box_match(want: Arrays, got: Arrays, score_threshold: float) -> float:
    """Share of the valid regions of `want` that have a partner at IoU >= 0.9 among the valid ones of `got`."""
    valid = np.asarray(want["scores"] >= score_threshold)
    partner = np.asarray(got["scores"] >= score_threshold)[:, None, :]
    # In thousandths of the image, so that `box_iou`'s guard against empty boxes does not bite.
    ours, theirs = (torch.from_numpy(np.ascontiguousarray(x["boxes"], np.float32)) * 1000 for x in (want, got))
    # A box clipped to a line has no area and no IoU: it matches one in the same place.
    same_place = (ours.unsqueeze(2) - theirs.unsqueeze(1)).abs().amax(-1) <= 1.0
    match = np.asarray((box_iou(ours, theirs) >= MATCH_IOU) | same_place) & partner
    found: np.ndarray = np.any(match, axis=2)  # pyright: ignore[reportAssignmentType]
    return float(found[valid].mean()) if valid.any() else 1.0


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    if count == 0:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
