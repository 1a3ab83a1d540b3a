"""The whole model, pixels to answer: TEE -> fusion -> head; building it from a config and loading it from a folder."""

from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edgevlm.artifacts import WEIGHTS, Checkpoint, Labels, ModelConfig, PreprocessSpec, TokenizerSpec
from edgevlm.errors import CheckpointError
from edgevlm.manifests import read_manifest
from edgevlm.models.fusion import Fusion
from edgevlm.models.groups import cut, groups_of
from edgevlm.models.heads import AnswerHead, LinearAnswerHead, PairHead, WordHead
from edgevlm.models.stream import FusionOutput
from edgevlm.models.tee import TEE, Regions
from edgevlm.models.trimmer import FULL, Trim


class Answer(NamedTuple):
    """Logits over the answers, and what the fusion produced on the way."""

    logits_BA: Tensor
    fusion: FusionOutput


class VLM(nn.Module):
    """One extractor, one fusion, one answer head, and an auxiliary head used in training only."""

    def __init__(self, config: ModelConfig, spec: PreprocessSpec, tokenizer: TokenizerSpec, labels: Labels) -> None:
        super().__init__()
        self.config = config
        self.tee = TEE(config.tee, spec, len(labels.classes), len(labels.attributes))
        self.fusion = Fusion(config.fusion, tokenizer, self.tee.region_dim)
        hidden, num_answers, dropout = config.fusion.hidden, len(labels.answers), config.answer_dropout
        linear = config.answer_head == "linear"
        self.head = LinearAnswerHead(hidden, num_answers, dropout) if linear else AnswerHead(hidden, num_answers)
        self.referred = nn.Linear(hidden, 1)
        self.word_head = WordHead(hidden, tokenizer.vocab_size) if "words" in config.heads else None
        self.match_head = nn.Linear(hidden, 2) if "match" in config.heads else None
        self.pair_head = PairHead(hidden, num_answers, dropout=dropout) if "pair" in config.heads else None
        for group in groups_of(self, ("vision",)) if config.widths else ():
            if group.name in config.widths:
                cut(self, group, range(config.widths[group.name]))

    def encode(self, pixels_BCHW: Tensor) -> Regions:
        """Regions of images given as (B, 3, H, W) float, 0..255."""
        return self.tee(pixels_BCHW)

    def answer(
        self,
        regions: Regions,
        input_ids_BL: Tensor,
        trim: Trim = FULL,
    ) -> Answer:
        """Answer logits for questions about already encoded images (row i asks about image i)."""
        output = self.fuse(regions, input_ids_BL, trim=trim)
        return Answer(self.head(output.pooled_BD), output)

    def fuse(self, regions: Regions, input_ids_BL: Tensor, **settings: Any) -> FusionOutput:
        """The fusion alone, for other heads than the answers'; `settings` as in `Fusion.forward`."""
        return self.fusion(regions.features_BND, regions.boxes_norm_BN4, self.valid(regions), input_ids_BL, **settings)

    def answer_pair(self, left: Regions, right: Regions, input_ids_BL: Tensor) -> Tensor:
        """Answer logits (B, A) for texts about two images: one pass of the text beside each (Oscar's form for NLVR2).

        Needs the head `pair`.
        """
        pooled = (self.fuse(regions, input_ids_BL).pooled_BD for regions in (left, right))
        return self.pair_head(*pooled)  # pyright: ignore[reportOptionalCall]

    def valid(self, regions: Regions) -> Tensor:
        """1.0 where a region scores enough to count, 0.0 where it is padding; (B, N)."""
        return (regions.scores_BN >= self.config.tee.score_threshold).to(regions.features_BND.dtype)

    def refer(self, answer: Answer) -> Tensor:
        """Logits (B, N) of 'the text refers to this region'; for training only."""
        return self.referred(answer.fusion.regions_BND).squeeze(-1)


def build(manifest: Checkpoint) -> VLM:
    """An untrained model of the manifest's shape."""
    return VLM(manifest.model, manifest.preprocess, manifest.tokenizer, manifest.labels)


def load(folder: Path) -> tuple[VLM, Checkpoint]:
    """The model in a checkpoint folder, in evaluation mode.

    Raises:
        CheckpointError: no checkpoint, altered files, or weights of another shape. Pickled weights are never read.
    """
    manifest = read_manifest(folder, Checkpoint)
    model = build(manifest)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (FileNotFoundError, SafetensorError, RuntimeError) as problem:
        reason = str(problem).splitlines()[0]
        raise CheckpointError(f"{folder / WEIGHTS} does not fit its manifest ({reason})", "Train it again") from problem
    return model.eval(), manifest
