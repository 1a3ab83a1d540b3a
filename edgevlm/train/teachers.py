"""Checkpoints of ours as teachers: whether one fits a run, and the stage `teacher` where the recipe names one."""

from pathlib import Path

import torch

from edgevlm.artifacts import Checkpoint
from edgevlm.errors import CheckpointError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.vlm import VLM
from edgevlm.train.answering import evaluate, report, save_answering


def check_language(theirs: Checkpoint, ours: Checkpoint, where: Path) -> None:
    """Whether a teacher and the run mean the same by labels, word pieces and pixels.

    Raises:
        CheckpointError: it names the first that differs.
    """
    for what in ("labels", "tokenizer", "preprocess"):
        if getattr(theirs, what) != getattr(ours, what):
            raise CheckpointError(
                f"The teacher in {where} has other {what} than the student", "Train both from the same `prepare` stage"
            )


def open_live(where: Path, detector: VLM, manifest: Checkpoint) -> tuple[VLM, Checkpoint]:
    """A teacher that reads the regions of this run's extractor.

    Raises:
        CheckpointError: no checkpoint, other labels, vocabulary or preprocessing, or the weights of another extractor.
    """
    teacher, theirs = vlm.load(where)
    check_language(theirs, manifest, where)
    own, other = detector.tee.state_dict(), teacher.tee.state_dict()
    if own.keys() != other.keys() or not all(torch.equal(own[name], other[name]) for name in own):
        raise CheckpointError(
            f"The teacher in {where} was trained on the regions of another extractor",
            "Set the recipe's `extractor` to that checkpoint, or train the teacher in this run",
        )
    return teacher, theirs


def adopt_teacher(job: Job) -> Checkpoint:
    """The checkpoint that `distil.teacher` names, with its metrics on this run's data."""
    where = Path(job.recipe.distil.teacher or "")
    teacher, manifest = open_live(where, *vlm.load(job.inputs["detector"]))
    job.reporter.say(f"  teacher: taken from {where}")
    metrics = evaluate(teacher, job)
    report(job, "teacher", metrics)
    return save_answering(job, teacher, manifest, metrics)
