"""The static-shape programs that every target exports: `encode_image`, and `answer_<rung>` for each token budget.

Batch 1. The image is encoded once; each question about it runs one answer program on the stored regions.

| program | inputs | outputs |
|---|---|---|
| encode_image | image uint8 (1, H, W, 3) RGB | features (1, N, D), boxes (1, N, 4) corners 0..1, scores (1, N) |
| answer_<rung> | features, boxes, scores, input_ids int32 (1, L) | logits (1, A), looked_at (1, N) |
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgevlm.artifacts import ENCODE, Checkpoint, Rung, answer_name
from edgevlm.models.tee import Regions
from edgevlm.models.trimmer import FULL, Trim, trim_of
from edgevlm.models.vlm import VLM


class EncodeImage(nn.Module):
    """uint8 pixels to regions; scaling and normalisation are inside."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.tee = model.tee

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.tee(image.to(torch.float32).permute(0, 3, 1, 2)))


class EncodePlanes(nn.Module):
    """The same from float (1, 3, H, W) planes in 0..255: the form of Core ML's own image input."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.tee = model.tee

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.tee(image))


class AnswerQuestion(nn.Module):
    """Regions and token ids to answer logits at one static token budget."""

    def __init__(self, model: VLM, trim: Trim = FULL) -> None:
        super().__init__()
        self.fusion, self.head, self.tee_config = model.fusion, model.head, model.config.tee
        self.trim = trim

    def forward(self, features: Tensor, boxes: Tensor, scores: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        valid = (scores >= self.tee_config.score_threshold).to(features.dtype)
        output = self.fusion(features, boxes, valid, input_ids, trim=self.trim)
        return self.head(output.pooled_BD), output.looked_at_BN


@dataclass(frozen=True)
class Program:
    """A module with static example inputs and the names of its inputs and outputs."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


def rungs_of(manifest: Checkpoint) -> tuple[Rung, ...]:
    """The ladder of a checkpoint; a model that was never trimmed has the full budget only."""
    return manifest.rungs or (Rung(name="full", regions=(manifest.model.tee.num_regions,)),)


def build_programs(model: VLM, manifest: Checkpoint) -> list[Program]:
    """`encode_image` first, then one answer program per rung, largest budget first."""
    model = model.eval()
    spec, tee = manifest.preprocess, manifest.model.tee
    encode = Program(
        ENCODE,
        EncodeImage(model).eval(),
        {"image": torch.zeros(1, spec.height, spec.width, 3, dtype=torch.uint8)},
        ("features", "boxes", "scores"),
    )
    regions = Regions(
        torch.zeros(1, tee.num_regions, model.tee.region_dim),
        torch.zeros(1, tee.num_regions, 4),
        torch.ones(1, tee.num_regions),
    )
    ids = torch.full((1, manifest.tokenizer.max_tokens), manifest.tokenizer.pad_id, dtype=torch.int32)
    ids[0, 0] = manifest.tokenizer.cls_id
    inputs = {
        "features": regions.features_BND,
        "boxes": regions.boxes_norm_BN4,
        "scores": regions.scores_BN,
        "input_ids": ids,
    }
    answers = [
        Program(answer_name(r.name), AnswerQuestion(model, trim_of(r)).eval(), inputs, ("logits", "looked_at"))
        for r in rungs_of(manifest)
    ]
    return [encode, *answers]
