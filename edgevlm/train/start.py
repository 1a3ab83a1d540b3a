"""Where fine-tuning on a task starts: the fusion of an earlier checkpoint, or a new one, on the run's own extractor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevlm.artifacts import Checkpoint
from edgevlm.errors import CheckpointError, RecipeError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.registry import resolve_fusion
from edgevlm.models.vlm import VLM
from edgevlm.recipe import FineTuneSection
from edgevlm.train.answering import with_fusion

PARTS = ("fusion.", "word_head.", "match_head.")
"""What is taken over. The extractor is the run's: the fusion reads its cached features."""


def starting_model(job: Job, section: FineTuneSection, heads: Sequence[str], **settings: Any) -> tuple[VLM, Checkpoint]:
    """A model with the wanted heads; those that the earlier checkpoint lacks are untrained.

    Args:
        job: with the checkpoint `detector`, and where the run pre-trains, `pretrain`.
        section: names a new fusion, or a checkpoint to start from.
        heads: heads that the task needs beside the answers'.
        settings: further fields of the `ModelConfig`.

    Raises:
        RecipeError: neither a fusion nor an earlier checkpoint.
        CheckpointError: the earlier checkpoint has another vocabulary, or its fusion reads other features.
    """
    detector, manifest = vlm.load(job.inputs["detector"])
    if section.fusion is not None:
        fusion = resolve_fusion(section.fusion)
        return with_fusion(detector, manifest, fusion, heads=tuple(heads), **settings), manifest
    folder = job.inputs.get("pretrain", Path(section.start) if section.start else None)
    if folder is None:
        raise RecipeError(
            "Fine-tuning has no fusion to start from", "Set `start` to a checkpoint, or `fusion` for an untrained one"
        )
    source, theirs = vlm.load(folder)
    if theirs.tokenizer != manifest.tokenizer:
        raise CheckpointError(
            f"The checkpoint in {folder} was trained with another vocabulary", "Start from this run's"
        )
    model = with_fusion(detector, manifest, theirs.model.fusion, heads=tuple(heads), **settings)
    wanted = model.state_dict().keys()
    taken = {name: value for name, value in source.state_dict().items() if name.startswith(PARTS) and name in wanted}
    try:
        model.load_state_dict(taken, strict=False)
    except RuntimeError as problem:
        reason = str(problem).splitlines()[1].strip()
        raise CheckpointError(
            f"The fusion in {folder} does not fit this run's extractor ({reason})",
            "Use the extractor it was trained on",
        ) from problem
    return model, manifest
