"""Stage `regions`: run the frozen extractor over all splits once; the fusion is then trained on the cached features.

As in MiniVLM, the extractor is not tuned with the fusion, so an image costs its encoding once and not once per
question and epoch.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

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

    def batch(self, rows: Tensor, score_threshold: float, pad_id: int, min_regions: int = 1) -> AnswerBatch:
        """Questions `rows`, without the columns that are padding in all of them.

        The fusion masks padding, so answers stay the same to rounding while a batch costs about half: regions that
        score below `score_threshold` come last, as does the padding of the words.
        """
        images = self.image_index[rows]
        num_regions = max(min_regions, int((self.scores[images] >= score_threshold).sum(1).amax()))
        length = int((self.input_ids[rows] != pad_id).sum(1).amax())
        regions = (part[images, :num_regions] for part in (self.features, self.boxes, self.scores))
        return AnswerBatch(
            Regions(*regions),
            self.input_ids[rows, :length],
            self.answers[rows],
            self.referred[rows, :num_regions],
            self.has_referred[rows],
        )

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
        tensors["kind_index"] = torch.tensor([kinds.index(kind) for kind in self.kinds], dtype=torch.int16)
        save_file(tensors, folder / f"{split}.safetensors", {"kinds": json.dumps(kinds)})


@torch.no_grad()
def extract(tee: TEE, frames: Frames, tokenizer: Tokenizer, labels: Labels, batch_size: int = 64) -> RegionSplit:
    """Encode all frames and line up their questions."""
    parts: list[Regions] = []
    device = tee.anchors.device
    for start in range(0, len(frames.ids), batch_size):
        pixels = torch.from_numpy(frames.pixels[start : start + batch_size]).to(device)
        parts.append(Regions(*(part.cpu() for part in tee(pixels.permute(0, 3, 1, 2).float()))))
    regions = Regions(*(torch.cat(column) for column in zip(*parts, strict=True)))
    shows = _match(regions.boxes_norm_BN4 * tee.limits.cpu(), frames)
    questions = make_questions(frames, tokenizer, labels)
    referred = torch.zeros(len(questions.answers), regions.scores_BN.shape[1], dtype=torch.uint8)
    for row, (image, objects) in enumerate(zip(questions.image_index.tolist(), questions.referred, strict=True)):
        for index in objects:
            referred[row] |= (shows[image] == index).to(torch.uint8)
    return RegionSplit(
        regions.features_BND.contiguous(),
        regions.boxes_norm_BN4.contiguous(),
        regions.scores_BN.contiguous(),
        torch.from_numpy(questions.image_index),
        torch.from_numpy(questions.input_ids),
        torch.from_numpy(questions.answers),
        referred,
        torch.tensor([len(objects) > 0 for objects in questions.referred], dtype=torch.uint8),
        questions.kinds,
    )


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
