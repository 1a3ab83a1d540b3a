"""Extractor and fusion in one training step: a few images are encoded, and several questions asked about each.

The teacher looks where the student looks (feature alignment): its unpruned extractor describes the student's boxes, so
that token i means the same to both. What the extractor itself is to keep, it learns from the same unpruned one: the
soft targets of the RPN and of the box head, weighted by how much the two see there; no annotated box is needed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.compress.distil import DistilObjective
from edgevlm.job import Job
from edgevlm.models.tee import TEE, BoxOutput, Dense, Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import PruneSection
from edgevlm.train.drawn import join, number_of, open_drawn, shuffle_parts
from edgevlm.train.images import ImageBatch, ImageQuestions, questions_about
from edgevlm.train.loop import Batch, fit
from edgevlm.train.regions import AnswerBatch

EVERYWHERE = 0.05
"""Weight of a proposal in which neither extractor sees anything."""


class JointObjective(nn.Module):
    """Distillation of the answers on regions found in the step + distillation of the extractor."""

    def __init__(self, inner: DistilObjective, teacher: VLM, extractor_weight: float) -> None:
        super().__init__()
        self.inner, self.extractor_weight = inner, extractor_weight
        self._teacher = [teacher]  # a list: not a submodule
        inner.student.tee.requires_grad_(True)

    @property
    def student(self) -> VLM:
        """What is trained."""
        return self.inner.student

    def forward(
        self, images: ImageBatch, drawn: AnswerBatch | None = None, shuffle: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one step.

        Args:
            images: with questions.
            drawn: drawn questions beside them.
            shuffle: seed of the order of the image's parts; None = as they are.
        """
        pixels = images.pixels_BHWC.permute(0, 3, 1, 2).float()
        student, teacher = self.student.tee, self._teacher[0].to(pixels.device).tee
        seen, looks_BND, extractor_loss = look(student, teacher, pixels)
        batch = questions_about(seen, images, student.limits)
        if shuffle is not None:
            batch = shuffle_parts(batch, self.student.config.fusion.parts, shuffle)
        teacher_regions = Regions(looks_BND[images.image_Q], *(part.detach() for part in batch.regions[1:]))
        if drawn is not None:
            pad_id = self.student.fusion.pad_id
            teacher_regions = join(batch._replace(regions=teacher_regions), drawn, pad_id).regions
            batch = join(batch, drawn, pad_id)
        loss, logs = self.inner(batch, teacher_regions=teacher_regions)
        return loss + self.extractor_weight * extractor_loss, {**logs, "extractor": extractor_loss.detach()}


def look(student: TEE, teacher: TEE, pixels_BCHW: Tensor) -> tuple[Regions, Tensor, Tensor]:
    """The student's regions (B, N), the teacher's features (B, N, D) of the very same boxes, and `imitation`."""
    dense = student.dense(pixels_BCHW)
    with torch.no_grad():
        target = teacher.dense(pixels_BCHW)
        boxes = student.fixed_boxes(len(pixels_BCHW)) if student.config.grid else student.propose(dense)
        expected = teacher.box_features(target.maps, boxes)
    # An attribute head of its own embeds a class: the same for both.
    output = student.box_features(dense.maps, boxes, expected.class_logits_BRC[..., :-1].argmax(-1))
    loss = box_imitation(output, expected)
    looks_BPD = teacher.region_features(expected)
    if student.config.grid:
        regions = Regions(student.region_features(output), boxes / student.limits, torch.ones_like(boxes[..., 0]))
        return regions, looks_BPD, loss
    regions, aligned = student.select(boxes, output), student.select(boxes, output, looks_BPD)
    return regions, aligned.features_BND, loss + anchor_imitation(dense, target)


def anchor_imitation(student: Dense, teacher: Dense) -> Tensor:
    """KL of the objectness where either sees an object, smooth L1 of the deltas where the teacher does; 0 when equal."""
    p_BM = teacher.objectness_BM.sigmoid()
    seen_BM = p_BM + student.objectness_BM.detach().sigmoid()
    objectness = _binary_kl(student.objectness_BM, teacher.objectness_BM)
    deltas = F.smooth_l1_loss(student.deltas_BM4, teacher.deltas_BM4, beta=1 / 9, reduction="none").sum(-1)
    return _mean(objectness, seen_BM) + _mean(deltas, p_BM)


def box_imitation(student: BoxOutput, teacher: BoxOutput) -> Tensor:
    """The same of the box head: classes where either sees an object, boxes and attributes where the teacher does."""
    log_q, log_p = student.class_logits_BRC.log_softmax(-1), teacher.class_logits_BRC.log_softmax(-1)
    classes = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    object_BR, object_student_BR = 1 - log_p[..., -1].exp(), 1 - log_q[..., -1].detach().exp()
    deltas = F.smooth_l1_loss(student.deltas_BR4, teacher.deltas_BR4, reduction="none").sum(-1)
    attributes = _binary_kl(student.attribute_logits_BRA, teacher.attribute_logits_BRA).sum(-1)
    seen_BR = torch.maximum(object_BR, object_student_BR) + EVERYWHERE
    return _mean(classes, seen_BR) + _mean(deltas + attributes, object_BR)


def _binary_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    p = teacher_logits.sigmoid()
    losses = (F.binary_cross_entropy_with_logits(x, p, reduction="none") for x in (student_logits, teacher_logits))
    return next(losses) - next(losses)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


def fit_images(
    objective: nn.Module,
    model: VLM,
    job: Job,
    section: PruneSection,
    source: ImageQuestions,
    *,
    what: str,
    seed: int,
    **settings: Any,
) -> None:
    """As `train.answering.fit_answers`, from the images of `source`: `section.images_per_step` of them in each step.

    `objective` takes what `JointObjective` takes; drawn sentences join every batch where the recipe has them.
    """
    synthetic = job.recipe.synthetic
    drawn = open_drawn(job, seed) if synthetic else None

    def make_batch(rows: Tensor) -> Batch:
        images, number = source.batch(rows), number_of(rows)
        if drawn is None or synthetic is None:
            return {"images": images}
        images = images._replace(input_ids_QL=drawn.spell(images.input_ids_QL))
        companions, _ = drawn.companions(len(images.answers_Q), synthetic.mix, number) or (None, None)
        return {"images": images, "drawn": companions, "shuffle": number}

    fit(
        objective,
        len(source.rows),
        make_batch,
        section.model_copy(update={"batch_size": section.images_per_step}),
        what=what,
        work_dir=job.out_dir,
        key=f"{job.provenance.key}-{what}",
        seed=seed,
        reporter=job.reporter,
        names=lambda rows: [source.names[i] for i in source.rows[rows].tolist()],
        **settings,
    )
    if drawn is not None:
        drawn.tie(model)
