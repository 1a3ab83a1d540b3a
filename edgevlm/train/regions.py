"""Stage `regions`: run the frozen extractor over all splits once; the fusion is then trained on the cached features.

As in MiniVLM, the extractor is not tuned with the fusion, so an image costs its encoding once and not once per
question and epoch.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgevlm.artifacts import VOCABULARY, WEIGHTS, Checkpoint, Labels, RegionCache, TokenizerSpec
from edgevlm.data import open_reader
from edgevlm.data.frames import Frames, make_questions
from edgevlm.data.text import Tokenizer
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.regions import box_iou
from edgevlm.models.tee import TEE, Regions
from edgevlm.tasks import pairs, vqa
from edgevlm.train.checkpoints import finish
from edgevlm.train.detector import load_frames

MATCH_IOU = 0.5
"""A region stands for the ground-truth object it overlaps this much."""


class AnswerBatch(NamedTuple):
    """Questions with the regions of their images, cut to the longest of the batch (B, L, N as in RegionSplit)."""

    regions: Regions
    input_ids: Tensor
    answers: Tensor
    referred: Tensor
    has_referred: Tensor
    targets: Tensor | None = None
    """(B, A) soft targets, where several annotators answered."""
    second: Regions | None = None
    """Regions of the right-hand images, where the texts are about pairs."""


@dataclass
class RegionSplit:
    """One split: regions per image, and the questions asked about them."""

    features: Tensor
    """(I, N, D) float32."""
    boxes: Tensor
    """(I, N, 4) normalised corners."""
    scores: Tensor
    """(I, N)."""
    image_index: Tensor
    """(Q,) image of each question."""
    input_ids: Tensor
    """(Q, L) int32."""
    answers: Tensor
    """(Q,) int64."""
    referred: Tensor
    """(Q, N) uint8: 1 where the region shows an object that the text refers to."""
    has_referred: Tensor
    """(Q,) uint8: 1 where the data say what the text refers to."""
    kinds: list[str]
    """(Q,) type of each question."""
    answer_ids: Tensor | None = None
    """(Q, K) int32: the answers that some annotator gave, where several answered; -1 = padding (`tasks/vqa.py`)."""
    soft: Tensor | None = None
    """(Q, K) training target of each of them, 0..1."""
    official: Tensor | None = None
    """(Q, K) official accuracy of each of them, 0..1."""
    second_index: Tensor | None = None
    """(Q,) right-hand image of each question, where texts are about pairs; `image_index` is then the left-hand one."""
    group_index: Tensor | None = None
    """(Q,) which sentence a question repeats, where texts are about pairs (for the consistency)."""

    def batch(self, rows: Tensor, score_threshold: float, pad_id: int, min_regions: int = 1) -> AnswerBatch:
        """Questions `rows`, without the columns that are padding in all of them.

        The fusion masks padding, so answers stay the same to rounding while a batch costs about half: regions that
        score below `score_threshold` come last, as does the padding of the words.
        """
        images, second = self.image_index[rows], None
        if self.second_index is not None:
            second = self.regions_of(self.second_index[rows], score_threshold, min_regions)
        regions = self.regions_of(images, score_threshold, min_regions)
        length = int((self.input_ids[rows] != pad_id).sum(1).amax())
        return AnswerBatch(
            regions,
            self.input_ids[rows, :length],
            self.answers[rows],
            self.referred[rows, : regions.scores_BN.shape[1]],
            self.has_referred[rows],
            second=second,
        )

    def regions_of(self, images: Tensor, score_threshold: float, min_regions: int = 1) -> Regions:
        """Regions of `images`, without those that score below the threshold in all of them."""
        num_regions = max(min_regions, int((self.scores[images] >= score_threshold).sum(1).amax()))
        return Regions(*(part[images, :num_regions] for part in (self.features, self.boxes, self.scores)))

    def answerable(self) -> Tensor:
        """Questions that can be trained on: one of the known answers is at least partly right."""
        right = self.answers >= 0
        if self.soft is not None:
            right = right | (self.soft > 0).any(1)
        return right.nonzero().squeeze(1)

    @classmethod
    def load(cls, folder: Path, split: str) -> "RegionSplit":
        """Read `<split>.safetensors`."""
        with safe_open(folder / f"{split}.safetensors", framework="pt") as file:
            kinds = json.loads(file.metadata()["kinds"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        kind_index = tensors.pop("kind_index")
        return cls(**tensors, kinds=[kinds[i] for i in kind_index.tolist()])

    def save(self, folder: Path, split: str) -> None:
        """Write `<split>.safetensors`."""
        kinds = sorted(set(self.kinds))
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "kinds"}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        tensors["kind_index"] = torch.tensor([kinds.index(kind) for kind in self.kinds], dtype=torch.int16)
        save_file(tensors, folder / f"{split}.safetensors", {"kinds": json.dumps(kinds)})


@torch.no_grad()
def extract(tee: TEE, frames: Frames, tokenizer: Tokenizer, labels: Labels, batch_size: int = 64) -> RegionSplit:
    """Encode all frames and line up their questions."""
    regions = encode_images(tee, frames.pixels, batch_size)
    shows = _match(regions.boxes_norm_BN4 * tee.limits.cpu(), frames)
    questions = make_questions(frames, tokenizer, labels)
    referred = torch.zeros(len(questions.answers), regions.scores_BN.shape[1], dtype=torch.uint8)
    for row, (image, objects) in enumerate(zip(questions.image_index.tolist(), questions.referred, strict=True)):
        for index in objects:
            referred[row] |= (shows[image] == index).to(torch.uint8)
    images = torch.from_numpy(questions.image_index)
    second_index = group_index = None
    if frames.second is not None:
        right = encode_images(tee, frames.second, batch_size)
        regions = Regions(*(torch.cat(both) for both in zip(regions, right, strict=True)))
        second_index = images + len(frames.ids)
        group_index = torch.from_numpy(pairs.group_index([frames.ids[i] for i in images.tolist()], questions.texts))
    return RegionSplit(
        regions.features_BND.contiguous(),
        regions.boxes_norm_BN4.contiguous(),
        regions.scores_BN.contiguous(),
        images,
        torch.from_numpy(questions.input_ids),
        torch.from_numpy(questions.answers),
        referred,
        torch.tensor([len(objects) > 0 for objects in questions.referred], dtype=torch.uint8),
        questions.kinds,
        *_annotators(frames, labels),
        second_index=second_index,
        group_index=group_index,
    )


@torch.no_grad()
def encode_images(tee: TEE, pixels_IHWC: np.ndarray, batch_size: int = 64) -> Regions:
    """Regions of all images, on the CPU."""
    parts: list[Regions] = []
    device = tee.anchors.device
    for start in range(0, len(pixels_IHWC), batch_size):
        pixels = torch.from_numpy(pixels_IHWC[start : start + batch_size]).to(device)
        parts.append(Regions(*(part.cpu() for part in tee(pixels.permute(0, 3, 1, 2).float()))))
    return Regions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _annotators(frames: Frames, labels: Labels) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Answer ids, soft targets and official scores per question, where a question has several annotators."""
    texts = [text for texts in frames.texts for text in texts]
    if not any(len(text.answers) > 1 for text in texts):
        return None, None, None
    said = [text.answers or (text.answer,) * vqa.NUM_ANNOTATORS for text in texts]
    ids_QK, soft_QK, official_QK = map(torch.from_numpy, vqa.score_table(said, labels.answers))
    return ids_QK, soft_QK, official_QK


def _match(boxes_IN4: Tensor, frames: Frames) -> Tensor:
    """Index of the object each region shows, (I, N); -1 = none."""
    shows = torch.full(boxes_IN4.shape[:2], -1, dtype=torch.long)
    for image, truth in enumerate(frames.boxes):
        if len(truth):
            best, index = box_iou(boxes_IN4[image : image + 1], torch.from_numpy(truth)[None])[0].max(1)
            shows[image] = torch.where(best >= MATCH_IOU, index, -1)
    return shows


def cache_regions(job: Job) -> RegionCache:
    """Extract every split of the dataset."""
    recipe, source = job.recipe, job.inputs["detector"]
    model, manifest = vlm.load(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tee = model.tee.to(device, memory_format=torch.channels_last)  # pyright: ignore  (a quarter faster on CPUs)
    tokenizer_spec: TokenizerSpec = manifest.tokenizer
    tokenizer = Tokenizer(source / VOCABULARY, tokenizer_spec)
    reader = open_reader(recipe.data, recipe.task, recipe.seed, job.data_path)
    counts: dict[str, int] = {}
    for split in reader.splits:
        limit = {"train": recipe.data.num_train, "val": recipe.data.num_val}.get(split, recipe.data.num_test)
        frames = load_frames(job, split, limit)
        extract(tee, frames, tokenizer, manifest.labels).save(job.out_dir, split)
        counts[split] = len(frames.ids)
    detector = read_manifest(source, Checkpoint, check_files=False)
    cache = RegionCache(
        provenance=job.provenance,
        preprocess_hash=manifest.preprocess.hash,
        extractor_hash=detector.files[WEIGHTS],
        num_images=counts,
    )
    return finish(job.out_dir, cache)
