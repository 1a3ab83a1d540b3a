"""What every rung answers to cached questions, by the programs that are exported; and the governor calibrated on it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from calibration.risk import Answers, Thresholds, calibrate, margins
from edgevlm.artifacts import Checkpoint, Governor, GovernorEvidence, GovernorRung, MarginDefinition, Rung, model_hash
from edgevlm.models import vlm
from edgevlm.models.vlm import VLM
from edgevlm.recipe import GovernSection
from edgevlm.train.answering import question_scores
from edgevlm.train.halves import Unit, held_out, units_of
from edgevlm.train.regions import RegionSplit
from targets.program import Program, build_programs, rungs_of

BATCH = 256
"""Questions at a time."""


@torch.no_grad()
def answer_rows(program: Program, split: RegionSplit, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Index of the answer to every question of a split, and its margin, (Q,) each; on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = program.module.to(device)
    predicted, sure = [], []
    for rows in torch.arange(len(split.answers)).split(BATCH):
        images = split.image_index[rows]
        inputs = {"features": split.features[images], "boxes": split.boxes[images], "scores": split.scores[images]}
        inputs["input_ids"] = split.input_ids[rows]
        logits_BA = module(*(inputs[name].to(device) for name in program.inputs))[0].cpu().numpy()
        predicted.append(logits_BA.argmax(1))
        sure.append(margins(logits_BA, temperature))
    return np.concatenate(predicted), np.concatenate(sure)


def answer_split(
    model: VLM, manifest: Checkpoint, cache: Path, name: str, unit: Unit = "image", temperature: float = 1.0
) -> tuple[Answers, np.ndarray]:
    """What every rung answers to the questions of a cached split.

    Args:
        model, manifest: a trimmed checkpoint.
        cache: regions that its extractor sees.
        name: of the split.
        unit: what is drawn independently.
        temperature: of the margin.

    Returns:
        The answers, rungs from the cheapest to the full one; and which of the questions are held out, (Q,) bool.
    """
    split = RegionSplit.load(cache, name)
    rungs = rungs_of(manifest)[::-1]
    programs = {program.name: program for program in build_programs(model, manifest)}
    answered = [answer_rows(programs[f"answer_{rung.name}"], split, temperature) for rung in rungs]
    num_tokens_Q = (split.input_ids.numpy() != manifest.tokenizer.pad_id).sum(1)
    units_Q = units_of(cache, name, split, unit)
    answers = Answers(
        margins_RQ=np.stack([sure for _, sure in answered]),
        scores_RQ=np.stack([question_scores(predicted, split) for predicted, _ in answered]),
        reads_RQ=np.stack([num_tokens_Q <= (rung.num_words or num_tokens_Q.max()) for rung in rungs]),
        units_Q=np.unique(units_Q, return_inverse=True)[1],
        gmacs_R=np.array([rung.gmacs for rung in rungs]),
        names=tuple(rung.name for rung in rungs),
    )
    return answers, held_out(units_Q)


def calibrate_governor(checkpoint: Path, cache: Path, section: GovernSection) -> Governor:
    """Calibrate on the validation split of cached regions: one half chooses the path, the held-out half tests it."""
    model, manifest = vlm.load(checkpoint)
    answers, is_held_out = answer_split(model, manifest, cache, "val", section.unit, section.temperature)
    thresholds, evidence = calibrate(
        answers.rows(~is_held_out),
        answers.rows(is_held_out),
        epsilon=section.epsilon,
        delta=section.delta,
        seed=section.seed,
        unit=section.unit,
    )
    return make_governor(manifest, thresholds, evidence, section)


def make_governor(
    manifest: Checkpoint, thresholds: Thresholds, evidence: GovernorEvidence | None, section: GovernSection
) -> Governor:
    """`governor.json` of a checkpoint under some thresholds, one per rung from the cheapest on."""
    rungs: Sequence[Rung] = rungs_of(manifest)[::-1]
    return Governor(
        model_hash=model_hash(manifest),
        rungs=tuple(
            GovernorRung(name=rung.name, num_words=rung.num_words, threshold=threshold, gmacs=rung.gmacs)
            for rung, threshold in zip(rungs, thresholds, strict=True)
        ),
        margin=MarginDefinition(temperature=section.temperature),
        epsilon=section.epsilon,
        delta=section.delta,
        certified=any(threshold is not None for threshold in thresholds[:-1]),
        evidence=evidence,
    )


def summary(governor: Governor) -> str:
    """One line for people."""
    evidence = governor.evidence
    promise = f"loss <= {governor.epsilon:g} with probability {1 - governor.delta:g}"
    if evidence is None:
        return promise
    if not governor.certified:
        return (
            f"nothing cheaper than the full rung could be certified ({promise}; {evidence.num_units} held-out "
            f"{evidence.unit}s, at least {evidence.least_units} are needed)"
        )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in evidence.answered_by.items())
    return (
        f"{promise}: {evidence.gmacs / evidence.gmacs_full:.0%} of the multiply-adds, loss {evidence.loss:.4f} on "
        f"{evidence.num_units} held-out {evidence.unit}s; answered by {shares}"
    )
