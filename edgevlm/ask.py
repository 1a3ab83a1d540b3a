"""Answer a question about an image from an exported file, and draw the regions the model looked at."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from edgevlm.artifacts import ENCODE, VOCABULARY, Bundle, DeviceReport, ExportedModel, answer_name
from edgevlm.bench.facts import device_facts
from edgevlm.data.preprocess import load_image, preprocess, unscale_boxes
from edgevlm.data.text import Tokenizer
from edgevlm.errors import CheckpointError, LatencyError, TargetError, nearest
from edgevlm.manifests import read_manifest
from targets.base import open_model, runtime_status
from targets.governor import Governed, LatencyGovernor, Pass, governed_answer, read_governor, rung_times, timed_answer
from targets.quiet import quiet
from targets.runtime import Arrays, Session

PREFERENCE = ("tflite", "onnx", "openvino", "coreml")
"""Order in which a runtime is chosen when the user names none; int8 before fp32."""
MIN_WEIGHT = 0.05
"""Regions that get less of the attention are not drawn."""


@dataclass(frozen=True)
class Region:
    """A region the model looked at; corners in pixels of the user's image."""

    box: tuple[float, float, float, float]
    weight: float
    """Share of the [CLS] token's attention to regions, 0..1."""
    score: float


@dataclass(frozen=True)
class Reply:
    """What `ask` found out."""

    answer: str
    probability: float
    runners_up: tuple[tuple[str, float], ...]
    regions: tuple[Region, ...]
    """Most looked at first."""
    target: str
    precision: str
    rung: str
    encode_ms: float
    passes: tuple[Pass, ...] = ()
    """Answer programs that the governor started, in turn; empty where none was asked for."""
    fits: bool = True
    """False: no rung fits the time that was asked for."""


def ask(
    folder: Path,
    image: Path,
    question: str,
    *,
    target: str | None = None,
    precision: str | None = None,
    rung: str | None = None,
    adaptive: bool = False,
    max_ms: float | None = None,
    latency: Path | None = None,
    threads: int = 2,
) -> Reply:
    """Run one image and one question through an exported model.

    Args:
        folder, image, question: the bundle, and what is asked of it.
        target, precision: which file; None = the first that can run here.
        rung: token budget; None = the full one, or the governor's choice.
        adaptive: start low and climb while the answer is not sure enough.
        max_ms: image and question are to take so long: the largest rung that fits answers, or `adaptive` stops climbing.
        latency: the report of `edgevlm bench` that says how long rungs take here; needed for `max_ms`.
        threads: of the runtime; with `latency`, those it was measured with.

    Raises:
        BundleError, ImageError, TextError, TargetError, GovernorError, LatencyError: with what to do about it.
    """
    if rung is not None and (adaptive or max_ms is not None):
        raise TargetError(
            "--rung names the rung, and the governor chooses it", "Drop --rung, or --adaptive and --max-ms"
        )
    pixels_from = load_image(image)
    manifest = read_manifest(folder, Bundle)
    ids = Tokenizer(folder / VOCABULARY, manifest.tokenizer).encode(question).astype(np.int32)
    rung = _choose_rung(manifest, rung)
    model = _choose_model(manifest, target, precision)
    governor = read_governor(folder, manifest) if adaptive or max_ms is not None else None
    timer = None
    if governor is not None and max_ms is not None:
        report = _latency_report(latency, folder)
        threads = report.device.threads
        here = device_facts(threads)
        timer = LatencyGovernor(governor, rung_times(report, manifest, model, here, bundle_dir=folder))
    session = open_model(model, folder, threads=threads)
    image_input = {"image": preprocess(pixels_from, manifest.preprocess)[None]}
    with quiet():  # runtimes announce themselves at the first run
        if timer is not None:
            _warm_up(session, manifest, image_input, ids)
        start = time.perf_counter_ns()
        encoded = session.run(ENCODE, image_input)
        encode_ms = (time.perf_counter_ns() - start) / 1e6
        left_ms = math.inf if max_ms is None else max_ms - encode_ms
        if governor is None:
            answered = Governed(session.run(answer_name(rung), {**encoded, "input_ids": ids[None]}), ())
        elif timer is None or adaptive:
            answered = governed_answer(session, manifest, governor, encoded, ids, latency=timer, max_ms=left_ms)
        else:
            answered = timed_answer(session, manifest, timer, left_ms, encoded, ids)
        session.close()
    output = answered.output
    logits = output["logits"][0].astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = probabilities.argsort()[::-1]
    answers = manifest.labels.answers
    return Reply(
        answer=answers[order[0]],
        probability=float(probabilities[order[0]]),
        runners_up=tuple((answers[i], float(probabilities[i])) for i in order[1:3]),
        regions=_regions(encoded, output["looked_at"][0], manifest, pixels_from.size),
        target=model.target,
        precision=model.precision,
        rung=answered.passes[-1].rung if answered.passes else rung,
        encode_ms=encode_ms,
        passes=answered.passes,
        fits=answered.fits,
    )


REASONS = {
    "confident": "sure enough",
    "last": "no larger rung",
    "climb": "not sure enough",
    "not a number": "its logits are not numbers",
    "no time": "no time for a larger rung",
    None: "chosen by its time",
}
"""Why of a pass -> in words."""


def course(reply: Reply) -> list[str]:
    """Which rungs the governor started and why, a line each; nothing where it was not asked."""
    lines = [] if reply.fits else ["no rung fits the time: the fastest was taken"]
    for step in reply.passes:
        margin = "" if step.margin is None else f" (margin {step.margin:.3f})"
        lines.append(f"rung {step.rung}: {step.ms:.2f} ms, {REASONS[step.why]}{margin}")
    return [f"image: {reply.encode_ms:.2f} ms", *lines] if lines else []


def draw(image: Path, reply: Reply, out: Path) -> None:
    """Write the user's image with the looked-at regions as boxes (thicker = more attention) and the answer below."""
    picture = load_image(image)
    scale = max(1, round(480 / max(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    strip = 26
    canvas = Image.new("RGB", (picture.width, picture.height + strip), "white")
    canvas.paste(picture, (0, 0))
    pen = ImageDraw.Draw(canvas)
    for region in reversed(reply.regions):
        corners = [value * scale for value in region.box]
        width = 1 + round(6 * region.weight)
        pen.rectangle(corners, outline="white", width=width + 2)
        pen.rectangle(corners, outline="#d6006c", width=width)
        pen.text(
            (corners[0] + 4, corners[1] + 4),
            f"{region.weight:.0%}",
            fill="#d6006c",
            stroke_width=2,
            stroke_fill="white",
        )
    pen.text((6, picture.height + 6), f"{reply.answer}  ({reply.probability:.0%})", fill="black")
    temporary = out.with_name(f".{out.name}.writing")
    canvas.save(temporary, format="PNG")
    temporary.replace(out)


def _regions(
    encoded: dict[str, np.ndarray], looked_at: np.ndarray, manifest: Bundle, image_size: tuple[int, int]
) -> tuple[Region, ...]:
    spec = manifest.preprocess
    corners = encoded["boxes"][0] * np.array([spec.width, spec.height] * 2, np.float32)
    corners = unscale_boxes(corners, image_size, spec)
    scores = encoded["scores"][0]
    weights = looked_at * (scores >= manifest.model.tee.score_threshold)
    total = float(weights.sum()) or 1.0
    regions = [
        Region((float(box[0]), float(box[1]), float(box[2]), float(box[3])), float(weight) / total, float(score))
        for box, weight, score in zip(corners, weights, scores, strict=True)
        if weight / total >= MIN_WEIGHT
    ]
    return tuple(sorted(regions, key=lambda region: -region.weight))


def _choose_rung(manifest: Bundle, rung: str | None) -> str:
    names = [entry.name for entry in manifest.rungs]
    if rung is None:
        return names[0]
    if rung not in names:
        raise TargetError(f"This bundle has no rung '{rung}'", f"{nearest(rung, names)} It has: {', '.join(names)}")
    return rung


def _latency_report(latency: Path | None, folder: Path) -> DeviceReport:
    fix = f"Measure one: edgevlm bench {folder} --out latency, and pass --latency latency"
    if latency is None:
        raise LatencyError("--max-ms needs to know how long the rungs take on this device", fix)
    try:
        return read_manifest(latency, DeviceReport)
    except CheckpointError as problem:
        raise LatencyError(f"{latency} holds no latency report ({problem.what})", fix) from problem


def _warm_up(session: Session, manifest: Bundle, image_input: Arrays, ids: np.ndarray) -> None:
    """Run every program once: a latency table holds times of a session that has run before."""
    regions = session.run(ENCODE, image_input)
    for rung in manifest.rungs:
        session.run(answer_name(rung.name), {**regions, "input_ids": ids[None]})


def _choose_model(manifest: Bundle, target: str | None, precision: str | None) -> ExportedModel:
    fitting = [m for m in manifest.models if target in (None, m.target) and precision in (None, m.precision)]
    if not fitting:
        has = ", ".join(f"{m.target}/{m.precision}" for m in manifest.models)
        raise TargetError(f"This bundle has no {target or 'model'} at {precision or 'any precision'}", f"It has: {has}")
    if target is None:
        fitting = [m for m in fitting if runtime_status(m.target)[0]]
        if not fitting:
            raise TargetError("No runtime for this bundle is installed", "Install one: pip install 'edgevlm[onnx]'")
    fitting.sort(key=lambda m: (PREFERENCE.index(m.target), m.precision != "int8"))
    return fitting[0]
