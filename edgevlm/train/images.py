"""Questions with the images themselves, for training that changes the extractor: its regions are then made in the step."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgevlm.artifacts import VOCABULARY, Checkpoint, Labels
from edgevlm.data.frames import Frames, make_questions
from edgevlm.data.text import Tokenizer
from edgevlm.errors import DataError
from edgevlm.job import Job
from edgevlm.models.regions import box_iou
from edgevlm.models.tee import Regions
from edgevlm.recipe import PruneSection
from edgevlm.tasks import vqa
from edgevlm.train.detector import load_frames
from edgevlm.train.loop import generator_of
from edgevlm.train.regions import MATCH_IOU, AnswerBatch, annotators


class ImageBatch(NamedTuple):
    """A few images, and questions about them (B images, Q questions, L tokens, G objects)."""

    pixels_BHWC: Tensor
    """uint8."""
    boxes_BG4: Tensor
    """True boxes in pixels; rows without area are padding."""
    image_Q: Tensor
    """Image of each question, 0..B-1."""
    input_ids_QL: Tensor
    answers_Q: Tensor
    referred_QG: Tensor
    """1.0 where the question is about the object."""
    targets_QA: Tensor | None
    """Soft targets, where several annotators answered."""


class ImageQuestions:
    """The first images of a split in memory, with their questions.

    Args:
        frames: of the split.
        tokenizer, labels: the model's.
        per_image: questions drawn of each image of a batch, at most.
    """

    def __init__(self, frames: Frames, tokenizer: Tokenizer, labels: Labels, per_image: int) -> None:
        questions = make_questions(frames, tokenizer, labels)
        self.names, self.per_image, self.num_answers = frames.ids, per_image, len(labels.answers)
        self.pixels, self.pad_id = torch.from_numpy(frames.pixels), tokenizer.spec.pad_id
        self.input_ids, self.answers = torch.from_numpy(questions.input_ids), torch.from_numpy(questions.answers)
        self.ids, self.soft, _ = annotators(frames, labels)
        right = questions.answers >= 0 if self.soft is None else (self.soft > 0).any(1).numpy()
        self.of_image = [np.flatnonzero((questions.image_index == i) & right) for i in range(len(frames))]
        most = max(1, max(len(boxes) for boxes in frames.boxes))
        self.boxes = torch.zeros(len(frames), most, 4)
        for row, boxes in zip(self.boxes, frames.boxes, strict=True):
            row[: len(boxes)] = torch.from_numpy(boxes)
        self.referred = torch.zeros(len(questions), most)
        for row, objects in zip(self.referred, questions.referred, strict=True):
            row[list(objects)] = 1.0
        self.rows = torch.tensor([i for i, own in enumerate(self.of_image) if len(own)])
        """Images that have a question to learn from."""
        if not len(self.rows):
            raise DataError("No training image has a question with a known answer", "Raise prune.num_images")

    def batch(self, rows: Tensor) -> ImageBatch:
        """Images `rows` of `self.rows`, each with up to `per_image` of its questions; the same rows, the same batch."""
        images, generator = self.rows[rows], generator_of(rows)
        chosen, owner = [], []
        for place, image in enumerate(images.tolist()):
            own = self.of_image[image]
            order = torch.randperm(len(own), generator=generator)[: self.per_image].numpy()
            chosen += own[order].tolist()
            owner += [place] * len(order)
        index, targets = torch.tensor(chosen), None
        length = int((self.input_ids[index] != self.pad_id).sum(1).amax())
        if self.ids is not None and self.soft is not None:
            targets = vqa.dense_targets(self.ids[index], self.soft[index], self.num_answers)
        return ImageBatch(
            self.pixels[images],
            self.boxes[images],
            torch.tensor(owner),
            self.input_ids[index, :length],
            self.answers[index],
            self.referred[index],
            targets,
        )


def image_questions(job: Job, section: PruneSection, manifest: Checkpoint) -> ImageQuestions:
    """The training images of a job, `section.num_images` at most."""
    limits = [limit for limit in (job.recipe.data.num_train, section.num_images) if limit is not None]
    tokenizer = Tokenizer(job.inputs["prepare"] / VOCABULARY, manifest.tokenizer)
    per_image = max(1, round(section.batch_size / section.images_per_step))
    return ImageQuestions(load_frames(job, "train", min(limits, default=None)), tokenizer, manifest.labels, per_image)


def questions_about(regions: Regions, batch: ImageBatch, limits: Tensor) -> AnswerBatch:
    """The batch with the regions that an extractor has just found, a row per question.

    Args:
        regions: of the B images.
        batch: the images and their questions.
        limits: of the extractor (`TEE.limits`): its boxes are normalised, the true ones are not.
    """
    iou_BNG = box_iou(regions.boxes_norm_BN4.detach() * limits, batch.boxes_BG4)
    best_BN, index_BN = iou_BNG.max(2)
    shown_QN, index_QN = (best_BN >= MATCH_IOU)[batch.image_Q], index_BN[batch.image_Q]
    referred_QN = batch.referred_QG.gather(1, index_QN) * shown_QN
    return AnswerBatch(
        Regions(*(part[batch.image_Q] for part in regions)),
        batch.input_ids_QL,
        batch.answers_Q,
        referred_QN,
        batch.referred_QG.any(1).to(torch.uint8),
        batch.targets_QA,
    )
